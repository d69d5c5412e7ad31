"""Sample answers, for the reinforcement learning scripts; frozen models, masked statistics, KL estimators.

The losses are in ppo.py and reinforce.py. Per-token arrays are (B, T-1): position t describes token t+1.
"""

import itertools
from dataclasses import dataclass, replace

import torch

from common.batches import by_length, collate_answers, pad, split_by_tokens
from common.options import fail
from common.run import progress
from common.tokens import as_messages, load_tokenizer, user_ids

# ---- masked statistics ------------------------------------------------------------------------------------------

def masked_mean(x, mask, run=None):
    """Return the mean () of x over the positions that mask counts; both (B, T-1).

    It is 0 where nothing is counted. With a Run it is the mean over all processes, and no gradient flows through it.
    """
    total, n = (x * mask).sum(), mask.sum()
    if run is not None:
        total, n = run.sum(total), run.sum(n)
    return total / n.clamp(min=1)

def whiten(x, mask, run=None):
    """Return (x - mean) / sqrt(variance) of x (B, T-1) under the mask, 0 elsewhere; with a Run, of all processes."""
    mean = masked_mean(x, mask, run)
    variance = masked_mean((x - mean) ** 2, mask, run)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

def kl_k1(logp, ref_logp):
    """Estimate KL(policy || reference) per token, without bias (Schulman 2020, http://joschu.net/blog/kl-approx.html).

        k1 = log(p / q)          p = policy, q = reference

    It may be negative. Both (B, T-1), at tokens sampled from the policy.
    """
    return logp - ref_logp

def kl_k3(logp, ref_logp):
    """Estimate the same without bias, never negative, with less variance (Schulman 2020).

        k3 = q/p - 1 - log(q/p)
    """
    log_ratio = ref_logp - logp # log(q / p)
    return log_ratio.exp() - 1 - log_ratio

@torch.no_grad()
def ratio_stats(logp, old_logp, mask, clip):
    """Return the largest |pi / pi_old - 1| () and masked means for the log; all (B, T-1)."""
    ratio = ((logp - old_logp) * mask).exp() # (B, T-1)
    return (ratio - 1).abs().max(), dict(
        ratio=masked_mean(ratio, mask), clipfrac=masked_mean(((ratio - 1).abs() > clip).float(), mask),
        approx_kl=masked_mean(kl_k3(old_logp, logp), mask)) # KL(old || new) per token

def rows_of(prompts, K):
    """Return the rows (n * K,) of the answers to prompts (n,): K neighbours each."""
    return (K * prompts[:, None] + torch.arange(K, device=prompts.device)).flatten()

def minibatches(n, cfg):
    """Yield each optimizer step's row numbers: cfg.epochs passes over n answers, shuffled by prompt."""
    for _ in range(cfg.epochs):
        for prompts in torch.randperm(n // cfg.n_answers).chunk(cfg.minibatches):
            yield rows_of(prompts, cfg.n_answers)

def micro_batches(batch, lengths, rows, cfg, run):
    """Yield an optimizer step's rows in cfg.grad_accum parts of about equal tokens.

    batch: idx (N, T) and arrays (N, T-1) with one called mask; lengths (N,). Answers to one prompt stay together, in
    `groups` of a part, as long as there are as many prompts as parts. Each part comes with its share () of the counted
    tokens of all processes. Weighted by it, every answer token counts the same.
    """
    K = cfg.n_answers if len(rows) >= cfg.n_answers * cfg.grad_accum else 1
    n_tokens, by_prompt = run.sum(batch['mask'][rows].sum()), rows.view(-1, K) # (), (n, K)
    for part in split_by_tokens(range(len(by_prompt)), lengths[by_prompt].sum(1).tolist(), cfg.grad_accum):
        micro = by_prompt[part].flatten()
        T = int(lengths[micro].max()) # no work on padding that these rows do not need
        arrays = {k: v[micro, :T if k == 'idx' else T - 1] for k, v in batch.items()}
        yield arrays | dict(groups=torch.full_like(by_prompt[part, 0], K)), arrays['mask'].sum() / n_tokens

# ---- sampling ---------------------------------------------------------------------------------------------------

@dataclass
class Rollouts:
    """Hold answers sampled by a policy, or dialogues, right-padded, prompts in front."""
    idx: torch.Tensor # (B, T) prompt, answer, padding; in a dialogue what a user says and further answers
    mask: torch.Tensor # (B, T-1) 1 where token t+1 belongs to an answer, its EOS included
    logp: torch.Tensor # (B, T-1) recorded while sampling, 0 outside the mask
    lengths: torch.Tensor # (B,) up to the end of the last answer
    ended: torch.Tensor # (B,) 1 where the last answer ends with EOS
    ends: list # (B) lists: the length up to the end of each answer
    asked: list # (B) lists: of each answer its record, as a reward function takes it, and its text
    K: int = 1 # neighbouring rows with the same prompt

    def to(self, device):
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)})

