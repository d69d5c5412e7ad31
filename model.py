"""
GPT-2 in one file (Radford et al. 2019), with an optional value head and an optional reward head, and generation with
a key/value cache. Weights are read and written in the Hugging Face layout, so that other tools open what this writes.

Letters for shapes, here and everywhere: B sequences, T positions, V vocabulary, C channels, K answers per prompt,
nh heads, hs head size. () is a scalar.

Two conventions hold in the whole code base:
1. Sequences are right-padded. A causal model never looks at what comes later, so pads need no attention mask.
2. Position t of any per-token array speaks of token t+1: such arrays are (B, T-1).
"""

import dataclasses
import json
import math
import os
import zipfile
from dataclasses import dataclass
from functools import partial

from common import checkpoint_file, fail, read_json

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from safetensors import safe_open


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
    pad_vocab: bool = False # hold the vocabulary's rows up to a multiple of 64, which GPUs like; seen nowhere outside

    @property
    def vocab_rows(self):
        """The rows of the embedding, padding included."""
        return math.ceil(self.vocab_size / 64) * 64 if self.pad_vocab else self.vocab_size


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, cache=None, mask=None, keep=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4) # (3, B, nh, T, hs)
        q, k, v = qkv # (B, nh, T, hs) each
        if cache is not None:
            k, v, mask = cache.extend(self.layer, qkv[1:]) # S keys and values: (B, nh, S, hs) each, (B, 1, 1, S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0) # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C) # (B, T, C)
        if keep is not None:
            y = pick(y, keep) # (N, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')) # as x
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, mask=None, keep=None):
        """(B, T, C) -> (B, T, C), or with keep (N,) -> (N, C): what of these places alone goes on from here."""
        y = self.attn(self.ln_1(x), cache, mask, keep)
        if keep is not None:
            x = pick(x, keep) # (N, C)
        x = x + y
        return x + self.mlp(self.ln_2(x))


def pick(x, keep):
    """The vectors (N, C) of x (B, T, C) at the places keep (N,), counted through the flattened B * T."""
    return x.flatten(0, 1).index_select(0, keep)


def last_places(lengths, T):
    """The places (B,), counted through the flattened B * T, of the last tokens of rows of these lengths (B,)."""
    return torch.arange(len(lengths), device=lengths.device) * T + lengths - 1


def places(mask):
    """The places (N,), counted through the flattened B * T, where mask (B, T) is above 0."""
    return (mask > 0).flatten().nonzero()[:, 0]


