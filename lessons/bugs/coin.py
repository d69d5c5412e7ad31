"""The reward model has seen thousands of comparisons, and it still tosses a coin."""
from common import rollout
from common.batches import Answers, pad

import torch

STAGE = 'reward'

def collate_answers(rows):
    ids, positions, parts, sources, targets, owners, last, sizes, pairs = ([] for _ in range(9))
    T = max(row.length for row in rows)
    for b, (prompt, answers, record) in enumerate(rows):
        P, first, ranks = len(prompt), len(sizes), record.get('ranks', [])
        row, at, part = list(prompt), list(range(P)), [0] * P
        for k, answer in enumerate(answers, 1):
            here = b * T + len(row) # where this answer starts in the flattened batch
            sources += [b * T + P - 1] + list(range(here, here + len(answer) - 1))
            targets += answer
            owners += [len(sizes)] * len(answer)
            last.append(b * T + T - 1)
            sizes.append(len(answer))
            row += answer
            at += range(P, P + len(answer))
            part += [k] * len(answer)
        pairs += [(first + i, first + j) for i, a in enumerate(ranks) for j, c in enumerate(ranks) if a < c]
        ids.append(row), positions.append(at), parts.append(part)
    flat = (torch.tensor(x, dtype=torch.long) for x in (sources, targets, owners, last, sizes))
    return Answers(pad(ids), pad(positions), pad(parts), *flat, torch.tensor(pairs, dtype=torch.long).view(-1, 2))

PATCHES = [(rollout, collate_answers)]
