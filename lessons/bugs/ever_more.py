"""The reward levels off as it should. The critic expects more with every iteration."""
import ppo

import torch

STAGE = 'ppo'

def gae(rewards, values, mask, gamma, lam):
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0]) # (B,)
    next_value = values.gather(1, mask.cumsum(1).argmax(1, keepdim=True))[:, 0] # (B,)
    for t in reversed(range(values.size(1))):
        written = mask[:, t] > 0 # (B,)
        delta = rewards[:, t] + gamma * next_value - values[:, t] # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = torch.where(written, values[:, t], next_value)
        next_advantage = torch.where(written, advantages[:, t], next_advantage)
    return advantages, (advantages + values) * mask

PATCHES = [(ppo, gae)]
