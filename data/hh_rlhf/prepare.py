r"""
Real human preferences: Anthropic's HH-RLHF (Bai et al. 2022, https://arxiv.org/abs/2204.05862, MIT licence).

Each row of the .jsonl.gz files of https://huggingface.co/datasets/Anthropic/hh-rlhf is {"chosen", "rejected"}, two
whole transcripts "\n\nHuman: …\n\nAssistant: …" that should differ in the last answer alone. What comes before that
answer is the prompt. A row that is otherwise is left out, counted under its reason, and the first few are named by file
and line.

    $ python data/hh_rlhf/prepare.py                                             # all four subsets, from the hub
    $ python data/hh_rlhf/prepare.py --subsets=helpful-base,harmless-base        # two of them
    $ python data/hh_rlhf/prepare.py --source=hh-rlhf --subsets=harmless-base    # from a folder that holds them
    $ python data/hh_rlhf/prepare.py --source=hh-rlhf-harmless-base-2000.jsonl.gz --out_dir=/tmp/hh

writes demonstrations (the chosen answers), comparisons and prompts (each different one once), each as _train.jsonl and
_val.jsonl. Where there are train*.jsonl.gz and test*.jsonl.gz, as on the hub, the test files are val; otherwise a share
of the prompts is. One prompt's rows never stand in both splits.

The counts one should see for hh-rlhf-harmless-base-2000.jsonl.gz, 2000 rows of harmless-base's test file:

    left out 30 with a role tag inside an answer, 4 with an empty answer, 4 whose turns do not alternate, 4 whose
    prompts differ; kept 1958
    split   demonstrations   comparisons   prompts   user turns in demonstrations (mean, max)
    train             1761          1761      1760   2.49, 18
    val                197           197       196   2.56, 11
    shorter answer wins in 55.0% of all, 55.7% of train, 48.7% of val

Anthropic's own card names no counts; KNOWN below holds the rows by file that the card of a copy, tasksource/hh-rlhf,
gives: 160800 for training and 8552 for testing in all.
"""
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import fail, launch
from data.prepare_common import (Counts, Item, as_prompt, check_options, clean, find_files, read, rows_of,
                                 write_splits)

REPO = 'Anthropic/hh-rlhf'
SUBSETS = ('helpful-base', 'helpful-online', 'helpful-rejection-sampled', 'harmless-base')
KNOWN = {f'{subset}/{split}.jsonl.gz': n for split, counts in (
    ('train', (43835, 22007, 52421, 42537)), ('test', (2354, 1137, 2749, 2312))) for subset, n in zip(SUBSETS, counts)}


@dataclass
class Config:
    source: str = '' # a .jsonl.gz (or .jsonl) file of HH-RLHF, or a folder that holds some; empty = from the hub
    subsets: str = '' # of the hub or the folder: helpful-base, helpful-online, …, separated by commas; empty = all
    out_dir: str = 'data/hh_rlhf' # where the records go
    val_fraction: float = 0.1 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        check_options(self)
        for subset in filter(None, self.subsets.split(',')):
            if subset not in SUBSETS:
                raise ValueError(f'subsets must be some of {", ".join(SUBSETS)}, got {subset!r}')


def parse_prompt(text):
    r"""'\n\nHuman: a\n\nAssistant: b\n\nHuman: c' -> messages; None unless turns alternate, user first and last."""
    before, *turns = re.split(r'\n\n(Human|Assistant):', text) # "", "Human", " a", "Assistant", " b", "Human", " c"
    roles, contents = turns[::2], [clean(content) for content in turns[1::2]]
    if before.strip() or len(roles) % 2 == 0 or not all(contents):
        return None
    if any(role != ('Human', 'Assistant')[i % 2] for i, role in enumerate(roles)):
        return None
    return [{'role': 'user' if role == 'Human' else 'assistant', 'content': content}
            for role, content in zip(roles, contents)]


def parse_row(row):
    """A row of HH-RLHF -> its comparison, demonstration and prompt; ValueError says why there are none."""
    if not all(isinstance(row.get(key), str) for key in ('chosen', 'rejected')):
        raise ValueError('malformed row')
    prompt, tag, chosen = row['chosen'].rpartition('\n\nAssistant:') # the answer follows the last tag
    other_prompt, other_tag, rejected = row['rejected'].rpartition('\n\nAssistant:')
    if not tag or not other_tag:
        raise ValueError('malformed row')
    if prompt != other_prompt:
        raise ValueError('prompts of chosen and rejected differ')
    chosen, rejected = clean(chosen), clean(rejected)
    if not chosen or not rejected:
        raise ValueError('chosen or rejected is empty')
    if re.search(r'\b(Human|Assistant):', chosen + '\n' + rejected):
        raise ValueError('role tag inside an answer')
    if chosen == rejected:
        raise ValueError('chosen equals rejected')
    messages = parse_prompt(prompt)
    if messages is None:
        raise ValueError('turns do not alternate, or one is empty')
    prompt = as_prompt(messages)
    return Item(prompt, {'comparisons': [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected}],
                         'demonstrations': [{'prompt': prompt, 'response': chosen}], 'prompts': [{'prompt': prompt}]})


def shorter_wins(rows):
    """What a reward model has to beat: how often a judge that only counts characters is right (equal lengths: half)."""
    gaps = [len(row['rejected']) - len(row['chosen']) for row in rows]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)


def main(cfg):
    subsets = list(filter(None, cfg.subsets.split(',')))
    if subsets and Path(cfg.source).is_file():
        fail(f'--subsets={cfg.subsets}: wanted with the hub or with a folder, got the file {cfg.source}')
    names = [f'{subset}/{split}.jsonl.gz' for subset in subsets or SUBSETS for split in ('train', 'test')]
    files, test_files = find_files(cfg.source, REPO, names, subsets or [''])
    counts = Counts()
    items, held_out = (read(rows_of(part, counts), parse_row, counts) for part in (files, test_files))
    splits = write_splits(items, held_out, cfg, counts, known=KNOWN)
    train, val = (splits[name]['comparisons'] for name in ('train', 'val'))
    print(f'shorter answer wins in {shorter_wins(train + val):.1%} of all, {shorter_wins(train):.1%} of train, '
          f'{shorter_wins(val):.1%} of val')


if __name__ == '__main__':
    launch(main, Config)
