"""The reward levels off lower than it should. The answers get shorter at first, and then longer again."""
import itertools

from common import rollout
from common.batches import pad
from common.rollout import Rollouts

import torch

STAGE = 'ppo'
OPTIONS = dict(kl_coef=0.05)

def pack_turns(rows, eos, asked=()):
    flags = [[int(logp is not None and i != eos) for ids, logp in row for i in ids] for row in rows] # 1 = of an answer
    ends = [[at for at, (_, logp) in zip(itertools.accumulate(len(ids) for ids, _ in row), row) if logp is not None]
            for row in rows]
    mask = pad(flags)[:, 1:].float() # (B, T-1)
    logp = torch.zeros_like(mask)
    logp[mask > 0] = torch.tensor([x for row in rows for ids, logps in row for i, x in zip(ids, logps or ())
                                   if i != eos])
    idx = pad([[i for ids, _ in row for i in ids] for row in rows]) # (B, T)
    ended = torch.tensor([float(row[-1][0][-1] == eos) for row in rows]) # (B,)
    return Rollouts(idx, mask, logp, torch.tensor([at[-1] for at in ends]), ended, ends, list(asked))

PATCHES = [(rollout, pack_turns)]
