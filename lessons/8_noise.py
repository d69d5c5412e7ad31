"""Lesson 8: what noise, ties and wrong labels do.

    python lessons/8_noise.py

Three things spoil comparisons. Noise: people see the better answer as better only most of the time, the closer the two
the less often (`SimulatedPerson`, the Bradley-Terry model of lesson 2). Ties: answers that seem equal make no pair.
Wrong labels: somebody presses the wrong key, however clear the case. We make all three, and know the truth.

First a reward model learns from the labels. Is it right more often than its labels were? Errors that do not agree with
one another may average out. The best of 8 answers by this model then shows what it is worth.

Then DPO learns from the labels directly. With label smoothing e it takes a share e of them for wrong:

    L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)            h = beta * difference of the log-ratios

This loss is least at a finite h, log((1 - e) / e), even if all labels agree. So it holds the policy back; and so does a
larger beta. We therefore compare smoothing with no smoothing at several beta.

Exercises
1. 2,000 comparisons with 20 % wrong labels, or 500 without: which gives the better reward model? Guess, then run
   `reward_model_line` with both, for three seeds.
2. Fill in `seen_right`: people prefer the better answer with probability p, and a share e of their labels is turned
   round. How often is the label right? Which e makes labels worthless?
3. Fill in `robust_loss`: a loss whose mean over turned and unturned labels is that of clean ones (Chowdhury et al.
   2024, https://arxiv.org/abs/2403.00409). Hint: a L(h) + b L(-h). Does it beat the best of the last table?
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from dpo import dpo_loss
from feedback.annotators import SimulatedPerson
from lessons.course import draw, tell_exercises
from lessons.world import ALL, REWARDS, best_of, descend, expected, kl, log_pi, new_policy
from reward import bradley_terry_loss

import numpy as np
import torch
import torch.nn.functional as F

KINDS = [dict(noise=0.0), dict(noise=1.0), dict(noise=2.0), dict(noise=4.0), # people
         dict(noise=1.0, tie=1.0), dict(noise=1.0, tie=2.0), # what seems at most this far apart is a tie
         *(dict(noise=0.0, wrong=wrong) for wrong in (0.1, 0.2, 0.3, 0.4))]
WRONG, SMOOTHING, BETAS = (0.0, 0.2, 0.4), (0.0, 0.2), (0.5, 1.0, 2.0, 4.0) # of DPO

def label(seed, ref, n, noise=1.0, tie=0.0, wrong=0.0):
    """Ask about n pairs of the reference's answers; return (2, m) answers, chosen and rejected, m <= n."""
    torch.manual_seed(seed)
    person = SimulatedPerson(SimpleNamespace(seed=seed, noise=noise, tie=tie), lambda _, y: REWARDS[int(y)].item())
    pairs = torch.multinomial(ref.exp(), 2 * n, replacement=True).view(n, 2) # (n, 2) numbers of answers
    ranks = torch.tensor([person.rank(dict(responses=[str(y) for y in pair]))[0] for pair in pairs.tolist()]) # (n, 2)
    pairs = pairs.gather(1, ranks.argsort(1))[ranks[:, 0] != ranks[:, 1]].T # (2, m), the better one first
    return torch.where(torch.rand(pairs.size(1)) < wrong, pairs.flip(0), pairs)

def reward_model_line(seed, n, steps, **kind):
    """Return four numbers: labels, shares right of labels and model, reward of best of 8."""
    ref = log_pi(new_policy(seed)).detach() # (156,)
    chosen, rejected = label(seed, ref, n, **kind) # (m,)
    model = new_policy(1000 + seed, noise=0.05, reward_head=True)
    scores = lambda: model.rewards(ALL.idx, ALL.lengths) # (156,)
    descend(model.parameters(), lambda: bradley_terry_loss(scores()[chosen], scores()[rejected]), steps, 0.003)
    r = scores().detach()
    clear = (REWARDS[:, None] > REWARDS) * (ref[:, None] + ref).exp() # (156, 156) how likely this pair is asked about
    right = (clear * (r[:, None] > r)).sum() / clear.sum()
    differ = REWARDS[chosen] != REWARDS[rejected]
    labels = (REWARDS[chosen] > REWARDS[rejected])[differ].float().mean()
    return [float(len(chosen)), labels.item(), right.item(), expected(best_of(8, ref, r)).item()]

