"""Lesson 3: PPO step by step. The ratio, the clip, and why several epochs help and hurt.

    python lessons/3_ppo.py

Lesson 1 threw its samples away after one step. PPO (Schulman et al. 2017) takes several steps on the same samples. It
may do so because a sample of the old policy can stand for the new one, if we weigh it by the ratio:

    ratio = pi / pi_old          mean over samples of ratio A = what the new policy gains, while it stays near the old

Far away the samples say nothing more. So PPO clips: once the ratio has left [1 - clip, 1 + clip] in the direction that
A asks for, the token pulls no more. The objective is the one of RLHF, J - BETA KL(pi || pi_ref); we compute it exactly.

Exercises
1. Call `one_batch(0, clip=0.0)`. Every token leaves the range at once. Does the policy move at all? How far does it get
   in 16 epochs, against clip=0.2? Say it first.
2. Fill in `no_pull`: which tokens have no gradient? It is less than "the ratio is outside of the range".
3. Fill in `effective_samples`: n weights w are worth (sum of w)^2 / (sum of w^2) equal ones. How many of 32 are left
   when one answer's ratio is 100 and the others' 1?
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

import ppo
from common.rewards import Reward
from common.training import make_optimizer
from lessons.course import draw, tell_exercises
from lessons.world import PROMPT, RUN, TOK, TrueReward, expected, kl, log_pi, new_policy, optimum

import torch

BETA, N, NO_CLIP = 0.3, 32, 1e9 # the price of a nat of KL; answers in a batch
NAMES = {0.2: 'clip 0.2', NO_CLIP: 'no clip '}

def start(seed, clip, epochs):
    """Return options, models and optimizers as ppo.main makes them."""
    cfg = ppo.Config(prompts='world.py', device='cpu', max_new_tokens=3, kl_coef=BETA, missing_eos_penalty=0.0,
                     clip=clip, epochs=epochs, batch_size=N, lr=0.003, critic_lr=0.01, lr_schedule='constant')
    policy, critic = new_policy(seed), new_policy(seed + 100, value_head=True)
    models = ppo.Models(policy, critic, Reward([TrueReward()]), new_policy(seed))
    optimizers = {name: make_optimizer(getattr(models, name), cfg, eps=1e-5) for name in ('policy', 'critic')}
    torch.manual_seed(seed)
    return cfg, models, optimizers

def roll_out(models, cfg):
    """Return a batch of N answers with advantages, and the rows' lengths."""
    return ppo.roll_out(models, [PROMPT] * N, [{}] * N, TOK, cfg, BETA, RUN)[:2]

def exact(models):
    """Return the objective, the expected reward and the KL to the reference."""
    with torch.no_grad():
        logp, ref = log_pi(models.policy), log_pi(models.reference)
    return tuple(x.item() for x in (expected(logp) - BETA * kl(logp, ref), expected(logp), kl(logp, ref)))

def pull(ratio, A, clip):
    """Return the gradient by log pi with which ppo.policy_loss moves one token."""
    logp, one = torch.log(torch.tensor([[ratio]])).requires_grad_(), torch.ones(1, 1)
    return 0.0 - torch.autograd.grad(ppo.policy_loss(logp, 0 * one, A * one, one, clip), logp)[0].item()

def one_batch(seed, clip, batches=4):
    """Return {epochs: (objective, reward, KL, share of ratios outside 0.8 … 1.2)}, means over some first batches."""
    found = {0: [], 1: [], 4: [], 16: []}
    for k in range(batches):
        cfg, models, optimizers = start(seed, clip, epochs=1)
        torch.manual_seed(k)
        batch, lengths = roll_out(models, cfg)
        for epochs in range(17):
            if epochs in found:
                with torch.no_grad():
                    logp = models.policy.logp(batch['idx'], batch['mask'])
                outside = ppo.ratio_stats(logp, batch['old_logp'], batch['mask'], 0.2)[1]['clipfrac'].item()
                found[epochs].append((*exact(models), outside))
            ppo.update(models, optimizers, batch, lengths, cfg, RUN, 0)
    return {epochs: torch.tensor(rows).mean(0).tolist() for epochs, rows in found.items()}

def train(seed, clip, epochs, iterations):
    """Return the exact objective before and after each iteration; each samples N new answers."""
    cfg, models, optimizers = start(seed, clip, epochs)
    found = [exact(models)[0]]
    for step in range(iterations):
        batch, lengths = roll_out(models, cfg)
        ppo.update(models, optimizers, batch, lengths, cfg, RUN, step)
        found.append(exact(models)[0])
    return found

