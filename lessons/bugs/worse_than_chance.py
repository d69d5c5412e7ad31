"""The loss falls as it should. The accuracy falls with it, below one half."""
import reward

import torch.nn.functional as F

STAGE = 'reward'

def ranking_loss(scores, ranks):
    there = ranks >= 0
    better = ((ranks[:, :, None] > ranks[:, None, :]) & there[:, :, None] & there[:, None, :]).float() # (B, K, K)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) # (B, K, K), [b, w, l]
    n_pairs = better.sum((1, 2)) # (B,)
    per_prompt = (losses * better).sum((1, 2)) / n_pairs.clamp(min=1) # (B,)
    return per_prompt.sum() / (n_pairs > 0).sum().clamp(min=1)

PATCHES = [(reward, ranking_loss)]
