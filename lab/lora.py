"""Compare adapters (LoRA) of several ranks with training all weights, on the toy world.

    python -m lab.lora
    python -m lab.lora --methods=dpo --ranks=1,8 --seeds=1

Adapters stand on all linear layers (--lora_on=all) and weigh 2, whatever their rank. First DPO and PPO train adapters
of rank 8 with each of RATES; the learning rate with the best mean gold score on the validation prompts is that of all
ranks, and of PPO's critic. Then every rank is measured on the test prompts, beside the method's own config file, which
trains all weights.

It prints each command, reuses finished stages, prints a table for each method in Markdown and writes results.json. The
three seeds take 16 minutes on two cores.
"""

import json
import os
import sys
from dataclasses import dataclass
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import launch, require
from common.records import read_json, write_atomic
from lab.seeds import Seeds, numbers
from lab.tables import show, table
from model import GPT

RATES = '1e-3', '2e-3', '4e-3', '8e-3'
TRIED = 8 # the rank that the learning rates are tried with

@dataclass
class Config(Seeds):
    out_dir: str = 'out/lora' # seed N in a folder N
    methods: str = 'dpo,ppo'
    ranks: str = '1,2,4,8,16,32'

    def __post_init__(self):
        super().__post_init__()
        names, ranks = self.methods.split(','), numbers(self.ranks)
        require(self, methods=(set(names) <= {'dpo', 'ppo'} and len(set(names)) == len(names), 'dpo, ppo or both'),
                ranks=(len(set(ranks)) == len(ranks) > 0 and min(ranks) > 0, 'numbers above 0, each once'))

def stages(at, method, settings, prompts, evaluation):
    """Return the stages of one seed, as demo.stages does.

    settings: {name: options of LoRA}. They are measured on `prompts`, beside the method's own config file.
    """
    todo = demo.stages(at)[:-1] # all but its evaluation; the last one trains all weights
    for name, options in settings.items():
        more = dict(critic_lr=options['lr']) if method == 'ppo' else {}
        folder = f'{at.out_dir}/{name}'
        todo.append((name, f'{method}.py', f'config/toy/{method}.py', options | more | dict(out_dir=folder),
                     f'{folder}/model.safetensors', ['reward']))
    models = ','.join(f'{name}={at.out_dir}/{name}' for name in ('sft', method, *settings))
    options = dict(models=models, prompts=prompts, out_dir=f'{at.out_dir}/{evaluation}', best_of=0, text='',
                   rankings='', comparisons='', figures=False)
    return [*todo, (evaluation, 'evaluate.py', 'config/toy/evaluate.py', options,
                    f'{at.out_dir}/{evaluation}/results.json', ['reward', method, *settings])]

def measure(cfg, method, settings, prompts, evaluation):
    """Train and evaluate in every seed; return the contents of results.json."""
    found = []
    for at in cfg.each(methods=method):
        demo.run_stages(stages(at, method, settings, prompts, evaluation), at)
        found.append(read_json(f'{at.out_dir}/{evaluation}/results.json'))
    return found

def lora(rank, rate):
    return dict(lora_rank=rank, lora_on='all', lr=rate)

def trained_share(rank, folder):
    """Return how many numbers adapters train, and their share of the model."""
    model = GPT.from_pretrained(folder)
    whole = sum(p.numel() for p in model.parameters())
    model.adapt(rank, 1.0, 'all')
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return n, n / whole

def main(cfg):
    results = {}
    for method in cfg.methods.split(','):
        tried = {f'{method}_lr{rate}': lora(TRIED, rate) for rate in RATES}
        found = measure(cfg, method, tried, 'data/toy/prompts_val.jsonl', f'{method}_rates')
        gold = {name: [of_seed['models'][name]['gold'] for of_seed in found] for name in tried}
        table([f'{method}, rank {TRIED}, validation prompts', 'gold'],
              [[options['lr'], show(gold[name], 3)] for name, options in tried.items()])
        rate = tried[max(tried, key=lambda name: fmean(gold[name]))]['lr']
        names = {f'{method}_rank{rank}': rank for rank in numbers(cfg.ranks)}
        settings = {name: lora(rank, rate) for name, rank in names.items()}
        found = measure(cfg, method, settings, 'data/toy/prompts_test.jsonl', f'{method}_ranks')
        rows = []
        for name in ('sft', method, *settings):
            sft = f'{cfg.out_dir}/{numbers(cfg.seeds)[0]}/sft'
            n, share = trained_share(names[name], sft) if name in names else (0, 0)
            columns = [[of_seed[of][name][key] for of_seed in found]
                       for of, key in (('models', 'gold'), ('greedy', 'gold'), ('models', 'kl'))]
            called = 'SFT' if name == 'sft' else f'rank {names[name]}' if name in names else 'all weights'
            rows.append([called, f'{n} ({share:.1%})' if n else '', *(show(c, 3) for c in columns)])
            results.setdefault(method, {})[name] = dict(gold=columns[0], greedy=columns[1], kl=columns[2])
        results[method]['rate'], results[method]['rates'] = rate, gold
        table([f'{method}, lr {rate}', 'trained numbers', 'gold, sampled', 'greedy', 'KL'], rows)
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')

if __name__ == '__main__':
    launch(main, Config)
