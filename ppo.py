"""
Proximal policy optimisation from a reward model, with a penalty for leaving the reference.

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. GAE: Schulman et al. 2016,
https://arxiv.org/abs/1506.02438. For language models: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, and
Ouyang et al. 2022 (InstructGPT), https://arxiv.org/abs/2203.02155. Four models: the policy, the critic (it starts as
the reward model), the reward model, and the reference (the policy before training, frozen).

    python ppo.py config/toy/ppo.py
    python ppo.py config/toy/ppo.py --kl_coef=0.1 --critic=shared --out_dir=out/toy/ppo_shared

One iteration:
    1. roll out: sample answers to a batch of prompts at temperature 1, no top-k or top-p, recording log pi_old
    2. score: r(x, y) from the reward model, less a penalty where an answer does not end
    3. reward per token: -beta * (log pi_old - log pi_ref), plus r(x, y) on the last token
    4. advantages by GAE from the critic's values, whitened
    5. several epochs of the clipped surrogate and the clipped value loss

Differs from InstructGPT: the score's shift and gain are in the reward model's weights (see reward.py), and an answer
that does not end loses a fixed amount instead of scoring -1.
"""

from dataclasses import dataclass

import common
import memory
from common import check_common, fail, launch, require

import torch

from model import load_reward_model
from rollout import (check_gold, frozen_values, kl_k1, load_actors, masked_mean, micro_batches, policy_loss,
                     ratio_stats, sample_and_score, whiten)
from tokens import Batches, collate, encode_prompts, load_tokenizer, load_training_set, read_records


@dataclass
class Config:
    out_dir: str = 'out/ppo' # the checkpoint
    policy: str = 'out/sft' # where the policy starts, a folder or a model on the hub; also the reference
    reward_model: str = 'out/reward' # a folder or a model on the hub
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64 while training: GPUs like that; saved without them
    prompts: str = '' # prompt records
    max_new_tokens: int = 64 # longest answer, EOS included
    critic: str = 'separate' # separate: a model of its own; shared: a value head on the policy
    kl_coef: float = 0.05 # beta, the price of a nat of KL
    kl_target: float = 0.0 # above 0: adapt beta so that the KL per answer comes to this many nats (Ziegler et al. 2.2)
    kl_horizon: int = 10000 # answers over which beta adapts
    missing_eos_penalty: float = 1.0 # taken off the score of an answer that does not end
    whiten_rewards: bool = False # per-token rewards to variance 1, mean kept
    gamma: float = 1.0 # discount
    lam: float = 0.95 # lambda of GAE
    epochs: int = 4 # passes over the answers of an iteration
    minibatches: int = 1 # optimizer steps per epoch
    clip: float = 0.2 # of the probability ratio
    value_clip: float = 0.2 # of the critic's change
    value_coef: float = 0.1 # weight of the value loss where the critic is shared
    entropy_coef: float = 0.0 # entropy bonus, per nat
    early_stop_kl: float = 0.0 # above 0: end an iteration's epochs once KL(old || new) per token passes this
    ptx_coef: float = 0.0 # above 0: weight of the cross-entropy on ptx_data (PPO-ptx, InstructGPT equation 2)
    ptx_data: str = '' # demonstrations or text
    ptx_batch_size: int = 32 # rows of ptx_data per optimizer step
    max_steps: int = 100 # iterations
    batch_size: int = 64 # answers per optimizer step; an iteration samples batch_size * minibatches
    grad_accum: int = 1 # micro-batches, of answers of like length
    lr: float = 1e-5
    critic_lr: float = 1e-5
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
        for key in ('kl_coef', 'kl_target', 'missing_eos_penalty', 'clip', 'value_clip', 'value_coef', 'entropy_coef',
                    'early_stop_kl', 'ptx_coef', 'critic_lr'):
            require(self, **{key: (getattr(self, key) >= 0, 'at least 0')})
        for key in ('max_steps', 'minibatches', 'ptx_batch_size'):
            require(self, **{key: (getattr(self, key) >= 1, 'at least 1')})
        require(self, prompts=(self.prompts != '', 'a file of prompts'),
                gold=(self.gold in ('', 'toy'), 'toy or empty'),
                critic=(self.critic in ('separate', 'shared'), 'separate or shared'),
                gamma=(0 <= self.gamma <= 1, 'between 0 and 1'), lam=(0 <= self.lam <= 1, 'between 0 and 1'),
                kl_coef=(self.kl_coef > 0 or self.kl_target == 0, 'above 0 with kl_target, which multiplies it'),
                kl_horizon=(self.kl_target == 0 or self.kl_horizon >= self.batch_size * self.minibatches,
                            'at least batch_size * minibatches, the answers of an iteration'),
                ptx_data=((self.ptx_data != '') == (self.ptx_coef > 0), 'given together with ptx_coef'))


