"""The whole pipeline on the toy world, from text to an aligned model, in minutes on two CPU cores:

    pretrain -> SFT -> collect preferences -> reward model -> PPO, DPO and what else --methods asks for -> evaluate

    python demo.py
    python demo.py --methods=all --seed=2 --out_dir=out/toy2

It prints and runs the commands that one would type. A second run reuses what is finished, and resumes what is not.
Ctrl-C, SIGTERM and SIGHUP reach the stages: they save and end. If demo.py itself is killed, Linux ends them likewise.

The methods: ppo, dpo, reinforce, rloo, grpo, rrhf, ipo, hinge, simpo, orpo, kto, rejection, distill.

With --rounds=N the feedback is online (Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 4.5): the last PPO
policy answers the training prompts, its answers are ranked, the reward model is trained anew from the SFT model on all
rankings so far, and PPO trains that policy further. That policy is the reference: beta prices what one round changes.
"""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.options import fail, launch, leave_closed_terminal, require
from common.records import LOCKS, lock, read_json, write_atomic

DEFAULT = 'out/toy' # where the files in config/toy point
RANKINGS = ['collect train', 'collect test']
METHODS = dict( # a config file and a folder each: the script, and the stages that it stands on
    ppo=('ppo.py', ['reward']), dpo=('dpo.py', RANKINGS), reinforce=('reinforce.py', ['reward']),
    rloo=('reinforce.py', ['reward']), grpo=('reinforce.py', ['reward']), rrhf=('rrhf.py', RANKINGS),
    ipo=('dpo.py', RANKINGS), hinge=('dpo.py', RANKINGS), simpo=('dpo.py', RANKINGS), orpo=('dpo.py', RANKINGS),
    kto=('kto.py', RANKINGS), rejection=('sft.py', ['collect best']), distill=('sft.py', ['rejection']))
AT_ONCE = 2 # stages that run side by side, where they do not stand on one another
POSIX = os.name == 'posix' # else Windows, where none of this was ever run

@dataclass
class Config:
    out_dir: str = DEFAULT # everything that is made, but for the data
    methods: str = 'ppo,dpo' # what to train from the preferences: some of the methods above, or all
    rounds: int = 1 # of collecting, reward model and PPO; those after the first start from the round before
    seed: int = 1 # of every stage
    fresh: bool = False # do everything again

    def __post_init__(self):
        if self.methods == 'all':
            self.methods = ','.join(METHODS)
        names = self.methods.split(',')
        require(self, seed=(0 <= self.seed < 2**32, 'at least 0 and below 2^32'),
                out_dir=(re.fullmatch('[^,=]+', self.out_dir), 'a folder with no comma and no = in its name'),
                rounds=(self.rounds == 1 or self.rounds > 1 and 'ppo' in names,
                        '1, or more with ppo among the methods'),
                methods=(set(names) <= set(METHODS) and len(set(names)) == len(names),
                         f"all, or names among {','.join(METHODS)}, each once"))
        require(self, methods=('distill' not in names or 'rejection' in names, 'with rejection, who teaches distill'))

def ppo_of_rounds(cfg):
    """Return the folder and stage of each round's policy: ppo, ppo2, ppo3, …"""
    return ['ppo', *(f'ppo{n}' for n in range(2, cfg.rounds + 1))]

def stages(cfg):
    """List every stage: name, script, config file or '', further options, product, stages that it stands on.

    The product is the file that is there once the stage is done.
    """
    out, methods, ppos = cfg.out_dir, cfg.methods.split(','), ppo_of_rounds(cfg)
    todo = [('data', 'data/toy/prepare.py', '', {}, 'data/toy/toy.tiktoken', [])]

    def add(name, script, config, product, *needs, **options):
        todo.append((name, script, f'config/toy/{config}.py', options, f'{out}/{product}', needs))

    add('pretrain', 'sft.py', 'pretrain', 'base/model.safetensors', 'data')
    add('sft', 'sft.py', 'sft', 'sft/model.safetensors', 'pretrain')
    for split in ('train', 'test'):
        file = f'rankings_{split}.jsonl'
        add(f'collect {split}', 'collect.py', 'collect', file, 'sft', prompts=f'data/toy/prompts_{split}.jsonl',
            out=f'{out}/{file}')
    add('reward', 'reward.py', 'reward', 'reward/model.safetensors', *RANKINGS)
    if 'rejection' in methods:
        add('collect best', 'collect.py', 'collect_best', 'best_of_n.jsonl', 'reward')
    for name in methods:
        script, needs = METHODS[name]
        add(name, script, name, f'{name}/model.safetensors', *needs)
    rankings = f'{out}/rankings_train.jsonl' # of all rounds so far
    for n, (last, ppo) in enumerate(zip(ppos, ppos[1:]), start=2):
        file, policy, reward = f'rankings_train{n}.jsonl', f'{out}/{last}', f'{out}/reward{n}'
        rankings += f',{out}/{file}'
        add(f'collect train{n}', 'collect.py', 'collect', file, last, prompts='data/toy/prompts_train.jsonl',
            out=f'{out}/{file}', policy=policy)
        add(f'reward{n}', 'reward.py', 'reward', f'reward{n}/model.safetensors', f'collect train{n}',
            train_data=rankings, out_dir=reward)
        add(ppo, 'ppo.py', 'ppo', f'{ppo}/model.safetensors', f'reward{n}', policy=policy, reward_model=reward,
            out_dir=f'{out}/{ppo}')
    models = ','.join(f'{name}={out}/{name}' for name in ['base', 'sft', *methods, *ppos[1:]])
    add('evaluate', 'evaluate.py', 'evaluate', 'evaluate/results.json', 'reward', *methods, *ppos[1:], models=models)
    return todo

