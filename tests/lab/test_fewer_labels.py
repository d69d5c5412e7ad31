"""lab/fewer_labels.py with faked stages: what each reward model is trained on, and what becomes of the accuracies."""
import json
import os

import pytest

import demo
from common.options import parse_config, print_help
from lab import fewer_labels, ratings
from tiny import flags, one_line, run, stops

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """{seed: {stage's name: its command's options}} of what fewer_labels.main ran; a reward model's log tells a lie."""
    seen = {}

    def run_stages(todo, cfg):
        made, known = {}, {} # file or folder -> the stage that makes it; stage -> all that it waits for
        for stage in todo:
            words = flags(demo.command_of(stage, cfg))
            name, script, needs = stage[0], stage[1], set(stage[5])
            inputs = [part for key in ('init_from', 'policy', 'train_data', 'val_data', 'answers', 'ensemble')
                      for part in words.get(key, '').split(',') if cfg.out_dir in part]
            if name not in ('pretrain', 'sft', 'collect train', 'collect test'): # those are demo.py's own
                assert {made[part] for part in inputs} <= needs.union(*(known[n] for n in needs)), name
            known[name] = needs.union(*(known[n] for n in needs))
            made[words.get('out') or words.get('out_dir') or name] = name
            seen.setdefault(cfg.seed, {})[name] = words
            if script == 'reward.py':
                os.makedirs(words['out_dir'])
                with open(os.path.join(words['out_dir'], 'log.jsonl'), 'w') as f:
                    n = sum(int(''.join(c for c in os.path.basename(file) if c.isdigit()))
                            for file in words['train_data'].split(','))
                    f.write(json.dumps(dict(step=1, val_accuracy=0.0)) + '\n')
                    f.write(json.dumps(dict(step=2, val_accuracy=n / 100 + cfg.seed)) + '\n')

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    run(fewer_labels, out_dir=str(tmp_path / 'out'), seeds='1,4', budgets='10,30,70', steps=5)
    return seen

def test_what_each_is_trained_on(ran, tmp_path):
    at = lambda *names: ','.join(str(tmp_path / 'out' / '4' / name) for name in names)
    stages = ran[4]
    for how in ('random', 'diverse'):
        for n in (10, 30, 70):
            chosen, reward = stages[f'select {how} {n}'], stages[f'reward {how} {n}']
            assert chosen['answers'] == at('rankings_train.jsonl') and 'prompts' not in chosen
            assert chosen['select'] == how and chosen['budget'] == str(n) and chosen['out'] == reward['train_data']
            assert reward['train_data'] == at(f'{how}{n}.jsonl') and reward['max_steps'] == '5'
            assert reward['val_data'] == at('rankings_test.jsonl') and reward['seed'] == '4'
    members = [stages[f'reward member {i}'] for i in (1, 2, 3)]
    assert {m['train_data'] for m in members} == {at('random10.jsonl')} and len({m['seed'] for m in members}) == 3
    assert 'select uncertain 10' not in stages # the ensemble has to come from somewhere
    for n in (30, 70):
        chosen = stages[f'select uncertain {n}']
        assert chosen['select'] == 'uncertain' and chosen['budget'] == str(n - 10) # the ensemble's ten count too
        assert chosen['ensemble'] == at('reward_member1', 'reward_member2', 'reward_member3')
        assert stages[f'reward uncertain {n}']['train_data'] == at('random10.jsonl', f'uncertain{n}.jsonl')

def test_results_and_figure(ran, tmp_path, capsys):
    """The last accuracy of each log: the number in its file's name / 100 + seed; for uncertain the sum of the two."""
    with open(tmp_path / 'out' / 'results.json') as f:
        results = json.load(f)
    same = {'10': [1.1, 4.1], '30': [1.3, 4.3], '70': [1.7, 4.7]}
    assert results == dict(random=same, diverse=same, uncertain={'10': [1.1, 4.1], '30': [1.4, 4.4], '70': [1.8, 4.8]})
    with open(tmp_path / 'out' / 'fewer_labels.png', 'rb') as f:
        assert f.read(8) == b'\x89PNG\r\n\x1a\n'

@pytest.mark.parametrize('options, line', [
    (dict(seeds='1,x'), "seeds must be numbers, each once, separated by commas, got '1,x'"),
    (dict(seeds='1,,2'), 'numbers'), (dict(seeds='1,1'), 'each once'),
    (dict(budgets='30,10'), "budgets must be rising numbers above 0, separated by commas, got '30,10'"),
    (dict(out_dir='a,b'), "out_dir must be a folder with no comma and no = in its name, got 'a,b'"),
    (dict(budgets='0'), "rising numbers"), (dict(steps=0), 'steps must be at least 1, got 0'),
])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, fewer_labels, **options)

def test_an_experiment_needs_a_folder(capsys):
    """demo.py takes a default for an empty one; seed 1 of an experiment would lie in /1."""
    line = one_line(capsys, lambda: parse_config(fewer_labels.Config, ['--out_dir=']))
    assert line == "--out_dir=: out_dir must be a folder, got ''"

def test_help_of_an_experiment_on_another_one(capsys):
    """What lab/ratings.py shares with this one has a heading; without its docstring that would be its fields."""
    print_help(ratings.Config)
    out = capsys.readouterr().out
    assert '\noptions of reward models on few labels:\n' in out and 'Config(' not in out