class KVCache:
    """
    Keys and values of the tokens seen so far, for B rows of different lengths. The first pass stores whole prompts,
    right-padded; every later pass adds one token per row at that row's own position, over what padding lies there.
    static: every later pass looks at all max_length places, many of them hidden, so that its shapes stay the same.
    """

    def __init__(self, config, lengths, max_length, static=False):
        self.lengths = lengths # (B,) tokens stored per row
        self.max_length, self.static = max_length, static
        self.longest = max_length if static else int(lengths.max()) # how many places a pass looks at, S
        self.kv = [None] * config.n_layer # (2, B, nh, max_length, hs) each
        self.mask = None # (B, 1, 1, S), 0 where a row may look, -inf elsewhere; None in the first pass

    def next(self):
        """Make room for one more token per row; returns the positions (B,) that it takes."""
        positions = self.lengths
        self.lengths = self.lengths + 1
        if not self.static:
            self.longest += 1
        hidden = torch.arange(self.longest, device=positions.device) >= self.lengths[:, None] # (B, S)
        self.mask = torch.zeros(hidden.shape, dtype=self.kv[0].dtype, device=positions.device)
        self.mask = self.mask.masked_fill_(hidden, -math.inf)[:, None, None, :]
        self.rows = torch.arange(len(positions), device=positions.device)
        return positions

    def extend(self, layer, kv):
        """Store the new keys and values, (2, B, nh, T, hs); returns all keys, all values and the mask to use."""
        if self.mask is None:
            _, B, nh, T, hs = kv.size()
            self.kv[layer] = kv.new_zeros(2, B, nh, self.max_length, hs)
            self.kv[layer][:, :, :, :T] = kv
            return *kv, None
        self.kv[layer][:, self.rows, :, self.lengths - 1] = kv[:, :, :, 0].transpose(0, 1) # the indices come first
        return *self.kv[layer][:, :, :, :self.longest], self.mask

    def keep(self, rows):
        """Go on with these rows, (n,) indices; a row may be dropped, or come several times."""
        self.kv = [kv[:, rows] for kv in self.kv]
        self.lengths = self.lengths[rows]
        if not self.static:
            self.longest = int(self.lengths.max())


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            fail(f"n_embd must be a multiple of n_head, got n_embd={config.n_embd}, n_head={config.n_head}")
        self.config = config
        self.checkpointing = False # see through; set by whoever trains
        self.compiled = None # the decoding step, see compile_decoding
        self.wte = nn.Embedding(config.vocab_rows, config.n_embd) # also the output projection
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        # the reward model's normalisation needs the final bias, see normalise_rewards, and so does a critic made of it
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias or config.reward_head or config.value_head)
        self.value_head = nn.Linear(config.n_embd, 1) if config.value_head else None
        self.reward_head = nn.Linear(config.n_embd, 1, bias=False) if config.reward_head else None
        self.apply(self._init_weights)
        nn.init.zeros_(self.wte.weight[config.vocab_size:]) # and so they stay: no loss sees them
        for name, p in self.named_parameters(): # 2 * n_layer residual branches add up: keep their sum's variance at 1
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
        if self.reward_head is not None: # Stiennon et al. 2020, appendix B.1
            nn.init.normal_(self.reward_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def embed(self, idx, positions, cache=None, mask=None, keep=None):
        """
        The last layer's output (B, T, C) for tokens idx (B, T) at positions (T,) or (B, T). Each looks at itself and
        what stands before it, at what the cache holds, or, with a mask (B, 1, T, T), where that is True. With keep (N,)
        the output (N, C) at these places alone: the others' work in the last layer, which nobody reads, is left out.
        """
        x = self.wte(idx) + self.wpe(positions) # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        *blocks, last = self.h
        for block in blocks:
            x = self.through(block, x, cache, mask)
        return self.ln_f(self.through(last, x, cache, mask, keep))

    def through(self, block, *args):
        """A block's output. With checkpointing its activations are worked out again in the backward pass, not kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def hidden(self, idx, cache=None, keep=None):
        """The last layer's output, (B, T) tokens -> (B, T, C), or (N, C) at the places keep (N,)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's context of {self.config.block_size}")
        return self.embed(idx, torch.arange(T, device=idx.device), cache, keep=keep)

    def logits(self, x):
        """The projection of (…, C) onto the vocabulary, (…, V)."""
        logits = F.linear(x, self.wte.weight)
        return logits[..., :self.config.vocab_size] if self.config.pad_vocab else logits

    def forward(self, idx, targets=None):
        """
        idx: (B, T) tokens. targets: (B, T) next tokens, already shifted, -100 = ignored.
        Returns logits (B, T, V) and the mean cross-entropy () over counted targets, or None without targets.
        """
        logits = self.logits(self.hidden(idx)) # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def masked_logits(self, idx, mask):
        """
        Logits (N, V), float32, that predict the N tokens counted by mask (B, T-1), in row order.
        The projection onto the vocabulary is a third of GPT-2 small's work: it is done for these N positions only.
        """
        return self.logits(self.hidden(idx[:, :-1], keep=places(mask))).float()

    def logp(self, idx, mask):
        """Log-probabilities (B, T-1) of the tokens counted by mask (B, T-1), 0 elsewhere; idx: (B, T)."""
        return self.logp_and_entropy(idx, mask)[0]

    def logp_and_entropy(self, idx, mask, with_entropy=False):
        """logp as above, and the entropy in nats of the same distributions, (B, T-1), or None."""
        return self._token_stats(self.masked_logits(idx, mask), idx, mask, with_entropy)

    def masked_values(self, idx, mask):
        """V(s_t) (B, T-1) where mask (B, T-1) counts, 0 elsewhere; position t is the state before token t+1."""
        x = self.hidden(idx[:, :-1], keep=places(mask)) # (N, C)
        return torch.zeros_like(mask).masked_scatter(mask > 0, self.value_head(x).float())

    def logp_entropy_values(self, idx, mask, with_entropy=False):
        """For a policy that carries its critic, all three in one pass: logp, entropy and masked values."""
        x = self.hidden(idx[:, :-1], keep=places(mask)) # (N, C)
        values = torch.zeros_like(mask).masked_scatter(mask > 0, self.value_head(x).float()) # (B, T-1)
        return *self._token_stats(self.logits(x).float(), idx, mask, with_entropy), values

    def _token_stats(self, logits, idx, mask, with_entropy):
        counted = mask > 0
        picked = -F.cross_entropy(logits, idx[:, 1:][counted], reduction='none') # (N,)
        logp = torch.zeros_like(mask).masked_scatter(counted, picked) # (B, T-1)
        if not with_entropy:
            return logp, None
        log_q = logits.log_softmax(-1) # (N, V)
        return logp, torch.zeros_like(mask).masked_scatter(counted, -(log_q.exp() * log_q).sum(-1))

    def values(self, idx):
        """V(s_t), (B, T): the value head at position t has seen the tokens up to t, before token t+1 is chosen."""
        return self.value_head(self.hidden(idx)).squeeze(-1).float() # (B, T)

    def rewards(self, idx, lengths):
        """Scores (B,) of right-padded rows idx (B, T): the reward head on each row's last real token; lengths (B,)."""
        x = self.hidden(idx, keep=last_places(lengths, idx.size(1))) # (B, C)
        return self.reward_head(x).squeeze(-1).float() # (B,)

    def hidden_answers(self, batch, keep):
        """The last layer's output (N, C) at the places keep (N,) of prompts that are followed by several answers,
        tokens.Answers."""
        before = torch.ones(2 * batch.idx.shape[1:], dtype=torch.bool, device=batch.idx.device).tril() # (T, T)
        part = batch.parts # (B, T), 0 = prompt, 1 … K = the answers: they see the prompt and themselves
        mask = before & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])) # (B, T, T)
        return self.embed(batch.idx, batch.positions, mask=mask[:, None], keep=keep)

    def answer_logp(self, batch):
        """log pi(y|x) of the N answers in a batch of tokens.Answers, summed over tokens, EOS included: (N,)."""
        return self._answer_logp(self.hidden_answers(batch, batch.sources), batch)

    def answer_rewards(self, batch):
        """Scores (N,) of the answers in a batch of tokens.Answers, read off each answer's last token."""
        return self.reward_head(self.hidden_answers(batch, batch.last)).squeeze(-1).float()

    def answer_rewards_and_logp(self, batch):
        """Both of the above, (N,) each, in one pass."""
        x = self.hidden_answers(batch, torch.cat([batch.last, batch.sources])) # (N + M, C)
        n = len(batch.last)
        return self.reward_head(x[:n]).squeeze(-1).float(), self._answer_logp(x[n:], batch)

    def _answer_logp(self, x, batch):
        logits = self.logits(x).float() # (M, V)
        logp = -F.cross_entropy(logits, batch.targets, reduction='none') # (M,)
        return torch.zeros(len(batch.sizes), device=logp.device).index_add(0, batch.owners, logp)

    @torch.no_grad()
    def normalise_rewards(self, mean, std):
        """
        Make rewards() return (score - mean) / std from now on. The gain goes into the reward head. The shift goes into
        the final layer norm's bias along the head's direction w: w·(shift w / w·w) = shift. So the checkpoint needs
        no extra numbers, and other tools that open it compute the same scores.
        """
        w = self.reward_head.weight[0] # (C,)
        w /= std
        self.ln_f.bias -= (mean / std) * w / w.dot(w)

    # ------------------------------------------------------------------------------------------------------------
    # generation

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None):
        """
        Continue ragged prompts (lists of token ids, none empty) token by token. Yields per step: rows (n,) indices of
        the prompts that are still being continued, their new tokens (n,), and the log-probabilities (n,) under the
        distribution that was sampled from. A row ends with eos, which is yielded, or after max_new_tokens.
        temperature 0 takes the likeliest token. top_k=0 and top_p=1 leave the distribution as it is.
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
            cache.keep(same)
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
                if n <= 0.8 * len(alive) and not self.compiled: # moving the cache costs about a step: not at every end
                    cache.keep(alive.nonzero()[:, 0])
                    rows, tokens, alive = rows[alive], tokens[alive], alive[alive]
            if step + 1 < max_new_tokens:
                x = (self.compiled or self.decode)(tokens, cache.next(), cache) # (n, C)

    def decode(self, tokens, positions, cache):
        """The last layer's output (n, C) for one more token in each of the cache's rows; tokens, positions: (n,)."""
        return self.embed(tokens[:, None], positions[:, None], cache)[:, 0]

    def compile_decoding(self, **options):
        """
        Decode by a compiled step from now on. Its shapes do not change while answers grow: the cache has its last size
        from the start and rows that have ended stay in the batch. options: torch.compile's.
        """
        self.compiled = torch.compile(self.decode, dynamic=False, **options)

    def generate_with_logp(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None):
        """Responses (lists of token ids, eos kept) and the log-probabilities recorded while sampling them."""
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
        """Responses alone, as lists of token ids, eos kept; temperature 0 = greedy."""
        return self.generate_with_logp(prompts, max_new_tokens, temperature, top_k, top_p, eos)[0]

    # ------------------------------------------------------------------------------------------------------------
    # weights in and out

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        Read a GPT-2 in the Hugging Face layout: a folder, or a model on the hub ("gpt2", "OWNER/NAME"). `overrides`
        replace fields of GPTConfig: dropout, pad_vocab, or value_head=True / reward_head=True to add a fresh head. A
        value head added to a reward model starts as its reward head. Weights of any precision become float32. Whatever
        is wrong with the checkpoint is said in one line, exit code 2.
        """
        config, path, tensors = cls.open_pretrained(name)
        model = cls(dataclasses.replace(config, **overrides))
        if model.value_head is not None and not config.value_head and config.reward_head:
            tensors['value_head.weight'] = tensors['score.weight']
            tensors['value_head.bias'] = lambda: torch.zeros(1)
        model.load_tensors(path, tensors)
        model.was_reward_model = config.reward_head # what the checkpoint held, whatever the overrides made of it
        return model

    @staticmethod
    def open_pretrained(name):
        """
        A checkpoint's GPTConfig, the path of its weights, and {tensor's name: function that reads it}: nothing is read
        before it is wanted, so that a model and its file are never in memory together.
        """
        path = checkpoint_file(name, 'config.json')
        hf = read_json(path, "a checkpoint's configuration")
        hf.setdefault('n_positions', 1024)
        missing = [k for k in ('vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd')
                   if type(hf.get(k)) is not int or hf[k] < 1]
        if hf.get('model_type') != 'gpt2' or missing:
            fail(f"{path}: not a GPT-2 checkpoint (model_type {hf.get('model_type')!r}"
                 + (f", without {', '.join(missing)})" if missing else ')'))
        ours = dict(activation_function='gelu_new', layer_norm_epsilon=1e-5, scale_attn_weights=True,
                    scale_attn_by_inverse_layer_idx=False)
        for key, value in ours.items():
            if hf.get(key, value) != value:
                fail(f"{path}: a variant of GPT-2, {key} must be {value!r}, got {hf[key]!r}")
        path, tensors = open_weights(name)
        config = GPTConfig(
            block_size=hf['n_positions'], vocab_size=hf['vocab_size'], n_layer=hf['n_layer'],
            n_head=hf['n_head'], n_embd=hf['n_embd'], bias=hf.get('bias', True),
            value_head='value_head.weight' in tensors, reward_head='score.weight' in tensors)
        return config, path, tensors

    def load_tensors(self, path, tensors):
        """Fill the parameters from {name: function that reads it}, one by one; path: where they are, for errors."""
        fresh = {'value_head.weight', 'value_head.bias', 'score.weight'} # may be absent: then they stay as initialised
        if 'wte.weight' not in tensors and 'lm_head.weight' in tensors: # the same tensor: some tools keep this name
            tensors['wte.weight'] = tensors.pop('lm_head.weight')
        for name, p, transpose in self._hf_parameters():
            if name not in tensors:
                if name in fresh or (name == 'ln_f.bias' and not self.config.bias):
                    continue
                fail(f"{path}: tensor {name} is missing, not the weights of this config.json")
            t = tensors[name]()
            t = t.t() if transpose else t
            if t.shape != p.shape:
                fail(f"{path}: tensor {name} is {tuple(t.shape)}, config.json says {tuple(p.shape)}")
            p.copy_(t)
        if 'lm_head.weight' in tensors: # in most files it is left out: the embedding's own weights
            head, wte = tensors['lm_head.weight'](), self.wte.weight[:self.config.vocab_size]
            if not torch.equal(head.to(wte), wte):
                fail(f"{path}: tensor lm_head.weight differs from wte.weight; wanted the output projection tied to it")

    def _hf_parameters(self):
        """(name in the Hugging Face layout, the parameter's data, transposed there) of every parameter."""
        for name, p in self.named_parameters():
            # GPT-2 was released with linear weights as (in, out), torch keeps them as (out, in)
            transpose = name.startswith('h.') and name.endswith('weight') and p.dim() == 2
            data = p.detach()[:self.config.vocab_size] if name == 'wte.weight' else p.detach() # without the padding
            yield name.replace('reward_head', 'score'), data, transpose

    def save_pretrained(self, folder, eos=None):
        """
        Write config.json and model.safetensors: a GPT2LMHeadModel, or with a reward head a
        GPT2ForSequenceClassification with one label. A reward model's config.json names no pad token: GPT-2 has none,
        and a pad equal to the end-of-text token would move the score off the last real token. Other tools then score
        one row at a time. eos: the end-of-text id that config.json names; None: the vocabulary's last.
        """
        os.makedirs(folder, exist_ok=True)
        c, tensors = self.config, {}
        for name, p, transpose in self._hf_parameters():
            prefix = '' if name.startswith(('score', 'value_head')) else 'transformer.'
            tensors[prefix + name] = p.t() if transpose else p
        if not c.bias: # the layout has biases everywhere: zeros say the same
            for name, p in self.named_parameters():
                if name.startswith(('h.', 'ln_f')) and name.endswith('weight'):
                    tensors.setdefault('transformer.' + name.removesuffix('weight') + 'bias', torch.zeros(p.size(0)))
        write_safetensors(os.path.join(folder, 'model.safetensors'), tensors)
        eos = c.vocab_size - 1 if eos is None else eos
        hf = dict(
            architectures=['GPT2ForSequenceClassification' if c.reward_head else 'GPT2LMHeadModel'], model_type='gpt2',
            vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, activation_function='gelu_new', layer_norm_epsilon=1e-5, resid_pdrop=c.dropout,
            embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=True, bias=c.bias,
            bos_token_id=eos, eos_token_id=eos)
        if c.reward_head:
            hf.update(id2label={'0': 'reward'}, label2id={'reward': 0}, pad_token_id=None)
        with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
            json.dump(hf, f, indent=2)


