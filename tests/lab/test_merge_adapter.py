"""lab/merge_adapter.py: adapters in PEFT's layout become plain checkpoints."""
import importlib
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab import merge_adapter
from model import GPT
from stages import stages
from tiny import TOK, checkpoint, run, stops

IDX = torch.tensor([[72, 101, 108, 108, 111]])
ATTN = 'base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight'

@pytest.fixture
def made(tmp_path):
    """A base model, and an adapter of rank 2 on one layer of it: A is all 1, B counts. alpha / r = 3."""
    base, A, B = checkpoint(tmp_path / 'base'), torch.ones(2, 16), torch.arange(96.).view(48, 2)
    return base, write(tmp_path / 'adapter', base, {ATTN.format('A'): A, ATTN.format('B'): B})

def write(folder, base, tensors, **more):
    folder.mkdir()
    about = dict(peft_type='LORA', r=2, lora_alpha=6, base_model_name_or_path=base, bias='none') | more
    (folder / 'adapter_config.json').write_text(json.dumps(about))
    save_file(tensors, folder / 'adapter_model.safetensors')
    return folder

@pytest.mark.parametrize('more, scale', [({}, 3.0), (dict(use_rslora=True), 6 / 2 ** 0.5)])
def test_merged_by_hand(more, scale, made, tmp_path, capsys):
    base, adapter = made
    about = json.loads((adapter / 'adapter_config.json').read_text())
    (adapter / 'adapter_config.json').write_text(json.dumps(about | more))
    run(merge_adapter, adapter=adapter, out_dir=tmp_path / 'out')
    begun, merged = GPT.from_pretrained(base), GPT.from_pretrained(tmp_path / 'out')
    # row i of B A is 2 i + (2 i + 1) = 4 i + 1 everywhere
    expected = begun.h[0].attn.c_attn.weight + scale * (4. * torch.arange(48) + 1)[:, None]
    torch.testing.assert_close(merged.h[0].attn.c_attn.weight, expected)
    assert all(torch.equal(p, merged.get_parameter(name)) for name, p in begun.named_parameters()
               if name != 'h.0.attn.c_attn.weight')
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}: {base} with {adapter}, 2 tensors of rank 2\n")

@pytest.mark.parametrize('on', ['attn', 'all'])
@pytest.mark.parametrize('name', ['dpo', 'reward'])
def test_our_own_adapters_come_back(name, on, tmp_path):
    script, options = stages(str(tmp_path))[name]
    options |= dict(max_steps=3, lora_rank=2, lora_on=on, lr=0.05, out_dir=tmp_path / 'trained')
    run(importlib.import_module(script), **options)
    run(merge_adapter, adapter=tmp_path / 'trained/adapter', out_dir=tmp_path / 'out')
    ours, merged = (GPT.from_pretrained(tmp_path / folder) for folder in ('trained', 'out'))
    for key, p in ours.named_parameters():
        if key != 'ln_f.bias': # a reward model's shift to mean 0 is no part of its adapter
            torch.testing.assert_close(merged.get_parameter(key), p, msg=key)

def test_an_adapter_that_peft_made(tmp_path):
    peft = pytest.importorskip('peft', reason='needs peft and transformers')
    import transformers
    base = checkpoint(tmp_path / 'base')
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=['c_attn', 'c_fc', 'c_proj'], fan_in_fan_out=True,
                           init_lora_weights=False, task_type='CAUSAL_LM') # B is random, too
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), lora).eval()
    theirs.save_pretrained(tmp_path / 'adapter')
    run(merge_adapter, adapter=tmp_path / 'adapter', base=base, out_dir=tmp_path / 'out')
    with torch.no_grad():
        expected, got, begun = theirs(IDX).logits, *(GPT.from_pretrained(m)(IDX)[0] for m in (tmp_path / 'out', base))
    assert (expected - begun).abs().max() > 0.01
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

