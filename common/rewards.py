"""Reward answers: by reward models, a function of one's own, a policy's likelihood, or a sum of these.

    r(x, y) = R(x, y) + w f(x, y) + b l(x, y) - p |y|          each part where an option names it

R: --reward_model; of several an ensemble (Coste et al. 2023, https://arxiv.org/abs/2310.02743, section 3). f: --reward,
a Python function, w: --reward_weight. l: --reward_policy, a policy as its own reward model, b: --reward_beta. |y|: the
answer's tokens, p: --length_penalty. In a dialogue y is all that the policy says, with --turn_rewards each turn.
"""

from dataclasses import dataclass, replace

import torch

from common.checkpoints import load_policy, load_reward_model
from common.options import TrainOptions, require, unread
from common.records import files_of
from common.rollout import frozen, frozen_rewards, load_frozen

@dataclass
class RolloutOptions(TrainOptions):
    """Hold the options of the scripts that sample answers and reward them: ppo and reinforce."""
    policy: str = 'out/sft' # where the policy starts, a folder or a model on the hub; also the reference
    prompts: str = '' # prompt records
    n_answers: int = 1 # K, answers per prompt
    max_new_tokens: int = 64 # longest answer, EOS included
    reward_model: str = '' # a folder or a model on the hub, or several; empty = out/reward without another reward
    ensemble: str = 'mean' # of several: mean, min, or lcb = mean - lcb_coef * standard deviation
    lcb_coef: float = 1.0
    reward: str = '' # MODULE:FUNCTION or FILE.py:FUNCTION of (record, response); this runs that file
    reward_weight: float = 1.0 # of what --reward returns
    reward_policy: str = '' # a language model: its mean log pi(y|x) per token is the reward, as in RRHF
    reward_reference: str = '' # with it log pi(y|x) - log pi_reference(y|x) is, as in DPO
    reward_beta: float = 1.0 # weight of --reward_policy
    length_penalty: float = 0.0 # taken off per token of an answer
    missing_eos_penalty: float = 1.0 # taken off the score of an answer that does not end
    user: str = '' # MODULE:FUNCTION of (record, messages), what a user says to an answer, None to end: dialogues
    max_turns: int = 1 # with user: answers in a dialogue
    turn_rewards: bool = False # with user: a reward for each answer, not only for the last
    minibatches: int = 1 # optimizer steps per epoch
    clip: float = 0.2 # how far below 1, and above it, the probability ratio is followed
    max_steps: int = 100 # iterations
    batch_size: int = 64 # answers per optimizer step; an iteration samples batch_size * minibatches
    lr: float = 1e-5
    warmup_steps: int = 0 # iterations
    save_every: int = 50 # iterations between checkpoints; 0 = only at the end
    log_every: int = 1
    show: int = 0 # answers that every save describes token by token in out_dir/samples.jsonl, for microscope.py
    gold: str = '' # as --reward: also log this score, which the policy never sees, as in data.toy.world:gold

    def __post_init__(self):
        super().__post_init__()
        if not (self.reward_model or self.reward or self.reward_policy):
            self.reward_model = 'out/reward'
        models = files_of(self.reward_model)
        require(self, prompts=(self.prompts != '', 'a file of prompts'), max_steps=(self.max_steps >= 1, 'at least 1'),
                ensemble=(self.ensemble in ('mean', 'min', 'lcb') and (len(models) > 1 or self.ensemble == 'mean'),
                          'mean, min or lcb, with several reward models'),
                reward_model=(all(models) or len(models) == 1, 'folders, separated by commas'),
                reward_reference=(not self.reward_reference or self.reward_policy, 'empty without reward_policy'),
                max_turns=(self.max_turns >= 2 if self.user else self.max_turns == 1, 'at least 2 with user, else 1'),
                turn_rewards=(not self.turn_rewards or self.user, 'False without user'),
                n_answers=(self.n_answers >= 1, 'at least 1'),
                show=(self.show <= self.batch_size * self.minibatches, 'at most batch_size * minibatches'))
        unread(self, self.ensemble == 'lcb', 'ensemble=lcb', 'lcb_coef')
        unread(self, self.reward, 'reward', 'reward_weight')
        unread(self, self.reward_policy, 'reward_policy', 'reward_beta')

def mean_gold(gold, rolls):
    """Return the mean gold score () of Rollouts' last answers as {'gold': ()}; {} without gold."""
    return dict(gold=torch.tensor([gold(*asked[-1]) for asked in rolls.asked]).mean()) if gold else {}

