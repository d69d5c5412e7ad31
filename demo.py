"""The whole pipeline on the toy world, from text to an aligned model, in minutes on two CPU cores:

    pretrain -> SFT -> collect preferences -> reward model -> PPO, DPO and what else --methods asks for -> evaluate

    python demo.py
    python demo.py --methods=all --seed=2 --out_dir=out/toy2

It prints and runs the commands that one would type. A second run reuses what is finished, and resumes what is not.

With --rounds=N the feedback is online (Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 4.5): the last PPO
policy answers the training prompts, its answers are ranked, the reward model is trained anew from the SFT model on all
rankings so far, and PPO trains that policy further. That policy is the reference: beta prices what one round changes.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.options import fail, launch, require
from common.records import read_json, write_atomic

DEFAULT = 'out/toy' # where the files in config/toy point
RANKINGS = ['collect train', 'collect test']
METHODS = dict( # a config file and a folder each: the script, and the stages that it stands on
    ppo=('ppo.py', ['reward']), dpo=('dpo.py', RANKINGS), reinforce=('reinforce.py', ['reward']),
    rloo=('reinforce.py', ['reward']), grpo=('reinforce.py', ['reward']), rrhf=('rrhf.py', RANKINGS),
    ipo=('dpo.py', RANKINGS), hinge=('dpo.py', RANKINGS), simpo=('dpo.py', RANKINGS), orpo=('dpo.py', RANKINGS),
    kto=('kto.py', RANKINGS), rejection=('sft.py', ['collect best']), distill=('sft.py', ['rejection']))
AT_ONCE = 2 # stages that run side by side, where they do not stand on one another

@dataclass
class Config:
    out_dir: str = DEFAULT # everything that is made, but for the data
    methods: str = 'ppo,dpo' # what to train from the preferences: some of METHODS above, or all
    rounds: int = 1 # of collecting, reward model and PPO; those after the first start from the round before
    seed: int = 1 # of every stage
    fresh: bool = False # do everything again

    def __post_init__(self):
        if self.methods == 'all':
            self.methods = ','.join(METHODS)
        names = self.methods.split(',')
        require(self, seed=(self.seed >= 0, 'at least 0'),
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

def start(command, slot):
    """Print a command and start it. slot: the terminal's line for its progress bar."""
    threads = os.environ.get('OMP_NUM_THREADS', '1') # so small a model gains nothing by a second
    print(f"\n$ OMP_NUM_THREADS={threads} {' '.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command[1:]],
                            env=os.environ | dict(OMP_NUM_THREADS=threads, TQDM_POSITION=str(slot)))

def first_to_end(running):
    """Wait for the first of {slot: (name, process)} to end. Ctrl-C reaches all of them: they save and end."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            for slot, (_, process) in running.items():
                if process.poll() is not None:
                    return slot
            time.sleep(0.02)

def run_stages(todo, cfg):
    """Run stages, two at a time, and return {stage: its seconds}. What an earlier run did is reused.

    todo: a list as `stages` returns it. Where a stage fails the program ends with its exit code.
    """
    os.makedirs(cfg.out_dir, exist_ok=True)
    path, record = f'{cfg.out_dir}/demo.json', {} # {stage: [its command, when it began, when it ended or null]}
    if os.path.exists(path):
        record = {name: entry for name, entry in read_json(path).items() if len(entry) == 3} # older ones had two parts
    waiting, running, done, code = list(todo), {}, set(), 0 # running: {slot: (name, process)}

    def put(name, *entry):
        record[name] = entry
        write_atomic(path, json.dumps(record, indent=1))

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
            put(name, command, time.time(), None)
            if name not in ('data', 'evaluate'):
                state = product + '.partial' if script == 'collect.py' else f'{os.path.dirname(product)}/state.pt'
                stopped = same and not ended and os.path.exists(state)
                command = [*command, '--resume=True' if stopped else '--overwrite=True']
            slot = min(set(range(AT_ONCE)) - running.keys())
            running[slot] = name, start(command, slot)
        if running:
            name, process = running.pop(first_to_end(running))
            if process.returncode == 0:
                put(name, *record[name][:2], time.time())
                done.add(name)
                continue
            print(f"{name} ended with exit code {process.returncode}; the same command continues from here",
                  file=sys.stderr)
            if not code and process.returncode != 130: # after Ctrl-C the other one knows already
                for _, other in running.values():
                    other.send_signal(signal.SIGINT) # it saves and ends
            code = code or process.returncode
    if code:
        raise SystemExit(code)
    return {name: round(record[name][2] - record[name][1], 2) for name, *_ in todo}

def main(cfg):
    began, methods, ppos = time.time(), cfg.methods.split(','), ppo_of_rounds(cfg)
    if cfg.fresh and os.path.exists(cfg.out_dir):
        if not os.path.exists(f'{cfg.out_dir}/demo.json'):
            fail(f"--fresh=True: {cfg.out_dir} would be removed, and has no demo.json: it was not made by demo.py")
        shutil.rmtree(cfg.out_dir)
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
