"""
Conversations that people had with ChatGPT and shared (ShareGPT; Vicuna was trained on them, Chiang et al. 2023,
https://lmsys.org/blog/2023-03-30-vicuna/), and everything else of that format: a JSON array, or JSON lines, of
{"id", "conversations": [{"from": "human" or "gpt" or "system", "value": text}, …]}.

    $ python data/sharegpt/prepare.py                                                 # from the hub, see below
    $ python data/sharegpt/prepare.py --source=sharegpt-dummy-conversation.json

writes demonstrations (whole conversations: every answer is learnt) and prompts (all that comes before the last answer),
each as _train.jsonl and _val.jsonl. System turns at the beginning stay. Long conversations were split before they were
published, so many begin with an answer or end with a question: these turns are cut off. A conversation with
another speaker, an empty turn, or two turns of one speaker in a row is left out. Conversations with the same first
question stand in one split.

The counts one should see for sharegpt-dummy-conversation.json (FastChat's), 500 conversations:

    split   demonstrations   prompts   user turns in demonstrations (mean, max)
    train              479       371   2.02, 3
    val                 21        13   1.48, 2

Fetched by default is https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered, about 0.7 GB that pass
through memory several times over, in many languages; its card gives no count for this file.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import launch
from data.prepare_common import Counts, check_options, clean, conversation, find_files, read, rows_of, write_splits

ROLES = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'assistant': 'assistant',
         'system': 'system'}


@dataclass
class Config:
    source: str = '' # a .json or .jsonl file of this format, or a folder that holds some; empty = from the hub
    repo: str = 'anon8231489123/ShareGPT_Vicuna_unfiltered' # the data set on the hub, and its file
    file: str = 'ShareGPT_V3_unfiltered_cleaned_split.json'
    out_dir: str = 'data/sharegpt' # where the records go
    val_fraction: float = 0.05 # share of the different first questions that makes val, where there are no test files
    seed: int = 1337 # which of them these are

    def __post_init__(self):
        check_options(self)


def parse_row(row):
    """A row of ShareGPT -> its demonstration and prompt; ValueError says why there are none."""
    turns = row.get('conversations')
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get('from'), str) for t in turns):
        raise ValueError('malformed row')
    for turn in turns:
        if turn['from'] not in ROLES:
            raise ValueError(f"speaker {turn['from'][:20]!r}")
    return conversation([{'role': ROLES[turn['from']], 'content': clean(turn.get('value'))} for turn in turns])


def main(cfg):
    files, test_files = find_files(cfg.source, cfg.repo, [cfg.file])
    counts = Counts()
    items, held_out = (read(rows_of(part, counts), parse_row, counts) for part in (files, test_files))
    write_splits(items, held_out, cfg, counts, unit='conversations')


if __name__ == '__main__':
    launch(main, Config)
