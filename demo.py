"""
The whole pipeline on the toy world, from text to an aligned model, in minutes on two CPU cores:

    pretrain -> SFT -> collect preferences -> reward model -> PPO, DPO and what else --methods asks for -> evaluate

    python demo.py
    python demo.py --methods=all
    python demo.py --seed=2 --out_dir=out/toy2
    python demo.py --fresh=True
    python demo.py --rounds=3

It runs the scripts that one would run by hand, two side by side where they do not need each other, and prints each
command before. A second run reuses what is finished and goes on with what is not. In the end it prints tables, three
dialogues, and where the figures are.

With --rounds=N the feedback is online (Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 4.5): after the first
round the PPO policy answers the training prompts, its answers are ranked, the reward model is trained anew from the SFT
model on all rankings so far (as many steps as the first), and PPO goes on from the policy against it. PPO's reference
is the policy that it starts from, so that beta prices what one round changes; the KL that evaluate.py prints is to the
SFT model, and its reward model is the first round's.
"""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from common import fail, launch, read_json, require, write_atomic

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
    """The folder and stage of each round's policy: ppo, ppo2, ppo3, …"""
    return ['ppo', *(f'ppo{n}' for n in range(2, cfg.rounds + 1))]


def stages(cfg):
    """
    Every stage: name, script, config file or '', further options, the file that is there once it is done, and the names
    of the stages that it stands on.
    """
    collect = lambda split, n='', needs='sft', **more: (
        f'collect {split}{n}', 'collect.py', 'config/toy/collect.py',
        dict(prompts=f'data/toy/prompts_{split}.jsonl', out=f'{cfg.out_dir}/rankings_{split}{n}.jsonl') | more,
        f'{cfg.out_dir}/rankings_{split}{n}.jsonl', [needs])
    train = lambda name, script, folder, *needs, config='', **options: (
        name, script, f'config/toy/{config or name}.py', options, f'{cfg.out_dir}/{folder}/model.safetensors', needs)
    methods = cfg.methods.split(',')
    best = ('collect best', 'collect.py', 'config/toy/collect_best.py', {}, f'{cfg.out_dir}/best_of_n.jsonl',
            ['reward'])

    ppos, later, files = ppo_of_rounds(cfg), [], f'{cfg.out_dir}/rankings_train.jsonl' # later: all rounds but the first
    for n, (last, ppo) in enumerate(zip(ppos, ppos[1:]), start=2):
        reward, policy, files = f'reward{n}', f'{cfg.out_dir}/{last}', f'{files},{cfg.out_dir}/rankings_train{n}.jsonl'
        later += [collect('train', n, last, policy=policy),
                  train(reward, 'reward.py', reward, f'collect train{n}', config='reward', train_data=files,
                        out_dir=f'{cfg.out_dir}/{reward}'),
                  train(ppo, 'ppo.py', ppo, reward, config='ppo', policy=policy,
                        reward_model=f'{cfg.out_dir}/{reward}', out_dir=f'{cfg.out_dir}/{ppo}')]
    models = ','.join(f'{name}={cfg.out_dir}/{name}' for name in ['base', 'sft', *methods, *ppos[1:]])
    return [('data', 'data/toy/prepare.py', '', {}, 'data/toy/toy.tiktoken', []),
            train('pretrain', 'sft.py', 'base', 'data'), train('sft', 'sft.py', 'sft', 'pretrain'),
            collect('train'), collect('test'), train('reward', 'reward.py', 'reward', *RANKINGS),
            *([best] if 'rejection' in methods else []),
            *(train(name, METHODS[name][0], name, *METHODS[name][1]) for name in methods), *later,
            ('evaluate', 'evaluate.py', 'config/toy/evaluate.py', dict(models=models),
             f'{cfg.out_dir}/evaluate/results.json', ['reward', *methods, *ppos[1:]])]


def moved_paths(path, out_dir):
    """The options of a config file that point into out/toy, pointing into out_dir instead."""
    if not path or out_dir == DEFAULT:
        return {}
    with open(path, encoding='utf-8') as f:
        lines = [n for n in ast.parse(f.read()).body if isinstance(n, ast.Assign)]
    options = {n.targets[0].id: ast.literal_eval(n.value) for n in lines}
    return {k: v.replace(DEFAULT, out_dir) for k, v in options.items() if isinstance(v, str) and DEFAULT in v}


def command_of(stage, cfg):
    """The words of a stage's command, as a user would type them."""
    name, script, config, options, *_ = stage
    options = moved_paths(config, cfg.out_dir) | options
    if name != 'data':
        options.setdefault('seed', cfg.seed)
    return ['python', script, *([config] if config else []), *(f'--{k}={v}' for k, v in options.items())]


