"""bench.py: every workload times the scripts' own functions, prints its line and counts the right tokens."""
import json
import re
import sys

import pytest
import torch

import bench
import dpo
import ppo
import reinforce
import reward
import sft
from common.options import parse_config
from model import GPT, GPTConfig
from tiny import COMPARISONS, TOK, checkpoint, records, stops

KEYS = {'workload', 'preset', 'tokens', 'seconds', 'tokens_per_s', 'peak_rss_mb'}
PAIR = dict(prompt='How many? ' * 3, chosen='Seven of them, I should say.', rejected='Hm.')
TEXT = '### Human: How many? How many? How many? \n### Assistant:' # each answer: a space before, EOS behind

@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, 'tiny', (1, 2, 16, 512))

def lines(capsys, **options):
    steps = {} if options['workload'] in bench.NO_STEPS else dict(steps=1)
    options = dict(device='cpu', threads=1, repeats=1, batch_size=2) | steps | options
    bench.main(parse_config(bench.Config, [f"--{k}={v}" for k, v in options.items()]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('workload', ['generate', 'lm', 'sft', 'rm', 'dpo', 'ppo', 'rloo'])
def test_one_line_on_random_rows(capsys, workload, dtype):
    line, = lines(capsys, workload=workload, dtype=dtype)
    assert KEYS <= set(line) and (line['workload'], line['preset']) == (workload, 'tiny')
    assert line['tokens'] > 0 and line['seconds'] > 0 and line['peak_rss_mb'] > 0
    # seconds are rounded to 1e-4, and a lap may be as short as a few hundredths
    assert line['tokens_per_s'] == pytest.approx(line['tokens'] / line['seconds'], rel=0.05)
    if workload == 'lm':
        assert line['tokens'] == line['positions'] == 512 # 2 windows of 256
    assert 0 <= line['padding'] < 1 and line['gflops'] > 0 and line['best_gflops'] > 0
    assert line['share_of_best'] == pytest.approx(line['gflops'] / line['best_gflops'], abs=0.02) # rounded
    if workload in bench.NO_STEPS: # 2 prompts; no row ends early, and the last new token is not given
        assert line['tokens'] == 2 * dict(generate=128, ppo=32, rloo=4 * 32)[workload] and line['padding'] == 0
        assert line['positions'] == 2 * dict(generate=64 + 127, ppo=32 + 31, rloo=32 + 4 * 31)[workload]

@pytest.mark.parametrize('workload, function, calls', [
    ('lm', (sft, 'update'), 3), ('sft', (sft, 'update'), 3), ('rm', (reward, 'update'), 3), ('dpo', (dpo, 'update'), 3),
    ('dpo', (dpo, 'reference_logp'), 1), ('ppo', (ppo, 'roll_out'), 1), ('ppo', (ppo, 'update'), 1),
    ('rloo', (reinforce, 'roll_out'), 1), ('rloo', (reinforce, 'update'), 1), ('generate', (GPT, 'generate'), 1)])
def test_a_lap_calls_the_scripts_own_functions(capsys, monkeypatch, workload, function, calls):
    """Three optimizer steps a lap, of PPO and RLOO one iteration; a lap warms up, two are timed, and one is counted."""
    where, name = function
    called, times_it = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: (called.append(a), times_it(*a, **k))[1])
    lines(capsys, workload=workload, repeats=2, **{} if workload in bench.NO_STEPS else dict(steps=3))
    assert len(called) == 4 * calls

@pytest.mark.parametrize('workload', ['sft', 'rm', 'dpo', 'rloo'])
def test_positions_are_those_that_the_model_computes(capsys, monkeypatch, workload):
    """The embedding sees them, once in an update; prompts of 16 to 127 tokens, which both answers share."""
    seen = []

    def update(where, model, args, times_it=dict(sft=sft, rm=reward, dpo=dpo, rloo=reinforce)[workload].update):
        hook = model.wte.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel()))
        out = times_it(*args)
        hook.remove()
        return out

    where = dict(sft=sft, rm=reward, dpo=dpo, rloo=reinforce)[workload]
    monkeypatch.setattr(where, 'update', lambda *args: update(where, args[0], args))
    line, = lines(capsys, workload=workload, batch_size=3)
    assert [line['positions']] * 3 == seen # the lap that warms up, the timed one and the one that is counted
    assert line['padding'] == 0 if workload == 'rloo' else line['padding'] > 0

