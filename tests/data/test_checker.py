"""data/checker.py: final answers, numbers compared as numbers; and a file of GSM8K's form, from rows to rewards."""
import json
from decimal import Decimal

import pytest

from common.records import read_records
from feedback.functions import load_reward_function
from data.checker import as_number, exact_match, final_answer
import data.trl.prepare as trl
from tiny import assistant, one_line, run, user

@pytest.mark.parametrize('text, final', [
    ('7+5=12\n#### 72', '72'), ('#### 5\n#### 6 ', '6'), ('####7', '7'), # the last one counts
    ('72', '72'), (' first\n\n 72 \n', '72'), ('So it is 72.', 'So it is 72.'), ('', ''), ('72\n####', ''),
    ('#### 72\nor 73', '72\nor 73'), # no number: who says two things said nothing
])
def test_final_answer(text, final):
    assert final_answer(text) == final

@pytest.mark.parametrize('text, number', [
    ('18', '18'), ('-5', '-5'), ('$18', '18'), ('-$5', '-5'), ('1,234,567', '1234567'), ('$1,200.50', '1200.5'),
    ('.5', '0.5'), ('0.50', '0.5'), ('18.', '18'), ('007', '7'), ('0', '0'), ('-0.0', '0')])
def test_numbers(text, number):
    assert as_number(text) == Decimal(number)

@pytest.mark.parametrize('text', ['', '-', '$', '.', '-.', '12,00', '1,2', '1 200', '--5', '18 men', 'x', '1e3', 'inf',
                                  'nan', '٣', '1.2.3', '1,200,00'])
def test_no_numbers(text):
    assert as_number(text) is None

@pytest.mark.parametrize('answer, response, reward', [
    ('72', '12 07\n#### 72', 1), ('72', '72', 1), ('72', '12 07\n#### 62', 0), ('72', '', 0), ('72', '72 or so', 0),
    ('72', '72\n#### 62', 0), # only the final answer counts
    ('1200', 'He pays $1,200.\n#### $1,200.00', 1), ('1,200', '1200', 1), ('0.5', '.50', 1), ('-3', '3', 0),
    (18, '18.0', 1), (0.25, '0.25', 1), # JSON has numbers too
    ('100000000000000000001', '100000000000000000000', 0), # no floats: every digit counts
    ('yes', 'yes', 1), ('yes', 'no', 0), ('yes', '#### yes', 1),
])
def test_exact_match(answer, response, reward):
    assert exact_match(dict(prompt='q', answer=answer), response) == reward

@pytest.mark.parametrize('record', [dict(prompt='q'), dict(prompt='q', answer=''), dict(prompt='q', answer=None)])
def test_a_record_without_an_answer(record, capsys):
    line = one_line(capsys, lambda: load_reward_function('data.checker:exact_match', 'reward', [record], 'p.jsonl'))
    assert 'wanted a record with a key `answer`' in line and 'p.jsonl' in line

ROWS = [ # question, answer, and what stands after ####
    ('Ann has 3 bags of 4 apples. How many?', 'She has 3*4=<<3*4=12>>12 apples.\n#### 12', '12'),
    ('A coat is $900, a hat $300. In all?', 'Both are 900+300=$<<900+300=1200>>1200.\n#### 1,200', '1,200'),
    ('Half of 5?', '5/2=<<5/2=2.5>>2.5\n####2.50', '2.50'),
]

def test_a_file_of_questions_and_answers(tmp_path, capsys):
    source = tmp_path / 'train.jsonl'
    source.write_text(''.join(json.dumps(dict(question=q, answer=a)) + '\n' for q, a, _ in ROWS))
    run(trl, source=str(source), out_dir=str(tmp_path / 'out'), val_fraction=0.34)
    assert 'keys not read: none' in capsys.readouterr().out
    read = lambda kind: [r for split in ('train', 'val')
                         for r in read_records(tmp_path / 'out' / f'{kind}_{split}.jsonl', kind)]
    prompts, demonstrations = ({r['prompt']: r for r in read(kind)} for kind in ('prompts', 'demonstrations'))
    assert prompts == {q: dict(prompt=q, answer=final) for q, _, final in ROWS}
    assert demonstrations[ROWS[0][0]]['response'] == 'She has 3*4=12 apples.\n#### 12' # without a calculator's notes
    reward = load_reward_function('data.checker:exact_match', 'reward', list(prompts.values()), 'prompts.jsonl')
    for q, _, _ in ROWS:
        assert reward(prompts[q], demonstrations[q]['response']) == 1 and reward(prompts[q], '#### 7') == 0
    assert reward(prompts[ROWS[1][0]], 'It is\n#### $1200.00') == 1 and reward(prompts[ROWS[2][0]], '2.5') == 1

@pytest.mark.parametrize('row, answer', [
    (dict(question='q', answer='a\n#### 7'), '7'), (dict(prompt='q', completion='a\n#### 7', label=True), '7'),
    (dict(question='q', answer='a'), None), (dict(question='q', answer='#### A title\ntext'), None),
    (dict(question='q', answer='a\n####'), None),
    (dict(prompt='q', completion='a\n#### 7', label=False), None), # a bad answer's number is no right one
    (dict(prompt='q', completion=[assistant('a\n#### 7') | dict(weight=0), user('r'), assistant('b\n#### 8')]), None),
    (dict(prompt='q', completion=[assistant('a\n#### 7'), user('r'), assistant('b')]), '7'), # that of the prompt
])
def test_what_counts_as_a_final_answer(row, answer):
    assert trl.parse_row(row).records['prompts'] == [{'prompt': 'q'} | ({'answer': answer} if answer else {})]
