"""lab/memory.py: the formulas against numbers by hand, and against the bytes that torch really holds."""
import contextlib
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest

import model
from common.batches import Row, collate_answers, share_prompts
from common.run import Run
from common.training import make_optimizer, optimizer_step
from lab import memory
from model import GPT, GPTConfig

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
                                   dict(value_head=True, reward_head=True)])
def test_parameters_are_those_of_the_model(bias, heads):
    c = GPTConfig(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=4, bias=bias, **heads)
    assert memory.n_parameters(c) == sum(p.numel() for p in GPT(c).parameters())

# Two tokens, the second of which predicts one of 3 tokens. Attention keeps 2 (4 + 5 h) + 8 + 4 bytes a token, what
# follows 2 (4 + 9 h) + 8: in float32 60 and 88, in 16 bits 40 and 52. The first block has two tokens of both, the last
# one two of the first and one of the second with 2 h more. At the end: 2 (4 + h) + 8, and 3 log-probabilities.
@pytest.mark.parametrize('dtype, sharing, expected', [
    ('float32', False, (296, 216, 36, 296)), ('bfloat16', False, (184, 136, 32, 184)),
    ('float32', True, (312, 232, 36, 312))]) # and 2 * 2 * 4 bytes of mask
def test_what_is_kept_by_hand(dtype, sharing, expected):
    assert memory.kept(SMALL, rows=1, T=2, places=1, predicted=1, dtype=dtype, sharing=sharing) == expected

# 3 * 2 + 4 * 2 + 2 * (48 + 26) + 4 = 166 parameters, of which 96 are in the blocks' linear layers, 6 in the vocabulary
def test_needs_by_hand():
    one = dict(rows=1, T=2, places=1, predicted=1)
    need = memory.needs([SMALL], [], dtype='float32', **one)
    # 296 + 216 + 36; the gradients of 3 logits and of their log-softmax, 24, are less than a block's 4 * (8 + 3 * 4)
    assert need == dict(weights=664, optimizer=1328, gradients=664, activations=628, kv_cache=0,
                        total=664 + 1328 + 664 + 628)
    assert memory.activations(SMALL, 1, 2, 1, 10, 'float32') == 296 + 216 + 36 + 9 * 12 + 240 # with 10 tokens they lead
    need = memory.needs([SMALL], [], dtype='float32', several=False, **one) # at the end: the embedding's two parts more
    assert need['total'] == 664 + 1328 + 664 + 8 * 6
    need = memory.needs([SMALL], [SMALL], dtype='bfloat16', **one)
    assert need['weights'] == 664 + 664 - 2 * 96
    assert need['activations'] == 184 + 136 + 32 + 4 * (8 + 3 * 2) + 2 * (96 + 6)
    # inputs of both blocks 2 * 2 * 2 * 4, and the copies, the end and 3 logits: more than one block
    assert memory.activations(SMALL, dtype='bfloat16', checkpointing=True, **one) == 32 + 204 + 32 + 12
    # with 20 rows a block and its gradients, 4 * (8 * 2 - 4) a row, are more than that
    assert memory.activations(SMALL, 20, 2, 1, 1, 'bfloat16', checkpointing=True) == 20 * (32 + 184 + 48)
    # 5 rows of 2 tokens in 2 layers: 2 * 2 * 5 * 2 * 2 * 4 bytes; one block with them: 5 * 296
    need = memory.needs([SMALL], [], dtype='float32', sampled=500, **one)
    assert need['kv_cache'] == 32000 and need['total'] == 664 + 1328 + 32000 + 500 * 296

# rank 1 on attn: per layer 4 * 2 numbers; on all 16 * 2. The weights of SMALL without heads are 166 numbers (see above)
def test_adapters_by_hand():
    one = dict(rows=1, T=2, places=1, predicted=1)
    assert memory.n_adapters(SMALL, (1, 'attn')) == 16 and memory.n_adapters(SMALL, (3, 'all')) == 192
    # attn, in float32: attention keeps 60 + 4 bytes a token, the rest 2 (4 + 4 * 4) + 8 = 48. The first block has two
    # tokens of both, less 2 (2 * 4 + 8) that no gradient reaches; the last one two of the first and one of the second.
    # At the end 2 * 4 + 8, and 3 log-probabilities
    assert memory.kept(SMALL, dtype='float32', lora=(1, 'attn'), **one) == (224 - 32, 176, 28, 224)
    # all, in 16 bits: 40 + 2 and 52 + 6; in the last block 2 * 2 for the picked output of attention
    assert memory.kept(SMALL, dtype='bfloat16', lora=(1, 'all'), **one) == (200 - 32, 84 + 58 + 4, 28, 200)
    # a head is trained, and keeps 2 * 4 bytes of what it reads
    critic = replace(SMALL, reward_head=True)
    assert memory.kept(critic, dtype='float32', lora=(1, 'attn'), rows=1, T=2, places=1, predicted=0)[2] == 24
    # 16 trained numbers: 4 bytes each, 8 for the averages, 4 for the gradients; one trunk of 166 - 96 / 2 words
    need = memory.needs([SMALL], [], dtype='bfloat16', lora=(1, 'attn'), trunks=1, **one)
    assert (need['weights'], need['optimizer'], need['gradients']) == (64 + 664 - 192, 128, 64)
    assert memory.needs([SMALL], [SMALL], dtype='bfloat16', lora=(1, 'attn'), **one)['weights'] == need['weights']
    # PPO: the adapters twice, a head of 2 numbers three times in all, and two trunks
    need = memory.needs([SMALL, critic], [SMALL, critic], dtype='bfloat16', lora=(1, 'attn'), **one)
    assert need['weights'] == 4 * (16 + 16 + 2) + 2 * (664 - 192) + 8 and need['optimizer'] == 8 * 34

