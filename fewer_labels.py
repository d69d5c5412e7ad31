"""
How many labels does a reward model need, and does it matter which? On the toy world: its accuracy on held-out pairs
against the number of prompts whose answers were ranked, chosen in three ways (select_labels.py).

    python fewer_labels.py
    python fewer_labels.py --seeds=1 --budgets=250,1000

For every seed a base and an SFT model as in demo.py, whose answers to the training prompts are there, and wait for
somebody to rank them. For every budget N a reward model (config/toy/reward.py, a fixed number of steps) on

    random       N prompts
    diverse      the N prompts whose answers are least alike
    uncertain    the first of the budgets at random; three reward models, trained on these with seeds of their own; and
                 the prompts that they disagree on most, N in all. The ensemble's labels are part of the budget; a few
                 prompts (some 30 of 2000) come up in both and are ranked twice.

It prints each command before it runs it, reuses what is finished, and writes results.json and fewer_labels.png.
"""

import json
import os
from dataclasses import dataclass

import demo
import figures
from common import fail, launch, read_log, require, write_atomic
from evaluate import mean, print_table

HOW = ('random', 'diverse', 'uncertain')
ENSEMBLE = 3


@dataclass
class Config:
    out_dir: str = 'out/labels' # seed N in a folder N
    seeds: str = '1,2,3'
    budgets: str = '250,500,1000,2000' # prompts that are ranked, fewest first; each with 4 answers
    steps: int = 300 # of every reward model

    def __post_init__(self):
        seeds, budgets = numbers(self.seeds), numbers(self.budgets)
        require(self, seeds=(seeds != [] and len(set(seeds)) == len(seeds), 'numbers, each once, separated by commas'),
                budgets=(budgets != [] and budgets == sorted(set(budgets) - {0}),
                         'rising numbers above 0, separated by commas'),
                steps=(self.steps >= 1, 'at least 1'))


def numbers(text):
    """'1,20' -> [1, 20]; [] where it says anything else."""
    words = text.split(',')
    return [int(n) for n in words] if all(n.isdecimal() for n in words) else []


def stages(cfg, at):
    """The stages of one seed, as demo.stages gives them; at: its demo.Config."""
    todo, folder = demo.stages(at)[:5], at.out_dir # data, pretrain, sft, collect train, collect test
    first, *more = numbers(cfg.budgets)
    answers, pool = f'{folder}/rankings_train.jsonl', ['collect train']

    def select(how, n, needs=(), **options):
        """Have prompts ranked that are chosen from the pool of answers, whose own ranks nobody looks at."""
        out = f'{folder}/{how}{n}.jsonl' # n: the budget that this is for
        todo.append((f'select {how} {n}', 'collect.py', 'config/toy/collect.py', dict(
            prompts='', answers=answers, select=how, budget=n, out=out) | options, out, [*pool, *needs]))
        return out

    def train(name, files, *needs, **options):
        out = f'{folder}/reward_{name}'.replace(' ', '')
        todo.append((f'reward {name}', 'reward.py', 'config/toy/reward.py', dict(
            train_data=files, max_steps=cfg.steps, out_dir=out) | options, f'{out}/model.safetensors',
            ['sft', 'collect test', *needs]))
        return out

    for how in ('random', 'diverse'):
        for n in (first, *more):
            train(f'{how} {n}', select(how, n), f'select {how} {n}')
    members = [train(f'member {i}', f'{folder}/random{first}.jsonl', f'select random {first}', seed=100 * at.seed + i)
               for i in range(1, ENSEMBLE + 1)]
    for n in more:
        chosen = select('uncertain', n, [f'reward member {i}' for i in range(1, ENSEMBLE + 1)], budget=n - first,
                        ensemble=','.join(members))
        train(f'uncertain {n}', f'{folder}/random{first}.jsonl,{chosen}', f'select uncertain {n}')
    return todo


def accuracy(folder):
    """What the reward model in a folder logged in the end."""
    found = [line['val_accuracy'] for line in read_log(os.path.join(folder, 'log.jsonl')) if 'val_accuracy' in line]
    return found[-1] if found else fail(f"{folder}/log.jsonl: wanted a line with val_accuracy")


def main(cfg):
    budgets = numbers(cfg.budgets)
    results = {how: {n: [] for n in budgets} for how in HOW}
    for seed in numbers(cfg.seeds):
        at = demo.Config(seed=seed, out_dir=f'{cfg.out_dir}/{seed}')
        demo.run_stages(stages(cfg, at), at)
        for how in HOW:
            for n in budgets:
                which = 'random' if how == 'uncertain' and n == budgets[0] else how # before there is an ensemble
                results[how][n].append(accuracy(f'{at.out_dir}/reward_{which}{n}'))
    print_table(f"reward model, held-out pairs in order: mean (lowest–highest) of the seeds {cfg.seeds}",
                ['prompts ranked', *HOW],
                [[str(n)] + [f'{mean(x):.3f} ({min(x):.3f}–{max(x):.3f})' for x in (results[how][n] for how in HOW)]
                 for n in budgets])
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    figures.fewer_labels(results, cfg.out_dir)


if __name__ == '__main__':
    launch(main, Config)
