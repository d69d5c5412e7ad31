"""
The whole pipeline on the toy world, from text to an aligned model, in minutes on two CPU cores:

    pretrain -> SFT -> collect preferences -> reward model -> PPO, DPO and what else --methods asks for -> evaluate

    python demo.py
    python demo.py --methods=all
    python demo.py --seed=2 --out_dir=out/toy2
    python demo.py --fresh=True

It runs the scripts that one would run by hand, and prints each command before. A second run reuses what is finished
and goes on with what is not. In the end it prints tables, three dialogues, and where the figures are.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from common import fail, launch, require, write_atomic

DEFAULT = 'out/toy' # where the files in config/toy point
METHODS = dict(ppo='ppo.py', dpo='dpo.py', reinforce='reinforce.py', rloo='reinforce.py', grpo='reinforce.py',
               rrhf='rrhf.py', ipo='dpo.py') # a config file and a folder each, and their script


@dataclass
class Config:
    out_dir: str = DEFAULT # everything that is made, but for the data
    methods: str = 'ppo,dpo' # what to train from the preferences: some of METHODS above, or all
    seed: int = 1 # of every stage
    fresh: bool = False # do everything again

    def __post_init__(self):
        if self.methods == 'all':
            self.methods = ','.join(METHODS)
        names = self.methods.split(',')
        require(self, seed=(self.seed >= 0, 'at least 0'),
                methods=(set(names) <= set(METHODS) and len(set(names)) == len(names),
                         f"all, or names among {','.join(METHODS)}, each once"))


def stages(cfg):
    """(name, script, config file or '', further options, the file that is there once it is done) of every stage."""
    collect = lambda split, **more: (f'collect {split}', 'collect.py', 'config/toy/collect.py', dict(
        prompts=f'data/toy/prompts_{split}.jsonl', out=f'{cfg.out_dir}/rankings_{split}.jsonl', **more),
        f'{cfg.out_dir}/rankings_{split}.jsonl')
    train = lambda name, script, folder: (
        name, script, f'config/toy/{name}.py', {}, f'{cfg.out_dir}/{folder}/model.safetensors')
    methods = cfg.methods.split(',')
    models = ','.join(f'{name}={cfg.out_dir}/{name}' for name in ['base', 'sft', *methods])
    return [('data', 'data/toy/prepare.py', '', {}, 'data/toy/toy.tiktoken'),
            train('pretrain', 'sft.py', 'base'), train('sft', 'sft.py', 'sft'),
            collect('train'), collect('test'),
            train('reward', 'reward.py', 'reward'), *(train(name, METHODS[name], name) for name in methods),
            ('evaluate', 'evaluate.py', 'config/toy/evaluate.py', dict(models=models),
             f'{cfg.out_dir}/evaluate/results.json')]


def moved_paths(path, out_dir):
    """The options of a config file that point into out/toy, pointing into out_dir instead."""
    if not path or out_dir == DEFAULT:
        return {}
    with open(path, encoding='utf-8') as f:
        lines = [n for n in ast.parse(f.read()).body if isinstance(n, ast.Assign)]
    options = {n.targets[0].id: ast.literal_eval(n.value) for n in lines}
    return {k: v.replace(DEFAULT, out_dir) for k, v in options.items() if isinstance(v, str) and DEFAULT in v}


def run(command):
    """Run a command as a user would type it; Ctrl-C reaches it too, and ends the demo once it has saved."""
    process = subprocess.Popen(command)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass # the stage was sent the same signal: it saves and ends


def main(cfg):
    if cfg.fresh:
        shutil.rmtree(cfg.out_dir, ignore_errors=True)
    os.makedirs(cfg.out_dir, exist_ok=True)
    record = f'{cfg.out_dir}/demo.json' # {stage: [its command, seconds; null while it runs]}
    before, done = {}, {}
    if os.path.exists(record):
        with open(record, encoding='utf-8') as f:
            before = json.load(f)

    for name, script, config, options, product in stages(cfg):
        options = moved_paths(config, cfg.out_dir) | options
        if script != 'data/toy/prepare.py':
            options |= dict(seed=cfg.seed)
        words = ['python', script, *([config] if config else []), *(f'--{k}={v}' for k, v in options.items())]
        last, seconds = before.get(name, (None, None))
        if last == words and seconds is not None and os.path.exists(product):
            print(f"{name}: done before, in {seconds:.0f} s")
            done[name] = before[name]
            continue
        command = words
        if script not in ('data/toy/prepare.py', 'evaluate.py'):
            state = product + '.partial' if script == 'collect.py' else f'{os.path.dirname(product)}/state.pt'
            stopped = last == words and seconds is None and os.path.exists(state)
            command = words + ['--resume=True' if stopped else '--overwrite=True']
        before = {} # what stands on this stage has to be made anew
        write_atomic(record, json.dumps(done | {name: [words, None]}, indent=1))
        print('\n$ ' + ' '.join(command), flush=True)
        start = time.time()
        code = run([sys.executable, *command[1:]])
        if code:
            print(f"{name} ended with exit code {code}; python demo.py goes on from here", file=sys.stderr)
            raise SystemExit(code)
        done[name] = [words, round(time.time() - start, 2)]
        write_atomic(record, json.dumps(done, indent=1))

    seconds = {name: done[name][1] for name, *_ in stages(cfg)}
    path = f'{cfg.out_dir}/evaluate/results.json'
    with open(path, encoding='utf-8') as f:
        results = json.load(f)
    write_atomic(path, json.dumps(results | dict(seconds=seconds, seed=cfg.seed), indent=1))
    print('\nseconds: ' + ', '.join(f'{k} {v:.0f}' for k, v in seconds.items()), end='')
    print(f'; {sum(seconds.values()):.0f} in all')
    print(f"results: {path}; figures: {cfg.out_dir}/evaluate/*.png")
    first = cfg.methods.split(',')[0]
    print(f'talk to it: python sample.py --policy={cfg.out_dir}/{first} --prompt="Where does the fox live?"')


if __name__ == '__main__':
    launch(main, Config)
