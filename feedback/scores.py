"""Score answers that exist already by a reward model."""

import torch

from common.batches import encode_rankings, pad
from common.rollout import frozen_rewards

@torch.no_grad()
def score_answers(reward_model, prompts, answers, device, rows=64):
    """Return a reward model's scores (B,) of answers to prompts; lists of ids."""
    idx = pad([p + a for p, a in zip(prompts, answers)]).to(device)
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)], device=device)
    return frozen_rewards(reward_model, idx, lengths, rows)

def score_records(reward_model, tok, records, block_size, name, device):
    """Score the `responses` of records; return [(record, scores)] of those that fit the context."""
    rows = encode_rankings(tok, records, block_size, name)
    scores = iter(score_answers(reward_model, [row.prompt for row in rows for _ in row.answers],
                                [answer for row in rows for answer in row.answers], device).tolist())
    return [(row.record, [next(scores) for _ in row.answers]) for row in rows]