def command_of(stage, cfg):
    """Return the words of a stage's command, as one types them."""
    name, script, config, options, *_ = stage
    text = Path(config).read_text(encoding='utf-8') if config and cfg.out_dir != DEFAULT else ''
    paths = re.findall(rf'^(\w+) = ["\']([^"\']*{DEFAULT}[^"\']*)', text, re.MULTILINE)
    options = {key: path.replace(DEFAULT, cfg.out_dir) for key, path in paths} | options
    if name != 'data':
        options.setdefault('seed', cfg.seed)
    return ['python', script, *([config] if config else []), *(f'--{k}={v}' for k, v in options.items())]

def read_record(cfg):
    """Return demo.json: {stage: [its command, when it began, when it ended or null]}."""
    path = f'{cfg.out_dir}/demo.json'
    record = read_json(path) if os.path.exists(path) else {}
    return {k: v for k, v in record.items() if isinstance(v, list) and len(v) == 3} # older ones had two parts

def claim(cfg):
    """Take out_dir for this process and this seed alone, emptied if `fresh`."""
    if not os.path.exists('config/toy/pretrain.py'):
        fail(f"{os.getcwd()}: demo.py runs in the repository alone; wanted: cd {Path(__file__).resolve().parent}")
    if cfg.fresh and os.path.exists(cfg.out_dir) and not os.path.exists(f'{cfg.out_dir}/demo.json'):
        fail(f"--fresh=True: {cfg.out_dir} would be removed, and has no demo.json: it was not made by demo.py")
    os.makedirs(cfg.out_dir, exist_ok=True)
    lock(f'{cfg.out_dir}/.lock')
    if cfg.fresh:
        for path in Path(cfg.out_dir).iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != '.lock':
                path.unlink()
    seed = f'--seed={cfg.seed}'
    for word in read_record(cfg).get('pretrain', [[]])[0]:
        if word.startswith('--seed=') and word != seed:
            fail(f"{seed}: {cfg.out_dir} was made with {word}; wanted that, another --out_dir, or --fresh=True, which "
                 "removes it")