def test_what_is_refused(made, tmp_path, capsys):
    base, adapter = made
    refused = lambda **more: stops(capsys, merge_adapter, **dict(adapter=adapter, out_dir=tmp_path / 'out') | more)
    A, B = (ATTN.format(k).removeprefix(merge_adapter.PREFIX) for k in 'AB')
    tensors, other = load_file(adapter / 'adapter_model.safetensors'), ATTN.replace('c_attn', 'q_proj').format('A')
    assert refused(adapter='') == "--adapter=: adapter must be a folder, got ''"
    assert refused(adapter=tmp_path / 'no').startswith(f"{tmp_path / 'no/adapter_config.json'}: No such file")
    assert refused(base='nowhere').startswith('--base=nowhere: no such folder')
    assert refused(out_dir=base) == f'--out_dir={base}: holds a checkpoint; wanted another folder'
    assert refused(out_dir=adapter) == f"--out_dir={adapter}: is the adapter's folder; wanted another one"
    inside = shutil.copytree(adapter, os.path.join(base, 'adapter')) # as a run of ours leaves it
    assert refused(adapter=inside).startswith(f'--base={base}: holds the adapter, merged already; wanted the')
    for n, (added, more, wanted) in enumerate([
            ({}, dict(use_dora=True), 'use_dora is True; wanted a plain LoRA'),
            ({}, dict(rank_pattern={'c_attn': 4}), "rank_pattern is {'c_attn': 4}; wanted a plain LoRA"),
            ({}, dict(peft_type='IA3'), "peft_type is 'IA3'; wanted a plain LoRA"),
            ({}, dict(r=0), 'wanted numbers above 0 for `r` and `lora_alpha`'),
            ({other: torch.ones(2, 16)}, {}, f"{other.removeprefix(merge_adapter.PREFIX)} has no place in {base}"),
            ({ATTN.format('B'): torch.ones(47, 2)}, {}, 'has no place in'),
            ({'base_model.model.score.weight': torch.ones(2, 16)}, {}, 'score.weight is (2, 16); wanted (1, 16)'),
            ({}, dict(lora_alpha=math.inf), 'wanted numbers above 0 for `r` and `lora_alpha`, below 1e38'),
            ({}, dict(lora_alpha=1e300), 'below 1e38'), ({}, dict(lora_alpha=10 ** 400), 'below 1e38'),
            ({}, dict(lora_alpha=1e37), 'merged, its weights are not finite; wanted a lora_alpha below 1e+37'),
            ({ATTN.format('B'): torch.full((48, 2), math.nan)}, {}, f'{B} holds a number that is not finite'),
            ({ATTN.format('A'): torch.full((2, 16), 1e300, dtype=torch.float64)}, {},
             f'{A} holds a number that is not finite'),
            ({ATTN.format('A'): torch.full((2, 16), -math.inf)}, {}, f'{A} holds a number that is not finite'),
            ({ATTN.format('A'): torch.ones(2, 16).long()}, {}, f'{A} is int64; wanted floating point of 16 bits'),
            ({}, dict(r=8), f'{A} is (2, 16); wanted a matrix of rank 8, the r of '),
            ({ATTN.format('B'): torch.ones(48, 3)}, {}, f'{B} is (48, 3); wanted a matrix of rank 2'),
            ({ATTN.format('A'): torch.ones(16)}, {}, f'{A} is (16,); wanted a matrix of rank 2'),
            # in a place without a weight, as wide as A is
            ({ATTN.replace('.c_attn', '').format(k): torch.ones(2, n) for k, n in (('A', 16), ('B', 2))}, {},
             'transformer.h.0.attn.lora_A.weight has no place in'),
            ({}, dict(modules_to_save=['wte']), "modules_to_save has 'wte'; wanted none, or `score`"),
            ({}, dict(modules_to_save='wte'), "modules_to_save has 'wte'"), ({}, dict(modules_to_save=7), 'has 7'),
            ({}, dict(modules_to_save=['classifier', 'score']), "modules_to_save has 'score'; wanted none, or"),
            ({}, dict(use_rslora='no'), "use_rslora is 'no'; wanted a plain LoRA")]):
        assert wanted in refused(adapter=write(tmp_path / str(n), base, tensors | added, **more))
    (adapter / 'adapter_model.safetensors').write_bytes(b'no')
    assert 'not a readable file of plain tensors' in refused()
    save_file({}, adapter / 'adapter_model.safetensors')
    assert 'wanted the tensors of an adapter, found none' in refused()
    assert not (tmp_path / 'out').exists()
