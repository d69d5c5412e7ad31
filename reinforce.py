"""
Policy gradient from a reward model without a critic: several answers to a prompt judge one another.

REINFORCE: Williams 1992. With a running baseline, and RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740;
RLOO's baseline: Kool et al. 2019. GRPO: Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300, section 4.1.
Three models: the policy, the reward model, and the reference (the policy before training, frozen).

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

Differs from the papers. Every token of a minibatch weighs the same, as in ppo.py. GRPO first takes the mean over each
answer's tokens, so that a token of a long answer counts less and long bad answers are hardly punished; Liu et al. 2025
(Dr. GRPO), https://arxiv.org/abs/2503.20783, section 3, point this out. They also stop dividing by the group's standard
deviation, because it gives prompts on which all answers score nearly alike as much weight as the others; it is kept
here. The running baseline is an exponential average, and not the mean since the start: it forgets. An answer that does
not end loses `missing_eos_penalty`, as in ppo.py.
"""

from dataclasses import dataclass

import common
import memory
from common import check_common, fail, launch, require

import torch

from rollout import (check_gold, kl_k1, kl_k3, load_actors, masked_mean, micro_batches, policy_loss, ratio_stats,
                     sample_and_score)
from tokens import Batches, encode_prompts, load_tokenizer, read_records


@dataclass
class Config:
    out_dir: str = 'out/reinforce' # the checkpoint
    policy: str = 'out/sft' # where the policy starts, a folder or a model on the hub; also the reference
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64 while training: GPUs like that; saved without them
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
    gold: str = '' # toy: also log the toy world's gold score, which the policy never sees
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that
    compile: bool = False # torch.compile of the updates: pays off after minutes
    checkpointing: bool = False # work activations out again in the backward pass: less memory, more time
    fsdp: bool = False # several processes: each keeps a part of the weights that are trained, for large models
    resume: bool = False # go on from the checkpoint in out_dir
    overwrite: bool = False # replace the checkpoint in out_dir

    def __post_init__(self):
        check_common(self)
        for key in ('kl_coef', 'missing_eos_penalty', 'clip'):
            require(self, **{key: (getattr(self, key) >= 0, 'at least 0')})
        for key in ('max_steps', 'minibatches'):
            require(self, **{key: (getattr(self, key) >= 1, 'at least 1')})
        fewest = 1 if self.kind == 'reinforce' else 2
        require(self, prompts=(self.prompts != '', 'a file of prompts'),
                gold=(self.gold in ('', 'toy'), 'toy or empty'),
                kind=(self.kind in ('reinforce', 'rloo', 'grpo'), 'reinforce, rloo or grpo'),
                n_answers=(self.n_answers >= fewest, f"at least {fewest} with kind={self.kind}"),
                baseline_decay=(0 <= self.baseline_decay < 1, 'at least 0 and below 1'))
        require(self, batch_size=(self.batch_size % self.n_answers == 0, f"a multiple of n_answers={self.n_answers}"))


