"""
The figures: what evaluate.py and fewer_labels.py measured, as PNG files. matplotlib is imported here and nowhere else,
and only when something is drawn.
"""

import math
import os
from statistics import fmean

from common import fail, read_log

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000') # Okabe and Ito's palette
CURVES = { # panel -> the keys of log.jsonl that it shows
    'loss': ('loss', 'val_loss'), 'share of pairs in order': ('accuracy', 'val_accuracy'),
    'mean score of the answers': ('reward', 'gold'), 'KL to the reference [nats]': ('kl',),
}


def panels(n, columns=4, width=3.4, height=2.7):
    """A figure with n panels and a light grid; returns (figure, list of axes)."""
    try:
        import matplotlib
    except ImportError:
        fail("figures need matplotlib: pip install matplotlib, or --figures=False")
    matplotlib.use('Agg') # files only, no screen
    from matplotlib import pyplot
    columns, lines = min(n, columns), math.ceil(n / columns)
    figure, axes = pyplot.subplots(lines, columns, squeeze=False, figsize=(width * columns, height * lines))
    for i, ax in enumerate(axes.flat):
        ax.set_visible(i < n)
        ax.grid(color='0.9')
        ax.set_axisbelow(True)
        ax.spines[['top', 'right']].set_visible(False)
    return figure, list(axes.flat)[:n]


def save_figure(figure, out_dir, name):
    from matplotlib import pyplot
    path = os.path.join(out_dir, name)
    figure.tight_layout()
    figure.savefig(path + '.tmp', dpi=130, format='png')
    os.replace(path + '.tmp', path)
    pyplot.close(figure)
    print(f"wrote {path}")


def learning_curves(folders, out_dir):
    """One panel per stage and quantity, from the log.jsonl of each of {stage: folder}."""
    wanted = []
    for stage, folder in folders.items():
        log = read_log(os.path.join(folder, 'log.jsonl'))
        for title, keys in CURVES.items():
            lines = {k: [(line['step'], line[k]) for line in log if k in line] for k in keys}
            lines = {k: points for k, points in lines.items() if points}
            if any(len(points) > 1 for points in lines.values()):
                wanted.append((stage, title, lines))
    if not wanted:
        return
    figure, axes = panels(len(wanted))
    for ax, (stage, title, lines) in zip(axes, wanted):
        for i, (key, points) in enumerate(lines.items()):
            ax.plot(*zip(*points), label=key, color=COLOURS[i], lw=1.3, marker='o' if len(points) < 8 else None, ms=4)
        ax.set(title=stage, xlabel='step', ylabel=title)
        if len(lines) > 1:
            ax.legend(frameon=False, fontsize=8)
    save_figure(figure, out_dir, 'learning_curves.png')


def calibration(table, intervals, error, out_dir):
    """table: [mean prediction, share preferred, pairs] per bin; intervals: [low, high] of each share."""
    figure, (ax,) = panels(1, width=4.8, height=4.2)
    predicted, seen, n = zip(*table)
    ax.plot([0.5, 1], [0.5, 1], '--', color='0.5', lw=1, label='perfectly calibrated')
    ax.vlines(predicted, *zip(*intervals), color=COLOURS[0], lw=1)
    ax.plot(predicted, seen, 'o-', color=COLOURS[0], ms=5, lw=1.3, label='reward model, with 95 % intervals')
    for x, (low, _), k in zip(predicted, intervals, n):
        ax.annotate(k, (x, low), (0, -9), textcoords='offset points', ha='center', fontsize=7, color='0.35')
    ax.set(xlabel='predicted: sigmoid(score of a − score of b)', ylabel='share of pairs in which a was preferred')
    ax.margins(y=0.1)
    ax.set_title(f"Reward model calibration, mean error {error:.3f}\n"
                 "(a: the answer of higher score; small numbers: pairs)", fontsize=9)
    ax.legend(frameon=False, fontsize=8, loc='upper left')
    save_figure(figure, out_dir, 'calibration.png')


