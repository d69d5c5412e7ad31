"""
Several runs of demo.py, of different seeds, as the tables of README.md (Markdown): mean (lowest–highest).

    python tables.py --runs=out/toy,out/toy2,out/toy3

A run is demo.py's out_dir, with evaluate/results.json in it. Seconds are those of the method's own stage (rejection: and
of collecting the best answers), one thread, another stage running beside it; the lowest of the seeds, since a busy
machine only adds to them.
"""

import os
from dataclasses import dataclass
from statistics import fmean

from common import fail, launch, read_json, require

MODELS = { # in memory at once while training
    'base': 'policy', 'sft': 'policy', 'ppo': 'policy, critic, reward model, reference',
    'dpo': 'policy (reference beforehand)', 'reinforce': 'policy, reward model, reference',
    'rloo': 'policy, reward model, reference', 'grpo': 'policy, reward model, reference', 'rrhf': 'policy',
    'ipo': 'policy (reference beforehand)', 'hinge': 'policy (reference beforehand)', 'simpo': 'policy',
    'orpo': 'policy', 'kto': 'policy, reference', 'rejection': 'policy (with the reward model beforehand)',
    'distill': 'student, teacher'}
COLUMNS = {'gold': 'gold', 'helpful': 'helpful', 'honest': 'honest', 'harmless': 'harmless',
           'win_rate_vs_sft': 'wins against SFT', 'kl': 'KL'}


@dataclass
class Config:
    runs: str = 'out/toy' # folders, separated by commas

    def __post_init__(self):
        require(self, runs=(self.runs != '', 'folders of demo.py, separated by commas'))


def show(values, digits=2):
    """'mean (lowest–highest)' of some numbers, or of equal ones the number; '–' where one is missing."""
    if None in values:
        return '–'
    mean, low, high = (f'{x:.{digits}f}' for x in (fmean(values), min(values), max(values)))
    return mean if low == high else f'{mean} ({low}–{high})'


def seconds(name, runs):
    stages = {'base': ['pretrain'], 'rejection': ['collect best', 'rejection']}.get(name, [name])
    if not all(stage in run['seconds'] for run in runs for stage in stages):
        return ''
    return f"{min(sum(run['seconds'][stage] for stage in stages) for run in runs):.0f}"


def table(header, rows):
    """Lists of strings -> lines of Markdown."""
    print('\n' + '\n'.join('| ' + ' | '.join(row) + ' |' for row in [header, ['--'] * len(header), *rows]))


def main(cfg):
    runs = [read_json(os.path.join(folder, 'evaluate', 'results.json')) for folder in cfg.runs.split(',')]
    if not all('gold' in run.get('models', {}).get('sft', {}) and 'seconds' in run for run in runs):
        fail(f"--runs={cfg.runs}: wanted the results of demo.py, with gold scores and a model named sft")
    names = [name for name in runs[0]['models'] if all(name in run['models'] for run in runs)]

    for decoding, title in (('models', 'sampled'), ('greedy', 'greedy')):
        rows = [[name, *(show([run[decoding][name][key] for run in runs]) for key in COLUMNS)] for name in names]
        if decoding == 'models':
            rows = [[*row, seconds(name, runs), MODELS.get(name, '')] for name, row in zip(names, rows)]
        table([title, *COLUMNS.values(), *(['seconds', 'models in memory'] if decoding == 'models' else [])], rows)

    categories = list(runs[0]['models']['sft']['by_category'])
    table(['content right', *categories],
          [[f'{name}, {title}', *(f"{fmean(run[decoding][name]['by_category'][c] for run in runs):.2f}"
                                  for c in categories)]
           for decoding, title in (('models', 'sampled'), ('greedy', 'greedy')) for name in names
           if name in ('sft', 'ppo', 'dpo')])

    judges = [run['reward_model'] for run in runs]
    shares = ('accuracy', 'ceiling', 'shorter_wins')
    table(['reward model', *shares], [['pairs in order', *(show([judge[k] for judge in judges], 3) for k in shares)]])
    pairs = list(judges[0]['by_category'])
    table(['controlled pairs', *pairs], [['in order', *(show([j['by_category'][p] for j in judges]) for p in pairs)]])

    if all('rounds' in run for run in runs):
        rounds = list(zip(*(run['rounds'] for run in runs)))
        table(['round', *(str(n) for n in range(1, len(rounds) + 1))], [['gold', *(show(gold) for gold in rounds)]])


if __name__ == '__main__':
    launch(main, Config)
