"""Train in the world of sums, where a checker is the reward: the stages of `demo.py --world=sums`, table and figure.

    python demo.py --world=sums && python -m lab.sums
    python -m lab.sums --runs=out/sums,out/sums2,out/sums3

Each model is trained twice, with and without the scratch line (see data/sums/world.py); names of the latter end in
_direct. The curves are the shares of right answers among those sampled in each iteration, to training problems.
"""

import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.checkpoints import read_log
from common.options import fail, launch, require
from common.records import read_json, read_records
from lab import story, tables
from lab.figures import COLOURS, panels

METHODS = dict( # a config file and a folder each: the script, and iterations without the scratch line
    grpo=('reinforce.py', 250), rloo=('reinforce.py', 300), ppo=('ppo.py', 120))
STYLES = dict(scratch='', direct='_direct') # what ends the names of stages and folders

@dataclass
class Config:
    runs: str = 'out/sums' # folders of demo.py --world=sums, separated by commas; curves are those of the first
    out: str = '' # the PNG file; empty: sums.png in the first folder

    def __post_init__(self):
        require(self, runs=(all(self.runs.split(',')), 'folders of demo.py --world=sums, separated by commas'))

def stages(out, methods, source=''):
    """List the stages of a run, as demo.stages does. out: their folder; source: nothing, the sums are made."""
    todo = [('data', 'data/sums/prepare.py', '', {}, 'data/sums/sums.tiktoken', [])]
    for style, end in STYLES.items():
        def add(name, script, config, folder, product, *needs, **options):
            options['out_dir'] = f'{out}/{folder}{end}'
            todo.append((name + end, script, f'config/sums/{config}.py', options, f"{options['out_dir']}/{product}",
                         [need + end for need in needs] or ['data']))

        files = lambda kind: dict(train_data=f'data/sums/{kind}_{style}_train.jsonl',
                                  val_data=f'data/sums/{kind}_{style}_val.jsonl')
        # without the scratch line there is more to learn, and a step takes less time
        longer = lambda steps: {} if style == 'scratch' else dict(max_steps=steps)
        add('pretrain', 'sft.py', 'base', 'base', 'model.safetensors', **files('practice'), **longer(8000))
        add('sft', 'sft.py', 'sft', 'sft', 'model.safetensors', 'pretrain', init_from=f'{out}/base{end}',
            **files('demonstrations'))
        for name in methods:
            add(name, METHODS[name][0], name, name, 'model.safetensors', 'sft', policy=f'{out}/sft{end}',
                **longer(METHODS[name][1]))
        models = ','.join(f'{name}={out}/{name}{end}' for name in ('base', 'sft', *methods))
        for name, split in (('evaluate', 'test'), ('others', 'others')):
            add(name, 'evaluate.py', 'evaluate', name, 'results.json', *methods, models=models,
                prompts=f'data/sums/prompts_{split}.jsonl')
    return todo

def results(out, methods):
    """Return the accuracies of a run, {model: …} each: greedy, sampled, and greedy by number of digits."""
    accuracy, sampled, by_digits = {}, {}, {}
    for end in STYLES.values():
        tested = read_json(f'{out}/evaluate{end}/results.json')
        right = defaultdict(list) # (model, digits) -> scores
        for folder in ('evaluate', 'others'):
            for sample in read_records(f'{out}/{folder}{end}/samples.jsonl', 'prompts'):
                right[sample['model'], sample['category']].append(sample['greedy_gold'])
        for name in ('base', 'sft', *methods):
            accuracy[name + end] = tested['greedy'][name]['gold']
            sampled[name + end] = tested['models'][name]['gold']
            by_digits[name + end] = {digits: fmean(scores) for (model, digits), scores in sorted(right.items())
                                     if model == name}
    return dict(accuracy=accuracy, sampled=sampled, by_digits=by_digits)

