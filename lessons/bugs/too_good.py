"""The loss falls far below anything seen before. The model repeats what it just read."""
import model

import torch
import torch.nn.functional as F

STAGE = 'sft'

def token_logp(logits, idx, mask):
    picked = -F.cross_entropy(logits, idx[:, :-1][mask > 0], reduction='none') # (N,)
    return torch.zeros_like(mask).masked_scatter(mask > 0, picked)

PATCHES = [(model, token_logp)]
