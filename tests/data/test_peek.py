"""python -m data.peek: every kind of record with its mask, in colour and without."""
import os
import subprocess
import sys

import pytest

from common.records import write_records
from data import peek
from tiny import ROOT, assistant, exits, run, stops, user

def lines(path, *rows):
    path.write_text(''.join(row + '\n' for row in rows))
    return path

def shown(capsys, path, rows=3):
    capsys.readouterr()
    run(peek, file=path, tokenizer='bytes', rows=rows)
    return capsys.readouterr().out

# "### Human: Hi\n### Assistant:" is 11 + 2 + 1 + 14 = 28 bytes, " Yo" and the end 4; the next turn, with a line end
# before it, 1 + 11 + 3 + 1 + 14 = 30, " See you" and the end 9
@pytest.mark.parametrize('row, kind, expected', [
    ({'prompt': 'Hi', 'response': 'Yo'}, 'demonstrations',
     '[dialogue: 32 tokens, 4 learnt]\n### Human: Hi\n### Assistant:⟦ Yo<|endoftext|>⟧\n'),
    ({'messages': [user('Hi'), assistant('Yo'), user('Bye'), assistant('See you')]}, 'demonstrations',
     '[dialogue: 71 tokens, 13 learnt]\n### Human: Hi\n### Assistant:⟦ Yo<|endoftext|>⟧\n'
     '### Human: Bye\n### Assistant:⟦ See you<|endoftext|>⟧\n'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'See you'}, 'comparisons',
     '[prompt: 28 tokens, 0 learnt]\n### Human: Hi\n### Assistant:\n[chosen: 4 tokens, 4 learnt]\n'
     '⟦ Yo<|endoftext|>⟧\n[rejected: 9 tokens, 9 learnt]\n⟦ See you<|endoftext|>⟧\n'),
    ({'prompt': 'Hi', 'responses': ['See you', 'Yo'], 'ranks': [1, 0]}, 'rankings',
     '[prompt: 28 tokens, 0 learnt]\n### Human: Hi\n### Assistant:\n[rank 1: 9 tokens, 9 learnt]\n'
     '⟦ See you<|endoftext|>⟧\n[rank 0: 4 tokens, 4 learnt]\n⟦ Yo<|endoftext|>⟧\n'),
    ({'prompt': [dict(role='system', content='你好'), user('Hi')]}, 'prompts',  # 12 + 6 + 1 bytes before the 28
     '[prompt: 47 tokens, 0 learnt]\n### System: 你好\n### Human: Hi\n### Assistant:\n'),
    ({'prompt': 'Hi', 'response': 'Yo', 'label': False}, 'unpaired',
     '[prompt: 28 tokens, 0 learnt]\n### Human: Hi\n### Assistant:\n[bad: 4 tokens, 4 learnt]\n⟦ Yo<|endoftext|>⟧\n'),
    ({'prompt': 'Hi', 'response': 'Yo', 'label': 'greeting'}, 'demonstrations', # a label of somebody's own
     '[dialogue: 32 tokens, 4 learnt]\n### Human: Hi\n### Assistant:⟦ Yo<|endoftext|>⟧\n'),
    ({'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'x', 'ended': [False, True]}, 'comparisons', # the first was cut off
     '[prompt: 28 tokens, 0 learnt]\n### Human: Hi\n### Assistant:\n[chosen: 3 tokens, 3 learnt]\n⟦ Yo⟧\n'
     '[rejected: 3 tokens, 3 learnt]\n⟦ x<|endoftext|>⟧\n'),
    ({'prompt': 'Hi', 'response': 'Yo', 'honest': 3, 'helpful': 7.5}, 'ratings',
     '[prompt: 28 tokens, 0 learnt]\n### Human: Hi\n### Assistant:\n[helpful 7.5, honest 3: 4 tokens, 4 learnt]\n'
     '⟦ Yo<|endoftext|>⟧\n'),
    ({'text': 'Hi'}, 'text', '[text: 3 tokens, 3 learnt]\n⟦Hi<|endoftext|>⟧\n'),
])
def test_peek_shows_the_mask(tmp_path, capsys, row, kind, expected):
    write_records(tmp_path / 'rows.jsonl', [row] * 3)
    out = shown(capsys, tmp_path / 'rows.jsonl', rows=2)
    assert out == (f"{tmp_path / 'rows.jsonl'}: 3 {kind}; ⟦learnt⟧ tokens look like this\n"
                   f'\nrow 1\n{expected}\nrow 2\n{expected}')

