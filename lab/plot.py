"""Draw the logs of runs side by side, and write the same numbers as a CSV file.

    python lab/plot.py out/toy/ppo --keys=reward,gold,kl
    python lab/plot.py out/toy/ppo out/toy/rloo --out=out/ppo_rloo.png --smooth=5

A run is a folder with a log.jsonl, or a .jsonl file. There is a panel for each key and a line for each run, named by
its folder. docs/log.md explains the keys. Losses of two methods are not comparable. The CSV file lies beside the
picture. It has one row for each step, and a column for each key of each run, "kl of ppo". Without matplotlib it is all
there is.
"""

import contextlib
import csv
import importlib.util
import io
import math
import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.checkpoints import log_of, read_log
from common.options import fail, joined, launch, require
from common.records import is_number, write_atomic
from lab.figures import COLOURS, panels

STYLES = ('-', '--', ':', '-.') # the next one where the colours are used up
# What is drawn without --keys: of these the ones that all runs have
SAMPLED = ('reward', 'gold', 'kl', 'entropy', 'ended', 'length', 'explained_variance', 'group_std', 'clipfrac')
LEARNT = ('loss', 'val_loss', 'accuracy', 'val_accuracy', 'val_shorter_wins', 'margin', 'val_margin', 'val_chosen_logp',
          'val_rejected_logp', 'val_rank_loss', 'val_sft_loss', 'val_desirable_reward', 'val_undesirable_reward', 'kl',
          'grad_norm')

@dataclass
class Config:
    keys: str = '' # of log.jsonl, separated by commas; empty: the usual ones that all runs have
    out: str = 'out/plot.png' # the picture; the numbers are in the .csv file of the same name
    smooth: int = 1 # draw the mean of so many values, the last ones of each key

    def __post_init__(self):
        require(self, out=(self.out.endswith('.png'), 'a file that ends in .png'),
                smooth=(self.smooth >= 1, 'at least 1'))

def names_of(runs):
    """Name each run by its folder; folders above it tell namesakes apart."""
    parts = [Path(os.path.abspath(run).removesuffix(f'{os.sep}log.jsonl')).parts for run in runs]
    for i, run in enumerate(runs):
        if parts[i] in parts[:i]:
            fail(f"{run}: is given twice; wanted each run once")
    alone = lambda mine, n: sum(other[-n:] == mine[-n:] for other in parts) == 1
    return ['/'.join(mine[-next(n for n in range(1, len(mine) + 1) if alone(mine, n)):]) for mine in parts]

def read_curves(run):
    """Return {key: {step: value}} of a run's log, in its order; the numbers below 1e38 alone."""
    path = run if run.endswith('.jsonl') else log_of(run)
    if not os.path.exists(path):
        near, there = sorted(Path(run).glob('*/log.jsonl')), os.path.exists(run)
        fail(f"{run}: {'has no log.jsonl' if there else 'no such folder or file'}; wanted a run's "
             f"folder{f', such as {near[0].parent}' if near else ''}, or a .jsonl file")
    curves = {}
    for line in read_log(path):
        if is_number(line.get('step')):
            for key in (key for key in line if key != 'step' and is_number(line[key])):
                curves.setdefault(key, {})[line['step']] = line[key]
    if not curves:
        fail(f"{path}: wanted lines with `step` and other numbers, as the training scripts log them")
    return curves

def choose_keys(wanted, logs):
    """Return the keys to draw. wanted: of the user, '' where there are none. logs: as read_curves returns them."""
    known = list(dict.fromkeys(key for log in logs for key in log))
    if wanted:
        keys = list(dict.fromkeys(key.strip() for key in wanted.split(',')))
        for key in keys:
            if key not in known:
                fail(f"--keys={wanted}: no log has `{key}`; there are {', '.join(known)}")
        return keys
    shared = [key for key in known if all(key in log for log in logs)]
    shared = [key for key in shared if any(len(log[key]) > 1 for log in logs)] or shared # a line rather than a dot
    keys = ([key for key in (SAMPLED if 'reward' in shared else LEARNT) if key in shared]
            or [key for key in shared if key not in ('lr', 'time')])
    if not keys:
        fail(f"--keys: the runs have no key in common; wanted some of {', '.join(known)}")
    return keys

