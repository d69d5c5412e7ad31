"""Everything works. But the gradients are several times a colleague's, and the policy loss is far from 0."""
import ppo

import torch

STAGE = 'ppo'

def whiten(x, mask, run=None):
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

PATCHES = [(ppo, whiten)]
