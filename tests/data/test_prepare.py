"""
The prepare.py of each data set, on small files with counts by hand and on real files where they are present.

From there records go through the tokenizer and back. HH-RLHF has more tests of its own in test_hh_rlhf.py.
"""
import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

import data.alpaca.prepare as alpaca
import data.alpaca_eval.prepare as alpaca_eval
import data.hh_rlhf.prepare as hh_rlhf
import data.oasst1.prepare as oasst1
import data.shakespeare.prepare as shakespeare
import data.sharegpt.prepare as sharegpt
import data.trl.prepare as trl
from common.records import read_preferences, read_records
from common.tokens import dialogue, load_tokenizer, prompt_ids, response_ids, save_bpe
from data.bpe import train_bpe
from data.prepare_common import read_rows
from tiny import ROOT, assistant, run, stops, user

REAL = Path(ROOT).parent / 'shared' / 'data'

def real(name):
    if not (REAL / name).exists():
        pytest.skip(f'needs ../shared/data/{name}')
    return REAL / name

def system(text):
    return {'role': 'system', 'content': text}

def array(path, rows):
    """A JSON array, as ShareGPT and Alpaca have it."""
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding='utf-8')
    return path

def lines(path, rows):
    """JSON lines; a string is a line as it is."""
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows), encoding='utf-8')
    return path

def records(folder, kind, splits=('train', 'val')):
    return [r for split in splits for r in read_records(folder / f'{kind}_{split}.jsonl', kind)]

def in_any_order(rows):
    return sorted(rows, key=str)

def line_of(out, word, n, reason):
    """Whether `out` reports n places under this reason."""
    return f'{word:8s} {n:6d}  {reason}\n' in out

# ---------------------------------------------------------------------------------------------------------------------
# Alpaca

def test_alpaca_by_hand(tmp_path, capsys):
    source = array(tmp_path / 'a.json', [
        {'instruction': 'Name a tree.', 'input': '', 'output': 'Oak'},
        {'instruction': 'Sum up.', 'input': 'A long\ntext.', 'output': '  Short.\n'},
        {'instruction': 'Name a tree.', 'output': 'Elm'},                  # no input at all, a prompt seen before
        {'instruction': 'Say nothing.', 'input': '', 'output': ' '},
        {'instruction': '', 'input': 'x', 'output': 'y'},
        {'instruction': 'Go', 'input': None, 'output': 7},
        ['no', 'object'],
    ])
    run(alpaca, source=source, out_dir=tmp_path / 'out', val_fraction=0.5)
    out = capsys.readouterr().out
    assert line_of(out, 'left out', 1, 'output is empty') and f'{source}[3]' in out # rows are counted from 0
    assert line_of(out, 'left out', 1, 'instruction is empty') and line_of(out, 'left out', 2, 'malformed row')
    assert 'kept          3  of 7 rows in 1 file(s)' in out
    assert in_any_order(records(tmp_path / 'out', 'demonstrations')) == [
        {'prompt': 'Name a tree.', 'response': 'Elm'}, {'prompt': 'Name a tree.', 'response': 'Oak'},
        {'prompt': 'Sum up.\n\nA long\ntext.', 'response': 'Short.'}]
    assert in_any_order(r['prompt'] for r in records(tmp_path / 'out', 'prompts')) == [
        'Name a tree.', 'Sum up.\n\nA long\ntext.']

# ---------------------------------------------------------------------------------------------------------------------
# ShareGPT

def turns(*pairs):
    return {'id': 'x', 'conversations': [{'from': who, 'value': text} for who, text in pairs]}

def test_sharegpt_by_hand(tmp_path, capsys):
    source = array(tmp_path / 's.json', [
        turns(('human', 'a'), ('gpt', 'b')),
        turns(('system', 'Be kind.'), ('human', 'c'), ('gpt', 'd'), ('human', 'e'), ('gpt', 'f')),
        turns(('gpt', 'lost'), ('human', 'g'), ('gpt', 'h'), ('human', 'unanswered')), # cut at both ends
        turns(('system', 'Be brief.'), ('user', 'i'), ('chatgpt', 'j')),
        turns(('human', 'a'), ('human', 'b'), ('gpt', 'c')),                           # 4
        turns(('human', 'a'), ('gpt', ' ')),                                           # 5
        turns(('human', 'a')),                                                         # 6
        turns(('gpt', 'a')),                                                           # 7
        turns(('human', 'a'), ('bing', 'b')),                                          # 8
        {'id': 'x', 'conversations': [{'from': 'human'}]},                             # 9
        {'id': 'x'}, turns(),                                                          # 10, 11
    ])
    run(sharegpt, source=source, out_dir=tmp_path / 'out', val_fraction=0.5)
    out = capsys.readouterr().out
    for n, reason in ((2, 'turns do not alternate, or one is empty'), (3, 'no question with an answer'),
                      (1, "speaker 'bing'"), (2, 'malformed row')):
        assert line_of(out, 'left out', n, reason), (reason, out)
    for reason in ('an answer before the first question', 'a turn after the last answer'):
        assert line_of(out, 'cut', 1, reason)
    assert 'kept          4  of 12 conversations in 1 file(s)' in out
    assert in_any_order(records(tmp_path / 'out', 'demonstrations')) == in_any_order([
        {'prompt': 'a', 'response': 'b'},
        {'messages': [system('Be kind.'), user('c'), assistant('d'), user('e'), assistant('f')]},
        {'prompt': 'g', 'response': 'h'},
        {'messages': [system('Be brief.'), user('i'), assistant('j')]}])
    assert in_any_order(records(tmp_path / 'out', 'prompts')) == in_any_order([
        {'prompt': 'a'}, {'prompt': [system('Be kind.'), user('c'), assistant('d'), user('e')]}, {'prompt': 'g'},
        {'prompt': [system('Be brief.'), user('i')]}])

# ---------------------------------------------------------------------------------------------------------------------
# OASST1

def message(text, role, replies=(), **more):
    return {'message_id': text, 'text': text, 'role': role, 'lang': 'en', 'review_result': True, 'deleted': False,
            'replies': list(replies)} | more

def says(text, *replies, **more):
    return message(text, 'prompter', replies, **more)

