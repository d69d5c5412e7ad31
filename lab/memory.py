"""Work out how much memory a stage needs from its models' shapes.

    python bench.py --workload=memory --batch_size=4 --tokens=512 --dtype=bfloat16
    python bench.py --workload=memory --batch_size=4 --tokens=512 --dtype=bfloat16 --lora_rank=8

prints it for every stage and every size of GPT-2, the second time with adapters. The formulas, all in bytes, count the
weights, their gradients and AdamW's two averages, the tensors that the forward pass keeps for the backward pass, and
the cache of sampling. Not counted are the kernels' work space, the CUDA context (about half a GiB) and the allocator's
gaps: 90 % of a card must hold the rest. The tests compare the formulas with what torch really holds.

c is a model's GPTConfig everywhere. lora: the adapters' rank and place, as --lora_rank and --lora_on; without rank all
weights are trained.
"""

from dataclasses import replace

from model import GPTConfig

GiB = 2**30
CARDS = (12, 16, 24, 40, 80) # "GB" of cards as they are sold: each has about as many GiB (nvidia-smi)
SIZES = {'124M': (12, 12, 768), '355M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)} # GPT-2

ALL = 0, 'attn' # of lora: no adapters

def n_heads(c):
    """Return the number of parameters in a model's heads."""
    return c.value_head * (c.n_embd + 1) + c.reward_head * c.n_embd

def n_parameters(c):
    """Return the number of a model's parameters."""
    C, linear_bias, norm_bias = c.n_embd, 9 * c.bias, 2 * c.bias # in units of C
    block = 12 * C * C + (linear_bias + 2 + norm_bias) * C
    final = C * (1 + (c.bias or c.value_head or c.reward_head))
    return (c.vocab_size + c.block_size) * C + c.n_layer * block + final + n_heads(c)

def n_adapters(c, lora):
    """Return the number of parameters in a model's adapters: of C to 3 C, or with C to C, C to 4 C and back."""
    rank, on = lora
    return c.n_layer * rank * c.n_embd * (16 if on == 'all' else 4)

def stored(c, dtype):
    """Return the weights of a frozen model, see Run.freeze."""
    return 4 * n_parameters(c) - (0 if dtype == 'float32' else 2 * 12 * c.n_layer * c.n_embd ** 2)

def copies(c, dtype, lora=ALL):
    """Return autocast's 16-bit copies of vocabulary and trained linear weights."""
    trained = n_adapters(c, lora) if lora[0] else 12 * c.n_layer * c.n_embd ** 2
    return 0 if dtype == 'float32' else 2 * (trained + c.vocab_size * c.n_embd)

def kept(c, rows, T, places, predicted, dtype, sharing=False, lora=ALL):
    """Return what a forward pass keeps, four numbers.

    They are of all blocks but the last, of the last, of the end, and of one block. Of a row's T tokens the last layer's
    output is read at `places`, and a token is predicted at `predicted`. sharing: several answers share a row, with an
    attention mask (see common.batches.share_prompts). Per token and channel a block keeps its input and the sum after
    attention at size 4. At the size h of the autocast type it keeps the outputs of ln_1 (1), c_attn (3), attention (1),
    ln_2 (1), c_fc (4) and gelu (4). In the last block everything after attention is done for the places alone.

    Adapters keep their inner products, rank numbers. A frozen layer keeps no input: without an adapter behind them the
    outputs of ln_2, gelu and ln_f go, and so does the first block's input, which no gradient reaches.
    """
    C, h, N, n, (rank, on) = c.n_embd, 4 if dtype == 'float32' else 2, rows * T, rows * places, lora
    every = not rank or on == 'all' # linear layers keep their inputs
    head = not rank or c.value_head or c.reward_head # so does what reads ln_f
    attention = C * (4 + 5 * h) + 8 + 4 * c.n_head + (T * h if sharing else 0) + rank * h # 8: ln_1's mean, deviation
    rest = C * (4 + (9 if every else 4) * h) + 8 + (3 * rank * h if every else 0)
    last = N * attention + n * (rest + every * C * h) # C h: the picked output of attention
    end = n * (C * (4 + head * h) + 8) + 4 * rows * predicted * c.vocab_size # ln_f, what reads it, log-softmax
    unreached = N * (4 * C + 8) if rank else 0
    return (c.n_layer - 1) * N * (attention + rest) - unreached, last, end, N * (attention + rest)

def activations(c, rows, T, places, predicted, dtype, checkpointing=False, sharing=False, lora=ALL):
    """Return the most that both passes hold besides weights and gradients. Arguments as for `kept`.

    Where few tokens are predicted, it is while a block's gradients are worked out: as measured, not derived.
    """
    blocks, last, end, block = kept(c, rows, T, places, predicted, dtype, sharing, lora)
    h, numbers = 4 if dtype == 'float32' else 2, rows * T * c.n_embd
    logits = 4 * rows * predicted * c.vocab_size # the backward pass begins with their gradient and log-softmax's
    if not checkpointing:
        return copies(c, dtype, lora) + blocks + last + end + max(2 * logits, numbers * (8 + 3 * h))
    inputs = 4 * c.n_layer * numbers # of all blocks; then all copies, or the end's, or one block at a time
    projection = 0 if dtype == 'float32' else 2 * c.vocab_size * c.n_embd # its copy
    block += numbers * (8 * h - 4)
    return inputs + max(copies(c, dtype, lora) + end + logits, projection + end + 2 * logits, block)

def kv_cache(c, rows, T, dtype):
    """Return the keys and values of all layers, rows of T tokens."""
    return 2 * c.n_layer * rows * T * c.n_embd * (4 if dtype == 'float32' else 2)

def needs(trained, frozen, rows, T, places, predicted, dtype, checkpointing=False, sharing=False, sampled=0,
          several=True, lora=ALL, trunks=0):
    """Return {part: bytes} and, as `total`, the most at once.

    trained, frozen: GPTConfigs. One with a reward head predicts tokens only where it is the only one (lm_coef). rows:
    of a micro-batch; several: a step has more than one. sampled: rows that are sampled at once, before training.
    trunks: with adapters, how many of `trained` have a trunk of their own, and not that of a frozen model.
    """
    n = sum(n_adapters(c, lora) + n_heads(c) if lora[0] else n_parameters(c) for c in trained)
    own = [stored(c, dtype) - 4 * n_heads(c) for c in trained[:trunks if lora[0] else 0]]
    told = [predicted if len(trained) == 1 or not c.reward_head else 0 for c in trained]
    need = dict(weights=4 * n + sum(own) + sum(stored(c, dtype) for c in frozen), optimizer=8 * n, gradients=4 * n,
                activations=sum(activations(c, rows, T, places, w, dtype, checkpointing, sharing, lora)
                                for c, w in zip(trained, told)), kv_cache=kv_cache(trained[0], sampled, T, dtype))
    begin = need['activations'] + need['gradients'] * several # a backward pass frees the ones and makes the others
    c, rank = trained[0], lora[0]
    end = need['gradients'] + (0 if rank else 8 * c.vocab_size * c.n_embd) # the embedding's has two parts and a sum
    # the pass over the prompts takes one block at a time
    sampling = need['kv_cache'] + copies(c, dtype, lora) + kept(c, sampled, T, 1, 0, dtype, lora=lora)[3]
    # a trunk of its own comes in float32; one that is shared comes as the frozen model holds it
    loading = 4 * n_parameters(c) + sum(stored(f, dtype) for f in frozen) if trunks else 0
    return need | dict(total=max(need['weights'] + need['optimizer'] + max(begin, end, sampling), loading))

def stages(c, tokens):
    """Return {stage: options of `needs`}. Half of a row's tokens are answers'."""
    reward, answers = replace(c, reward_head=True), dict(places=tokens // 2, predicted=tokens // 2)
    sampling, sharing = answers | dict(sampled=64), answers | dict(sharing=True)
    return {'sft': dict(trained=[c], frozen=[], trunks=1, places=tokens, predicted=tokens),
            'reward': dict(trained=[reward], frozen=[], trunks=1, places=2, predicted=0, sharing=True),
            'dpo, rrhf': dict(trained=[c], frozen=[], trunks=1, **sharing),
            'kto': dict(trained=[c], frozen=[c], **answers),
            'ppo': dict(trained=[c, reward], frozen=[c, reward], **sampling), # the critic has a reward's shape
            'reinforce': dict(trained=[c], frozen=[c, reward], **sampling)}

def config_of(size):
    """Return the GPTConfig of a size of GPT-2."""
    n_layer, n_head, n_embd = SIZES[size]
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)

def card(total):
    """Name the smallest card of which 90 % hold so many bytes."""
    return next((f'{size} GB' for size in CARDS if total <= 0.9 * size * GiB), 'none')

def table(batch_size, tokens, dtype, lora=ALL):
    """Return rows of strings, one per stage and size of GPT-2."""
    rows = []
    for size in SIZES:
        for stage, options in stages(config_of(size), tokens).items():
            options |= dict(rows=batch_size, T=tokens, dtype=dtype, lora=lora)
            need, total_less = needs(**options), needs(**options, checkpointing=True)['total']
            total = need.pop('total')
            parts = sorted((part for part in need if need[part] > 0.1 * total), key=need.get, reverse=True)
            rows.append([size, stage, f'{total / GiB:.1f}', card(total), f'{total_less / GiB:.1f}', card(total_less),
                         ', '.join(f'{part} {need[part] / GiB:.1f}' for part in parts[:3])])
    return rows

def print_table(batch_size, tokens, dtype, lora=ALL):
    adapters = f', adapters of rank {lora[0]} on {lora[1]}' if lora[0] else ''
    print(f"GiB of a stage on one GPU: micro-batches of {batch_size} rows of {tokens} tokens, half of them answers', "
          f"{dtype}{adapters}.\nfits: the smallest card of {', '.join(map(str, CARDS))} GB of which 90 % are enough\n")
    print('{:15}{:>18}   {:>20}'.format('', 'as it is', '--checkpointing=True'))
    for row in [['model', 'stage', 'GiB', 'fits', 'GiB', 'fits', 'largest parts, as it is'],
                *table(batch_size, tokens, dtype, lora)]:
        print('{:5}  {:9}  {:>6}  {:>5}   {:>12}  {:>5}   {}'.format(*row))
