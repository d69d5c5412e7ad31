"""Train a policy from rewards without a critic: REINFORCE, RLOO or GRPO.

Several answers to a prompt are compared with one another. REINFORCE: Williams 1992. With a running baseline, and RLOO:
Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; RLOO's baseline: Kool et al. 2019. GRPO: Shao et al. 2024
(DeepSeekMath), https://arxiv.org/abs/2402.03300, section 4.1. Three models: the policy, the reward model, and the
reference (the policy before training, frozen).

    python reinforce.py config/toy/rloo.py
    python reinforce.py config/toy/grpo.py --n_answers=8 --out_dir=out/toy/grpo8

One iteration:
    1. roll out: sample K answers to each prompt at temperature 1, no top-k or top-p, recording log pi_old
    2. score: the reward r(x, y) (common/rewards.py), less a penalty where an answer does not end
    3. one advantage per answer, which all its tokens share:
           reinforce, rloo    R = r(x, y) - beta * (log pi_old(y|x) - log pi_ref(y|x)), less a baseline
           grpo               R = r(x, y), normalised among the prompt's answers; the KL (k3) is in the loss instead
    4. `epochs` of the clipped surrogate. The first update is at ratio 1, where its gradient is that of -A log pi: with
       one epoch and one minibatch, the default, this is REINFORCE or RLOO as published. GRPO takes several.

What later papers change; config/toy/ has a file for each:
    Dr. GRPO    --scale_std=False --average=constant    Liu et al. 2025, https://arxiv.org/abs/2503.20783
    DAPO        --clip_high=0.28 --refill=3             Yu et al. 2025, https://arxiv.org/abs/2503.14476
    GSPO        --ratio=sequence --average=answer       Zheng et al. 2025, https://arxiv.org/abs/2507.18071
    CISPO       --loss=cispo --clip_high=4              MiniMax-M1 2025, https://arxiv.org/abs/2506.13585

docs/differences.md says what differs from the papers.
"""

from dataclasses import dataclass

from common.batches import Batches, encode_prompts
from common.checkpoints import load_checkpoint, prepare_out_dir, save_checkpoint
from common.options import launch, require, unread
from common.records import read_records
from common.rewards import RolloutOptions, load_actors, mean_gold
from common.rollout import (describe, frozen, kl_k1, kl_k3, masked_mean, micro_batches, minibatches, ratio_stats,
                            sample_rollouts)
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, check_finite, finish_step, lr_at, make_optimizer, optimizer_step, training_bar
from feedback.functions import load_functions
from lab.per_token import add_samples, earlier_samples

import torch
from torch.nn import functional as F

@dataclass
class Config(RolloutOptions):
    out_dir: str = 'out/reinforce' # the checkpoint
    kind: str = 'rloo' # of advantage: reinforce, rloo or grpo
    scale_std: bool = True # grpo: divide by the standard deviation of the K rewards
    n_answers: int = 4 # K, answers per prompt; reinforce takes 1 too
    refill: int = 0 # times that further prompts are sampled instead of those whose K answers score alike; 0: none
    kl_coef: float = 0.05 # beta, the price of a nat of KL: per answer in the reward, or with grpo per token in the loss
    baseline_decay: float = 0.9 # reinforce: how much of the running mean of R is kept per iteration
    epochs: int = 1 # passes over the answers of an iteration
    loss: str = 'clip' # the clipped surrogate; cispo: a clipped weight, without gradient, times log pi
    clip_high: float = 0.0 # how far above 1 instead; 0 = as clip. cispo clips there alone
    ratio: str = 'token' # of each token's probabilities; sequence: one for an answer, its tokens' geometric mean
    average: str = 'token' # all tokens weigh the same; answer: all answers do; constant: sums, over max_new_tokens

    def __post_init__(self):
        super().__post_init__()
        fewest = 1 if self.kind == 'reinforce' else 2
        require(self, kind=(self.kind in ('reinforce', 'rloo', 'grpo'), 'reinforce, rloo or grpo'),
                n_answers=(self.n_answers >= fewest, f"at least {fewest} with kind={self.kind}"),
                ratio=(self.ratio in ('token', 'sequence'), 'token or sequence'),
                loss=(self.loss in ('clip', 'cispo'), 'clip or cispo'),
                average=(self.average in ('token', 'answer', 'constant'), 'token, answer or constant'),
                baseline_decay=(0 <= self.baseline_decay < 1, 'at least 0 and below 1'))
        unread(self, self.kind == 'reinforce', 'kind=reinforce', 'baseline_decay')
        unread(self, self.kind == 'grpo', 'kind=grpo', 'scale_std')
        unread(self, self.kind != 'reinforce', 'kind=rloo or grpo', 'refill')
        unread(self, self.loss == 'clip' or not self.clip_high, 'loss=clip', 'clip')