def answers(text, rank, *replies, **more):
    return message(text, 'assistant', replies, **({} if rank is None else {'rank': rank}) | more)

def tree(prompt, state='ready_for_export'):
    return {'message_tree_id': prompt['text'], 'tree_state': state, 'prompt': prompt}

TREES = [
    tree(says('Q1',
              answers('second', 1, says('Why?', answers('because', None))),
              answers('best', 0,
                      says('More?', answers('m2', 2), answers('m0', 0, says('never seen'), deleted=True),
                           answers('m1', 1)),
                      says('Thanks'), says('Hola', lang='es')),
              answers('unranked', None))),
    tree(says('Q2', answers('x', 0), answers('y', 0))), # a tie orders nothing
    tree(says('Q3', answers('p', None), answers('q', None))), # which one is the best?
    tree(says('Q4', answers('no', 0)), 'aborted_low_grade'),
    tree(says('Q5', answers('no', 0), review_result=False)),
    tree(says('Q6', answers('nein', 0), lang='de')),
    tree(says('Q7', answers('ja', 0, lang='de'), answers('', 1), says('two users'), 'not a message')),
]
MORE = [user('Q1'), assistant('best'), user('More?')]
KEPT = {
    'demonstrations': [{'prompt': 'Q1', 'response': 'best'}, {'prompt': MORE, 'response': 'm1'},
                       {'prompt': 'Q2', 'response': 'x'}],
    'rankings': [{'prompt': 'Q1', 'responses': ['best', 'second'], 'ranks': [0, 1]},
                 {'prompt': MORE, 'responses': ['m1', 'm2'], 'ranks': [0, 1]}], # 1 and 2, numbered anew
    'prompts': [{'prompt': 'Q1'}, {'prompt': [user('Q1'), assistant('second'), user('Why?')]}, {'prompt': MORE},
                {'prompt': MORE[:2] + [user('Thanks')]}, {'prompt': 'Q2'}, {'prompt': 'Q3'}, {'prompt': 'Q7'}],
}

def read_all(folder):
    """All records in a folder by kind; not every kind is in every split."""
    found = {}
    for path in folder.glob('*.jsonl'):
        kind = path.stem.split('_')[0]
        found[kind] = found.get(kind, []) + read_records(path, kind)
    return found

def assert_kept(folder, kept):
    found = read_all(folder)
    assert found.keys() == kept.keys()
    for kind in kept:
        assert in_any_order(found[kind]) == in_any_order(kept[kind]), kind

def test_oasst1_by_hand(tmp_path, capsys):
    source = lines(tmp_path / 'trees.jsonl', TREES)
    run(oasst1, source=source, out_dir=tmp_path / 'out', val_fraction=0.25)
    out = capsys.readouterr().out
    for reason in ('tree is aborted_low_grade, not ready_for_export', 'begins with: message that failed its review',
                   'begins with: message in another language'):
        assert line_of(out, 'left out', 1, reason), out
    # Hola and ja; m0; the third answer to Q1 and both to Q3; '' and 'two users' and the string
    for n, reason in ((2, 'message in another language'), (1, 'deleted message'), (3, 'unranked answer beside others'),
                      (1, 'empty message'), (1, 'roles that do not alternate'), (1, 'malformed message')):
        assert line_of(out, 'cut', n, reason), (reason, out)
    assert 'kept          4  of 7 trees in 1 file(s)' in out
    assert_kept(tmp_path / 'out', KEPT)
    assert sum(int(line.split(' pairs')[0].split()[-1]) for line in out.splitlines() if ' pairs' in line) == 2

def test_oasst1_pairs(tmp_path, capsys):
    """Ranks 0 1 1 2: of the six pairs of four answers one is a tie. Any language is kept with --lang=."""
    source = lines(tmp_path / 'trees.jsonl', [
        tree(says(f'Q{i}', *(answers(f'{i}{k}', rank, lang=lang) for k, rank in enumerate((2, 0, 1, 1))), lang=lang))
        for i, lang in enumerate(('fr', 'zh'))])
    run(oasst1, source=source, out_dir=tmp_path / 'out', lang='', val_fraction=0.5)
    out = capsys.readouterr().out
    assert out.count('4 answers in 1 rankings make 5 pairs') == 2
    ranking = next(r for r in records(tmp_path / 'out', 'rankings') if r['prompt'] == 'Q0')
    assert ranking == {'prompt': 'Q0', 'responses': ['01', '02', '03', '00'], 'ranks': [0, 1, 1, 2]}
    assert 'wanted trees for both splits, got 0' in stops(capsys, oasst1, source=source, out_dir=tmp_path / 'no')
    run(oasst1, source=source, out_dir=tmp_path / 'both', lang='zh,fr', val_fraction=0.5)
    assert len(records(tmp_path / 'both', 'rankings')) == 2

def test_oasst1_flat_messages_are_the_same_trees(tmp_path, capsys):
    levels = [[] for _ in range(6)]

    def flatten(m, parent, state, depth):
        id = f"{parent} {m['text']}"
        levels[depth].append(m | {'replies': None, 'message_id': id, 'parent_id': parent, 'tree_state': state})
        for reply in m['replies']:
            flatten(reply, id, state, depth + 1)

    for t in TREES[:-1]: # the last has a string for a message
        flatten(t['prompt'], None, t['tree_state'], 0)
    rows = sum(levels[::-1], []) # children before their parents
    said = {'text': 'a', 'role': 'assistant', 'lang': 'en'}
    message = lambda name, parent: said | {'message_id': name, 'parent_id': parent}
    rows += [message('lost', 'nowhere'), message('reply to it', 'lost'), message('hen', 'egg'), message('egg', 'hen'),
             message('lost', 'egg')]
    with gzip.open(tmp_path / 'messages.jsonl.gz', 'wt') as file:
        file.writelines(json.dumps(row) + '\n' for row in rows)
    run(oasst1, source=tmp_path / 'messages.jsonl.gz', out_dir=tmp_path / 'out', val_fraction=0.3)
    out = capsys.readouterr().out
    assert line_of(out, 'left out', 1, 'no tree, and no message whose parent is there')
    assert line_of(out, 'left out', 3, 'reply in no tree') # to the lost one, and two that are their own ancestors
    assert line_of(out, 'left out', 1, 'message_id that another message has')
    assert_kept(tmp_path / 'out', KEPT | {'prompts': KEPT['prompts'][:-1]})

