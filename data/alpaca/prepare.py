"""
Instructions with a model's answers: Alpaca (Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca, 52K rows
by its README, CC BY-NC 4.0), and everything else of that format: a JSON array, or JSON lines, of {"instruction",
"input", "output"}, where the input is often empty.

    $ python data/alpaca/prepare.py                                    # from the hub: the cleaned version, see below
    $ python data/alpaca/prepare.py --source=alpaca_data.json          # Stanford's own file

writes demonstrations and prompts, each as _train.jsonl and _val.jsonl. The prompt is the instruction, then a blank line
and the input where there is one; Alpaca's own frame ("Below is an instruction that …") is left away, since tokens.py
has a template. Rows without an instruction or an output are left out.

Fetched by default is https://huggingface.co/datasets/yahma/alpaca-cleaned, whose card says what was mended; the hub
shows it with 51.8k rows. tatsu-lab/alpaca itself is there as parquet only, which these scripts do not read.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import launch
from data.prepare_common import Counts, Item, check_options, clean, find_files, read, rows_of, write_splits


@dataclass
class Config:
    source: str = '' # a .json or .jsonl file of this format, or a folder that holds some; empty = from the hub
    repo: str = 'yahma/alpaca-cleaned' # the data set on the hub, and its file
    file: str = 'alpaca_data_cleaned.json'
    out_dir: str = 'data/alpaca' # where the records go
    val_fraction: float = 0.05 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        check_options(self)


def parse_row(row):
    """A row of Alpaca -> its demonstration and prompt; ValueError says why there are none."""
    instruction, more, output = clean(row.get('instruction')), clean(row.get('input') or ''), clean(row.get('output'))
    if not instruction:
        raise ValueError('instruction is empty')
    if not output:
        raise ValueError('output is empty')
    prompt = f'{instruction}\n\n{more}' if more else instruction
    return Item(prompt, {'demonstrations': [{'prompt': prompt, 'response': output}], 'prompts': [{'prompt': prompt}]})


def main(cfg):
    files, test_files = find_files(cfg.source, cfg.repo, [cfg.file])
    counts = Counts()
    items, held_out = (read(rows_of(part, counts), parse_row, counts) for part in (files, test_files))
    write_splits(items, held_out, cfg, counts)


if __name__ == '__main__':
    launch(main, Config)
