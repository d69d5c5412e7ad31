"""Solutions of lesson 5. Run this file to see exercise 1.

1. k3 is e^-d - 1 + d. Some answers are rare under pi but not under q, so e^-d = q / pi is huge there. These few carry
   the mean. A thousand samples nearly always miss them, and then the mean is too low. The spread says so: it is larger
   than the KL by orders of magnitude, and once infinite in float32. "Unbiased" promises nothing about one run.
2. The variance of d + c x, with x = e^-d - 1, is least at c = -cov(d, x) / var(x). In practice nobody knows these two
   numbers; near the reference c is close to 1, which is why k3 is a good choice there.
3. The KL of pi* falls when beta grows. So halve an interval, in log beta: betas range over powers of ten.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load
from lessons.world import expected, kl, optimum, root

def control_variate(logp, ref):
    """Return c () of least variance; logp, ref: log pi and log q of all answers, (N,)."""
    d, x = logp - ref, (ref - logp).exp() - 1 # (N,)
    cov = lambda a, b: expected(logp, a * b) - expected(logp, a) * expected(logp, b)
    return -cov(d, x) / cov(x, x)

def beta_for(ref, nats):
    """Return beta where KL(pi* || q) is nats; ref: log q (156,)."""
    return math.exp(root(lambda log_beta: kl(optimum(ref, math.exp(log_beta)), ref) - nats, -5.0, 10.0))

def exercise_1(seeds=(0, 1, 2), way=3.0):
    """Return (exact KL, mean of 1000 k3, spread of k3) for each seed."""
    found = [load('5_kl').estimate(seed, way) for seed in seeds]
    return [(exact, lines['k3'][2], lines['k3'][1]) for exact, lines in found]

if __name__ == '__main__':
    for line in exercise_1():
        print("exact %.3f, mean of 1000 samples %.3f, spread %.3g" % line)