def open_weights(name):
    """
    The path of a checkpoint's weights and {tensor's name, less 'transformer.': function that reads it}. Weights are one
    file, or shards behind an index; safetensors before torch's own format, of which only plain tensors are read.
    """
    wanted = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
    for filename in wanted:
        path = checkpoint_file(name, filename, absent_ok=True)
        if path:
            break
    else:
        checkpoint_file(name, 'model.safetensors') # says what is missing
    paths = [path]
    if filename.endswith('.index.json'):
        files = read_json(path, "a checkpoint's index").get('weight_map') # tensor's name: file
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            fail(f"{path}: wanted `weight_map`, the file of every tensor")
        paths = [checkpoint_file(name, file) for file in sorted(set(files.values()))]
    tensors = {}
    for file in paths:
        try:
            if file.endswith('.bin'):
                weights = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
                found = {k: partial(weights.get, k) for k, t in weights.items() if isinstance(t, torch.Tensor)}
            else:
                weights = safe_open(file, 'pt', backend='pread') # mapped, the file would stay in memory as it is read
                found = {k: partial(weights.get_tensor, k) for k in weights.keys()}
        except Exception as e: # a damaged file, or one that would run code, makes torch.load raise nearly anything
            fail(f"{file}: not a readable file of plain tensors ({type(e).__name__}: {' '.join(str(e).split())[:200]})")
        tensors.update((k.removeprefix('transformer.'), read) for k, read in found.items())
    return path, tensors


