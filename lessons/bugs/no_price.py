"""The reward rises quickly, and the KL costs nothing. It seems too good."""
import ppo
from common.checkpoints import load_policy
from common.rewards import load_reward

STAGE = 'ppo'

def load_actors(cfg, run, tok, function=None, **overrides):
    policy = load_policy(cfg.policy, **overrides).to(run.device)
    reward = load_reward(cfg, run, tok, policy, function)
    return policy, reward, policy

PATCHES = [(ppo, load_actors)]
