"""
common/weights.py: GPT-2 in the Hugging Face layout, from folders, from transformers, and by names of the hub.

A small hub on loopback answers huggingface_hub as the real one does, so its cache, its token and its switches are those
that people know. Each test asks from a process of its own: they are read when it is imported.
"""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft
from common.checkpoints import load_policy, load_reward_model
from common.tokens import load_tokenizer
from common.weights import on_hub
from model import GPT, GPTConfig
from models import (IDX, LAYERS, LOGITS, ROWS, SCORES, T, all_values, close, formula_folder, formula_tensors, hf_greedy,
                    hf_model, hf_score, ragged, random_model, write_folder)
from reward import normalise_rewards
from tiny import COMPARISONS, DEMONSTRATIONS, PROMPTS, RANKINGS, ROOT, TOK, checkpoint, one_line, records, stops

# ---------------------------------------------------------------------------------------------------------------------
# files

@pytest.mark.parametrize('reward', [False, True])
def test_saved_tensors_are_the_ones_read(tmp_path, reward):
    folder = formula_folder(tmp_path / 'a', reward)
    GPT.from_pretrained(folder).save_pretrained(tmp_path / 'b')
    before, after = load_file(os.path.join(folder, 'model.safetensors')), load_file(tmp_path / 'b/model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)

def test_the_hubs_gpt2_loads(tmp_path):
    """Its file has no 'transformer.' prefix, the causal masks as buffers, and in some copies the tied projection."""
    tensors = formula_tensors()
    del tensors['score.weight']
    for layer in range(LAYERS):
        tensors[f'h.{layer}.attn.bias'] = torch.ones(1, 1, T, T).tril()
        tensors[f'h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
    tensors['lm_head.weight'] = tensors['wte.weight'].clone()
    config = json.load(open(os.path.join(formula_folder(tmp_path / 'c'), 'config.json')))
    config = {k: v for k, v in config.items() if k in ('model_type', 'vocab_size', 'n_positions', 'n_embd', 'n_layer',
                                                       'n_head')}
    model = GPT.from_pretrained(write_folder(tmp_path / 'a', tensors))
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)
    (tmp_path / 'a/config.json').write_text(json.dumps({**config, 'n_ctx': T, 'activation_function': 'gelu_new'}))
    model = GPT.from_pretrained(tmp_path / 'a')
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)

def as_shards(folder, save, single, shard):
    """A folder's tensors in two files behind an index, written by `save`."""
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    os.remove(os.path.join(folder, 'model.safetensors'))
    files = {name: shard.format(1 + i % 2) for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: t for name, t in tensors.items() if files[name] == file}, os.path.join(folder, file))
    with open(os.path.join(folder, single + '.index.json'), 'w') as f:
        json.dump({'metadata': {'total_size': 0}, 'weight_map': files}, f)

def as_bin(folder, **options):
    path = os.path.join(folder, 'model.safetensors')
    torch.save(load_file(path), os.path.join(folder, 'pytorch_model.bin'), **options)
    os.remove(path)

@pytest.mark.parametrize('change', [
    lambda d: as_shards(d, save_file, 'model.safetensors', 'model-{}-of-2.safetensors'),
    lambda d: as_shards(d, torch.save, 'pytorch_model.bin', 'pytorch_model-{}-of-2.bin'),
    as_bin, lambda d: as_bin(d, _use_new_zipfile_serialization=False)], ids=['shards', 'bin shards', 'bin', 'old bin'])
@pytest.mark.parametrize('reward', [False, True])
def test_weights_in_other_files(tmp_path, change, reward):
    folder = formula_folder(tmp_path, reward)
    change(folder)
    model = GPT.from_pretrained(folder, value_head=reward)
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)
    if reward: # its score is read twice: the critic starts as it
        assert all_values(model, torch.tensor([IDX]))[0, -1].item() == pytest.approx(SCORES[0][1], abs=1e-5)

def test_safetensors_before_torchs_format(tmp_path):
    folder = formula_folder(tmp_path)
    torch.save({}, tmp_path / 'pytorch_model.bin')
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

