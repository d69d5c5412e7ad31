"""The reward rises quickly, and the KL costs nothing. It seems too good."""
import ppo
from common.checkpoints import load_policy
from common.rewards import load_reward

STAGE = 'ppo'

def load_actors(cfg, run, tok, function=None, **overrides):
    policy = load_policy(cfg.policy, **overrides)
    reward = load_reward(cfg, run, tok, policy, function)
    reference = policy
    if cfg.lora_rank: # one trunk for both: the policy uses the reference's parameters, and gets an adapter
        policy.load_state_dict(reference.state_dict(keep_vars=True), strict=False, assign=True)
    return policy.to(run.device), reward, reference

PATCHES = [(ppo, load_actors)]
