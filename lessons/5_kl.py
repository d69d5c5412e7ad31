"""Lesson 5: the KL, how to estimate it, its two directions, and what a nat costs.

    python lessons/5_kl.py

KL(pi || q) = sum over y of pi(y) log(pi(y) / q(y)) says how far a policy pi has gone from the reference q. A language
model has too many answers for this sum. So one samples answers from pi and averages. With d = log pi - log q:

    k1 = d            k2 = d^2 / 2            k3 = e^-d - 1 + d            (Schulman 2020; `kl_k1`, `kl_k3`)

With 156 answers we can compute the mean and the spread of each, and its gradient too: in the reward, where the gradient
of log pi does the rest, k1 is right; in a loss it is not. Then come the two directions: if a policy cannot become the
target, KL(pi || target) and KL(target || pi) are least at different policies. At last the price beta: reward - beta
KL(pi || q) is largest at pi* = q e^(r / beta) / c. So one buys KL until a nat brings no more than beta.

Exercises
1. Write WAYS = (0.1, 3.0) and run. k3 has no bias. Yet its mean of 1000 samples is below the exact KL for all three
   seeds. How can that be? Compare the spreads.
2. Fill in `control_variate`: k = d + c (e^-d - 1) is unbiased for every c, since the mean of e^-d is 1. k1 has c = 0,
   k3 has c = 1. Return the c of least variance. Hint: it is a regression.
3. Fill in `beta_for`: the beta whose pi* is so many nats away from the reference. `root` of world.py may help.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common.rollout import kl_k1, kl_k3
from lessons.course import draw, tell_exercises
from lessons.world import ALL, NUMBER, REWARDS, WORDS, best_of, descend, expected, kl, log_pi, new_policy, optimum

import torch

WAYS = (0.1, 1.0) # near and far: how much of the way a policy has gone from the reference to another model
ESTIMATORS = { # of log pi and log q per token, (156, 3) each, 0 where there is no token
    'k1': lambda logp, ref: kl_k1(logp, ref).sum(1), 'k2': lambda logp, ref: (logp - ref).sum(1)**2 / 2,
    'k3': lambda logp, ref: kl_k3(logp.sum(1), ref.sum(1)), 'k3 per token': lambda logp, ref: kl_k3(logp, ref).sum(1)}
MODES = 'very good .', 'not bad .'
MIXED = 'very bad .', 'not good .' # the first word of one, the second of the other
number = lambda text: NUMBER[tuple(WORDS.index(word) for word in text.split())]

def estimate(seed, way, n=1000):
    """Return the exact KL and {estimator: (bias, spread, mean of n samples, cosines with two gradients)}."""
    policy, other, found = new_policy(seed), new_policy(seed + 10), {}
    with torch.no_grad():
        for p, goal in zip(policy.parameters(), other.parameters()):
            p.lerp_(goal, way)
    flat = lambda x: torch.cat([g.flatten() for g in torch.autograd.grad(x, [*policy.parameters()], retain_graph=True)])
    logp, ref = policy.logp(ALL.idx, ALL.mask), new_policy(seed).logp(ALL.idx, ALL.mask).detach() # (156, 3)
    exact, pi = kl(logp.sum(1), ref.sum(1)), logp.sum(1).exp().detach() # (), (156,)
    samples = torch.multinomial(pi, n, replacement=True) # (n,)
    forward, backward = flat(exact), flat(kl(ref.sum(1), logp.sum(1))) # gradients (P,)
    for name, estimator in ESTIMATORS.items():
        k = estimator(logp, ref) # (156,)
        mean, g = (pi * k).sum(), flat((pi * k).sum()) # g: of a mean over samples, which are what they are
        cosine = lambda goal: torch.cosine_similarity(g, goal, dim=0).item() if g.norm() > 1e-4 * goal.norm() else 0.0
        found[name] = (mean - exact).item(), (pi * (k - mean)**2).sum().sqrt().item(), k[samples].mean().item(), \
            cosine(forward), cosine(backward)
    return exact.item(), found

def fit(seed, target, covering, steps):
    """Fit a policy that cannot see its earlier words to log target (156,); return log pi (156,)."""
    torch.manual_seed(seed)
    table = torch.randn(3, len(WORDS)).requires_grad_() # a distribution of words for each place
    logp = lambda: (table.log_softmax(1)[torch.arange(3), ALL.idx[:, 1:]] * ALL.mask).sum(1) # (156,)
    descend([table], lambda: kl(target, logp()) if covering else kl(logp(), target), steps, 0.05)
    return logp().detach()

def main(seeds=(0, 1, 2), steps=300):
    print("Estimators of KL(pi || q). spread: standard deviation. Last columns: cosine of the mean gradient, as a\n"
          "loss, with that of each KL; 0.00 where there is none.\n\n"
          "way  seed  exact  estimator       bias  spread  of 1000 samples  KL(pi||q)  KL(q||pi)")
    found = {(way, seed): estimate(seed, way) for way in WAYS for seed in seeds}
    for (way, seed), (exact, lines) in found.items():
        for name, line in lines.items():
            print(f"{way:3}{seed:6}{exact:7.3f}  {name:12}" + '{:8.3f}{:8.3f}{:17.3f}{:11.2f}{:11.2f}'.format(*line))
    column = lambda name, i, ways=WAYS: [found[way, seed][1][name][i] for way in ways for seed in seeds]
    for way in WAYS:
        print(f"At {way} of the way k3 spreads %.2f times as much as k1." % (sum(column('k3', 1, [way]))
                                                                             / sum(column('k1', 1, [way]))))
    print("As a loss k1 has a gradient in %d of %d cases." % (sum(x != 0 for x in column('k1', 3)), len(found)))
    for k in ('k2', 'k3'):
        print("%s: lowest cosine with KL(pi||q) %.2f, with KL(q||pi) %.2f, largest bias %.2f" %
              (k, min(column(k, 3)), min(column(k, 4)), max(map(abs, column(k, 0)))))

    ref = log_pi(new_policy(0)).detach() # (156,)
    target = 0.01 * ref.exp() # (156,)
    target[[number(text) for text in MODES]] += 0.99 / len(MODES)
    fits = {(covering, seed): fit(seed, target.log(), covering, steps) for covering in (True, False) for seed in seeds}
    print(f"\nThe target says {' or '.join(map(repr, MODES))}. The policy cannot see its earlier words.\n"
          "KL(target||pi) covers both modes, KL(pi||target) seeks one.\n\n"
          "makes least     seed" + ''.join(f"{text:>12}" for text in MODES + MIXED) + '   reward')
    for (covering, seed), logp in fits.items():
        print(f"{'KL(target||pi)' if covering else 'KL(pi||target)'}{seed:6}"
              + ''.join(f"{logp[number(text)].exp():12.2f}" for text in MODES + MIXED) + f"{expected(logp):9.2f}")
    mixed = lambda way: sum(fits[way, seed][number(x)].exp() for seed in seeds for x in MIXED) / len(seeds)
    print(f"Share of answers that mix the two: {mixed(True):.0%} if it covers, {mixed(False):.0%} if it seeks.")
    print("\nslope: reward gained per nat, from beta * 1.01 to beta / 1.01\n\n  beta  KL(pi*||q)  reward  slope")
    point = lambda beta: torch.stack([kl(optimum(ref, beta), ref), expected(optimum(ref, beta))])
    for beta in (8, 4, 2, 1, 0.5, 0.25, 0.125):
        step = point(beta / 1.01) - point(beta * 1.01)
        print(f"{beta:6.3f}{point(beta)[0]:12.3f}{point(beta)[1]:8.2f}{step[1] / step[0]:7.3f}")
    J = lambda logp: expected(logp) - kl(logp, ref) # at beta = 1
    near = [(optimum(ref, 1.0) + noise * torch.randn(len(ref))).log_softmax(0) for noise in [0.01, 0.1, 1.0] * 100]
    print(f"At beta 1 reward - KL is {J(optimum(ref, 1.0)):.4f} at pi*. Of {len(near)} policies near it "
          f"{sum(J(logp) > J(optimum(ref, 1.0)) for logp in near)} have more.")

    def spreads(ax):
        lines = {way: estimate(seeds[0], way)[1] for way in (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0)}
        for name in ESTIMATORS:
            ax.loglog([*lines], [line[name][1] for line in lines.values()], '.-', label=name)
        ax.set(xlabel='way from the reference', ylabel='spread of one estimate [nats]', title='k3: good near, bad far')
        ax.legend()

    def directions(ax):
        bars = {'target': target, 'covers': fits[True, seeds[0]].exp(), 'seeks': fits[False, seeds[0]].exp()}
        for i, (name, p) in enumerate(bars.items()):
            ax.bar([x + i / 4 for x in range(4)], [p[number(text)].item() for text in MODES + MIXED], 0.25, label=name)
        ax.set_xticks([x + 0.25 for x in range(4)], MODES + MIXED, fontsize=8)
        ax.set(ylabel='probability', title='two directions')
        ax.legend()

    def price(ax):
        line = [point(2**(i / 2)) for i in range(6, -7, -1)]
        ax.plot(*torch.stack(line).T, '.-', label='pi*, beta from 8 to 1/8')
        best = [best_of(n, ref) for n in (1, 2, 4, 8, 16, 32)]
        ax.plot([kl(logp, ref) for logp in best], [expected(logp) for logp in best], 'x', label='best of 1, 2, 4 … 32')
        ax.set(xlabel='KL(pi || q) [nats]', ylabel='expected reward', title='what KL buys')
        ax.legend()

    draw('5_kl', spreads, directions, price)
    tell_exercises(globals())
    return found, fits

def control_variate(logp, ref):
    """Return c () of least variance; logp, ref: log pi and log q of all answers, (N,)."""

def beta_for(ref, nats):
    """Return beta where KL(pi* || q) is nats; ref: log q (156,)."""

EVEN = torch.full_like(REWARDS, 1 / len(REWARDS)).log()
CHECKS = dict(control_variate=lambda f: abs(f(*torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()) - 1.155) < 1e-3,
              beta_for=lambda f: abs(kl(optimum(EVEN, f(EVEN, 0.5)), EVEN) - 0.5) < 1e-3)

if __name__ == '__main__':
    main()
