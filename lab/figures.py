"""Draw what evaluate.py and the other files of lab/ measured, as PNG files and for report.html.

matplotlib is imported here and nowhere else, and only when something is drawn.
"""

import io
import math
import os
import re
from contextlib import contextmanager
from itertools import cycle
from statistics import fmean

from common.checkpoints import read_log
from common.options import fail
from common.records import is_number

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000') # Okabe and Ito's palette
LOG = 'loss (logarithmic axis)'
INK, GRID = '#1d1d1b', '#e4e2dc'
STYLE = {'axes.grid': True, 'grid.color': GRID, 'axes.axisbelow': True, 'axes.spines.top': False,
         'axes.spines.right': False, 'legend.frameon': False, 'svg.fonttype': 'none', 'svg.hashsalt': '',
         'text.parse_math': False, # a model's name may hold $
         **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK)}
CURVES = { # panel -> the keys of log.jsonl that it shows, and what a page says of each
    'loss': {
        'loss': 'Training lowers the loss. It jumps, since every step sees other data; of many points the thick line '
                'is a running mean.',
        'val_loss': 'The diamonds are measured on held-out data. If they rise while the line falls, the model learns '
                    'its data by heart.'},
    'share of pairs in order': {
        'accuracy': 'How often the better of two answers gets the higher score; 0.5 is guessing.',
        'val_accuracy': 'The diamonds are measured on held-out pairs.'},
    'mean score of the answers': {
        'reward': 'The reward is what training raises.',
        'gold': 'The gold score is only watched. If it falls while the reward rises, the policy fools the reward.'},
    'KL to the reference [nats]': {
        'kl': 'How far the policy has moved from where it began. It should level off. If it climbs on and on, read the '
              'answers: they may have become odd.'},
}

def load_pyplot():
    """Return matplotlib.pyplot, which draws to files alone; fail where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        fail("figures need matplotlib: pip install matplotlib, or --figures=False")
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot

def to_svg(figure, ax):
    """Return one panel as SVG. Its ink, grid and curves take the colours of the page around it."""
    for other in figure.axes:
        other.set_visible(other is ax)
    box = ax.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).padded(0.04)
    out = io.StringIO()
    figure.savefig(out, format='svg', bbox_inches=box, transparent=True,
                   metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
    text = re.sub('<defs>\\s*<style.*?</defs>', '', out.getvalue(), flags=re.DOTALL) # it would style the whole page
    of_page = {INK: 'currentColor', '#000000': 'currentColor', GRID: 'var(--line)'}
    of_page |= {colour.lower(): f'var(--c{i})' for i, colour in enumerate(COLOURS[:-1])}
    for colour, variable in of_page.items():
        text = text.replace(colour, variable)
    return text[text.index('<svg'):]

def plain_powers(axis):
    """Label a logarithmic axis 0.1, 1, 10: matplotlib's own labels are maths between $, which STYLE leaves as text."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter): # it knows which ticks get a label
        def __call__(self, x, pos=None):
            return f'{x:g}' if super().__call__(x, pos) else ''

    if isinstance(axis.get_major_formatter(), LogFormatter): # no labels of the caller's
        axis.set_major_formatter(Plain())
    if isinstance(axis.get_minor_formatter(), LogFormatter):
        axis.set_minor_formatter(Plain())

@contextmanager
def panels(path, n, width, height, columns=4, svgs=None):
    """Yield the axes of a figure with n panels. Then write it; the list svgs gets each panel as SVG."""
    pyplot = load_pyplot()
    columns, lines = min(n, columns), math.ceil(n / columns)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(lines, columns, squeeze=False, figsize=(width * columns, height * lines))
        for ax in axes.flat[n:]:
            ax.set_visible(False)
        yield axes.flat[:n]
        for ax in axes.flat[:n]:
            plain_powers(ax.xaxis)
            plain_powers(ax.yaxis)
        figure.tight_layout()
        figure.savefig(path + '.tmp', dpi=130, format='png')
        if svgs is not None:
            svgs.extend(to_svg(figure, ax) for ax in axes.flat[:n])
    os.replace(path + '.tmp', path)
    pyplot.close(figure)
    print(f"wrote {path}")

