"""Train on human words and human labels: the stages of `demo.py --world=reviews`, and a table of several runs.

    python demo.py --world=reviews --source=pros_cons.zip
    python -m lab.reviews --runs=out/reviews,out/reviews2,out/reviews3

The policy goes on with what people began to say of a product (data/reviews/prepare.py). The reward model learned from
people's labels, Pros or Cons. The gold score is a classifier of other people's labels (data/reviews/gold.py). It is the
first experiment of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593, section 3.1) and of Rafailov et al. 2023
(https://arxiv.org/abs/2305.18290, section 6.1), who took books and reviews of films.

Fluency is the perplexity of a policy's sampled answers under a language model of remarks that the policy never saw.
"""

import os
import sys
from dataclasses import dataclass
from itertools import pairwise

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.checkpoints import load_policy
from common.options import fail, launch, require
from common.records import read_json, read_records
from common.tokens import dialogue, load_tokenizer, response_ids
from data.reviews import gold
from evaluate import perplexity
from lab import story, tables

import torch

LEARN = ['collect train'] # what methods without a reward model learn from
METHODS = dict( # a folder each: the script, its config file, further options, and the stages that it stands on
    ppo=('ppo.py', 'ppo', {}, ['reward']), dpo=('dpo.py', 'dpo', {}, LEARN), rrhf=('rrhf.py', 'rrhf', {}, LEARN),
    dpo_people=('dpo.py', 'dpo', dict(train_data='data/reviews/comparisons_train.jsonl', epochs=1), ['sft']))
BEST = 'best_of_n' # of four answers, as evaluate.py calls it
LARGE = ('fluency', 'length') # with one digit
KEYS = ('gold', 'reward', 'kl', 'length') # of evaluate.py
COLUMNS = dict(gold='gold', reward='reward', kl='KL', fluency='fluency', different='different', distinct_2='distinct-2',
               length='tokens')

@dataclass
class Config:
    runs: str = 'out/reviews' # folders of demo.py --world=reviews, separated by commas

    def __post_init__(self):
        require(self, runs=(all(self.runs.split(',')), 'folders of demo.py --world=reviews, separated by commas'))

def stage(out, name, script, config, needs, file='model.safetensors', **options):
    """Return a stage as demo.stages lists it; its product is this file in the folder of its name."""
    options['out_dir'] = f'{out}/{name}'
    return name, script, f'config/reviews/{config}.py', options, f"{options['out_dir']}/{file}", needs

def training(out, name, method, **options):
    """Return the stage of a policy. method: of METHODS; options: further ones."""
    script, config, more, needs = METHODS[method]
    if script == 'ppo.py':
        more = more | dict(policy=f'{out}/sft', reward_model=f'{out}/reward')
    else:
        more = dict(train_data=f'{out}/rankings_train.jsonl') | more | dict(init_from=f'{out}/sft')
    return stage(out, name, script, config, needs, **more | options)

def first_stages(out, source):
    """List the stages up to the rankings, as demo.stages does."""
    others = dict(train_data='data/reviews/gold_train.jsonl', val_data='data/reviews/gold_test.jsonl')
    rankings = f'{out}/rankings_train.jsonl'
    return [
        ('data', 'data/reviews/prepare.py', '', dict(source=source) if source else {}, 'data/reviews/reviews.tiktoken',
         []),
        stage(out, 'sft', 'sft.py', 'sft', ['data']), stage(out, 'fluency', 'sft.py', 'sft', ['data'], **others),
        stage(out, 'reward', 'reward.py', 'reward', ['sft'], init_from=f'{out}/sft'),
        ('collect train', 'collect.py', 'config/reviews/collect.py',
         dict(policy=f'{out}/sft', reward_model=f'{out}/reward', out=rankings), rankings, ['reward'])]

def stages(out, methods, source):
    """List the stages of a run, as demo.stages does. out: their folder; source: of data/reviews/prepare.py."""
    todo = [*first_stages(out, source), *(training(out, name, name) for name in methods)]
    models = ','.join(f'{name}={out}/{name}' for name in ('sft', *methods))
    todo.append(stage(out, 'evaluate', 'evaluate.py', 'evaluate', ['reward', 'fluency', *methods], models=models,
                      file='results.json', reward_model=f'{out}/reward'))
    needed = {need for *_, needs in todo for need in needs}
    return [one for one in todo if one[0] != 'collect train' or one[0] in needed]

def fluency(folder, samples, longest=32):
    """Return the perplexity of answers under the model in a folder.

    samples: records with `prompt` and `response`. An answer of fewer tokens than `longest` has ended, and its end
    counts too.
    """
    torch.set_num_threads(1)
    tok, model = load_tokenizer(folder, 'policy'), load_policy(folder).eval()
    ended = [len(response_ids(tok, sample['response'], False)) < longest for sample in samples]
    rows = [dialogue(tok, dict(prompt=s['prompt'], response=s['response'], ended=e)) for s, e in zip(samples, ended)]
    room = model.config.block_size
    rows = sorted(((ids[-room:], mask[-room:]) for ids, mask in rows), key=lambda row: len(row[0]))
    return perplexity(model, [rows[i:i + 64] for i in range(0, len(rows), 64)], 'cpu')

