"""lab/distillation.py with faked stages: what each student learns from, and what becomes of evaluate.py's numbers."""
import json
import os

import pytest

import demo
import sft
from common.options import parse_config
from common.records import read_records
from lab import distillation
from tiny import flags, records, run, stops

QUESTIONS = [dict(prompt='Who?'), dict(prompt='Why?')]

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """{seed: {stage's name: (its options, the stages before it)}}; logs and results are made up."""
    seen = {}

    def run_stages(todo, cfg):
        for stage in todo:
            name, needs, command = stage[0], stage[5], demo.command_of(stage, cfg)
            options = flags(command)
            if name in distillation.STUDENTS:
                options = at = parse_config(sft.Config, command[2:]) # sft.py takes them
                log = [dict(step=step, tokens=250.0 if at.on_policy else 240.0) for step in (1, 2)]
                records(os.path.join(at.out_dir, 'log.jsonl'), log + [dict(step=2, val_loss=0.5)])
            if name == 'evaluate':
                names = [part.split('=')[0] for part in options['models'].split(',')]
                with open(os.path.join(cfg.out_dir, 'evaluate', 'results.json'), 'w') as f:
                    json.dump(dict(models={name: dict(kl=cfg.seed + n / 10, gold=0.5) for n, name in enumerate(names)},
                                   greedy={name: dict(path_kl=0.25, gold=0.75) for name in names}), f)
            seen.setdefault(cfg.seed, {})[name] = options, needs

    for seed in '13':
        for name in ('evaluate', *distillation.STUDENTS):
            os.makedirs(tmp_path / 'out' / seed / name.replace(' ', '_'))
    monkeypatch.setattr(demo, 'run_stages', run_stages)
    monkeypatch.setattr(distillation, 'read_records', lambda path, kind: QUESTIONS)
    run(distillation, out_dir=str(tmp_path / 'out'), seeds='1,3')
    return seen

def test_what_each_student_learns_from(ran, tmp_path):
    folder = str(tmp_path / 'out' / '3')
    stages = ran[3]
    assert 'rejection' in stages and 'ppo' not in stages and list(stages)[-1] == 'evaluate'
    for name, on_policy, divergence in (
            ('data forward', 0.0, 'forward'), ('data reverse', 0.0, 'reverse'), ('both reverse', 0.5, 'reverse'),
            ('own forward', 1.0, 'forward'), ('own jsd', 1.0, 'jsd'), ('own reverse', 1.0, 'reverse')):
        at, needs = stages[name]
        assert (at.on_policy, at.divergence, at.seed, at.log_every) == (on_policy, divergence, 3, 1)
        assert (at.init_from, at.teacher) == (f'{folder}/distill', f'{folder}/rejection') and needs == ['distill']
        assert at.train_data == f'{folder}/best_of_n.jsonl' and at.out_dir == f"{folder}/{name.replace(' ', '_')}"
        assert at.max_steps == {0.0: 187, 0.5: 193, 1.0: 200}[on_policy] and at.lr == stages['own reverse'][0].lr
    words, needs = stages['evaluate']
    assert read_records(words['prompts'], 'prompts') == 4 * QUESTIONS # four answers to each
    assert words['models'].startswith(
        f'rejection={folder}/rejection,distill={folder}/distill,data forward={folder}/data_forward,')
    assert words['baseline'] == 'rejection' and needs == list(distillation.STUDENTS)

def test_results_and_table(ran, tmp_path):
    with open(tmp_path / 'out' / 'results.json') as f:
        found = json.load(f)
    assert list(found) == ['rejection', 'distill', *distillation.STUDENTS]
    assert {name: [row['tokens'] for row in rows] for name, rows in found.items()} == {
        'rejection': [None] * 2, 'distill': [None] * 2, 'data forward': [480.0] * 2, 'data reverse': [480.0] * 2,
        **dict.fromkeys(('both reverse', 'own forward', 'own jsd', 'own reverse'), [500.0] * 2)}
    assert [row['kl'] for row in found['distill']] == [pytest.approx(1.1), pytest.approx(3.1)]
    assert found['distill'][0] | dict(kl=0) == dict(tokens=None, kl=0, path_kl=0.25, gold=0.5, greedy_gold=0.75)

def test_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'run_stages', lambda *a: None)
    monkeypatch.setattr(distillation, 'read_records', lambda path, kind: QUESTIONS)
    names, log = ('distill', 'own jsd'), [dict(tokens=100.0), dict(tokens=150.0), dict(val_loss=1)]
    monkeypatch.setattr(distillation, 'read_json', lambda path: dict(
        models=dict.fromkeys(names, dict(kl=0.25, gold=0.5)), greedy=dict.fromkeys(names, dict(path_kl=1, gold=0.75))))
    monkeypatch.setattr(distillation, 'read_log', lambda path: log)
    run(distillation, out_dir=str(tmp_path / 'out'), seeds='1,2')
    assert capsys.readouterr().out.strip().splitlines() == [
        '|  | tokens | KL | path KL | gold | greedy gold |', '| -- | -- | -- | -- | -- | -- |',
        '| distill | – | 0.250 | 1.000 | 0.500 | 0.750 |', '| own jsd | 250 | 0.250 | 1.000 | 0.500 | 0.750 |']

def test_bad_options(tmp_path, capsys):
    out = str(tmp_path / 'out')
    assert 'seeds must be numbers, each once' in stops(capsys, distillation, out_dir=out, seeds='1,x')
    assert 'out_dir must be a folder with no comma' in stops(capsys, distillation, out_dir='a,b')
    assert not os.path.exists(out)