def test_adapters_are_those_of_the_model():
    for on in ('attn', 'all'):
        gpt, _ = prepared(SMALL, 'float32', False, (3, on))
        assert memory.n_adapters(SMALL, (3, on)) == sum(p.numel() for p in gpt.parameters() if p.requires_grad)

def test_loading_may_take_the_most():
    """Hardly any rows: a trunk of its own comes in float32, and KTO's beside the reference."""
    one = dict(rows=0, T=2, places=1, predicted=1, dtype='bfloat16', lora=(1, 'attn'))
    wide = replace(SMALL, n_embd=16, n_layer=1)
    n = 7 * 16 + 12 * 256 + 13 * 16 + 2 * 16 # embeddings, matrices (in 16 bits where frozen), biases and norms, ln_f
    stored = 4 * n - 2 * 12 * 256
    assert memory.needs([wide], [], trunks=1, **one)['total'] == 4 * n
    assert memory.needs([wide], [wide], trunks=1, **one)['total'] == 4 * n + stored
    need = memory.needs([wide], [wide], **one) # PPO's policy takes the trunk of the reference
    assert need['total'] < 4 * n and need['weights'] == stored + 4 * (16 + 48)

def test_a_critic_predicts_no_tokens():
    critic = GPTConfig(n_layer=2, n_head=1, n_embd=2, vocab_size=3, block_size=4, reward_head=True)
    both = memory.needs([SMALL, critic], [], 1, 2, 1, 1, 'float32')['activations']
    assert both == 628 + 628 - 3 * 4

# GPT-2 small, 8 rows of 1024 tokens in bfloat16. 16 bytes for each of 124439808 parameters; copies 2 (84934656 +
# 38597376); 11 blocks 8192 (10808 + 16904); the last 8192 (10808 + 16904 + 1536); the end 8192 * 4616; three times
# 4 * 8192 * 50257: in all 9953162752 bytes, 9.27 GiB, of which activations 7.42 and the optimizer 0.93 are above a
# tenth. With checkpointing the inputs of 12 blocks, 4 * 8192 * 768 each; a projection's copy, the end and three times
# the logits are the most that comes on top: 5357463040 + 1991036928 bytes, 6.84 GiB
def test_the_table_by_hand(capsys):
    assert memory.table(8, 1024, 'bfloat16')[0] == [
        '124M', 'sft', '9.3', '12 GB', '6.8', '12 GB', 'activations 7.4, optimizer 0.9']
    memory.print_table(8, 1024, 'bfloat16')
    lines = capsys.readouterr().out.splitlines()
    assert 'micro-batches of 8 rows of 1024 tokens' in lines[0] and 'bfloat16' in lines[0]
    rows = [line.split() for line in lines if line.startswith(('124M', '355M', '774M', '1.5B'))]
    assert rows[0] == '124M sft 9.3 12 GB 6.8 12 GB activations 7.4, optimizer 0.9'.split()
    assert [row[1] for row in rows] == ['sft', 'reward', 'dpo,', 'kto', 'ppo', 'reinforce'] * 4

@pytest.mark.parametrize('gib, name', [(0, '12 GB'), (10.8, '12 GB'), (10.81, '16 GB'), (14.41, '24 GB'), (36, '40 GB'),
                                       (72, '80 GB'), (72.01, 'none')])
def test_a_card_fits_when_a_tenth_stays_free(gib, name):
    assert memory.card(gib * 2**30) == name

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

def prepared(c, dtype, checkpointing, lora):
    gpt, run, (rank, on) = GPT(c), Run('cpu', dtype), lora
    run.prepare(gpt, SimpleNamespace(lora_rank=rank, lora_alpha=1.0, lora_on=on, checkpointing=checkpointing,
                                     compile=False))
    return gpt, run

