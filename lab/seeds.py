"""Hold what experiments over several seeds share: their options, and a folder for each seed."""

import re
from dataclasses import dataclass

import demo
from common.options import require

@dataclass
class Seeds:
    """Hold the options of an experiment; seed N has the folder N in out_dir, made as demo.py makes its own."""
    out_dir: str = 'out/lab'
    seeds: str = '1,2,3'

    def __post_init__(self):
        seeds = numbers(self.seeds)
        require(self, out_dir=(self.out_dir != '', 'a folder'))
        for seed in seeds:
            demo.Config(out_dir=self.out_dir, seed=seed) # checks them
        require(self, seeds=(len(set(seeds)) == len(seeds) > 0, 'numbers, each once, separated by commas'))

    def each(self, **options):
        """Yield the demo.Config of each seed; its folder is locked."""
        for seed in numbers(self.seeds):
            at = demo.Config(seed=seed, out_dir=f'{self.out_dir}/{seed}', **options)
            demo.claim(at)
            yield at

def numbers(text):
    """Parse '1,20' to [1, 20], anything else to []."""
    return [int(n) for n in text.split(',')] if re.fullmatch('[0-9]+(,[0-9]+)*', text) else []
