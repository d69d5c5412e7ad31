"""data/toy/judge.py: verdicts that the gold score gives; data/alpaca_eval/prepare.py: a judge's preferences."""
import importlib.util
import json
import os
import re
import sys

import pytest

from common.records import read_records
from data.toy import judge, world
from tiny import ROOT, run, stops

def load(path):
    spec = importlib.util.spec_from_file_location('module', os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    sys.modules['module'] = module # dataclasses look there
    spec.loader.exec_module(module)
    return module

def test_verdicts_follow_gold():
    rows = judge.verdicts('train', 40, 3, 'Which?', 1, two_turns=0.3)
    prompts = {json.dumps(p['prompt']) for p in world.prompts('train', 40, 1, 0.3)}
    broken = other = 0
    for row in rows:
        turns, a, b = re.fullmatch(r'Which\?\n(Human: .*)\nA: (.*)\nB: (.*)', row['prompt'], re.DOTALL).groups()
        turns = re.split(r'\n?(Human|Assistant): ', turns)[1:]
        question = turns[-1]
        assert any(json.dumps(question)[1:-1] in p for p in prompts)
        scores = world.gold(question, a), world.gold(question, b)
        letter, _, because = row['response'].partition('. ')
        assert letter == ('A' if scores[0] > scores[1] else 'B')
        assert {world.explain(question, answer)['content'] for answer in (a, b)} == {0, 1}
        assert world.explain(question, because)['content'] == 1
        broken += 0.0 in scores
        other += len(turns) > 2
    assert len(rows) == 120 and broken > 5 and other > 5
    assert 40 < sum(row['response'][0] == 'A' for row in rows) < 80 # 60, standard deviation 5.5

def test_toy_judge_from_the_command_line(tmp_path, capsys):
    told = tmp_path / 'told.txt'
    told.write_text('Which?')
    run(judge, out_dir=str(tmp_path), instruction=str(told), n_prompts=5, n_prompts_val=2, n_pairs=2)
    assert len(read_records(tmp_path / 'verdicts_train.jsonl', 'demonstrations')) == 10
    assert len(read_records(tmp_path / 'verdicts_val.jsonl', 'demonstrations')) == 4
    assert '--instruction=nowhere.txt: cannot be read' in stops(capsys, judge, instruction='nowhere.txt')
    assert 'n_pairs must be at least 1' in stops(capsys, judge, n_pairs=0)

def test_alpaca_eval(tmp_path, capsys):
    prepare = load('data/alpaca_eval/prepare.py')
    row = lambda preference, b='b': json.dumps(dict(instruction='q', output_1='a', output_2=b, preference=preference))
    source = tmp_path / 'source.jsonl'
    rows = [row(1), row(1.75, 'bb'), row(1.5), row(None), row(1, ' '), row(1, 'a'), '{}']
    source.write_text('\n'.join(rows) + '\n\n')
    run(prepare, source=str(source), out_dir=str(tmp_path))
    rows = read_records(tmp_path / 'rankings_test.jsonl', 'rankings')
    assert [r['ranks'] for r in rows] == [[0, 1], [1, 0], [0, 0]] # 1.75: the second is better at 3 to 1
    assert [r['scores'] for r in rows] == [[1, 0], [.25, .75], [.5, .5]]
    assert '3 of 7 rows, output_1 better in 1, the longer one in 1\n' in capsys.readouterr().out
    source.write_text(row(1) + '\n' + row(3) + '\n')
    assert stops(capsys, prepare, source=str(source)) == (
        f'{source}:2: wanted `preference` to be a number from 1 to 2, or null, got 3')
    source.write_text('{}\n')
    assert 'found none' in stops(capsys, prepare, source=str(source))

REAL = os.path.join(os.path.dirname(ROOT), 'shared', 'data', 'alpaca-eval-vicuna-7b-v1.5-annotations.jsonl.gz')

@pytest.mark.skipif(not os.path.exists(REAL), reason='needs ../shared/data')
def test_alpaca_eval_on_the_real_file(tmp_path, capsys):
    run(load('data/alpaca_eval/prepare.py'), source=REAL, out_dir=str(tmp_path))
    assert '802 of 805 rows, output_1 better in 767, the longer one in 717' in capsys.readouterr().out
