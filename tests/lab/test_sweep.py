"""lab/sweep.py with faked stages: which settings are tried, what runs, and what becomes of the scores."""
import json
import os
import random
from importlib import import_module

import pytest

import demo
from common.options import parse_config
from lab import sweep
from tiny import drawn_axes, flags, one_line, run, stops

RAN = [] # (seed, the names of the stages) of each call of demo.run_stages

@pytest.fixture
def fake(monkeypatch):
    """Stages that do nothing; a trial's score is its seed + lr, and lr=9 diverges in seed 2."""
    RAN.clear()

    def run_stages(todo, at):
        RAN.append((at.seed, [name for name, *_ in todo]))
        record = demo.read_record(at)
        try:
            for stage in todo:
                name, script, _, _, product, needs = stage
                command = demo.command_of(stage, at)
                words = flags(command)
                assert all(record[need][2] for need in needs), name # they ended before
                record[name] = [command, 1, None]
                if '--lr=9' in command and at.seed == 2:
                    raise SystemExit(1)
                if script == 'evaluate.py':
                    lr = float(os.path.dirname(words['out_dir']).split('lr')[-1].split('_')[0])
                    os.makedirs(words['out_dir'], exist_ok=True)
                    with open(product, 'w') as f:
                        json.dump(dict(models=dict(sft=dict(gold=7), trial=dict(gold=at.seed + lr, by=dict(x=lr))),
                                       reward_model=dict(accuracy=lr / 10)), f)
                record[name][2] = 2
        finally:
            with open(f'{at.out_dir}/demo.json', 'w') as f:
                json.dump(record, f)

    monkeypatch.setattr(demo, 'run_stages', run_stages)

def results(folder):
    with open(folder / 'results.json') as f:
        return json.load(f)

# ---------------------------------------------------------------------------------------------------------------------
# settings

def test_a_grid_has_all_combinations():
    cfg = sweep.Config(grid='lr=1e-4,3e-4  beta=0.1,0.2')
    assert sweep.settings_of(cfg, {}) == [dict(lr='1e-4', beta='0.1'), dict(lr='1e-4', beta='0.2'),
                                          dict(lr='3e-4', beta='0.1'), dict(lr='3e-4', beta='0.2')]

def test_random_draws_stay_in_their_ranges():
    cfg = sweep.Config(random='lr=1e-4:1e-2:log beta=0.5:1 batch_size=2:4 loss=dpo,ipo', trials=200, seed=3)
    types = dict(lr=float, beta=float, batch_size=int, loss=str)
    found = sweep.settings_of(cfg, types)
    assert len(found) == 200 == len({str(setting) for setting in found})
    lrs = [float(setting['lr']) for setting in found]
    assert 1e-4 <= min(lrs) < 2e-4 and 5e-3 < max(lrs) <= 1e-2
    assert 60 < sum(lr < 1e-3 for lr in lrs) < 140 # 1e-3 halves the range on a logarithmic scale
    assert {setting['batch_size'] for setting in found} == {'2', '3', '4'}
    assert {setting['loss'] for setting in found} == {'dpo', 'ipo'}
    assert all(0.5 <= float(setting['beta']) <= 1 for setting in found)
    # more trials keep those of fewer, and another seed draws others
    assert sweep.settings_of(sweep.Config(random=cfg.random, trials=5, seed=3), types) == found[:5]
    assert sweep.settings_of(sweep.Config(random=cfg.random, trials=5, seed=4), types) != found[:5]

def test_whole_numbers_are_equally_likely():
    """Of 3000 draws from 1, 2, 3 each gets 1000, give or take 4 standard deviations of 26."""
    rng = random.Random(0)
    drawn = [sweep.draw(['1:3'], int, rng, 'n') for _ in range(3000)]
    assert all(abs(drawn.count(n) - 1000) < 104 for n in '123')