def combine(scores, how, lcb_coef=1.0):
    """Combine the scores (M, N) of M reward models to (N,) (Coste et al. 2023, section 3.2).

        mean    the mean         min    the least (worst-case optimisation)
        lcb     mean - lcb_coef * std, std of the M scores (a lower confidence bound; their UWO takes the variance)
    """
    if how == 'min':
        return scores.min(0)[0]
    if how == 'lcb':
        return scores.mean(0) - lcb_coef * scores.std(0, unbiased=False)
    return scores.mean(0)

def likelihood(policy, reference, rolls):
    """Score answers (B,) by a policy, as RRHF and DPO do inside.

        mean over the answer's tokens of log pi            (Yuan et al. 2023, equation 1)
        log pi(y|x) - log pi_ref(y|x), with a reference    (Rafailov et al. 2023, equation 5, less beta log Z(x))
    """
    logp, *ref_logp = [frozen(model.logp, rolls.idx, rolls.mask, rolls.lengths, K=rolls.K).sum(1)
                       for model in (policy, reference) if model] # (B,) each
    return logp - ref_logp[0] if ref_logp else logp / rolls.mask.sum(1)

class Reward:
    """Reward Rollouts; see this file's docstring. models: reward models; policy, reference: for `likelihood`."""

    def __init__(self, models=(), function=None, policy=None, reference=None, cfg=None):
        self.models, self.function, self.policy, self.reference, self.cfg = models, function, policy, reference, cfg

    def parts(self, rolls):
        """Return {name: (B,)}, whose sum is the reward of the last answers."""
        parts, cfg, device = {}, self.cfg, rolls.idx.device
        if self.models:
            scores = torch.stack([frozen_rewards(model, rolls.idx, rolls.lengths, K=rolls.K)
                                  for model in self.models]) # (M, B)
            parts['reward_model'] = scores[0] if len(scores) == 1 else combine(scores, cfg.ensemble, cfg.lcb_coef)
        if self.function:
            values = [self.function(*asked[-1]) for asked in rolls.asked]
            parts['reward_function'] = cfg.reward_weight * torch.tensor(values, device=device)
        if self.policy:
            parts['reward_policy'] = cfg.reward_beta * likelihood(self.policy, self.reference, rolls)
        if cfg and cfg.length_penalty:
            parts['length_penalty'] = -cfg.length_penalty * rolls.mask.sum(1)
        return parts

    def __call__(self, rolls):
        """Return rewards (B,), how much of them belongs to earlier answers' ends (B, T-1), and means of the parts."""
        earlier = torch.zeros_like(rolls.mask)
        if self.cfg and self.cfg.turn_rewards:
            turns = [(b, start, end) for b, ends in enumerate(rolls.ends) for start, end in zip([0, *ends], ends)]
            rows, starts, ends = torch.tensor(turns, device=earlier.device).unbind(1) # (N,) each
            t = torch.arange(1, rolls.idx.size(1), device=earlier.device) # the token that position t-1 describes
            turn = (t >= starts[:, None]) & (t < ends[:, None]) # (N, T-1)
            parts = self.parts(replace(rolls, K=1, idx=rolls.idx[rows], mask=rolls.mask[rows] * turn, lengths=ends,
                                       asked=[[one] for asked in rolls.asked for one in asked]))
            last = ends == rolls.lengths[rows] # (N,)
            reward = sum(parts.values())
            earlier[rows[~last], ends[~last] - 2] = reward[~last] # at the position that describes its last token
            reward = reward[last] + earlier.sum(1)
        else:
            parts = self.parts(rolls)
            reward = sum(parts.values())
        measured = {name: x.mean() for name, x in parts.items()} if len(parts) > 1 else {}
        if self.cfg and self.cfg.user:
            measured['turns'] = torch.tensor([float(len(ends)) for ends in rolls.ends], device=earlier.device).mean()
        return reward, earlier, measured

def load_reward(cfg, run, tok, policy, function=None):
    """Load what the options name as a Reward; policy: whose tokens and context the models must fit."""
    load = lambda option, load_model, folder: load_frozen(load_model, folder, option, policy, tok, run)
    models = [load('reward_model', load_reward_model, folder) for folder in filter(None, files_of(cfg.reward_model))]
    others = [load(option, load_policy, folder) if (folder := getattr(cfg, option)) else None
              for option in ('reward_policy', 'reward_reference')]
    return Reward(models, function, *others, cfg)

def load_actors(cfg, run, tok, function=None, **overrides):
    """Load policy (with overrides of its configuration), Reward (function: of --reward), reference (frozen policy)."""
    policy = load_policy(cfg.policy, **overrides)
    reward = load_reward(cfg, run, tok, policy, function)
    reference = run.freeze(load_policy(cfg.policy)).to(run.device)
    if cfg.lora_rank: # one trunk for both: the policy uses the reference's parameters, and gets an adapter
        policy.load_state_dict(reference.state_dict(keep_vars=True), strict=False, assign=True)
    return policy.to(run.device), reward, reference