def print_results(runs):
    """Print the accuracies of runs as a table in Markdown. runs: the contents of results.json."""
    names = [name for name in runs[0]['accuracy'] if all(name in run['accuracy'] for run in runs)]
    digits = list(runs[0]['by_digits'][names[0]])
    tables.table(['right answers', 'sampled', 'greedy', *(f'{d}, greedy' for d in digits)],
                 [[name, tables.show([run['sampled'][name] for run in runs]),
                   tables.show([run['accuracy'][name] for run in runs]),
                   *(tables.show([run['by_digits'][name][d] for run in runs]) for d in digits)] for name in names])
    print('\nseconds: ' + ', '.join(f"{run['seconds']:.0f}" for run in runs))

def ending(out, methods, results, typed):
    """Return what demo.py prints at its end: shares of right answers, answers that differ, what to type next."""
    accuracy, sampled, names = results['accuracy'], results['sampled'], ['base', 'sft', *methods]
    digits = list(results['by_digits']['sft'])
    rows = [[name, *(f'{share:.2f}' for share in (sampled[name], accuracy[name], *results['by_digits'][name].values()))]
            for name in accuracy]
    why = []
    if accuracy['sft'] < sampled['sft']:
        why = ['', story.fill(
            f"Why is greedy sft right less often ({accuracy['sft']:.2f}) than sampled sft ({sampled['sft']:.2f})? Most "
            "writers are hasty, so the likeliest answer is theirs: it never carries. Sampling also finds careful ones, "
            "and the checker makes them likelier.")]
    few = story.shown(names)
    samples = read_records(f'{out}/evaluate/samples.jsonl', 'prompts')
    divided = story.dividing(samples, few, lambda sample: '+' in sample['prompt'])
    others = [share for shares in results['by_digits'].values() for d, share in shares.items() if d != '3 digits']
    return '\n'.join([
        story.fill("Shares of right answers to held-out problems; _direct: without the scratch line. Only 3 digits "
                   "were practised; the columns by digits (greedy) show what carries over to others"
                   + (': next to nothing.' if max(others, default=1) < 0.05 else '.')),
        '', *tables.align(['', 'sampled', 'greedy', *digits], rows), *why,
        '', "Problems on which they differ most; an answer with 1.0 is right, one with 0.0 is wrong:", '',
        *story.side_by_side(divided, few), '',
        *story.next_steps(out, few, typed, 'draw how the right answers became more',
                          'python', '-m', 'lab.sums', f'--runs={out}')])

def draw(folders, runs, path):
    """Draw the first run's learning curves, and all runs by digits."""
    methods = [name for name in METHODS if name in runs[0]['accuracy']]
    with panels(path, 2, 4.6, 3.3) as axes:
        for name, colour in zip(methods, COLOURS):
            for end, style in zip(STYLES.values(), ('-', '--')):
                log = read_log(f'{folders[0]}/{name}{end}/log.jsonl')
                axes[0].plot([line['step'] for line in log], [line['reward'] for line in log], style, color=colour,
                             lw=1.3, label=name + (', without scratch line' if end else ''))
        axes[0].set(title='in training', xlabel='iteration', ylabel='share of right answers, sampled')
        for name, colour in zip(('sft', *methods), ('0.6', *COLOURS)):
            for end, style in zip(STYLES.values(), ('o-', 's--')):
                shares = [run['by_digits'][name + end] for run in runs]
                axes[1].plot([d.split()[0] for d in shares[0]], [fmean(s[d] for s in shares) for d in shares[0]], style,
                             color=colour, lw=1.3, ms=5, label=name + (', without scratch line' if end else ''))
        axes[1].set(title='held-out problems, after 3 digits in training', xlabel='digits',
                    ylabel='share of right answers, greedy')
        for ax in axes:
            ax.set_ylim(-0.03, 1.03)
            ax.legend(fontsize=7)

def main(cfg):
    folders = cfg.runs.split(',')
    runs = [read_json(f'{folder}/results.json', 'the results of demo.py --world=sums') for folder in folders]
    if not all('by_digits' in run for run in runs):
        fail(f"--runs={cfg.runs}: wanted the results of demo.py --world=sums")
    try:
        print_results(runs)
    except KeyError as e:
        fail(f"--runs={cfg.runs}: wanted the results of this version's demo.py --world=sums; one of them lacks {e}")
    draw(folders, runs, cfg.out or f'{folders[0]}/sums.png')

if __name__ == '__main__':
    launch(main, Config)