def curve(ax, key, points, colour):
    """Plot a key of a log, [(step, value)]: a long one as a running mean, a few held-out ones as marks."""
    steps, values = zip(*points)
    held_out, few = key.startswith('val_'), len(points) < 20
    if held_out and few:
        ax.plot(steps, values, 'D', label=key, color=colour, ms=5, zorder=3)
        return
    reach = 0 if few else len(points) // 20 # on both sides
    means = [fmean(values[max(0, i - reach):i + reach + 1]) for i in range(len(values))]
    ax.plot(steps, means, label=key, color=colour, lw=1.8, marker='o' if few else None, ms=3)
    if not few:
        ax.plot(steps, values, color=colour, lw=0.8, alpha=0.6)

def learning_curves(folders, out_dir):
    """Draw a panel per stage and quantity, from logs.

    folders: {stage: folder}. Returns [(title, caption, SVGs)].
    """
    wanted, svgs, figures = [], [], []
    logs = {stage: read_log(os.path.join(folder, 'log.jsonl')) for stage, folder in folders.items()}
    for title, keys in CURVES.items():
        for stage, log in logs.items():
            if title == 'loss' and any('reward' in line for line in log):
                continue # it says nothing in PPO and its relatives
            lines = {k: points for k in keys if (points := [
                (line['step'], line[k]) for line in log if is_number(line.get('step')) and is_number(line.get(k))])}
            if any(len(points) > 1 for points in lines.values()):
                wanted.append((stage, title, lines))
    if not wanted:
        return []
    with panels(os.path.join(out_dir, 'learning_curves.png'), len(wanted), 3.6, 2.8, svgs=svgs) as axes:
        for ax, (stage, title, lines) in zip(axes, wanted):
            for (key, points), colour in zip(lines.items(), COLOURS):
                curve(ax, key, points, colour)
            values = [value for points in lines.values() for _, value in points]
            if title == 'loss' and max(values) > 8 * min(values) > 0: # the first steps would flatten all others
                ax.set_yscale('log')
                ticks = [tick for k in range(-6, 6) for m in (1, 2, 5)
                         if min(values) <= (tick := m * 10.0 ** k) <= max(values)]
                ax.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
                ax.minorticks_off()
                title = LOG
            ax.set(title=stage[:30], xlabel='step', ylabel=title)
            if len(lines) > 1:
                ax.legend(fontsize=8)
    for title, keys in CURVES.items():
        mine = [(svg, lines) for svg, (_, of, lines) in zip(svgs, wanted) if of == title]
        if mine:
            told = [text for key, text in keys.items() if any(key in lines for _, lines in mine)]
            told += ['On a logarithmic axis equal steps mean equal factors.'] * any(LOG in svg for svg, _ in mine)
            figures.append((f'Learning curves: {title}', ' '.join(told), [svg for svg, _ in mine]))
    return figures

def calibration(table, intervals, error, out_dir):
    """Draw how often the reward model is right, by its certainty.

    table, error: of evaluate.calibration. intervals: [low, high] of each share. Returns [(title, caption, SVGs)].
    """
    predicted, seen, n = zip(*table)
    svgs = []
    with panels(os.path.join(out_dir, 'calibration.png'), 1, 3.6, 3.8, svgs=svgs) as (ax,):
        ax.plot([0.5, 1], [0.5, 1], '--', color='0.5', lw=1, label='perfectly calibrated')
        ax.vlines(predicted, *zip(*intervals), color=COLOURS[0], lw=1)
        ax.plot(predicted, seen, 'o-', color=COLOURS[0], ms=5, lw=1.3, label='reward model, with 95 % intervals')
        low = min(0.5, *(low for low, _ in intervals))
        ax.set_ylim(low - 0.1 * (1 - low), 1.02)
        for x, k in zip(predicted, n): # along the lower edge
            ax.text(x, 0.015, k, transform=ax.get_xaxis_transform(), ha='center', fontsize=8)
        ax.set(title='reward model: calibration', xlabel='predicted: sigmoid(score of a − score of b)',
               ylabel='share in which a was preferred')
        ax.legend(fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.18))
    return [('Calibration of the reward model',
             'Of each pair, a is the answer with the higher score. Points above the dashed line: the reward model is '
             f'right more often than its scores claim; below it, less often. The mean distance is {error:.3f}. The '
             'small numbers along the lower edge count the pairs.', svgs)]