def test_a_pickle_of_strangers_is_not_executed(tmp_path, capsys):
    folder, trace = formula_folder(tmp_path / 'model'), str(tmp_path / 'executed')
    os.remove(os.path.join(folder, 'model.safetensors'))
    torch.save({'wte.weight': Malicious(trace)}, os.path.join(folder, 'pytorch_model.bin'))
    line = one_line(capsys, lambda: GPT.from_pretrained(folder))
    assert 'pytorch_model.bin: not a readable file of plain tensors (UnpicklingError' in line
    assert not os.path.exists(trace)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_float32(tmp_path, dtype):
    folder = formula_folder(tmp_path)
    edit_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    model, expected = GPT.from_pretrained(folder), formula_tensors()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wpe.weight, expected['wpe.weight'].to(dtype).float())
    assert torch.equal(model.h[1].mlp.c_fc.weight, expected['h.1.mlp.c_fc.weight'].to(dtype).float().t())

def test_the_embedding_under_the_projections_name(tmp_path):
    """The two are one tensor, and some tools keep the other name."""
    folder = formula_folder(tmp_path)
    edit_tensors(folder, lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')}))
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)

MEASURE = """
import sys
import common
from model import GPT
def kilobytes(what):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(what))
before = kilobytes('VmRSS')
model = GPT.from_pretrained(sys.argv[1])
loading = kilobytes('VmHWM') - before
open('/proc/self/clear_refs', 'w').write('5') # the peak starts anew
before = kilobytes('VmHWM')
model.save_pretrained(sys.argv[2])
print(loading, kilobytes('VmHWM') - before)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason="Linux tells the peak of memory")
def test_neither_loading_nor_saving_holds_a_second_copy(tmp_path):
    # 256 * 8000 + 64 * 256 + 20 * 12 * 256 * 256 numbers and some biases of 4 bytes: 71 MB, of which 8 in the largest
    GPT(GPTConfig(64, 8000, 20, 4, 256)).save_pretrained(tmp_path / 'a')
    out = subprocess.run([sys.executable, '-c', MEASURE, tmp_path / 'a', tmp_path / 'b'], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout
    loading, saving = (int(x) / 1000 for x in out.split()) # MB
    assert 60 < loading < 100 and saving < 20
    assert (tmp_path / 'a/model.safetensors').read_bytes() == (tmp_path / 'b/model.safetensors').read_bytes()

# ---------------------------------------------------------------------------------------------------------------------
# the same with transformers itself, random weights

def test_a_language_model_of_transformers_opens_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2LMHeadModel')
    theirs.save_pretrained(tmp_path)
    ours = load_policy(tmp_path)
    idx = torch.randint(13, (4, 16))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, **close)
    assert ours.generate(ROWS, 6, temperature=0) == [hf_greedy(theirs, row, 6) for row in ROWS]

def test_a_reward_model_of_transformers_opens_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2ForSequenceClassification')
    theirs.save_pretrained(tmp_path)
    ours = load_reward_model(tmp_path)
    expected = torch.tensor([hf_score(theirs, row) for row in ROWS])
    torch.testing.assert_close(ours.rewards(*ragged(ROWS, fill=11)), expected, **close)

@pytest.mark.parametrize('bias', [True, False])
def test_transformers_opens_our_language_model(hf, tmp_path, bias):
    ours = random_model(bias=bias)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    idx = torch.randint(11, (4, 16))
    torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx)[0], **close)

@pytest.mark.parametrize('bias', [True, False])
def test_transformers_opens_our_normalised_reward_model(hf, tmp_path, bias):
    ours, rows = random_model(bias=bias, reward_head=True), [[1, 2, 3, 4], [10, 0], [0, 0, 0, 7, 7, 7], [10]]
    normalise_rewards(ours, mean=-2.5, std=0.5)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    expected = torch.tensor([hf_score(theirs.eval(), row) for row in rows])
    torch.testing.assert_close(ours.rewards(*ragged(rows, fill=3)), expected, **close)

@pytest.mark.parametrize('kind', ['GPT2LMHeadModel', 'GPT2ForSequenceClassification'])
def test_more_tokens_than_the_tokenizer_has_go_there_and_back(hf, tmp_path, kind):
    """13 tokens of which the tokenizer knows 10, whose last is the end of text."""
    theirs = hf_model(hf, kind)
    theirs.save_pretrained(tmp_path / 'a')
    GPT.from_pretrained(tmp_path / 'a').save_pretrained(tmp_path / 'b', eos=9)
    again = getattr(hf, kind).from_pretrained(tmp_path / 'b').eval()
    assert (again.config.vocab_size, again.config.eos_token_id) == (13, 9)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))
    for row in ROWS:
        torch.testing.assert_close(again(torch.tensor([row])).logits, theirs(torch.tensor([row])).logits, **close)

def test_shards_of_transformers_open_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2LMHeadModel')
    theirs.save_pretrained(tmp_path, max_shard_size='10kB')
    assert (tmp_path / 'model.safetensors.index.json').exists()
    idx = torch.randint(13, (4, 16))
    torch.testing.assert_close(load_policy(tmp_path)(idx)[0], theirs(idx).logits, **close)

# ---------------------------------------------------------------------------------------------------------------------
# heads, dropout, biases

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('keep', [True, False])
def test_a_value_head_on_a_reward_model_starts_as_its_score(tmp_path, keep, bias):
    model = random_model(reward_head=True, bias=bias)
    normalise_rewards(model, mean=3.0, std=0.7)
    model.save_pretrained(tmp_path)
    critic = GPT.from_pretrained(tmp_path, value_head=True, **({} if keep else {'reward_head': False}))
    idx, lengths = ragged([[1, 2, 3, 4], [5, 6], [7]])
    at_last = all_values(critic, idx)[torch.arange(3), lengths - 1]
    torch.testing.assert_close(at_last, model.rewards(idx, lengths), **close)

def test_a_value_head_on_a_language_model_starts_at_zero_and_is_kept(tmp_path):
    random_model().save_pretrained(tmp_path / 'lm')
    model, idx = load_policy(tmp_path / 'lm', value_head=True), torch.randint(11, (2, 5))
    assert all_values(model, idx).tolist() == [[0.0] * 5] * 2
    with torch.no_grad():
        model.value_head.weight.normal_()
        model.value_head.bias.fill_(2.0)
    model.save_pretrained(tmp_path / 'both')
    for reopened in (GPT.from_pretrained(tmp_path / 'both'), load_policy(tmp_path / 'both', value_head=True)):
        assert torch.equal(all_values(reopened, idx), all_values(model, idx))
    assert load_policy(tmp_path / 'both').value_head is None # PPO's critic may have stayed in the folder

def test_a_checkpoints_dropout_is_left_out_unless_asked_for(tmp_path):
    random_model(dropout=0.3).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.dropout == 0.0
    assert GPT.from_pretrained(tmp_path, dropout=0.1).config.dropout == 0.1

@pytest.mark.parametrize('heads', [dict(), dict(reward_head=True), dict(value_head=True)])
def test_a_model_without_biases_comes_back_equal(tmp_path, heads):
    model, idx = random_model(bias=False, **heads), torch.randint(11, (2, 8))
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    names = {k.removeprefix('transformer.') for k in load_file(tmp_path / 'model.safetensors')}
    heads = {'reward_head': {'score.weight'}, 'value_head': {'value_head.weight', 'value_head.bias'}}
    expected = {k for k in formula_tensors() if k != 'score.weight'}
    assert names == expected.union(*(heads[h] for h in heads if getattr(model.config, h))) # the layout, nothing else

# ---------------------------------------------------------------------------------------------------------------------
# folders that are wrong

def edit_config(folder, **more):
    path = os.path.join(folder, 'config.json')
    config = {**json.load(open(path)), **more}
    with open(path, 'w') as f:
        json.dump({k: v for k, v in config.items() if v is not None}, f)

def edit_tensors(folder, change):
    path = os.path.join(folder, 'model.safetensors')
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

def truncated(folder):
    path = os.path.join(folder, 'model.safetensors')
    with open(path, 'rb+') as f:
        f.truncate(os.path.getsize(path) // 2)

def write(folder, name, content):
    with open(os.path.join(folder, name), 'wb') as f:
        f.write(content)

WRONG = {
    'not JSON': (lambda d: write(d, 'config.json', b'{"model_type": "gpt2",'), 'config.json: not JSON'),
    'binary': (lambda d: write(d, 'config.json', b'\xff\xfe\x00'), 'config.json: not JSON'),
    'a list': (lambda d: write(d, 'config.json', b'[1, 2]'), 'config.json: not a checkpoint'),
    'no config': (lambda d: os.remove(os.path.join(d, 'config.json')), 'config.json: No such file'),
    'another model': (lambda d: edit_config(d, model_type='llama'),
                      "config.json: not a GPT-2 checkpoint (model_type 'llama'"),
    'no n_head': (lambda d: edit_config(d, n_head=None), 'without n_head'),
    'text for a number': (lambda d: edit_config(d, n_layer='2'), 'without n_layer'),
    'text for n_positions': (lambda d: edit_config(d, n_positions='10'), 'n_positions'),
    'relu': (lambda d: edit_config(d, activation_function='relu'), 'config.json: a variant of GPT-2'),
    'another epsilon': (lambda d: edit_config(d, layer_norm_epsilon=0.1), 'config.json: a variant of GPT-2'),
    'unscaled': (lambda d: edit_config(d, scale_attn_weights=False), 'config.json: a variant of GPT-2'),
    'no weights': (lambda d: os.remove(os.path.join(d, 'model.safetensors')), 'model.safetensors: No such file'),
    'truncated': (truncated, 'model.safetensors: not a readable'),
    'an index without files': (lambda d: (write(d, 'model.safetensors.index.json', b'{"weight_map": [1]}'),
                                          os.remove(os.path.join(d, 'model.safetensors'))),
                               'model.safetensors.index.json: wanted `weight_map`'),
    'a shard missing': (lambda d: (as_shards(d, save_file, 'model.safetensors', 'part{}.safetensors'),
                                   os.remove(os.path.join(d, 'part2.safetensors'))),
                        'part2.safetensors: No such file'),
    'a damaged bin': (lambda d: (as_bin(d), write(d, 'pytorch_model.bin', b'PK\x03\x04' * 9)),
                      'pytorch_model.bin: not a readable file'),
    'a bin of something else': (lambda d: (as_bin(d), torch.save({'model': {}}, os.path.join(d, 'pytorch_model.bin'))),
                                'pytorch_model.bin: tensor wte.weight is missing'),
    'a bin without names': (lambda d: (as_bin(d), torch.save([1], os.path.join(d, 'pytorch_model.bin'))),
                            'pytorch_model.bin: not a readable file'),
    'empty': (lambda d: write(d, 'model.safetensors', b''), 'model.safetensors: not a readable'),
    'no safetensors': (lambda d: write(d, 'model.safetensors', b'PK\x03\x04' * 9), 'model.safetensors: not a readable'),
    'a tensor missing': (lambda d: edit_tensors(d, lambda t: t.pop('transformer.h.1.mlp.c_fc.bias')),
                         'model.safetensors: tensor h.1.mlp.c_fc.bias is missing'),
    'another shape': (lambda d: edit_tensors(d, lambda t: t.update({'transformer.wpe.weight': torch.zeros(9, 8)})),
                      'model.safetensors: tensor wpe.weight is (9, 8), config.json says (10, 8)'),
    'another projection': (lambda d: edit_tensors(d, lambda t: t.update({'lm_head.weight': torch.zeros(7, 8)})),
                           'model.safetensors: tensor lm_head.weight'),
    'text for bias': (lambda d: edit_config(d, bias='no'), "config.json: bias must be true or false, got 'no'"),
    'a number for bias': (lambda d: edit_config(d, bias=0), 'config.json: bias must be true or false, got 0'),
    'a narrow MLP': (lambda d: edit_config(d, n_inner=16),
                     'config.json: a variant of GPT-2, n_inner must be None or 32, got 16'),
    'cross-attention': (lambda d: edit_config(d, add_cross_attention=True),
                        'config.json: a variant of GPT-2, add_cross_attention must be False, got True'),
    'quantised': (lambda d: edit_config(d, quantization_config=dict(quant_method='bitsandbytes')),
                  'config.json: quantised weights (quantization_config)'),
    'int8 and its scales': (lambda d: edit_tensors(d, lambda t: t.update({
        'transformer.h.0.attn.c_attn.weight': t['transformer.h.0.attn.c_attn.weight'].to(torch.int8),
        'transformer.h.0.attn.c_attn.SCB': torch.ones(24)})), 'tensor h.0.attn.c_attn.weight is int8, wanted floating'),
    **{f"tensors of {dtype}": (lambda d, dtype=dtype: edit_tensors(d, lambda t: t.update({
        'transformer.ln_f.weight': t['transformer.ln_f.weight'].to(getattr(torch, dtype))})),
        f"model.safetensors: tensor ln_f.weight is {dtype}, wanted floating point of 16 bits or more")
       for dtype in ('int64', 'uint8', 'bool', 'float8_e4m3fn')},
    'a shard elsewhere': (lambda d: as_shards(d, save_file, 'model.safetensors', '../part{}.safetensors'),
                          "model.safetensors.index.json: wanted files beside this one, got '../part"),
    'a shard anywhere': (lambda d: as_shards(d, save_file, 'model.safetensors', d + '/part{}.safetensors'),
                         "model.safetensors.index.json: wanted files beside this one, got '/"),
    # sizes are compared with the file's before a model of that size is made
    'a billion layers': (lambda d: edit_config(d, n_layer=10**9), 'config.json: n_layer is 1000000000, '),
    'a layer too few': (lambda d: edit_config(d, n_layer=1), 'model.safetensors holds 2 layers'),
    'a billion positions': (lambda d: edit_config(d, n_positions=10**9),
                            'tensor wpe.weight is (10, 8), config.json says (1000000000, 8)'),
    'a billion tokens': (lambda d: edit_config(d, vocab_size=10**12), 'config.json says (1000000000000, 8)'),
    'a billion channels': (lambda d: edit_config(d, n_embd=10**9), 'config.json says (7, 1000000000)'),
    **{f"{x} in {name}": (lambda d, name='transformer.' + name, x=float(x):
                          edit_tensors(d, lambda t: t[name].view(-1)[3:4].fill_(x)),
                          f"model.safetensors: tensor {name} holds a number that is not finite")
       for name, x in [('wte.weight', 'nan'), ('h.1.mlp.c_fc.weight', 'inf'), ('ln_f.bias', '-inf')]},
    'too large for float32': (lambda d: edit_tensors(d, lambda t: t.update({
        'transformer.ln_f.bias': torch.full((8,), 1e39, dtype=torch.float64)})), 'ln_f.bias holds a number that'),
}

@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_folder_is_told_in_one_line(tmp_path, capsys, case):
    folder = formula_folder(tmp_path / 'model')
    damage, expected = WRONG[case]
    damage(folder)
    line = one_line(capsys, lambda: GPT.from_pretrained(folder))
    assert expected in line and folder in line

@pytest.mark.parametrize('more', [dict(activation_function='gelu_pytorch_tanh'), dict(activation_function='gelu_fast'),
                                  dict(n_inner=4 * 8), dict(quantization_config={}), dict(bias=True)])
def test_other_words_for_the_same_model(tmp_path, more):
    folder = formula_folder(tmp_path)
    edit_config(folder, **more)
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)

def test_buffers_of_other_kinds_are_no_weights(tmp_path):
    """The hub's GPT-2s hold their causal masks, in some copies as bytes."""
    folder = formula_folder(tmp_path)
    edit_tensors(folder, lambda t: t.update({'transformer.h.0.attn.bias': torch.ones(1, 1, T, T, dtype=torch.uint8)}))
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)

