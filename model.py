"""Run GPT-2 (Radford et al. 2019), with optional heads for values and rewards.

common/weights.py reads and writes its weights in the Hugging Face layout. The methods to call:

    hidden(idx)                     (B, T, C)           the trunk; with `keep` at chosen places only, (N, C)
    logits(x), forward(idx)         (B, T, V)           the projection onto the vocabulary
    logits_at(idx, mask)            (N, V)              the same, at the N positions that mask counts
    logp(idx, mask)                 (B, T-1)            log-probabilities of the tokens that mask counts
    values(idx, mask)               (B, T-1)            the value head: PPO's critic
    logp_entropy_values(idx, mask)  three of (B, T-1)   all in one pass, for a policy that carries its critic
    rewards(idx, lengths)           (B,)                the reward head: the reward model
    logp_rewards(idx, mask, …)      (B, T-1), (B,)      both in one pass, for a reward model that also learns to write
    generate(prompts, …)            lists of ids        sampling; `stream` gives it token by token

Where neighbouring rows are answers to the same prompt, groups (n,) says how many there are to each, as in [4, 4, 2].
Then what they share is computed once, see common.batches.share_prompts.

Shapes: B sequences, T positions, V vocabulary, C channels, K answers per prompt, nh heads, hs head size, () a scalar.

Two conventions hold in the whole code base:
1. Sequences are right-padded. A causal model never looks at later tokens, so pads need no attention mask.
2. Position t of a per-token array describes token t+1: such arrays are (B, T-1).
"""

import math
import os
from dataclasses import dataclass

from common import weights
from common.batches import share_prompts
from common.options import fail

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

@dataclass
class GPTConfig:
    block_size: int = 1024 # longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # False: no bias in linear layers and layer norms
    value_head: bool = False # V(s_t) for every position, for PPO's critic
    reward_head: bool = False # one score per sequence, for the reward model

class Linear(nn.Linear):
    """Map x (…, in) to (…, out) by W, or with an adapter by W + alpha / rank B A, see GPT.adapt."""

    def adapt(self, rank, alpha):
        """Add an adapter. B is 0 at first, so that nothing changes yet."""
        A, B = nn.Linear(self.in_features, rank, bias=False), nn.Linear(rank, self.out_features, bias=False)
        nn.init.zeros_(B.weight)
        self.lora, self.scale = nn.Sequential(A, B).to(self.weight.device), alpha / rank

    def forward(self, x):
        y = super().forward(x)
        return y + self.scale * self.lora(x) if hasattr(self, 'lora') else y

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, cache=None, mask=None, keep=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4) # (3, B, nh, T, hs)
        q, k, v = qkv # (B, nh, T, hs) each
        if cache is not None:
            k, v, mask = cache.extend(self.layer, qkv[1:]) # S keys and values: (B, nh, S, hs) each, (B, 1, 1, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0) # (B, nh, T, hs)
        y = pick(y.transpose(1, 2).reshape(B, T, C), keep) # (B, T, C), or (N, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')), self.dropout, self.training) # as x

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None, keep=None):
        """Map x (B, T, C) to (B, T, C), or with keep (N,) to (N, C), at these places alone."""
        x = pick(x, keep) + self.attn(self.ln_1(x), cache, mask, keep)
        return x + self.mlp(self.ln_2(x))

def pick(x, keep):
    """Return the vectors (N, C) of x (B, T, C) at the places keep (N,); all of x where keep is None.

    Places are counted through the flattened B * T. The last layer computes its output, after attention, at these alone.

        x, B = 2 rows of T = 4:   a b c d      places:  0 1 2 3      keep = [1, 6, 7]  ->  b g h
                                  e f g h               4 5 6 7
    """
    return x if keep is None else x.flatten(0, 1).index_select(0, keep)

def last_places(lengths, T):
    """Return the places (B,) of the rows' last tokens, as `pick` counts them; lengths: (B,)."""
    return torch.arange(len(lengths), device=lengths.device) * T + lengths - 1

def places(mask):
    """Return the places (N,) where mask (B, T) is above 0, as `pick` counts them."""
    return (mask > 0).flatten().nonzero()[:, 0]

