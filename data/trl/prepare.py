"""
Data sets in the formats of TRL (https://huggingface.co/docs/trl/dataset_formats), as JSON lines or a JSON array. The
format is told row by row; all but `text` and `messages` may be strings ("standard") or lists of {"role", "content"}
("conversational").

    keys of a row              records
    prompt, chosen, rejected   comparison (with `margin` where there is one), demonstration (the chosen answer), prompt
    chosen, rejected           the same; what both begin with is the prompt ("implicit")
    prompt, completion         demonstration (one for every answer of the completion), prompt
    prompt, completion, label  ("unpaired") an unpaired record, for kto.py; prompt; a liked answer is a demonstration;
                               liked and disliked answers to one prompt are a ranking
    prompt                     prompt
    messages                   demonstration of every answer, prompt
    text                       text

    $ python data/trl/prepare.py --source=preferences.jsonl --out_dir=data/mine
    $ python data/trl/prepare.py --repo=OWNER/NAME --file=PATH/train.jsonl --out_dir=data/mine      # from the hub

writes the kinds of records that the rows give, each as _train.jsonl and _val.jsonl. UltraFeedback's binarised form
(a prompt, and chosen and rejected as whole conversations) is read too. A string is taken for a user's turn, or for an
answer, and put into the template of tokens.py; TRL goes on writing behind it. An implicit prompt of strings ends where
the two part, before the word that is torn there. Chosen and rejected may differ in their last answer only. Parquet is
not read: Dataset.to_json of the `datasets` package makes JSON lines of it. For HH-RLHF, whose strings hold several
turns, use data/hh_rlhf.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import launch, require
from data.prepare_common import (Counts, Item, as_prompt, check_options, clean, conversation, find_files, read, rows_of,
                                 write_splits)


@dataclass
class Config:
    source: str = '' # a .jsonl, .jsonl.gz or .json file, or a folder that holds some; empty = --repo and --file
    repo: str = '' # a data set on the hub, as OWNER/NAME
    file: str = '' # its file
    out_dir: str = 'data/trl' # where the records go
    val_fraction: float = 0.05 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        check_options(self)
        require(self, source=(self.source != '' or (self.repo and self.file),
                              'a file or folder, or else --repo and --file of the hub'))


def to_messages(text_or_messages, role):
    """A string, as a turn of `role`, or messages -> messages."""
    if isinstance(text_or_messages, str):
        return [{'role': role, 'content': clean(text_or_messages)}]
    if not isinstance(text_or_messages, list):
        raise ValueError('malformed row')
    for m in text_or_messages:
        if not isinstance(m, dict) or not isinstance(m.get('role'), str) or not isinstance(m.get('content'), str):
            raise ValueError('a message is not a role and a text')
        if m['role'] not in ('user', 'assistant', 'system'):
            raise ValueError(f"role {m['role'][:20]!r}")
    return [{'role': m['role'], 'content': clean(m['content'])} for m in text_or_messages]


def whole(prompt, answer):
    """The messages of prompt (or None) and answer; an answer that is a whole conversation already needs no prompt."""
    answer = to_messages(answer, 'assistant')
    if prompt is None or answer and answer[0]['role'] != 'assistant':
        return answer
    return to_messages(prompt, 'user') + answer


def split_strings(chosen, rejected):
    """
    Two strings with a common beginning -> (prompt, chosen, rejected): "The sky is blue", "The sky is black" -> "The sky
    is ", "blue", "black". Scripts that begin at U+2E80, Chinese and Japanese above all, have no spaces between words.
    """
    shared = commonprefix([chosen, rejected])
    n = len(shared)
    while n and not shared[n - 1].isspace() and shared[n - 1] < '\u2e80':
        n -= 1
    n = n or len(shared)
    return chosen[:n], chosen[n:], rejected[n:]


def parse_preference(row):
    prompt, chosen, rejected = row.get('prompt'), row['chosen'], row['rejected']
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = split_strings(chosen, rejected)
    chosen, rejected = whole(prompt, chosen), whole(prompt, rejected)
    if chosen == rejected:
        raise ValueError('chosen equals rejected')
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise ValueError('chosen and rejected differ in more than their last turn')
    if (chosen[-1]['role'], rejected[-1]['role']) != ('assistant', 'assistant'):
        raise ValueError('chosen or rejected does not end in an answer')
    prompt = as_prompt(chosen[:-1])
    comparison = {'prompt': prompt, 'chosen': chosen[-1]['content'], 'rejected': rejected[-1]['content']}
    if row.get('margin') is not None:
        comparison['margin'] = row['margin']
    return Item(prompt, {'comparisons': [comparison], 'prompts': [{'prompt': prompt}],
                         'demonstrations': [{'prompt': prompt, 'response': comparison['chosen']}]})


def parse_completion(row):
    """A prompt and its completion, with a label an unpaired preference."""
    messages = to_messages(row['prompt'], 'user')
    n_prompt = len(messages)
    messages += to_messages(row['completion'], 'assistant')
    prompt = as_prompt(messages[:n_prompt])
    demonstrations = [{'prompt': as_prompt(messages[:i]), 'response': m['content']}
                      for i, m in enumerate(messages) if i >= n_prompt and m['role'] == 'assistant']
    if not demonstrations:
        raise ValueError('completion without an answer')
    records = {'demonstrations': demonstrations, 'prompts': [{'prompt': prompt}]}
    if row.get('label') is not None:
        if type(row['label']) is not bool or len(demonstrations) > 1:
            raise ValueError('label is not true or false, or judges several answers')
        records['unpaired'] = [demonstrations[0] | {'label': row['label']}]
        records['demonstrations'] = demonstrations if row['label'] else []
    return Item(prompt, records)


def parse_row(row):
    """A row of any of the formats above -> its records; ValueError says why there are none."""
    if 'chosen' in row and 'rejected' in row:
        return parse_preference(row)
    if 'prompt' in row and 'completion' in row:
        return parse_completion(row)
    if 'messages' in row:
        return conversation(to_messages(row['messages'], 'user'))
    if 'prompt' in row and not {'chosen', 'rejected', 'completions', 'label'} & row.keys():
        prompt = as_prompt(to_messages(row['prompt'], 'user'))
        return Item(prompt, {'prompts': [{'prompt': prompt}]})
    if 'text' in row:
        return Item(row['text'], {'text': [{'text': row['text']}]})
    raise ValueError(f"keys of no format that is read: {', '.join(sorted(row))[:80]}")


def pair_up(items):
    """Adds to unpaired preferences the rankings: answers to one prompt, some liked (rank 0) and some not (rank 1)."""
    judged = defaultdict(list) # prompt -> its unpaired records
    for item in items:
        for record in item.records.get('unpaired', []):
            judged[str(record['prompt'])].append((record, item))
    for same_prompt in judged.values():
        rows = [record for record, _ in same_prompt]
        if len({record['label'] for record in rows}) == 2:
            same_prompt[0][1].records['rankings'] = [{
                'prompt': rows[0]['prompt'], 'responses': [record['response'] for record in rows],
                'ranks': [0 if record['label'] else 1 for record in rows]}]
    return items


def main(cfg):
    files, test_files = find_files(cfg.source, cfg.repo, [cfg.file])
    counts = Counts()
    items, held_out = (pair_up(read(rows_of(part, counts), parse_row, counts)) for part in (files, test_files))
    write_splits(items, held_out, cfg, counts)


if __name__ == '__main__':
    launch(main, Config)