@pytest.mark.parametrize('sizes', [dict(n_layer=10**9), dict(n_layer=1001), dict(n_embd=10**9), dict(block_size=10**13),
                                   dict(n_layer=10**9, n_embd=10**9, block_size=10**9)])
def test_a_model_larger_than_the_machine_is_told_in_one_line(tmp_path, capsys, sizes):
    options = dict(n_layer=1, n_head=1, n_embd=8, block_size=96) | sizes
    line = stops(capsys, sft, init_from='scratch', tokenizer='bytes', max_steps=1, out_dir=str(tmp_path / 'out'),
                 train_data=records(tmp_path / 'd.jsonl', DEMONSTRATIONS), **options)
    assert all(f"{key}={value}" in line for key, value in options.items() if key != 'n_head')
    assert 'wanted at most 1000 layers' in line and not (tmp_path / 'out').exists()

def test_a_missing_folder_is_told_in_one_line(tmp_path, capsys):
    line = one_line(capsys, lambda: load_policy(str(tmp_path / 'nowhere')))
    assert str(tmp_path / 'nowhere') in line and 'no such folder' in line

def test_the_wrong_kind_of_model_is_told_in_one_line(tmp_path, capsys):
    policy, reward = formula_folder(tmp_path / 'a'), formula_folder(tmp_path / 'b', reward=True)
    line = one_line(capsys, lambda: load_policy(reward, option='init_from'))
    assert line == f"--init_from={reward}: is a reward model, wanted a language model"
    line = one_line(capsys, lambda: load_reward_model(policy))
    assert f"--reward_model={policy}: is a language model, wanted a reward model" in line