class KVCache:
    """Hold the keys and values of earlier tokens, for B rows of any length.

    The first pass stores right-padded prompts. Each later one adds one token per row, at that row's own position, over
    the padding. static: each looks at all max_length places, many of them hidden, so that its shapes stay the same.
    """

    def __init__(self, config, lengths, max_length, static=False):
        self.lengths, self.max_length, self.static = lengths, max_length, static # lengths: (B,) tokens stored per row
        self.longest = max_length if static else int(lengths.max()) # S, the places that a pass looks at
        self.kv = [None] * config.n_layer # (2, B, nh, max_length, hs) each
        self.mask = None # (B, 1, 1, S), True where a row may look; None in the first pass

    def next(self):
        """Make room for one more token per row; return its positions (B,)."""
        positions, self.lengths = self.lengths, self.lengths + 1
        self.longest += not self.static
        self.mask = (torch.arange(self.longest, device=positions.device) < self.lengths[:, None])[:, None, None, :]
        self.rows = torch.arange(len(positions), device=positions.device)
        return positions

    def extend(self, layer, kv):
        """Store the new keys and values, (2, B, nh, T, hs); return all keys, all values and the mask to use."""
        if self.mask is None:
            _, B, nh, T, hs = kv.size()
            self.kv[layer] = kv.new_zeros(2, B, nh, self.max_length, hs)
            self.kv[layer][:, :, :, :T] = kv
            return *kv, None
        self.kv[layer][:, self.rows, :, self.lengths - 1] = kv[:, :, :, 0].transpose(0, 1) # the indices come first
        return *self.kv[layer][:, :, :, :self.longest], self.mask

    def select(self, rows):
        """Keep these rows, indices (n,); a row may be dropped, or kept several times."""
        self.kv = [kv[:, rows] for kv in self.kv]
        self.lengths = self.lengths[rows]
        if not self.static:
            self.longest = int(self.lengths.max())

