"""
The world of sums: careful and hasty answers, column by column, by hand; splits; and the files.

A column is what is carried (borrowed) and a digit: 47+25 is 12 (7+5), then 07 (4+2+1).
"""
import random
from collections import Counter

import pytest

import data.sums.prepare as prepare
from common.records import read_records
from common.tokens import load_tokenizer
from data.checker import exact_match
from data.sums import world
from tiny import run, stops

@pytest.mark.parametrize('problem, careful, hasty', [
    ((47, '+', 25), '12 07\n#### 072', '12 06\n#### 062'), # 7+5=12, 4+2+1=7; the carry is forgotten
    ((72, '-', 38), '14 03\n#### 034', '06 04\n#### 046'), # 12-8=4, 7-3-1=3; 8-2=6, 7-3=4
    ((345, '+', 278), '13 12 06\n#### 0623', '13 11 05\n#### 0513'), # 13, 4+7+1=12, 3+2+1=6; 13, 11, 5
    ((345, '-', 278), '17 16 00\n#### 0067', '03 03 01\n#### 0133'), # 15-8=7, 14-7-1=6, 3-2-1=0; 8-5, 7-4, 3-2
    ((999, '+', 999), '18 19 19\n#### 1998', '18 18 18\n#### 1888'), # the last carry is written down by both
    ((100, '-', 99), '11 10 00\n#### 0001', '09 09 01\n#### 0199'), # a borrow goes on through a zero
    ((64, '+', 13), '07 07\n#### 077', '07 07\n#### 077'), ((88, '-', 88), '00 00\n#### 000', '00 00\n#### 000'),
])
def test_writers_by_hand(problem, careful, hasty):
    for is_careful, text in ((True, careful), (False, hasty)):
        assert world.response(problem, scratch=True, careful=is_careful) == text
        assert world.response(problem, scratch=False, careful=is_careful) == text.split()[-1]

def test_careful_answers_are_right():
    rng = random.Random(0)
    hasty = []
    for a, op, b in world.problems('train', 300, rng, (2, 3, 6)):
        record = dict(prompt=f'{a}{op}{b}', answer=str(a + b if op == '+' else a - b))
        assert a >= b or op == '+'
        for scratch in (True, False):
            assert exact_match(record, world.response((a, op, b), scratch)) == 1
        hasty.append(exact_match(record, world.response((a, op, b), False, careful=False)))
    assert 0.2 < sum(hasty) / len(hasty) < 0.5

def test_splits():
    rng = random.Random(0)
    drawn = {split: world.problems(split, 2000, rng) for split in ('train', 'val', 'test')}
    sides = {split: {(op, *sorted((a, b))) for a, op, b in problems} for split, problems in drawn.items()}
    assert not sides['train'] & sides['val'] and not sides['train'] & sides['test'] and not sides['val'] & sides['test']
    every = Counter(world.split_of((a, '+', b)) for a in range(100, 200) for b in range(100, 200))
    assert 0.08 < every['val'] / 10000 < 0.12 and 0.08 < every['test'] / 10000 < 0.12

def test_files(tmp_path, capsys):
    small = dict(n_practice=200, n_demonstrations=40, n_val=30, n_prompts=50, n_prompts_val=20, n_prompts_test=20,
                 n_others=5)
    run(prepare, out_dir=str(tmp_path), **small)
    read = lambda name, kind: read_records(tmp_path / f'{name}.jsonl', kind)
    scratch, direct = (read(f'practice_{style}_train', 'demonstrations') for style in ('scratch', 'direct'))
    assert [r['prompt'] for r in scratch] == [r['prompt'] for r in direct] and len(scratch) == 200
    assert [r['response'].split()[-1] for r in scratch] == [r['response'] for r in direct] # the same writers
    prompts = {split: read(f'prompts_{split}', 'prompts') for split in ('train', 'val', 'test', 'others')}
    assert {split: len({r['prompt'] for r in rows}) for split, rows in prompts.items()} == dict(
        train=50, val=20, test=20, others=20)
    assert {r['category'] for r in prompts['others']} == {'2 digits', '4 digits', '5 digits', '6 digits'}
    assert all(r['answer'] == str(eval(r['prompt'])) for rows in prompts.values() for r in rows)
    demonstrations = read('demonstrations_scratch_train', 'demonstrations')
    learnt = {r['prompt'] for r in [*scratch, *demonstrations, *prompts['train']]}
    assert not learnt & {r['prompt'] for split in ('val', 'test', 'others') for r in prompts[split]}
    tok = load_tokenizer(str(tmp_path / 'sums.tiktoken'))
    ids = tok.encode('### Human: 47+25\n### Assistant: 12 07\n#### 072')
    assert [tok.decode([i]) for i in ids] == [
        '###', ' Human', ':', ' ', '4', '7', '+', '2', '5', '\n', '###', ' Assistant', ':', ' ', '1', '2', ' ', '0',
        '7', '\n', '####', ' ', '0', '7', '2']
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(prepare, out_dir=str(tmp_path), **small)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}

def test_no_problems_at_all(capsys):
    assert stops(capsys, prepare, n_prompts=0) == '--n_prompts=0: n_prompts must be at least 1, got 0'