def place(boxes, taken):
    """Return the index of the box (x0, y0, x1, y1) that overlaps least with those taken."""
    overlap = lambda a, b: max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return min(range(len(boxes)), key=lambda i: sum(overlap(boxes[i], other) for other in taken))

def reward_kl(table, out_dir):
    """Draw reward-model score and gold score against KL, a point per model.

    table: results.json's `models`. Returns [(title, caption, SVGs)].
    """
    scores = [k for k in ('reward', 'gold') if k in next(iter(table.values()))]
    rows = sorted(((name, row) for name, row in table.items() if row['kl'] is not None), key=lambda x: x[1]['kl'])
    if not scores:
        return []
    svgs = []
    with panels(os.path.join(out_dir, 'reward_kl.png'), len(scores), 3.6, 3, svgs=svgs) as axes:
        for ax, key in zip(axes, scores):
            for (_, row), colour in zip(rows, cycle(COLOURS)):
                ax.plot(row['kl'], row[key], 'o', color=colour, ms=7)
            ax.margins(x=0.18, y=0.15)
            ax.set(xlabel='KL to the reference [nats per answer]', ylabel=f'mean {key}',
                   title='reward' if key == 'reward' else 'gold score')
        axes[0].figure.tight_layout() # from here on the points keep their places
        for ax, key in zip(axes, scores):
            points = [(row['kl'], row[key]) for _, row in rows]
            at = ax.transData.transform(points) * 72 / ax.figure.dpi # (N, 2), in points of 1/72 inch
            taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
            for (name, _), point, (x, y) in zip(rows, points, at):
                name, width = name[:30], 5.2 * len(name[:30])
                spots = [('center', 0, 7), ('center', 0, -15), ('left', 7, -3), ('right', -7, -3)] # ha, offset
                left = dict(center=x - width / 2, left=x + 7, right=x - 7 - width)
                boxes = [(left[ha], y + dy - 1, left[ha] + width, y + dy + 9) for ha, _, dy in spots]
                i = place(boxes, taken)
                taken.append(boxes[i])
                ax.annotate(name, point, spots[i][1:], textcoords='offset points', fontsize=9, ha=spots[i][0])
    told = ['Up: better answers by this score. To the right: the model has moved further from the reference. A point '
            'that lies high and to the left is good at a small price.']
    if len(scores) == 2:
        told.append('A model that is high in the reward and low in the gold score has fooled the reward.')
    return [('Score and distance', ' '.join(told), svgs)]

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

def over_optimisation(logs, out_dir, smooth=5, name='overoptimisation'):
    """Draw reward-model score and gold score against sqrt(KL) along PPO runs.

    logs: as `read_runs` returns them. As in Gao et al. 2022, https://arxiv.org/abs/2210.10760, figure 1. The line is
    the mean of `smooth` iterations; name: of the PNG file. Returns [(title, caption, SVGs)].
    """
    svgs = []
    keys = [k for k in ('reward', 'gold') if any(k in line for log in logs.values() for line in log)]
    with panels(os.path.join(out_dir, f'{name}.png'), len(keys), 3.6, 3, svgs=svgs) as axes:
        for ax, key in zip(axes, keys):
            for (label, log), colour in zip(logs.items(), cycle(COLOURS)):
                points = [(math.sqrt(max(0.0, line['kl'])), line[key]) for line in log if key in line]
                if points:
                    windows = [points[max(0, j - smooth + 1):j + 1] for j in range(len(points))]
                    means = [[fmean(axis) for axis in zip(*window)] for window in windows]
                    ax.plot(*zip(*points), '.', color=colour, alpha=0.6, ms=5)
                    ax.plot(*zip(*means), color=colour, lw=1.6, label=label)
            ax.set(xlabel='√KL to the reference [√nats per answer]', ylabel=f"mean {key} score",
                   title='optimised: reward model' if key == 'reward' else 'wanted: gold')
        axes[0].legend(fontsize=9)
    return [('Over-optimisation', 'Along training, from left to right: the score that is optimised, and, if it was '
             'logged, the gold score. A dot is an iteration, a line their running mean. Where the gold score bends '
             'down, more training did harm.', svgs)]

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
        ax.set(xlabel=f'{xlabel} (logarithmic axis)', ylabel='reward model: held-out pairs in order')
        ax.legend()
