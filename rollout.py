"""
What the reinforcement learning scripts share: sampling answers, scoring them, log-probabilities of frozen models, the
masked statistics, and the KL estimators.

All per-token arrays are (B, T-1) and follow the convention that position t speaks of token t+1.
"""

from dataclasses import dataclass

import common
from common import fail

import torch
from tokens import pad

# ----------------------------------------------------------------------------------------------------------------
# masked statistics

def masked_mean(x, mask):
    """Mean () of x over the positions that mask counts; both (B, T-1). 0 where nothing is counted."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x, mask):
    """x with mean 0 and variance 1 over the positions that mask counts, 0 elsewhere; both (B, T-1)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def kl_k1(logp, ref_logp):
    """
    One-sample estimate of KL(policy || reference) at each token sampled from the policy: unbiased, may be negative.
    Schulman 2020, http://joschu.net/blog/kl-approx.html: k1 = log(p / q).
    """
    return logp - ref_logp


def kl_k3(logp, ref_logp):
    """As kl_k1, but never negative and of less variance: k3 = q/p - 1 - log(q/p)."""
    log_ratio = ref_logp - logp # log(q / p)
    return log_ratio.exp() - 1 - log_ratio

# ----------------------------------------------------------------------------------------------------------------
# sampling

@dataclass
class Rollouts:
    """Answers sampled by a policy, right-padded, prompts in front."""
    idx: torch.Tensor # (B, T) prompt, answer, padding
    mask: torch.Tensor # (B, T-1) 1 where token t+1 belongs to the answer, its EOS included
    logp: torch.Tensor # (B, T-1) recorded while sampling, 0 outside the mask
    prompt_lengths: torch.Tensor # (B,)
    lengths: torch.Tensor # (B,) prompt and answer
    ended: torch.Tensor # (B,) 1 where the answer ends with EOS

    def to(self, device):
        return Rollouts(*(x.to(device) for x in vars(self).values()))


def sample_answers(model, prompts, tok, max_new_tokens, temperature=1.0, rows=256, progress=None):
    """
    One answer per prompt (lists of ids; repeat a prompt for several answers). Returns answers and the recorded
    log-probabilities, as lists in the order of the prompts. Prompts of like length share a batch of `rows`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, logps = [None] * len(prompts), [None] * len(prompts)
    bar = common.progress(total=len(prompts), desc=progress, unit="answers", disable=progress is None)
    for start in range(0, len(order), rows):
        chunk = order[start:start + rows]
        out = model.generate_with_logp([prompts[i] for i in chunk], max_new_tokens, temperature, eos=tok.eos)
        for i, answer, logp in zip(chunk, *out):
            answers[i], logps[i] = answer, logp
        bar.update(len(chunk))
    bar.close()
    return answers, logps


def pack(prompts, answers, logps, eos):
    """Lists of prompts, answers and recorded log-probabilities to padded tensors: Rollouts."""
    idx = pad([p + a for p, a in zip(prompts, answers)]) # (B, T)
    P = torch.tensor([len(p) for p in prompts]) # (B,)
    lengths = P + torch.tensor([len(a) for a in answers]) # (B,)
    t = torch.arange(1, idx.size(1)) # token t+1 of position t, (T-1,)
    mask = ((t >= P[:, None]) & (t < lengths[:, None])).float() # (B, T-1), from lengths and never from token ids
    logp = torch.zeros_like(mask)
    logp[mask > 0] = torch.tensor([x for row in logps for x in row])
    ended = torch.tensor([float(a[-1] == eos) for a in answers]) # (B,)
    return Rollouts(idx, mask, logp, P, lengths, ended)

# ----------------------------------------------------------------------------------------------------------------
# frozen models

def in_chunks(fn, lengths, rows, out):
    """
    Fill out (B, ...) by fn(chunk, T) over chunks of rows of like length: chunk holds row indices, T is the longest row
    among them, so that no work is spent on padding that a shorter chunk does not need.
    """
    for chunk in lengths.argsort().split(rows):
        T = int(lengths[chunk].max())
        value = fn(chunk, T)
        if value.dim() == 1:
            out[chunk] = value
        else:
            out[chunk, :value.size(1)] = value
    return out


@torch.no_grad()
def frozen_logp(model, idx, mask, lengths, rows=64):
    """Log-probabilities (B, T-1) of the counted tokens under a frozen model; idx (B, T), lengths (B,)."""
    return in_chunks(lambda c, T: model.logp(idx[c, :T], mask[c, :T - 1]), lengths, rows, torch.zeros_like(mask))


@torch.no_grad()
def frozen_values(model, idx, mask, lengths, rows=64):
    """Values (B, T-1) of a critic, 0 where mask is 0."""
    fn = lambda c, T: model.masked_values(idx[c, :T], mask[c, :T - 1])
    return in_chunks(fn, lengths, rows, torch.zeros_like(mask))


@torch.no_grad()
def frozen_rewards(model, idx, lengths, rows=64):
    """Scores (B,) of a reward model."""
    out = torch.zeros(len(idx), device=idx.device)
    return in_chunks(lambda c, T: model.rewards(idx[c, :T], lengths[c]), lengths, rows, out)


@torch.no_grad()
def score_answers(reward_model, prompts, answers, device, rows=64):
    """Scores (B,) of answers to prompts, both lists of ids."""
    idx = pad([p + a for p, a in zip(prompts, answers)]).to(device)
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)], device=device)
    return frozen_rewards(reward_model, idx, lengths, rows)

# ----------------------------------------------------------------------------------------------------------------
# measuring

def gold_scores(questions, answers, tok):
    """The toy world's gold scores, a list, of answers (lists of ids) to the prompts of its records."""
    from data.toy import world
    return [world.gold(q, tok.decode(a).removeprefix(' ')) for q, a in zip(questions, answers)]


def pair_agreement(scores, ranks):
    """
    How often scores (K,) order the pairs of one prompt as ranks (K,) do (0 = best): returns (points, pairs), counting
    pairs of different rank; equal scores are half a point.
    """
    points = pairs = 0
    for i in range(len(ranks)):
        for j in range(len(ranks)):
            if ranks[i] < ranks[j]:
                pairs += 1
                points += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return points, pairs


def check_same_vocabulary(model, other, option, folder):
    """Two models that read each other's tokens need one vocabulary; stops with one line otherwise."""
    a, b = model.config.vocab_size, other.config.vocab_size
    if a != b:
        fail(f"--{option}={folder}: its vocabulary has {b} tokens, the policy's has {a}; wanted the same tokenizer")