def test_peek_in_colour(tmp_path, capsys, monkeypatch):
    write_records(tmp_path / 'rows.jsonl', [{'prompt': 'Hi', 'chosen': 'Yo', 'rejected': 'x'}])
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.delenv('NO_COLOR', raising=False)
    out = shown(capsys, tmp_path / 'rows.jsonl')
    assert '\x1b[2m### Human: Hi\n### Assistant:\x1b[0m\n' in out # dim
    assert '\x1b[1;32m Yo\x1b[7m<|endoftext|>\x1b[27m\x1b[0m\n' in out # bold green, the end inverse
    assert '\x1b[1;31m x\x1b[7m<|endoftext|>\x1b[27m\x1b[0m\n' in out # rejected: red
    monkeypatch.setenv('NO_COLOR', '1')
    assert '\x1b' not in shown(capsys, tmp_path / 'rows.jsonl')

def test_peek_at_hostile_and_long_text(tmp_path, capsys):
    """Control characters cannot steer the terminal; a typed <|endoftext|> is many tokens, not learnt; a book is cut."""
    write_records(tmp_path / 'rows.jsonl', [{'prompt': 'a\x1b[2J<|endoftext|>\tb\n', 'response': 'ok'}])
    assert '[dialogue: 51 tokens, 4 learnt]\n### Human: a\\x1b[2J<|endoftext|>\tb\n\n' in shown(
        capsys, tmp_path / 'rows.jsonl') # 26 bytes of template, 1 + 4 + 13 + 3 of prompt, 3 of answer, its end
    (tmp_path / 'book.txt').write_text('x' * 1500)
    out = shown(capsys, tmp_path / 'book.txt')
    assert '[text: 1501 tokens, 1501 learnt]' in out and 'x' * 1000 + '⟧ … and 501 more' in out

def test_peek_as_its_user_calls_it(tmp_path, capsys):
    write_records(tmp_path / 'rows.jsonl', [{'prompt': '你好', 'response': '世界'}])
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'} # a terminal that cannot show it
    for how in (['-m', 'data.peek'], ['data/peek.py']):
        done = subprocess.run([sys.executable, *how, str(tmp_path / 'rows.jsonl'), '--tokenizer=bytes'],
                              cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and '### Human: \\u4f60\\u597d\n' in done.stdout, done.stderr
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'peek.py')], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr == "error: file must be a file of records, got ''\n"
    assert 'file must be a file of records' in stops(capsys, peek)
    assert 'rows must be at least 1' in stops(capsys, peek, file='x', rows=0)
    assert 'x.jsonl: no such file' in stops(capsys, peek, file=tmp_path / 'x.jsonl', tokenizer='bytes')
    assert 'first row with the keys question, turns' in stops(
        capsys, peek, file=lines(tmp_path / 'q.jsonl', '{"turns": [], "question": "a"}'), tokenizer='bytes')
    assert 'q.jsonl:1: wanted one JSON object a line' in stops(
        capsys, peek, file=lines(tmp_path / 'q.jsonl', '{broken'), tokenizer='bytes')

def test_a_plain_argument_is_the_file(capsys):
    """And never a config file."""
    assert peek.options(['--rows=1', 'a.py', '--tokenizer=bytes']) == ['--rows=1', '--file=a.py', '--tokenizer=bytes']
    assert peek.options(['--file=a.jsonl', '-h']) == ['--file=a.jsonl', '-h'] and peek.options([]) == []
    exits(capsys, 'wanted one file, got a.jsonl b.jsonl', peek.options, ['a.jsonl', 'b.jsonl'])
