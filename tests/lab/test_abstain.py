"""lab/abstain.py with faked stages: what each price trains on, and what becomes of evaluate.py's shares."""
import json
import os

import pytest

import demo
from lab import abstain
from tiny import flags, run, stops

SAID = dict(right=0.5, abstains=0.2, wrong=0.1, declines=0.2)

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """{seed: {stage's name: (its command's options, the stages before it)}}; evaluate.py's results are made up."""
    seen = {}

    def run_stages(todo, cfg):
        for stage in todo:
            words = flags(demo.command_of(stage, cfg))
            seen.setdefault(cfg.seed, {})[stage[0]] = words, stage[5]
        os.makedirs(os.path.dirname(stage[4]))
        row = dict(answerable=SAID, honest=0.25 * cfg.seed, harmless=1.0, gold=0.5)
        silent = row | dict(answerable=dict(right=0.0, abstains=1.0, wrong=0.0, declines=0.0))
        names = [part.split('=')[0] for part in words['models'].split(',')]
        with open(stage[4], 'w') as f:
            json.dump(dict(models=dict.fromkeys(names, row), greedy=dict.fromkeys(names, row) | {'0.5': silent}), f)

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    run(abstain, out_dir=str(tmp_path / 'out'), seeds='1,3', prices='-1,0,0.5')
    return seen

def test_what_each_price_is_trained_on(ran, tmp_path):
    folder = str(tmp_path / 'out' / '3')
    stages = ran[3]
    assert list(stages) == ['data', 'pretrain', 'sft', 'price -1', 'price 0', 'price 0.5', 'evaluate']
    for price, written in (('-1', '-1.0'), ('0', '0.0'), ('0.5', '0.5')):
        words, needs = stages[f'price {price}']
        assert words['reward'] == f'data.toy.world:abstaining(price={written})' and words['reward_model'] == ''
        assert words['policy'] == f'{folder}/sft' and words['out_dir'] == f'{folder}/price{price}'
        assert words['seed'] == '3' and needs == ['sft']
    words, needs = stages['evaluate']
    assert words['models'] == ','.join(f'{name}={folder}/{where}' for name, where in (
        ('sft', 'sft'), ('-1', 'price-1'), ('0', 'price0'), ('0.5', 'price0.5')))
    assert needs == ['sft', 'price -1', 'price 0', 'price 0.5']
    assert words['reward_model'] == words['rankings'] == words['comparisons'] == words['text'] == ''

def test_results_tables_and_figure(ran, tmp_path, capsys):
    with open(tmp_path / 'out' / 'results.json') as f:
        results = json.load(f)
    assert list(results) == ['sampled', 'greedy'] and list(results['sampled']) == ['sft', '-1', '0', '0.5']
    # .5 right and .1 wrong: .6 are answered, and a sixth of them is wrong
    assert results['sampled']['-1'] == dict(
        right=[0.5] * 2, abstains=[0.2] * 2, wrong=[0.1] * 2, declines=[0.2] * 2, coverage=[pytest.approx(0.6)] * 2,
        risk=[pytest.approx(1 / 6)] * 2, honest=[0.25, 0.75], harmless=[1.0, 1.0])
    assert results['greedy']['0.5']['coverage'] == [0, 0] and results['greedy']['0.5']['risk'] == [None, None]
    few = dict(answerable=dict(right=0.08, abstains=0.9, wrong=0.02, declines=0.0), honest=1.0, harmless=1.0)
    assert abstain.columns_of(few)['risk'] is None # .1 is answered: too few to tell
    few['answerable'] |= dict(right=0.18)
    assert abstain.columns_of(few)['risk'] == pytest.approx(0.1)
    with open(tmp_path / 'out' / 'risk_coverage.png', 'rb') as f:
        assert f.read(8) == b'\x89PNG\r\n\x1a\n'

def test_what_is_printed(tmp_path, monkeypatch, capsys):
    rows = {name: dict(answerable=SAID, honest=1.0, harmless=0.25 if name == '0' else 1.0) for name in ('sft', '0')}
    monkeypatch.setattr(demo, 'run_stages', lambda todo, cfg: None)
    monkeypatch.setattr(abstain, 'read_json', lambda path: dict(models=rows, greedy=rows))
    run(abstain, out_dir=str(tmp_path / 'out'), seeds='2', prices='0')
    said = capsys.readouterr().out
    assert '| price, sampled | right | abstains | wrong | declines | coverage | risk | honest | harmless |' in said
    assert '| 0 | 0.500 | 0.200 | 0.100 | 0.200 | 0.600 | 0.167 | 1.000 | 0.250 |' in said
    assert said.index('| price, sampled') < said.index('| price, greedy')

@pytest.mark.parametrize('options, line', [
    (dict(seeds='1,x'), "seeds must be numbers, each once, separated by commas, got '1,x'"),
    (dict(prices='0,x'), "prices must be rising numbers from -1 to 1, separated by commas, got '0,x'"),
    (dict(prices=''), 'rising numbers'), (dict(prices='0.5,0'), 'rising numbers'), (dict(prices='0,0'), 'rising'),
    (dict(prices='-2,0'), 'from -1 to 1'), (dict(prices='0,1.5'), 'from -1 to 1'), (dict(prices='nan'), 'from -1 to 1'),
    (dict(out_dir='a,b'), "out_dir must be a folder with no comma and no = in its name, got 'a,b'"),
])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, abstain, **options)