def results(out, methods):
    """Measure the policies of a run: {models: {name: …}, people: …, reward_model, classifier: shares right}."""
    measured = read_json(f'{out}/evaluate/results.json')
    written = answers_of(f'{out}/evaluate')
    varied = distinct_2(written)
    people = read_records('data/reviews/gold_test.jsonl', 'demonstrations')
    models = {name: {key: measured['models'][name][key] for key in KEYS} | dict(
        fluency=fluency(f'{out}/fluency', written[name]), different=different(written[name]),
        distinct_2=varied[name])
        for name in ('sft', *methods, BEST) if name in written}
    pros = [row for row in people if row['pros']]
    return dict(models=models, reward_model=measured['reward_model']['accuracy'], classifier=gold.accuracy()[0],
                people=dict(fluency=fluency(f'{out}/fluency', people), pros=fluency(f'{out}/fluency', pros)))

def answers_of(folder):
    """Return {policy: its sampled answers, records with `prompt` and `response`}; folder: of evaluate.py."""
    found = {}
    for sample in read_records(f'{folder}/samples.jsonl', 'prompts'):
        found.setdefault(sample['model'], []).append(dict(prompt=sample['prompt'], response=sample['sampled']))
    return found

def different(samples):
    """Return the share of different answers among all; no two prompts are equal."""
    return len({sample['response'] for sample in samples}) / len(samples)

def distinct_2(written):
    """Return the share of different pairs of words, {policy: share} (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    written: as `answers_of` returns it. All policies are measured on their first N pairs, as many as the tersest has:
    the share falls with their number, so that long answers would seem poorer than they are.
    """
    pairs = {name: [pair for sample in samples for pair in pairwise(sample['response'].split())]
             for name, samples in written.items()}
    n = min(map(len, pairs.values()))
    return {name: len({*found[:n]}) / max(n, 1) for name, found in pairs.items()}

def print_results(runs):
    """Print the measurements of runs as a table in Markdown. runs: the contents of results.json."""
    names = [name for name in runs[0]['models'] if all(name in run['models'] for run in runs)]
    tables.table(['policy', *COLUMNS.values()],
                 [[name, *(tables.show([run['models'][name][key] for run in runs], 1 if key in LARGE else 2)
                           for key in COLUMNS)] for name in names])
    print(f"\nperplexity of held-out remarks of people: {tables.show([run['people']['fluency'] for run in runs], 1)}, "
          f"of Pros alone: {tables.show([run['people']['pros'] for run in runs], 1)}")
    print(f"reward model, held-out pairs in people's order: {tables.show([run['reward_model'] for run in runs], 3)}; "
          f"classifier, held-out labels: {tables.show([run['classifier'] for run in runs], 3)}")
    print('seconds: ' + ', '.join(f"{run['seconds']:.0f}" for run in runs))

def ending(out, methods, results, typed):
    """Return what demo.py prints at its end: a table, remarks that differ, what to type next."""
    names = ['sft', *methods]
    rows = [[name, *(f'{row[key]:.{1 if key in LARGE else 2}f}' for key in COLUMNS)]
            for name, row in results['models'].items()]
    few, source = story.shown(names), read_json(f'{out}/demo.json')['data'][0][2:] # --source=…, if it was given
    samples = read_records(f'{out}/evaluate/samples.jsonl', 'prompts')
    return '\n'.join([
        story.fill(
            "Mean gold score of sampled answers: how likely they stand under Pros, by a classifier of other people's "
            f"labels, which is right on {results['classifier']:.0%} of held-out ones. The reward model puts "
            f"{results['reward_model']:.0%} of held-out pairs in people's order. Fluency is the perplexity under a "
            f"model of other people's remarks; theirs is {results['people']['fluency']:.0f}, that of Pros "
            f"{results['people']['pros']:.0f}, and lower is more usual. Different: the share of different answers; "
            "distinct-2: that of their pairs of words, of equally many."),
        '', *tables.align(['', *COLUMNS.values()], rows), '',
        "Sampled answers, with their gold scores:", '', *said(samples, few), '',
        *story.next_steps(out, few, typed, 'measure gold against KL', 'python', '-m', 'lab.reviews_frontier', *source)])

def said(samples, names, n=6):
    """Lay out sampled answers to the first n prompts."""
    prompts, wide = {}, max(map(len, names))
    for sample in samples:
        if sample['model'] in names:
            prompts.setdefault(sample['prompt'], {})[sample['model']] = sample
    lines = []
    for prompt, group in list(prompts.items())[:n]:
        lines += [f'{prompt} …'] + [
            f"  {name.ljust(wide)}  {group[name]['sampled_gold']:.2f}  "
            + story.quoted(group[name]['sampled'], story.WIDTH - wide - 10) for name in names]
    return lines

def main(cfg):
    runs = [read_json(f'{folder}/results.json', 'the results of demo.py --world=reviews')
            for folder in cfg.runs.split(',')]
    if not all('classifier' in run for run in runs):
        fail(f"--runs={cfg.runs}: wanted the results of demo.py --world=reviews")
    try:
        print_results(runs)
    except KeyError as e:
        fail(f"--runs={cfg.runs}: wanted the results of this version's demo.py --world=reviews; one of them lacks {e}")

if __name__ == '__main__':
    launch(main, Config)