# ---------------------------------------------------------------------------------------------------------------------
# names of the hub

WORKER = '''
import contextlib, io, json, sys, time
from common.checkpoints import load_policy, load_reward_model
from common.options import parse_config
from common.tokens import load_tokenizer
from common.weights import fetch_from_hub
from model import GPT
import torch

def logits(*args, **kwargs):
    return GPT.from_pretrained(*args, **kwargs)(torch.tensor([[1, 5, 2, 6]]))[0][0, :, :7].tolist()

def run(script, **options):
    script = __import__(script)
    script.main(parse_config(script.Config, [f"--{k}={v}" for k, v in options.items()]))

for call in json.loads(sys.argv[1]):
    said, started = io.StringIO(), time.time()
    with contextlib.redirect_stderr(said):
        try:
            result = eval(call)
        except SystemExit as stopped:
            result = stopped.code
    print('RESULT', json.dumps([result, said.getvalue(), time.time() - started]))
'''

class Hub(http.server.BaseHTTPRequestHandler):
    """/REPO/resolve/main/FILE and /datasets/REPO/resolve/main/FILE, from server.folder; what it answers is noted."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        repo, _, file = self.path[1:].partition('/resolve/main/')
        path = os.path.join(self.server.folder, repo, file)
        token = self.headers.get('Authorization')
        self.server.asked.append((self.command, repo, file, token))
        error = None
        if repo == 'gpt2': # the old name of openai-community/gpt2
            self.send_response(307)
            self.send_header('Location', f"/openai-community/gpt2/resolve/main/{file}")
        elif repo == 'someone/gated':
            error = 403, 'GatedRepo'
        elif not os.path.isdir(os.path.join(self.server.folder, repo)) or (
                repo == 'someone/private' and token != 'Bearer hf_secret'):
            error = 401, 'RepoNotFound'
        elif not os.path.isfile(path):
            error = 404, 'EntryNotFound'
        else:
            with open(path, 'rb') as f:
                content = f.read()
            self.send_response(200)
            self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header('Content-Length', str(len(content)))
            self.send_header('X-Repo-Commit', '0' * 40)
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)
            return
        if error:
            self.send_response(error[0])
            self.send_header('X-Error-Code', error[1])
            self.send_header('X-Error-Message', error[1])
        self.send_header('Content-Length', '0')
        self.end_headers()

    do_GET = do_HEAD

@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    pytest.importorskip('huggingface_hub', reason="names of the hub are fetched with it")
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder, server.asked = str(tmp_path_factory.mktemp('hub')), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    checkpoint(os.path.join(server.folder, 'someone/ours'))
    checkpoint(os.path.join(server.folder, 'someone/private'))
    checkpoint(os.path.join(server.folder, 'someone/reward'), reward_head=True)
    os.makedirs(os.path.join(server.folder, 'datasets/someone/data'))
    records(os.path.join(server.folder, 'datasets/someone/data/train.jsonl'), PROMPTS)
    os.makedirs(os.path.join(server.folder, 'someone/empty'))
    theirs = os.path.join(server.folder, 'openai-community/gpt2') # the hub's GPT-2: no prefix, no tokenizer of ours
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)).save_pretrained(theirs)
    path = os.path.join(theirs, 'model.safetensors')
    save_file({k.removeprefix('transformer.'): t for k, t in load_file(path).items()}, path)
    sharded(os.path.join(server.folder, 'someone/ours'), os.path.join(server.folder, 'someone/sharded'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()

def sharded(folder, new):
    """The same weights in two files and an index."""
    os.makedirs(new)
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i >= 7)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, os.path.join(new, file))
    for name, text in (('model.safetensors.index.json', json.dumps(dict(metadata={}, weight_map=files))),
                       ('config.json', open(os.path.join(folder, 'config.json')).read())):
        with open(os.path.join(new, name), 'w') as f:
            f.write(text)

def ask(hub, home, *calls, **env):
    """[(result or exit code, stderr, seconds)] of Python expressions; the hub's files are cached below `home`."""
    os.makedirs(os.path.join(home, 'work'), exist_ok=True)
    others = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING')) and 'proxy' not in k.lower()}
    env = others | dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS='1', PYTHONPATH=ROOT,
                        OMP_NUM_THREADS='1') | env
    hub.asked.clear()
    done = subprocess.run([sys.executable, '-c', WORKER, json.dumps(calls)], env=env, text=True, capture_output=True,
                          cwd=os.path.join(home, 'work'))
    results = [json.loads(line[7:]) for line in done.stdout.split('\n') if line.startswith('RESULT ')]
    assert len(results) == len(calls), done.stderr
    return results

