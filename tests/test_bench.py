"""bench.py: every workload prints its line, counts the right tokens, and bad options end with one line."""
import json

import pytest

import bench
import common
from tiny import COMPARISONS, TOK, checkpoint, records, stops

KEYS = {'workload', 'preset', 'tokens', 'seconds', 'tokens_per_s', 'peak_rss_mb'}
PAIR = dict(prompt='How many? ' * 3, chosen='Seven of them, I should say.', rejected='Hm.')
TEXT = '### Human: How many? How many? How many? \n### Assistant:' # each answer: a space before, EOS behind


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, 'tiny', (1, 2, 16, 512))


def lines(capsys, **options):
    options = dict(device='cpu', threads=1, repeats=1, steps=1, batch_size=2) | options
    bench.main(common.parse_config(bench.Config, [f"--{k}={v}" for k, v in options.items()]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('workload', ['generate', 'lm', 'sft', 'rm', 'dpo', 'ppo'])
def test_one_line_on_random_rows(capsys, workload, dtype):
    line, = lines(capsys, workload=workload, dtype=dtype)
    assert KEYS <= set(line) and (line['workload'], line['preset']) == (workload, 'tiny')
    assert line['tokens'] > 0 and line['seconds'] > 0 and line['peak_rss_mb'] > 0
    # seconds are rounded to 1e-4, and a lap may be as short as a few hundredths
    assert line['tokens_per_s'] == pytest.approx(line['tokens'] / line['seconds'], rel=0.05)
    if workload == 'lm':
        assert line['tokens'] == line['positions'] == 512 # 2 windows of 256
    if workload in ('generate', 'ppo'):
        assert line['tokens'] == 2 * dict(generate=128, ppo=32)[workload] # no row ends early


def test_memory_has_a_line_for_each_stage_and_size(capsys):
    found = lines(capsys, workload='memory', batch_size=0)
    assert [line['model'] for line in found] == [name for name in ('124M', '355M', '774M', '1.5B') for _ in range(5)]
    assert [line['stage'] for line in found[:5]] == ['sft', 'reward', 'dpo', 'ppo', 'reinforce']
    # 1557611200 parameters in float32: 5.80 GiB; keys and values of 64 rows: 2 * 48 * 1600 * 4 * 65536 bytes
    assert (found[15]['weights'], found[15]['optimizer'], found[15]['gradients']) == (5.8, 11.61, 5.8)
    assert found[18]['kv_cache'] == 37.5
    assert all(line['activations_checkpointing'] < line['activations'] for line in found)
    assert all(line['total_checkpointing'] <= line['total'] for line in found)


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


def test_bad_options(capsys, tmp_path):
    assert 'workload must be one of generate, lm, sft, rm, dpo, ppo, memory' in stops(capsys, bench, workload='train')
    assert 'workload must be' in stops(capsys, bench)
    assert 'preset must be one of' in stops(capsys, bench, workload='lm', preset='huge')
    assert 'dtype must be' in stops(capsys, bench, workload='lm', dtype='float64')
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