def test_oasst1_messages_that_hold_their_replies(tmp_path, capsys):
    """Rows of messages with and without ids; one that stands both inside of a row and alone counts once."""
    roots = [t['prompt'] for t in TREES[:-1]] # the last has a string for a message
    again = next(m for m in roots[0]['replies'] if m['text'] == 'best') | {'parent_id': 'Q1'}
    bare = [{k: v for k, v in m.items() if k != 'message_id'} for m in roots[1:]]
    for name, rows, left_out in (('ids', roots + [again], 1), ('none', roots[:1] + bare, 0)):
        run(oasst1, source=lines(tmp_path / f'{name}.jsonl', rows), out_dir=tmp_path / name, val_fraction=0.3)
        assert line_of(capsys.readouterr().out, 'left out', 1, 'message_id that another message has') == left_out
        found = {kind: {r['prompt'] for r in rows if isinstance(r['prompt'], str)}
                 for kind, rows in read_all(tmp_path / name).items()}
        # Q4 is of a tree that was aborted, which a message alone does not say
        assert found == {'demonstrations': {'Q1', 'Q2', 'Q4'}, 'rankings': {'Q1'}, 'prompts': {'Q1', 'Q2', 'Q3', 'Q4'}}
        kept = [r for r in read_all(tmp_path / name)['rankings'] if r['prompt'] == MORE]
        assert kept == [KEPT['rankings'][1]]

def test_oasst1_reads_one_file_alone(tmp_path, capsys):
    for name in 'ab':
        lines(tmp_path / f'{name}.jsonl', TREES)
    assert 'wanted one file (those of OASST1 repeat' in stops(capsys, oasst1, source=tmp_path, out_dir=tmp_path / 'o')

def test_oasst1_deep_tree(tmp_path):
    """A thread longer than Python's recursion limit, as single messages."""
    rows = [{'message_id': str(i), 'parent_id': str(i - 1) if i else None, 'text': f't{i}', 'lang': 'en',
             'role': ('prompter', 'assistant')[i % 2]} for i in range(400)]
    rows.append({'message_id': 'other', 'parent_id': None, 'text': 'short', 'role': 'prompter', 'lang': 'en'})
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(300)
        run(oasst1, source=lines(tmp_path / 'm.jsonl', rows), out_dir=tmp_path / 'out', val_fraction=0.5)
    finally:
        sys.setrecursionlimit(limit)
    assert len(read_all(tmp_path / 'out')['prompts']) == 201 # 200 in the thread, and the other one

# ---------------------------------------------------------------------------------------------------------------------
# TRL

SKY = [user('What color is the sky?')]
ABC = [user('a'), assistant('b'), user('c')]

@pytest.mark.parametrize('row, expected', [
    # standard, explicit prompt
    ({'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.', 'margin': 0.5, 'id': 3},
     {'comparisons': [{'prompt': 'The sky is', 'chosen': 'blue.', 'rejected': 'green.', 'margin': 0.5}],
      'demonstrations': [{'prompt': 'The sky is', 'response': 'blue.'}], 'prompts': [{'prompt': 'The sky is'}]}),
    # standard, implicit prompt: no torn word
    ({'chosen': 'The sky is blue.', 'rejected': 'The sky is black.'},
     {'comparisons': [{'prompt': 'The sky is', 'chosen': 'blue.', 'rejected': 'black.'}],
      'demonstrations': [{'prompt': 'The sky is', 'response': 'blue.'}], 'prompts': [{'prompt': 'The sky is'}]}),
    # Chinese has no spaces: where they part, even where a space came before
    ({'chosen': '问题 天空是蓝色的', 'rejected': '问题 天空是绿色的'},
     {'comparisons': [{'prompt': '问题 天空是', 'chosen': '蓝色的', 'rejected': '绿色的'}],
      'demonstrations': [{'prompt': '问题 天空是', 'response': '蓝色的'}], 'prompts': [{'prompt': '问题 天空是'}]}),
    # conversational, explicit and implicit
    ({'prompt': SKY, 'chosen': [assistant('It is blue.')], 'rejected': [assistant('It is green.')]},
     {'comparisons': [{'prompt': SKY[0]['content'], 'chosen': 'It is blue.', 'rejected': 'It is green.'}],
      'demonstrations': [{'prompt': SKY[0]['content'], 'response': 'It is blue.'}],
      'prompts': [{'prompt': SKY[0]['content']}]}),
    ({'chosen': [system('s'), *ABC, assistant('d')], 'rejected': [system('s'), *ABC, assistant('e')]},
     {'comparisons': [{'prompt': [system('s'), *ABC], 'chosen': 'd', 'rejected': 'e'}],
      'demonstrations': [{'prompt': [system('s'), *ABC], 'response': 'd'}],
      'prompts': [{'prompt': [system('s'), *ABC]}]}),
    # UltraFeedback binarised: the prompt once more at the head of each conversation
    ({'prompt': 'a', 'chosen': [user('a'), assistant('b')], 'rejected': [user('a'), assistant('c')], 'score_chosen': 8},
     {'comparisons': [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}],
      'demonstrations': [{'prompt': 'a', 'response': 'b'}], 'prompts': [{'prompt': 'a'}]}),
    # prompt and completion
    ({'prompt': 'The sky is', 'completion': ' blue.'},
     {'demonstrations': [{'prompt': 'The sky is', 'response': 'blue.'}], 'prompts': [{'prompt': 'The sky is'}]}),
    # both answers of the completion are learnt, the one in the prompt is not
    ({'prompt': ABC, 'completion': [assistant('d'), user('e'), assistant('f')]},
     {'demonstrations': [{'prompt': ABC, 'response': 'd'},
                         {'prompt': ABC + [assistant('d'), user('e')], 'response': 'f'}],
      'prompts': [{'prompt': ABC}]}),
    # prompt only
    ({'prompt': 'The sky is'}, {'prompts': [{'prompt': 'The sky is'}]}),
    ({'prompt': [system('s'), *SKY]}, {'prompts': [{'prompt': [system('s'), *SKY]}]}),
    # language modelling
    ({'text': ' The sky is blue.'}, {'text': [{'text': ' The sky is blue.'}]}),
    ({'messages': [system('s'), *SKY, assistant('Blue.')]},
     {'demonstrations': [{'messages': [system('s'), *SKY, assistant('Blue.')]}],
      'prompts': [{'prompt': [system('s'), *SKY]}]}),
])
def test_trl_formats(row, expected):
    assert trl.parse_row(row).records == expected

