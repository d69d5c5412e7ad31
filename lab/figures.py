"""Draw what evaluate.py and the other files of lab/ measured, as PNG files.

matplotlib is imported here and nowhere else, and only when something is drawn.
"""

import math
import os
from contextlib import contextmanager
from itertools import cycle
from statistics import fmean

from common.checkpoints import read_log
from common.options import fail

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000') # Okabe and Ito's palette
STYLE = {'axes.grid': True, 'grid.color': '0.9', 'axes.axisbelow': True, 'axes.spines.top': False,
         'axes.spines.right': False, 'legend.frameon': False}
CURVES = { # panel -> the keys of log.jsonl that it shows
    'loss': ('loss', 'val_loss'), 'share of pairs in order': ('accuracy', 'val_accuracy'),
    'mean score of the answers': ('reward', 'gold'), 'KL to the reference [nats]': ('kl',),
}

@contextmanager
def panels(path, n, width, height, columns=4):
    """Yield the axes of a figure with n panels. Then write it."""
    try:
        import matplotlib
    except ImportError:
        fail("figures need matplotlib: pip install matplotlib, or --figures=False")
    matplotlib.use('Agg') # files only, no screen
    from matplotlib import pyplot
    columns, lines = min(n, columns), math.ceil(n / columns)
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(lines, columns, squeeze=False, figsize=(width * columns, height * lines))
        for ax in axes.flat[n:]:
            ax.set_visible(False)
        yield axes.flat[:n]
        figure.tight_layout()
        figure.savefig(path + '.tmp', dpi=130, format='png')
    os.replace(path + '.tmp', path)
    pyplot.close(figure)
    print(f"wrote {path}")

def learning_curves(folders, out_dir):
    """Draw a panel per stage and quantity, from logs in {stage: folder}."""
    wanted = []
    for stage, folder in folders.items():
        log = read_log(os.path.join(folder, 'log.jsonl'))
        for title, keys in CURVES.items():
            lines = {k: points for k in keys if (points := [(line['step'], line[k]) for line in log if k in line])}
            if any(len(points) > 1 for points in lines.values()):
                wanted.append((stage, title, lines))
    if not wanted:
        return
    with panels(os.path.join(out_dir, 'learning_curves.png'), len(wanted), 3.4, 2.7) as axes:
        for ax, (stage, title, lines) in zip(axes, wanted):
            for (key, points), colour in zip(lines.items(), COLOURS):
                ax.plot(*zip(*points), label=key, color=colour, lw=1.3, marker='o' if len(points) < 8 else None, ms=4)
            ax.set(title=stage, xlabel='step', ylabel=title)
            if len(lines) > 1:
                ax.legend(fontsize=8)

def calibration(table, intervals, error, out_dir):
    """Draw how often the reward model is right, by its certainty.

    table, error: of evaluate.calibration. intervals: [low, high] of each share.
    """
    predicted, seen, n = zip(*table)
    with panels(os.path.join(out_dir, 'calibration.png'), 1, 4.8, 4.2) as (ax,):
        ax.plot([0.5, 1], [0.5, 1], '--', color='0.5', lw=1, label='perfectly calibrated')
        ax.vlines(predicted, *zip(*intervals), color=COLOURS[0], lw=1)
        ax.plot(predicted, seen, 'o-', color=COLOURS[0], ms=5, lw=1.3, label='reward model, with 95 % intervals')
        for x, (low, _), k in zip(predicted, intervals, n):
            ax.annotate(k, (x, low), (0, -9), textcoords='offset points', ha='center', fontsize=7, color='0.35')
        ax.set(xlabel='predicted: sigmoid(score of a − score of b)', ylabel='share of pairs in which a was preferred')
        ax.margins(y=0.1)
        ax.set_title(f"Reward model calibration, mean error {error:.3f}\n"
                     "(a: the answer of higher score; small numbers: pairs)", fontsize=9)
        ax.legend(fontsize=8, loc='upper left')

def reward_kl(table, out_dir):
    """Draw reward-model score and gold score against KL, a point per model."""
    scores = [k for k in ('reward', 'gold') if k in next(iter(table.values()))]
    if not scores:
        return
    rows = sorted(((name, row) for name, row in table.items() if row['kl'] is not None), key=lambda x: x[1]['kl'])
    with panels(os.path.join(out_dir, 'reward_kl.png'), len(scores), 4.4, 3.6) as axes:
        for ax, key in zip(axes, scores):
            points = [(row['kl'], row[key]) for _, row in rows]
            near = 0.25 * (points[-1][0] - points[0][0])
            for (name, _), (x, y), colour in zip(rows, points, cycle(COLOURS)):
                below = any(abs(x - u) < near and v > y for u, v in points) # labels of neighbours stay apart
                ax.plot(x, y, 'o', color=colour, ms=7)
                ax.annotate(name, (x, y), (0, -15 if below else 7), textcoords='offset points', fontsize=9, ha='center')
            ax.margins(x=0.15, y=0.2)
            ax.set(xlabel='KL to the reference [nats per answer]', ylabel=f"mean {key} score",
                   title='reward model' if key == 'reward' else 'gold')

