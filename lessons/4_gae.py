"""Lesson 4: GAE. How much should an advantage trust the critic, and how much the reward?

    python lessons/4_gae.py

An answer gets one score, at its end. Which token earned it? A critic V says what to expect before each token. So the
surprise at a token is delta_t = r_t + V_{t+1} - V_t, and V after the last token is 0. GAE (Schulman et al. 2016) adds
up the surprises that follow, less and less:

    A_t = delta_t + lambda delta_{t+1} + lambda^2 delta_{t+2} + ...          (gamma = 1)

lambda = 0 asks the critic alone: little noise if it is good, but its errors become bias. lambda = 1 asks the rewards
that came: no bias, but the noise of all later tokens. First by hand on five tokens, then exactly in world.py.

Exercises
1. Set OFFSET to 5: every value of every critic is 5 too high. What happens to the bias at lambda = 1, and at 0? A hint:
   where does the critic's error not cancel? What would such a policy learn about the end of text?
2. Fill in `n_step`: r_t + ... + r_{t+n-1} + V_{t+n} - V_t, n rewards and then the critic.
3. Fill in `weights`: GAE is a mean of n_step for n = 1, 2, ..., N where N tokens are left. Which weights has it?
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from lessons.course import draw, tell_exercises
from lessons.world import ALL, ANSWERS, LONGEST, REWARDS, log_pi, new_policy
from ppo import gae, token_rewards

import torch

OFFSET = 0.0
LAMBDAS = [k / 20 for k in range(21)]
R5, V5 = torch.tensor([-0.1, 0.0, 0.2, -0.3, 1.0]), torch.tensor([0.5, 0.7, 0.2, 0.6, 0.9]) # five tokens of an answer

def by_hand(r, v, lam):
    """Return deltas and advantages (T,) of one answer, by the sum above."""
    after = torch.cat([v[1:], torch.zeros(1)]) # V_{t+1}, (T,)
    deltas = r + after - v
    return deltas, torch.stack([sum(lam**k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))])

def by_code(r, v, lam):
    """Return the same advantages (T,) by ppo.gae; behind them are two positions of padding full of nonsense."""
    pad = lambda x: torch.cat([x, torch.full((2,), 99.0)])[None] # (1, T + 2)
    mask = torch.cat([torch.ones(len(r)), torch.zeros(2)])[None]
    return gae(pad(r), pad(v), mask, 1.0, lam)[0][0, :len(r)]

def token_gradients(policy):
    """Return grad log pi (156, 3, P) of all tokens of all answers; 0 behind an answer's end."""
    logp, seen, rows = policy.logp(ALL.idx, ALL.mask), {}, [] # (156, 3)
    for i, answer in enumerate(ANSWERS):
        for t in range(LONGEST):
            prefix = tuple(answer[:t + 1]) if t < len(answer) else ()
            if prefix not in seen: # answers that begin alike share it
                grads = torch.autograd.grad(logp[i, t], [*policy.parameters()], retain_graph=True)
                seen[prefix] = torch.cat([g.flatten() for g in grads]) * ALL.mask[i, t]
            rows.append(seen[prefix])
    return torch.stack(rows).view(len(ANSWERS), LONGEST, -1)

def critics(pi, seed):
    """Return {name: V before each token (156, 3)}; pi: (156,). The exact V is the mean reward of what may follow."""
    begin = torch.tensor([[[a[:t] == b[:t] for t in range(LONGEST)] for b in ANSWERS] for a in ANSWERS]).float()
    exact = torch.einsum('abt,b->at', begin, pi * REWARDS) / torch.einsum('abt,b->at', begin, pi)
    torch.manual_seed(seed)
    noise = torch.randn(len(ANSWERS), LONGEST).gather(0, begin.argmax(1)) # one number per beginning
    return {'exact': exact, 'wrong by 0.5': exact + 0.5 * noise, 'wrong by 1': exact + noise}