def main(seeds=(0, 1, 2), batches=4, iterations=20):
    ratios = (0.5, 0.9, 1.1, 1.5)
    print("CLIP at 0.2. How hard a token pulls at its log pi:\n   ratio   " + ''.join(f"{r:8}" for r in ratios))
    for A in (1.0, -1.0):
        print(f"A = {A:4}   " + ''.join(f"{pull(r, A, 0.2):8.2f}" for r in ratios))
    print("\nONE BATCH, several epochs. The objective, exact; the KL to the reference; ratios outside 0.8 … 1.2.\n"
          "Three numbers in a row are three seeds.")
    row = lambda values, form='6.2f': ' '.join(f"{value:{form}}" for value in values) # a column is a seed
    found = {clip: [one_batch(seed, clip, batches) for seed in seeds] for clip in (0.2, NO_CLIP)}
    for clip, runs in found.items():
        for epochs in runs[0]:
            print(f"{NAMES[clip]}   epochs {epochs:2}   objective "
                  + f"{row(run[epochs][0] for run in runs)}   reward {row(run[epochs][1] for run in runs)}   KL "
                  + f"{row(run[epochs][2] for run in runs)}   outside {row((run[epochs][3] for run in runs), '4.0%')}")
    times = row(no[16][2] / yes[16][2] for yes, no in zip(found[0.2], found[NO_CLIP]))
    print(f"After 16 epochs without the clip the KL is{times} times that with it. The batch never saw that price.")
    curves = {(clip, epochs): [train(seed, clip, epochs, iterations) for seed in seeds]
              for clip in (0.2, NO_CLIP) for epochs in (1, 4, 16)}
    best = []
    for seed in seeds:
        ref = log_pi(new_policy(seed)).detach()
        best.append((expected(optimum(ref, BETA)) - BETA * kl(optimum(ref, BETA), ref)).item())
    print(f"\nTRAINING, {iterations} iterations of {N} new answers. The objective: its mean on the way, lowest, last.")
    for (clip, epochs), runs in curves.items():
        print(f"{NAMES[clip]}   epochs {epochs:2}   mean {row(sum(r) / len(r) for r in runs)}"
              f"   lowest {row(map(min, runs))}   last {row(r[-1] for r in runs)}")
    print(f"No policy can do better than  {row(best)}")

    def surrogate(ax):
        ratio = torch.linspace(0.4, 1.8, 141)
        for A, colour in ((1.0, 'tab:blue'), (-1.0, 'tab:red')):
            L = [-ppo.policy_loss(r.log().view(1, 1), *torch.tensor([[[0.0]], [[A]], [[1.0]]]), 0.2) for r in ratio]
            ax.plot(ratio, L, color=colour, label=f"A = {A:.0f}")
        ax.set(xlabel='ratio', ylabel='surrogate', title='flat: the token pulls no more')
        ax.legend()

    def training(ax):
        for clip, epochs, colour in ((0.2, 1, '0.6'), (0.2, 4, 'g'), (0.2, 16, 'b'), (NO_CLIP, 16, 'r')):
            for k, run in enumerate(curves[clip, epochs]):
                ax.plot(run, color=colour, lw=1, label=None if k else f"{NAMES[clip].strip()}, epochs: {epochs}")
        ax.set(xlabel='iteration', ylabel='objective, exact', title='the same number of samples')
        ax.legend(fontsize=7)

    draw('3_ppo', surrogate, training)
    tell_exercises(globals())
    return found, curves, best

def no_pull(ratio, A, clip):
    """Return True where a token has no gradient; ratio and A: tensors of one shape."""

def effective_samples(logp, old_logp):
    """Return how many equal samples the ratios of n answers are worth (); log pi of the answers, (n,) each."""

RATIOS, AS = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5]), torch.tensor([1.0, -1, 1, 1, -1])
CHECKS = dict(
    no_pull=lambda f: f(RATIOS, AS, 0.2).tolist() == [pull(r.item(), a.item(), 0.2) == 0 for r, a in zip(RATIOS, AS)],
    effective_samples=lambda f: abs(f(torch.tensor([3.0, 1, 1]).log(), torch.zeros(3)) - 25 / 11) < 1e-4)

if __name__ == '__main__':
    main()
