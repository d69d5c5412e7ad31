"""Turn a judge's preferences in AlpacaEval's format into rankings, for collect.py --compare.

    python data/alpaca_eval/prepare.py                                  # fetches Vicuna-7B's answers against GPT-4's
    python data/alpaca_eval/prepare.py --source=annotations.json        # another model's, JSON or JSON lines

Rows have `instruction`, `output_1`, `output_2`, `preference`: 1 = output_1 … 2 = output_2, 1.5 = equal, null = no
opinion. Every model has such a file under results/ of https://github.com/tatsu-lab/alpaca_eval. Writes
rankings_test.jsonl, with `scores` 2 - preference and preference - 1. Rows without a preference, with an empty text or
with two equal answers are left out. It prints what a judge has to beat: for Vicuna-7B it keeps 802 of 805 rows, and
prefers output_1 in 767 and the longer answer in 717.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch
from common.records import is_number, is_text, write_atomic, write_records
from data.prepare_common import fetch, print_unread, read_rows, unseen

URL = ('https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/main/results/vicuna-7b-v1.5/'
       'weighted_alpaca_eval_gpt4_turbo/annotations.json')

@dataclass
class Config:
    source: str = '' # a file of annotations, also .gz; empty = fetch it
    out_dir: str = 'data/alpaca_eval' # where rankings_test.jsonl goes

def parse_row(row, place, reasons):
    """Turn a row into a ranking record, None if nothing is ranked."""
    if row is None:
        fail(f"{place}: {str(reasons[place]).partition(', got ')[0]}")
    prompt, *answers = [row.get(key) for key in ('instruction', 'output_1', 'output_2')]
    preference = row.get('preference')
    if not all(map(is_text, [prompt, *answers])) or answers[0] == answers[1] or preference is None:
        return None
    if not is_number(preference) or not 1 <= preference <= 2:
        fail(f'{place}: wanted `preference` to be a number from 1 to 2, or null, got {preference!r}')
    return dict(prompt=prompt, responses=answers, ranks=[int(preference > 1.5), int(preference < 1.5)],
                scores=[2 - preference, preference - 1], annotator=str(row.get('annotator', 'alpaca_eval')))

def main(cfg):
    out_dir, reasons, unread = Path(cfg.out_dir), {}, defaultdict(list)
    source = cfg.source or str(out_dir / 'annotations.json')
    if not cfg.source:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(source, fetch(URL))
    elif not Path(source).is_file():
        fail(f'--source={source}: wanted a file of annotations, there is none')
    rows = []
    for place, row in read_rows(source, reasons):
        rows.append(parse_row(row, place, reasons))
        for key in sorted(unseen(row)):
            unread[key].append(place)
    kept = [row for row in rows if row]
    if not kept:
        fail(f'{source}: wanted rows of instruction, output_1, output_2 and preference, found none')
    out_dir.mkdir(parents=True, exist_ok=True)
    write_records(out_dir / 'rankings_test.jsonl', kept)
    pairs = [(*row['responses'], *row['ranks']) for row in kept]
    print(f"{out_dir / 'rankings_test.jsonl'}: {len(kept)} of {len(rows)} rows, output_1 better in "
          f"{sum(i < j for _, _, i, j in pairs)}, the longer one in "
          f"{sum((len(a) - len(b)) * (j - i) > 0 for a, b, i, j in pairs)}")
    print_unread(unread)

if __name__ == '__main__':
    launch(main, Config)