def sample_answers(model, prompts, tok, max_new_tokens, temperature=1.0, rows=256, desc=None):
    """Sample one answer per prompt (lists of ids; repeat a prompt for several answers).

    Returns answers and their log-probabilities as lists. Prompts of like length share a batch of `rows`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, logps = [None] * len(prompts), [None] * len(prompts)
    bar = progress(total=len(prompts), desc=desc, unit='answers', disable=desc is None)
    for start in range(0, len(order), rows):
        chunk = order[start:start + rows]
        out = model.generate_with_logp([prompts[i] for i in chunk], max_new_tokens, temperature, eos=tok.eos)
        for i, answer, logp in zip(chunk, *out):
            answers[i], logps[i] = answer, logp
        bar.update(len(chunk))
    bar.close()
    return answers, logps

def pack_turns(rows, eos, asked=()):
    """Stack rows as Rollouts; a row is a list of (ids, their recorded log-probabilities; None of others' words)."""
    flags = [[int(logp is not None) for ids, logp in row for _ in ids] for row in rows] # 1 = of an answer
    ends = [[at for at, (_, logp) in zip(itertools.accumulate(len(ids) for ids, _ in row), row) if logp is not None]
            for row in rows]
    mask = pad(flags)[:, 1:].float() # (B, T-1), from lengths and never from token ids
    logp = torch.zeros_like(mask)
    logp[mask > 0] = torch.tensor([x for row in rows for _, logps in row for x in logps or ()])
    idx = pad([[i for ids, _ in row for i in ids] for row in rows]) # (B, T)
    ended = torch.tensor([float(row[-1][0][-1] == eos) for row in rows]) # (B,)
    return Rollouts(idx, mask, logp, torch.tensor([at[-1] for at in ends]), ended, ends, list(asked))

def pack(prompts, answers, logps, eos):
    """Stack prompts with an answer each as Rollouts; lists of ids and log-probabilities."""
    return pack_turns([[(p, None), (a, logp)] for p, a, logp in zip(prompts, answers, logps)], eos)

def sample_rollouts(model, prompts, records, tok, cfg, user=None):
    """Sample Rollouts: cfg.n_answers answers to each prompt, or with a user as many dialogues.

    prompts: lists of ids, of these records. user(record, messages) returns what the user says next. A dialogue ends
    with None, after cfg.max_turns answers or one that did not end, and where the context has no room for another.
    """
    prompts, records = ([x for x in each for _ in range(cfg.n_answers)] for each in (prompts, records)) # K of each
    rows, asked = [[(ids, None)] for ids in prompts], [[] for _ in prompts]
    records = [r | dict(prompt=as_messages(r['prompt'])) for r in records] if user else list(records)

    def goes_on(b):
        messages = [*records[b]['prompt'], dict(role='assistant', content=asked[b][-1][1])]
        if len(asked[b]) == cfg.max_turns or rows[b][-1][0][-1] != tok.eos:
            return False
        said = user(records[b], messages)
        ids = [] if said is None else user_ids(tok, said)
        if not ids or sum(len(ids) for ids, _ in rows[b]) + len(ids) + cfg.max_new_tokens > model.config.block_size:
            return False
        rows[b].append((ids, None))
        records[b] = records[b] | dict(prompt=[*messages, dict(role='user', content=said)])
        return True

    going = list(range(len(prompts))) # the rows that wait for an answer
    while going:
        so_far = [[i for ids, _ in rows[b] for i in ids] for b in going]
        for b, answer, logp in zip(going, *sample_answers(model, so_far, tok, cfg.max_new_tokens)):
            rows[b].append((answer, logp))
            asked[b].append((records[b], tok.decode(answer).removeprefix(' ')))
        going = [b for b in going if user and goes_on(b)]
    return replace(pack_turns(rows, tok.eos, asked), K=cfg.n_answers)

# ---- frozen models ----------------------------------------------------------------------------------------------

@torch.no_grad()
def in_chunks(fn, lengths, rows, out, K=1):
    """Fill out (B, ...) by fn(rows, longest, groups), on rows of like length; K neighbours have one prompt."""
    for prompts in lengths.view(-1, K).amax(1).argsort().split(max(1, rows // K)):
        chunk = rows_of(prompts, K)
        value = fn(chunk, int(lengths[chunk].max()), torch.full_like(prompts, K))
        out[(chunk, slice(value.size(1))) if value.dim() > 1 else chunk] = value
    return out

def frozen(method, idx, mask, lengths, rows=64, K=1):
    """Return a model's logp or values (B, T-1), no gradient, `rows` at a time; idx (B, T), lengths (B,)."""
    fn = lambda c, T, groups: method(idx[c, :T], mask[c, :T - 1], groups)
    return in_chunks(fn, lengths, rows, torch.zeros_like(mask), K)

def frozen_rewards(model, idx, lengths, rows=64, K=1):
    """Return the scores (B,) of a reward model."""
    fn = lambda c, T, groups: model.rewards(idx[c, :T], lengths[c], groups)
    return in_chunks(fn, lengths, rows, torch.zeros(len(idx), device=idx.device), K)

def packed(model, rows, run):
    """Return Rows as Answers and log pi(y|x) (N,) of each."""
    answers = collate_answers(rows).to(run.device)
    with run.autocast():
        return answers, model.logp(answers.idx, answers.mask, answers.groups).sum(1)

@torch.no_grad()
def score_packed(model, rows, run):
    """Return a reward model's scores (N,) of all answers of Rows."""
    answers = collate_answers(rows).to(run.device)
    with run.autocast():
        return model.rewards(answers.idx, answers.lengths, answers.groups)

@torch.no_grad()
def answer_logp(model, rows, cfg, run, desc=None):
    """Return log pi(y|x) of the answers of Rows: a (K,) per row, on the CPU.

    Each process takes its share of the rows, of like length in a pass. desc: of a bar, for long work before training.
    """
    mine, parts = {}, run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum))
    for part in progress(parts, desc=desc, disable=not (desc and run.is_master)):
        _, logp = packed(model, [rows[i] for i in part], run) # (N,)
        if desc and run.interrupted and run.world_size == 1:
            raise KeyboardInterrupt(run.interrupted) # nothing to save yet
        mine |= zip(part, logp.cpu().split([len(rows[i].answers) for i in part]))
    return [logp for _, logp in sorted(run.merge(mine).items())]

# ---- measuring --------------------------------------------------------------------------------------------------

def describe(rolls, ref_logp, reward, scores, run):
    """Return metrics of rollouts, () each. ref_logp: (B, T-1). reward, scores: (B,) before and after penalties."""
    return dict(
        reward=reward.mean(), score=scores.mean(),
        kl=(kl_k1(rolls.logp, ref_logp) * rolls.mask).sum(1).mean(), # nats per answer
        kl_k3=(kl_k3(rolls.logp, ref_logp) * rolls.mask).sum(1).mean(),
        entropy=-masked_mean(rolls.logp, rolls.mask, run), # nats per token, estimated from the sampled tokens
        ended=rolls.ended.mean(), length=rolls.mask.sum(1).mean())

def describe_critic(values, returns, mask, run):
    """Return metrics of a critic, () each: how well values (B, T-1) predict returns (B, T-1)."""
    mean = lambda x: masked_mean(x, mask, run)
    variance = lambda x: mean((x - mean(x)) ** 2)
    spread = variance(returns) # returns that do not differ leave nothing to explain
    explained = dict(explained_variance=1 - variance(returns - values) / spread) if spread > 1e-8 else {}
    return dict(values=mean(values), returns=mean(returns), returns_std=spread.sqrt()) | explained

def beats(a, b):
    """Return 1 where a is above b, 0 where below, 1/2 where equal within rounding.

        equal: |a - b| <= 1e-5 (1 + |a| + |b|)          numbers, or tensors of one shape

    Float32 has seven digits, and sums over an answer's tokens lose two of them. bfloat16 has hardly three, but there a
    tolerance would hide what models tell apart: where rounding decides, it tosses a coin, which is a half on average.
    """
    slack = 1e-5 * (1 + abs(a) + abs(b))
    return 0.5 * (a - b > slack) + 0.5 * (a - b >= -slack)

def pair_agreement(scores, ranks):
    """Count the pairs of one prompt that scores (K,) order as ranks (K,).

    Returns (points, pairs). Only pairs of different rank count (0 = best); points: see beats.
    """
    pairs = [(i, j) for i, better in enumerate(ranks) for j, worse in enumerate(ranks) if better < worse]
    return sum(beats(scores[i], scores[j]) for i, j in pairs), len(pairs)

def check_same_vocabulary(model, other, option, folder, tok):
    """End the program where two models differ in vocabulary or tokenizer; tok: the first one's."""
    a, b = model.config.vocab_size, other.config.vocab_size
    if a != b:
        fail(f"--{option}={folder}: its vocabulary has {b} tokens, the policy's has {a}; wanted the same tokenizer")
    theirs = load_tokenizer(folder, option)
    if (theirs.name, theirs.ranks) != (tok.name, tok.ranks):
        fail(f"--{option}={folder}: has a tokenizer of its own; wanted the one of the policy")

def check_context(model, other, option, folder, whose="policy's"):
    """End the program where other's context is shorter than model's."""
    if other.config.block_size < model.config.block_size:
        fail(f"--{option}={folder}: its context is {other.config.block_size} tokens, the {whose} "
             f"{model.config.block_size}; wanted one at least as long")

def load_frozen(load, folder, option, model, tok, run, whose="policy's"):
    """Load a model that is never trained; it has to read model's tokens and rows.

    load: load_policy or load_reward_model, of the folder that an option names. tok: model's.
    """
    other = load(folder, option)
    check_same_vocabulary(model, other, option, folder, tok)
    check_context(model, other, option, folder, whose)
    return run.freeze(other.eval()).to(run.device)