def token_rewards(scores, kl, mask, kl_coef):
    """
    Reward per token (B, T-1): -beta * kl_t everywhere, plus the answer's score on its last token (Ziegler et al. 2019,
    equation 2). scores: (B,). kl: (B, T-1) log pi_old - log pi_ref. mask: (B, T-1), 1 = answer, EOS included.
    """
    t = torch.arange(mask.size(1), device=mask.device)
    last = (t * mask).argmax(1) # (B,) position of the last counted token, be it EOS or where the answer was cut off
    rewards = -kl_coef * kl * mask # (B, T-1)
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """
    Generalised advantage estimation, Schulman et al. 2016, equations 11, 12 and 16:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          return_t = A_t + V_t

    with V and A 0 after the answer's last token. All (B, T); mask is 1 on one contiguous stretch per row.
    Returns advantages and returns, (B, T) each, 0 outside the mask.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t] # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t] * mask[:, t], advantages[:, t]
    return advantages, (advantages + values) * mask


def value_loss(values, old_values, returns, mask, clip):
    """
    Clipped value loss: the mean () over counted tokens of 1/2 max((V - R)^2, (V_clipped - R)^2), where V_clipped is V
    kept within `clip` of the value at the time of sampling. All (B, T). From the reference implementations of PPO
    (Huang et al. 2022, The 37 implementation details of PPO, detail 9).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip) # (B, T)
    return masked_mean(0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def adapt_kl_coef(kl_coef, kl, target, n, horizon):
    """Ziegler et al. 2019, section 2.2: raise beta while the KL per answer is above target; n answers were sampled."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


@dataclass
class Models:
    """The four models; the critic is the policy itself where it is shared."""
    policy: torch.nn.Module
    critic: torch.nn.Module
    reward: torch.nn.Module
    reference: torch.nn.Module


def load_models(cfg, run, tok):
    shared = cfg.critic == 'shared'
    policy, reward, reference = load_actors(cfg, run, tok, cfg.pad_vocab, value_head=shared)
    critic = policy
    if shared and not policy.config.bias: # the value head brings a final bias, which no policy's checkpoint has
        policy.ln_f.bias.requires_grad_(False)
    if not shared: # its value head starts as the reward head
        critic = load_reward_model(cfg.reward_model, value_head=True).to(run.device)
        critic.reward_head, critic.config.reward_head = None, False
    return Models(policy, critic, reward, reference)


def roll_out(models, prompts, questions, tok, cfg, kl_coef, run):
    """
    Steps 1 to 4 for prompts (lists of ids) and the records they come from. Returns a batch of tensors, idx (B, T) and
    the rest (B, T-1), the rows' lengths (B,), and what was measured.
    """
    # 1. sample, and record log pi_old while sampling; 2. score
    rolls, ref_logp, scores, measured = sample_and_score(models.policy, models.reward, models.reference, prompts,
                                                         questions, tok, cfg, run)
    mask, lengths = rolls.mask, rolls.lengths # (B, T-1), (B,)
    with run.autocast():
        values = frozen_values(run.whole(models.critic), rolls.idx, mask, lengths) # (B, T-1)
    # 3. reward per token
    kl = kl_k1(rolls.logp, ref_logp) * mask # (B, T-1)
    rewards = token_rewards(scores, kl, mask, kl_coef) # (B, T-1)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, run) + masked_mean(rewards, mask, run) * mask
    # 4. advantages
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam) # (B, T-1) each
    batch = dict(idx=rolls.idx, mask=mask, old_logp=rolls.logp, old_values=values, returns=returns,
                 advantages=whiten(advantages, mask, run))

    mean = lambda x: masked_mean(x, mask, run)
    variance = lambda x: mean((x - mean(x)) ** 2)
    measured |= dict(
        values=mean(values), returns=mean(returns), returns_std=variance(returns).sqrt(),
        explained_variance=1 - variance(returns - values) / variance(returns).clamp(min=1e-8))
    return batch, lengths, measured


def update(models, nets, optimizers, batch, lengths, cfg, run, step, ptx):
    """
    Step 5: epochs of minibatches over one iteration's answers, as roll_out returns them. Returns means over the mask
    and over the updates; first_ratio is the largest |ratio - 1| before the first update: 0 but for rounding, unless
    sampling and scoring disagree.
    """
    totals, n_updates, norms, first_ratio = {}, 0, [], 0.0
    lr, critic_lr = common.lr_at(step, cfg), common.lr_at(step, cfg, cfg.critic_lr)
    for rows in (rows for _ in range(cfg.epochs) for rows in torch.randperm(len(lengths)).chunk(cfg.minibatches)):
        measured = {}
        for b, share in micro_batches(batch, lengths, rows.to(run.device), cfg.grad_accum, run):
            idx, mask, old_logp = b['idx'], b['mask'], b['old_logp'] # (B, T), (B, T-1), (B, T-1)
            with run.autocast():
                if cfg.critic == 'shared':
                    logp, entropy, values = nets['policy']('logp_entropy_values', idx, mask, cfg.entropy_coef > 0)
                else:
                    logp, entropy = nets['policy']('logp_and_entropy', idx, mask, cfg.entropy_coef > 0)
                    values = nets['critic']('masked_values', idx, mask) # (B, T-1)
            pg_loss = policy_loss(logp, old_logp, b['advantages'], mask, cfg.clip)
            vf_loss = value_loss(values, b['old_values'], b['returns'], mask, cfg.value_clip)
            loss = pg_loss + (cfg.value_coef if cfg.critic == 'shared' else 1.0) * vf_loss
            if cfg.entropy_coef:
                loss = loss - cfg.entropy_coef * masked_mean(entropy, mask)
            run.backward(loss * share)

            with torch.no_grad():
                far, stats = ratio_stats(logp, old_logp, mask, cfg.clip)
                if n_updates == 0:
                    first_ratio = max(first_ratio, far.item())
                now = stats | dict(loss=loss, policy_loss=pg_loss, value_loss=vf_loss, value_clipfrac=masked_mean(
                    ((values - b['old_values']).abs() > cfg.value_clip).float(), mask))
                measured = {k: measured.get(k, 0.0) + v * share for k, v in now.items()}

        measured = {k: run.sum(v).item() for k, v in measured.items()}
        common.check_finite('the loss', measured['loss'], step + 1, cfg.out_dir)
        totals = {k: totals.get(k, 0.0) + v for k, v in measured.items()}
        n_updates += 1
        if cfg.early_stop_kl and measured['approx_kl'] > cfg.early_stop_kl:
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            break
        if ptx:
            ptx_step = step * cfg.epochs * cfg.minibatches + n_updates - 1
            examples = ptx.at(ptx_step)
            parts = common.split_by_tokens(examples, [len(ids) for ids, _ in examples], cfg.grad_accum, run.world_size)
            micro = [collate(run.rows(part)) for part in parts] # (B, T), (B, T-1) each
            n_tokens = run.sum(sum(mask.sum() for _, mask in micro)) # ()
            for idx, mask in micro:
                with run.autocast():
                    logp = nets['policy']('logp', idx.to(run.device), mask.to(run.device)) # (B, T-1), 0 where mask is
                run.backward(-cfg.ptx_coef * logp.sum() / n_tokens)
        norms.append(common.optimizer_step(optimizers['policy'], models.policy, lr, cfg.grad_clip, run.scaler,
                                           cfg.critic == 'shared')) # else the critic steps last
        common.check_finite('the gradient norm', norms[-1], step + 1, cfg.out_dir)
        if cfg.critic == 'separate':
            norm = common.optimizer_step(optimizers['critic'], models.critic, critic_lr, cfg.grad_clip, run.scaler)
            common.check_finite("the critic's gradient norm", norm, step + 1, cfg.out_dir)
    return {k: v / n_updates for k, v in totals.items()} | dict(
        grad_norm=sum(norms) / max(1, len(norms)), first_ratio=max(run.gather(first_ratio)), updates=len(norms))


def main(cfg):
    run = common.start(cfg)
    tok = load_tokenizer(cfg.policy)
    if cfg.ptx_coef and cfg.ptx_batch_size < run.world_size * cfg.grad_accum:
        fail(f"--ptx_batch_size={cfg.ptx_batch_size}: must be at least {run.world_size * cfg.grad_accum}, processes x "
             "grad_accum")
    models = load_models(cfg, run, tok)
    questions = read_records(cfg.prompts, 'prompts')
    if cfg.gold:
        check_gold(questions, cfg.prompts)
    prompts = encode_prompts(tok, questions, models.policy.config.block_size - cfg.max_new_tokens)
    batches = Batches([0] * len(prompts), cfg.batch_size * cfg.minibatches, cfg.seed) # in random order
    ptx = None
    if cfg.ptx_coef:
        ptx, _ = load_training_set(cfg.ptx_data, tok, models.policy.config.block_size, cfg.ptx_batch_size, cfg.seed)
    trained = [models.policy, models.critic] if cfg.critic == 'separate' else [models.policy]
    T, sampled = max(map(len, prompts)) + cfg.max_new_tokens, cfg.batch_size * cfg.minibatches // run.world_size
    memory.check(run, cfg, trained, T, cfg.max_new_tokens, cfg.max_new_tokens, [models.reward, models.reference],
                 sampled=min(sampled, 256))
    common.prepare_out_dir(run, cfg) # once all input is read: what is wrong with it costs no old checkpoint

    without_critic = cfg.critic == 'shared' and cfg.ptx_coef > 0 # the pass over ptx_data needs no value head
    nets = dict(policy=run.parallel(models.policy, cfg.compile, cfg.fsdp, cfg.checkpointing, without_critic))
    optimizers = dict(policy=common.make_optimizer(models.policy, cfg, eps=1e-5))
    if cfg.critic == 'separate':
        nets['critic'] = run.parallel(models.critic, cfg.compile, cfg.fsdp, cfg.checkpointing)
        optimizers['critic'] = common.make_optimizer(models.critic, cfg, eps=1e-5)
    state = common.load_checkpoint(run, cfg, models.policy, optimizers)
    if state and cfg.critic == 'separate':
        common.load_weights(models.critic, state['critic'])
    first = state['step'] if state else 0
    kl_coef = state['kl_coef'] if state and cfg.kl_target else cfg.kl_coef # adapted from step to step

    def save(step):
        critic = run.whole(models.critic).state_dict() if cfg.critic == 'separate' else {}
        common.save_checkpoint(run, cfg, models.policy, tok, step, optimizers, critic=critic, kl_coef=kl_coef)

    bar = common.training_bar(run, cfg, first)
    for step in bar:
        chosen = run.rows(batches.at(step))
        batch, lengths, measured = roll_out(models, [prompts[i] for i in chosen],
                                            [questions[i]['prompt'] for i in chosen], tok, cfg, kl_coef, run)
        measured = {k: (run.sum(v) / run.world_size).item() for k, v in measured.items()}
        updates = update(models, nets, optimizers, batch, lengths, cfg, run, step, ptx)
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            common.log(run, cfg, done, **measured, **updates, kl_coef=kl_coef, lr=common.lr_at(step, cfg))
            bar.set_postfix(reward=f"{measured['reward']:.3f}", kl=f"{measured['kl']:.2f}",
                            ended=f"{measured['ended']:.2f}")
        if cfg.kl_target:
            n = cfg.batch_size * cfg.minibatches
            kl_coef = adapt_kl_coef(kl_coef, measured['kl'], cfg.kl_target, n, cfg.kl_horizon)
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
