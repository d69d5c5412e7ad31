"""The reward model was right nine times in ten. In PPO the reward stays where it was, and the answers shrink."""
from common import rewards
from common.rollout import in_chunks

import torch

STAGE = 'ppo'

def frozen_rewards(model, idx, lengths, rows=64, K=1):
    fn = lambda c, T, groups: model.rewards(idx[c, :T], torch.full_like(lengths[c], T), groups)
    return in_chunks(fn, lengths, rows, torch.zeros(len(idx), device=idx.device), K)

PATCHES = [(rewards, frozen_rewards)]