def read_runs(folders):
    """Read the logs of PPO runs, {label: folder}; return {label: lines}."""
    logs = {}
    for label, folder in folders.items():
        path = os.path.join(folder, 'log.jsonl')
        logs[label] = [line for line in read_log(path) if 'kl' in line and 'reward' in line]
        if not logs[label]:
            fail(f"--figure_runs: {path}: {'' if os.path.exists(path) else 'no such file; '}wanted lines with `kl` and "
                 "`reward`, as ppo.py logs them")
    return logs

def over_optimisation(logs, out_dir, smooth=5):
    """Draw reward-model score and gold score against sqrt(KL) along PPO runs.

    logs: as `read_runs` returns them. As in Gao et al. 2022, https://arxiv.org/abs/2210.10760, figure 1. The line is
    the mean of `smooth` iterations.
    """
    keys = [k for k in ('reward', 'gold') if any(k in line for log in logs.values() for line in log)]
    with panels(os.path.join(out_dir, 'overoptimisation.png'), len(keys), 4.4, 3.6) as axes:
        for ax, key in zip(axes, keys):
            for (label, log), colour in zip(logs.items(), cycle(COLOURS)):
                points = [(math.sqrt(max(0.0, line['kl'])), line[key]) for line in log if key in line]
                if points:
                    windows = [points[max(0, j - smooth + 1):j + 1] for j in range(len(points))]
                    means = [[fmean(axis) for axis in zip(*window)] for window in windows]
                    ax.plot(*zip(*points), '.', color=colour, alpha=0.35, ms=4)
                    ax.plot(*zip(*means), color=colour, lw=1.6, label=label)
            ax.set(xlabel='√KL to the reference [√nats per answer]', ylabel=f"mean {key} score",
                   title='optimised: reward model' if key == 'reward' else 'wanted: gold')
        axes[0].legend(fontsize=9)

def risk_coverage(results, out_dir):
    """Draw risk against coverage (El-Yaniv and Wiener 2010).

    Every policy is a point, and every seed a small one, or a cross where it is as good as silent and its risk None. A
    line joins all policies but the first. results: {decoding: {policy: {'coverage' and 'risk': [of each seed]}}}.
    """
    with panels(os.path.join(out_dir, 'risk_coverage.png'), len(results), 4.6, 4) as axes:
        for ax, (decoding, policies) in zip(axes, results.items()):
            means = []
            for (name, row), colour in zip(policies.items(), cycle(COLOURS)):
                seeds = list(zip(row['coverage'], row['risk']))
                points = [point for point in seeds if None not in point]
                silent = [coverage for coverage, risk in seeds if risk is None]
                label = f"{name}, {len(silent)} of {len(seeds)} seeds silent" if silent else name
                ax.plot(silent, [0] * len(silent), 'x', color=colour, ms=7, label='' if points else label)
                if points:
                    means.append([fmean(axis) for axis in zip(*points)])
                    ax.plot(*zip(*points), '.', color=colour, alpha=0.4)
                    ax.plot(*means[-1], 'o' if name in list(policies)[1:] else 's', color=colour, ms=7, label=label)
            ax.plot(*zip(*means[1:]), color='0.6', lw=1, zorder=0)
            ax.set(xlabel='coverage: share that is answered', ylabel='risk: share of the answered that is wrong',
                   xlim=(-0.05, 1.05), title=decoding)
            ax.legend(fontsize=8, title='price of abstaining', title_fontsize=8)

def fewer_labels(results, path, xlabel):
    """Draw accuracy against the number of labels. results: {how: {budget: [accuracy of each seed]}}."""
    with panels(path, 1, 5.2, 4) as (ax,):
        for (how, seeds_of), colour in zip(results.items(), COLOURS):
            for n, seeds in seeds_of.items():
                ax.plot([n] * len(seeds), seeds, '.', color=colour, alpha=0.4)
            ax.plot(list(seeds_of), list(map(fmean, seeds_of.values())), 'o-', color=colour, lw=1.4, ms=5, label=how)
        ax.set_xscale('log')
        budgets = next(iter(results.values()))
        ax.set_xticks(list(budgets), map(str, budgets))
        ax.minorticks_off()
        ax.set(xlabel=xlabel, ylabel='reward model: held-out pairs in order')
        ax.legend()
