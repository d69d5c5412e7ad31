"""Measure how much a reward model learns from so many judgements: pairs against ratings.

    python -m lab.ratings
    python -m lab.ratings --seeds=1 --budgets=250,1000

On the toy world. Every seed has an SFT model as in demo.py, which gives two answers to each training prompt. One and
the same simulated person says of each pair which answer is better, or gives each answer a number (collect.py
--ask=ratings). One comparison is one judgement, and so is one number: N judgements are N pairs, or both answers to
about N/2 prompts. Every budget N gets a reward model of each kind (config/toy/reward.py, a fixed number of steps),
measured on the held-out rankings of four answers. It prints each command, reuses finished stages, and writes
results.json and ratings.png. The three seeds take 7 minutes on two cores.
"""

import itertools
import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import fail, launch, require
from common.records import read_lines, write_atomic
from lab import fewer_labels, figures
from lab.fewer_labels import accuracy, print_accuracies
from lab.seeds import numbers

LOSS = dict(pairs='pairwise', ratings='regression') # of reward.py

@dataclass
class Config(fewer_labels.Config):
    out_dir: str = 'out/ratings' # seed N in a folder N
    budgets: str = '250,500,1000,2000,4000' # judgements, fewest first
    scale: int = 5 # ratings are whole numbers from 1 to this

    def __post_init__(self):
        super().__post_init__()
        require(self, scale=(2 <= self.scale <= 10, 'from 2 to 10'))

def collecting(cfg, at):
    """Return the stages of one seed up to the judgements. at: its demo.Config."""
    todo, most = [stage for stage in demo.stages(at)[:5] if stage[0] != 'collect train'], numbers(cfg.budgets)[-1]
    pairs, ratings = (f'{at.out_dir}/{kind}.jsonl' for kind in LOSS)
    more = most + most // 50 # some prompts are left out, where an answer is empty
    todo.append(('collect pairs', 'collect.py', 'config/toy/collect.py',
                 dict(n_answers=2, tie=0.0, max_prompts=more, out=pairs), pairs, ['sft']))
    todo.append(('collect ratings', 'collect.py', 'config/toy/collect_ratings.py',
                 dict(answers=pairs, scale=cfg.scale, out=ratings), ratings, ['collect pairs']))
    return todo

def stages(cfg, at):
    """Return all stages of one seed. N judgements are the first N lines of the files that `collecting` makes."""
    todo = collecting(cfg, at)
    for n, (kind, loss) in itertools.product(numbers(cfg.budgets), LOSS.items()):
        out = f'{at.out_dir}/reward_{kind}{n}'
        options = dict(loss=loss, train_data=f'{at.out_dir}/{kind}{n}.jsonl', max_steps=cfg.steps, out_dir=out)
        todo.append((f'reward {kind} {n}', 'reward.py', 'config/toy/reward.py', options, f'{out}/model.safetensors',
                     ['sft', 'collect test', f'collect {kind}']))
    return todo

def cut(path, n, out):
    """Write the first n lines of a file to another."""
    lines = [line for _, line in itertools.islice(read_lines(path), n)]
    if len(lines) < n:
        fail(f"--budgets: {path} has {len(lines)} judgements, wanted at most so many")
    write_atomic(out, b''.join(lines).decode())

def main(cfg):
    budgets = numbers(cfg.budgets)
    results = {kind: {n: [] for n in budgets} for kind in LOSS}
    for at in cfg.each():
        demo.run_stages(collecting(cfg, at), at)
        for kind, n in itertools.product(LOSS, budgets):
            cut(f'{at.out_dir}/{kind}.jsonl', n, f'{at.out_dir}/{kind}{n}.jsonl')
        demo.run_stages(stages(cfg, at), at)
        for kind, n in itertools.product(LOSS, budgets):
            results[kind][n].append(accuracy(f'{at.out_dir}/reward_{kind}{n}'))
    print_accuracies(results, cfg.seeds, 'judgements')
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    figures.fewer_labels(results, f'{cfg.out_dir}/ratings.png', 'judgements: pairs or numbers')

if __name__ == '__main__':
    launch(main, Config)
