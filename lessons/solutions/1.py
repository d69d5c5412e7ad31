"""Solutions of lesson 1. Run this file to see exercise 1 and the cosines of exercise 3.

1. The mean of all K contains the answer's own reward, a K-th of it. So this part is taken off the gradient too, and
   (K - 1) / K of it is left: a half with K = 2. RLOO leaves the own reward out and stays at 1. Its error grows, because
   one other answer is a noisier baseline than three.
2. The variance is the mean of (r - b)^2 |grad log pi|^2, less a constant. It is least where b is the mean of r
   weighted by |grad log pi|^2. Against the plain mean this gains little, and nobody knows these weights for free.
3. No. Groups whose rewards lie close together are scaled up, and the others down. The mean of the estimates points
   another way than g: the cosine stays a little below 1, however many samples one takes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load
from lessons.world import REWARDS, expected, log_pi, new_policy
from reinforce import advantages

import torch

def best_baseline(pi, rewards, squares):
    """Return b () of least variance; all (156,): pi and rewards of each answer, and its |grad log pi|^2."""
    return (pi * rewards * squares).sum() / (pi * squares).sum()

def grpo_cosine(numbers, rewards, S, g):
    """Return the cosine of g (P,) and the mean gradient of kind 'grpo'; numbers, rewards: (B, K), S: (156, P)."""
    weights = torch.zeros(len(S)).index_add(0, numbers.flatten(), advantages(rewards, 'grpo').flatten()) # (156,)
    return torch.cosine_similarity(weights @ S, g, dim=0)

def exercise_1(n_samples=20480):
    """Return two shares with K = 2: of the mean of all K, and of RLOO."""
    lesson = load('1_policy_gradient')
    lesson.K = 2
    table = lesson.measure(0, n_samples)[2]
    *_, rloo, group = lesson.BASELINES
    return table[0.0, group][0], table[0.0, rloo][0]

def exercise_3(seed, n_samples=20480):
    """Return the cosine of g and the mean gradient: with GRPO, with RLOO."""
    lesson = load('1_policy_gradient')
    policy = new_policy(seed)
    logp = log_pi(policy) # (156,)
    S = torch.stack([lesson.flat_gradient(policy, x) for x in logp]) # (156, P)
    g = lesson.flat_gradient(policy, expected(logp)) # (P,)
    numbers, _ = lesson.sample(policy, n_samples)
    rloo = advantages(REWARDS[numbers].view(-1, 4), 'rloo').flatten() # (n_samples,)
    rloo = torch.zeros(len(S)).index_add(0, numbers, rloo) @ S # (P,)
    return (grpo_cosine(numbers.view(-1, 4), REWARDS[numbers].view(-1, 4), S, g).item(),
            torch.cosine_similarity(rloo, g, dim=0).item())

if __name__ == '__main__':
    print("K = 2: share of the mean of all K %.2f, of RLOO %.2f" % exercise_1())
    for seed in range(3):
        print("cosine with g: GRPO %.3f, RLOO %.3f" % exercise_3(seed))
