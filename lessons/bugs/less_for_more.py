"""The log looks right, and so does the policy. Yet it seems to take more samples than it should."""
import reinforce

import torch

STAGE = 'rloo'

def advantages(rewards, kind, baseline=0.0, scale_std=True):
    if kind == 'reinforce':
        return rewards - baseline
    if kind == 'rloo':
        others = (rewards.sum(0, keepdim=True) - rewards) / (rewards.size(0) - 1) # (B, K)
        return rewards - others
    if kind == 'grpo':
        centred = rewards - rewards.mean(1, keepdim=True) # (B, K)
        return centred * torch.rsqrt((centred ** 2).mean(1, keepdim=True) + 1e-8) if scale_std else centred
    raise ValueError(f"kind must be reinforce, rloo or grpo, got {kind!r}")

PATCHES = [(reinforce, advantages)]