@pytest.mark.parametrize('row, reason', [
    ({'chosen': 'a b', 'rejected': 'a b'}, 'chosen equals rejected'),
    ({'prompt': 'a', 'chosen': [user('b')], 'rejected': [user('c')]}, 'does not end in an answer'),
    ({'chosen': [user('a'), assistant('b')], 'rejected': [user('c'), assistant('d')]}, 'more than their last turn'),
    ({'chosen': [user('a'), assistant('b')], 'rejected': [user('a')]}, 'more than their last turn'),
    ({'prompt': 'a', 'chosen': 3, 'rejected': 'b'}, 'malformed row'),
    ({'prompt': 'a', 'chosen': [{'role': 'tool', 'content': 'b'}], 'rejected': 'c'}, "role 'tool'"),
    ({'prompt': [{'role': 'user', 'content': [{'type': 'image'}]}]}, 'a message is not a role and a text'),
    ({'prompt': 'a', 'completion': [user('b')]}, 'completion without an answer'),
    ({'prompt': 'a', 'completion': 'b', 'label': 'yes'}, 'label is not true or false'),
    ({'prompt': 'a', 'completions': ['b'], 'labels': [True]}, 'keys of no format that is read: completions, labels'),
    ({'messages': [user('a')]}, 'no question with an answer'),
    ({'question': 'a'}, 'keys of no format that is read: question'),
])
def test_trl_rows_that_give_nothing(row, reason):
    with pytest.raises(ValueError, match=reason):
        trl.parse_row(row)

def test_trl_unpaired_preferences(tmp_path, capsys):
    rows = [{'prompt': p, 'completion': c, 'label': label} for p, c, label in (
        ('a', 'good', True), ('b', 'bad', False), ('a', 'poor', False), ('a', 'fine', True), ('c', 'nice', True),
        ('d', '', False))]
    rows += ['{broken', {'prompt': [assistant('x')]}]
    run(trl, source=lines(tmp_path / 'kto.jsonl', rows), out_dir=tmp_path / 'out', val_fraction=0.4)
    out = capsys.readouterr().out
    assert_kept(tmp_path / 'out', {
        'rankings': [{'prompt': 'a', 'responses': ['good', 'poor', 'fine'], 'ranks': [0, 1, 0]}],
        'demonstrations': [{'prompt': 'a', 'response': 'good'}, {'prompt': 'a', 'response': 'fine'},
                           {'prompt': 'c', 'response': 'nice'}],
        'unpaired': [{'prompt': p, 'response': c, 'label': label} for p, c, label in (
            ('a', 'good', True), ('b', 'bad', False), ('a', 'poor', False), ('a', 'fine', True), ('c', 'nice', True))],
        'prompts': [{'prompt': 'a'}, {'prompt': 'b'}, {'prompt': 'c'}]})
    assert line_of(out, 'left out', 1, 'malformed row') and 'kept          5  of 8 rows' in out
    assert line_of(out, 'left out', 1, 'wanted `response` to be text that is not empty')
    assert line_of(out, 'left out', 1, 'wanted `prompt` to end in the turn of the user')

def test_trl_needs_a_source(tmp_path, capsys):
    assert stops(capsys, trl, repo='a/b').startswith('source must be a file or folder, or else --repo and --file')

# ---------------------------------------------------------------------------------------------------------------------
# what all share

ROWS = {
    alpaca: lambda q, a: {'instruction': q, 'input': '', 'output': a},
    sharegpt: lambda q, a: turns(('human', q), ('gpt', a)),
    oasst1: lambda q, a: tree(says(q, answers(a, 0), answers(a + '!', 1))),
    trl: lambda q, a: {'prompt': q, 'chosen': a, 'rejected': a + '!'},
    hh_rlhf: lambda q, a: {key: f'\n\nHuman: {q}\n\nAssistant: {x}'
                           for key, x in (('chosen', a), ('rejected', a + '!'))},
}
NAMES = [module.__name__.split('.')[1] for module in ROWS]

@pytest.mark.parametrize('script', ROWS, ids=NAMES)
def test_one_prompt_is_in_one_split_and_the_same_every_time(tmp_path, capsys, script):
    source = lines(tmp_path / 'rows.jsonl', [ROWS[script](f'q{i % 20}', f'a{i}') for i in range(100)])
    for name, seed in (('one', 1), ('two', 1), ('other', 2)):
        run(script, source=source, out_dir=tmp_path / name, val_fraction=0.2, seed=seed)
    train, val = (records(tmp_path / 'one', 'demonstrations', [s]) for s in ('train', 'val'))
    assert len(train) == 80 and len(val) == 20 # 16 and 4 prompts of 5 rows each
    assert not {r['prompt'] for r in train} & {r['prompt'] for r in val}
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ('one', 'two', 'other')}
    assert files['one'] == files['two'] != files['other']

@pytest.mark.parametrize('script', ROWS, ids=NAMES)
def test_held_out_files_make_val(tmp_path, capsys, script):
    if script is oasst1:
        pytest.skip('reads one file alone')
    (tmp_path / 'in').mkdir()
    lines(tmp_path / 'in' / 'train.jsonl', [ROWS[script](f'q{i}', 'a') for i in range(5)])
    lines(tmp_path / 'in' / 'validation.jsonl', [ROWS[script](f'q{i}', 'a') for i in range(4, 6)])
    run(script, source=tmp_path / 'in', out_dir=tmp_path / 'out')
    assert [r['prompt'] for r in records(tmp_path / 'out', 'prompts', ['val'])] == ['q4', 'q5']
    assert [r['prompt'] for r in records(tmp_path / 'out', 'prompts', ['train'])] == ['q0', 'q1', 'q2', 'q3']
    assert line_of(capsys.readouterr().out, 'left out', 1, 'prompt is in the test files too')

