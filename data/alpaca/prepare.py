"""Prepare Alpaca, instructions with a model's answers, or its format.

    python data/alpaca/prepare.py                                    # the cleaned version, from the hub
    python data/alpaca/prepare.py --source=alpaca_data.json          # the file of tatsu-lab/stanford_alpaca on GitHub

Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, CC BY-NC 4.0. Rows are {"instruction", "input",
"output"}, perhaps with `system` and `history`. Writes demonstrations and prompts; rows with `chosen` and `rejected`
give comparisons, those with a `label` unpaired records. The prompt is the instruction, then a blank line and the input
where there is one. Alpaca's own frame ("Below is an instruction that …") is left out: common/tokens.py has a template.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch
from data import formats
from data.prepare_common import PrepareOptions, clean, malformed, prepare

@dataclass
class Config(PrepareOptions):
    repo: str = 'yahma/alpaca-cleaned' # the data set on the hub, 51.8k rows, and its file
    file: str = 'alpaca_data_cleaned.json'
    out_dir: str = 'data/alpaca' # where the records go

def parse_row(row):
    """Turn a row into its records. ValueError says why there are none."""
    for key in ('instruction', 'output'):
        if key not in row and not (key == 'output' and 'chosen' in row):
            raise malformed(f'`{key}`')
        if not clean(row.get(key, '…')):
            raise ValueError(f'{key} is empty')
    return formats.parse_row(row)

def main(cfg):
    prepare(cfg, parse_row, cfg.repo, [cfg.file])

if __name__ == '__main__':
    launch(main, Config)
