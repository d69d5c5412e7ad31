"""Put a price on abstaining, and see who says "I don't know" instead of inventing.

    python -m lab.abstain
    python -m lab.abstain --seeds=1 --prices=-1,0.5

On the toy world. Every seed has an SFT model as in demo.py. RLOO (config/toy/rloo.py) trains it at each price on the
reward data.toy.world:abstaining alone, without a reward model. On the answerable ones of the test prompts:

    coverage = right + wrong          risk = wrong / (right + wrong)          of shares of all answers

It prints each command, reuses finished stages, prints tables in Markdown, and writes results.json and
risk_coverage.png.
"""

import json
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import launch, require
from common.records import read_json, write_atomic
from lab import figures
from lab.seeds import Seeds
from lab.tables import tables_of_seeds

SILENT = 0.1 # up to this coverage, some 30 answers, a risk says nothing
COLUMNS = ('right', 'abstains', 'wrong', 'declines', 'coverage', 'risk', 'honest', 'harmless')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/abstain' # seed N in a folder N
    prices: str = '-1,-0.5,0,0.2,0.3,0.6' # of abstaining: -1 is worth a wrong answer, 1 a right one

    def __post_init__(self):
        super().__post_init__()
        prices = prices_of(self)
        require(self, prices=([] != prices == sorted({*prices}) and -1 <= prices[0] <= prices[-1] <= 1,
                        'rising numbers from -1 to 1, separated by commas'))

def prices_of(cfg):
    """Return the prices as numbers, [] if one is none."""
    try:
        return [float(price) for price in cfg.prices.split(',')]
    except ValueError:
        return []

def stages(cfg, at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    todo, out, models = demo.stages(at)[:3], at.out_dir, {'sft': f'{at.out_dir}/sft'} # data, pretrain, sft
    for price in prices_of(cfg):
        models[f'{price:g}'] = folder = f'{out}/price{price:g}'
        options = dict(reward_model='', reward=f'data.toy.world:abstaining(price={price})', out_dir=folder)
        todo.append((f'price {price:g}', 'reinforce.py', 'config/toy/rloo.py', options, f'{folder}/model.safetensors',
                     ['sft']))
    options = dict(models=','.join(f'{name}={folder}' for name, folder in models.items()), reward_model='', best_of=0,
                   text='', rankings='', comparisons='', figures=False)
    return [*todo, ('evaluate', 'evaluate.py', 'config/toy/evaluate.py', options, f'{out}/evaluate/results.json',
                    [name for name, *_ in todo[2:]])]

def columns_of(row):
    """Return COLUMNS of a row of evaluate.py's results.json. The risk is None where next to nothing is answered."""
    row = row | row['answerable']
    row['coverage'] = row['right'] + row['wrong']
    row['risk'] = row['wrong'] / row['coverage'] if row['coverage'] > SILENT else None
    return {key: row[key] for key in COLUMNS}

def main(cfg):
    found = [] # evaluate.py's results of each seed
    for at in cfg.each():
        demo.run_stages(stages(cfg, at), at)
        found.append(read_json(f'{at.out_dir}/evaluate/results.json'))
    results = tables_of_seeds(found, columns_of, 'price, ')
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    figures.risk_coverage(results, cfg.out_dir)

if __name__ == '__main__':
    launch(main, Config)
