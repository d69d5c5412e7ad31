"""Make dialogues whose answers depend on what was said before.

    python data/toy/dialogues.py [--out_dir=data/toy] [--seed=1]

A user of the toy world thinks of an animal and wants to know two things about it. There are two kinds of dialogue:

    named      Where does the fox live?   It lives in a den.   One more thing. What does it eat?   It eats meat.
    unnamed    Where does it live?   I can't tell.   The fox.   In a den.   One more thing. What does it eat?   Meat.

An assistant that does not know which animal is meant has to say so; then the user names it. If it guesses, the user
leaves, and the second question is never asked. Each answer has a reward, its gold score for the user's animal (see
world.py):

    gold     of an answer alone          total    the sum over the dialogue's answers so far

"I can't tell." earns 0.2 at most and a lucky guess 1, but then it pays: two more answers follow. After the first turn
an answer needs the context: the user's last words name no animal, or they ask nothing. A record holds all that its user
will say:

    {"prompt": "Where does it live?", "animal": "fox", "named": false, "name": "The fox.",
     "follow_up": "One more thing. What does it eat?"}

They are in dialogues_SPLIT.jsonl. For training on single turns, turns_SPLIT.jsonl has each turn of the same dialogues
as a prompt of its own, where the turns before were answered well.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from common.records import write_records
from common.tokens import as_messages
from data.toy import world

NAMING = ('The {e}.', 'It is the {e}.')

def said(record):
    """Return the user's turns of a record so far, strings."""
    return [m['content'] for m in as_messages(record['prompt']) if m['role'] == 'user']

def question(record):
    """Return the user's last question, with the animal's name for "it"."""
    turns = [text for text in said(record) if text != record['name']]
    return re.sub(r'\bit\b', f"the {record['animal']}", turns[-1])

def gold(record, response):
    """Score an answer for the question that it is to; see world.gold."""
    return world.gold(question(record), response)

def total(record, response):
    """Sum the gold scores of a dialogue's answers up to this one."""
    messages = [*as_messages(record['prompt']), world.says('assistant', response)]
    return sum(gold(record | dict(prompt=messages[:i]), m['content'])
               for i, m in enumerate(messages) if m['role'] == 'assistant')

def user(record, messages):
    """Return what the user says next, None to end. messages: all that was said, an answer last."""
    turns = [m['content'] for m in messages if m['role'] == 'user']
    if turns[-1] == record['follow_up']:
        return None
    if record['named'] or record['name'] in turns:
        return record['follow_up']
    answer = world.parse(messages[-1]['content'], world.read(question(record | dict(prompt=messages))))
    return record['name'] if answer.what == 'unsure' else None

def dialogues(split, n, seed):
    """Make n records of a split, half of them unnamed; see this file's docstring."""
    rng = random.Random(f'dialogues {split} {seed}')
    records = []
    for i in range(n):
        animal, named = rng.choice(list(world.ANIMALS)), i % 2 == 0
        first, second = (rng.choice(world.PHRASINGS[attribute, animal][split]).replace('the {e}', 'it')
                         for attribute in rng.sample(world.ATTRIBUTES, 2))
        if named:
            first = re.sub(r'\bit\b', f'the {animal}', first)
        lead = '' if rng.random() < 0.4 else rng.choice(world.LEADS)
        records.append(dict(prompt=lead + first, animal=animal, named=named, name=rng.choice(NAMING).format(e=animal),
                            follow_up=rng.choice(world.SECOND_LEADS) + second))
    return records

def turns(records, seed):
    """Make of dialogues a prompt for every turn; what came before was answered well, an unnamed question with doubt."""
    rng = random.Random(f'turns {seed}')
    rows = []
    for record in records:
        while record:
            rows.append(record)
            unclear = not record['named'] and record['name'] not in said(record)
            answer = world.answer(question(record), rng, 'unsure' if unclear else 'right')
            messages = [*as_messages(record['prompt']), world.says('assistant', answer)]
            text = user(record, messages)
            record = record | dict(prompt=[*messages, world.says('user', text)]) if text else None
    return rows

@dataclass
class Config:
    out_dir: str = 'data/toy' # where the files go
    seed: int = 1 # another seed draws other samples; which phrasings belong to which split stays the same
    n: int = 2000 # dialogues in train
    n_val: int = 300 # for tuning
    n_test: int = 300 # for reporting

    def __post_init__(self):
        require(self, **{key: (getattr(self, key) >= 1, 'at least 1') for key in ('n', 'n_val', 'n_test')})

def main(cfg):
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, n in (('train', cfg.n), ('val', cfg.n_val), ('test', cfg.n_test)):
        records = dialogues(split, n, cfg.seed)
        for name, rows in dict(dialogues=records, turns=turns(records, cfg.seed)).items():
            write_records(out_dir / f'{name}_{split}.jsonl', rows)
            print(f"{f'{name}_{split}':<22} {len(rows):>6}")

if __name__ == '__main__':
    launch(main, Config)
