"""The reward model was right nine times in ten. In PPO the reward falls, and the answers shrink."""
from common import rewards
from common.rollout import in_chunks

import torch

STAGE = 'ppo'

def frozen_rewards(model, idx, lengths, rows=64):
    out = torch.zeros(len(idx), device=idx.device)
    return in_chunks(lambda c, T: model.rewards(idx[c, :T], torch.full_like(lengths[c], T)), lengths, rows, out)

PATCHES = [(rewards, frozen_rewards)]