def logits(folder):
    return GPT.from_pretrained(folder)(torch.tensor([[1, 5, 2, 6]]))[0][0, :, :7].tolist()

def one_line_of(result):
    """Return what a question to the hub ended with, one line on stderr."""
    code, err, seconds = result
    assert code == 2 and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    assert seconds < 20 # huggingface_hub alone would go on asking for 25, on an idle machine
    return err

def test_names_of_the_hub_give_what_its_folders_give(hub, tmp_path):
    """Fetched once, and found in the cache where nothing answers any more."""
    names = ('someone/ours', 'someone/sharded', 'gpt2')
    folders = [os.path.join(hub.folder, name) for name in ('someone/ours', 'someone/sharded', 'openai-community/gpt2')]
    calls = [f"logits({name!r})" for name in names] + ["load_tokenizer('someone/ours').name"]
    first = ask(hub, tmp_path, *calls)
    assert [r[0] for r in first] == [logits(folder) for folder in folders] + ['bytes']
    assert first[0][0] == first[1][0] != first[2][0]
    fetched = [file for command, repo, file, _ in hub.asked if command == 'GET' and repo == 'someone/ours']
    assert sorted(fetched) == ['config.json', 'model.safetensors', 'tokenizer_name']
    offline = ask(hub, tmp_path, *calls, HF_ENDPOINT='http://127.0.0.1:9') # nobody listens at port 9
    assert [r[0] for r in offline] == [r[0] for r in first]