def write_safetensors(path, tensors):
    """
    Write {name: tensor} in the safetensors format: the header's length in 8 bytes, the header in JSON, the tensors'
    bytes in float32. The library wants every tensor contiguous at once, which for the transposed ones means a second
    copy of the model; written in turn, they are copied one by one.
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        start, end = end, end + 4 * t.numel()
        header[name] = dict(dtype='F32', shape=list(t.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8) # tensors begin at a multiple of 8 bytes
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        for t in tensors.values():
            f.write(t.float().cpu().contiguous().numpy())


def load_policy(folder, option='policy', **overrides):
    """from_pretrained for a language model; a reward model is refused, naming the option that gave it."""
    model = GPT.from_pretrained(folder, **dict(value_head=False) | overrides) # PPO's critic may have stayed in it
    if model.was_reward_model:
        fail(f"--{option}={folder}: is a reward model, wanted a language model")
    return model


def load_reward_model(folder, option='reward_model', **overrides):
    """from_pretrained for a reward model; a language model is refused, naming the option that gave it."""
    model = GPT.from_pretrained(folder, **overrides)
    if not model.was_reward_model:
        fail(f"--{option}={folder}: is a language model, wanted a reward model (made by reward.py)")
    return model


def token_logp(logits, idx):
    """
    Log-probabilities that logits (B, T, V) give to the tokens idx (B, T): (B, T-1).
    Position t speaks of token t+1. This is the one place where the shift is made for whole logits.
    """
    logp = logits[:, :-1].float().log_softmax(-1) # (B, T-1, V)
    return logp.gather(-1, idx[:, 1:, None]).squeeze(-1) # (B, T-1)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0):
    """One token (B,) per row of logits (B, V) and its log-probability (B,) under the distribution sampled from."""
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
    # inverse transform sampling, one random number per row: torch.multinomial draws one per row and word, which at
    # V = 50257 takes 15 times as long. In float64, so that no word of probability 0 is ever hit by rounding; Apple's
    # GPUs have none, and leave this part to the CPU
    p = logp.exp() # (B, V)
    cdf = (p.cpu() if p.device.type == 'mps' else p).cumsum(-1, dtype=torch.float64) # (B, V)
    u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device) * cdf[:, -1:] # (B, 1)
    tokens = torch.searchsorted(cdf, u, right=True) # (B, 1), the first word whose cdf exceeds u
    tokens = tokens.clamp(max=logits.size(-1) - 1).to(logp.device) # NaN exceeds nothing: noticed in the loss
    return tokens[:, 0], logp.gather(-1, tokens)[:, 0]
