"""The policy learns well. The critic's loss is larger after twenty iterations than at the start."""
import ppo
from common.rollout import whiten

import torch

STAGE = 'ppo'

def gae(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0]) # (B,)
    for t in reversed(range(values.size(1))):
        written = mask[:, t] > 0 # (B,)
        delta = rewards[:, t] + gamma * next_value - values[:, t] # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = torch.where(written, values[:, t], next_value)
        next_advantage = torch.where(written, advantages[:, t], next_advantage)
    return advantages, (whiten(advantages, mask) + values) * mask

PATCHES = [(ppo, gae)]