def smoothed(curve, n):
    """Return {step: mean of the last n values}; curve: {step: value}."""
    window = deque(maxlen=n)
    return {step: window.append(value) or (fmean(window) if n > 1 else value) for step, value in sorted(curve.items())}

def table(curves):
    """Return the rows of the CSV file. curves: {key: {name of a run: {step: value}}}."""
    columns = {f'{key} of {name}': curve for key, of_key in curves.items() for name, curve in of_key.items()}
    steps = sorted({step for curve in columns.values() for step in curve})
    return [['step', *columns], *([step, *(curve.get(step, '') for curve in columns.values())] for step in steps)]

def draw(curves, names, path, smooth):
    """Draw a panel for each key, with one legend beside them. curves: as for `table`."""
    looks = {name: dict(color=COLOURS[i % 7], ls=STYLES[i // 7 % len(STYLES)]) for i, name in enumerate(names)}
    columns = min(len(curves), min((4, 3), key=lambda columns: -len(curves) % columns)) # the fewest empty places
    ncols = math.ceil(len(names) / 14) # of the legend
    room = ncols * (0.6 + 0.08 * max(map(len, names))) # inches
    with panels(path, len(curves), 3.3 + room / columns, 2.7, columns) as axes:
        for ax, (key, of_key) in zip(axes, curves.items()):
            if ax is not axes[0]:
                ax.sharex(axes[0]) # the same steps in all panels
            for name, curve in of_key.items():
                marker = 'o' if len(curve) < 8 else None
                ax.plot(curve.keys(), curve.values(), lw=1.4, marker=marker, ms=4, **looks[name])
            ax.set(xlabel='step', title=key if smooth == 1 else f'{key}, mean of {smooth}')
            ax.title.set(parse_math=False)
            ax.xaxis.get_major_locator().set_params(integer=True)
        samples = [axes[0].plot([], [], lw=1.8, **looks[name])[0] for name in names]
        legend = axes[columns - 1].legend(samples, ['…'] * len(names), loc='upper left', bbox_to_anchor=(1.02, 1),
                                          ncols=ncols)
        for text, name in zip(legend.get_texts(), names):
            text.set(text=name, parse_math=False) # now, since a label must not begin with _

def check_out(picture, numbers):
    """Fail where a file cannot be written, or is no older plot's."""
    there = [path for path in (picture, numbers) if os.path.exists(path)]
    if there and not (os.path.isfile(numbers) and Path(numbers).read_bytes().startswith(b'step,')):
        fail(f"--out={picture}: {there[0]} is there, and no older plot of this script; wanted another name")
    folder = os.path.dirname(picture) or '.'
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        fail(f"--out={picture}: wanted a file in a folder that can be written to")

def main(cfg, runs):
    if not runs:
        fail("wanted the folders of runs, as in python lab/plot.py out/toy/ppo out/toy/rloo")
    logs = dict(zip(names_of(runs), map(read_curves, runs)))
    keys = choose_keys(cfg.keys, list(logs.values()))
    curves = {key: {name: smoothed(log[key], cfg.smooth) for name, log in logs.items() if key in log} for key in keys}
    path, text = cfg.out.removesuffix('.png') + '.csv', io.StringIO()
    check_out(cfg.out, path)
    csv.writer(text, lineterminator='\n').writerows(table(curves))
    write_atomic(path, text.getvalue())
    print(f"wrote {path}")
    if importlib.util.find_spec('matplotlib') is None:
        return print("no picture: it needs matplotlib (pip install matplotlib)")
    draw(curves, list(logs), cfg.out, cfg.smooth)

if __name__ == '__main__':
    args = joined(sys.argv[1:], Config.__annotations__)
    runs = [arg for arg in args if not arg.startswith('-')]
    sys.argv[1:] = [arg for arg in args if arg.startswith('-')]
    launch(lambda cfg: main(cfg, runs), Config)