def reward_kl(table, out_dir):
    """Reward-model score, and gold score where there is one, against KL: one point per model."""
    scores = [k for k in ('reward', 'gold') if k in next(iter(table.values()))]
    if not scores:
        return
    figure, axes = panels(len(scores), width=4.4, height=3.6)
    names = sorted((name for name, row in table.items() if row['kl'] is not None), key=lambda name: table[name]['kl'])
    for ax, key in zip(axes, scores):
        points = [(table[name]['kl'], table[name][key]) for name in names]
        near = 0.25 * (points[-1][0] - points[0][0])
        for i, (name, (x, y)) in enumerate(zip(names, points)):
            below = any(abs(x - u) < near and v > y for u, v in points) # labels of neighbours stay apart
            ax.plot(x, y, 'o', color=COLOURS[i % len(COLOURS)], ms=7)
            ax.annotate(name, (x, y), (0, -15 if below else 7), textcoords='offset points', fontsize=9, ha='center')
        ax.margins(x=0.15, y=0.2)
        ax.set(xlabel='KL to the reference [nats per answer]', ylabel=f"mean {key} score",
               title='reward model' if key == 'reward' else 'gold')
    save_figure(figure, out_dir, 'reward_kl.png')


def over_optimisation(folders, out_dir, smooth=5):
    """
    Reward-model score and gold score against sqrt(KL) along PPO runs, {label: folder}, from their logs, as in Gao et
    al. 2022, https://arxiv.org/abs/2210.10760, figure 1. Dots are iterations, the line their mean over `smooth`.
    """
    logs = {label: [line for line in read_log(os.path.join(folder, 'log.jsonl'))
                    if 'kl' in line and 'reward' in line] for label, folder in folders.items()}
    for label, log in logs.items():
        if not log:
            fail(f"--figure_runs: {folders[label]}/log.jsonl: wanted lines with `kl` and `reward`, as ppo.py logs them")
    keys = [k for k in ('reward', 'gold') if any(k in line for log in logs.values() for line in log)]
    figure, axes = panels(len(keys), width=4.4, height=3.6)
    for ax, key in zip(axes, keys):
        for i, (label, log) in enumerate(logs.items()):
            points = [(math.sqrt(max(0.0, line['kl'])), line[key]) for line in log if key in line]
            if not points:
                continue
            windows = [points[max(0, j - smooth + 1):j + 1] for j in range(len(points))]
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(*zip(*points), '.', color=colour, alpha=0.35, ms=4)
            ax.plot(*zip(*[[fmean(axis) for axis in zip(*w)] for w in windows]), color=colour, lw=1.6, label=label)
        ax.set(xlabel='√KL to the reference [√nats per answer]', ylabel=f"mean {key} score",
               title='what is optimised: reward model' if key == 'reward' else 'what is wanted: gold')
    axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, out_dir, 'overoptimisation.png')


def fewer_labels(results, out_dir):
    """results: {how: {budget: [accuracy of each seed]}}. Lines are means, dots the seeds."""
    figure, (ax,) = panels(1, width=5.2, height=4)
    for how, colour in zip(results, COLOURS):
        points = [(n, x) for n, seeds in results[how].items() for x in seeds]
        ax.plot(*zip(*points), '.', color=colour, alpha=0.4)
        ax.plot(list(results[how]), [fmean(seeds) for seeds in results[how].values()], 'o-', color=colour, lw=1.4, ms=5,
                label=how)
    ax.set_xscale('log')
    ax.set_xticks(list(results['random']), map(str, results['random']))
    ax.minorticks_off()
    ax.set(xlabel='prompts whose 4 answers were ranked', ylabel='reward model: held-out pairs in order')
    ax.legend(frameon=False)
    save_figure(figure, out_dir, 'fewer_labels.png')
