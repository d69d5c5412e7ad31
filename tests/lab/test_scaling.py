"""lab/scaling.py: operations, bytes and seconds by hand, against counted operations, and a run with made-up points."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest

import bench
from common.options import parse_config
from common.run import Run
from lab import memory, scaling
from lab.scaling import Batch, Rates, fit, flop, forward_flop, held, optimizer_bytes, predict, train_flop
from model import GPTConfig
from tiny import ROOT, by_hand, drawn_axes, run, stops

ONE = GPTConfig(block_size=16, vocab_size=11, n_layer=1, n_head=2, n_embd=8) # one layer: C^2 = 64, V C = 88
RATES = Rates(best=1e6, copy=1e6, share=0.5, share_s=0.25, overhead=0.001)

# ---------------------------------------------------------------------------------------------------------------------
# formulas

def test_a_pass_by_hand():
    """Two rows of 5 tokens, of which 4 are read: 10 * 3 * 64 + 4 * 9 * 64 + 4 * 88 = 4576 products of two operations.

    Attention: 2 products of 5 * 5 * 8 a row. Backwards twice the products, and five of attention.
    """
    shape = ONE, 2, 5, 4, 4
    assert forward_flop(*shape) == 2 * 4576 + 1600
    assert train_flop(*shape) == 6 * 4576 + 1600 * 7 // 2
    # the block again, but not the vocabulary: 2 * (1920 + 2304) + 1600
    assert train_flop(*shape, checkpointing=True) == 6 * 4576 + 5600 + 10048
    assert forward_flop(replace(ONE, reward_head=True), 2, 5, 4, 0) == 2 * (4224 + 4 * 8) + 1600

def test_where_prompts_are_shared():
    """Answers of 2 to a prompt of 3: one row of 3 + 2, not 2 of 4. Long answers would look past one another."""
    assert Batch(ONE, 1, 3, 2, 2).rows(1) == (1, 5) and Batch(ONE, 1, 3, 2, 2).rows(0) == (1, 7)
    assert Batch(ONE, 2, 1, 50, 3).rows(0) == (6, 51) # 306 * (48 + 51) < 302 * (48 + 151)
    assert Batch(ONE, 2, 3, 2, 1).rows(1) == (2, 4)

def test_dpo_by_hand():
    """One row of 5, 4 places: 5 * 192 + 4 * 576 + 4 * 88 = 3616 products, attention 4 * 25 * 8; forward and trained."""
    assert flop('dpo', Batch(ONE, 1, 3, 2, 2)) == (7232 + 800) + (3 * 7232 + 2800)

def test_an_iteration_of_ppo_by_hand():
    """A row of 3 + 2 tokens. The policy and the critic see 4 of them, the reward model 5 and reads one place.

    Blocks: 4 * 192 + 2 * 576 = 1920, 5 * 192 + 576 = 1536; vocabulary 2 * 88, heads 2 * 8 and 8; attention 4 T T 8.
    """
    policy, critic, reward = 2 * (1920 + 176), 2 * (1920 + 16), 2 * (1536 + 8)
    scored = policy + 512 + critic + 512 + reward + 800
    trained = 3 * (policy + critic) + 2 * 1792
    assert flop('ppo', Batch(ONE, 1, 3, 2, 1, epochs=4)) == scored + 4 * trained
    assert flop('rloo', Batch(ONE, 1, 3, 2, 1)) == policy + 512 + reward + 800 + 3 * policy + 1792

def test_sampling_by_hand():
    """A prompt of 3, two answers of 3: the prompt once, then two tokens more with 4 and 5 keys to look at."""
    b = Batch(ONE, 1, 3, 3, 2)
    prompt = 2 * (3 * 192 + 576 + 2 * 88) + 4 * 9 * 8
    assert scaling.sampling_flop(b) == prompt + 2 * 2 * 2 * (768 + 88) + 4 * 2 * (4 + 5) * 8 == 10368
    # 216 + 872 + 16 = 1104 parameters of 4 bytes; keys and values of 2 rows of 3 + 1 tokens: 2 * 2 * 4 * 8 * 4
    assert scaling.sampling_bytes(b) == 3 * (4416 + 512) and scaling.sampling_bytes(b, 'bfloat16') == 3 * (2208 + 256)
    work = (10368 + 14784) / 1e6 / 0.25
    assert scaling.sampling_seconds(b, RATES) == by_hand(work + 3 * 0.001)
    assert scaling.sampling_seconds(b, replace(RATES, overhead=1.0, ahead=True)) == by_hand(3.0)

def test_the_seconds_of_a_step_by_hand():
    """SFT on a row of 3 + 2: 4 * 192 + 2 * 576 + 2 * 88 = 2096 products; 1104 parameters; a layer, forward and back."""
    b = Batch(ONE, 1, 3, 2)
    work, adam = (6 * 2096 + 512 * 3.5) / 0.5e6, 28 * 1104 / 1e6
    assert (work, adam) == (by_hand(0.028736), by_hand(0.030912))
    assert predict('sft', b, RATES) == by_hand(work + 3 * 0.001 + adam)
    assert scaling.update_seconds('sft', b, replace(RATES, ahead=True)) == by_hand(work + adam)
    assert scaling.update_seconds('sft', b, replace(RATES, ahead=True), parts=10) == by_hand(30 * 0.001 + adam)
    assert predict('rloo', b, RATES) > scaling.update_seconds('rloo', b, RATES) # and samples
    assert scaling.layer_passes('ppo', replace(b, epochs=2)) == 3 + 3 * 4
    assert scaling.layer_passes('ppo', replace(b, epochs=2), checkpointing=True) == 3 + 4 * 4
    assert optimizer_bytes('ppo', replace(b, epochs=2)) == 2 * 28 * (1104 + 1104 + 9) # the critic's head has a bias

def test_memory_is_that_of_lab_memory():
    b, reward = Batch(ONE, 2, 3, 2, 2), replace(ONE, reward_head=True)
    fixed = dict(dtype='float32', several=False)
    assert held('sft', replace(b, K=1)) == memory.needs([ONE], [], 2, 4, 2, 2, **fixed)['total']
    assert held('dpo', b) == memory.needs([ONE], [], 2, 5, 4, 4, sharing=True, **fixed)['total']
    assert held('reward', b) == memory.needs([reward], [], 2, 7, 2, 0, sharing=True, **fixed)['total']
    assert held('ppo', b) == memory.needs([ONE, reward], [ONE, reward], 2, 5, 4, 4, sharing=True, **fixed)['total']
    # not shared: 4 rows of 1 + 8 - 1 tokens, an answer in each
    c, r = replace(ONE, n_embd=2), replace(reward, n_embd=2)
    assert held('rloo', Batch(c, 1, 1, 8, 4)) == memory.needs([c], [c, r], 4, 8, 8, 8, **fixed)['total']
    # where sampling takes the most: keys and values of 4 rows of 2 + 100 tokens, beside all models and both averages
    need = memory.needs([ONE], [ONE, reward], 1, 4, 4, 4, sampled=1000, **fixed)
    many = Batch(ONE, 1, 2, 2, 1000)
    assert held('rloo', many) >= need['weights'] + need['optimizer'] + 2 * 1000 * 4 * 8 * 4

@pytest.mark.parametrize('stage', scaling.STAGES)
@pytest.mark.parametrize('K', [2, 4])
def test_operations_are_those_that_torch_counts(stage, K):
    """Exactly, in the laps that are timed, by the counter of bench.py."""
    c = GPTConfig(1024, 97, 3, 2, 16)
    b = Batch(c, 2, 8, 6, 1 if stage == 'sft' else K, 2 if stage == 'ppo' else 1)
    lap, sample = (scaling.rollout_lap if stage in scaling.SAMPLED else scaling.training_lap)(
        stage, b, 2, Run('cpu', 'float32'))
    if sample:
        assert bench.count_operations(sample) == scaling.sampling_flop(b)
        assert bench.count_operations(lap) == scaling.sampling_flop(b) + flop(stage, b)
    else:
        assert bench.count_operations(lap) == 2 * flop(stage, b) # two steps

# ---------------------------------------------------------------------------------------------------------------------
# the fit

def made_up(rates, stages=scaling.STAGES):
    """Return points that follow the formulas, and what they are of."""
    batches, found = {}, {}
    for stage in stages:
        for size in ('0.6M', '12M'):
            for B in (2, 16):
                b = scaling.batch_of(stage, size, 64, 2, B, 2)
                sampling = [scaling.sampling_seconds(b, rates)] if stage in scaling.SAMPLED else []
                batches[f'{stage} {size} {B}'] = stage, b
                found[f'{stage} {size} {B}'] = dict(best=rates.best, copy=rates.copy, sampling=sampling,
                                                    seconds=[predict(stage, b, rates)], peak_mb=1)
    return found, batches

def test_a_fit_finds_what_was_put_in():
    rates = Rates(1e11, 2e10, 0.6, 0.25, 3e-4)
    found, error = fit(*made_up(rates))
    assert [found.share, found.share_s, found.overhead] == by_hand([0.6, 0.25, 3e-4]) and error < 1e-6
    found, error = fit(*made_up(rates, ['sft', 'dpo'])) # nothing samples
    assert [found.share, found.share_s, found.overhead] == by_hand([0.6, 1.0, 3e-4])
    points, batches = made_up(rates, ['rloo'])
    points['rloo 0.6M 2']['sampling'] = points['rloo 0.6M 2']['seconds'] # measured apart: it may last as long by chance
    found, _ = fit(points, batches)
    assert 0.5 < found.share < 0.8 and 0.2 < found.share_s < 0.3
    points, batches = made_up(rates, ['sft'])
    for name in points: # small models faster than their operations allow: no overhead is below 0
        points[name]['seconds'] = [predict(*batches[name], replace(rates, overhead=-1e-4))]
    found, error = fit(points, batches)
    assert found.overhead == 0 and 0.6 < found.share < 1 and error > 0.01

def test_the_error_is_that_of_the_rates_returned():
    """Large models as fast as small ones: 1 / share comes out below 0, and 1 stands in for it."""
    points, batches = made_up(Rates(1e11, 2e10, 0.6, 0.25, 3e-4), ['sft'])
    for name, (stage, b) in batches.items():
        adam = optimizer_bytes(stage, b) / 2e10
        points[name]['seconds'] = [adam + 2.0 * scaling.layer_passes(stage, b) - 1e-12 * flop(stage, b)]
    rates, error = fit(points, batches)
    assert rates.share == 1.0
    errors = [predict(*batches[name], rates) / p['seconds'][0] - 1 for name, p in points.items()]
    assert error == by_hand((sum(x * x for x in errors) / len(errors)) ** 0.5)

# ---------------------------------------------------------------------------------------------------------------------
# running

WHAT = Rates(1e11, 2e10, 0.5, 0.25, 1e-4)
SMALL = dict(stages='sft,rloo', sizes='0.6M,3M', lengths='64,128', answers='2,4', batches='2,8', repeats=2)

@pytest.fixture
def measured(monkeypatch):
    """The points that are measured; their seconds are made up."""
    seen = []

    def apart(stage, b, steps, repeats):
        seen.append((stage, b.c.n_layer, b.P + b.A, b.K, b.B))
        seconds, sampling = predict(stage, b, WHAT), scaling.sampling_seconds(b, WHAT)
        return dict(seconds=[0.9 * seconds, seconds, 2 * seconds], sampling=[sampling] if stage == 'rloo' else [],
                    peak_mb=100, best=1e11, copy=2e10)

    monkeypatch.setattr(scaling, 'apart', apart)
    return seen

def test_each_axis_varies_alone(measured, tmp_path, capsys):
    out = str(tmp_path / 'out')
    run(scaling, out_dir=out, **SMALL)
    base = 6, 64, 2, 2 # layers of 3M
    assert {point[1:] for point in measured if point[0] == 'rloo'} == {
        base, (4, *base[1:]), (6, 128, 2, 2), (6, 64, 4, 2), (6, 64, 2, 8)}
    assert {point[1:] for point in measured if point[0] == 'sft'} == { # K is 1
        (6, 64, 1, 2), (4, 64, 1, 2), (6, 128, 1, 2), (6, 64, 1, 8)}
    assert [point[1] for point in measured] == sorted(point[1] for point in measured) # the largest models last
    said = capsys.readouterr().out
    assert '| tokens in a row, T | 64 | 128 |' in said and '| parameters | 0.6M | 3M |' in said
    assert 'fitted: share 0.50, share_s 0.25, overhead 0.10 ms' in said and 'errors: 0.00' in said
    assert 'best product 100 GFLOP/s, copying 20 GB/s' in said
    with open(tmp_path / 'out' / 'results.json') as f:
        results = json.load(f)
    assert len(results['points']) == 9 and results['fit']['best'] == 1e11 and results['how']['repeats'] == 2

    done = len(measured)
    run(scaling, out_dir=out, **SMALL | dict(batches='2,8,32'))
    assert measured[done:] == [('sft', 6, 64, 1, 32), ('rloo', 6, 64, 2, 32)] # the rest is reused
    line = stops(capsys, scaling, out_dir=out, **SMALL | dict(repeats=1)) # other laps
    assert 'results.json: its points are of' in line and 'or another --out_dir' in line and len(measured) == done + 2

def test_cells_and_what_is_missing(capsys):
    """Two steps of .1, .2 and .4 s: 20 tokens in .2 s are 100 a second."""
    point = 595008, '0.6M', [0.1, 0.4, 0.2], 0.25, 30, 28.34, 20
    other = 3259392, '3M', [1.0], 123.4, None, 100.6, 20
    scaling.print_lines(dict(size=dict(sft=[point], ppo=[point, other])), RATES, 0.1)
    said = capsys.readouterr().out.splitlines()
    assert said[1:9] == [
        '| parameters | 0.6M | 3M |', '| -- | -- | -- |', '| sft, tokens/s | 100 | – |',
        '| sft, s / formula | 0.2 (0.1–0.4) / 0.25 | – |', '| sft, MiB / formula | 30 / 28.3 | – |',
        '| ppo, tokens/s | 100 | 20 |', '| ppo, s / formula | 0.2 (0.1–0.4) / 0.25 | 1 (1–1) / 123 |',
        '| ppo, MiB / formula | 30 / 28.3 | – / 101 |']

def test_the_figure(measured, tmp_path, monkeypatch):
    axes = drawn_axes(monkeypatch, scaling)
    run(scaling, out_dir=str(tmp_path / 'out'), **SMALL)
    assert [ax.get_xlabel() for ax in axes] == 2 * list(scaling.AXES.values())
    assert [ax.get_ylabel() for ax in axes] == 4 * ['CPU seconds of a step'] + 4 * ['MiB']
    dots, line = axes[0].lines[:2] # of sft, by model size
    assert list(dots.get_xdata()) == [595008, 3259392] and line.get_label() == 'sft'
    assert len(axes[2].lines) == 2 and list(axes[7].lines[0].get_xdata()) == [2, 8] # K has no sft
    assert list(axes[7].lines[0].get_ydata()) == [100, 100]

def test_the_minutes_end(measured, tmp_path, capsys):
    run(scaling, out_dir=str(tmp_path / 'out'), **SMALL | dict(stages='sft', sizes='0.6M', minutes=1e-6))
    assert len(measured) == 1 and 'points are not measured: sft 3M' in capsys.readouterr().out

def test_too_few_points_tell_nothing(measured, tmp_path, capsys):
    run(scaling, out_dir=str(tmp_path), stages='sft', sizes='3M', lengths='64,128', answers='2', batches='2,8')
    said = capsys.readouterr().out
    assert len(measured) == 3 and 'too few points to fit share, share_s and overhead: wanted at least 4\n' in said
    assert 'fitted' not in said and json.loads((tmp_path / 'results.json').read_text())['error'] is None

@pytest.mark.parametrize('change', [
    lambda points: None, lambda points: [],
    *(lambda points, bad=bad: points | {'rloo 3M T=64 K=2 B=2': bad} for bad in (
        {}, 1, dict(seconds=[1.0], sampling=[], best=1e11, copy=2e10, peak_mb=1))),
    *(lambda points, new=new: {name: p | new for name, p in points.items()} for new in (
        dict(best=None), dict(copy=0), dict(seconds=[]), dict(seconds=[None]), dict(seconds=[0.0]), dict(seconds=1.0),
        dict(sampling=None), dict(peak_mb='1')))])
def test_damaged_points(measured, tmp_path, capsys, change):
    run(scaling, out_dir=str(tmp_path), **SMALL)
    path = tmp_path / 'results.json'
    results = json.loads(path.read_text())
    path.write_text(text := json.dumps(results | dict(points=change(results['points']))))
    line = stops(capsys, scaling, out_dir=str(tmp_path), **SMALL)
    assert line.startswith(f'{path}: ') and 'wanted' in line and line.endswith('; another --out_dir measures anew')
    assert path.read_text() == text

@pytest.mark.parametrize('stage', ['reward', 'ppo'])
def test_a_point_in_a_process_of_its_own(stage):
    b = Batch(GPTConfig(64, 2000, 2, 2, 256), 2, 8, 8, 2) # some 2 million parameters
    code = ('import json, torch; from lab.scaling import Batch, GPTConfig, apart; torch.set_num_threads(1)\n'
            f'print(json.dumps([apart({stage!r}, {b!r}, 1, 2), torch.get_num_threads()]))')
    point, threads = json.loads(subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, check=True,
                                      capture_output=True).stdout) # a fork of this process would use memory it left
    assert len(point['seconds']) == 2 and min(point['seconds']) > 0
    assert len(point['sampling']) == (2 if stage == 'ppo' else 0)
    assert point['best'] > 1e9 and point['copy'] > 1e8 and threads == 1
    assert point['peak_mb'] is None or point['peak_mb'] == pytest.approx(held(stage, b) / 2**20, rel=0.5)

@pytest.mark.parametrize('options, line', [
    (dict(out_dir=''), "--out_dir=: out_dir must be a folder, got ''"),
    (dict(stages='sft,kto'), "stages must be some of sft,reward,dpo,ppo,rloo, each once, got 'sft,kto'"),
    (dict(stages='sft,sft'), 'each once'), (dict(sizes='7B'), 'sizes must be some of 0.6M,3M'),
    (dict(base='7B'), 'base must be one of'), (dict(lengths='64,65'), 'rising even numbers from 4 to 1024'),
    (dict(lengths='128,64'), 'rising'), (dict(lengths=''), 'rising'), (dict(lengths='2048'), 'to 1024'),
    (dict(answers='1,2'), 'answers must be rising numbers from 2'), (dict(batches='0,2'), 'rising numbers above 0'),
    (dict(repeats=0), 'repeats must be at least 1'), (dict(minutes=0), 'minutes must be above 0')])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, scaling, **options)

def test_defaults_are_good():
    """72 points; GPT-2's own size is the largest, at its published number of parameters."""
    cfg = parse_config(scaling.Config, [])
    assert len(scaling.points(cfg)) == 4 * 15 + 12
    assert memory.n_parameters(scaling.config_of('124M')) == 124439808
