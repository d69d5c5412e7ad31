"""
Kill every training stage at random moments, in one process and in two, and see that it resumes bit for bit.

    python tests/soak.py                   # 50 kills, about ten minutes on two cores
    python tests/soak.py --kills=8 --seed=3

Each kill has a run of its own: the stage starts by its command, is sent SIGKILL (now and then SIGTERM, which saves) at
a moment of its training, and is started again with --resume=auto until it ends. Its weights and its log then have to be
those of a run that nobody disturbed. Prints a line a kill; the exit code is 1 where one of them differs.
"""
import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

from common.checkpoints import read_log
from stages import stages
from tiny import losses, weights

STEPS = dict(max_steps=60, save_every=7, log_every=1, eval_every=0, warmup_steps=0, lr=1e-3, device='cpu')

def command(script, options):
    return [sys.executable, f"{script}.py", *(f"--{key}={value}" for key, value in options.items())]

def begin(script, options, ranks):
    """Start a stage in so many processes."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    several = lambda rank: dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1',
                                MASTER_PORT=str(port)) if ranks > 1 else {}
    return [subprocess.Popen(command(script, options), cwd=os.path.dirname(HERE), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1') | several(r))
            for r in range(ranks)]

def end(processes, within=300):
    """Wait for all of them; return the exit codes and what they said.

    Who still waits for one that was killed before they had met is killed, as torchrun does.
    """
    said = []
    for process in processes:
        try:
            said.append(process.communicate(timeout=within)[1])
        except subprocess.TimeoutExpired:
            process.kill()
            said.append(process.communicate()[1])
    return [process.returncode for process in processes], said

def steps_of(folder):
    return max((line['step'] for name in ('log.jsonl', 'log.new.jsonl')
                for line in read_log(os.path.join(folder, name))), default=0)

def wait_for_step(processes, folder, step):
    """Wait until a run has logged a step, or has ended."""
    while steps_of(folder) < step and all(process.poll() is None for process in processes):
        time.sleep(0.002)

def main():
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument('--kills', type=int, default=50)
    asked.add_argument('--seed', type=int, default=1)
    asked = asked.parse_args()
    rng, wrong = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        table, whole = stages(folder), {}
        for kill in range(asked.kills):
            name, ranks = sorted(table)[kill % len(table)], 1 + kill // len(table) % 2
            script, options = table[name]
            options = options | {k: v for k, v in STEPS.items() if k != 'eval_every' or 'val_data' in options}
            if (name, ranks) not in whole:
                out = os.path.join(folder, f"{name}-{ranks}")
                codes, said = end(begin(script, options | dict(out_dir=out), ranks))
                assert codes == [0] * ranks, said
                whole[name, ranks] = losses(read_log(os.path.join(out, 'log.jsonl'))), weights(out)
            out = os.path.join(folder, f"kill{kill}")
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            step, victim = rng.randrange(STEPS['max_steps']), rng.randrange(ranks)
            processes = begin(script, options | dict(out_dir=out), ranks)
            wait_for_step(processes, out, step)
            time.sleep(rng.random() * 0.05)
            processes[victim].send_signal(number)
            codes, _ = end(processes, within=60)
            at, saved = steps_of(out), os.path.exists(os.path.join(out, 'state.pt'))
            again, said = end(begin(script, options | dict(out_dir=out, resume='auto'), ranks))
            same = again == [0] * ranks and (losses(read_log(os.path.join(out, 'log.jsonl'))), weights(out)) == whole[
                name, ranks]
            wrong += not same
            print(f"{kill + 1:3d} {name:10s} {ranks} process(es), {signal.Signals(number).name} to {victim} in step "
                  f"{at}, ended with {codes}, {'a' if saved else 'no'} checkpoint: "
                  f"{'the same' if same else 'DIFFERENT'}", flush=True)
            if not same:
                print(again, *said, sep='\n')
    print(f"{asked.kills - wrong} of {asked.kills} resumed bit for bit")
    raise SystemExit(wrong > 0)

if __name__ == '__main__':
    main()
