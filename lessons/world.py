"""Describe a world so small that all of its answers can be listed.

A model writes at most three tokens out of six: five words and the end of text, ".". That makes 156 answers. So what
training can only estimate from samples (an expected reward, a gradient, a KL) is computed exactly here.
"""
from itertools import product
from types import SimpleNamespace

from common.rollout import pack
from common.run import Run
from model import GPT, GPTConfig

import torch

torch.set_num_threads(1) # faster for models of this size
RUN = Run('cpu', 'float32') # what the stages' functions want to know of the machine
WORDS, EOS, LONGEST = ['good', 'bad', 'very', 'not', 'um', '.'], 5, 3
PROMPT = [EOS] # the only one
TOK = SimpleNamespace(eos=EOS, n_vocab=len(WORDS), decode=lambda ids: ' '.join(WORDS[i] for i in ids))
ANSWERS = [[*words, end] for n in range(LONGEST) for words in product(range(EOS), repeat=n)
           for end in range(EOS + 1) if end == EOS or n == LONGEST - 1] # the last word of three need not be "."
ALL = pack([PROMPT] * len(ANSWERS), ANSWERS, [[0.0] * len(a) for a in ANSWERS], EOS) # idx (156, 4), mask (156, 3), …
NUMBER = {tuple(answer): i for i, answer in enumerate(ANSWERS)} # of an answer in all arrays (156,)

def reward(answer):
    """Score an answer: good 1, bad -1; "very" doubles the next one, "not" flips it; -1 if it does not end."""
    total, factor = -float(answer[-1] != EOS), 1
    for word in TOK.decode(answer).split():
        total += factor * {'good': 1, 'bad': -1}.get(word, 0)
        factor = 1 if word in ('good', 'bad') else factor * {'very': 2, 'not': -1}.get(word, 1)
    return total

REWARDS = torch.tensor([reward(answer) for answer in ANSWERS]) # (156,)

class TrueReward(torch.nn.Module):
    """Give this reward in the place of a reward model."""

    def rewards(self, idx, lengths, groups=None):
        return torch.tensor([reward(row[1:n]) for row, n in zip(idx.tolist(), lengths.tolist())])

def new_policy(seed, noise=0.2, **more):
    """Return a small GPT that likes some answers better than others; more: fields of its configuration."""
    torch.manual_seed(seed)
    policy = GPT(GPTConfig(**dict(block_size=4, vocab_size=6, n_layer=1, n_head=2, n_embd=16) | more))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(noise * torch.randn(p.shape))
    return policy

def log_pi(policy):
    """Return log pi of all answers (156,), with its gradient."""
    return policy.logp(ALL.idx, ALL.mask).sum(1)

def expected(logp, values=REWARDS):
    """Return the exact expectation () of values (156,) under log pi (156,)."""
    return (logp.exp() * values).sum()

def kl(logp, other):
    """Return the exact KL(pi || other) () of two log pi (156,)."""
    return expected(logp, logp - other)

def optimum(ref_logp, beta):
    """Return log pi* (156,), where reward - beta KL is best: pi* = pi_ref e^(r / beta), normalised."""
    return (ref_logp + REWARDS / beta).log_softmax(0)

def by_value(logp, values=REWARDS):
    """Return the probability (L,) of each different value, lowest first; both (156,)."""
    levels, level = values.unique(return_inverse=True)
    return torch.zeros(len(levels), dtype=torch.double).index_add(0, level, logp.exp().double())

def best_of(n, logp, values=REWARDS):
    """Return log pi (156,) of the best of n samples; logp, values: (156,)."""
    mass = by_value(logp, values) # (L,)
    below = torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()]) # (L + 1,)
    wins = below[1:]**n - below[:-1]**n # (L,) the largest of n is this one
    return (wins / mass).log().clamp(min=-1e4)[values.unique(return_inverse=True)[1]].float() + logp # e^-1e4: never

def compare(n, logp, values=REWARDS):
    """Draw n pairs from log pi (156,) and ask a Bradley-Terry person: the numbers of winners and losers, (n,) each."""
    a, b = torch.multinomial(logp.exp(), 2 * n, replacement=True).view(2, n)
    first = torch.rand(n) < torch.sigmoid(values[a] - values[b])
    return torch.where(first, a, b), torch.where(first, b, a)

def root(f, low, high):
    """Return where f, which falls between low and high, is 0: halve the interval that holds this place."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return middle

def descend(parameters, loss_of, steps, lr):
    """Make steps of Adam on loss_of()."""
    optimizer = torch.optim.Adam(parameters, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