def advantages(rewards, kind, baseline=0.0):
    """
    How much better each of K answers is than one had to expect, (B, K), from rewards R (B, K); B prompts.

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


def roll_out(models, prompts, questions, tok, cfg, baseline, run):
    """
    Steps 1 to 3 for prompts (lists of ids) and their records' prompts. Returns a batch of tensors, idx (N, T) and the
    rest (N, T-1), K answers to a prompt in a row, the rows' lengths (N,), and what was measured.
    """
    each = lambda rows: [row for row in rows for _ in range(cfg.n_answers)]
    rolls, ref_logp, scores, measured = sample_and_score(*models, each(prompts), each(questions), tok, cfg, run)
    rewards = scores # (N,)
    if cfg.kind != 'grpo':
        rewards = scores - cfg.kl_coef * (kl_k1(rolls.logp, ref_logp) * rolls.mask).sum(1)
    rewards = rewards.view(-1, cfg.n_answers) # (B, K)
    batch = dict(idx=rolls.idx, mask=rolls.mask, old_logp=rolls.logp, ref_logp=ref_logp,
                 advantages=advantages(rewards, cfg.kind, baseline).view(-1, 1) * rolls.mask)
    measured |= dict(returns=rewards.mean(), # what is maximised; next, how far the answers to one prompt differ in it
                     group_std=rewards.std(1, unbiased=False).mean())
    return batch, rolls.lengths, measured


def update(policy, net, optimizer, batch, lengths, cfg, run, step):
    """
    Step 4, on one iteration's answers as roll_out returns them. Returns means over the mask and over the updates;
    first_ratio is the largest |ratio - 1| before the first update: 0 but for rounding, unless sampling and scoring
    disagree.
    """
    totals, norms, first_ratio = {}, [], 0.0
    for rows in (rows for _ in range(cfg.epochs) for rows in torch.randperm(len(lengths)).chunk(cfg.minibatches)):
        measured = {}
        for b, share in micro_batches(batch, lengths, rows.to(run.device), cfg.grad_accum, run):
            mask, old_logp = b['mask'], b['old_logp'] # (N, T-1) each
            with run.autocast():
                logp = net('logp', b['idx'], mask) # (N, T-1)
            pg_loss = policy_loss(logp, old_logp, b['advantages'], mask, cfg.clip)
            kl_loss = masked_mean(kl_k3(logp, b['ref_logp']), mask) # () nats per token
            loss = pg_loss + cfg.kl_coef * kl_loss if cfg.kind == 'grpo' else pg_loss
            run.backward(loss * share)

            far, stats = ratio_stats(logp.detach(), old_logp, mask, cfg.clip)
            if not norms:
                first_ratio = max(first_ratio, far.item())
            now = stats | dict(loss=loss.detach(), policy_loss=pg_loss.detach(), kl_loss=kl_loss.detach())
            measured = {k: measured.get(k, 0.0) + v * share for k, v in now.items()}

        measured = {k: run.sum(v).item() for k, v in measured.items()}
        common.check_finite('the loss', measured['loss'], step + 1, cfg.out_dir)
        totals = {k: totals.get(k, 0.0) + v for k, v in measured.items()}
        lr = common.lr_at(step, cfg)
        norms.append(common.optimizer_step(optimizer, policy, lr, cfg.grad_clip, run.scaler))
        common.check_finite('the gradient norm', norms[-1], step + 1, cfg.out_dir)
    return {k: v / len(norms) for k, v in totals.items()} | dict(
        grad_norm=sum(norms) / len(norms), first_ratio=max(run.gather(first_ratio)), updates=len(norms))


def main(cfg):
    run = common.start(cfg)
    n_prompts = cfg.batch_size * cfg.minibatches // cfg.n_answers # of an iteration
    if n_prompts % run.world_size: # all answers to a prompt are sampled by one process
        fail(f"--batch_size={cfg.batch_size}: must be a multiple of {run.world_size * cfg.n_answers}, "
             "processes x n_answers")
    tok = load_tokenizer(cfg.policy)
    models = policy, *frozen = load_actors(cfg, run, tok, cfg.pad_vocab) # policy, reward model, reference
    questions = read_records(cfg.prompts, 'prompts')
    if cfg.gold:
        check_gold(questions, cfg.prompts)
    prompts = encode_prompts(tok, questions, policy.config.block_size - cfg.max_new_tokens)
    batches = Batches([0] * len(prompts), n_prompts, cfg.seed) # in random order
    T, sampled = max(map(len, prompts)) + cfg.max_new_tokens, cfg.batch_size * cfg.minibatches // run.world_size
    memory.check(run, cfg, [policy], T, cfg.max_new_tokens, cfg.max_new_tokens, frozen, sampled=min(sampled, 256))
    common.prepare_out_dir(run, cfg) # once all input is read: what is wrong with it costs no old checkpoint

    net = run.parallel(policy, cfg.compile, cfg.fsdp, cfg.checkpointing)
    optimizer = common.make_optimizer(policy, cfg, eps=1e-5)
    state = common.load_checkpoint(run, cfg, policy, dict(policy=optimizer))
    # a new reward model scores the reference's answers 0 on average (see reward.py): a fair first guess
    first, baseline = (state['step'], state['baseline']) if state else (0, 0.0)

    def save(step):
        common.save_checkpoint(run, cfg, policy, tok, step, dict(policy=optimizer), baseline=baseline)

    bar = common.training_bar(run, cfg, first)
    for step in bar:
        chosen = run.rows(batches.at(step))
        batch, lengths, measured = roll_out(models, [prompts[i] for i in chosen],
                                            [questions[i]['prompt'] for i in chosen], tok, cfg, baseline, run)
        measured = {k: (run.sum(v) / run.world_size).item() for k, v in measured.items()}
        updates = update(policy, net, optimizer, batch, lengths, cfg, run, step)
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            common.log(run, cfg, done, **measured, **updates, baseline=baseline, lr=common.lr_at(step, cfg))
            bar.set_postfix(reward=f"{measured['reward']:.3f}", kl=f"{measured['kl']:.2f}",
                            ended=f"{measured['ended']:.2f}")
        baseline = cfg.baseline_decay * baseline + (1 - cfg.baseline_decay) * measured['returns']
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