def advantages(rewards, kind, baseline=0.0, scale_std=True):
    """Return advantages (B, K) of K answers each to B prompts, from rewards R (B, K).

        reinforce    R_k - baseline                       a number known before these answers were sampled
        rloo         R_k - mean of the other K - 1        Ahmadian et al. 2024, section 2.3
        grpo         (R_k - mean) / std of all K          Shao et al. 2024, section 4.1.2; 0 where all K are equal
                     R_k - mean of all K                  without scale_std: Dr. GRPO, Liu et al. 2025, section 3

    The first two are unbiased. grpo's std is that of the K answers themselves (divided by K, not K - 1).
    """
    if kind == 'reinforce':
        return rewards - baseline
    if kind == 'rloo':
        others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1) # (B, K)
        return rewards - others
    if kind == 'grpo':
        centred = rewards - rewards.mean(1, keepdim=True) # (B, K)
        return centred * torch.rsqrt((centred ** 2).mean(1, keepdim=True) + 1e-8) if scale_std else centred
    raise ValueError(f"kind must be reinforce, rloo or grpo, got {kind!r}")

def roll_out(models, prompts, records, tok, cfg, baseline, run, gold=None, user=None):
    """Make steps 1 to 3 for prompts, lists of ids, and their records.

    gold, user: functions, see feedback/functions.py. Returns a batch of tensors, idx (N, T) and the rest (N, T-1), with
    K neighbouring rows per prompt, the rows' lengths (N,), and metrics.
    """
    policy, reward_of, reference = models
    # 1. roll out
    with run.autocast():
        rolls = sample_rollouts(policy, prompts, records, tok, cfg, user).to(run.device)
    idx, mask, old_logp = rolls.idx, rolls.mask, rolls.logp # (N, T), (N, T-1), (N, T-1)
    with run.autocast():
        rows = cfg.batch_size // cfg.grad_accum
        ref_logp = frozen(reference.logp, idx, mask, rolls.lengths, rows, rolls.K) # (N, T-1)
        reward, _, parts = reward_of(rolls) # (N,)
    # 2. score
    scores = reward - cfg.missing_eos_penalty * (1 - rolls.ended) # (N,)
    # 3. one advantage per answer
    rewards = scores # (N,)
    if cfg.kind != 'grpo':
        rewards = scores - cfg.kl_coef * (kl_k1(old_logp, ref_logp) * mask).sum(1)
    rewards = rewards.view(-1, cfg.n_answers) # (B, K)
    batch = dict(idx=idx, mask=mask, old_logp=old_logp, ref_logp=ref_logp, scores=scores[:, None].expand_as(mask),
                 advantages=advantages(rewards, cfg.kind, baseline, cfg.scale_std).view(-1, 1) * mask)

    measured = describe(rolls, ref_logp, reward, scores, run) | parts
    measured |= dict(returns=rewards.mean(), # the objective; next, its spread among the answers to one prompt
                     group_std=rewards.std(1, unbiased=False).mean())
    return batch, rolls.lengths, measured | mean_gold(gold, rolls)

