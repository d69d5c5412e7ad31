"""
What the reinforcement learning scripts share: sampling answers, scoring them, log-probabilities of frozen models, the
masked statistics, the KL estimators, and the clipped surrogate over micro-batches.

All per-token arrays are (B, T-1) and follow the convention that position t speaks of token t+1.
"""

from dataclasses import dataclass

import common
from common import fail

import torch

from model import load_policy, load_reward_model
from tokens import encode_rankings, load_tokenizer, pad

# ----------------------------------------------------------------------------------------------------------------
# masked statistics

def masked_mean(x, mask, run=None):
    """
    Mean () of x over the positions that mask counts; both (B, T-1). 0 where nothing is counted. With a Run the mean
    over all processes, through which no gradient flows.
    """
    total, n = (x * mask).sum(), mask.sum()
    if run is not None:
        total, n = run.sum(total), run.sum(n)
    return total / n.clamp(min=1)


def whiten(x, mask, run=None):
    """
    x with mean 0 and variance 1 over the positions that mask counts, 0 elsewhere; both (B, T-1). With a Run mean and
    variance are those of all processes together.
    """
    mean = masked_mean(x, mask, run)
    variance = masked_mean((x - mean) ** 2, mask, run)
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


def policy_loss(logp, old_logp, advantages, mask, clip):
    """
    Clipped surrogate, Schulman et al. 2017, equation 7, negated: the mean () over counted tokens of
    -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) with ratio = pi / pi_old. All (B, T). At ratio 1 its gradient is
    that of -A log pi: plain REINFORCE (Williams 1992).
    """
    ratio = ((logp - old_logp) * mask).exp() # (B, T), 1 outside the mask
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(unclipped, clipped), mask)


@torch.no_grad()
def ratio_stats(logp, old_logp, mask, clip):
    """What is logged of ratio = pi / pi_old: its largest distance from 1, (), and means over the mask; all (B, T)."""
    ratio = ((logp - old_logp) * mask).exp() # (B, T)
    return (ratio - 1).abs().max(), dict(
        ratio=masked_mean(ratio, mask), clipfrac=masked_mean(((ratio - 1).abs() > clip).float(), mask),
        approx_kl=masked_mean(kl_k3(old_logp, logp), mask)) # KL(old || new) per token


def micro_batches(batch, lengths, rows, grad_accum, run):
    """
    The rows of an optimizer step in grad_accum parts of about the same number of tokens. batch: idx (N, T) and arrays
    (N, T-1) with one called mask; lengths (N,). Yields each part's tensors, and its share () of the counted tokens of
    all processes: with it as its weight every answer token counts the same.
    """
    n_tokens = run.sum(batch['mask'][rows].sum()) # ()
    for part in common.split_by_tokens(rows.tolist(), lengths[rows].tolist(), grad_accum):
        micro = torch.tensor(part, device=rows.device)
        T = int(lengths[micro].max()) # no work on padding that these rows do not need
        part = {k: v[micro, :T if k == 'idx' else T - 1] for k, v in batch.items()}
        yield part, part['mask'].sum() / n_tokens

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


def score_records(reward_model, tok, records, block_size, name, device):
    """-> [(number of the record, scores of its `responses`)] of the records that fit the context."""
    numbered = [r | {'ranks': i} for i, r in enumerate(records)] # the encoder hands the number through
    rows = encode_rankings(tok, numbered, block_size, name)
    scores = iter(score_answers(reward_model, [p for p, answers, _ in rows for _ in answers],
                                [a for _, answers, _ in rows for a in answers], device).tolist())
    return [(i, [next(scores) for _ in answers]) for _, answers, i in rows]

# ----------------------------------------------------------------------------------------------------------------
# rolling out

def load_actors(cfg, run, tok, pad_vocab=False, **overrides):
    """Policy (with overrides of its configuration), reward model and reference (the policy as it is now, frozen)."""
    policy = load_policy(cfg.policy, pad_vocab=pad_vocab, **overrides).to(run.device)
    reward = load_reward_model(cfg.reward_model).to(run.device)
    check_same_vocabulary(policy, reward, 'reward_model', cfg.reward_model, tok)
    check_context(policy, reward, 'reward_model', cfg.reward_model)
    reference = load_policy(cfg.policy, pad_vocab=pad_vocab).to(run.device)
    return policy, run.freeze(reward), run.freeze(reference)


def sample_and_score(policy, reward_model, reference, prompts, questions, tok, cfg, run):
    """
    An answer to each of the prompts (lists of ids), whose records' prompts the questions are. Returns Rollouts, the
    reference's log-probabilities (B, T-1), the scores (B,) less what it costs not to end, and what is logged, () each.
    """
    with run.autocast():
        answers, logps = sample_answers(run.whole(policy), prompts, tok, cfg.max_new_tokens) # recording log pi_old
    rolls = pack(prompts, answers, logps, tok.eos).to(run.device)
    mask = rolls.mask # (B, T-1)
    with run.autocast():
        ref_logp = frozen_logp(reference, rolls.idx, mask, rolls.lengths, cfg.batch_size // cfg.grad_accum) # (B, T-1)
        reward = frozen_rewards(reward_model, rolls.idx, rolls.lengths) # (B,)
    scores = reward - cfg.missing_eos_penalty * (1 - rolls.ended) # (B,)
    measured = dict(
        reward=reward.mean(), score=scores.mean(),
        kl=(kl_k1(rolls.logp, ref_logp) * mask).sum(1).mean(), # nats per answer
        kl_k3=(kl_k3(rolls.logp, ref_logp) * mask).sum(1).mean(),
        entropy=-masked_mean(rolls.logp, mask, run), # nats per token, estimated by the sampled tokens themselves
        ended=rolls.ended.mean(), length=mask.sum(1).mean())
    if cfg.gold:
        measured['gold'] = torch.tensor(gold_scores(questions, answers, tok)).mean()
    return rolls, ref_logp, scores, measured

# ----------------------------------------------------------------------------------------------------------------
# measuring

def check_gold(records, path):
    """The toy world's gold score knows its own prompts alone; stops with one line at any other."""
    from data.toy import world
    for n, record in enumerate(records, 1):
        try:
            world.read(record['prompt'])
        except ValueError as e:
            fail(f"{path}: prompt {n}: {e}; there is no gold score for it")


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


def check_same_vocabulary(model, other, option, folder, tok):
    """
    Two models that read each other's tokens need one vocabulary and one tokenizer; stops with one line otherwise. tok:
    the first one's; folder: the other one.
    """
    a, b = model.config.vocab_size, other.config.vocab_size
    if a != b:
        fail(f"--{option}={folder}: its vocabulary has {b} tokens, the policy's has {a}; wanted the same tokenizer")
    theirs = load_tokenizer(folder)
    if (theirs.name, theirs.ranks) != (tok.name, tok.ranks):
        fail(f"--{option}={folder}: has a tokenizer of its own; wanted the one of the policy")


def check_context(model, other, option, folder, whose="policy's"):
    """A model that reads whole rows of another one needs a context as long; stops with one line otherwise."""
    if other.config.block_size < model.config.block_size:
        fail(f"--{option}={folder}: its context is {other.config.block_size} tokens, the {whose} "
             f"{model.config.block_size}; wanted one at least as long")
