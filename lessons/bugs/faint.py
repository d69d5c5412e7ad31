"""The losses are a fraction of a colleague's, and they change when one long answer joins the batch."""
import ppo

import torch

STAGE = 'ppo'

def masked_mean(x, mask, run=None):
    total, n = (x * mask).sum(), torch.ones_like(mask).sum()
    if run is not None:
        total, n = run.sum(total), run.sum(n)
    return total / n.clamp(min=1)

PATCHES = [(ppo, masked_mean)]
