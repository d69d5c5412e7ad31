"""Measure gold against KL on human labels: PPO, DPO, RRHF and best of n, with fluency and diversity.

    python -m lab.reviews_frontier --source=pros_cons.zip
    python -m lab.reviews_frontier --source=pros_cons.zip --methods=ppo,dpo --betas="ppo=0.1 dpo=0.5" --seeds=1

The world of lab/reviews.py, on the test prompts. PPO and DPO are trained with each price of the KL in --betas, the
others as in config/reviews. `dpo` and `rrhf` learn from answers of the SFT model that the reward model ranked, as in
Rafailov et al. 2023, section 6.1; `dpo_people` from what people wrote, without a reward model. KL, best of n, fits and
the comparison at equal KL are those of lab/frontier.py. Gold is a probability: no curve can pass 1.

Fluency is the perplexity of the sampled answers under a language model of remarks that no policy saw. Different is the
share of different answers among them, distinct-2 that of different pairs of words, of equally many pairs for all. Of
best of n all of these are measured on the best of the first n answers.

It prints each command, reuses finished stages, prints tables and samples in Markdown, and writes results.json,
frontier.png and fluency.png. The three seeds take 45 minutes on two cores.
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import launch, require
from common.records import read_records, write_atomic
from data.reviews import gold
from lab import frontier, reviews
from lab.figures import COLOURS, panels
from lab.frontier import BEST, settings_of
from lab.seeds import numbers
from lab.tables import show, table

PROMPTS = 'data/reviews/prompts_test.jsonl'

@dataclass
class Config(frontier.Config):
    KNOWN = reviews.METHODS

    out_dir: str = 'out/reviews_frontier' # seed N in a folder N
    source: str = '' # pros_cons.zip or its folder; empty = fetch it
    methods: str = f'ppo,dpo,rrhf,dpo_people,{BEST}' # of demo.py --world=reviews, and best_of_n
    betas: str = 'ppo=0.05,0.1,0.2,0.4,0.8 dpo=0.1,0.2,0.5,1 dpo_people=0.1,0.2,0.5,1' # kl_coef of ppo, beta of dpo
    at: str = '0.5,1,2,4' # compare at these KLs, and at those of methods with one point alone
    samples: int = 6 # prompts whose answers are printed, of the first seed

    def __post_init__(self):
        super().__post_init__()
        require(self, samples=(self.samples >= 0, 'at least 0'))

def stages(cfg, out):
    """Return the stages of one seed, as demo.stages does. out: its folder."""
    trained = [reviews.training(out, name, method, **options)
               for method, policies in settings_of(cfg).items() for name, options in policies.items()]
    asked = dict(prompts=PROMPTS, max_prompts=cfg.max_prompts)
    answers, models = f'{out}/answers.jsonl', ['sft', *(name for name, *_ in trained)]
    return [*reviews.first_stages(out, cfg.source), *trained,
            ('answers', 'collect.py', 'config/reviews/collect.py', asked | dict(
                policy=f'{out}/sft', reward_model=f'{out}/reward', n_answers=cfg.answers, out=answers), answers,
             ['reward']),
            reviews.stage(out, 'policies', 'evaluate.py', 'evaluate', ['reward', 'fluency', *models],
                          file='results.json', models=','.join(f'{name}={out}/{name}' for name in models),
                          reward_model=f'{out}/reward', best_of=0, figures=False, **asked)]

def answers_of(cfg, out):
    """Return reviews.answers_of a seed's policies, and of best of n."""
    found = reviews.answers_of(f'{out}/policies')
    if BEST in cfg.methods.split(','):
        rows = read_records(f'{out}/answers.jsonl', 'rankings')
        for n in frontier.sizes(cfg)[1:]:
            best = [int(np.argmax(row['scores'][:n])) for row in rows]
            found[f'{BEST}_{n}'] = [dict(prompt=row['prompt'], response=row['responses'][i])
                                    for row, i in zip(rows, best)]
    return found

