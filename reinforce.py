"""Train a policy from a reward model without a critic: REINFORCE, RLOO or GRPO.

Several answers to a prompt are compared with one another. REINFORCE: Williams 1992. With a running baseline, and RLOO:
Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; RLOO's baseline: Kool et al. 2019. GRPO: Shao et al. 2024
(DeepSeekMath), https://arxiv.org/abs/2402.03300, section 4.1. Three models: the policy, the reward model, and the
reference (the policy before training, frozen).

    python reinforce.py config/toy/rloo.py
    python reinforce.py config/toy/grpo.py --n_answers=8 --out_dir=out/toy/grpo8

One iteration:
    1. roll out: sample K answers to each prompt at temperature 1, no top-k or top-p, recording log pi_old
    2. score: r(x, y) from the reward model, less a penalty where an answer does not end
    3. one advantage per answer, which all its tokens share:
           reinforce, rloo    R = r(x, y) - beta * (log pi_old(y|x) - log pi_ref(y|x)), less a baseline
           grpo               R = r(x, y), normalised among the prompt's answers; the KL (k3) is in the loss instead
    4. `epochs` of the clipped surrogate. The first update is at ratio 1, where its gradient is that of -A log pi: with
       one epoch and one minibatch, the default, this is REINFORCE or RLOO as published. GRPO takes several.

Differs from the papers: every token of a minibatch weighs the same. GRPO averages over each answer first; Liu et al.
2025 (Dr. GRPO), https://arxiv.org/abs/2503.20783, section 3, object to that. They also drop GRPO's division by the
standard deviation, which we keep. The running baseline is an exponential average. An answer that does not end loses
`missing_eos_penalty`.
"""

from dataclasses import dataclass

from common.batches import Batches, encode_prompts
from common.checkpoints import load_checkpoint, prepare_out_dir, save_checkpoint
from common.options import TrainOptions, fail, launch, require
from common.records import read_records
from common.rollout import (describe, frozen_logp, frozen_rewards, kl_k1, kl_k3, load_actors, load_gold, masked_mean,
                            mean_gold, micro_batches, minibatches, pack, ratio_stats, sample_answers)
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, check_finite, finish_step, lr_at, make_optimizer, optimizer_step, training_bar

import torch

@dataclass
class Config(TrainOptions):
    out_dir: str = 'out/reinforce' # the checkpoint
    policy: str = 'out/sft' # where the policy starts, a folder or a model on the hub; also the reference
    reward_model: str = 'out/reward' # a folder or a model on the hub
    prompts: str = '' # prompt records
    max_new_tokens: int = 64 # longest answer, EOS included
    kind: str = 'rloo' # of advantage: reinforce, rloo or grpo
    n_answers: int = 4 # K, answers per prompt; reinforce takes 1 too
    kl_coef: float = 0.05 # beta, the price of a nat of KL: per answer in the reward, or with grpo per token in the loss
    baseline_decay: float = 0.9 # reinforce: how much of the running mean of R is kept per iteration
    missing_eos_penalty: float = 1.0 # taken off the score of an answer that does not end
    epochs: int = 1 # passes over the answers of an iteration
    minibatches: int = 1 # optimizer steps per epoch
    clip: float = 0.2 # of the probability ratio
    max_steps: int = 100 # iterations
    batch_size: int = 64 # answers per optimizer step; an iteration samples batch_size * minibatches
    grad_accum: int = 1 # micro-batches, of answers of like length
    lr: float = 1e-5
    lr_schedule: str = 'linear' # after warmup: constant, linear (to 0), cosine (to a tenth)
    warmup_steps: int = 0 # iterations
    weight_decay: float = 0.0
    grad_clip: float = 1.0 # largest gradient norm; 0 = no clipping
    save_every: int = 50 # iterations between checkpoints; 0 = only at the end
    log_every: int = 1
    gold: str = '' # MODULE:FUNCTION: also log this score, which the policy never sees, as in data.toy.world:gold

    def __post_init__(self):
        super().__post_init__()
        fewest = 1 if self.kind == 'reinforce' else 2
        require(self, prompts=(self.prompts != '', 'a file of prompts'), max_steps=(self.max_steps >= 1, 'at least 1'),
                kind=(self.kind in ('reinforce', 'rloo', 'grpo'), 'reinforce, rloo or grpo'),
                n_answers=(self.n_answers >= fewest, f"at least {fewest} with kind={self.kind}"),
                baseline_decay=(0 <= self.baseline_decay < 1, 'at least 0 and below 1'))
        require(self, batch_size=(self.batch_size % self.n_answers == 0, f"a multiple of n_answers={self.n_answers}"))