def start(command, slot):
    """Print a command and start it. slot: the terminal's line for its progress bar."""
    threads = dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1')) # so small a model gains nothing by a second
    print('\n$ ' + ' '.join([*(f'{k}={v}' for k, v in threads.items()), *command]), flush=True)
    return subprocess.Popen([sys.executable, *command[1:]], env=os.environ | threads | dict(TQDM_POSITION=str(slot)))


def first_to_end(running):
    """The name of the first of {name: (process, …)} that ends. Ctrl-C reaches all of them: they save and end."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            for name, (process, *_) in running.items():
                if process.poll() is not None:
                    return name
            time.sleep(0.02)


def run_stages(todo, cfg):
    """
    Run the stages of a list as `stages` gives it, two at a time, less those that demo.json in cfg.out_dir says an
    earlier run did. Returns {stage: the seconds that it took}; where one fails the program ends with its exit code.
    """
    os.makedirs(cfg.out_dir, exist_ok=True)
    path, before = f'{cfg.out_dir}/demo.json', {} # {stage: [its command, when it began, when it ended or null]}
    if os.path.exists(path):
        before = {name: entry for name, entry in read_json(path).items() if len(entry) == 3} # older ones had two parts
    names, todo, record = [name for name, *_ in todo], list(todo), {}
    running, code = {}, 0 # running: {stage: (process, slot)}

    def put(name, *entry):
        record[name] = entry
        write_atomic(path, json.dumps(before | record, indent=1)) # stages that are not asked for now stay known

    while running or todo and not code:
        for stage in list(todo):
            name, script, _, _, product, needs = stage
            if code or len(running) == AT_ONCE or not all(record.get(n, (0, 0, None))[2] for n in needs):
                continue
            todo.remove(stage)
            words = command_of(stage, cfg)
            last, began, ended = before.get(name, (None, 0, None))
            same = last == words and all(record[n][2] <= began for n in needs) # what it was made from has not changed
            if same and ended and os.path.exists(product):
                print(f"{name}: done before, in {ended - began:.0f} s")
                put(name, words, began, ended)
                continue
            command = words
            if name not in ('data', 'evaluate'):
                state = product + '.partial' if script == 'collect.py' else f'{os.path.dirname(product)}/state.pt'
                stopped = same and not ended and os.path.exists(state)
                command = words + ['--resume=True' if stopped else '--overwrite=True']
            slot = min(set(range(AT_ONCE)) - {slot for _, slot in running.values()})
            put(name, words, time.time(), None)
            running[name] = start(command, slot), slot
        if running:
            name = first_to_end(running)
            process, _ = running.pop(name)
            if process.returncode == 0:
                put(name, *record[name][:2], time.time())
            else:
                print(f"{name} ended with exit code {process.returncode}; the same command goes on from here",
                      file=sys.stderr)
                if not code and process.returncode != 130: # after Ctrl-C the other one knows already
                    for other, *_ in running.values():
                        other.send_signal(signal.SIGINT) # it saves and ends
                code = code or process.returncode
    if code:
        raise SystemExit(code)
    return {name: round(record[name][2] - record[name][1], 2) for name in names}


def main(cfg):
    began = time.time()
    if cfg.fresh and os.path.exists(cfg.out_dir):
        if not os.path.exists(f'{cfg.out_dir}/demo.json'):
            fail(f"--fresh=True: {cfg.out_dir} would be removed, and has no demo.json: it was not made by demo.py")
        shutil.rmtree(cfg.out_dir)
    path, models = f'{cfg.out_dir}/evaluate/results.json', [*cfg.methods.split(','), *ppo_of_rounds(cfg)[1:]]
    if os.path.exists(path) and not {*models} <= read_json(path).get('models', {}).keys():
        os.remove(path) # evaluate.py was run into this folder by hand
    seconds = run_stages(stages(cfg), cfg)
    results = read_json(path) | dict(seconds=seconds, seed=cfg.seed)
    if cfg.rounds > 1:
        results['rounds'] = [results['models'][ppo]['gold'] for ppo in ppo_of_rounds(cfg)]
        print('\ngold score of PPO, sampled, by round: ' + ', '.join(f'{gold:.3f}' for gold in results['rounds']))
    write_atomic(path, json.dumps(results, indent=1))
    print('\nseconds: ' + ', '.join(f'{k} {v:.0f}' for k, v in seconds.items()), end='')
    print(f'; {time.time() - began:.0f} in all, {AT_ONCE} at a time')
    print(f"results: {path}; figures: {cfg.out_dir}/evaluate/*.png")
    first = cfg.methods.split(',')[0]
    print(f'talk to it: python sample.py --policy={cfg.out_dir}/{first} --prompt="Where does the fox live?"')


if __name__ == '__main__':
    launch(main, Config)
