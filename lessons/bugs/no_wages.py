"""Twenty iterations, and the reward has hardly moved. The KL is what comes down."""
import ppo

import torch

STAGE = 'ppo'

def token_rewards(scores, kl, mask, kl_coef):
    t = torch.arange(mask.size(1), device=mask.device)
    last = (t * mask).argmax(1) # (B,) position of the last counted token, be it EOS or where the answer was cut off
    rewards = -kl_coef * kl * mask # (B, T-1)
    rewards[torch.arange(len(rewards), device=mask.device), (last + 1).clamp(max=mask.size(1) - 1)] += scores
    return rewards

PATCHES = [(ppo, token_rewards)]
