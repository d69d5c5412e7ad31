"""Lesson 1: how samples tell a policy which way to go, and what a baseline is for.

    python lessons/1_policy_gradient.py

We want a larger expected reward J = sum over all answers y of pi(y) r(y). Its gradient is

    g = sum over y of pi(y) r(y) grad log pi(y)      (Williams 1992)

A language model has far too many answers for this sum. So we sample some and take the mean of r(y) grad log pi(y).
Our world has 156 answers (world.py). We can compute the sum as well, and see what the mean is worth.

A baseline b may be taken off the rewards: the sum of pi(y) grad log pi(y) is 0, so b changes nothing on average.

Exercises
1. Set K to 2. The last line of the table has a share near 0.75. What will it be? And the share of the line above it?
   Write down both numbers, then run.
2. Fill in `best_baseline`: the constant b of least variance. Hint: the variance is a parabola in b.
3. Fill in `grpo_cosine`. GRPO also divides by the standard deviation of the K rewards. Does the mean of its gradients
   still point along g? Guess the cosine. The solution measures it on 20,000 answers.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common.rollout import pack, sample_answers
from lessons.course import draw, tell_exercises
from lessons.world import EOS, NUMBER, PROMPT, REWARDS, TOK, expected, log_pi, new_policy
from ppo import policy_loss
from reinforce import advantages

import torch

K = 4 # answers that are compared with one another
BASELINES = { # name -> advantages (B, K) of rewards (B, K); J is the expected reward
    'none': lambda rewards, J: advantages(rewards, 'reinforce'),
    'J': lambda rewards, J: advantages(rewards, 'reinforce', J),
    'mean of the other answers (RLOO)': lambda rewards, J: advantages(rewards, 'rloo'),
    'mean of all K answers': lambda rewards, J: rewards - rewards.mean(1, keepdim=True),
}

def sample(policy, n):
    """Sample n answers; return their numbers (n,) and Rollouts."""
    answers, logps = sample_answers(policy, [PROMPT] * n, TOK, max_new_tokens=3, rows=4096)
    return torch.tensor([NUMBER[tuple(answer)] for answer in answers]), pack([PROMPT] * n, answers, logps, EOS)

def loss_of(policy, rolls, A):
    """Return a loss (): its gradient is the mean over answers of -A grad log pi; A: (B,), rolls: B answers."""
    loss = policy_loss(policy.logp(rolls.idx, rolls.mask), rolls.logp, A[:, None] * rolls.mask, rolls.mask, clip=0.2)
    return loss * rolls.mask.sum() / len(A) # it was a mean over tokens, and becomes one over answers

def flat_gradient(policy, x):
    """Return the gradient (P,) of x () by all P parameters."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(x, [*policy.parameters()], retain_graph=True)])

