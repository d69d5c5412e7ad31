"""Solutions of lesson 7. Run this file to see the numbers of exercises 1 and 3.

1. Evenly drawn answers say a word twice far more often, so the reward model learns what that is worth. The proxy still
   has errors, but with 1,000 comparisons little of the fall is left. For small n it is worse: there the reference's own
   answers matter. In practice: collect comparisons where the policy will go, and again after it has moved.
2. log n - (n - 1) / n. The answers of equal score share their place, so the exact KL stays below, and it never passes
   the largest -log pi_ref of an answer.
3. Take the lowest score. The errors of the proxies differ, so an answer that one of them overrates loses its place. But
   all of them saw the same kind of answers: what none of them knows is still a guess. The fall comes later and is
   smaller, but it comes. The plain mean of the four does about as well here.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load
from lessons.world import best_of, compare, log_pi

import torch

def bound(n):
    """Return the bound on the KL of best of n."""
    return math.log(n) - (n - 1) / n

def pessimist(scores):
    """Return scores (156,) that follow the lowest of several proxies, scores (E, 156)."""
    return scores.min(0).values

def gold_curve(lesson, ref, scores):
    """Return the gold score (13,) of best of n by scores (156,)."""
    return lesson.follow(ref, scores, [best_of(n, ref, scores) for n in lesson.N_BEST])[:, 2]

def exercise_1(seeds=(0, 1, 2), people=3, n=1000, steps=200):
    """Return {where: mean gold (13,) of best of n}, with comparisons from the reference and drawn evenly."""
    lesson, found = load('7_over_optimisation'), {}
    for where in ('reference', 'evenly'):
        lesson.compare = compare if where == 'reference' else (
            lambda n, ref, gold: compare(n, torch.zeros_like(ref).log_softmax(0), gold))
        curves = []
        for seed in seeds:
            ref = log_pi(lesson.new_reference(seed, steps)).detach()
            proxies = [lesson.learn_proxy(100 * seed + person, ref, n, steps)[0] for person in range(people)]
            curves += [gold_curve(lesson, ref, proxy) for proxy in proxies]
        found[where] = torch.stack(curves).mean(0)
    return found

def exercise_3(seeds=(0, 1, 2), people=4, n=1000, steps=200):
    """Return {whom best of n follows: mean gold (13,)}: one proxy, their mean, the pessimist."""
    lesson, single, mean, lowest = load('7_over_optimisation'), [], [], []
    for seed in seeds:
        ref = log_pi(lesson.new_reference(seed, steps)).detach()
        proxies = torch.stack([lesson.learn_proxy(100 * seed + p, ref, n, steps)[0] for p in range(people)]) # (E, 156)
        single += [gold_curve(lesson, ref, proxy) for proxy in proxies]
        mean.append(gold_curve(lesson, ref, proxies.mean(0)))
        lowest.append(gold_curve(lesson, ref, pessimist(proxies)))
    curves = dict(single=single, mean=mean, pessimist=lowest)
    return {name: torch.stack(lines).mean(0) for name, lines in curves.items()}

if __name__ == '__main__':
    for name, curve in (exercise_1() | exercise_3()).items():
        print(f"{name:10} gold of best of 1, 2, 4 …", *[f"{gold:5.2f}" for gold in curve])
