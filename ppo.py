"""Train a policy by proximal policy optimisation (PPO) from a reward model or a reward function.

PPO: Schulman et al. 2017, https://arxiv.org/abs/1707.06347. GAE: Schulman et al. 2016,
https://arxiv.org/abs/1506.02438. For language models: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, and Ouyang
et al. 2022 (InstructGPT), https://arxiv.org/abs/2203.02155. Four models: the policy, the critic (it starts as the
reward model, without one as the policy), the reward model, and the reference (the policy before training, frozen).

    python ppo.py config/toy/ppo.py
    python ppo.py config/toy/ppo.py --critic=shared --out_dir=out/toy/ppo_shared
    python ppo.py config/toy/ppo.py --reward_model= --reward=data.toy.world:gold --out_dir=out/toy/ppo_gold

One iteration:
    1. roll out: sample n_answers answers to each prompt at temperature 1, no top-k or top-p, recording log pi_old
    2. score: the reward r(x, y) (common/rewards.py), less a penalty where an answer does not end
    3. reward per token: the KL penalty -beta * (log pi_old - log pi_ref), plus the score on the last token
    4. advantages by GAE from the critic's values, whitened
    5. several epochs of the clipped surrogate and the clipped value loss

docs/differences.md says what differs from the papers.
"""

from collections import namedtuple
from dataclasses import dataclass

from common.batches import Batches, collate, encode_prompts, load_training_set, own_parts
from common.checkpoints import load_checkpoint, load_policy, load_reward_model, prepare_out_dir, save_checkpoint
from common.options import fail, launch, require, unread
from common.records import files_of, read_records
from common.rewards import RolloutOptions, load_actors, mean_gold
from common.rollout import (describe, describe_critic, frozen, kl_k1, masked_mean, micro_batches, minibatches,
                            ratio_stats, sample_rollouts, whiten)
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, check_finite, finish_step, lr_at, make_optimizer, optimizer_step, training_bar
from feedback.functions import load_functions
from lab.per_token import add_samples, earlier_samples

import torch

@dataclass
class Config(RolloutOptions):
    out_dir: str = 'out/ppo' # the checkpoint
    critic: str = 'separate' # separate: a model of its own; shared: a value head on the policy
    kl_coef: float = 0.05 # beta, the weight of the KL penalty, per nat
    kl_target: float = 0.0 # above 0: adapt beta so that the KL per answer comes to this many nats (Ziegler et al. 2.2)
    kl_gain: float = 0.1 # K: how fast beta adapts
    whiten_rewards: bool = False # per-token rewards to variance 1, mean kept
    gamma: float = 1.0 # discount
    lam: float = 0.95 # lambda of GAE
    epochs: int = 4 # passes over the answers of an iteration
    value_clip: float = 0.2 # of the critic's change
    value_coef: float = 0.1 # weight of the value loss where the critic is shared
    entropy_coef: float = 0.0 # entropy bonus, per nat
    early_stop_kl: float = 0.0 # above 0: end an iteration's epochs once KL(old || new) per token passes this
    ptx_coef: float = 0.0 # above 0: weight of the cross-entropy on ptx_data (PPO-ptx, InstructGPT equation 2)
    ptx_data: str = '' # demonstrations or text
    ptx_batch_size: int = 32 # rows of ptx_data per optimizer step
    critic_lr: float = 1e-5 # of a separate critic

    def __post_init__(self):
        super().__post_init__()
        require(self, critic=(self.critic in ('separate', 'shared'), 'separate or shared'),
                gamma=(0 <= self.gamma <= 1, 'between 0 and 1'), lam=(0 <= self.lam <= 1, 'between 0 and 1'),
                kl_coef=(self.kl_coef > 0 or self.kl_target == 0, 'above 0 with kl_target, which multiplies it'),
                kl_gain=(0 < self.kl_gain < 5, 'above 0 and below 5'), # beta stays above 0
                ptx_data=((self.ptx_data != '') == (self.ptx_coef > 0), 'given together with ptx_coef'))
        unread(self, self.critic == 'shared', 'critic=shared', 'value_coef')
        unread(self, self.kl_target, 'kl_target', 'kl_gain')
        unread(self, self.ptx_coef, 'ptx_coef', 'ptx_batch_size')