def check_size(c):
    """End the program where a model outgrows this machine's memory; c: its GPTConfig."""
    n = 12 * c.n_layer * c.n_embd**2 + (c.vocab_size + c.block_size) * c.n_embd # less biases
    known = 'SC_PHYS_PAGES' in getattr(os, 'sysconf_names', ()) # not on Windows
    holds = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 4 if known else 2**40
    if n > holds or c.n_layer > 1000: # so many layers take minutes to make
        fail(f"n_layer={c.n_layer}, n_embd={c.n_embd}, block_size={c.block_size}, vocab_size={c.vocab_size}: {n:.3g} "
             f"parameters; wanted at most 1000 layers and the {holds:.3g} parameters that fit this machine's memory")

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            fail(f"n_embd must be a multiple of n_head, got n_embd={config.n_embd}, n_head={config.n_head}")
        check_size(config)
        self.config = config
        self.checkpointing = False # read by `through`, set by Run.prepare
        self.compiled = None # the decoding step, see compile_decoding
        self.wte = nn.Embedding(config.vocab_size, config.n_embd) # also the output projection
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        # normalise_rewards needs the final bias, and so does a critic that starts as the reward model
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias or config.reward_head or config.value_head)
        self.value_head = nn.Linear(config.n_embd, 1) if config.value_head else None
        self.reward_head = nn.Linear(config.n_embd, 1, bias=False) if config.reward_head else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for name, p in self.named_parameters(): # the sum of 2 * n_layer residual branches is not to grow with depth
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
        if self.reward_head is not None: # Stiennon et al. 2020, appendix B.1
            nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def adapt(self, rank, alpha, on):
        """Freeze all but the heads, and add adapters (LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685).

            W x  becomes  W x + alpha / rank * B A x          equation 3; B: (out, rank), A: (rank, in)

        on: attn, the projection to queries, keys and values; or all, every linear layer of the blocks.
        """
        self.requires_grad_(False)
        for block in self.h:
            rest = (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj) if on == 'all' else ()
            for linear in (block.attn.c_attn, *rest):
                linear.adapt(rank, alpha)
        for head in filter(None, (self.value_head, self.reward_head)):
            head.requires_grad_(True)

    def trunk(self, idx, positions, cache=None, mask=None, keep=None):
        """Return the last layer's output (B, T, C) for tokens idx (B, T) at positions (T,) or (B, T).

        A token looks at itself, at earlier tokens and at the cache; with a mask (B, 1, T, T), where that is True. With
        keep (N,) the output is (N, C), at these places alone, see `pick`.
        """
        x = F.dropout(self.wte(idx) + self.wpe(positions), self.config.dropout, self.training) # (B, T, C)
        *blocks, last = self.h
        for block in blocks:
            x = self.through(block, x, cache, mask)
        return self.ln_f(self.through(last, x, cache, mask, keep))

    def through(self, block, *args):
        """Return a block's output; checkpointing computes its activations again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def work(self, rows, length):
        """Return the cost of a pass: in each layer so many times 4 n_embd operations."""
        return rows * length * (6 * self.config.n_embd + length) # products, then attention

    def hidden(self, idx, cache=None, keep=None, groups=None):
        """Return the last layer's output for tokens idx (B, T): (B, T, C), or (N, C) at the places keep (N,)."""
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's context of {self.config.block_size}")
        if groups is not None and len(groups) < B: # some prompt has several rows
            ids, positions, mask, places = share_prompts(idx, keep, groups)
            if self.work(*ids.size()) < self.work(B, T): # long answers would look past one another
                return self.trunk(ids, positions, mask=mask, keep=places)
        return self.trunk(idx, torch.arange(T, device=idx.device), cache, keep=keep)

    def logits(self, x):
        """Project x (…, C) onto the vocabulary, (…, V)."""
        return F.linear(x, self.wte.weight)

    def forward(self, idx, targets=None):
        """Return logits (B, T, V) and the mean cross-entropy (); targets: (B, T) next tokens, -100 = ignored."""
        logits = self.logits(self.hidden(idx)) # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    # Training calls these. mask (B, T-1) counts the tokens that matter: position t describes token t+1. The last layer
    # and the projection onto the vocabulary (a third of GPT-2 small's work) are done for these N positions only.

    def logits_at(self, idx, mask, groups=None):
        """Return the logits (N, V) that predict the tokens counted by mask (B, T-1); float32, in row order."""
        return self.logits(self.hidden(idx[:, :-1], keep=places(mask), groups=groups)).float()

    def logp(self, idx, mask, groups=None):
        """Return log-probabilities (B, T-1) of the tokens counted by mask (B, T-1), 0 elsewhere; idx: (B, T)."""
        return token_logp(self.logits_at(idx, mask, groups), idx, mask)

    def values(self, idx, mask, groups=None):
        """Return V(s_t) (B, T-1) where mask counts, 0 elsewhere; position t is the state before token t+1."""
        x = self.hidden(idx[:, :-1], keep=places(mask), groups=groups) # (N, C)
        return torch.zeros_like(mask).masked_scatter(mask > 0, self.value_head(x).float())

    def logp_entropy_values(self, idx, mask, with_entropy=False, groups=None):
        """Return logp, the entropy in nats (None unless asked for) and values (or None), (B, T-1) each."""
        x = self.hidden(idx[:, :-1], keep=places(mask), groups=groups) # (N, C)
        values = None
        if self.value_head is not None:
            values = torch.zeros_like(mask).masked_scatter(mask > 0, self.value_head(x).float()) # (B, T-1)
        logits = self.logits(x).float() # (N, V)
        return token_logp(logits, idx, mask), token_entropy(logits, mask) if with_entropy else None, values

    def rewards(self, idx, lengths, groups=None):
        """Return scores (B,) of right-padded rows idx (B, T), from each row's last token."""
        x = self.hidden(idx, keep=last_places(lengths, idx.size(1)), groups=groups) # (B, C)
        return self.reward_head(x).squeeze(-1).float() # (B,)

    def logp_rewards(self, idx, mask, lengths, groups=None):
        """Return log-probabilities (B, T-1), as logp does, and scores (B,), as rewards does."""
        keep = torch.cat([last_places(lengths, idx.size(1)), places(F.pad(mask, (0, 1)))]) # (B + N,)
        scores, x = self.hidden(idx, keep=keep, groups=groups).tensor_split([len(idx)]) # (B, C), (N, C)
        return token_logp(self.logits(x).float(), idx, mask), self.reward_head(scores).squeeze(-1).float()

    PASSES = logits_at, logp, values, logp_entropy_values, rewards, logp_rewards # see common.run.Run.prepare

    # ---- generation ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None):
        """Continue ragged prompts (lists of token ids, none empty) token by token.

        Each step yields the rows that go on (n,), their new tokens (n,) and these tokens' log-probabilities (n,) as
        sampled. A row ends with eos, which is yielded. temperature=0 is greedy; top_k=0 and top_p=1 change nothing.
        """
        device, longest = self.wte.weight.device, max(len(p) for p in prompts)
        if min(len(p) for p in prompts) == 0:
            raise ValueError("an empty prompt cannot be continued")
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's "
                             f"context of {self.config.block_size}")
        first = {} # answers to the same prompt share one pass over it
        same = torch.tensor([first.setdefault(tuple(p), len(first)) for p in prompts], device=device) # (n,)
        idx = torch.tensor([p + (0,) * (longest - len(p)) for p in first], device=device) # (B, T) distinct prompts
        lengths = torch.tensor([len(p) for p in first], device=device) # (B,)
        room = longest + max_new_tokens
        if self.compiled: # few different shapes: each is compiled once
            room = min(self.config.block_size, math.ceil(room / 128) * 128)
        cache = KVCache(self.config, lengths, room, static=self.compiled is not None)
        x = self.hidden(idx, cache, keep=last_places(lengths, longest)) # (B, C)
        if len(first) < len(prompts):
            cache.select(same)
        x, rows = x[same], torch.arange(len(prompts), device=device) # (n, C), (n,)
        alive = torch.ones_like(rows, dtype=torch.bool) # ended rows stay in the batch until enough have ended
        for step in range(max_new_tokens):
            logits = self.logits(x).float() # (n, V)
            tokens, logp = sample_token(logits, temperature, top_k, top_p) # (n,), (n,)
            yield rows[alive], tokens[alive], logp[alive]
            if eos is not None:
                alive = alive & (tokens != eos)
                n = int(alive.sum())
                if n == 0:
                    return
                if n <= 0.8 * len(alive) and not self.compiled: # moving the cache costs about a step
                    cache.select(alive.nonzero()[:, 0])
                    rows, tokens, alive = rows[alive], tokens[alive], alive[alive]
            if step + 1 < max_new_tokens:
                x = (self.compiled or self.decode)(tokens, cache.next(), cache) # (n, C)

    def decode(self, tokens, positions, cache):
        """Return the output (n, C) for one more token per cached row; tokens, positions: (n,)."""
        return self.trunk(tokens[:, None], positions[:, None], cache)[:, 0]

    def compile_decoding(self, **options):
        """Decode by a compiled step from now on. Its shapes never change: a full cache, and ended rows stay."""
        self.compiled = torch.compile(self.decode, dynamic=False, **options)

    def generate_with_logp(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None):
        """Return responses (lists of ids, eos kept) and their log-probabilities, recorded while sampling."""
        was_training = self.training
        self.eval()
        try:
            steps = list(self.stream(prompts, max_new_tokens, temperature, top_k, top_p, eos))
        finally:
            self.train(was_training)
        responses, logps = [[] for _ in prompts], [[] for _ in prompts]
        for rows, tokens, logp in steps:
            for row, token, lp in zip(rows.tolist(), tokens.tolist(), logp.tolist()):
                responses[row].append(token)
                logps[row].append(lp)
        return responses, logps

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None):
        """Return responses alone, as lists of ids, eos kept; temperature 0 = greedy."""
        return self.generate_with_logp(prompts, max_new_tokens, temperature, top_k, top_p, eos)[0]

    # ---- weights in and out -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """Read a GPT-2 in the Hugging Face layout: a folder, or a model on the hub ("gpt2", "OWNER/NAME").

        overrides: fields of GPTConfig to replace. value_head=True or reward_head=True adds a fresh head; that of values
        begins as a reward model's own. Weights become float32. A checkpoint that does not fit ends the program.
        """
        fields, path, tensors = weights.open_pretrained(name)
        model = cls(GPTConfig(**fields | overrides))
        if model.value_head is not None and not fields['value_head'] and fields['reward_head']:
            tensors['value_head.weight'] = tensors['score.weight']
            tensors['value_head.bias'] = lambda: torch.zeros(1)
        weights.load_tensors(model, path, tensors)
        model.was_reward_model = fields['reward_head'] # in the checkpoint, before the overrides
        return model

    save_pretrained = weights.save_pretrained # (self, folder, eos=None, pad=None)

def token_logp(logits, idx, mask):
    """Return log-probabilities (B, T-1) of idx (B, T) where mask (B, T-1) counts N, 0 elsewhere; logits: (N, V)."""
    picked = -F.cross_entropy(logits, idx[:, 1:][mask > 0], reduction='none') # (N,)
    return torch.zeros_like(mask).masked_scatter(mask > 0, picked)

def token_entropy(logits, mask):
    """Return the entropy (B, T-1) in nats of logits (N, V), placed as in token_logp."""
    log_q = logits.log_softmax(-1) # (N, V)
    return torch.zeros_like(mask).masked_scatter(mask > 0, -(log_q.exp() * log_q).sum(-1))

def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Draw a token (B,) per row of logits (B, V); return it and its log-probability (B,) as sampled."""
    if temperature == 0:
        logp, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logp
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)))[0][:, -1:] # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        order = logits.argsort(-1, descending=True) # (B, V)
        p = logits.softmax(-1).gather(-1, order)
        cut = p.cumsum(-1) - p >= top_p # the likeliest tokens that together reach top_p stay
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    logp = logits.log_softmax(-1) # (B, V)
    # inverse transform sampling, one random number per row: torch.multinomial draws one per row and token, 15 times as
    # slow at V = 50257. In float64, so that rounding never hits a token of probability 0; Apple's GPUs have no float64
    p = logp.exp() # (B, V)
    cdf = (p.cpu() if p.device.type == 'mps' else p).cumsum(-1, dtype=torch.float64) # (B, V)
    u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device) * cdf[:, -1:] # (B, 1)
    tokens = torch.searchsorted(cdf, u, right=True) # (B, 1), the first token whose cdf exceeds u
    tokens = tokens.clamp(max=logits.size(-1) - 1).to(logp.device) # no cdf of NaN exceeds u; the loss will report NaN
    return tokens[:, 0], logp.gather(-1, tokens)[:, 0]