def test_where_prompts_are_not_shared():
    """Three answers of 50 to a prompt of 1 would look past one another: 3 rows of 51, not one of 151 with n_embd=1."""
    rows, small = [bench.Row([1], [[2] * 50] * 2 + [[2] * 20], {})], GPT(GPTConfig(256, 5, 1, 1, 1))
    assert bench.sizes_of(rows, small, unread=0) == (51 + 51 + 21, 51 + 51 + 21, 3 * 51)
    wide = GPT(GPTConfig(256, 5, 1, 1, 1000)) # its products outweigh attention: 118 positions, 3 tokens are not given
    assert bench.sizes_of(rows, wide, unread=1) == (51 + 51 + 21, 118, 118)

def test_operations_by_hand():
    """One layer of 8 channels, 2 rows of 5 positions: 2 operations per position and weight, two more passes backwards.

    Attention: 2 products of 5 * 5 * 8 a row, and five on the way back: it works the scores out again.
    """
    model, idx = GPT(GPTConfig(16, 11, 1, 2, 8)), torch.zeros(2, 5, dtype=torch.long)
    products, attention = 2 * 10 * (12 * 64 + 11 * 8), 2 * 2 * 5 * 5 * 8
    with torch.no_grad():
        assert bench.count_operations(lambda: model(idx)) == products + 2 * attention
    assert bench.count_operations(lambda: model(idx)[0].sum().backward()) == 3 * products + (2 + 5) * attention

def test_the_best_product():
    """n = 256, 512, 1024, nine products each; the clock says 1, 4 and 16 ms at best: 33.6, 33.6 * 2 and * 4 GFLOP/s."""
    laps = [more * best for best in (0.001, 0.004, 0.016) for more in (3, 2, 2, 1, 2, 4, 1, 5, 5)]
    times = iter([t for seconds in laps for t in (7.0, 7.0 + seconds)])
    assert bench.best_product('cpu', 'float32', lambda: next(times)) == pytest.approx(2 * 1024**3 / 0.016 / 1e9)
    assert next(times, None) is None

def test_adapters_train_alone(capsys, monkeypatch):
    seen, update = [], sft.update
    monkeypatch.setattr(sft, 'update', lambda model, *a: (seen.append(
        sum(p.numel() for p in model.parameters() if p.requires_grad)), update(model, *a))[1])
    lines(capsys, workload='sft', lora_rank=2, lora_on='all')
    assert set(seen) == {2 * 16 * 16} # rank 2, 16 channels: see tests/lab/test_memory.py

def test_a_lap_trains(capsys, monkeypatch):
    """Each call is an optimizer step on the weights that the one before left; every lap has the same batches."""
    seen, update = [], sft.update

    def noting(model, teacher, optimizer, rows, *a):
        before = model.wte.weight.sum().item()
        out = update(model, teacher, optimizer, rows, *a)
        seen.append(([ids for ids, _ in rows], before, model.wte.weight.sum().item()))
        return out

    monkeypatch.setattr(sft, 'update', noting)
    lines(capsys, workload='sft', steps=2)
    rows, before, after = zip(*seen)
    assert len(rows) == 6 and rows[:2] == rows[2:4] == rows[4:] and rows[0] != rows[1]
    assert before[1:] == after[:-1] and len(set(after)) == 6

def test_memory_is_a_table_for_a_person(capsys):
    """A line for each stage and size; without --batch_size the rows are those of the timed steps."""
    bench.main(parse_config(bench.Config, ['--workload=memory', '--dtype=float32']))
    said = capsys.readouterr().out.splitlines()
    assert 'micro-batches of 8 rows of 1024 tokens' in said[0] and 'fits' in said[1] and max(map(len, said)) <= 120
    found = [line for line in said if line.startswith(('124M', '355M', '774M', '1.5B'))]
    assert [line.split()[0] for line in found] == [name for name in ('124M', '355M', '774M', '1.5B') for _ in range(6)]
    assert [line[7:].split('  ')[0] for line in found] == 4 * [
        'sft', 'reward', 'dpo, rrhf', 'kto', 'ppo', 'reinforce']
    # 1557611200 parameters in float32: 5.80 GiB, twice for the policy and its reference; AdamW's averages as much; keys
    # and values of 64 rows: 2 * 48 * 1600 * 4 * 65536 bytes
    assert 'weights 11.6, optimizer 11.6' in found[21] and 'kv_cache 37.5' in found[22]
    pairs = [re.findall(r'  ([0-9.]+) ', line)[:2] for line in found]
    assert all(float(less) <= float(total) for total, less in pairs) and len(pairs) == 24
    assert float(pairs[18][1]) < 0.5 * float(pairs[18][0]) # SFT with checkpointing

