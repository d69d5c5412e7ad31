"""An answer has one probability when it is written, and another one a moment later."""
import reinforce
from common.checkpoints import load_policy
from common.rewards import load_reward

STAGE = 'rloo'

def load_actors(cfg, run, tok, function=None, **overrides):
    policy = load_policy(cfg.policy, **overrides, dropout=0.1)
    reward = load_reward(cfg, run, tok, policy, function)
    reference = run.freeze(load_policy(cfg.policy)).to(run.device)
    if cfg.lora_rank: # one trunk for both: the policy uses the reference's parameters, and gets an adapter
        policy.load_state_dict(reference.state_dict(keep_vars=True), strict=False, assign=True)
    return policy.to(run.device), reward, reference

PATCHES = [(reinforce, load_actors)]
