"""An answer has one probability when it is written, and another one a moment later."""
import reinforce
from common.checkpoints import load_policy
from common.rewards import load_reward

STAGE = 'rloo'

def load_actors(cfg, run, tok, function=None, **overrides):
    policy = load_policy(cfg.policy, **overrides, dropout=0.1).to(run.device)
    reward = load_reward(cfg, run, tok, policy, function)
    return policy, reward, run.freeze(load_policy(cfg.policy).to(run.device))

PATCHES = [(reinforce, load_actors)]
