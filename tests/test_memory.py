"""memory.py: what the formulas say against numbers by hand, and against what torch really holds."""
import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import dpo
import kto
import memory
import ppo
import reinforce
import reward
import rrhf
import sft
from model import GPT, GPTConfig
from tiny import DEMONSTRATIONS, PROMPTS, RANKINGS, checkpoint, has_checkpoint, records, run, stops

SMALL = GPTConfig(n_layer=2, n_head=1, n_embd=2, vocab_size=3, block_size=4)


# ---------------------------------------------------------------------------------------------------------------------
# by hand

# 50257 * C + 1024 * C + n_layer * (12 C^2 + 13 C) + 2 C
@pytest.mark.parametrize('name, n', [('124M', 124439808), ('355M', 354823168), ('774M', 774030080),
                                     ('1.5B', 1557611200)])
def test_parameters_of_gpt2(name, n):
    n_layer, n_head, n_embd = memory.SIZES[name]
    assert memory.n_parameters(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)) == n


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('heads', [dict(), dict(value_head=True), dict(reward_head=True),
                                   dict(value_head=True, reward_head=True), dict(pad_vocab=True)])
def test_parameters_are_those_of_the_model(bias, heads):
    c = GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=4, bias=bias, **heads)
    assert memory.n_parameters(c) == sum(p.numel() for p in GPT(c).parameters())


# Two tokens, the second of which predicts one of 3 words. Attention keeps 2 (4 + 5 h) + 8 + 4 bytes a token, what
# follows 2 (4 + 9 h) + 8: in float32 60 and 88, in 16 bits 40 and 52. The first block has two tokens of both, the last
# one two of the first and one of the second with 2 h more. At the end: 2 (4 + h) + 8, and 3 log-probabilities.
@pytest.mark.parametrize('dtype, sharing, expected', [
    ('float32', False, (296, 216, 36, 296)), ('bfloat16', False, (184, 136, 32, 184)),
    ('float32', True, (312, 232, 36, 312))]) # and 2 * 2 * 4 bytes of mask
def test_what_is_kept_by_hand(dtype, sharing, expected):
    assert memory.kept(SMALL, rows=1, T=2, places=1, words=1, dtype=dtype, sharing=sharing) == expected


# 3 * 2 + 4 * 2 + 2 * (48 + 26) + 4 = 166 parameters, of which 96 are in the blocks' linear layers, 6 in the vocabulary
def test_needs_by_hand():
    one = dict(rows=1, T=2, places=1, words=1)
    need = memory.needs([SMALL], [], dtype='float32', **one)
    # 296 + 216 + 36, and the gradients of 3 logits and of their log-softmax
    assert need == dict(weights=664, optimizer=1328, gradients=664, activations=572, kv_cache=0,
                        total=664 + 1328 + 664 + 572)
    need = memory.needs([SMALL], [], dtype='float32', several=False, **one) # at the end: the embedding's two parts more
    assert need['total'] == 664 + 1328 + 664 + 8 * 6
    need = memory.needs([SMALL], [SMALL], dtype='bfloat16', **one)
    assert need['weights'] == 664 + 664 - 2 * 96
    assert need['activations'] == 184 + 136 + 32 + 24 + 2 * (96 + 6)
    # inputs of both blocks 2 * 2 * 2 * 4, and the copies, the end and 3 logits: more than one block
    assert memory.activations(SMALL, dtype='bfloat16', checkpointing=True, **one) == 32 + 204 + 32 + 12
    # 5 rows of 2 tokens in 2 layers: 2 * 2 * 5 * 2 * 2 * 4 bytes; one block with them: 5 * 296
    need = memory.needs([SMALL], [], dtype='float32', sampled=500, **one)
    assert need['kv_cache'] == 32000 and need['total'] == 664 + 1328 + 32000 + 500 * 296


@pytest.mark.parametrize('fsdp, parts', [(False, (664, 1328, 1328)), (True, (332, 664, 332))])
def test_two_processes_by_hand(fsdp, parts):
    need = memory.needs([SMALL], [], 1, 2, 1, 1, 'float32', processes=2, fsdp=fsdp)
    assert (need['weights'], need['optimizer'], need['gradients']) == parts
    assert need['total'] == sum(parts) + 572


def test_a_critic_predicts_no_words():
    judge = GPTConfig(n_layer=2, n_head=1, n_embd=2, vocab_size=3, block_size=4, reward_head=True)
    both = memory.needs([SMALL, judge], [], 1, 2, 1, 1, 'float32')['activations']
    assert both == 572 + 572 - 3 * 3 * 4


# ---------------------------------------------------------------------------------------------------------------------
# as measured

