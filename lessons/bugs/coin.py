"""The reward model has seen thousands of comparisons, and it still tosses a coin."""
import itertools

import reward
from common import rollout
from common.batches import Answers, collate

import torch

STAGE = 'reward'

def collate_answers(rows):
    examples = [(row.prompt + answer, [0] * len(row.prompt) + [1] * len(answer))
                for row in rows for answer in row.answers]
    groups = [len(row.answers) for row in rows]
    lengths, sizes = torch.tensor([(mask.index(1), sum(mask)) for ids, mask in examples]).unbind(1) # (N,) each
    pairs = [(first + i, first + j) for first, row in zip(itertools.accumulate([0, *groups]), rows)
             for i, a in enumerate(row.record.get('ranks', [])) for j, b in enumerate(row.ranks) if a < b]
    pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return Answers(*collate(examples), lengths, sizes, pairs, torch.tensor(groups))

PATCHES = [(rollout, collate_answers), (reward, collate_answers)]