def test_a_data_set_and_a_token(hub, tmp_path):
    calls = ("open(fetch_from_hub('someone/data', 'train.jsonl', 'dataset')).read()",
             "fetch_from_hub('someone/data', 'nothing.jsonl', 'dataset', absent_ok=True)", "logits('someone/private')")
    data, nothing, private = ask(hub, tmp_path, *calls, HF_TOKEN='hf_secret')
    assert data[0] == open(os.path.join(hub.folder, 'datasets/someone/data/train.jsonl')).read()
    assert nothing[0] is None
    assert private[0] == logits(os.path.join(hub.folder, 'someone/private'))

def test_what_the_hub_does_not_give_is_told_in_one_line(hub, tmp_path):
    os.makedirs(tmp_path / 'work/models')
    calls = dict(
        nobody="GPT.from_pretrained('someone/nobody')", private="load_policy('someone/private')",
        gated="load_reward_model('someone/gated')", empty="GPT.from_pretrained('someone/empty')",
        file="fetch_from_hub('someone/data', 'val.jsonl', repo_type='dataset')",
        data="fetch_from_hub('someone/nothing', 'train.jsonl', repo_type='dataset')",
        kind="load_policy('someone/reward', 'init_from')", tokenizer="load_tokenizer('someone/sharded')",
        out="GPT.from_pretrained('out/nowhere')", below="GPT.from_pretrained('models/nowhere')",
        word="GPT.from_pretrained('nowhere')", deep="GPT.from_pretrained('a/b/c')", dot="GPT.from_pretrained('./gpt2')")
    said = dict(zip(calls, map(one_line_of, ask(hub, tmp_path, *calls.values()))))
    assert 'someone/nobody: cannot fetch config.json' in said['nobody']
    assert 'no folder of this name here, and no such model there' in said['nobody']
    assert 'a private one needs HF_TOKEN' in said['private'] and 'it is gated: ask for access' in said['gated']
    assert 'someone/empty: the model on the hub has no file config.json' in said['empty']
    assert 'someone/data: the dataset on the hub has no file val.jsonl' in said['file']
    assert 'no such dataset there' in said['data'] and 'put train.jsonl into a folder' in said['data']
    assert said['kind'] == 'error: --init_from=someone/reward: is a reward model, wanted a language model\n'
    assert 'someone/sharded: wanted a checkpoint with tokenizer.tiktoken' in said['tokenizer']
    for name in ('out/nowhere', 'models/nowhere', 'nowhere', 'a/b/c', './gpt2'): # nobody went looking for these
        line = next(line for line in said.values() if line.startswith(f"error: {name}/config.json: No such file"))
        assert 'wanted a checkpoint folder' in line and 'gpt2-xl, distilgpt2 or OWNER/NAME' in line
        assert name not in [repo for _, repo, *_ in hub.asked]