def measure(seed):
    """Return {critic: {lambda: (bias, noise)}} of the policy gradient from one answer, in lengths of the true one."""
    policy = new_policy(seed)
    S, pi = token_gradients(policy), log_pi(policy).exp().detach() # (156, 3, P), (156,)
    rewards = token_rewards(REWARDS, 0 * ALL.mask, ALL.mask, 0.0) # (156, 3), the score on the last token
    g = (pi * REWARDS) @ S.sum(1) # (P,) the exact gradient
    found = {}
    for name, values in critics(pi, seed).items():
        found[name] = {}
        for lam in LAMBDAS:
            A, _ = gae(rewards, (values + OFFSET) * ALL.mask, ALL.mask, 1.0, lam) # (156, 3)
            each = torch.einsum('at,atp->ap', A, S) # (156, P) what each answer says
            mean = pi @ each # (P,) what they say on average
            noise = pi @ ((each - mean) ** 2).sum(1)
            found[name][lam] = ((mean - g).norm() / g.norm()).item(), (noise.sqrt() / g.norm()).item()
    return found

def error(bias, noise, n):
    """Return the typical error of a mean of n answers: more answers make noise smaller, and leave the bias."""
    return (bias**2 + noise**2 / n) ** 0.5

def main(seeds=(0, 1, 2)):
    print("FIVE TOKENS, by hand:\n  t     r     V  delta" + ''.join(f"{f'A({lam})':>8}" for lam in (0, 0.5, 1)))
    sums = {lam: by_hand(R5, V5, lam)[1] for lam in (0, 0.5, 1)}
    for t in range(5):
        print(f"  {t} {R5[t]:5.2f} {V5[t]:5.2f} {by_hand(R5, V5, 0)[0][t].item():z6.2f}"
              + ''.join(f"{a[t].item():z8.3f}" for a in sums.values()))
    most = max((a - by_code(R5, V5, lam)).abs().max().item() for lam, a in sums.items())
    print(f"ppo.gae differs by {most:.6f} at most. Padding of 99 behind the answer changes nothing.\n"
          f"A(0) is delta. A(1) + V is the reward still to come: {' '.join(f'{x:.2f}' for x in sums[1] + V5)}\n")
    measured = [measure(seed) for seed in seeds]
    row = lambda values: ' '.join(f"{value:5.2f}" for value in values) # of each seed
    answers = lambda n: f"{n} answer{'s' * (n > 1)}"
    print("THE WORLD. Bias and noise of the gradient from one answer, exact, in lengths of the true gradient.\n"
          "Three numbers in a row are three policies (seeds).")
    for name in measured[0]:
        for lam in (0.0, 0.5, 0.9, 1.0):
            bias, noise = zip(*(m[name][lam] for m in measured))
            print(f"critic {name:13} lambda {lam:3}   bias {row(bias)}   noise {row(noise)}")
    print("\nThe lambda of least error, by the number of answers in a batch. A column is a policy (a seed):")
    best = {}
    for name in measured[0]:
        for n in (1, 16, 256, 4096):
            best[name, n] = [min(LAMBDAS, key=lambda lam: error(*m[name][lam], n)) for m in measured]
            print(f"critic {name:13} {answers(n):>12}   {row(best[name, n])}")

    def biases(ax):
        for name, colour in zip(measured[0], ('tab:green', 'tab:orange', 'tab:red')):
            for k, style in ((0, '-'), (1, ':')):
                ax.plot(LAMBDAS, [measured[0][name][lam][k] for lam in LAMBDAS], style, color=colour,
                        label=f"{('bias', 'noise')[k]}, critic {name}")
        ax.set(xlabel='lambda', ylabel='in lengths of the gradient', title='one answer')
        ax.set_ylim(top=7)
        ax.legend(fontsize=7)

    def errors(ax):
        for n in (1, 16, 256, 4096):
            ax.semilogy(LAMBDAS, [error(*measured[0]['wrong by 0.5'][lam], n) for lam in LAMBDAS], label=answers(n))
        ax.set(xlabel='lambda', ylabel='error', title='critic wrong by 0.5')
        ax.legend(fontsize=7)

    draw('4_gae', biases, errors)
    tell_exercises(globals())
    return sums, measured, best

def n_step(rewards, values, n):
    """Return the n-step advantages (T,) of one answer, rewards and values (T,); V is 0 after the last token."""

def weights(lam, left):
    """Return a list of the weights of n = 1, ..., left; beyond the end all n_step are the same."""

CHECKS = dict(
    n_step=lambda f: torch.allclose(f(R5, V5, 2), torch.tensor([-0.4, 0.1, 0.6, 0.1, 0.1]), atol=1e-6),
    weights=lambda f: torch.allclose(torch.tensor(f(0.5, 3)), torch.tensor([0.5, 0.25, 0.25])) and f(0.9, 1) == [1])

if __name__ == '__main__':
    main()
