"""For four iterations all is well. Later the policy talks and talks, and a larger kl_coef makes it worse."""
import ppo

import torch

STAGE = 'ppo'

def token_rewards(scores, kl, mask, kl_coef):
    t = torch.arange(mask.size(1), device=mask.device)
    last = (t * mask).argmax(1) # (B,) position of the last counted token, be it EOS or where the answer was cut off
    rewards = kl_coef * kl * mask # (B, T-1)
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards

PATCHES = [(ppo, token_rewards)]