def manner(cfg, out):
    """Measure how a seed's policies write: {policy: {fluency, different, distinct_2, words}}."""
    answers = answers_of(cfg, out)
    varied = reviews.distinct_2(answers)
    return {name: dict(fluency=reviews.fluency(f'{out}/fluency', rows), different=reviews.different(rows),
                       distinct_2=varied[name], words=float(np.mean([len(row['response'].split()) for row in rows])))
            for name, rows in answers.items()}

def print_manner(found):
    """Print fluency and diversity of all policies. found: {policy: {key: [of each seed]}}."""
    table(['policy', 'fluency: perplexity', 'different', 'distinct-2', 'words'],
          [[name.replace('_', ' '), show(row['fluency'], 1), show(row['different'], 3), show(row['distinct_2'], 3),
           show(row['words'], 1)]
           for name, row in found.items()])

def print_samples(cfg, out):
    """Print each method's answers to the first prompts; of several prices, the middle one."""
    chosen = ['sft', *(list(policies)[len(policies) // 2] for policies in settings_of(cfg).values())]
    answers = answers_of(cfg, out)
    rows = [[answers['sft'][i]['prompt'], *(answers[name][i]['response'].replace('|', r'\|') for name in chosen)]
            for i in range(min(cfg.samples, len(answers['sft'])))]
    table(['beginning', *(name.replace('_', ' ') for name in chosen)], rows)

def draw(points, found, people, path):
    """Draw fluency against gold and against the KL, means over seeds.

    points: {method: {setting: {kl, gold: [of each seed]}}}; found: of `print_manner`; people: of their own remarks.
    """
    with panels(path, 2, 4.8, 4) as axes:
        for ax, key in zip(axes, ('kl', 'gold')):
            ax.axhline(people, color='0.5', lw=1, ls='--', label='people')
            for (method, settings), colour in zip(points.items(), ['black', *COLOURS]):
                names = {s: f'{BEST}_{s}' if method == BEST else s for s in settings if s != '1'}
                dots = sorted((np.mean(settings[s][key]), np.mean(found[name]['fluency'])) for s, name in names.items())
                ax.plot(*zip(*dots), 'o-', color=colour, ms=5, lw=1, label=method)
            ax.set(ylabel='perplexity of the answers (lower: more usual)', yscale='log',
                   xlabel='KL to SFT [nats per answer]' if key == 'kl' else 'mean gold')
            ax.legend(fontsize=7)

def main(cfg):
    seeds, manners, people = [], [], []
    for at in cfg.each(world='reviews', source=cfg.source):
        demo.run_stages(stages(cfg, at.out_dir), at)
        seeds.append(frontier.read_seed(cfg, at.out_dir, gold.gold))
        manners.append(manner(cfg, at.out_dir))
        people.append(reviews.fluency(f'{at.out_dir}/fluency', read_records(
            'data/reviews/gold_test.jsonl', 'demonstrations')))
    points, fits = frontier.print_points(seeds), frontier.print_fits(seeds)
    equal = frontier.print_equal_kl(seeds, list(map(float, cfg.at.split(','))))
    found = {name: {key: [of_seed[name][key] for of_seed in manners] for key in row}
             for name, row in manners[0].items()}
    print_manner(found)
    right, n = gold.accuracy()
    print(f"\nperplexity of held-out remarks of people: {show(people, 1)}; the classifier is right on {right:.3f} of "
          f"{n} held-out labels")
    print_samples(cfg, f'{cfg.out_dir}/{numbers(cfg.seeds)[0]}')
    results = dict(seeds=numbers(cfg.seeds), points=points, fits=fits, at_equal_kl=equal, manner=found, people=people,
                   classifier=right)
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    frontier.draw(seeds, fits, cfg.axis, f'{cfg.out_dir}/frontier.png')
    draw(dict(sft=points['sft']) | points, found, float(np.mean(people)), f'{cfg.out_dir}/fluency.png')

if __name__ == '__main__':
    launch(main, Config)