def test_without_a_network_one_line_says_what_to_put_where(hub, tmp_path):
    names = ('gpt2', 'someone/reward', 'someone/ours')
    calls = ("GPT.from_pretrained('gpt2')", "load_reward_model('someone/reward')", "load_tokenizer('someone/ours')")
    for env in (dict(HF_ENDPOINT='http://127.0.0.1:9'), dict(HF_HUB_OFFLINE='1')):
        for name, result in zip(names, ask(hub, tmp_path, *calls, **env)):
            line = one_line_of(result)
            assert line.startswith(f"error: {name}: cannot fetch config.json from the hub (")
            assert 'put config.json and model.safetensors into a folder and name that folder instead' in line

def test_a_folder_of_that_name_is_the_folder(hub, tmp_path):
    for name in ('gpt2', 'someone/ours'):
        checkpoint(str(tmp_path / 'work' / name), seed=5)
    results = ask(hub, tmp_path, "logits('gpt2')", "logits('someone/ours')", "load_tokenizer('gpt2').name")
    assert results[0][0] == results[1][0] == logits(str(tmp_path / 'work/gpt2')) != logits(
        os.path.join(hub.folder, 'someone/ours'))
    assert results[2][0] == 'bytes' and hub.asked == []

def test_every_script_takes_names_of_the_hub(hub, tmp_path):
    work = tmp_path / 'work'
    os.makedirs(work)
    files = {k: records(work / f"{k}.jsonl", rows) for k, rows in dict(
        demonstrations=DEMONSTRATIONS, rankings=RANKINGS, comparisons=COMPARISONS, prompts=PROMPTS).items()}
    toy = records(work / 'toy.jsonl', [dict(prompt=p, category='home') for p in ('Where does the fox live?',) * 2])
    steps = "device='cpu', dtype='float32', max_steps=1, batch_size=4"
    ours, reward = "'someone/ours'", "'someone/reward'"
    calls = [
        f"run('sft', init_from={ours}, out_dir='sft', train_data={files['demonstrations']!r}, {steps})",
        f"run('reward', init_from={ours}, out_dir='reward', train_data={files['rankings']!r}, {steps})",
        f"run('dpo', init_from={ours}, out_dir='dpo', train_data={files['comparisons']!r}, {steps})",
        f"run('ppo', policy={ours}, reward_model={reward}, prompts={files['prompts']!r}, out_dir='ppo', "
        f"max_new_tokens=4, {steps})",
        f"run('collect', policy={ours}, prompts={toy!r}, gold='data.toy.world:gold', out='out.jsonl', n_answers=8, "
        "max_new_tokens=4, device='cpu')",
        f"run('evaluate', models='a=someone/ours', baseline='a', reward_model={reward}, prompts={files['prompts']!r}, "
        "max_new_tokens=4, device='cpu', figures=False, out_dir='evaluate')",
        f"run('sample', policy={ours}, reward_model={reward}, prompt='Hi', max_new_tokens=4, device='cpu')",
        f"run('bench', workload='sft', init_from={ours}, data={files['comparisons']!r}, steps=1, repeats=1, "
        "batch_size=2, device='cpu')"]
    for call, (result, err, _) in zip(calls, ask(hub, tmp_path, *calls)):
        assert result is None, (call, result, err)
    for name in ('sft', 'dpo', 'ppo'):
        assert GPT.from_pretrained(work / name).config.vocab_size == TOK.n_vocab
    assert load_tokenizer(str(work / 'reward')).name == 'bytes'

@pytest.mark.parametrize('name, expected', [
    ('gpt2', True), ('gpt2-xl', True), ('distilgpt2', True), ('owner/name', True), ('owner.1/gpt2-x_y.z', True),
    ('gpt3', False), ('out/x', False), ('/gpt2', False), ('./gpt2', False), ('../gpt2', False), ('~/gpt2', False),
    ('a/b/c', False), ('owner/', False), ('owner/na me', False), ('', False), ('here/gpt2', False), ('here', False)])
def test_what_means_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('here')
    assert on_hub(name) == expected
