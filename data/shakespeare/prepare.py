"""Fetch tinyshakespeare, 1115394 characters of plain text, for config/shakespeare/sft.py.

    python data/shakespeare/prepare.py                        # from karpathy's char-rnn
    python data/shakespeare/prepare.py --source=FILE.txt      # a copy of it, or another text
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch
from common.records import read_records, write_atomic
from data.prepare_common import fetch

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'

@dataclass
class Config:
    source: str = '' # a text file; empty = fetch it
    out_dir: str = 'data/shakespeare' # where input.txt goes

def main(cfg):
    if cfg.source and not Path(cfg.source).exists():
        fail(f'--source={cfg.source}: wanted a text file, there is none')
    text = '\n'.join(r['text'] for r in read_records(cfg.source, 'text')) if cfg.source else fetch(URL)
    path = Path(cfg.out_dir) / 'input.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(str(path), text)
    print(f'{path}: {len(text)} characters')

if __name__ == '__main__':
    launch(main, Config)