def token_rewards(scores, kl, mask, kl_coef):
    """Return the reward per token (B, T-1) (Ziegler et al. 2019, equation 2).

        r_t = -beta * (log pi_old - log pi_ref)_t, plus r(x, y) at the answer's last token

    scores: (B,). kl: (B, T-1) log pi_old - log pi_ref. mask: (B, T-1), 1 = answer, EOS included.
    """
    t = torch.arange(mask.size(1), device=mask.device)
    last = (t * mask).argmax(1) # (B,) position of the last counted token, be it EOS or where the answer was cut off
    rewards = -kl_coef * kl * mask # (B, T-1)
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards

def gae(rewards, values, mask, gamma, lam):
    """Estimate advantages and returns by GAE (Schulman et al. 2016, equations 11, 12 and 16).

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          return_t = A_t + V_t

    t + 1 is the next token that the policy wrote: what a user says in between takes no step. V and A are 0 after the
    last one. All (B, T-1). Returns advantages and returns, (B, T-1) each, 0 outside the mask.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) # (B,)
    for t in reversed(range(values.size(1))):
        written = mask[:, t] > 0 # (B,)
        delta = rewards[:, t] + gamma * next_value - values[:, t] # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = torch.where(written, values[:, t], next_value)
        next_advantage = torch.where(written, advantages[:, t], next_advantage)
    return advantages, (advantages + values) * mask

def policy_loss(logp, old_logp, advantages, mask, clip):
    """Return the clipped surrogate () (Schulman et al. 2017, equation 7, negated).

        ratio = pi / pi_old        L = mean over counted tokens of -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A)

    All (B, T-1). At ratio 1 its gradient is that of -A log pi: plain REINFORCE (Williams 1992).
    """
    ratio = ((logp - old_logp) * mask).exp() # (B, T-1), 1 outside the mask
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(unclipped, clipped), mask) # max(-a, -b) = -min(a, b)

def value_loss(values, old_values, returns, mask, clip):
    """Return the clipped value loss () (Huang et al. 2022, The 37 implementation details of PPO, detail 9).

        V_clipped = V kept within clip of V_old    L = mean over counted tokens of 1/2 max((V - R)^2, (V_clipped - R)^2)

    V_old is the value at the time of sampling, R the return. All (B, T-1).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip) # (B, T-1)
    return masked_mean(0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)

