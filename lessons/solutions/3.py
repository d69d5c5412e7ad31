"""Solutions of lesson 3. Run this file to see exercise 1 in numbers.

1. It moves. At the first step every ratio is 1, but for rounding, and 1 is inside of [1, 1]: nearly all tokens pull.
   From then on a token that went the way A asks for pulls no more; one that went the other way still does. So 16
   epochs get only a little further than one, if Adam has no momentum. With momentum the first step goes on for a while,
   because the clip stops gradients and not steps. Both stay far behind clip=0.2.
2. Two of the four ways to leave the range: A > 0 and the ratio above it, A < 0 and the ratio below it. A token that
   moved against its advantage must be able to come back. That is what the minimum in the loss is for.
3. 131^2 / (100^2 + 31) = 1.7. One answer speaks for nearly the whole batch. So a large ratio makes the estimate noisy
   even where it stays unbiased.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.training import make_optimizer
from lessons.course import load

import torch

def no_pull(ratio, A, clip):
    """Return True where a token has no gradient; ratio and A: tensors of one shape."""
    return ((A > 0) & (ratio > 1 + clip)) | ((A < 0) & (ratio < 1 - clip))

def effective_samples(logp, old_logp):
    """Return how many equal samples the ratios of n answers are worth (); log pi of the answers, (n,) each."""
    w = (logp - old_logp).exp() # (n,)
    return w.sum() ** 2 / (w ** 2).sum()

def exercise_1(seed=0, batches=4):
    """Return {(momentum, clip): KL after 1 and 16 epochs}; the momentum is Adam's beta1."""
    lesson, found = load('3_ppo'), {}
    for momentum in (0.9, 0.0):
        lesson.make_optimizer = lambda model, cfg, eps: make_optimizer(model, cfg, betas=(momentum, 0.999), eps=eps)
        for clip in (0.0, 0.2):
            epochs = lesson.one_batch(seed, clip, batches)
            found[momentum, clip] = epochs[1][2], epochs[16][2]
    return found

if __name__ == '__main__':
    for seed in range(3):
        for (momentum, clip), (one, sixteen) in exercise_1(seed).items():
            print(f"momentum {momentum}, clip {clip}: KL {one:.3f} after 1 epoch, {sixteen:.3f} after 16")
    print(f"one ratio of 100: {effective_samples(torch.tensor([100.0] + 31 * [1.0]).log(), torch.zeros(32)):.2f} of 32")