def refill(draw, cfg, run):
    """Roll out prompts until enough have answers that score differently. Returns as roll_out does.

        0 < number of right answers < K            DAPO, Yu et al. 2025, equation 11; here: std of the K scores > 1e-4

    draw() rolls out an iteration's number of further prompts, at most 1 + cfg.refill times. Prompts whose answers score
    alike only fill what is missing then. Metrics are means over all that was sampled; alike is their share.
    """
    draws, K = [], cfg.n_answers
    for _ in range(1 + cfg.refill):
        draws.append(draw())
        batches, lengths, measured = zip(*draws)
        T = max(b['idx'].size(1) for b in batches)
        batch = {k: torch.cat([F.pad(b[k], (0, T - b['idx'].size(1))) for b in batches]) for k in batches[0]}
        alike, B = batch['scores'][:, 0].view(-1, K).std(1) <= 1e-4, len(lengths[0]) // K # (draws * B,), B
        if not run.sum(((~alike).sum() < B).float()): # no process wants more
            break
    chosen = alike.long().argsort(stable=True)[:B] # (B,) those that differ first, as they were drawn
    rows = (K * chosen[:, None] + torch.arange(K, device=chosen.device)).view(-1) # (B * K,)
    return {k: v[rows] for k, v in batch.items()}, torch.cat(lengths)[rows], {
        k: sum(m[k] for m in measured) / len(draws) for k in measured[0]} | dict(alike=alike.float().mean())

def token_weights(mask, rows, average, longest, run):
    """Return the weight (N, 1) of each answer's tokens in the loss.

        token       sum over all tokens / their number                       weight 1              DAPO, equation 8
        answer      mean over answers of (sum over its tokens / |o|)         weight n / |o|        GRPO, equation 3
        constant    mean over answers of (sum over its tokens / longest)     weight n / longest    Dr. GRPO, section 3

    mask: (N, T-1). rows: those of the optimizer step. longest: max_new_tokens. |o|: the number of an answer's tokens,
    n: its mean over the rows of all processes. So a step may be split into any micro-batches.
    """
    lengths = mask.sum(1, keepdim=True) # (N, 1)
    n = run.sum(lengths[rows].mean()) / run.world_size # (); every process has as many rows
    return dict(token=torch.ones_like(lengths), answer=n / lengths, constant=(n / longest).expand_as(lengths))[average]

def reinforce_loss(policy, b, cfg, run):
    """Return the loss (), its metrics, and the largest |ratio - 1| (); b: part of the batch.

        ratio = pi / pi_old                           of a token
        ratio = (pi(y|x) / pi_old(y|x)) ^ (1 / |y|)   of a sequence: GSPO, Zheng et al. 2025, equation 7
        L = mean of -min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A)
                                                      PPO, equation 7; two ends: DAPO, Yu et al. 2025, equation 8
        L = mean of -stop_gradient(min(ratio, 1 + clip_high)) A log pi
                                                      CISPO, MiniMax-M1 2025, equations 4 and 5

    and with grpo L + beta times the mean of k3, the KL to the reference (Shao et al. 2024, equations 3 and 4). All
    means are weighted by token_weights. At ratio 1 the gradient of each L is that of -A log pi (Williams 1992).
    """
    mask, old_logp, A = b['mask'], b['old_logp'], b['advantages'] # (N, T-1) each
    with run.autocast():
        logp = policy.logp(b['idx'], mask, b['groups']) # (N, T-1)
    log_ratio = (logp - old_logp) * mask # (N, T-1)
    if cfg.ratio == 'sequence':
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True) # (N, 1), all its tokens share it
    ratio, low, high = log_ratio.exp(), 1 - cfg.clip, 1 + (cfg.clip_high or cfg.clip)
    if cfg.loss == 'cispo':
        low, losses = 0.0, -ratio.clamp(max=high).detach() * A * logp # (N, T-1)
    else:
        losses = torch.max(-A * ratio, -A * ratio.clamp(low, high)) # (N, T-1)
    surrogate = masked_mean(losses * b['weight'], mask) # ()
    kl = masked_mean(kl_k3(logp, b['ref_logp']) * b['weight'], mask) # () nats per token, averaged alike
    loss = surrogate + cfg.kl_coef * kl if cfg.kind == 'grpo' else surrogate
    largest, stats = ratio_stats(logp, old_logp, mask, cfg.clip)
    stats['clipfrac'] = masked_mean(((ratio < low) | (ratio > high)).float(), mask) # of the ratio that is clipped
    return loss, stats | dict(loss=loss, policy_loss=surrogate, kl_loss=kl), largest

