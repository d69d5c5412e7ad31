"""Lesson 6: DPO is RLHF, and which methods go somewhere else.

    python lessons/6_dpo.py            # one seed, less than a minute
    python lessons/6_dpo.py --full     # three seeds, longer training, some minutes

RLHF wants the policy with the largest reward - beta KL(pi || pi_ref). With 156 answers we can write it down:

    pi*(y) = pi_ref(y) e^(r(y) / beta) / c            here and below c makes the probabilities sum to 1

All methods start at the reference. PPO, RLOO and GRPO see the rewards of their own samples, the others comparisons of
the reference's answers by a Bradley-Terry person (lesson 2). Best of n takes the best of n answers of the reference.
Some have another optimum. p is the chance that y wins against an answer of the reference, |y| the tokens of y:

    IPO     pi_ref e^(|y| (p / beta - c))                      asks for win rates, not for rewards; a loss per token
    KTO     pi_ref max(0, sqrt((2 p - 1) / c) - 1), beta = 1   nothing is left of an answer that mostly loses
    RRHF    near 2 pi_ref p, the winners                       imitates them, and knows no reference
    GRPO    per token, pi_ref beta / (c - A)                   k3 in the loss has not the KL's gradient (lesson 5)

Exercises
1. Write BETA = 0.5 and run. Which method, close to pi* before, is not any more? Which answers does it miss, and how
   often does the reference write them?
2. Fill in `implied_reward`: DPO's authors call the policy "secretly a reward model". Get r back from a policy at pi*. A
   constant is lost: let the mean under the reference be 0.
3. Which of GRPO's two peculiarities keeps it from pi*, the division by the spread or k3? In `online` give GRPO the
   advantages R.view(-1, K) less their mean, without the division. Guess, then run.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common.rollout import kl_k1, kl_k3, masked_mean, whiten
from dpo import dpo_loss, ipo_loss
from kto import kl_estimate, kto_loss
from lessons.course import draw, tell_exercises
from lessons.world import ALL, REWARDS, best_of, by_value, compare, expected, kl, log_pi, new_policy, optimum, root
from ppo import gae, policy_loss, token_rewards, value_loss
from reinforce import advantages
from rrhf import rrhf_loss

import torch

BETA, K = 1.0, 4 # K answers are compared by RLOO and GRPO
M, SIZES = ALL.mask, ALL.mask.sum(1) # (156, 3), (156,) tokens per answer
METHODS = {'PPO': 4, 'RLOO': 1, 'GRPO': 1, 'DPO': 1, 'IPO': 1, 'RRHF': 1, 'KTO': 1} # updates on the same answers

def online(method, policy, critic, ref, old, n):
    """Sample n answers; return a function that returns the loss on them. ref, old: log-probabilities (156, 3)."""
    y = torch.multinomial(old.sum(1).exp(), n, replacement=True) # (n,) to draw a number is to sample an answer
    mask, r, k1 = M[y], REWARDS[y], (kl_k1(old, ref) * M)[y] # (n, 3), (n,), (n, 3)
    logp = lambda: policy.logp(ALL.idx, M)[y] # (n, 3)
    surrogate = lambda: policy_loss(logp(), old[y], A, mask, 0.2)
    if method == 'PPO':
        values = critic.values(ALL.idx, M).detach()[y] # (n, 3)
        A, returns = gae(token_rewards(r, k1, mask, BETA), values, mask, 1.0, 0.95) # (n, 3) each
        A = whiten(A, mask)
        return lambda: surrogate() + value_loss(critic.values(ALL.idx, M)[y], values, returns, mask, 0.2)
    R = r if method == 'GRPO' else r - BETA * k1.sum(1) # (n,)
    A = advantages(R.view(-1, K), method.lower()).view(-1, 1) * mask # (n, 3)
    if method == 'GRPO':
        return lambda: surrogate() + BETA * masked_mean(kl_k3(logp(), ref[y]), mask)
    return surrogate

def offline(method, policy, ref, w, l):
    """Return the loss () on comparisons of winners w (n,) and losers l (n,); ref: log pi_ref (156,)."""
    pi = log_pi(policy) # (156,)
    if method == 'DPO':
        return dpo_loss(pi[w], pi[l], ref[w], ref[l], BETA)[0]
    if method == 'KTO': # a winner is good, a loser bad
        y, good = torch.cat([w, l]), torch.arange(2).repeat_interleave(len(w)) == 0 # (2 n,)
        return kto_loss(pi[y], ref[y], good.float(), kl_estimate(pi[y], ref[y]), BETA)[0]
    pi, ref = pi / SIZES, ref / SIZES # IPO and RRHF take means per token
    if method == 'IPO':
        return ipo_loss(pi[w], pi[l], ref[w], ref[l], BETA)[0]
    return rrhf_loss(torch.stack([pi[w], pi[l]], 1), torch.tensor([[1.0, 0.0]]).expand(len(w), 2)) - pi[w].mean()

def train(method, seed, steps, n, lr=0.01):
    """Train from the reference of this seed; return log pi of all answers (156,)."""
    policy, critic = new_policy(seed), new_policy(seed + 100, value_head=True)
    ref, epochs = policy.logp(ALL.idx, M).detach(), METHODS[method] # (156, 3)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr)
    for step in range(0, steps, epochs):
        optimizer.param_groups[0]['lr'] = lr * (1 - step / steps)
        if method in ('PPO', 'RLOO', 'GRPO'):
            loss = online(method, policy, critic, ref, policy.logp(ALL.idx, M).detach(), n)
        else:
            loss = partial(offline, method, policy, ref.sum(1), *compare(n, ref.sum(1)))
        for _ in range(epochs):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return log_pi(policy).detach()

def own_optimum(method, ref):
    """Return the probabilities (156,) of the table above, or None."""
    p = (torch.sigmoid(REWARDS[:, None] - REWARDS) * ref.exp()).sum(1) # (156,)
    shapes = {'RRHF': lambda c: 2 * ref.exp() * p, 'IPO': lambda c: (ref + SIZES * (p / BETA - c)).exp(),
              'KTO': lambda c: ref.exp() * (((2 * p - 1).clamp(min=0) / 10**c).sqrt() - 1).clamp(min=0)}
    if method in shapes and (method != 'KTO' or BETA == 1):
        return shapes[method](root(lambda c: shapes[method](c).sum() - 1, -9.0, 9.0))

def measure(logp, ref, method):
    """Return KL(pi || pi*), reward, KL(pi || pi_ref), the beta of the nearest pi*, and KL(own optimum || pi)."""
    near = min((10**(i / 40) for i in range(-40, 41)), key=lambda beta: kl(logp, optimum(ref, beta)))
    own = own_optimum(method, ref)
    gap = float('nan') if own is None else torch.nan_to_num(own * (own.log() - logp)).sum().item()
    return kl(logp, optimum(ref, BETA)).item(), expected(logp).item(), kl(logp, ref).item(), near, gap

def main(seeds=(0,), steps=600, n=512):
    found = {} # name -> what `measure` returns, per seed
    for seed in seeds:
        ref = log_pi(new_policy(seed)).detach() # (156,)
        policies = {'reference': ref} | {method: train(method, seed, steps, n) for method in METHODS}
        policies |= {f"best of {k}": best_of(k, ref) for k in (2, 4, 8, 16)} | {'pi*': optimum(ref, BETA)}
        for name, logp in policies.items():
            found.setdefault(name, []).append(measure(logp, ref, name))
    mean = lambda name, column=0: sum(line[column] for line in found[name]) / len(seeds)
    print(f"beta {BETA}, seeds {seeds}, {steps} updates, each on {n} answers or comparisons\n\n{'':12}KL(pi||pi*)  "
          "(lowest-highest)  reward  KL(pi||ref)  nearest beta  KL(own optimum||pi)")
    for name, lines in found.items():
        print(f"{name:12}{mean(name):11.4f}  ({min(lines)[0]:.4f}-{max(lines)[0]:.4f}){mean(name, 1):9.2f}"
              f"{mean(name, 2):13.2f}{mean(name, 3):14.2f}" + f"{mean(name, 4):21.4f}".replace('nan', '  -'))
    print("\nMore than 95 % of the way to pi*:", *[m for m in METHODS if mean(m) < mean('reference') / 20])
    print("Twice as close to an optimum of their own:", *[m for m in METHODS if mean(m, 4) < mean(m) / 2])

    def distances(ax):
        for name in [*found][:-1]:
            ax.plot([line[0] for line in found[name]], [name] * len(seeds), 'o')
        ax.set(xscale='log', xlabel='KL(pi || pi*) [nats], a dot per seed', title='how far from the optimum')

    def shapes(ax):
        for name in ('pi*', 'RLOO', 'GRPO', 'DPO', 'IPO', 'RRHF', 'KTO'):
            rise = (by_value(policies[name]) / by_value(ref)).log() # (L,) at each reward
            ax.plot(REWARDS.unique(), rise, 'k--' if name == 'pi*' else '.-', label=name)
        ax.set(xlabel='reward', ylabel='log(pi / pi_ref)', title='pi*: a straight line', ylim=(-6, 6))
        ax.legend(fontsize=7)

    draw('6_dpo', distances, shapes)
    tell_exercises(globals())
    return found

def implied_reward(logp, ref, beta):
    """Return r (156,), mean 0 under the reference; logp, ref: (156,)."""

CHECKS = dict(implied_reward=lambda f: abs(f(*torch.tensor([[0.2, 0.8], [0.5, 0.5]]).log(), 2.0)[1] - 1.386) < 1e-3)

if __name__ == '__main__':
    main(**dict(seeds=(0, 1, 2), steps=3000) if '--full' in sys.argv else {})
