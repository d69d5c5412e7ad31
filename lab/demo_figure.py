"""Draw one run of demo.py in four panels, the picture of README.md.

    python demo.py && python -m lab.demo_figure --run=out/toy
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.checkpoints import read_log
from common.options import fail, launch
from common.records import read_json
from lab.figures import COLOURS, panels

@dataclass
class Config:
    run: str = 'out/toy' # a folder that demo.py made
    out: str = '' # the PNG file; empty: demo.png in the run's folder evaluate

def curve(ax, folder, key, label, colour):
    """Plot a key of a folder's log against the step."""
    points = [(line['step'], line[key]) for line in read_log(os.path.join(folder, 'log.jsonl')) if key in line]
    if not points:
        fail(f"{folder}/log.jsonl: wanted lines with `{key}`, as demo.py's stages log them")
    ax.plot(*zip(*points), label=label, color=colour, lw=1.4)

def main(cfg):
    results = read_json(os.path.join(cfg.run, 'evaluate', 'results.json'), "the results of demo.py")
    try:
        gold = {key: {name: row['gold'] for name, row in results[key].items()} for key in ('models', 'greedy')}
    except KeyError as e:
        fail(f"{cfg.run}/evaluate/results.json: wanted the results of demo.py, got none with {e}")
    names = [name for name in ('base', 'sft', 'dpo', 'ppo') if name in gold['models']]
    at = lambda stage: os.path.join(cfg.run, stage)
    with panels(cfg.out or os.path.join(cfg.run, 'evaluate', 'demo.png'), 4, 3.2, 2.8) as axes:
        curve(axes[0], at('base'), 'loss', None, COLOURS[0])
        axes[0].set(title='1. a base model learns to write', xlabel='step', ylabel='loss [nats per token]')
        curve(axes[1], at('reward'), 'accuracy', None, COLOURS[0])
        axes[1].set(title='2. a reward model learns to rank', xlabel='step', ylabel='share of pairs in order')
        curve(axes[2], at('ppo'), 'reward', "the reward model's score", COLOURS[0])
        curve(axes[2], at('ppo'), 'gold', 'the gold score, never seen', COLOURS[1])
        axes[2].set(title='3. PPO improves the answers', xlabel='iteration', ylabel='mean of the answers')
        axes[2].legend(fontsize=8)
        for shift, key, label in ((-0.2, 'models', 'sampled'), (0.2, 'greedy', 'greedy')):
            axes[3].bar([i + shift for i in range(len(names))], [gold[key][name] for name in names], 0.38,
                        label=label, color=COLOURS[0 if key == 'models' else 5])
        axes[3].set_xticks(range(len(names)), [name.upper() if name != 'base' else name for name in names])
        axes[3].set(title='4. held-out prompts', ylabel='mean gold score', ylim=(0, 1.15))
        axes[3].legend(fontsize=8, ncols=2, loc='upper center')
        for ax in axes:
            ax.title.set_fontsize(9)

if __name__ == '__main__':
    launch(main, Config)