def measured(c, rows, T, places, dtype, checkpointing, sharing=False, lora=memory.ALL):
    """Return the bytes kept for the backward pass, and the most that both passes hold.

    Of a reward model too: its last places are read, and no token is predicted.
    """
    gpt, run = prepared(c, dtype, checkpointing, lora)
    idx = torch.zeros(rows, T, dtype=torch.long)
    mask = torch.ones(rows, 1, T, T, dtype=torch.bool) if sharing else None
    keep = (torch.arange(rows)[:, None] * T + torch.arange(T - places, T)).flatten()
    targets = torch.zeros(rows * places, dtype=torch.long)
    with Held(gpt) as held:
        with run.autocast():
            x = gpt.trunk(idx, torch.arange(T), mask=mask, keep=keep)
            if c.reward_head:
                loss = gpt.reward_head(x).float().sum()
            else:
                logits = gpt.logits(x).float()
                loss = F.cross_entropy(logits, targets, reduction='none').sum()
        x = logits = None
        kept = held.now
        loss.backward()
    return kept, held.peak

def compare(c, rows, T, places, dtype, checkpointing, sharing, lora, kept, peak, rel=0.02):
    """Compare the formulas with bytes kept and held at most; their largest error is `rel`."""
    predicted = 0 if c.reward_head else places
    need = memory.needs([c], [], rows, T, places, predicted, dtype, checkpointing, sharing, several=False, lora=lora)
    most = memory.activations(c, rows, T, places, predicted, dtype, checkpointing, sharing, lora)
    held = most if lora[0] else need['total'] - need['weights'] - need['optimizer'] # adapters' gradients are small
    assert held == pytest.approx(peak, rel=rel)
    if not checkpointing:
        blocks, last, end, _ = memory.kept(c, rows, T, places, predicted, dtype, sharing, lora)
        assert blocks + last + end + memory.copies(c, dtype, lora) == pytest.approx(kept, rel=rel)

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
        found = measured(c, rows, T, places, dtype, checkpointing, sharing)
    compare(c, rows, T, places, dtype, checkpointing, sharing, memory.ALL, *found)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('sharing', [False, True])
@pytest.mark.parametrize('lora', [(2, 'attn'), (2, 'all')])
@pytest.mark.parametrize('head', [False, True])
def test_adapters_agree_with_what_is_held(dtype, checkpointing, sharing, lora, head):
    """A language model and a reward model; of the latter no vocabulary is copied, which the formula still counts."""
    c = GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=64 if head else 2048, block_size=128, reward_head=head)
    rows, T, places = 4, 128, 1 if head else 60
    found = measured(c, rows, T, places, dtype, checkpointing, sharing, lora)
    compare(c, rows, T, places, dtype, checkpointing, sharing, lora, *found, rel=0.06 if head else 0.02)

@pytest.mark.parametrize('lora', [memory.ALL, (2, 'all')])
def test_shared_prompts_agree_with_what_is_held(lora):
    """Through the model's own passes: 2 prompts of 40 tokens with 3 answers of 20. 3 * 19 + 40 tokens are given."""
    c = GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=2048, block_size=128)
    gpt, run = prepared(c, 'float32', False, lora)
    row = lambda n: Row([1] * 40, [[n + k] * 20 for k in (2, 3, 4)], {})
    answers = collate_answers([row(0), row(5)])
    laid = share_prompts(answers.idx[:, :-1], model.places(answers.mask), answers.groups)
    assert laid[0].shape == (2, 97)
    with Held(gpt) as held:
        loss = gpt.logp(answers.idx, answers.mask, answers.groups).sum()
        kept = held.now
        loss.backward()
    compare(c, 2, 97, 60, 'float32', False, True, lora, kept, held.peak, rel=0.03) # beside: ids, masks and places

def test_the_cache_agrees_with_what_is_held(monkeypatch):
    caches, init = [], model.KVCache.__init__
    monkeypatch.setattr(model.KVCache, '__init__', lambda self, *a, **k: (caches.append(self), init(self, *a, **k))[1])
    c = GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=32)
    GPT(c).generate([[1, 2], [3, 4, 5]], 7)
    assert sum(kv.nbytes for kv in caches[0].kv) == memory.kv_cache(c, 2, 10, 'float32') # 3 + 7 tokens

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_formula_agrees_with_cuda(checkpointing):
    c, rows, T = GPTConfig(n_layer=12, n_head=12, n_embd=768), 4, 512
    on_gpu, cfg = Run('cuda', 'bfloat16'), SimpleNamespace(lr=1e-4, weight_decay=0.0, grad_clip=1.0, out_dir='')
    gpt = GPT(c).to('cuda')
    gpt.checkpointing = checkpointing
    optimizer = make_optimizer(gpt, cfg)
    idx, mask = torch.zeros(rows, T + 1, dtype=torch.long, device='cuda'), torch.ones(rows, T, device='cuda')
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with on_gpu.autocast():
            loss = -gpt.logp(idx, mask).mean()
        on_gpu.backward(loss)
        optimizer_step(on_gpu, cfg, 0, gpt, optimizer, cfg.lr)
    need = memory.needs([c], [], rows, T, T, T, 'bfloat16', checkpointing, several=False)['total']
    assert need == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