def advantages(rewards, kind, baseline=0.0):
    """Return advantages (B, K) of K answers each to B prompts, from rewards R (B, K).

        reinforce    R_k - baseline                       a number known before these answers were sampled
        rloo         R_k - mean of the other K - 1        Ahmadian et al. 2024, section 2.3
        grpo         (R_k - mean) / std of all K          Shao et al. 2024, section 4.1.2; 0 where all K are equal

    The first two are unbiased. grpo's std is that of the K answers themselves (divided by K, not K - 1).
    """
    if kind == 'reinforce':
        return rewards - baseline
    if kind == 'rloo':
        others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.size(1) - 1) # (B, K)
        return rewards - others
    if kind == 'grpo':
        centred = rewards - rewards.mean(1, keepdim=True) # (B, K)
        return centred * torch.rsqrt((centred ** 2).mean(1, keepdim=True) + 1e-8)
    raise ValueError(f"kind must be reinforce, rloo or grpo, got {kind!r}")

def roll_out(models, prompts, questions, tok, cfg, baseline, run, gold=None):
    """Make steps 1 to 3 for prompts, lists of ids.

    questions: the same prompts as text, which only the gold score reads. Returns a batch of tensors, idx (N, T) and the
    rest (N, T-1), with K neighbouring rows per prompt, the rows' lengths (N,), and metrics.
    """
    policy, reward_model, reference = models
    prompts = [prompt for prompt in prompts for _ in range(cfg.n_answers)] # K of each
    questions = [question for question in questions for _ in range(cfg.n_answers)]
    # 1. roll out
    with run.autocast():
        answers, logps = sample_answers(run.whole(policy), prompts, tok, cfg.max_new_tokens)
    rolls = pack(prompts, answers, logps, tok.eos).to(run.device)
    idx, mask, old_logp = rolls.idx, rolls.mask, rolls.logp # (N, T), (N, T-1), (N, T-1)
    with run.autocast():
        ref_logp = frozen_logp(reference, idx, mask, rolls.lengths, cfg.batch_size // cfg.grad_accum) # (N, T-1)
        reward = frozen_rewards(reward_model, idx, rolls.lengths) # (N,)
    # 2. score
    scores = reward - cfg.missing_eos_penalty * (1 - rolls.ended) # (N,)
    # 3. one advantage per answer
    rewards = scores # (N,)
    if cfg.kind != 'grpo':
        rewards = scores - cfg.kl_coef * (kl_k1(old_logp, ref_logp) * mask).sum(1)
    rewards = rewards.view(-1, cfg.n_answers) # (B, K)
    batch = dict(idx=idx, mask=mask, old_logp=old_logp, ref_logp=ref_logp,
                 advantages=advantages(rewards, cfg.kind, baseline).view(-1, 1) * mask)

    measured = describe(rolls, ref_logp, reward, scores, run)
    measured |= dict(returns=rewards.mean(), # the objective; next, its spread among the answers to one prompt
                     group_std=rewards.std(1, unbiased=False).mean())
    if gold:
        measured['gold'] = mean_gold(gold, questions, answers, tok)
    return batch, rolls.lengths, measured

def reinforce_loss(policy, b, cfg, run):
    """Return the loss (), its metrics, and the largest |ratio - 1| (); b: part of the batch.

        ratio = pi / pi_old        L = mean over tokens of -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A)

    and with grpo L + beta times the mean of k3, the KL to the reference (Shao et al. 2024, equations 3 and 4). At ratio
    1 the gradient of L is that of -A log pi (Williams 1992).
    """
    mask, old_logp, A = b['mask'], b['old_logp'], b['advantages'] # (N, T-1) each
    with run.autocast():
        logp = policy.logp(b['idx'], mask) # (N, T-1)
    ratio = ((logp - old_logp) * mask).exp() # (N, T-1)
    surrogate = masked_mean(torch.max(-A * ratio, -A * ratio.clamp(1 - cfg.clip, 1 + cfg.clip)), mask) # ()
    kl = masked_mean(kl_k3(logp, b['ref_logp']), mask) # () nats per token
    loss = surrogate + cfg.kl_coef * kl if cfg.kind == 'grpo' else surrogate
    largest, stats = ratio_stats(logp, old_logp, mask, cfg.clip)
    return loss, stats | dict(loss=loss, policy_loss=surrogate, kl_loss=kl), largest

def update(policy, optimizer, batch, lengths, cfg, run, step):
    """Make step 4 on one iteration's answers, as roll_out returns them; return means over the updates.

    first_ratio: the largest |ratio - 1| before the first update, 0 but for rounding unless sampling and scoring differ.
    """
    updates, norms, first_ratio, lr = [], [], 0.0, lr_at(step, cfg)
    for rows in minibatches(len(lengths), cfg):
        means = Means()
        for b, share in micro_batches(batch, lengths, rows.to(run.device), cfg.grad_accum, run):
            loss, measured, largest = reinforce_loss(policy, b, cfg, run)
            run.backward(loss * share)
            means.add(measured, share)
            first_ratio = first_ratio if updates else max(first_ratio, largest.item())
        updates.append(means.sum(run))
        check_finite(cfg, step, 'the loss', updates[-1]['loss'])
        norms.append(optimizer_step(run, cfg, step, policy, optimizer, lr))
    return {k: sum(line[k] for line in updates) / len(updates) for k in updates[0]} | dict(
        grad_norm=sum(norms) / len(norms), first_ratio=max(run.gather(first_ratio)), updates=len(norms), lr=lr)

def main(cfg):
    run = start(cfg)
    n_prompts = cfg.batch_size * cfg.minibatches // cfg.n_answers # of an iteration
    if n_prompts % run.world_size: # all answers to a prompt are sampled by one process
        fail(f"--batch_size={cfg.batch_size}: must be a multiple of {run.world_size * cfg.n_answers}, "
             "processes x n_answers")
    tok = load_tokenizer(cfg.policy, 'policy')
    models = policy, *_ = load_actors(cfg, run, tok) # policy, reward model, reference
    records = read_records(cfg.prompts, 'prompts')
    gold = load_gold(cfg.gold, records, cfg.prompts)
    prompts = encode_prompts(tok, records, policy.config.block_size - cfg.max_new_tokens)
    batches = Batches([0] * len(prompts), n_prompts, cfg.seed) # of equal lengths: in random order
    prepare_out_dir(run, cfg)

    run.prepare(policy, cfg)
    optimizer = make_optimizer(policy, cfg, eps=1e-5)
    state = load_checkpoint(run, cfg, policy, dict(policy=optimizer))
    # a new reward model scores the reference's answers 0 on average (see reward.py): a fair first guess
    baseline = state['baseline'] if state else 0.0

    def save(step):
        save_checkpoint(run, cfg, policy, tok, step, dict(policy=optimizer), baseline=baseline)

    bar = training_bar(run, cfg, state)
    for step in bar:
        chosen = run.rows(batches.at(step))
        batch, lengths, measured = roll_out(models, [prompts[i] for i in chosen],
                                            [records[i]['prompt'] for i in chosen], tok, cfg, baseline, run, gold)
        measured = {k: (run.sum(v) / run.world_size).item() for k, v in measured.items()} | dict(baseline=baseline)
        measured |= update(policy, optimizer, batch, lengths, cfg, run, step)
        baseline = cfg.baseline_decay * baseline + (1 - cfg.baseline_decay) * measured['returns']
        finish_step(run, cfg, bar, step + 1, measured, ['reward', 'kl', 'ended'], save)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
