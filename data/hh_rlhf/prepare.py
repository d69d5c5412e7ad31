r"""Prepare HH-RLHF, Anthropic's human preferences between two answers.

    python data/hh_rlhf/prepare.py                                             # all four subsets, from the hub
    python data/hh_rlhf/prepare.py --subsets=helpful-base,harmless-base        # two of them
    python data/hh_rlhf/prepare.py --source=hh-rlhf --subsets=harmless-base    # from a folder that holds them
    python data/hh_rlhf/prepare.py --source=test.jsonl.gz                      # one file

Bai et al. 2022, https://arxiv.org/abs/2204.05862, MIT licence. A row is {"chosen", "rejected"}, two whole transcripts
"\n\nHuman: …\n\nAssistant: …" that should differ in the last answer alone. Other rows are left out and counted. Writes
demonstrations (the chosen answers), comparisons and prompts; val is the test files where there are some. docs/data.md
shows the expected output.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch, require
from data.prepare_common import PrepareOptions, clean, malformed, preference, prepare

TAG = '\n\nAssistant:'
SUBSETS = ('helpful-base', 'helpful-online', 'helpful-rejection-sampled', 'harmless-base')
# rows by file, from the card of a copy, tasksource/hh-rlhf; Anthropic's own names none
KNOWN = {f'{subset}/{split}.jsonl.gz': n for split, counts in (
    ('train', (43835, 22007, 52421, 42537)), ('test', (2354, 1137, 2749, 2312))) for subset, n in zip(SUBSETS, counts)}

@dataclass
class Config(PrepareOptions):
    subsets: str = '' # of the hub or the folder: helpful-base, helpful-online, …, separated by commas; empty = all
    out_dir: str = 'data/hh_rlhf' # where the records go
    val_fraction: float = 0.1 # share of the different prompts that makes val, where there are no test files

    def __post_init__(self):
        super().__post_init__()
        require(self, subsets=({*self.subsets.split(',')} <= {*SUBSETS, ''}, f'some of {", ".join(SUBSETS)}'))

def parse_row(row):
    """Turn a row into comparison, demonstration and prompt. ValueError says why there are none."""
    texts = [row.get('chosen'), row.get('rejected')]
    if isinstance(row.get('prompt'), str): # some copies have it apart
        texts = [row['prompt'] + text if isinstance(text, str) and TAG not in text else text for text in texts]
    if not all(isinstance(text, str) and TAG in text for text in texts):
        raise malformed(r'`chosen` and `rejected` to be texts with "\n\nAssistant:"')
    # the answer follows the last tag
    (prompt, _, chosen), (other_prompt, _, rejected) = (text.rpartition(TAG) for text in texts)
    if prompt != other_prompt:
        raise ValueError('prompts of chosen and rejected differ')
    chosen, rejected = clean(chosen), clean(rejected)
    if not chosen or not rejected:
        raise ValueError('chosen or rejected is empty')
    if re.search(r'\b(Human|Assistant):', chosen + '\n' + rejected):
        raise ValueError('role tag inside an answer')
    if chosen == rejected:
        raise ValueError('chosen equals rejected')
    before, *parts = re.split(r'\n\n(Human|Assistant):', prompt) # "", "Human", " a", "Assistant", " b", "Human", " c"
    tags, contents = parts[::2], [clean(content) for content in parts[1::2]]
    if before.strip() or not re.fullmatch('(HumanAssistant)*Human', ''.join(tags)) or not all(contents):
        raise ValueError('turns do not alternate, or one is empty')
    return preference([{'role': 'user' if tag == 'Human' else 'assistant', 'content': content}
                       for tag, content in zip(tags, contents)], chosen, rejected)

def shorter_wins(rows):
    """Return how often the shorter answer is chosen, equal lengths half. A reward model has to beat it."""
    gaps = [len(row['rejected']) - len(row['chosen']) for row in rows]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)

def main(cfg):
    subsets = list(filter(None, cfg.subsets.split(',')))
    if subsets and Path(cfg.source).is_file():
        fail(f'--subsets={cfg.subsets}: wanted with the hub or with a folder, got the file {cfg.source}')
    names = [f'{subset}/{split}.jsonl.gz' for subset in subsets or SUBSETS for split in ('train', 'test')]
    splits = prepare(cfg, parse_row, 'Anthropic/hh-rlhf', names, subsets or [''], known=KNOWN)
    train, val = (splits[name]['comparisons'] for name in ('train', 'val'))
    print(f'shorter answer wins in {shorter_wins(train + val):.1%} of all, {shorter_wins(train):.1%} of train, '
          f'{shorter_wins(val):.1%} of val')

if __name__ == '__main__':
    launch(main, Config)