def estimates(numbers, A, n):
    """Return N/n gradient estimates as weights (N/n, 156) of the grad log pi; n of N samples (N,) make one."""
    return torch.zeros(len(numbers) // n, len(REWARDS)).scatter_add_(1, numbers.view(-1, n), A.reshape(-1, n)) / n

def error(weights, exact, gram):
    """Return the typical distance of estimates (M, 156) from g, in lengths of g; exact: (156,), gram: S S^T."""
    square = lambda w: ((w @ gram) * w).sum(-1) # |gradient|^2, (M,)
    return (square(weights - exact).mean() / square(exact)).sqrt().item()

def measure(seed, n_samples):
    """Return of one policy: the cosine of two ways to g, {n: error}, {(shift, baseline): (share, +-, error)}."""
    policy = new_policy(seed)
    logp = log_pi(policy) # (156,)
    S = torch.stack([flat_gradient(policy, x) for x in logp]) # (156, P) grad log pi of every answer
    J, pi, gram, g = expected(logp).item(), logp.exp().detach(), S @ S.T, flat_gradient(policy, expected(logp))
    numbers, rolls = sample(policy, n_samples)
    r = REWARDS[numbers] # (N,)
    by_loss = -flat_gradient(policy, loss_of(policy, rolls, r)) # what training computes
    same = torch.cosine_similarity(by_loss, estimates(numbers, r, len(r))[0] @ S, dim=0).item()
    errors = {n: error(estimates(numbers, r, n), pi * REWARDS, gram) for n in (4, 16, 64, 256, 1024)}
    table = {}
    for shift in (0.0, 5.0):
        for name, advantages_of in BASELINES.items():
            groups = estimates(numbers, advantages_of((r + shift).view(-1, K), J + shift), K) # (N / K, 156)
            shares = groups @ (S @ g) / (g @ g) # (N / K,) how far each goes along g; g itself: 1
            table[shift, name] = (shares.mean().item(), 2 * shares.std().item() / len(shares)**0.5,
                                  error(groups, pi * REWARDS, gram))
    return same, errors, table

def train(seed, shift, name, steps, lr=0.003):
    """Return the exact J before each step, and after the last; a step has 4 groups of K answers."""
    policy = new_policy(seed)
    optimizer, found = torch.optim.Adam(policy.parameters(), lr=lr), []
    for _ in range(steps):
        found.append(expected(log_pi(policy)).item())
        numbers, rolls = sample(policy, 4 * K)
        A = BASELINES[name]((REWARDS[numbers] + shift).view(-1, K), found[-1] + shift).flatten() # (4 K,)
        optimizer.zero_grad()
        loss_of(policy, rolls, A).backward()
        optimizer.step()
    return found + [expected(log_pi(policy)).item()]

def main(seeds=(0, 1, 2), n_samples=20480, steps=120):
    measured = [measure(seed, n_samples) for seed in seeds]
    print(f"The project's loss and the formula agree: cosine {min(m[0] for m in measured):.6f}.\n\n"
          "Distance of an estimate from g, in lengths of g. A column is a policy (a seed):")
    for n in measured[0][1]:
        print(f"{n:6} samples " + ' '.join(f"{m[1][n]:6.2f}" for m in measured))
    fall = sum(m[1][16] / m[1][256] for m in measured) / len(seeds)
    print(f"From 16 to 256 samples it falls by a factor of {fall:.2f}; the square root of 16 is 4.\n\n"
          f"Groups of {K}. share: their mean along g, 1 = unbiased. error: distance of one group from g.")
    for key in measured[0][2]:
        print(f"r + {key[0]:.0f}  {key[1]:32}  share" + ''.join('  %.2f ± %.2f' % m[2][key][:2] for m in measured)
              + '   error' + ''.join(f"  {m[2][key][2]:.2f}" for m in measured))
    mean = lambda column, *key: sum(m[2][key][column] for m in measured) / len(seeds)
    none, _, rloo, group = BASELINES
    print(f"Adding 5 to every reward multiplies the error by {mean(2, 5.0, none) / mean(2, 0.0, none):.2f} without a "
          f"baseline, and by {mean(2, 5.0, rloo) / mean(2, 0.0, rloo):.2f} with RLOO.\nThe mean of all K is RLOO times "
          f"{mean(0, 0.0, group) / mean(0, 0.0, rloo):.2f}: an answer's own reward is part of what is taken off.\n\n"
          f"Training. The exact expected reward after {steps} steps of {4 * K} answers:")
    curves = {key: [train(seed, *key, steps) for seed in seeds] for key in ((0.0, none), (5.0, none), (5.0, rloo))}
    for (shift, name), runs in curves.items():
        print(f"r + {shift:.0f}  {name:32} " + ''.join(f"  {run[-1]:.2f}" for run in runs))

    def errors(ax):
        for m in measured:
            ax.loglog(m[1].keys(), m[1].values(), 'o-')
        ax.set(xlabel='samples', ylabel='distance from g, in lengths of g', title='an estimate gets better slowly')

    def rewards(ax):
        for ((shift, name), runs), colour in zip(curves.items(), ('tab:blue', 'tab:red', 'tab:green')):
            for run in runs:
                ax.plot(run, color=colour, lw=1, label=f"r + {shift:.0f}, {name}" if run is runs[0] else None)
        ax.set(xlabel='step', ylabel='expected reward, exact', title='with and without a baseline')
        ax.legend(fontsize=7)

    draw('1_policy_gradient', errors, rewards)
    tell_exercises(globals())
    return measured, curves

def best_baseline(pi, rewards, squares):
    """Return b () of least variance; all (156,): pi and rewards of each answer, and its |grad log pi|^2."""

def grpo_cosine(numbers, rewards, S, g):
    """Return the cosine of g (P,) and the mean gradient of kind 'grpo'; numbers, rewards: (B, K), S: (156, P)."""

T = torch.tensor
CHECKS = dict(
    best_baseline=lambda f: abs(f(T([0.5, 0.5]), T([0.0, 4.0]), T([1.0, 3.0])) - 3) < 1e-5,
    grpo_cosine=lambda f: abs(f(T([[0, 1], [0, 2]]), T([[1., 0], [0, 2]]), torch.eye(3), T([0., 0, 1])) - 0.707) < 1e-3)

if __name__ == '__main__':
    main()
