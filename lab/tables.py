"""Print the results of several runs of demo.py as Markdown tables.

    python -m lab.tables --runs=out/toy,out/toy2,out/toy3

A run is demo.py's out_dir, and each has another seed. A cell is mean (lowest–highest). Seconds are those of the
method's own stage, for rejection also of collecting the best answers. The lowest of the seeds is shown.
"""

import os
import sys
from dataclasses import dataclass
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.options import fail, launch, require
from common.records import read_json

MODELS = { # in memory at once while training
    **dict.fromkeys(('base', 'sft', 'rrhf', 'simpo', 'orpo'), 'policy'),
    **dict.fromkeys(('dpo', 'ipo', 'hinge'), 'policy (reference beforehand)'),
    **dict.fromkeys(('reinforce', 'rloo', 'grpo'), 'policy, reward model, reference'),
    'ppo': 'policy, critic, reward model, reference', 'kto': 'policy, reference', 'distill': 'student, teacher',
    'rejection': 'policy (with the reward model beforehand)'}
COLUMNS = dict(gold='gold', helpful='helpful', honest='honest', harmless='harmless', win_rate_vs_sft='wins against SFT')
DECODINGS = { # key in results.json -> title, and the columns of its table
    'models': ('sampled', COLUMNS | dict(kl='KL')), 'greedy': ('greedy', COLUMNS | dict(path_kl='path KL'))}

@dataclass
class Config:
    runs: str = 'out/toy' # folders, separated by commas

    def __post_init__(self):
        require(self, runs=(self.runs != '', 'folders of demo.py, separated by commas'))

def show(values, digits=2):
    """Format numbers as 'mean (lowest–highest)'. Equal ones are one number, a missing one is '–'."""
    if None in values:
        return '–'
    mean, low, high = (f'{x:.{digits}f}' for x in (fmean(values), min(values), max(values)))
    return mean if low == high else f'{mean} ({low}–{high})'

def seconds(name, runs):
    """Return the seconds that a method took, '' if unknown."""
    stages = {'base': ['pretrain'], 'rejection': ['collect best', 'rejection']}.get(name, [name])
    known = all(stage in run['seconds'] for run in runs for stage in stages)
    return f"{min(sum(run['seconds'][stage] for stage in stages) for run in runs):.0f}" if known else ''

def align(header, rows):
    """Lay out lists of strings as lines; the first column is flush left, the others flush right."""
    first, *widths = [max(map(len, column)) for column in zip(header, *rows)]
    return ['  '.join([name.ljust(first), *map(str.rjust, cells, widths)]) for name, *cells in [header, *rows]]

def markdown(header, rows):
    """Return lists of strings as a table in Markdown."""
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [header, ['--'] * len(header), *rows])

def table(header, rows):
    """Print what `markdown` returns, below an empty line."""
    print('\n' + markdown(header, rows))

def tables_of_seeds(found, columns_of, first='', digits=3):
    """Print a table of each decoding; return {decoding: {model: {column: [of each seed]}}}.

    found: the results of evaluate.py for each seed. columns_of(row) returns the columns of a model's row. first: what
    the header has before the decoding.
    """
    results = {}
    for key, (title, _) in DECODINGS.items():
        rows = {name: [columns_of(of_seed[key][name]) for of_seed in found] for name in found[0][key]}
        results[title] = {name: {c: [row[c] for row in of_name] for c in of_name[0]} for name, of_name in rows.items()}
        columns = next(iter(results[title].values()))
        table([first + title, *columns], [[name, *(show(seeds, digits) for seeds in row.values())]
                                          for name, row in results[title].items()])
    return results

def print_tables(runs, names):
    """Print the tables of runs for these models. runs: the contents of results.json."""
    for decoding, (title, columns) in DECODINGS.items():
        rows = [[name, *(show([run[decoding][name][key] for run in runs]) for key in columns)] for name in names]
        if decoding == 'models':
            rows = [[*row, seconds(row[0], runs), MODELS.get(row[0], '')] for row in rows]
        table([title, *columns.values(), *(['seconds', 'models in memory'] if decoding == 'models' else [])], rows)

    categories = list(runs[0]['models']['sft']['by_category'])
    table(['content right', *categories],
          [[f'{name}, {title}', *(f"{fmean(run[decoding][name]['by_category'][c] for run in runs):.2f}"
                                  for c in categories)]
           for decoding, (title, _) in DECODINGS.items() for name in names if name in ('sft', 'ppo', 'dpo')])

    said = ('right', 'abstains', 'wrong', 'declines')
    for decoding, (title, _) in DECODINGS.items():
        table([f'answerable questions, {title}', *said],
              [[name, *(show([run[decoding][name]['answerable'][s] for run in runs]) for s in said)] for name in names])

    measured, shares = [run['reward_model'] for run in runs], ('accuracy', 'ceiling', 'shorter_wins')
    table(['reward model', *shares], [['pairs in order', *(show([m[key] for m in measured], 3) for key in shares)]])
    own, scores = [run['policies_as_reward'] for run in runs], {'mean_logp': 'mean log π', 'log_ratio': 'log π / π_ref'}
    table(['policy as reward model', *scores.values()],
          [[name, *(show([of_run[name]['rankings'][score] for of_run in own], 3) for score in scores)]
           for name in names if name in own[0]]) # best_of_n is no policy
    pairs = list(measured[0]['by_category'])
    table(['controlled pairs', *pairs], [['in order', *(show([m['by_category'][p] for m in measured]) for p in pairs)]])
    if all('rounds' in run for run in runs):
        rounds = list(zip(*(run['rounds'] for run in runs)))
        table(['round', *(str(n) for n in range(1, len(rounds) + 1))], [['gold', *(show(gold) for gold in rounds)]])

def main(cfg):
    runs = [read_json(os.path.join(folder, 'evaluate', 'results.json')) for folder in cfg.runs.split(',')]
    if not all('gold' in run.get('models', {}).get('sft', {}) and 'seconds' in run for run in runs):
        fail(f"--runs={cfg.runs}: wanted the results of demo.py, with gold scores and a model named sft")
    names = [name for name in runs[0]['models'] if all(name in run['models'] for run in runs)]
    try:
        print_tables(runs, names)
    except KeyError as e:
        fail(f"--runs={cfg.runs}: wanted the results of this version's demo.py; one of them lacks {e}")

if __name__ == '__main__':
    launch(main, Config)
