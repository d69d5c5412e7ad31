"""
A judge's preferences in AlpacaEval's format as rankings, to compare our annotators with (collect.py --compare).

    python data/alpaca_eval/prepare.py --source=annotations.jsonl.gz [--out_dir=data/alpaca_eval]

Reads rows of `instruction`, `output_1`, `output_2`, `preference`: 1 = output_1 … 2 = output_2, 1.5 = equal, null = no
opinion. Writes rankings_test.jsonl, with `scores` 2 - preference and preference - 1. Rows without a preference, with an
empty text or with two equal answers are left out and counted. Of alpaca-eval-vicuna-7b-v1.5-annotations.jsonl.gz one
should see 802 of 805 rows, output_1 better in 767, the longer one in 717: what a judge has to beat.
"""
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))) # the repository root

from common import fail, launch, require
from tokens import is_number, is_text, parse_line, read_lines, write_records


@dataclass
class Config:
    source: str = '' # a .jsonl or .jsonl.gz file of annotations
    out_dir: str = 'data/alpaca_eval' # where rankings_test.jsonl goes

    def __post_init__(self):
        require(self, source=(self.source != '', 'a .jsonl or .jsonl.gz file of annotations'))


def parse_row(row):
    """A row of annotations -> a ranking record, or None where there is nothing to rank."""
    texts = [row.get(key) for key in ('instruction', 'output_1', 'output_2')]
    preference = row.get('preference')
    if not all(map(is_text, texts)) or texts[1] == texts[2] or preference is None:
        return None
    if not is_number(preference) or not 1 <= preference <= 2:
        raise ValueError(f"wanted `preference` to be a number from 1 to 2, or null, got {preference!r}")
    return dict(prompt=texts[0], responses=texts[1:], ranks=[int(preference > 1.5), int(preference < 1.5)],
                scores=[2 - preference, preference - 1], annotator=str(row.get('annotator', 'alpaca_eval')))


def main(cfg):
    rows = []
    for n, line in read_lines(cfg.source):
        if not line.strip():
            continue # an empty line, often the last
        try:
            rows.append(parse_row(parse_line(line)))
        except ValueError as e:
            fail(f"{cfg.source}:{n}: {e}")
    kept = [row for row in rows if row]
    if not kept:
        fail(f"{cfg.source}: wanted rows of instruction, output_1, output_2 and preference, found none")
    os.makedirs(cfg.out_dir, exist_ok=True)
    out = os.path.join(cfg.out_dir, 'rankings_test.jsonl')
    write_records(out, kept)
    length = lambda row, rank: len(row['responses'][row['ranks'].index(rank)])
    longer = sum(length(row, 0) > length(row, 1) for row in kept if 1 in row['ranks'])
    print(f"{out}: {len(kept)} of {len(rows)} rows, output_1 better in {sum(row['ranks'] == [0, 1] for row in kept)}, "
          f"the longer one in {longer}")


if __name__ == '__main__':
    launch(main, Config)
