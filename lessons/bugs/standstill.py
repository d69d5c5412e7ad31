"""The critic learns, and the policy stands still, whatever the learning rate."""
import ppo
from common.rollout import masked_mean

import torch

STAGE = 'ppo'

def policy_loss(logp, old_logp, advantages, mask, clip):
    ratio = ((logp - old_logp) * mask).exp().detach() # (B, T-1), 1 outside the mask
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.max(unclipped, clipped), mask) # max(-a, -b) = -min(a, b)

PATCHES = [(ppo, policy_loss)]
