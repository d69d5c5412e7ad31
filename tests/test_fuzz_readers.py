"""
Broken data through every reader: no traceback, exit 0 or 2, one line on stderr, and what is written can be read.

Rows of every format are changed at random places, from a fixed seed, and written as lines, arrays, CSV or broken bytes.
"""
import copy
import csv
import gzip
import io
import json
import os
import random

import pytest

import data.alpaca.prepare as alpaca
import data.alpaca_eval.prepare as alpaca_eval
import data.hh_rlhf.prepare as hh_rlhf
import data.oasst1.prepare as oasst1
import data.sharegpt.prepare as sharegpt
import data.trl.prepare as trl
from common.options import parse_config
from common.records import read_ranked, read_records, read_unpaired
from data.peek import kind_of
from tiny import assistant, user

KINDS = ('text', 'demonstrations', 'comparisons', 'rankings', 'ratings', 'unpaired', 'prompts')
TALK = [dict(role='system', content='s'), user('q'), assistant('a') | dict(weight=0), user('r'), assistant('b')]
TURNS = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
MESSAGE = dict(message_id='1', parent_id=None, text='q', role='prompter', lang='en', replies=[
    dict(message_id='2', text='a', role='assistant', lang='en', rank=0, replies=[]),
    dict(message_id='3', text='b', role='assistant', lang='en', rank=1)])
ROWS = [
    dict(text='t'), dict(prompt='q'), dict(prompt='q', response='a', ended=True), dict(messages=TALK),
    dict(messages=TALK, label=False), dict(conversations=TURNS),
    dict(conversations=TURNS[:1], chosen=TURNS[1], rejected='b'),
    dict(prompt='q', chosen='a', rejected='b', margin=1, scores=[1, 0], ended=[True, False]),
    dict(prompt='q', responses=['a', 'b'], ranks=[0, 1], scores=[1, 0.5], ended=[True, True]),
    dict(query='q', responses=['a', 'b'], scores=[0.5, 1]), dict(prompt='q', response='a', label=True),
    dict(prompt='q', completion='a', label=False), dict(chosen='all a', rejected='all b'),
    dict(chosen=TALK, rejected=TALK[:-1] + [assistant('c')]), dict(query='q', response='a', rejected_response='b'),
    dict(instruction='q', input='i', output='a', system='s', history=[['h', 'i']]), dict(turns=['q', 'r']),
    dict(prompt='q', response='a', helpfulness=3), dict(history='q', human_ref_A='a', human_ref_B='b', labels=1),
    dict(prompt='q', response_0='a', response_1='b', better_response_id=0, safer_response_id=0),
    dict(question=dict(full_text='q'), answer_0='a', answer_1='b', score_0=1, score_1=0), MESSAGE,
    dict(message_tree_id='1', tree_state='ready_for_export', prompt=MESSAGE),
    {key: f'\n\nHuman: q\n\nAssistant: {key}' for key in ('chosen', 'rejected')},
    dict(instruction='q', output_1='a', output_2='b', preference=1.5)]
VALUES = [None, True, False, 0, 1, -1, 2**63, 10**309, 1.5, float('nan'), float('inf'), '', ' ', 'a', '\ud83d',
          '\x1b[2J\n', 'Human: x', '<|endoftext|>', '### Instruction:\nx\n### Response:', '[{', [], {}, [None], [[]],
          [{}], ['a', 'b'], [['a', 'b']], [1, 2], {'a': 1}, {'role': 'user', 'content': 'x'},
          {'from': 'gpt', 'value': None}, TALK, TURNS]
KEYS = sorted({key for row in ROWS for key in row} | {'a', '', '\x1b[2J\n', 'kto_tag', 'id', 'more'})

def places(value):
    """Return (container, key) of everything inside of a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(value, key), *places(part)]]

def change(row, rng):
    """Change a row at one to three places."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        found = places(row)
        container, key = rng.choice(found) if found else (row, 'a')
        what = rng.random()
        if what < 0.5:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.7 and found:
            del container[key]
        elif what < 0.85:
            row[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[rng.choice(KEYS)] = copy.deepcopy(container.get(key))
    return row

def write_file(folder, n, rng):
    """Write rows of one or two formats, most of them changed, in some form; return the path."""
    rows = [json.loads(json.dumps(row).replace('"q"', f'"q{i}"')) # different prompts
            for i, row in enumerate(rng.choices(rng.sample(ROWS, rng.choice((1, 1, 2))), k=6))]
    rows = [row if rng.random() < 0.3 else change(row, rng) for row in rows]
    form = rng.choice(('lines', 'lines', 'lines', 'array', 'csv', 'bytes'))
    text = '\n'.join(json.dumps(row) for row in rows) + '\n'
    if form == 'array':
        text = json.dumps(rows, indent=rng.choice((None, 2)))
    elif form == 'csv':
        out = io.StringIO()
        table = csv.DictWriter(out, sorted({key for row in rows for key in row}))
        table.writeheader()
        table.writerows(rows)
        text = out.getvalue()
    content = bytearray(text.encode(errors='surrogatepass'))
    if form == 'bytes':
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        content = content[:rng.randrange(len(content)) + 1]
    path = folder / f"{n}.{'csv' if form == 'csv' else 'jsonl'}{rng.choice(('', '', '.gz'))}"
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == '.gz' and rng.random() < 0.9 else content)
    return path

def outcome(capsys, call):
    """Return what a call returns, or None where it ended with exit code 2 and one line."""
    capsys.readouterr()
    try:
        return call()
    except SystemExit as stopped:
        err = capsys.readouterr().err
        assert stopped.code == 2 and err.startswith('error: ') and len(err.splitlines()) == 1, err

@pytest.mark.parametrize('seed', [0, 6, 29, 31, 34])
def test_broken_data_ends_well(tmp_path, capsys, monkeypatch, seed):
    monkeypatch.setattr(os, 'fsync', lambda fd: None) # nothing here has to outlive a power cut
    rng, written = random.Random(seed), 0
    for n in range(50):
        path = write_file(tmp_path, n, rng)
        state = f'seed {seed}, file {n}: {path.read_bytes()[:2000]!r}'
        try:
            for script in (trl, alpaca, sharegpt, hh_rlhf, oasst1, alpaca_eval):
                out = tmp_path / f"{n}_{script.__name__.split('.')[1]}"
                cfg = parse_config(script.Config, [f'--source={path}', f'--out_dir={out}'])
                outcome(capsys, lambda: script.main(cfg))
                for made in out.glob('*.jsonl'):
                    assert read_records(made, made.stem.split('_')[0])
                    written += 1
            for kind in KINDS:
                outcome(capsys, lambda: read_records(path, kind))
            for read in (read_ranked, read_unpaired, kind_of):
                outcome(capsys, lambda: read(path))
        except Exception as error:
            raise AssertionError(state) from error
    assert written > 50 # most of the files hold something good