class Held(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are alive, and the most there ever were."""

    def __init__(self, model):
        super().__init__()
        self.sizes = {p.untyped_storage()._cdata: 0 for p in model.parameters()} # storage -> bytes
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def measured(c, rows, T, places, dtype, checkpointing, sharing=False):
    """What is kept for the backward pass, and the most that the forward and backward pass hold."""
    model = GPT(c)
    model.checkpointing = checkpointing
    idx = torch.zeros(rows, T, dtype=torch.long)
    mask = torch.ones(rows, 1, T, T, dtype=torch.bool) if sharing else None
    keep = (torch.arange(rows)[:, None] * T + torch.arange(T - places, T)).flatten()
    targets = torch.zeros(rows * places, dtype=torch.long)
    with Held(model) as held:
        with common.Run('cpu', dtype).autocast():
            x = model.embed(idx, torch.arange(T), mask=mask, keep=keep)
            logits = F.linear(x, model.wte.weight).float()
            loss = F.cross_entropy(logits, targets, reduction='none').sum()
        x = logits = None
        kept = held.now
        loss.backward()
    return kept, held.peak


# nothing is really computed but the tiny model: of a fake tensor the shape is known, and so is its size
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('sharing', [False, True])
@pytest.mark.parametrize('shape, V, rows, T, places', [
    ((2, 4, 64), 512, 4, 64, 64), ((6, 6, 384), 50257, 4, 128, 50), (memory.SIZES['124M'], 50257, 8, 1024, 1023)])
def test_the_formula_agrees_with_what_is_held(shape, V, rows, T, places, dtype, checkpointing, sharing):
    n_layer, n_head, n_embd = shape
    c = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=V)
    with contextlib.nullcontext() if n_embd == 64 else FakeTensorMode():
        kept, peak = measured(c, rows, T, places, dtype, checkpointing, sharing)
    need = memory.needs([c], [], rows, T, places, places, dtype, checkpointing, sharing, several=False)
    assert need['total'] - need['weights'] - need['optimizer'] == pytest.approx(peak, rel=0.02)
    if not checkpointing:
        blocks, last, end, _ = memory.kept(c, rows, T, places, places, dtype, sharing)
        assert blocks + last + end + memory.copies(c, dtype) == pytest.approx(kept, rel=0.02)


def test_the_cache_agrees_with_what_is_held(monkeypatch):
    import model
    caches, init = [], model.KVCache.__init__
    monkeypatch.setattr(model.KVCache, '__init__', lambda self, *a, **k: (caches.append(self), init(self, *a, **k))[1])
    c = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=32)
    GPT(c).generate([[1, 2], [3, 4, 5]], 7)
    assert sum(kv.nbytes for kv in caches[0].kv) == memory.kv_cache(c, 2, 10, 'float32') # 3 + 7 tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_formula_agrees_with_cuda(checkpointing):
    c, rows, T = GPTConfig(n_layer=12, n_head=12, n_embd=768), 4, 512
    on_gpu = common.Run('cuda', 'bfloat16')
    model = GPT(c).to('cuda')
    net = on_gpu.parallel(model, checkpointing=checkpointing)
    optimizer = common.make_optimizer(model, SimpleNamespace(lr=1e-4, weight_decay=0.0))
    idx, mask = torch.zeros(rows, T + 1, dtype=torch.long, device='cuda'), torch.ones(rows, T, device='cuda')
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with on_gpu.autocast():
            loss = -net('logp', idx, mask).mean()
        on_gpu.backward(loss)
        common.optimizer_step(optimizer, model, 1e-4, 1.0)
    need = memory.needs([c], [], rows, T, T, T, 'bfloat16', checkpointing, several=False)['total']
    assert need == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# before training

# GPT-2 small in bfloat16, micro-batches of 32 / 2 / 2 rows of 1024 tokens of which 612 predict a word. 20 bytes for each
# of 124439808 parameters, since two processes have gradients twice; copies 2 (84934656 + 38597376); 11 blocks
# 8192 (10808 + 16904); the last 8192 * 10808 + 4896 (16904 + 1536); the end 4896 * 4616; three times 4 * 4896 * 50257: in
# all 8387164544 bytes, 7.81 GiB.
@pytest.mark.parametrize('memory_of_gpu, checkpointing, fits', [(8, False, True), (7, False, False), (7, True, True)])
def test_what_does_not_fit_is_said_in_one_line(monkeypatch, capsys, memory_of_gpu, checkpointing, fits):
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(
        name='Fake GPU', total_memory=memory_of_gpu * memory.GiB))
    cfg = SimpleNamespace(batch_size=32, grad_accum=2, checkpointing=checkpointing)
    on_gpu, model = common.Run('cuda:0', 'bfloat16', world_size=2), SimpleNamespace(config=GPTConfig())
    if fits:
        return memory.check(on_gpu, cfg, [model], 1024, 612, 612)
    with pytest.raises(SystemExit) as stopped:
        memory.check(on_gpu, cfg, [model], 1024, 612, 612)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        'error: --batch_size=32: training takes about 7.8 GiB (weights 0.5, optimizer 0.9, gradients 0.9, '
        'activations 5.5) and Fake GPU has 7.0; wanted less: a larger --grad_accum, --checkpointing=True, shorter rows '
        'or a smaller model\n')


def test_a_cpu_is_not_asked():
    memory.check(common.Run('cpu', 'float32'), None, [], 0, 0, 0)


def given(tmp_path, script):
    """What a stage needs to train."""
    start = checkpoint(tmp_path / 'start')
    if script in (ppo, reinforce):
        return dict(policy=start, reward_model=checkpoint(tmp_path / 'judge', reward_head=True), max_new_tokens=8,
                    prompts=records(tmp_path / 'p.jsonl', PROMPTS), batch_size=8)
    data = records(tmp_path / 'd.jsonl', DEMONSTRATIONS if script is sft else RANKINGS)
    return dict(init_from=start, train_data=data, batch_size=4)


# Bytes are tokens; "### Human: …\n### Assistant:" is 26 tokens more than its prompt, an answer has a space before and
# the end of text behind it. sft: Why, 29, Because it is so., 19. Rankings: Why again, and so, 4; A has four answers.
# The RL scripts: Who?, 30, and 8 new ones; ppo trains a critic too, and samples two minibatches at once.
@pytest.mark.parametrize('script, expected, more', [
    (sft, '1 48 19 19 0', dict()), (reward, '1 52 4 0 0 sharing True', dict()),
    (reward, '1 52 27 23 0 sharing True', dict(lm_coef=0.1)), (dpo, '1 52 23 23 0 sharing True', dict()),
    (rrhf, '1 52 23 23 0 sharing True', dict()), (kto, '1 48 19 19 1', dict()), (ppo, '2 38 8 8 2 sampled 16', dict(minibatches=2)),
    (ppo, '1 38 8 8 2 sampled 8', dict(critic='shared')), (reinforce, '1 38 8 8 2 sampled 8', dict())])
def test_every_stage_asks_before_it_trains(tmp_path, monkeypatch, capsys, script, expected, more):
    def check(run, cfg, trained, T, places, words, frozen=(), **rest):
        common.fail(' '.join(map(str, (len(trained), T, places, words, len(frozen), *sum(rest.items(), ())))))

    monkeypatch.setattr(memory, 'check', check)
    said = stops(capsys, script, out_dir=str(tmp_path / 'out'), max_steps=1, **given(tmp_path, script), **more)
    assert said == expected and not has_checkpoint(tmp_path / 'out')


# a gradient that is scaled up by 65536 and not down again would show; some are too large, and left out
@pytest.mark.parametrize('script', [sft, reward, dpo, rrhf, kto, ppo, reinforce])
def test_float16_and_checkpointing_train_as_float32_does(tmp_path, script):
    norms, scalers = {}, {}
    for dtype in ('float32', 'float16'):
        out = tmp_path / dtype
        lines = run(script, out_dir=str(out), max_steps=4, dtype=dtype, checkpointing=dtype == 'float16',
                    **given(tmp_path, script) | dict(lr=1e-6))
        norms[dtype] = [line['grad_norm'] for line in lines]
        scalers[dtype] = torch.load(out / 'state.pt', weights_only=True)['scaler']
    left_out = norms['float16'].count(0.0)
    assert left_out < 4
    for a, b in zip(norms['float16'], norms['float32'], strict=True):
        assert a == 0.0 or 0.5 < a / b < 2.0 # what is sampled may differ
    assert scalers['float32'] == {}
    assert scalers['float16']['scale'] == 65536.0 / 2 ** left_out or script in (ppo, reinforce) # several steps a line


# all eight rows: prompts of 8 * 26 + 16 bytes; the demonstrations' answers have 48 and two each, the rankings' 94 and two
# for each of 23
@pytest.mark.parametrize('script, tokens', [(sft, 288), (kto, 288), (reward, 364), (dpo, 364), (rrhf, 364)])
def test_micro_batches_are_split_by_tokens(tmp_path, monkeypatch, script, tokens):
    seen, split_by_tokens = [], common.split_by_tokens
    monkeypatch.setattr(common, 'split_by_tokens', lambda rows, lengths, parts, least: (
        seen.append((len(rows), sum(lengths), parts, least)), split_by_tokens(rows, lengths, parts, least))[1])
    labelled = [r | dict(label=True) for r in DEMONSTRATIONS]
    data = records(tmp_path / 'd.jsonl', {sft: DEMONSTRATIONS, kto: labelled}.get(script, RANKINGS))
    run(script, out_dir=str(tmp_path / 'out'), init_from=checkpoint(tmp_path / 'start'), max_steps=1, train_data=data,
        batch_size=8, grad_accum=2)
    assert seen == [(8, tokens, 2, 1)]