def update(policy, optimizer, batch, lengths, cfg, run, step):
    """Make step 4 on one iteration's answers, as roll_out returns them; return means over the updates.

    first_ratio: the largest |ratio - 1| before the first update, 0 but for rounding unless sampling and scoring differ.
    """
    updates, first_ratio, lr = [], 0.0, lr_at(step, cfg, cfg.lr)
    for rows in minibatches(len(lengths), cfg):
        means, rows = Means(), rows.to(run.device)
        batch['weight'] = token_weights(batch['mask'], rows, cfg.average, cfg.max_new_tokens, run) # (N, 1)
        for b, share in micro_batches(batch, lengths, rows, cfg, run):
            loss, measured, largest = reinforce_loss(policy, b, cfg, run)
            run.backward(loss * share)
            means.add(measured, share)
            first_ratio = first_ratio if updates else max(first_ratio, largest.item())
        updates.append(means.sum(run))
        check_finite(cfg, step, 'the loss', updates[-1]['loss'])
        updates[-1]['grad_norm'] = optimizer_step(run, cfg, step, policy, optimizer, lr)
    return {k: sum(line[k] for line in updates) / len(updates) for k in updates[0]} | dict(
        first_ratio=max(run.gather(first_ratio)), updates=len(updates), lr=lr)

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.policy, 'policy')
    records = read_records(cfg.prompts, 'prompts')
    reward, gold, user = load_functions(cfg, records)
    models = policy, *_ = load_actors(cfg, run, tok, reward) # policy, Reward, reference
    prompts = encode_prompts(tok, records, policy.config.block_size - cfg.max_new_tokens)
    n_prompts = cfg.batch_size * cfg.minibatches // cfg.n_answers # of an iteration
    batches = Batches([0] * len(prompts), n_prompts, cfg.seed) # of equal lengths: in random order
    prepare_out_dir(run, cfg)

    run.prepare(policy, cfg)
    optimizer = make_optimizer(policy, cfg, eps=1e-5)
    state = load_checkpoint(run, cfg, policy, dict(policy=optimizer))
    # a new reward model scores the reference's answers 0 on average (see reward.py): a fair first guess
    baseline = state['baseline'] if state else 0.0
    drawn = state.get('drawn', state['step']) if state else 0 # batches of prompts so far
    samples = earlier_samples(cfg, state) # lines of samples.jsonl

    def save(step):
        add_samples(samples, step, models, batch, lengths, tok, cfg, run)
        save_checkpoint(run, cfg, policy, tok, step, dict(policy=optimizer), samples, baseline=baseline, drawn=drawn)

    def draw():
        nonlocal drawn
        chosen, drawn = run.rows(batches.at(drawn)), drawn + 1
        return roll_out(models, [prompts[i] for i in chosen], [records[i] for i in chosen], tok, cfg, baseline, run,
                        gold, user)

    bar = training_bar(run, cfg, state)
    for step in bar:
        batch, lengths, measured = refill(draw, cfg, run) if cfg.refill else draw()
        measured = {k: (run.sum(v) / run.world_size).item() for k, v in measured.items()} | dict(baseline=baseline)
        measured |= update(policy, optimizer, batch, lengths, cfg, run, step)
        baseline = cfg.baseline_decay * baseline + (1 - cfg.baseline_decay) * measured['returns']
        finish_step(run, cfg, bar, step + 1, measured, ['reward', 'kl', 'ended'], save)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