@pytest.mark.parametrize('stage', sweep.STAGES)
def test_the_stages_are_commands(stage):
    """Each command is understood by its script, stands on earlier stages, and never asks a test prompt."""
    at = demo.Config(seed=2, out_dir='out/s/2', methods='rejection,distill')
    todo = sweep.stages(at, stage, [(dict(lr='1e-4'), dict(lr='1e-4')), (dict(lr='3e-4'), dict(lr='3e-4'))])
    before = set()
    for name, script, config, options, product, needs in todo:
        assert {*needs} <= before and name not in before, name
        before.add(name)
        if config:
            flags = [f'--{key}={value}' for key, value in options.items()]
            parsed = parse_config(import_module(script[:-3]).Config, [config, *flags])
            if script == 'evaluate.py':
                assert parsed.prompts == 'data/toy/prompts_val.jsonl'
    trial, evaluation = [stage for stage in todo if 'lr3e-4' in stage[0]]
    assert demo.command_of(trial, at)[:3] == ['python', sweep.STAGES[stage][0], f'config/toy/{stage}.py']
    folder = f'out/s/2/{stage}_lr3e-4'
    assert {'--lr=3e-4', '--seed=2', f'--out_dir={folder}'} <= {*demo.command_of(trial, at)}
    assert trial[4] == f'{folder}/model.safetensors' and trial[0] in evaluation[5]
    words = demo.command_of(evaluation, at)
    if stage == 'reward':
        assert {f'--reward_model={folder}', '--rankings=out/s/2/rankings_val.jsonl', '--models=sft=out/s/2/sft'
                } <= {*words} and 'collect val' in evaluation[5]
    else:
        assert {f'--models=sft=out/s/2/sft,trial={folder}', '--reward_model=out/s/2/reward', '--rankings='} <= {*words}
    assert not any(name in before for name in ('ppo', 'dpo')) and ('rejection' in before) == (stage == 'distill')

def test_rankings_of_test_prompts_are_not_read():
    (_, options), = sweep.read_settings(sweep.Config(stage='hinge', grid='lr=1e-4'))['hinge']
    assert options == dict(lr='1e-4', val_data='')
    (_, options), = sweep.read_settings(sweep.Config(stage='ppo', grid='lr=1e-4'))['ppo']
    assert options == dict(lr='1e-4')

def test_every_setting_has_its_own_folder():
    """Also where a character was replaced, where only long ends differ, and where a value reads like an option."""
    assert sweep.name_of('dpo', dict(lr='1e-4', kl_coef='0.1')) == 'dpo_lr1e-4_kl_coef0.1'
    settings = [dict(init_from=x, lr='1') for x in ('out/toy/sft', 'out_toy/sft', 'out_toy_sft', 'é' * 300,
                                                    'x' * 300, 'x' * 300 + 'y')]
    settings += [dict(train_data='a_val_datab', val_data='c'), dict(train_data='a', val_data='b_val_datac')]
    names = [sweep.name_of('dpo', setting) for setting in settings]
    assert len({*names}) == 8 and names[0].startswith('dpo_init_fromout_toy_sft_lr1_')
    assert all(len(f'{name} val.txt'.encode()) < 150 for name in names) # file systems allow 255 bytes

# ---------------------------------------------------------------------------------------------------------------------
# a sweep