def adapt_kl_coef(kl_coef, kl, target, gain):
    """Adapt beta to the KL per answer (Ziegler et al. 2019, section 2.2; the gain is their K, 0.1).

        e = clamp(KL / target - 1, -0.2, 0.2)          beta <- beta (1 + K e)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)

Models = namedtuple('Models', 'policy critic reward reference') # reward: a Reward; a shared critic is the policy

def load_models(cfg, run, tok, function=None):
    """Load the four models; a separate critic starts as the reward model, its value head as the reward head.

    Without a reward model it starts as the policy, with a value head of zeros. function: of --reward.
    """
    shared = cfg.critic == 'shared'
    policy, reward, reference = load_actors(cfg, run, tok, function, value_head=shared)
    if shared:
        if not policy.config.bias: # the value head brings a final bias, which a saved policy has not
            policy.ln_f.bias.requires_grad_(False)
        return Models(policy, policy, reward, reference)
    if cfg.reward_model:
        critic, trunk = load_reward_model(files_of(cfg.reward_model)[0], value_head=True), reward.models[0]
    else:
        critic, trunk = load_policy(cfg.policy, value_head=True), reference
    critic.reward_head, critic.config.reward_head = None, False # its value head took over
    if cfg.lora_rank: # one trunk for both; so PPO has two for four models
        critic.load_state_dict(trunk.state_dict(keep_vars=True), strict=False, assign=True)
    return Models(policy, critic.to(run.device), reward, reference)

def ppo_loss(models, b, cfg, run):
    """Return the loss (), its metrics, and the largest |ratio - 1| (); b: part of the batch.

        L = policy_loss + value_coef value_loss - entropy_coef entropy          (Schulman et al. 2017, equation 9)
    """
    idx, mask, shared = b['idx'], b['mask'], models.critic is models.policy # (B, T), (B, T-1)
    with run.autocast():
        logp, entropy, values = models.policy.logp_entropy_values(idx, mask, cfg.entropy_coef > 0, b['groups'])
        values = values if shared else models.critic.values(idx, mask, b['groups']) # (B, T-1) each
    pg_loss = policy_loss(logp, b['old_logp'], b['advantages'], mask, cfg.clip)
    vf_loss = value_loss(values, b['old_values'], b['returns'], mask, cfg.value_clip)
    loss = pg_loss + (cfg.value_coef if shared else 1.0) * vf_loss # a separate critic has an optimizer of its own
    if cfg.entropy_coef:
        loss = loss - cfg.entropy_coef * masked_mean(entropy, mask)
    largest, stats = ratio_stats(logp, b['old_logp'], mask, cfg.clip)
    stats |= dict(loss=loss, policy_loss=pg_loss, value_loss=vf_loss,
                  value_clipfrac=masked_mean(((values - b['old_values']).abs() > cfg.value_clip).float(), mask))
    return loss, stats, largest

def ptx_backward(policy, examples, cfg, run):
    """Add the gradient of ptx_coef L; return L (Ouyang et al. 2022, InstructGPT, equation 2, second term, negated).

        L = -mean over the tokens of examples (ids, mask) of log pi
    """
    n_tokens, total = sum(sum(mask[1:]) for _, mask in examples), 0.0 # nothing predicts a row's first token
    for part in own_parts(examples, [len(ids) for ids, _ in examples], cfg, run):
        idx, mask = (x.to(run.device) for x in collate(part)) # (B, T), (B, T-1)
        with run.autocast():
            logp = policy.logp(idx, mask) # (B, T-1), 0 where mask is
        run.backward(-cfg.ptx_coef * logp.sum() / n_tokens)
        total -= logp.detach().sum() / n_tokens
    return run.sum(total).item()

def roll_out(models, prompts, records, tok, cfg, kl_coef, run, gold=None, user=None):
    """Make steps 1 to 4 for prompts, lists of ids, and their records.

    gold, user: see feedback/functions.py. Returns tensors, idx (B, T) and the rest (B, T-1), lengths (B,), and metrics.
    """
    # 1. roll out: sample answers, or dialogues with the user, at temperature 1, recording log pi_old
    with run.autocast():
        rolls = sample_rollouts(models.policy, prompts, records, tok, cfg, user).to(run.device)
    idx, mask, old_logp, lengths = rolls.idx, rolls.mask, rolls.logp, rolls.lengths # (B, T), (B, T-1) twice, (B,)
    with run.autocast():
        rows = cfg.batch_size // cfg.grad_accum
        ref_logp = frozen(models.reference.logp, idx, mask, lengths, rows, rolls.K) # (B, T-1)
        values = frozen(models.critic.values, idx, mask, lengths, K=rolls.K) # (B, T-1)
        reward, earlier, parts = models.reward(rolls) # (B,), and of it (B, T-1) at the ends of earlier answers
    # 2. score: less a penalty where an answer does not end
    scores = reward - cfg.missing_eos_penalty * (1 - rolls.ended) # (B,)
    # 3. reward per token: the KL's price everywhere, the score on the last token
    rewards = token_rewards(scores - earlier.sum(1), kl_k1(old_logp, ref_logp), mask, kl_coef) + earlier # (B, T-1)
    if cfg.whiten_rewards:
        rewards = whiten(rewards, mask, run) + masked_mean(rewards, mask, run) * mask
    # 4. advantages by GAE, whitened
    advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam) # (B, T-1) each
    batch = dict(idx=idx, mask=mask, old_logp=old_logp, ref_logp=ref_logp, scores=scores[:, None].expand_as(mask),
                 rewards=rewards, old_values=values, returns=returns, advantages=whiten(advantages, mask, run))
    measured = describe(rolls, ref_logp, reward, scores, run) | parts | describe_critic(values, returns, mask, run)
    return batch, lengths, measured | mean_gold(gold, rolls)

def update(models, optimizers, batch, lengths, cfg, run, step, ptx=None):
    """Make step 5 on one iteration's answers, as roll_out returns them; return means over the updates.

    first_ratio: the largest |ratio - 1| before the first update, 0 but for rounding unless sampling and scoring differ.
    """
    updates, first_ratio, lr = [], 0.0, lr_at(step, cfg, cfg.lr)
    # 5. several epochs of the clipped surrogate and the clipped value loss
    for rows in minibatches(len(lengths), cfg):
        means = Means()
        for b, share in micro_batches(batch, lengths, rows.to(run.device), cfg, run):
            loss, measured, largest = ppo_loss(models, b, cfg, run)
            run.backward(loss * share)
            means.add(measured, share)
            first_ratio = first_ratio if updates else max(first_ratio, largest.item())
        updates.append(measured := means.sum(run))
        check_finite(cfg, step, 'the loss', measured['loss'])
        if cfg.early_stop_kl and measured['approx_kl'] > cfg.early_stop_kl:
            models.policy.zero_grad(), models.critic.zero_grad() # this update is not made
            break
        if ptx:
            examples = ptx.at(step * cfg.epochs * cfg.minibatches + len(updates) - 1)
            measured['ptx_loss'] = ptx_backward(models.policy, examples, cfg, run)
        last = 'critic' not in optimizers # a separate critic steps after the policy
        measured['grad_norm'] = optimizer_step(run, cfg, step, models.policy, optimizers['policy'], lr, last)
        if 'critic' in optimizers:
            optimizer_step(run, cfg, step, models.critic, optimizers['critic'], lr_at(step, cfg, cfg.critic_lr))
    every = {k: [line[k] for line in updates if k in line] for k in updates[0]} # one that is not made has no grad_norm
    return {k: sum(x) / len(x) for k, x in every.items()} | dict(
        first_ratio=max(run.gather(first_ratio)), updates=len(every.get('grad_norm', [])), lr=lr)

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.policy, 'policy')
    if cfg.ptx_coef and cfg.ptx_batch_size < (least := run.world_size * cfg.grad_accum):
        fail(f"--ptx_batch_size={cfg.ptx_batch_size}: must be at least {least}, processes x grad_accum")
    records = read_records(cfg.prompts, 'prompts')
    reward, gold, user = load_functions(cfg, records)
    models = load_models(cfg, run, tok, reward)
    block_size = models.policy.config.block_size
    prompts = encode_prompts(tok, records, block_size - cfg.max_new_tokens)
    n_prompts = cfg.batch_size * cfg.minibatches // cfg.n_answers # of an iteration
    batches = Batches([0] * len(prompts), n_prompts, cfg.seed) # of equal lengths: in random order
    ptx = load_training_set(cfg.ptx_data, tok, block_size, cfg.ptx_batch_size, cfg.seed)[0] if cfg.ptx_coef else None
    prepare_out_dir(run, cfg)

    trained = dict(policy=models.policy) | (dict(critic=models.critic) if cfg.critic == 'separate' else {})
    for model in trained.values():
        run.prepare(model, cfg)
    optimizers = {name: make_optimizer(model, cfg, eps=1e-5) for name, model in trained.items()}
    state = load_checkpoint(run, cfg, models.policy, optimizers)
    if state and cfg.critic == 'separate':
        models.critic.load_state_dict(state['critic'], strict=False)
    kl_coef = state['kl_coef'] if state and cfg.kl_target else cfg.kl_coef # adapted from step to step
    samples = earlier_samples(cfg, state) # lines of samples.jsonl

    def save(step):
        critic = {k: p for k, p in models.critic.named_parameters() if p.requires_grad} if 'critic' in trained else {}
        add_samples(samples, step, models, batch, lengths, tok, cfg, run)
        save_checkpoint(run, cfg, models.policy, tok, step, optimizers, samples, critic=critic, kl_coef=kl_coef)

    bar = training_bar(run, cfg, state)
    for step in bar:
        chosen = run.rows(batches.at(step))
        batch, lengths, measured = roll_out(models, [prompts[i] for i in chosen], [records[i] for i in chosen],
                                            tok, cfg, kl_coef, run, gold, user)
        measured = {k: (run.sum(v) / run.world_size).item() for k, v in measured.items()} | dict(kl_coef=kl_coef)
        measured |= update(models, optimizers, batch, lengths, cfg, run, step, ptx)
        if cfg.kl_target:
            kl_coef = adapt_kl_coef(kl_coef, measured['kl'], cfg.kl_target, cfg.kl_gain)
        finish_step(run, cfg, bar, step + 1, measured, ['reward', 'kl', 'ended'], save)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
