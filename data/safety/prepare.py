"""Prepare files of safety tests, for evaluate.py --safety: HarmBench, AdvBench, XSTest and CrowS-Pairs.

    python data/safety/prepare.py                                           # pairs.csv, sentences of our own
    python data/safety/prepare.py --source=xstest_prompts.csv
    python data/safety/prepare.py --source=crows_pairs_anonymized.csv --out_dir=data/crows

The columns tell which one it is, unless --format= says so. What it writes has the source's name, and ends in .jsonl:

    prompts    {"prompt", "attack": the kind or category, "refuse": true if it should be refused}
    pairs      {"sent_more", "sent_less", "bias_type", "direction": "stereo" or "antistereo"}

Rows left out are counted with their reason. docs/data.md names papers, licences and where the files are.
"""

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch, require
from common.records import write_records
from data.prepare_common import Item, clean, malformed, places_of, print_unread, read, read_rows, report, shown

def text(row, key, *words):
    """Return a column's text, stripped, one of `words` if there are any. Else ValueError."""
    found = clean(row.get(key) or '')
    if not found or words and found not in words:
        raise malformed(f"`{key}` to be {' or '.join(words) or 'text that is not empty'}")
    return found

def harmbench(row):
    if row.get('FunctionalCategory') == 'copyright':
        raise ValueError('copyright: HarmBench compares the answer with the text itself')
    context = row.get('ContextString') # as HarmBench puts them together
    prompt = (f'{clean(context)}\n\n---\n\n' if context else '') + text(row, 'Behavior')
    return dict(prompt=prompt, attack=text(row, 'SemanticCategory'), refuse=True)

def advbench(row):
    return dict(prompt=text(row, 'goal'), attack='advbench', refuse=True)

def xstest(row):
    return dict(prompt=text(row, 'prompt'), attack=text(row, 'type'),
                refuse=text(row, 'label', 'safe', 'unsafe') == 'unsafe')

def crows_pairs(row):
    pair = dict(sent_more=text(row, 'sent_more'), sent_less=text(row, 'sent_less'), bias_type=text(row, 'bias_type'),
                direction=text(row, 'stereo_antistereo', 'stereo', 'antistereo'))
    if pair['sent_more'] == pair['sent_less']:
        raise ValueError('the two sentences are equal')
    return pair

FORMATS = { # the columns that each is told by, and what reads its rows
    'harmbench': ({'Behavior', 'SemanticCategory'}, harmbench), 'advbench': ({'goal', 'target'}, advbench),
    'xstest': ({'prompt', 'type', 'label'}, xstest), 'crows_pairs': ({'sent_more', 'sent_less'}, crows_pairs)}

@dataclass
class Config:
    source: str = 'data/safety/pairs.csv' # a CSV file, or .jsonl, .json or .parquet, also .gz
    format: str = '' # harmbench, advbench, xstest or crows_pairs; empty = by the columns
    out_dir: str = 'data/safety' # where the records go

    def __post_init__(self):
        require(self, source=(self.source != '', 'a file'),
                format=(self.format in ('', *FORMATS), f"one of {', '.join(FORMATS)}, or empty"))

def main(cfg):
    columns = {key for _, row in read_rows(cfg.source) for key in row or ()}
    name = cfg.format or next((name for name, (needs, _) in FORMATS.items() if needs <= columns), None)
    if name is None:
        wanted = '; '.join(f"{', '.join(sorted(needs))} ({known})" for known, (needs, _) in FORMATS.items())
        fail(f"{cfg.source}: wanted the columns {wanted}, got {', '.join(sorted(columns)) or 'none'}")
    counts, records = defaultdict(list), []

    def parse(row):
        record = FORMATS[name][1](row)
        if 'all' in (record.get('attack'), record.get('bias_type')):
            raise ValueError('its kind is "all", which is what evaluate.py calls all kinds together')
        if record in records:
            raise ValueError('repeats an earlier row')
        records.append(record)
        return Item(None, {})

    read([cfg.source], parse, iter, counts)
    report(counts, len(records), 'rows', {})
    if not records:
        fail(f'{cfg.source}: wanted rows of {name}, every one was left out')
    said = {True: 'to be refused', False: 'to be answered'}
    for kind, n in Counter(', '.join(said.get(x, x) for x in [*r.values()][-2:]) for r in records).items():
        print(f'{n:6d}  {shown([kind])}')
    path = Path(cfg.out_dir, re.sub(r'(\.csv|\.jsonl?|\.parquet)?(\.gz)?$', '', Path(cfg.source).name) + '.jsonl')
    if path.exists() and path.samefile(cfg.source):
        fail(f'--source={cfg.source}: is {path} itself; wanted another --out_dir')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, records)
    print(f'written to {path}')
    print_unread(places_of(counts, 'key'))

if __name__ == '__main__':
    launch(main, Config)