def test_results_table_and_figure(fake, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    run(sweep, stage='dpo', grid='lr=0.25,0.5 loss=dpo', seeds='1,3', out_dir=str(tmp_path))
    out = capsys.readouterr().out
    table = out[out.index('| dpo, models.gold'):]
    # the means of 1 and 3 are 2
    assert table.splitlines()[:4] == ['| dpo, models.gold | lr | loss |', '| -- | -- | -- |',
                                      '| 2.500 (1.500–3.500) | 0.5 | dpo |', '| 2.250 (1.250–3.250) | 0.25 | dpo |']
    assert 'the best of 2: python dpo.py config/toy/dpo.py --lr=0.5 --loss=dpo' in out
    assert results(tmp_path) == dict(dpo=dict(score='models.gold', seeds=[1, 3], trials=[
        dict(options=dict(lr='0.5', loss='dpo'), scores=[1.5, 3.5]),
        dict(options=dict(lr='0.25', loss='dpo'), scores=[1.25, 3.25])]))
    assert (tmp_path / 'dpo.png').read_bytes().startswith(b'\x89PNG')
    # a later sweep of another stage, by another score, leaves what is there
    run(sweep, stage='ipo,hinge', grid='lr=0.25,0.5', seeds='1', out_dir=str(tmp_path), score='models.by.x')
    found = results(tmp_path)
    assert list(found) == ['dpo', 'ipo', 'hinge'] and found['ipo']['trials'][0]['scores'] == [0.5]
    assert '| hinge | 0.500 | `python dpo.py config/toy/hinge.py --lr=0.5` |' in capsys.readouterr().out
    run(sweep, stage='reward', grid='lr=0.5', seeds='1', out_dir=str(tmp_path))
    assert results(tmp_path)['reward']['trials'] == [dict(options=dict(lr='0.5'), scores=[0.05])]

def test_finalists_alone_are_trained_with_the_other_seeds(fake, tmp_path, capsys):
    """Of three settings the best two of the first seed; the one that is left behind keeps its one score."""
    run(sweep, stage='dpo', grid='lr=0.25,1,0.5', seeds='1,3', finalists=2, out_dir=str(tmp_path))
    trained = [[name for name in names if name.startswith('dpo_') and not name.endswith(' val')] for _, names in RAN]
    assert trained == [['dpo_lr0.25', 'dpo_lr1', 'dpo_lr0.5'], ['dpo_lr1', 'dpo_lr0.5']]
    assert [trial['scores'] for trial in results(tmp_path)['dpo']['trials']] == [[2, 4], [1.5, 3.5], [1.25]]
    assert 'the best of 3: python dpo.py config/toy/dpo.py --lr=1\n' in capsys.readouterr().out

def test_the_order_of_trials():
    """By the seeds they have, then by the mean; last what diverged in one."""
    trials = [dict(name=name, scores=scores) for name, scores in dict(
        early=[9], lost=[None], sick=[5, None], good=[4, 6], better=[8, 4]).items()]
    assert [trial['name'] for trial in sweep.rank(trials)] == ['better', 'good', 'early', 'sick', 'lost']

def test_a_wide_range_has_plain_numbers_at_its_ticks(tmp_path, monkeypatch):
    """More than a factor of ten: a logarithmic axis."""
    seen = drawn_axes(monkeypatch, sweep)
    trials = [dict(options=dict(lr=lr, beta=beta), scores=[0.5]) for lr, beta in (('1e-5', '0.1'), ('0.01', '0.2'))]
    sweep.draw_figure(trials, 'models.gold', str(tmp_path / 'sweep.png'))
    lr, beta = seen
    assert (lr.get_xscale(), beta.get_xscale()) == ('log', 'linear')
    assert {'1e-05', '0.0001', '0.001', '0.01'} <= {tick.get_text() for tick in lr.get_xticklabels()}

def test_a_setting_that_diverges_comes_last(fake, tmp_path, capsys):
    run(sweep, stage='dpo', grid='lr=9,0.5,0.25', seeds='1,2', out_dir=str(tmp_path))
    assert [(trial['options']['lr'], trial['scores']) for trial in results(tmp_path)['dpo']['trials']] == [
        ('0.5', [1.5, 2.5]), ('0.25', [1.25, 2.25]), ('9', [10.0, None])]
    assert '| – | 9 |' in capsys.readouterr().out
    run(sweep, stage='ipo', grid='lr=9', seeds='2', out_dir=str(tmp_path)) # none is left that could be the best
    assert 'the best' not in capsys.readouterr().out and not (tmp_path / 'ipo.png').exists()
    mine = [[name for name in names if name.startswith('dpo')] for seed, names in RAN if seed == 2]
    assert mine[1:3] == [['dpo_lr9'], ['dpo_lr0.5', 'dpo_lr0.5 val', 'dpo_lr0.25', 'dpo_lr0.25 val']]

@pytest.mark.parametrize('code, name', [(2, 'dpo_lr1'), (130, 'dpo_lr1'), (1, 'sft')])
def test_other_failures_end_the_sweep(tmp_path, monkeypatch, code, name):
    """Bad input, Ctrl-C, and an error in what all trials stand on: nothing is tried again."""
    RAN.clear()

    def run_stages(todo, at):
        RAN.append(at.seed)
        with open(f'{at.out_dir}/demo.json', 'w') as f:
            json.dump({name: [['python'], 1, None]}, f)
        raise SystemExit(code)

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    with pytest.raises(SystemExit) as stopped:
        run(sweep, grid='lr=1', out_dir=str(tmp_path))
    assert stopped.value.code == code and RAN == [1] and not (tmp_path / 'results.json').exists()

# ---------------------------------------------------------------------------------------------------------------------
# bad input

@pytest.mark.parametrize('options, line', [
    (dict(grid='lr=1e-4', random='lr=1:2'), 'grid must be given, or random, and not both'), (dict(), 'grid must be'),
    (dict(stage='sfft', grid='lr=1'), "stage must be names among ppo,"), (dict(grid='lr=1', trials=3), 'left at 12'),
    (dict(grid='lr'), "--grid=lr: wanted option=value,value,… with a space between options, all different, got 'lr'"),
    (dict(grid='lr=1,1'), 'all different'), (dict(grid='lr=1 lr=2'), "got 'lr=2'"), (dict(grid='lr=1,'), 'wanted'),
    (dict(grid='lrr=1'), '--lrr=1: unknown option lrr, did you mean lr?'),
    (dict(grid='lr=1e-4,fast'), "--lr=fast: lr must be float, got 'fast'"),
    (dict(grid='batch_size=2.5'), '--batch_size=2.5: batch_size must be int'),
    (dict(stage='dpo,rrhf', grid='beta=1'), '--beta=1: unknown option beta'),
    (dict(grid='seed=1,2'), '--grid: each run has its own seed'), (dict(grid='lr=-1'), 'lr must be at least 0'),
    (dict(random='seed=1:3'), '--random: each run has its own seed; wanted another option'),
    (dict(random='lr=1:a'), '--random: lr=1:a: wanted low:high or low:high:log, numbers, low below high'),
    (dict(random='lr=0:1:log'), 'above 0 with log'), (dict(random='lr=2:1'), 'low below high'),
    (dict(random='batch_size=1:2.5'), 'whole numbers'), (dict(random='lr=1:2:lin'), 'wanted low:high or'),
    (dict(random='loss=dpo,ipo', trials=3), '--trials=3: loss=dpo,ipo gave only 2 different settings'),
    (dict(grid='lr=1', score='gold'), "score must be keys of results.json, as in greedy.gold, got 'gold'"),
    (dict(grid='lr=1', seeds='1,1'), 'each once'),
])
def test_bad_options(tmp_path, capsys, options, line):
    assert line in stops(capsys, sweep, out_dir=str(tmp_path / 'out'), **options)
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('score', ['models.silver', 'models.gold.x', 'greedy.gold', 'models.by'])
def test_a_score_that_is_not_there(fake, tmp_path, capsys, score):
    line = one_line(capsys, lambda: run(sweep, grid='lr=1', seeds='1', out_dir=str(tmp_path), score=score))
    assert f'--score={score}: {tmp_path}/1/dpo_lr1/val/results.json has no such number' in line

def test_a_score_that_is_not_there_is_found_early(fake, tmp_path, capsys):
    """After the first two evaluations, which run side by side. What diverged says nothing, and is not tried again."""
    options = dict(grid='lr=9,1,2,3', out_dir=str(tmp_path), score='models.silver')
    one_line(capsys, lambda: run(sweep, seeds='2', **options))
    assert [name for _, names in RAN[-1:] for name in names if name.endswith(' val')] == ['dpo_lr1 val']
    RAN.clear()
    run(sweep, seeds='2,3', **options | dict(score='models.gold'))
    assert results(tmp_path)['dpo']['trials'][-1] == dict(options=dict(lr='9'), scores=[None, 12.0])
    assert [trial['scores'] for trial in results(tmp_path)['dpo']['trials'][:-1]] == [[5, 6], [4, 5], [3, 4]]
