"""Optimise the mean, the least or a lower bound of three reward models, and see when the gold score turns.

    python -m lab.ensembles
    python -m lab.ensembles --seeds=1

On the toy world. Every seed has an SFT model and rankings as in demo.py, and three reward models that differ in their
seed. PPO without a price on the KL (config/toy/overoptimise.py) climbs the first of them alone, then each of the
ensembles of common/rewards.py, the lower bound as mean - 1 std (Coste et al. 2023, https://arxiv.org/abs/2310.02743).
It prints each command, reuses finished stages, prints a table in Markdown, and writes results.json and ensembles.png.
The three seeds take 10 to 20 minutes on two cores.
"""

import json
import os
import sys
from dataclasses import dataclass
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import launch
from common.records import write_atomic
from lab import figures
from lab.seeds import Seeds
from lab.tables import show, table

KINDS = ('alone', 'mean', 'min', 'lcb')
COLUMNS = ('peak', 'peak at', 'end', 'reward at the end', 'KL at the end')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/ensembles' # seed N in a folder N

def stages(at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    todo, out, models = demo.stages(at)[:6], at.out_dir, [f'{at.out_dir}/reward'] # data … reward
    for n in (2, 3):
        models.append(f'{out}/reward{n}')
        options = dict(seed=100 * at.seed + n, out_dir=models[-1])
        todo.append((f'reward {n}', 'reward.py', 'config/toy/reward.py', options, f'{models[-1]}/model.safetensors',
                     demo.RANKINGS))
    for kind in KINDS:
        options = dict(policy=f'{out}/sft', reward_model=','.join(models), ensemble=kind, out_dir=f'{out}/{kind}')
        if kind == 'alone':
            options |= dict(reward_model=models[0], ensemble='mean')
        todo.append((kind, 'ppo.py', 'config/toy/overoptimise.py', options, f'{out}/{kind}/model.safetensors',
                     ['reward', 'reward 2', 'reward 3']))
    return todo

def columns_of(log, smooth=5):
    """Return COLUMNS of a run's log; peak, its iteration, and the end are of means over `smooth` iterations."""
    mean = lambda key, end: fmean(line[key] for line in log[max(0, end - smooth):end])
    peak = max(range(smooth, len(log) + 1), key=lambda end: mean('gold', end))
    end = len(log)
    return dict(zip(COLUMNS, (mean('gold', peak), peak, mean('gold', end), mean('reward', end), mean('kl', end))))

def main(cfg):
    logs = {kind: [] for kind in KINDS}
    for at in cfg.each():
        demo.run_stages(stages(at), at)
        for kind, log in figures.read_runs({kind: f'{at.out_dir}/{kind}' for kind in KINDS}).items():
            logs[kind].append(log)
    results = {}
    for kind, of_kind in logs.items():
        rows = list(map(columns_of, of_kind))
        results[kind] = {column: [row[column] for row in rows] for column in COLUMNS}
    table(['reward', *(f'gold, {c}' if c in ('peak', 'end') else c for c in COLUMNS)],
          [[kind, *(show(seeds, 0 if c == 'peak at' else 2) for c, seeds in row.items())]
           for kind, row in results.items()])
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    keys = ('kl', 'reward', 'gold')
    figures.over_optimisation({kind: [{key: fmean(line[key] for line in lines) for key in keys}
                                      for lines in zip(*of_kind)] for kind, of_kind in logs.items()}, cfg.out_dir,
                              name='ensembles')

if __name__ == '__main__':
    launch(main, Config)
