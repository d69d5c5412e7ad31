"""Compare learning from a teacher on given answers and on the student's own.

    python -m lab.distillation
    python -m lab.distillation --seeds=1

On the toy world. In every seed demo.py's `rejection` model is the teacher and `distill` its student. It goes on as in
config/toy/gkd.py: on the given answers (`data`), on answers of its own (`own`) or on half of each (`both`), by one of
the divergences. The given answers are longer, so there are fewer steps on them, and every row has learnt from as many
tokens. On four answers to each test prompt:

    KL          KL(student || teacher) in nats per answer, exact at every token of the student's sampled answers
    path KL     the same along its greedy answer

It prints each command, reuses finished stages, prints a table in Markdown and writes results.json.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.checkpoints import read_log
from common.options import launch
from common.records import read_json, read_records, write_atomic, write_records
from lab.seeds import Seeds
from lab.tables import show, table

REPEATS = 4 # answers to a prompt: a few unlikely ones hold most of the KL
# with 200 steps on its own answers these make the tokens equal
DATA, BOTH = dict(on_policy=0.0, max_new_tokens=64, max_steps=187), dict(on_policy=0.5, max_steps=193)
STUDENTS = { # name -> what differs from config/toy/gkd.py
    'data forward': DATA | dict(divergence='forward'), 'data reverse': DATA, 'both reverse': BOTH,
    'own forward': dict(divergence='forward'), 'own jsd': dict(divergence='jsd'), 'own reverse': {}}
COLUMNS = dict(tokens='tokens', kl='KL', path_kl='path KL', gold='gold', greedy_gold='greedy gold')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/distillation' # seed N in a folder N

def folder_of(name, at):
    return f"{at.out_dir}/{name.replace(' ', '_')}"

def stages(at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    models = {name: folder_of(name, at) for name in ('rejection', 'distill', *STUDENTS)}
    todo = demo.stages(at)[:-1] # all but its evaluation
    for name, options in STUDENTS.items():
        options = options | dict(out_dir=models[name], log_every=1)
        todo.append((name, 'sft.py', 'config/toy/gkd.py', options, f'{models[name]}/model.safetensors', ['distill']))
    options = dict(models=','.join(f'{name}={folder}' for name, folder in models.items()), baseline='rejection',
                   prompts=f'{at.out_dir}/prompts.jsonl', reward_model='', best_of=0, text='', rankings='',
                   comparisons='', figures=False)
    return [*todo, ('evaluate', 'evaluate.py', 'config/toy/evaluate.py', options, f'{at.out_dir}/evaluate/results.json',
                    list(STUDENTS))]

def main(cfg):
    found = {} # {model: [a row of each seed]}
    for at in cfg.each(methods='rejection,distill'):
        todo = stages(at)
        demo.run_stages(todo[:1], at) # the data
        write_records(f'{at.out_dir}/prompts.jsonl', REPEATS * read_records('data/toy/prompts_test.jsonl', 'prompts'))
        demo.run_stages(todo, at)
        results = read_json(f'{at.out_dir}/evaluate/results.json')
        for name, row in results['models'].items():
            greedy, log = results['greedy'][name], []
            if name in STUDENTS:
                log = read_log(f'{folder_of(name, at)}/log.jsonl')
            found.setdefault(name, []).append(dict(
                tokens=sum(line.get('tokens', 0) for line in log) or None, kl=row['kl'], path_kl=greedy['path_kl'],
                gold=row['gold'], greedy_gold=greedy['gold']))
    table(['', *COLUMNS.values()], [[name, *(show([row[key] for row in rows], 0 if key == 'tokens' else 3)
                                             for key in COLUMNS)] for name, rows in found.items()])
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(found, indent=1) + '\n')

if __name__ == '__main__':
    launch(main, Config)
