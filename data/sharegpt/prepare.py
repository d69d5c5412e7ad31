"""Prepare ShareGPT, conversations that people had with ChatGPT, or its format.

    python data/sharegpt/prepare.py                                       # from the hub, about 0.7 GB
    python data/sharegpt/prepare.py --source=dummy_conversation.json      # data/ of lm-sys/FastChat on GitHub

Rows are {"conversations": [{"from": "human", "gpt" or "system", "value": text}, …]}, or have `role` and `content`.
Writes demonstrations (whole conversations: every answer is learnt) and prompts (all before the last answer). Rows with
`chosen` and `rejected` give comparisons, and those with a `label` unpaired records. Long conversations were split
before they were published: turns before the first question or after the last answer are cut off. The hub's copy is the
one of Vicuna (Chiang et al. 2023, https://lmsys.org/blog/2023-03-30-vicuna/). docs/data.md shows the expected output.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch
from data import formats
from data.prepare_common import PrepareOptions, malformed, prepare

@dataclass
class Config(PrepareOptions):
    repo: str = 'anon8231489123/ShareGPT_Vicuna_unfiltered' # the data set on the hub, and its file
    file: str = 'ShareGPT_V3_unfiltered_cleaned_split.json'
    out_dir: str = 'data/sharegpt' # where the records go

def parse_row(row):
    """Turn a row into its records. ValueError says why there are none."""
    if not isinstance(row.get('conversations'), list):
        raise malformed('`conversations` to be a list')
    return formats.parse_row(row)

def main(cfg):
    prepare(cfg, parse_row, cfg.repo, [cfg.file], unit='conversations')

if __name__ == '__main__':
    launch(main, Config)
