"""Prepare your own preferences, or a data set in TRL's formats.

    python data/trl/prepare.py --source=preferences.jsonl --out_dir=data/mine
    python data/trl/prepare.py --repo=OWNER/NAME --file=PATH/train.jsonl --out_dir=data/mine      # from the hub

Row by row it tells the formats of https://huggingface.co/docs/trl/dataset_formats apart; docs/data.md lists their keys
and the records that they give. Texts may be strings ("standard") or lists of messages ("conversational"). A string is
a user's turn or an answer, and is put into the template of common/tokens.py. Chosen and rejected may differ in their
last answer only. They may be whole conversations, as in UltraFeedback's binarised form.
"""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from data.prepare_common import Item, PrepareOptions, as_prompt, clean, conversation, preference, prepare

@dataclass
class Config(PrepareOptions):
    repo: str = '' # a data set on the hub, as OWNER/NAME
    file: str = '' # its file
    out_dir: str = 'data/trl' # where the records go

    def __post_init__(self):
        super().__post_init__()
        require(self, source=(self.source != '' or (self.repo and self.file),
                              'a file or folder, or else --repo and --file of the hub'))

def to_messages(text_or_messages, role):
    """Return messages as they are, a string as one turn of `role`."""
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
    """Join prompt (or None) and answer to messages. A whole conversation as answer needs no prompt."""
    answer = to_messages(answer, 'assistant')
    if prompt is None or answer and answer[0]['role'] != 'assistant':
        return answer
    return to_messages(prompt, 'user') + answer

def parse_preference(row):
    """Turn a row with `chosen` and `rejected` into comparison, demonstration and prompt."""
    prompt, chosen, rejected = row.get('prompt'), row['chosen'], row['rejected']
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        # "The sky is blue", "The sky is black" -> "The sky is ", "blue", "black". Scripts that begin at U+2E80, Chinese
        # and Japanese above all, have no spaces between words
        shared = commonprefix([chosen, rejected])
        words = re.match(r'.*[\s\u2e80-\U0010ffff]', shared, re.DOTALL)
        n = len(words[0] if words else shared)
        prompt, chosen, rejected = shared[:n], chosen[n:], rejected[n:]
    chosen, rejected = whole(prompt, chosen), whole(prompt, rejected)
    if chosen == rejected:
        raise ValueError('chosen equals rejected')
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise ValueError('chosen and rejected differ in more than their last turn')
    if (chosen[-1]['role'], rejected[-1]['role']) != ('assistant', 'assistant'):
        raise ValueError('chosen or rejected does not end in an answer')
    margin = {'margin': row['margin']} if row.get('margin') is not None else {}
    return preference(chosen[:-1], chosen[-1]['content'], rejected[-1]['content'], **margin)

def parse_completion(row):
    """Turn a prompt and its completion into records. With a label it is an unpaired preference."""
    prompt, completion = to_messages(row['prompt'], 'user'), to_messages(row['completion'], 'assistant')
    demonstrations = [{'prompt': as_prompt(prompt + completion[:i]), 'response': m['content']}
                      for i, m in enumerate(completion) if m['role'] == 'assistant']
    prompt = as_prompt(prompt)
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
    """Turn a row of any of the formats into records. ValueError says why there are none."""
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
    """Add rankings: answers to one prompt, some liked (0), some not (1)."""
    judged = defaultdict(list) # prompt -> its items with an unpaired record
    for item in items:
        if 'unpaired' in item.records:
            judged[str(item.group)].append(item)
    for same_prompt in judged.values():
        rows = [item.records['unpaired'][0] for item in same_prompt]
        ranks = [int(not row['label']) for row in rows]
        if len(set(ranks)) == 2:
            same_prompt[0].records['rankings'] = [
                {'prompt': rows[0]['prompt'], 'responses': [row['response'] for row in rows], 'ranks': ranks}]
    return items

def main(cfg):
    prepare(cfg, parse_row, cfg.repo, [cfg.file], finish=pair_up)

if __name__ == '__main__':
    launch(main, Config)
