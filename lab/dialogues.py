"""Train policies on whole dialogues and on single turns, and see who keeps the context and who asks back.

    python -m lab.dialogues
    python -m lab.dialogues --seeds=1 --methods=ppo

On the toy world's dialogues (data/toy/dialogues.py). Every seed has an SFT model as in demo.py. PPO and RLOO train it
on the gold score, without a reward model, in four ways:

    each turn      dialogues with the user, a reward for every answer
    at the end     the same dialogues, the sum of these rewards at the end; to RLOO that is the same
    first turns    the dialogues' first questions alone
    all turns      every turn as a prompt of its own, after answers that somebody else gave

The last two take as many iterations as sample the same number of answers. Then each policy talks to the user of the
test dialogues, four times each, sampled at temperature 1. The columns are mean gold scores of answers:

    total         the sum over a dialogue              first, second    to the two questions of named dialogues
    asks          share of unnamed dialogues in which the policy makes the user name the animal
    then, last    to the two questions of those unnamed dialogues, once the animal is named; – where hardly any is

It prints each command, reuses finished stages, prints a table in Markdown, and writes results.json. The three seeds
take 10 to 20 minutes on two cores.
"""

import json
import os
import sys
from dataclasses import dataclass
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
import ppo
from common.batches import encode_prompts
from common.checkpoints import load_policy, read_log
from common.options import launch, require
from common.records import write_atomic
from common.rollout import sample_rollouts
from common.tokens import load_tokenizer
from data.toy import dialogues
from lab.seeds import Seeds
from lab.tables import show, table

import torch

SCRIPTS = dict(ppo='ppo.py', rloo='reinforce.py')
SINGLE = dict(user='', max_turns=1, turn_rewards=False)
WAYS = { # what differs from the files in config/toy
    'each turn': {}, 'at the end': dict(reward='data.toy.dialogues:total', turn_rewards=False),
    'first turns': SINGLE, 'all turns': SINGLE | dict(prompts='data/toy/turns_train.jsonl')}
DIALOGUES, TURNS = ('each turn', 'at the end'), ('first turns', 'all turns')
FEWEST = 50 # answers that a mean is shown of
COLUMNS = ('total', 'first', 'second', 'asks', 'then', 'last')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/dialogues' # seed N in a folder N
    methods: str = 'ppo,rloo'
    split: str = 'test' # whose dialogues are measured: test, or val to choose settings
    n: int = 4 # dialogues per record

    def __post_init__(self):
        super().__post_init__()
        methods = self.methods.split(',')
        require(self, methods=({*methods} <= {*SCRIPTS} and len({*methods}) == len(methods), 'ppo, rloo or ppo,rloo'),
                split=(self.split in ('val', 'test'), 'val or test'), n=(self.n >= 1, 'at least 1'))

def folder_of(at, method, way):
    return f"{at.out_dir}/{method}_{way.replace(' ', '_')}"

def pairs(methods, ways):
    """Return all (method, way) of these; RLOO adds up a dialogue's rewards anyway."""
    return [(m, w) for m in methods for w in ways if (m, w) != ('rloo', 'at the end')]

def stages(at, methods, ways, steps={}):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config; steps: {method: iterations}."""
    todo = demo.stages(at)[:3] # data, pretrain, sft
    todo.append(('dialogues', 'data/toy/dialogues.py', '', {}, 'data/toy/dialogues_train.jsonl', ['data']))
    for method, way in pairs(methods, ways):
        out = folder_of(at, method, way)
        options = dict(WAYS[way], out_dir=out) | (dict(max_steps=steps[method]) if method in steps else {})
        todo.append((f'{method} {way}', SCRIPTS[method], f'config/toy/dialogue_{method}.py', options,
                     f'{out}/model.safetensors', ['sft', 'dialogues']))
    return todo

def iterations(folder):
    """Return how many iterations of single turns sample as many answers. folder: a run on dialogues."""
    return round(sum(line['turns'] for line in read_log(os.path.join(folder, 'log.jsonl'))))

def measure(folder, records, n):
    """Let a policy talk to the user of each record n times; return {column: number}, None where it says little."""
    torch.manual_seed(0)
    policy, tok = load_policy(folder).eval(), load_tokenizer(folder)
    cfg = ppo.Config(prompts='-', reward='-', user='-', max_turns=3, max_new_tokens=24)
    prompts = encode_prompts(tok, records, policy.config.block_size - cfg.max_new_tokens)
    asked = sample_rollouts(policy, prompts * n, records * n, tok, cfg, dialogues.user).asked
    golds = [[dialogues.gold(*answer) for answer in answers] for answers in asked]
    of = {named: [g for g, r in zip(golds, records * n) if r['named'] == named] for named in (True, False)}
    nth = lambda named, i: fmean(seen) if len(seen := [g[i] for g in of[named] if len(g) > i]) >= FEWEST else None
    row = (fmean(map(sum, golds)), nth(True, 0), nth(True, 1), fmean(len(g) > 1 for g in of[False]), nth(False, 1),
           nth(False, 2))
    return dict(zip(COLUMNS, row, strict=True))

def main(cfg):
    methods, results = cfg.methods.split(','), {} # {policy: {column: [of each seed]}}
    for at in cfg.each():
        demo.run_stages(stages(at, methods, DIALOGUES), at)
        steps = {method: iterations(folder_of(at, method, 'each turn')) for method in methods}
        demo.run_stages(stages(at, methods, TURNS, steps), at)
        records = dialogues.dialogues(cfg.split, dialogues.Config().n_test, 1)
        folders = {f'{method}, {way}': folder_of(at, method, way) for method, way in pairs(methods, WAYS)}
        for name, folder in (dict(sft=f'{at.out_dir}/sft') | folders).items():
            row = results.setdefault(name, {column: [] for column in COLUMNS})
            for column, number in measure(folder, records, cfg.n).items():
                row[column].append(number)
    table([f'sampled, seeds {cfg.seeds}', *COLUMNS],
          [[name, *(show(of_seeds) for of_seeds in row.values())] for name, row in results.items()])
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')

if __name__ == '__main__':
    launch(main, Config)