def end_with(parent):
    """Let the kernel send this child SIGTERM when its parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM) # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1) # it was gone before

def start(command, slot):
    """Print a command and start it. slot: the terminal's line for its progress bar.

    The terminal does not know the new process group, so one Ctrl-C is one signal: that which `run_stages` passes on.
    The lock is inherited: a stage that outlives demo.py, as on macOS, keeps a second demo.py away.
    """
    threads = os.environ.get('OMP_NUM_THREADS', '1') # so small a model gains nothing by a second
    typed, more = f"set OMP_NUM_THREADS={threads}& {subprocess.list2cmdline(command)}", {}
    if POSIX:
        typed = f"OMP_NUM_THREADS={threads} {shlex.join(command)}"
        more = dict(process_group=0, pass_fds=[file.fileno() for file in LOCKS.values()],
                    preexec_fn=partial(end_with, os.getpid()) if sys.platform == 'linux' else None)
    print(f"\n$ {typed}", flush=True)
    return subprocess.Popen([sys.executable, *command[1:]],
                            env=os.environ | dict(OMP_NUM_THREADS=threads, TQDM_POSITION=str(slot)), **more)

def tell(running, number):
    """Send the stages of {slot: (name, process)} a signal; Windows can only end them."""
    for _, process in running.values():
        process.send_signal(number) if POSIX else process.terminate()

def first_to_end(running):
    """Wait for the first of {slot: (name, process)} to end."""
    while True:
        for slot, (_, process) in running.items():
            if process.poll() is not None:
                return slot
        time.sleep(0.02)

def run_stages(todo, cfg):
    """Run stages, two at a time, and return {stage: its seconds}. What an earlier run did is reused.

    todo: a list as `stages` returns it. Where a stage fails, or after a signal, the program ends with that exit code.
    """
    waiting, running, done, record = list(todo), {}, set(), read_record(cfg) # running: {slot: (name, process)}
    code = 0

    def put(name, *entry):
        record[name] = entry
        write_atomic(f'{cfg.out_dir}/demo.json', json.dumps(record, indent=1))

    def on_signal(number, frame):
        nonlocal code
        leave_closed_terminal()
        if POSIX and (not code or number == signal.SIGINT): # a second Ctrl-C ends them; Windows told them itself
            tell(running, number)
        code = code or 128 + number

    def on_stop(number, frame): # Ctrl-Z
        tell(running, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP) # goes on at `fg`
        tell(running, signal.SIGCONT)

    before = {} # {signal: its handler}
    for name, handler in dict(SIGINT=on_signal, SIGTERM=on_signal, SIGHUP=on_signal, SIGTSTP=on_stop).items():
        number = getattr(signal, name, None) # Windows has the first two
        if number and signal.getsignal(number) is not signal.SIG_IGN: # as nohup sets it
            before[number] = signal.signal(number, handler)

    while running or waiting and not code:
        for stage in list(waiting):
            name, script, _, _, product, needs = stage
            if code or len(running) == AT_ONCE or not done.issuperset(needs):
                continue
            waiting.remove(stage)
            command = command_of(stage, cfg)
            last, began, ended = record.get(name, (None, 0, None))
            same = last == command and all(record[n][2] <= began for n in needs) # it was made from what is there now
            if same and ended and os.path.exists(product):
                print(f"{name}: done before, in {ended - began:.0f} s")
                done.add(name)
                continue
            state = product + '.partial' if script == 'collect.py' else f'{os.path.dirname(product)}/state.pt'
            stopped = same and not ended and os.path.exists(state) and os.path.getmtime(state) >= began
            put(name, command, time.time(), None)
            if name != 'data':
                if stopped: # and a later start sees again that it is not of an older run
                    os.utime(state)
                command = [*command, '--resume=True' if stopped else '--overwrite=True']
            slot = min(set(range(AT_ONCE)) - running.keys())
            running[slot] = name, start(command, slot)
            if code: # a signal came meanwhile
                tell({slot: running[slot]}, signal.SIGTERM)
        if running:
            name, process = running.pop(first_to_end(running))
            if process.returncode == 0:
                put(name, *record[name][:2], time.time())
                done.add(name)
                continue
            failed = process.returncode if process.returncode > 0 else 128 - process.returncode # or a signal ended it
            print(f"{name} ended with exit code {failed}; the same command continues from here", file=sys.stderr)
            if not code:
                tell(running, signal.SIGINT) # the other one saves and ends
            code = code or failed
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        raise SystemExit(code)
    return {name: round(record[name][2] - record[name][1], 2) for name, *_ in todo}

def main(cfg):
    began, methods, ppos = time.time(), cfg.methods.split(','), ppo_of_rounds(cfg)
    claim(cfg)
    path = f'{cfg.out_dir}/evaluate/results.json'
    if os.path.exists(path) and not {*methods, *ppos[1:]} <= read_json(path).get('models', {}).keys():
        os.remove(path) # evaluate.py was run into this folder by hand
    seconds = run_stages(stages(cfg), cfg)
    results = read_json(path) | dict(seconds=seconds, seed=cfg.seed)
    if cfg.rounds > 1:
        results['rounds'] = [results['models'][ppo]['gold'] for ppo in ppos]
        print('\ngold score of PPO, sampled, by round: ' + ', '.join(f'{gold:.3f}' for gold in results['rounds']))
    write_atomic(path, json.dumps(results, indent=1))
    print(f"\nseconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}; {time.time() - began:.0f} in all, "
          f"{AT_ONCE} at a time")
    print(f"results: {path}; figures: {cfg.out_dir}/evaluate/*.png")
    print(f'talk to it: python sample.py --policy={cfg.out_dir}/{methods[0]} --prompt="Where does the fox live?"')

if __name__ == '__main__':
    launch(main, Config)
