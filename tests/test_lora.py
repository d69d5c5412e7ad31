"""
Low-rank adapters (LoRA): the equation by hand, what trains and what does not, one trunk for two models, checkpoints
that are plain GPT-2 folders, and PEFT's layout beside them.
"""
import importlib
import json
import os

import pytest
import torch

import ppo
from common.checkpoints import finish_save, read_log
from common.options import parse_config
from common.run import Run
from model import GPT, GPTConfig, Linear
from stages import stages
from tiny import DEMONSTRATIONS, RUN, TOK, by_hand, checkpoint, killed, losses, records, run, stops, weights

def small(**more):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=8, **more)).eval()

IDX, MASK = torch.tensor([[72, 105, 33, 256]]), torch.tensor([[0.0, 1, 1]])

def stir(model):
    """Give every adapter some effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('.lora.1.weight'):
                p.normal_()

# ---------------------------------------------------------------------------------------------------------------------
# the layer

def test_the_equation_by_hand():
    """W = (1 2; 3 4), b = (1 0), A = (1 -1), B = (2; 3), alpha / rank = .5 / 1. x = (2, 5): W x + b = (13, 26),
    A x = -3, B A x = (-6, -9), half of it (-3, -4.5)."""
    layer = Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]])), layer.bias.copy_(torch.tensor([1.0, 0]))
    x = torch.tensor([[2.0, 5]])
    assert layer(x).tolist() == [[13, 26]]
    layer.adapt(1, 0.5)
    A, B = (part.weight for part in layer.lora)
    assert layer(x).tolist() == [[13, 26]] and A.shape == (1, 2) and B.tolist() == [[0], [0]]
    with torch.no_grad():
        A.copy_(torch.tensor([[1.0, -1]])), B.copy_(torch.tensor([[2.0], [3]]))
    assert layer(x).tolist() == [[10, 21.5]]
    layer(x).sum().backward() # of y by B: scale A x = -1.5 for both; by A: scale (2 + 3) x = (5, 12.5)
    assert B.grad.tolist() == [[-1.5], [-1.5]] and A.grad.tolist() == [[5, 12.5]]

def test_how_a_starts():
    """Its entries are uniform between -1 / sqrt(in) and 1 / sqrt(in), of the standard deviation 1 / sqrt(3 in)."""
    torch.manual_seed(0)
    layer = Linear(400, 10)
    layer.adapt(50, 1.0)
    A = layer.lora[0].weight
    assert A.std().item() == pytest.approx(1 / 1200 ** 0.5, rel=0.03) and A.abs().max() <= 0.05

# c_attn: rank 3 of 8 in, 24 out = 96; c_proj 8 + 8: 48; c_fc 8 + 32: 120; the other c_proj 120; two layers
@pytest.mark.parametrize('on, expected', [('attn', 2 * 96), ('all', 2 * (96 + 48 + 120 + 120))])
def test_what_trains(on, expected):
    model = small()
    before = model(IDX)[0]
    model.adapt(3, 6.0, on)
    assert torch.equal(model(IDX)[0], before) # nothing changes yet
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    model.logp(IDX, MASK).sum().backward()
    assert {name.split('.')[-3] for name, p in model.named_parameters() if p.grad is not None} == {'lora'}

@pytest.mark.parametrize('head', ['value_head', 'reward_head'])
def test_heads_train_too(head):
    model = small(**{head: True})
    model.adapt(2, 4.0, 'attn')
    assert {name for name, p in model.named_parameters() if p.requires_grad and '.lora.' not in name
            } == {name for name, _ in model.named_parameters() if name.startswith(head)}

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('on', ['attn', 'all'])
def test_the_saved_folder_is_a_plain_gpt2(tmp_path, on, bias):
    model = small(bias=bias)
    plain = model(IDX)[0]
    model.adapt(3, 6.0, on)
    stir(model)
    model.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    assert {name for name, _ in saved.named_parameters()} == {name for name, _ in small(bias=bias).named_parameters()}
    assert (model(IDX)[0] - plain).abs().max() > 0.01
    torch.testing.assert_close(saved.eval()(IDX)[0], model(IDX)[0], atol=1e-5, rtol=1e-5)

def test_the_frozen_weights_are_kept_in_16_bits():
    cfg, model = parse_config(ppo.Config, ['--prompts=-', '--lora_rank=2']), small(value_head=True)
    Run('cpu', 'bfloat16').prepare(model, cfg)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        name for name in dtypes if name.startswith('h.') and '.ln_' not in name and '.lora.' not in name}
    assert model.h[0].attn.c_attn.scale == 2.0 # lora_alpha = 0: twice the rank, by the rank

# ---------------------------------------------------------------------------------------------------------------------
# the stages

ALL = ('reward', 'dpo', 'rrhf', 'kto', 'ppo', 'ppo_shared', 'rloo')

@pytest.mark.parametrize('name', ALL)
def test_a_stage_with_adapters_resumes_exactly(tmp_path, name):
    script, options = stages(str(tmp_path))[name]
    script, options = importlib.import_module(script), options | dict(lora_rank=2, lora_on='all', lr=0.01)
    run(script, **options, max_steps=4, out_dir=tmp_path / 'whole')
    run(script, **options, max_steps=2, out_dir=tmp_path / 'halves')
    run(script, **options, max_steps=4, out_dir=tmp_path / 'halves', resume=True)
    assert weights(tmp_path / 'halves') == weights(tmp_path / 'whole')
    log = lambda folder: [line for line in losses(read_log(tmp_path / folder / 'log.jsonl')) if 'loss' in line]
    assert log('halves') == log('whole')
    a, b = (tmp_path / folder / 'adapter/adapter_model.safetensors' for folder in ('halves', 'whole'))
    assert a.read_bytes() == b.read_bytes()
    # the checkpoint is a plain GPT-2, and what is no linear layer is the beginning's
    begun = GPT.from_pretrained(options.get('init_from') or options['policy'])
    trained = GPT.from_pretrained(tmp_path / 'whole')
    assert torch.equal(trained.wte.weight, begun.wte.weight)
    assert torch.equal(trained.h[0].ln_1.weight, begun.h[0].ln_1.weight)
    assert all(not torch.equal(x.weight, y.weight) for x, y in (
        (trained.h[0].attn.c_attn, begun.h[0].attn.c_attn), (trained.h[1].mlp.c_fc, begun.h[1].mlp.c_fc)))

@pytest.mark.parametrize('critic', ['separate', 'shared'])
def test_ppo_has_four_models_in_two_trunks(tmp_path, critic):
    """The reference is the policy less its adapter, the critic the reward model, an adapter and a value head."""
    script, options = stages(str(tmp_path))['ppo']
    words = [f"--{k}={v}" for k, v in (options | dict(lora_rank=2, critic=critic)).items()]
    cfg = parse_config(ppo.Config, words)
    models = ppo.load_models(cfg, RUN, TOK)
    for model in {models.policy, models.critic}:
        RUN.prepare(model, cfg)
    reward, at = models.reward.models[0], lambda model: {p.data_ptr() for p in model.parameters()}
    trunk = lambda model: {p.data_ptr() for name, p in model.named_parameters() if 'head' not in name}
    assert trunk(models.reference) < at(models.policy)
    if critic == 'separate':
        assert trunk(reward) < at(models.critic) and models.critic.reward_head is None
        assert torch.equal(models.critic.value_head.weight, reward.reward_head.weight)
        assert models.critic.value_head.weight.data_ptr() != reward.reward_head.weight.data_ptr()
    together = set().union(*map(at, (models.policy, models.critic, models.reference, reward)))
    assert len(together) < 1.5 * len(at(reward) | at(models.reference))
    # training moves the policy and the critic alone
    before = models.reference.logp(IDX, MASK), reward.rewards(IDX, torch.tensor([4]))
    policy, values = models.policy.logp(IDX, MASK).tolist(), models.critic.values(IDX, MASK).tolist()
    loss = models.policy.logp(IDX, MASK).sum() + models.critic.values(IDX, MASK).sum()
    loss.backward()
    with torch.no_grad():
        for p in {*models.policy.parameters(), *models.critic.parameters()}:
            if p.grad is not None:
                p -= 0.1 * p.grad
    assert torch.equal(models.reference.logp(IDX, MASK), before[0])
    assert torch.equal(reward.rewards(IDX, torch.tensor([4])), before[1])
    assert models.policy.logp(IDX, MASK).tolist() != policy and models.critic.values(IDX, MASK).tolist() != values

def test_kto_has_two_models_in_one_trunk(tmp_path, monkeypatch):
    import kto
    seen, update = [], kto.update
    def note(model, reference, *more):
        seen.append([{p.data_ptr() for p in m.parameters()} for m in (model, reference)])
        return update(model, reference, *more)
    monkeypatch.setattr(kto, 'update', note)
    _, options = stages(str(tmp_path))['kto']
    for rank, shared in ((2, True), (0, False)):
        run(kto, **options | dict(max_steps=1, lora_rank=rank, out_dir=tmp_path / f'out{rank}'))
        policy, reference = seen[-1]
        assert (reference < policy) == shared and bool(reference & policy) == shared

def test_sft_learns_through_its_adapter(tmp_path):
    model, rows = checkpoint(tmp_path / 'model'), records(tmp_path / 'rows.jsonl', DEMONSTRATIONS)
    import sft
    log = run(sft, init_from=model, train_data=rows, out_dir=tmp_path / 'out', lora_rank=4, lora_on='all', lr=0.1,
              max_steps=60, batch_size=8, log_every=1)
    assert log[-1]['loss'] < 0.8 * log[0]['loss']

def test_what_is_refused(tmp_path, capsys):
    import sft
    model, rows = checkpoint(tmp_path / 'model'), records(tmp_path / 'rows.jsonl', DEMONSTRATIONS)
    own = dict(init_from=model, train_data=rows, out_dir=tmp_path / 'out', max_steps=1)
    assert 'lora_alpha must be left at 0.0: only lora_rank reads it' in stops(capsys, sft, **own, lora_alpha=8)
    assert 'lora_on must be one of attn, all' in stops(capsys, sft, **own, lora_rank=1, lora_on='mlp')
    assert 'lora_rank must be at least 0' in stops(capsys, sft, **own, lora_rank=-1)
    assert 'lora_rank must be 0 with init_from=scratch' in stops(capsys, sft, train_data=rows, lora_rank=2,
                                                                 out_dir=tmp_path / 'out', tokenizer='bytes')
    assert not os.path.exists(tmp_path / 'out')
    run(sft, **own, lora_rank=2)
    for other in (dict(lora_rank=3), dict(lora_rank=2, lora_on='all'), {}):
        line = stops(capsys, sft, **own | dict(max_steps=2), **other, resume=True)
        assert line.startswith('--resume=True: lora_') and line.endswith('wanted the same model')

def test_a_run_without_an_adapter_removes_the_old_one(tmp_path):
    import sft
    own = dict(init_from=checkpoint(tmp_path / 'model'), train_data=records(tmp_path / 'rows.jsonl', DEMONSTRATIONS),
               out_dir=tmp_path / 'out', max_steps=1)
    run(sft, **own, lora_rank=2)
    assert sorted(os.listdir(tmp_path / 'out/adapter')) == ['adapter_config.json', 'adapter_model.safetensors']
    run(sft, **own, overwrite=True)
    assert not os.path.exists(tmp_path / 'out/adapter')

@pytest.mark.parametrize('rank', [0, 2])
def test_a_folder_called_adapter_keeps_what_somebody_put_there(tmp_path, rank, capsys):
    import sft
    own = dict(train_data=records(tmp_path / 'rows.jsonl', DEMONSTRATIONS), out_dir=tmp_path / 'out', max_steps=1,
               lora_rank=rank)
    inside = checkpoint(tmp_path / 'out/adapter')
    before = {name: (tmp_path / 'out/adapter' / name).read_bytes() for name in os.listdir(inside)}
    run(sft, **own, init_from=checkpoint(tmp_path / 'model'))
    run(sft, **own, init_from=tmp_path / 'model', overwrite=True)
    assert before == {name: (tmp_path / 'out/adapter' / name).read_bytes() for name in before}
    said = stops(capsys, sft, **own, init_from=inside, overwrite=True)
    assert 'it, or its `adapter`, is --init_from too; wanted another folder' in said

def test_a_kill_at_any_moment_leaves_the_adapter_of_the_model(tmp_path, monkeypatch):
    """Every change of the file system in the second save is once the last that happens; a start then tidies up."""
    import sft
    own = dict(init_from=checkpoint(tmp_path / 'model'), train_data=records(tmp_path / 'rows.jsonl', DEMONSTRATIONS),
               lora_rank=2, lr=0.1, warmup_steps=0, max_steps=2, save_every=1)
    path, steps = 'adapter/adapter_model.safetensors', []
    run(sft, **own | dict(max_steps=1), lr_schedule='constant', out_dir=tmp_path / 'one')
    run(sft, **own, lr_schedule='constant', out_dir=tmp_path / 'two')
    expected = {n: (tmp_path / folder / path).read_bytes() for n, folder in ((1, 'one'), (2, 'two'))}
    for moment in range(100):
        out = tmp_path / str(moment)
        done = not killed(monkeypatch, moment, lambda: run(sft, **own, lr_schedule='constant', out_dir=out),
                          begun=lambda: os.path.exists(out / 'options.json')) # the first save is done
        finish_save(str(out))
        steps.append(json.loads((out / 'options.json').read_text())['step'])
        assert (out / path).read_bytes() == expected[steps[-1]], moment
        if done:
            break
    assert steps[0] == 1 and steps[-1] == 2 and steps == sorted(steps)

# ---------------------------------------------------------------------------------------------------------------------
# PEFT

@pytest.mark.parametrize('on', ['attn', 'all'])
@pytest.mark.parametrize('name', ['dpo', 'reward'])
def test_peft_opens_the_adapter(tmp_path, name, on):
    peft = pytest.importorskip('peft', reason='needs peft and transformers')
    import transformers
    script, options = stages(str(tmp_path))[name]
    options |= dict(max_steps=3, lora_rank=2, lora_on=on, lr=0.05, out_dir=tmp_path / 'out')
    run(importlib.import_module(script), **options)
    kind = dict(dpo=transformers.AutoModelForCausalLM, reward=transformers.AutoModelForSequenceClassification)[name]
    more = dict(num_labels=1) if name == 'reward' else {}
    base = kind.from_pretrained(options['init_from'], **more)
    base.config.pad_token_id = TOK.pad
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / 'out/adapter')).eval()
    merged = kind.from_pretrained(str(tmp_path / 'out')).eval()
    with torch.no_grad():
        texts = [IDX, torch.tensor([[72, 105, 33, 34, 256]])]
        begun = kind.from_pretrained(options['init_from'], **more).eval()
        got, expected, plain = ([m(ids).logits[0, ..., :] for ids in texts] for m in (adapted, merged, begun))
    if name == 'reward': # the merged one has a shift besides, which makes the mean 0: differences are the same
        got, expected, plain = ([x[1] - x[0]] for x in (got, expected, plain))
    for a, b, c in zip(got, expected, plain):
        assert (b - c).abs().max() > 0.01
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

def test_the_adapters_names_and_numbers(tmp_path):
    from safetensors.torch import load_file
    import dpo
    script, options = stages(str(tmp_path))['dpo']
    run(dpo, **options, max_steps=2, lora_rank=2, lora_alpha=6.0, lr=0.05, out_dir=tmp_path / 'out')
    tensors = load_file(tmp_path / 'out/adapter/adapter_model.safetensors')
    stem = 'base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight'
    assert sorted(tensors) == sorted(stem.format(layer, k) for layer in (0, 1) for k in 'AB')
    A, B = (tensors[stem.format(1, k)] for k in 'AB')
    assert A.shape == (2, 16) and B.shape == (48, 2)
    begun, trained = GPT.from_pretrained(options['init_from']), GPT.from_pretrained(tmp_path / 'out')
    torch.testing.assert_close(trained.h[1].attn.c_attn.weight, begun.h[1].attn.c_attn.weight + 3 * B @ A)
    with open(tmp_path / 'out/adapter/adapter_config.json') as f:
        said = json.load(f)
    assert said['r'] == 2 and said['lora_alpha'] == by_hand(6.0) and said['target_modules'] == ['c_attn']
    assert said['fan_in_fan_out'] is True and said['base_model_name_or_path'] == options['init_from']
