"""Solutions of lesson 4. Run this file to see exercise 1 in numbers.

1. At lambda = 1 there is still no bias: a number taken off every reward still to come is a baseline, see lesson 1. The
   noise grows. At lambda = 0 the bias is large. The error cancels in V_{t+1} - V_t, but not at the last token, where V
   after the end is 0: there delta is 5 too low. The critic says "the end costs 5", and the policy learns not to end.
2. The sum of the next n rewards, and the critic for the rest. Near the end fewer than n are left.
3. (1 - lambda) lambda^(n - 1), and for the last one all that is missing to 1, lambda^(left - 1): further ahead there is
   nothing more to see.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load

import torch

def n_step(rewards, values, n):
    """Return the n-step advantages (T,) of one answer, rewards and values (T,); V is 0 after the last token."""
    T = len(rewards)
    ahead = torch.cat([values, torch.zeros(n)])[n:] # V_{t+n}, (T,)
    return torch.stack([rewards[t:t + n].sum() for t in range(T)]) + ahead - values

def weights(lam, left):
    """Return a list of the weights of n = 1, ..., left; beyond the end all n_step are the same."""
    return [(1 - lam) * lam ** (n - 1) for n in range(1, left)] + [lam ** (left - 1)]

def exercise_1(offset, seed=0):
    """Return {lambda: (bias, noise)} of the exact critic, every value of it offset too high."""
    lesson = load('4_gae')
    lesson.OFFSET = offset
    found = lesson.measure(seed)['exact']
    return {lam: found[lam] for lam in (0.0, 0.5, 1.0)}

if __name__ == '__main__':
    for offset in (0.0, 5.0):
        for lam, (bias, noise) in exercise_1(offset).items():
            print(f"offset {offset:.0f}, lambda {lam}: bias {bias:.2f}, noise {noise:.2f}")
