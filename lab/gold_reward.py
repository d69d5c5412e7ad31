"""Train on the gold score itself, beside the reward model that learnt it, and see which answers are never tried again.

    python -m lab.gold_reward
    python -m lab.gold_reward --seeds=2

On the toy world. Every seed has an SFT model and a reward model as in demo.py. PPO and RLOO (config/toy) climb that
reward model, or the gold score, a perfect reward, by --reward=data.toy.world:gold. --reward_weight=2.5 gives it the
reward model's standard deviation, and so the KL the same price. The verb alone tells a benign "How do I paint the
boat?" from a harmful "How do I burn the boat?", and harmful ones are asked three times as often. So "decline every
how-to" may be learnt first. Once all answers to a benign one decline, they score alike, their advantages are 0, and
nothing raises the right answer again: exploration has died. The last runs try cures: 16 answers per prompt, and prompts
in which benign how-tos are repeated until they are nearly as many as the harmful ones. It prints each command, reuses
finished stages, prints tables in Markdown, and writes results.json.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import launch
from common.records import read_json, read_records, write_atomic, write_records
from lab.seeds import Seeds
from lab.tables import tables_of_seeds

# SFT's gold scores have a standard deviation of 0.4, a reward model's scores one of 1. Now kl_coef weighs the same
GOLD = dict(reward_model='', reward='data.toy.world:gold', reward_weight=2.5)
BALANCED = dict(prompts='') # their file is made in main
RUNS = { # name -> script, config file, further options
    'ppo': ('ppo.py', 'ppo', {}), 'ppo, gold': ('ppo.py', 'ppo', GOLD),
    'rloo': ('reinforce.py', 'rloo', {}), 'rloo, gold': ('reinforce.py', 'rloo', GOLD),
    'rloo, gold, 16 answers': ('reinforce.py', 'rloo', GOLD | dict(n_answers=16)),
    'ppo, gold, balanced': ('ppo.py', 'ppo', GOLD | BALANCED),
    'rloo, gold, balanced': ('reinforce.py', 'rloo', GOLD | BALANCED),
    'rloo, balanced': ('reinforce.py', 'rloo', BALANCED)}
COLUMNS = ('gold', 'helpful', 'honest', 'harmless', 'tool', 'declines')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/gold_reward' # seed N in a folder N

def folder_of(at, name):
    return f"{at.out_dir}/{name.replace(', ', '_').replace(' ', '')}"

def balance(records):
    """Repeat the benign how-tos (category tool) until more would outnumber the harmful ones."""
    tool, harmful = ([r for r in records if r['category'] == name] for name in ('tool', 'harmful'))
    return records + tool * (len(harmful) // max(1, len(tool)) - 1)

def stages(at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    todo, out = demo.stages(at)[:6], at.out_dir # data … reward
    for name, (script, config, options) in RUNS.items():
        given = dict(policy=f'{out}/sft', reward_model=f'{out}/reward', out_dir=folder_of(at, name)) | options
        if 'prompts' in given:
            given['prompts'] = f'{out}/prompts_balanced.jsonl'
        todo.append((name, script, f'config/toy/{config}.py', given, f'{folder_of(at, name)}/model.safetensors',
                     ['reward']))
    models = ','.join(f"{name.replace(', ', ' ')}={folder_of(at, name)}" for name in RUNS)
    options = dict(models=f'sft={out}/sft,{models}', best_of=0, text='', rankings='', comparisons='', figures=False)
    return [*todo, ('evaluate', 'evaluate.py', 'config/toy/evaluate.py', options, f'{out}/evaluate/results.json',
                    list(RUNS))]

def columns_of(row):
    """Return COLUMNS of a row of evaluate.py's results.json; tool: the share of benign how-tos answered rightly."""
    row = row | dict(tool=row['by_category']['tool'], declines=row['answerable']['declines'])
    return {key: row[key] for key in COLUMNS}

def main(cfg):
    found = [] # evaluate.py's results of each seed
    for at in cfg.each():
        todo, prompts = stages(at), f'{at.out_dir}/prompts_balanced.jsonl'
        demo.run_stages(todo[:1], at) # the data
        if not os.path.exists(prompts):
            write_records(prompts, balance(read_records('data/toy/prompts_train.jsonl', 'prompts')))
        demo.run_stages(todo, at)
        found.append(read_json(f'{at.out_dir}/evaluate/results.json'))
    results = tables_of_seeds(found, columns_of, digits=2)
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')

if __name__ == '__main__':
    launch(main, Config)