def test_other_files_beside_train_and_test_are_named_and_not_read(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    for name in ('train', 'test', 'all'):
        lines(tmp_path / 'in' / f'{name}.jsonl', [{'prompt': f'{name}{i}', 'completion': 'a'} for i in range(3)])
    run(trl, source=tmp_path / 'in', out_dir=tmp_path / 'out')
    assert f"not read         {tmp_path / 'in' / 'all.jsonl'}" in capsys.readouterr().out
    assert [r['prompt'] for r in records(tmp_path / 'out', 'prompts', ['train'])] == ['train0', 'train1', 'train2']
    assert 'out_dir must be another folder than the source' in stops(
        capsys, trl, source=tmp_path / 'in', out_dir=tmp_path / 'in')

def test_a_prompt_asked_most_often_is_not_held_out(tmp_path):
    """30 of 40 rows share a first question: val is to be a fifth of the rows, not three quarters."""
    for seed in range(5):
        source = array(tmp_path / 's.json', [turns(('human', 'hi' if i < 30 else f'q{i}'), ('gpt', f'a{i}'))
                                             for i in range(40)])
        run(sharegpt, source=source, out_dir=tmp_path / 'out', val_fraction=0.2, seed=seed)
        assert len(records(tmp_path / 'out', 'demonstrations', ['val'])) == 2 # a fifth of the 11 questions, rounded

@pytest.mark.parametrize('script', ROWS, ids=NAMES)
@pytest.mark.parametrize('name, content, message', [
    ('none.jsonl', None, 'none.jsonl: wanted a file'),
    ('empty.jsonl', '', 'got 0 for train and 0 for val'),
    ('bad.jsonl', '{"a": 1}\n{broken\n', 'got 0 for train and 0 for val'),
    ('bad.json', '[{"a": 1},\n {"b" 2}]', "wanted a JSON array of objects: Expecting ':' delimiter at line 2"),
    ('nan.json', '[{"a": NaN}]', 'nan.json: wanted a finite number, got NaN'),
    ('latin.json', '[{"a": "\xe9"}]'.encode('latin-1'), 'latin.json: wanted UTF-8 text'),
    ('plain.jsonl.gz', '{}', 'plain.jsonl.gz:1: cannot be read'),
    ('rows.parquet', 'PAR1', 'rows.parquet: wanted JSON or JSON lines'),
])
def test_bad_input_writes_nothing(tmp_path, capsys, script, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in stops(capsys, script, source=tmp_path / name, out_dir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()

def test_a_malformed_row_says_what_is_wrong(tmp_path, capsys):
    rows = ['{"prompt": "a", "completion": NaN}', '{"prompt": "\\ud83d", "completion": "b"}', '{"prompt": "a",', '[]',
            '{"prompt": "a", "completion": 3}', '[]', *(dict(prompt=x, completion='b') for x in 'ab')]
    source = lines(tmp_path / 'rows.jsonl', rows)
    run(trl, source=source, out_dir=tmp_path / 'out')
    out = capsys.readouterr().out
    assert line_of(out, 'left out', 6, 'malformed row')
    assert f'\n{"":17s}2 wanted a JSON object, got list ({source}:4)\n{"":17s}1 wanted a finite number, got NaN' in out
    for script, row, wanted in ((trl, {'prompt': 3}, 'wanted a text or messages, got int'),
                                (trl, {'conversations': [{'from': 'human'}]}, 'wanted `from` and `value` of a turn'),
                                (alpaca, {'instruction': 'a'}, 'wanted `output`'),
                                (alpaca, {'instruction': 'a', 'output': None}, 'wanted text, got nothing'),
                                (sharegpt, {'messages': []}, 'wanted `conversations` to be a list'),
                                (hh_rlhf, {'chosen': 'a'}, r'wanted `chosen` and `rejected` to be texts with "\n')):
        assert f'; 2 left out: {wanted}' in stops(
            capsys, script, source=lines(tmp_path / 'bad.jsonl', [row, row, '{']), out_dir=tmp_path / 'no')

@pytest.mark.parametrize('script', ROWS, ids=NAMES)
def test_what_is_no_data_is_named(tmp_path, capsys, script):
    (tmp_path / 'rows.jsonl.gz').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    assert 'rows.jsonl.gz: a Git LFS pointer, not the file itself' in stops(
        capsys, script, source=tmp_path / 'rows.jsonl.gz', out_dir=tmp_path / 'no')
    (tmp_path / 'rows.json').write_text(json.dumps(ROWS[script]('q', 'a')), encoding='utf-16')
    assert 'rows.json: wanted UTF-8 text, got UTF-16' in stops(
        capsys, script, source=tmp_path / 'rows.json', out_dir=tmp_path / 'no')

def test_csv(tmp_path, capsys):
    """Numbers and labels by their column, messages by their bracket, all else is text."""
    (tmp_path / 'rows.csv').write_bytes('\ufeffprompt,chosen,rejected,margin\r\n"a, b","1\n2",[3],0.5\r\nq,x,y,\r\n'
                                        'r,"[{\'role\': \'assistant\', \'content\': \'x\'}]",y,1\r\ns,x,y,1,2\r\n'
                                        't,"[{broken",y,1\r\nu,x\r\n'.encode())
    run(trl, source=tmp_path / 'rows.csv', out_dir=tmp_path / 'out')
    assert in_any_order(records(tmp_path / 'out', 'comparisons')) == in_any_order([
        dict(prompt='a, b', chosen='1\n2', rejected='[3]', margin=.5), dict(prompt='q', chosen='x', rejected='y'),
        dict(prompt='r', chosen='x', rejected='y', margin=1)])
    out = capsys.readouterr().out
    for said in ('1 wanted as many cells as the header has', '1 wanted a list of messages in `chosen`',
                 'left out      1  keys of no format that is read: chosen, prompt\n'):
        assert said in out
    with gzip.open(tmp_path / 'kto.csv.gz', 'wt') as file:
        file.write('prompt,completion,label\na,x,True\nb,y,false\nc,z,maybe\n')
    run(trl, source=tmp_path / 'kto.csv.gz', out_dir=tmp_path / 'kto')
    assert [r['label'] for r in in_any_order(records(tmp_path / 'kto', 'unpaired'))] == [True, False]
    (tmp_path / 'latin.csv').write_bytes('prompt\nna\xefve\n'.encode('latin-1'))
    assert 'latin.csv:2: wanted CSV in UTF-8: ' in stops(
        capsys, trl, source=tmp_path / 'latin.csv', out_dir=tmp_path / 'no')

def test_parquet(tmp_path, capsys):
    parquet = pytest.importorskip('pyarrow.parquet', reason='reads parquet')
    import pyarrow
    rows = [{'prompt': f'q{i}', 'chosen': [user(f'q{i}'), assistant('x')], 'rejected': [user(f'q{i}'), assistant('y')],
             'margin': float('nan'), 'note': None} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'rows.parquet')
    run(trl, source=tmp_path / 'rows.parquet', out_dir=tmp_path / 'out')
    assert in_any_order(records(tmp_path / 'out', 'comparisons')) == [
        dict(prompt=f'q{i}', chosen='x', rejected='y') for i in range(3)]

def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    (tmp_path / 'rows.parquet').write_bytes(b'PAR1')
    assert stops(capsys, trl, source=tmp_path / 'rows.parquet', out_dir=tmp_path / 'no').endswith(
        'or the package pyarrow, which reads parquet')

@pytest.mark.parametrize('script', [shakespeare, alpaca_eval], ids=['shakespeare', 'alpaca_eval'])
def test_a_missing_source_touches_nothing(tmp_path, capsys, script):
    line = stops(capsys, script, source=tmp_path / 'none.txt', out_dir=tmp_path / 'out')
    assert line.startswith(f"--source={tmp_path / 'none.txt'}: wanted a ") and line.endswith('there is none')
    assert not (tmp_path / 'out').exists()

def test_bad_options(tmp_path, capsys):
    source = lines(tmp_path / 'rows.jsonl', [ROWS[alpaca](f'q{i}', 'a') for i in range(9)])
    assert 'val_fraction must be between 0 and 1, got 1.5' in stops(capsys, alpaca, source=source, val_fraction=1.5)
    assert 'seed must be at least 0' in stops(capsys, alpaca, source=source, seed=-1)
    (tmp_path / 'sub').mkdir()
    assert 'found none in' in stops(capsys, alpaca, source=tmp_path / 'sub')
    (tmp_path / 'file').write_text('in the way')
    assert 'file: cannot be written' in stops(capsys, alpaca, source=source, out_dir=tmp_path / 'file')

def test_records_of_an_earlier_run_are_named(tmp_path, capsys):
    rows = [ROWS[trl](f'q{i}', f'a{i}') for i in range(9)]
    run(trl, source=lines(tmp_path / 'a.jsonl', rows), out_dir=tmp_path / 'out')
    assert 'there from' not in capsys.readouterr().out
    run(trl, source=lines(tmp_path / 'b.jsonl', [{'prompt': r['prompt']} for r in rows]), out_dir=tmp_path / 'out')
    assert ('there from an earlier run: comparisons_train.jsonl, comparisons_val.jsonl, demonstrations_train.jsonl, '
            'demonstrations_val.jsonl\n') in capsys.readouterr().out

def test_arrays_and_lines_are_told_by_their_first_character(tmp_path):
    rows = [{'a': 1}, {'a': '\u3000全'}]
    (tmp_path / 'bom.json').write_bytes(b'\xef\xbb\xbf \n' + json.dumps(rows).encode())
    assert [row for _, row in read_rows(array(tmp_path / 'a.jsonl', rows))] == rows # whatever its name
    assert [row for _, row in read_rows(lines(tmp_path / 'b.json', rows))] == rows
    assert [row for _, row in read_rows(tmp_path / 'bom.json')] == rows
    half = tmp_path / 'half.json'
    half.write_text('[{"a": "\\ud83d"}, 3, {"a": 1}]')
    assert list(read_rows(half)) == [(f'{half}[0]', None), (f'{half}[1]', None), (f'{half}[2]', {'a': 1})]

# ---------------------------------------------------------------------------------------------------------------------
# other scripts than Latin

TEXTS = ['你好，世界！　全角空格', '👩‍👩‍👧 und 🙂', 'مرحبا بالعالم، كيف الحال؟', 'नमस्ते दुनिया',
         'e\u0301 ist nicht é', '日本語のテキスト。', 'שלום עולם', 'ภาษาไทยไม่มีช่องว่าง', '\u3000段落从全角空格开始']

@pytest.fixture(params=['bytes', 'bpe', 'gpt2'])
def tok(request, monkeypatch, tmp_path):
    if request.param == 'bpe':
        save_bpe(train_bpe(['你好世界你好世界 مرحبا مرحبا hello'], 280), tmp_path / 'own.tiktoken')
        return load_tokenizer(str(tmp_path / 'own.tiktoken'))
    if request.param == 'gpt2' and not os.environ.get('TIKTOKEN_CACHE_DIR'):
        if not (REAL.parent / 'tiktoken_cache').exists():
            pytest.skip("needs ../shared/tiktoken_cache, tiktoken's two GPT-2 files")
        monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(REAL.parent / 'tiktoken_cache'))
    return load_tokenizer(request.param)

@pytest.mark.parametrize('script', ROWS, ids=NAMES)
def test_every_script_goes_through_unharmed(tmp_path, script, tok):
    source = lines(tmp_path / 'rows.jsonl', [json.dumps(ROWS[script](text, text[::-1] + text), ensure_ascii=i % 2)
                                             for i, text in enumerate(TEXTS)]) # half of them written as \u escapes
    out = tmp_path / 'out'
    run(script, source=source, out_dir=out, val_fraction=0.3)
    demonstrations = records(out, 'demonstrations')
    assert in_any_order((r['prompt'], r['response']) for r in demonstrations) == in_any_order(
        (text, text[::-1] + text) for text in TEXTS)
    assert '\\u' not in (out / 'demonstrations_train.jsonl').read_text(encoding='utf-8') # readable in an editor
    for r in demonstrations:
        ids, mask = dialogue(tok, r)
        assert tok.decode(ids) == f"### Human: {r['prompt']}\n### Assistant: {r['response']}"
        learnt = [i for i, m in zip(ids, mask) if m]
        assert tok.decode(learnt) == ' ' + r['response'] and learnt[-1] == tok.eos
    if (out / 'comparisons_train.jsonl').exists() or (out / 'rankings_train.jsonl').exists():
        kind = 'comparisons' if (out / 'comparisons_train.jsonl').exists() else 'rankings'
        for split in ('train', 'val'):
            for r in read_preferences(out / f'{kind}_{split}.jsonl'):
                assert r['responses'] == [r['prompt'][::-1] + r['prompt'] + end for end in ('', '!')]
                assert [tok.decode(response_ids(tok, x)) for x in r['responses']] == [' ' + x for x in r['responses']]
    for r in records(out, 'prompts'):
        assert tok.decode(prompt_ids(tok, r['prompt'])) == f"### Human: {r['prompt']}\n### Assistant:"

# ---------------------------------------------------------------------------------------------------------------------
# from the hub: its cache, filled by hand, without a network

def from_the_hub(cache, script, *args):
    env = {**os.environ, 'HF_HUB_CACHE': str(cache), 'HF_HUB_OFFLINE': '1'}
    return subprocess.run([sys.executable, f'data/{script}/prepare.py', *args], cwd=ROOT, env=env, capture_output=True,
                          text=True)

def test_fetches_from_the_hubs_cache(tmp_path):
    pytest.importorskip('huggingface_hub')
    repo = tmp_path / 'cache' / 'datasets--Anthropic--hh-rlhf'
    folder = repo / 'snapshots' / ('0' * 40) / 'helpful-online'
    folder.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    for split, numbers in (('train', range(5)), ('test', range(5, 7))):
        with gzip.open(folder / f'{split}.jsonl.gz', 'wt') as file:
            file.writelines(json.dumps(ROWS[hh_rlhf](f'q{i}', 'yes')) + '\n' for i in numbers)
    done = from_the_hub(tmp_path / 'cache', 'hh_rlhf', '--subsets=helpful-online', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    assert 'helpful-online/train.jsonl.gz; expected: 22007\n' in done.stdout
    assert 'helpful-online/test.jsonl.gz; expected: 1137\n' in done.stdout
    assert [r['prompt'] for r in records(tmp_path / 'out', 'prompts')] == [f'q{i}' for i in range(7)]
    done = from_the_hub(tmp_path / 'cache', 'hh_rlhf', f'--out_dir={tmp_path / "no"}') # the other three are not there
    assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    assert 'Anthropic/hh-rlhf' in done.stderr and 'helpful-base/train.jsonl.gz' in done.stderr
    assert not (tmp_path / 'no').exists()

@pytest.mark.parametrize('script, repo, file, args', [
    (alpaca, 'yahma/alpaca-cleaned', 'alpaca_data_cleaned.json', {}),
    (sharegpt, 'anon8231489123/ShareGPT_Vicuna_unfiltered', 'ShareGPT_V3_unfiltered_cleaned_split.json', {}),
    (oasst1, 'OpenAssistant/oasst1', '2023-04-12_oasst_ready.trees.jsonl.gz', {}),
    (trl, 'a/b', 'c.jsonl', {'repo': 'a/b', 'file': 'c.jsonl'}),
], ids=['alpaca', 'sharegpt', 'oasst1', 'trl'])
def test_what_is_asked_of_the_hub(tmp_path, monkeypatch, script, repo, file, args):
    source = lines(tmp_path / 'rows.jsonl', [ROWS[script](f'q{i}', 'a') for i in range(4)])
    asked = []

    def fetch_from_hub(repo_id, filename, repo_type='model'):
        asked.append((repo_id, filename, repo_type))
        return str(source)

    monkeypatch.setattr('data.prepare_common.fetch_from_hub', fetch_from_hub)
    run(script, out_dir=tmp_path / 'out', **args)
    assert asked == [(repo, file, 'dataset')] and len(records(tmp_path / 'out', 'prompts')) == 4

# ---------------------------------------------------------------------------------------------------------------------
# from a web server: one on this machine stands in for GitHub

@pytest.fixture
def site(tmp_path, monkeypatch):
    """Serve tmp_path/site; return the folder and its address."""
    folder = tmp_path / 'site'
    folder.mkdir()
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    handler = partial(quiet, directory=str(folder))
    monkeypatch.setenv('no_proxy', '*')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

def test_shakespeare(tmp_path, capsys, monkeypatch, site):
    """From a file, from the net, and one line where there is none."""
    text = 'First Citizen:\nBefore we proceed – hear me.\n'
    out = tmp_path / 'out' / 'input.txt'
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    run(shakespeare, source=tmp_path / 'a.txt', out_dir=out.parent)
    assert out.read_text(encoding='utf-8') == text and f'{out}: 44 characters\n' in capsys.readouterr().out
    folder, address = site
    (folder / 'input.txt').write_text('All:\nSpeak.\n', encoding='utf-8')
    monkeypatch.setattr(shakespeare, 'URL', address + '/input.txt')
    run(shakespeare, out_dir=out.parent)
    assert out.read_text(encoding='utf-8') == 'All:\nSpeak.\n'
    (folder / 'input.txt').write_bytes(b'\xff\xfe')
    assert "input.txt: cannot be fetched (invalid start byte)" in stops(capsys, shakespeare, out_dir=out.parent)
    monkeypatch.setattr(shakespeare, 'URL', address + '/none.txt')
    assert 'none.txt: cannot be fetched (File not found); ' in stops(capsys, shakespeare, out_dir=out.parent)
    assert out.read_text(encoding='utf-8') == 'All:\nSpeak.\n' # what was there is not lost

@pytest.mark.parametrize('script', [shakespeare, alpaca_eval], ids=['shakespeare', 'alpaca_eval'])
def test_without_a_network(tmp_path, capsys, monkeypatch, script):
    with socket.socket() as closed: # bound, and nobody listens
        closed.bind(('127.0.0.1', 0))
        monkeypatch.setenv('no_proxy', '*')
        monkeypatch.setattr(script, 'URL', f'http://127.0.0.1:{closed.getsockname()[1]}/file')
        line = stops(capsys, script, out_dir=tmp_path / 'out')
    assert 'cannot be fetched (' in line and 'Connection refused' in line and '--source=FILE' in line
    assert not list(tmp_path.glob('out/*'))

def test_alpaca_eval_is_fetched(tmp_path, capsys, monkeypatch, site):
    """GitHub has one JSON array."""
    folder, address = site
    array(folder / 'a.json', [dict(instruction='q', output_1='a', output_2='bb', preference=x) for x in (1, 2, None)])
    monkeypatch.setattr(alpaca_eval, 'URL', address + '/a.json')
    run(alpaca_eval, out_dir=tmp_path / 'out')
    assert '2 of 3 rows, output_1 better in 1, the longer one in 1\n' in capsys.readouterr().out
    array(folder / 'a.json', [dict(instruction='q', output_1='a', output_2='b', preference=7), 3])
    line = stops(capsys, alpaca_eval, out_dir=tmp_path / 'out')
    assert 'annotations.json[0]: wanted `preference` to be a number from 1 to 2, or null, got 7' in line
    line = stops(capsys, alpaca_eval, source=array(tmp_path / 'b.json', [3]), out_dir=tmp_path / 'out')
    assert line == f"{tmp_path / 'b.json'}[0]: wanted a JSON object"

# ---------------------------------------------------------------------------------------------------------------------
# HH-RLHF's subsets

def test_subsets_of_a_folder(tmp_path, capsys):
    for subset in hh_rlhf.SUBSETS:
        (tmp_path / 'hh' / subset).mkdir(parents=True)
        for split in ('train', 'test'):
            lines(tmp_path / 'hh' / subset / f'{split}.jsonl', [ROWS[hh_rlhf](f'{subset} {split}', 'yes')])
    expected = lambda subsets: [f'{subset} {split}' for split in ('train', 'test') for subset in subsets]
    for name, subsets in (('two', ['helpful-online', 'harmless-base']), ('one', ['helpful-base'])):
        run(hh_rlhf, source=tmp_path / 'hh', subsets=','.join(subsets), out_dir=tmp_path / name)
        assert [r['prompt'] for r in records(tmp_path / name, 'prompts')] == expected(subsets)
    run(hh_rlhf, source=tmp_path / 'hh', out_dir=tmp_path / 'all')
    assert in_any_order(r['prompt'] for r in records(tmp_path / 'all', 'prompts')) == in_any_order(
        expected(hh_rlhf.SUBSETS))
    assert "subsets must be some of helpful-base, " in stops(capsys, hh_rlhf, source=tmp_path / 'hh', subsets='helpful')
    assert 'one/harmless-base is neither' in stops(capsys, hh_rlhf, source=tmp_path / 'one', subsets='harmless-base')
    assert 'wanted with the hub or with a folder' in stops(
        capsys, hh_rlhf, source=tmp_path / 'hh' / 'helpful-base' / 'test.jsonl', subsets='harmless-base')

# ---------------------------------------------------------------------------------------------------------------------
# real files

def counts(folder):
    return {path.stem: len(read_records(path, path.stem.split('_')[0])) for path in sorted(folder.glob('*.jsonl'))}

def test_real_oasst1(tmp_path, capsys):
    """Counted apart from the code, by a recursion over the raw trees: 474 prompts, 145 best answers, 753 pairs."""
    run(oasst1, source=real('oasst-en-100-trees.jsonl'), out_dir=tmp_path)
    assert counts(tmp_path) == {'demonstrations_train': 139, 'demonstrations_val': 6, 'prompts_train': 452,
                                'prompts_val': 22, 'rankings_train': 202, 'rankings_val': 9}
    out = capsys.readouterr().out
    assert '613 answers in 202 rankings make 727 pairs' in out and '26 answers in 9 rankings make 26 pairs' in out
    assert line_of(out, 'cut', 4, 'unranked answer beside others')

def test_real_sharegpt(tmp_path):
    """Counted apart from the code: 500 conversations, 1000 answers, 384 different ones without their last answer."""
    run(sharegpt, source=real('sharegpt-dummy-conversation.json'), out_dir=tmp_path)
    assert counts(tmp_path) == {'demonstrations_train': 479, 'demonstrations_val': 21, 'prompts_train': 371,
                                'prompts_val': 13}
    assert sum(sum(m['role'] == 'assistant' for m in r.get('messages', [])) or 1
               for r in records(tmp_path, 'demonstrations')) == 1000

def test_real_hh_rlhf_is_not_for_trl(tmp_path, capsys):
    """Its tags would stand in the template once more."""
    line = stops(capsys, trl, source=real('hh-rlhf-harmless-base-2000.jsonl.gz'), out_dir=tmp_path / 'out')
    assert '2000 left out: tags of HH-RLHF' in line and line.endswith('data/hh_rlhf/prepare.py reads those')
    assert not (tmp_path / 'out').exists()

def test_real_mt_bench_and_a_csv_file(tmp_path, capsys):
    run(trl, source=real('mt-bench-questions.jsonl'), out_dir=tmp_path / 'mt')
    assert line_of(capsys.readouterr().out, 'cut', 80, 'a later question')
    assert counts(tmp_path / 'mt') == {'prompts_train': 76, 'prompts_val': 4}
    run(trl, source=real('xstest-prompts.csv'), out_dir=tmp_path / 'xs')
    assert capsys.readouterr().out.endswith(
        'keys not read: id (450), label (450), type (450), focus (375), note (105)\n')
    assert counts(tmp_path / 'xs') == {'prompts_train': 428, 'prompts_val': 22}

def test_real_alpaca_eval_as_its_own_file(tmp_path, capsys):
    """GitHub's annotations.json is an indented array; the stored copy has its rows as lines."""
    with gzip.open(real('alpaca-eval-vicuna-7b-v1.5-annotations.jsonl.gz')) as file:
        array(tmp_path / 'annotations.json', [json.loads(line) for line in file])
    run(alpaca_eval, source=tmp_path / 'annotations.json', out_dir=tmp_path)
    out = capsys.readouterr().out
    assert '802 of 805 rows, output_1 better in 767' in out and 'keys not read: dataset (805), generator_1 (' in out
