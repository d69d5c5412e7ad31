"""Measure how many labels a reward model needs, and which.

    python -m lab.fewer_labels
    python -m lab.fewer_labels --seeds=1 --budgets=250,1000

On the toy world. Every seed has an SFT model as in demo.py, which has answered the training prompts. Every budget N
gets a reward model (config/toy/reward.py, a fixed number of steps) on N ranked prompts, chosen in three ways
(feedback/select_labels.py). For `uncertain` the first budget is random, and an ensemble, trained on it, chooses the
rest. It prints each command, reuses finished stages, and writes results.json and fewer_labels.png. The three seeds take
10 to 20 minutes on two cores.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.checkpoints import read_log
from common.options import fail, launch, require
from common.records import write_atomic
from evaluate import mean, print_table
from lab import figures
from lab.seeds import Seeds, numbers

HOW = ('random', 'diverse', 'uncertain')
ENSEMBLE = 3

@dataclass
class Config(Seeds):
    """Hold the options of reward models on few labels."""
    out_dir: str = 'out/fewer_labels' # seed N in a folder N
    budgets: str = '250,500,1000,2000' # prompts that are ranked, fewest first; each with 4 answers
    steps: int = 300 # of every reward model

    def __post_init__(self):
        super().__post_init__()
        budgets = numbers(self.budgets)
        rising = [] != budgets == sorted({*budgets} - {0})
        require(self, budgets=(rising, 'rising numbers above 0, separated by commas'),
                steps=(self.steps >= 1, 'at least 1'))

def stages(cfg, at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    todo, folder = demo.stages(at)[:5], at.out_dir # data, pretrain, sft, collect train, collect test
    first, *more = numbers(cfg.budgets)

    def select(how, n, *needs, **options):
        """Add the stage that ranks prompts for the budget n. The ranks of collect train are not read."""
        out = f'{folder}/{how}{n}.jsonl'
        options = dict(answers=f'{folder}/rankings_train.jsonl', select=how, budget=n, out=out) | options
        todo.append((f'select {how} {n}', 'collect.py', 'config/toy/select.py', options, out,
                     ['collect train', *needs]))
        return out

    def train(name, files, needs, **options):
        """Add the stage that trains a reward model on these files."""
        out = f'{folder}/reward_{name}'.replace(' ', '')
        options = dict(train_data=files, max_steps=cfg.steps, out_dir=out) | options
        todo.append((f'reward {name}', 'reward.py', 'config/toy/reward.py', options, f'{out}/model.safetensors',
                     ['sft', 'collect test', needs]))
        return out

    for how in ('random', 'diverse'):
        for n in (first, *more):
            train(f'{how} {n}', select(how, n), f'select {how} {n}')
    members = [train(f'member {i}', f'{folder}/random{first}.jsonl', f'select random {first}', seed=100 * at.seed + i)
               for i in range(1, ENSEMBLE + 1)]
    for n in more:
        chosen = select('uncertain', n, *(f'reward member {i}' for i in range(1, ENSEMBLE + 1)), budget=n - first,
                        ensemble=','.join(members))
        train(f'uncertain {n}', f'{folder}/random{first}.jsonl,{chosen}', f'select uncertain {n}')
    return todo

def accuracy(folder):
    """Return the last held-out accuracy in a reward model's log."""
    found = [line['val_accuracy'] for line in read_log(os.path.join(folder, 'log.jsonl')) if 'val_accuracy' in line]
    return found[-1] if found else fail(f"{folder}/log.jsonl: wanted a line with val_accuracy")

def print_accuracies(results, seeds, first):
    """Print {how: {budget: [accuracy of each seed]}} as a table; first: what the budgets are."""
    cell = lambda found: f'{mean(found):.3f} ({min(found):.3f}–{max(found):.3f})'
    rows = [[str(n), *(cell(found[n]) for found in results.values())] for n in next(iter(results.values()))]
    print_table(f"reward model, held-out pairs in order: mean (lowest–highest) of the seeds {seeds}",
                [first, *results], rows)

def main(cfg):
    budgets = numbers(cfg.budgets)
    results = {how: {n: [] for n in budgets} for how in HOW}
    for at in cfg.each():
        demo.run_stages(stages(cfg, at), at)
        for how in HOW:
            for n in budgets:
                which = 'random' if how == 'uncertain' and n == budgets[0] else how # before there is an ensemble
                results[how][n].append(accuracy(f'{at.out_dir}/reward_{which}{n}'))
    print_accuracies(results, cfg.seeds, 'prompts ranked')
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    figures.fewer_labels(results, f'{cfg.out_dir}/fewer_labels.png', 'prompts whose 4 answers were ranked')

if __name__ == '__main__':
    launch(main, Config)