def dpo_line(seed, n, steps, wrong, smoothing, beta):
    """Train by DPO on labels of noise 1; return reward and KL(pi || pi_ref)."""
    policy, ref = new_policy(seed), log_pi(new_policy(seed)).detach() # ref: (156,)
    w, l = label(seed, ref, n, wrong=wrong) # (m,)

    def loss():
        pi = log_pi(policy) # (156,)
        return dpo_loss(pi[w], pi[l], ref[w], ref[l], beta, smoothing)[0]
    descend(policy.parameters(), loss, steps, 0.003)
    logp = log_pi(policy).detach() # (156,)
    return [expected(logp).item(), kl(logp, ref).item()]

def main(seeds=(0, 1, 2), n=1000, steps=200):
    mean = lambda line, *args, **kind: np.mean([line(seed, n, steps, *args, **kind) for seed in seeds], 0).tolist()
    print(f"Means of seeds {seeds}; people are asked about {n} pairs.\n\n"
          f"{'':24}labels  right  reward model right  reward of best of 8")
    found = [(kind, *mean(reward_model_line, **kind)) for kind in KINDS]
    for kind, count, labels, right, reward in found:
        name = ', '.join(f"{key} {value}" for key, value in kind.items())
        print(f"{name:24}{count:6.0f}{labels:7.2f}{right:20.2f}{reward:21.2f}")
    above = [right > labels for _, _, labels, right, _ in found]
    print(f"The reward model is right more often than its labels in {sum(above)} of {len(found)} lines.\n\n"
          f"DPO: reward (KL to the reference)\n\nwrong  smoothing" + ''.join(f"{f'beta {beta}':>15}" for beta in BETAS))
    dpo = {(wrong, e): [mean(dpo_line, wrong, e, beta) for beta in BETAS] for wrong in WRONG for e in SMOOTHING}
    for (wrong, e), lines in dpo.items():
        print(f"{wrong:5}{e:11}" + ''.join(f"{f'{reward:.2f} ({nats:.2f})':>15}" for reward, nats in lines))
    gains = []
    for (wrong, e), lines in dpo.items():
        rewards, far = np.transpose(dpo[wrong, 0.0])[:, ::-1] # (betas,) each, the smallest KL first
        gains += [r - np.interp(nats**0.5, far**0.5, rewards) for r, nats in lines if e and nats >= far[0]]
    pairs = [(a, b) for wrong in WRONG for a, b in zip(dpo[wrong, SMOOTHING[1]], dpo[wrong, 0.0])] # smoothed, plain
    lower = [sum(a[i] < b[i] for a, b in pairs) for i in (0, 1)]
    print(f"Smoothing lowers the reward in {lower[0]} of {len(pairs)} cases, and the KL in {lower[1]}.\nAgainst plain "
          f"DPO with a beta that goes as far (interpolated), it changes the reward by {min(gains):+.2f} to "
          f"{max(gains):+.2f}.")

    def models(ax):
        ax.plot([line[2] for line in found], [line[3] for line in found], 'o')
        for kind, _, labels, right, _ in found:
            ax.annotate(' '.join(f"{key} {value:g}" for key, value in kind.items()), (labels, right), fontsize=6)
        ax.plot([0.5, 1], [0.5, 1], 'k:')
        ax.set(xlabel='labels right', ylabel='reward model right', title='a model averages errors')

    def policies(ax):
        for (wrong, e), lines in dpo.items():
            ax.plot([nats for _, nats in lines], [reward for reward, _ in lines], 'x--' if e else 'o-',
                    color=f"C{WRONG.index(wrong)}", label=f"{wrong:.0%} wrong, smoothing {e}")
        ax.set(xlabel='KL(pi || pi_ref) [nats]', ylabel='true reward', title='DPO, beta from 4 (left) to 0.5')
        ax.legend(fontsize=7, loc='lower right')

    draw('8_noise', models, policies)
    tell_exercises(globals())
    return found, dpo

def seen_right(p, e):
    """Return how often a label is right."""

def robust_loss(h, e):
    """Return a loss (B,) of h (B,): its mean over labels, a share e turned, is that of clean ones."""

H = torch.tensor([-1.0, 0.5, 2.0])
CHECKS = dict(
    seen_right=lambda f: abs(f(0.8, 0.25) - 0.65) < 1e-6 and abs(f(0.9, 0.5) - 0.5) < 1e-6,
    robust_loss=lambda f: torch.allclose(0.8 * f(H, 0.2) + 0.2 * f(-H, 0.2), -F.logsigmoid(H), atol=1e-6))

if __name__ == '__main__':
    main()
