"""lab/ratings.py with faked stages: what each reward model is trained on, and what becomes of the accuracies."""
import json
import os

import pytest

import demo
from lab import ratings
from tiny import flags, records, run, stops

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """{seed: {stage's name: its command's options}} of what ratings.main ran; a reward model's log tells a lie."""
    seen = {}

    def run_stages(todo, cfg):
        done = set()
        for stage in todo:
            words = flags(demo.command_of(stage, cfg))
            name, script, needs = stage[0], stage[1], stage[5]
            assert done >= set(needs), name
            done.add(name)
            seen.setdefault(cfg.seed, {})[name] = words
            if name == 'collect pairs':
                records(words['out'], [dict(prompt=f'{n}', responses=['x', 'y'], ranks=[0, 1]) for n in range(71)])
            elif name == 'collect ratings':
                rows = [dict(prompt=f'{n // 2}', response='xy'[n % 2], score=n % 5 + 1) for n in range(140)]
                records(words['out'], rows)
            elif script == 'reward.py':
                os.makedirs(words['out_dir'], exist_ok=True)
                with open(words['train_data']) as f:
                    value = len(f.readlines()) / 100 + cfg.seed + (10 if words['loss'] == 'regression' else 0)
                with open(os.path.join(words['out_dir'], 'log.jsonl'), 'w') as f:
                    f.write(json.dumps(dict(step=1, val_accuracy=0.0)) + '\n')
                    f.write(json.dumps(dict(step=2, val_accuracy=value)) + '\n')

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    run(ratings, out_dir=str(tmp_path / 'out'), seeds='1,4', budgets='10,30,70', steps=5, scale=7)
    return seen

def test_what_each_is_trained_on(ran, tmp_path):
    """Both kinds from the same answers to the same prompts; N judgements are N lines."""
    at, stages = lambda name: str(tmp_path / 'out' / '4' / name), ran[4]
    assert 'collect train' not in stages and stages['collect pairs']['seed'] == '4'
    assert (stages['collect pairs']['n_answers'], stages['collect pairs']['max_prompts']) == ('2', '71')
    assert stages['collect pairs']['tie'] == '0.0' and stages['collect ratings']['answers'] == at('pairs.jsonl')
    assert stages['collect ratings']['scale'] == '7' and stages['collect ratings']['out'] == at('ratings.jsonl')
    for kind, loss in (('pairs', 'pairwise'), ('ratings', 'regression')):
        with open(at(f'{kind}.jsonl')) as f:
            lines = f.readlines()
        for n in (10, 30, 70):
            options = stages[f'reward {kind} {n}']
            assert options['loss'] == loss and options['max_steps'] == '5' and options['seed'] == '4'
            assert options['train_data'] == at(f'{kind}{n}.jsonl')
            assert options['val_data'] == at('rankings_test.jsonl') and options['init_from'] == at('sft')
            with open(options['train_data']) as f:
                assert f.readlines() == lines[:n]

def test_results_and_figure(ran, tmp_path):
    """The last accuracy of each log: lines / 100 + seed, and 10 more for ratings."""
    with open(tmp_path / 'out' / 'results.json') as f:
        results = json.load(f)
    assert results == dict(pairs={'10': [1.1, 4.1], '30': [1.3, 4.3], '70': [1.7, 4.7]},
                           ratings={'10': [11.1, 14.1], '30': [11.3, 14.3], '70': [11.7, 14.7]})
    with open(tmp_path / 'out' / 'ratings.png', 'rb') as f:
        assert f.read(8) == b'\x89PNG\r\n\x1a\n'

def test_too_few_judgements(tmp_path, capsys, monkeypatch):
    path = records(tmp_path / 'pairs.jsonl', [dict(prompt='p')] * 3)
    with pytest.raises(SystemExit):
        ratings.cut(path, 4, str(tmp_path / 'out.jsonl'))
    assert f'--budgets: {path} has 3 judgements, wanted at most so many' in capsys.readouterr().err
    assert not os.path.exists(tmp_path / 'out.jsonl')

@pytest.mark.parametrize('options, line', [
    (dict(scale=1), '--scale=1: scale must be from 2 to 10, got 1'), (dict(scale=11), 'from 2 to 10'),
    (dict(budgets='30,10'), "budgets must be rising numbers above 0, separated by commas, got '30,10'"),
    (dict(seeds='1,1'), 'each once'), (dict(steps=0), 'steps must be at least 1, got 0'),
])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, ratings, **options)
