"""
How much memory a stage needs, worked out from the shape of its models before anything is trained. All in bytes.

It is arithmetic alone: what the weights, their gradients and AdamW's two averages take, what the forward pass keeps for
the backward pass, and the key/value cache while answers are sampled. Rows are taken to be as long as the longest, so
that what fits here fits at every step. Left out are the kernels' own work space, the CUDA context (about half a GiB)
and what the allocator loses in gaps. The tests compare it with what is really held.
"""

import math

from common import fail

import torch

GiB = 2**30
SIZES = {'124M': (12, 12, 768), '355M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)} # GPT-2


def n_parameters(c):
    """The number of a model's parameters; c: its GPTConfig."""
    C, linear_bias, norm_bias = c.n_embd, 9 * c.bias, 2 * c.bias # in units of C
    block = 12 * C * C + (linear_bias + 2 + norm_bias) * C
    heads = c.value_head * (C + 1) + c.reward_head * C
    final = C * (1 + (c.bias or c.value_head or c.reward_head))
    return (c.vocab_rows + c.block_size) * C + c.n_layer * block + final + heads


def frozen_weights(c, dtype):
    """The weights of a model that is not trained: float32, but linear layers as in Run.freeze."""
    return 4 * n_parameters(c) - (0 if dtype == 'float32' else 2 * n_linear(c))


def n_linear(c):
    """The weights of the blocks' linear layers."""
    return c.n_layer * 12 * c.n_embd ** 2


def copies(c, dtype):
    """What autocast makes of the linear layers and the projection onto the vocabulary, in 16 bits, for one pass."""
    return 0 if dtype == 'float32' else 2 * (n_linear(c) + c.vocab_rows * c.n_embd)


def kept(c, rows, T, places, words, dtype, sharing=False):
    """
    What a forward pass over rows, each of T tokens, keeps for the backward pass: in all blocks but the last, in the
    last, at the end, and in one block.

    places: places per row at which the last layer's output is read. words: of these, where a word is predicted.
    sharing: several answers share a row, which takes an attention mask (see tokens.Answers). Per token and channel a
    block keeps at size 4: its input, and the sum after attention; at the size h of the autocast type: the outputs of
    ln_1 (1), c_attn (3), attention (1), ln_2 (1), c_fc (4) and gelu (4); besides them a few numbers per token. In the
    last block all that follows attention is done for the places alone.
    """
    C, h, N, n = c.n_embd, 4 if dtype == 'float32' else 2, rows * T, rows * places
    attention = C * (4 + 5 * h) + 8 + 4 * c.n_head + (T * h if sharing else 0) # 8: ln_1's mean and deviation
    rest = C * (4 + 9 * h) + 8
    last = N * attention + n * (rest + C * h) # C h: the picked output of attention
    end = n * (C * (4 + h) + 8) + 4 * rows * words * c.vocab_rows # ln_f, what reads it, log-softmax
    return (c.n_layer - 1) * N * (attention + rest), last, end, N * (attention + rest)


def activations(c, rows, T, places, words, dtype, checkpointing=False, sharing=False):
    """The most that a forward and a backward pass hold besides weights and gradients; arguments as for `kept`."""
    blocks, last, end, block = kept(c, rows, T, places, words, dtype, sharing)
    logits = 4 * rows * words * c.vocab_rows # the backward pass begins with their gradient and that of log-softmax
    if not checkpointing:
        return copies(c, dtype) + blocks + last + end + 2 * logits
    inputs = 4 * c.n_layer * rows * T * c.n_embd # of all blocks; then all copies, or the end's, or one block at a time
    projection = copies(c, dtype) and 2 * c.vocab_rows * c.n_embd # its copy
    return inputs + max(copies(c, dtype) + end + logits, projection + end + 2 * logits, block)


def kv_cache(c, rows, T, dtype):
    """Keys and values of rows of T tokens in all layers."""
    return 2 * c.n_layer * rows * T * c.n_embd * (4 if dtype == 'float32' else 2)


def needs(trained, frozen, rows, T, places, words, dtype, checkpointing=False, sharing=False, sampled=0, several=True,
          processes=1, fsdp=False):
    """
    All of it by name, and the most that is held at once. trained, frozen: GPTConfigs; one with a reward head predicts
    words only where it is the only one (reward.py's lm_coef). rows: of a micro-batch; several: an optimizer step has
    more than one of them. sampled: rows that are sampled at once, before anything is trained on. With several processes
    each has its gradients twice, once on their way to the others, or, with fsdp, its part of everything.
    """
    n, spread = sum(map(n_parameters, trained)), processes if fsdp else 1
    said = [words if len(trained) == 1 or not c.reward_head else 0 for c in trained]
    need = dict(
        weights=4 * n // spread + sum(frozen_weights(c, dtype) for c in frozen),
        optimizer=8 * n // spread, gradients=4 * n // spread * (2 if processes > spread else 1),
        activations=sum(activations(c, rows, T, places, w, dtype, checkpointing, sharing)
                        for c, w in zip(trained, said)),
        kv_cache=kv_cache(trained[0], sampled, T, dtype))
    begin = need['activations'] + need['gradients'] * several # a backward pass frees the ones and makes the others
    end = need['gradients'] + 8 * trained[0].vocab_rows * trained[0].n_embd # the embedding's has two parts and a sum
    sampling = need['kv_cache'] + 4 * n_parameters(trained[0]) * fsdp # measuring, sampling and saving take all weights
    if sampled: # and the pass over the prompts takes one block at a time
        sampling += copies(trained[0], dtype) + kept(trained[0], sampled, T, 1, 0, dtype)[3]
    return need | dict(total=need['weights'] + need['optimizer'] + max(begin, end, sampling))


def check(run, cfg, trained, T, places, words, frozen=(), sharing=False, sampled=0):
    """
    Before training: what this run needs, where that is more than the GPU has, in one line and with exit code 2.
    trained, frozen: models. T: tokens of the longest row; the others as for needs.
    """
    if not run.device.startswith('cuda'):
        return
    gpu = torch.cuda.get_device_properties(run.device)
    rows = math.ceil(cfg.batch_size / (cfg.grad_accum * run.world_size))
    need = needs([m.config for m in trained], [m.config for m in frozen], rows, T, places, words, run.dtype,
                 cfg.checkpointing, sharing, sampled, cfg.grad_accum > 1, run.world_size, getattr(cfg, 'fsdp', False))
    if need['total'] > gpu.total_memory:
        parts = ', '.join(f"{name} {size / GiB:.1f}" for name, size in need.items() if name != 'total' and size)
        fail(f"--batch_size={cfg.batch_size}: training takes about {need['total'] / GiB:.1f} GiB ({parts}) and "
             f"{gpu.name} has {gpu.total_memory / GiB:.1f}; wanted less: a larger --grad_accum, --checkpointing=True, "
             "shorter rows or a smaller model")
