"""Solutions of lesson 2. Run this file to see exercises 1 and 3 in numbers.

1. The person of noise 1. Twice the rewards with twice the noise feels the same, but for the factor 2, and a factor
   changes no preference. A choice shows rewards in units of the person's noise, and nothing else.
2. Odds multiply: s_a - s_c = (s_a - s_b) + (s_b - s_c), and the odds are e to these differences. 4 times 9 is 36, so a
   beats c in 36 of 37 cases. No scores say that c beats a as well: they lie on a line, and a circle does not fit on
   it. The best that scores can do about a circle is to be equal.
3. Below 1. Half a win for each side says that the two answers are equal, although the person only could not tell. It
   pulls the scores together. Leaving ties out pulls them apart. Both keep the order.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load
from lessons.world import REWARDS

import torch
import torch.nn.functional as F

def chain(p_ab, p_bc):
    """Return how often a is preferred to c."""
    odds = p_ab / (1 - p_ab) * p_bc / (1 - p_bc)
    return odds / (1 + odds)

def half_loss(scores, ranks):
    """Return the mean loss () of pairs, scores and ranks (B, 2); at equal ranks both orders count one half."""
    difference = scores[:, 0] - scores[:, 1] # (B,)
    wins = 0.5 + 0.5 * (ranks[:, 1] - ranks[:, 0]).sign() # (B,) of the first: 1, 0, or 1/2 where tied
    return -(wins * F.logsigmoid(difference) + (1 - wins) * F.logsigmoid(-difference)).mean()

def exercise_1(n=20000, steps=300):
    """Return two slopes: of noise 1, and of noise 2 with twice the rewards."""
    torch.manual_seed(0)
    lesson = load('2_bradley_terry')
    old, _ = lesson.learn(lesson.person(n, 1.0)[0], steps)
    lesson.REWARDS = 2 * REWARDS
    new, _ = lesson.learn(lesson.person(n, 2.0)[0], steps)
    lesson.REWARDS = REWARDS # the slope is per point of the old ones
    return lesson.slope(old), lesson.slope(new)

def exercise_3(n=20000, steps=300):
    """Return the slope of scores learnt by half_loss; the ties are the lesson's."""
    torch.manual_seed(0)
    lesson = load('2_bradley_terry')
    pairs, felt = lesson.person(n, 1.0)
    ranks = torch.stack([0 * felt, (felt >= 1)], 1) # (n, 2)
    scores = torch.zeros(lesson.N, requires_grad=True)
    lesson.descend([scores], lambda: half_loss(scores[pairs].T, ranks), steps, 0.05)
    return lesson.slope(scores.detach())

if __name__ == '__main__':
    print("slope: noise 1 %.2f, noise 2 with twice the rewards %.2f" % exercise_1())
    print(f"slope with half a win for each side of a tie: {exercise_3():.2f}")