def test_memory_with_adapters(capsys):
    """What docs/models.md says of PPO's four models: GPT-2 XL on 24 GB, GPT-2 Large on 12 GB."""
    bench.main(parse_config(bench.Config, ['--workload=memory', '--dtype=bfloat16', '--lora_rank=8', '--lora_on=all',
                                           '--tokens=512']))
    said = capsys.readouterr().out.splitlines()
    assert 'adapters of rank 8 on all' in said[0]
    words = {tuple(line.split()[:2]): line.split() for line in said if line.split()[1:2] == ['ppo']}
    assert words['1.5B', 'ppo'][5:7] == ['17.6', '24'] and words['774M', 'ppo'][5:7] == ['10.4', '12']

@pytest.mark.parametrize('options', [dict(checkpointing=True), dict(dtype='float16')])
def test_a_step_with_less_memory(capsys, options):
    line, = lines(capsys, workload='sft', **options)
    assert line['tokens'] > 0

def test_generate_has_two_shapes(capsys, monkeypatch):
    monkeypatch.setitem(bench.DEFAULT_BATCHES, 'generate', (1, 2))
    shapes = [(line['batch_size'], line['tokens']) for line in lines(capsys, workload='generate', batch_size=0)]
    assert shapes == [(1, 128), (2, 256)]

@pytest.mark.parametrize('workload, tokens', [
    ('sft', 2 * (56 + 30)), # the chosen answer: 28 bytes, the space and EOS
    ('rm', 2 * (56 + 30 + 56 + 5)), # the prompt counts with each answer, however often the model sees it
    ('dpo', 2 * (56 + 30 + 56 + 5))])
def test_tokens_of_given_rows(capsys, tmp_path, workload, tokens):
    assert len(TEXT) == 56 and len(TOK.encode(PAIR['chosen'])) == 28
    folder = checkpoint(tmp_path / 'model', block_size=128)
    data = records(tmp_path / 'pairs.jsonl', [PAIR | dict(chosen=' '), PAIR, PAIR]) # the first is left out
    line, = lines(capsys, workload=workload, init_from=folder, data=data)
    assert line['tokens'] == tokens and line['preset'] == 'other' and line['model']['n_embd'] == 16

def test_a_tokenizer_of_the_models_size(capsys, tmp_path):
    """Without one beside the weights: an encoding of the model's size is trained on the data."""
    folder = checkpoint(tmp_path / 'model', vocab_size=262)
    (tmp_path / 'model' / 'tokenizer_name').unlink()
    data = records(tmp_path / 'pairs.jsonl', [PAIR] * 4)
    line, = lines(capsys, workload='sft', init_from=folder, data=data)
    assert line['tokens'] < 2 * (56 + 30)

def test_several_processes_are_refused(capsys, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    assert stops(capsys, bench, workload='lm') == (
        'bench.py measures one process; wanted it started without torchrun')

def test_windows_tells_no_peak(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert bench.peak_rss_mb() is None

def test_bad_options(capsys, tmp_path):
    assert 'workload must be one of generate, lm, sft, rm, dpo, ppo, rloo, memory' in stops(
        capsys, bench, workload='train')
    assert 'workload must be' in stops(capsys, bench)
    assert 'preset must be one of' in stops(capsys, bench, workload='lm', preset='huge')
    assert 'dtype must be' in stops(capsys, bench, workload='lm', dtype='float64')
    assert 'lora_on must be left' in stops(capsys, bench, workload='lm', lora_on='all')
    assert 'lora_rank must be left' in stops(capsys, bench, workload='generate', lora_rank=2)
    assert 'repeats must be at least 1' in stops(capsys, bench, workload='lm', repeats=0)
    assert 'no such file' in stops(capsys, bench, workload='sft', data=str(tmp_path / 'none.jsonl'))
    data = records(tmp_path / 'prompts.jsonl', [dict(prompt='Hi')])
    assert 'no comparison in it (line 1: ' in stops(capsys, bench, workload='sft', data=data)
    data = records(tmp_path / 'pairs.jsonl', COMPARISONS)
    assert 'wanted a row of 64 tokens' in stops(capsys, bench, workload='generate', data=data)
    folder = checkpoint(tmp_path / 'model') # a context of 64 tokens
    assert 'wanted a context of 192 tokens, got 64' in stops(capsys, bench, workload='generate', init_from=folder)
    folder = checkpoint(tmp_path / 'short', block_size=32)
    assert 'wanted a context of 34 tokens at least, got 32' in stops(capsys, bench, workload='sft', init_from=folder)
    assert 'device must be auto, cpu' in stops(capsys, bench, workload='lm', device='tpu')
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    assert 'is a reward model' in stops(capsys, bench, workload='lm', init_from=folder)
