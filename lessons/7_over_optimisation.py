"""Lesson 7: over-optimisation. The score rises, and the answers get worse.

    python lessons/7_over_optimisation.py

A reward model is a proxy: it saw some comparisons, and guesses the rest. A policy that seeks its highest scores finds
its errors. Gao, Schulman and Hilton (2022, https://arxiv.org/abs/2210.10760) measured it: the further a policy goes
from the reference, the higher the proxy. The true reward ("gold") rises too, and then turns over.

Gold here is the reward of world.py, but an answer that says a word twice gets -3. The reference hardly ever does that,
so people hardly ever see it. A GPT with a reward head learns from their comparisons (lesson 2). Two policies follow it,
and we know both exactly: best of n, and pi* for a falling price beta (lesson 5). At last RLOO follows it with samples.
Scores are in units of their spread under the reference, whose mean score is 0.

Exercises
1. The same number of comparisons, but of answers drawn evenly: in `learn_proxy` write
   `compare(n, torch.zeros_like(ref).log_softmax(0), GOLD)`. Does gold still turn over? Guess first.
2. Fill in `bound`: the KL of best of n is at most log n - (n - 1) / n. The first table then shows how close that is.
3. Fill in `pessimist`: from several proxies' scores make one that no single proxy can push up. Coste et al. 2023,
   https://arxiv.org/abs/2310.02743, take the lowest. Does that help here? The solution measures it.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common.rollout import kl_k1
from lessons.course import draw, tell_exercises
from lessons.world import ALL, ANSWERS, REWARDS, TOK, best_of, compare, descend, expected, kl, log_pi, new_policy
from ppo import policy_loss
from reinforce import advantages
from reward import bradley_terry_loss, normalise_rewards

import torch

TWICE = torch.tensor([len({*answer}) < len(answer) for answer in ANSWERS]) # (156,)
GOLD = torch.where(TWICE, -3.0, REWARDS) # (156,)
N_BEST = [2**i for i in range(13)] # 1 … 4096
LR = 0.005
BETAS = [2.0**i for i in range(4, -11, -1)] # 16 … 1/1024

def new_reference(seed, steps):
    """Return a GPT that hardly ever says a word twice."""
    policy = new_policy(seed)
    target = (log_pi(policy).detach() - 3 * TWICE).log_softmax(0) # (156,)
    descend(policy.parameters(), lambda: kl(target, log_pi(policy)), steps, LR)
    return policy

def spread_of(ref, values):
    """Return mean and standard deviation, () each, of values (156,) under the reference."""
    mean = expected(ref, values)
    return mean, expected(ref, (values - mean)**2).sqrt()

def learn_proxy(seed, ref, n, steps):
    """Learn from n comparisons; return scores (156,) and how often each answer was seen (156,)."""
    model = new_policy(1000 + seed, noise=0.05, reward_head=True) # the seed also chooses what people see
    chosen, rejected = compare(n, ref, GOLD) # (n,)
    scores = lambda: model.rewards(ALL.idx, ALL.lengths) # (156,)
    descend(model.parameters(), lambda: bradley_terry_loss(scores()[chosen], scores()[rejected]), steps, LR)
    normalise_rewards(model, *spread_of(ref, scores().detach()))
    return scores().detach(), torch.bincount(torch.cat([chosen, rejected]), minlength=len(GOLD))

def follow(ref, proxy, policies):
    """Return KL, proxy and gold score (policies, 3) of policies, log pi (156,) each."""
    mean, std = spread_of(ref, GOLD)
    return torch.tensor([[kl(q, ref), expected(q, proxy), (expected(q, GOLD) - mean) / std] for q in policies])

def rloo(seed, reference, proxy, beta, steps, n=256, K=4):
    """Train a policy on the proxy; return log pi (156,) after 0, 1 … steps."""
    policy, found, ref = new_policy(seed), [], reference.logp(ALL.idx, ALL.mask).detach() # ref: (156, 3)
    policy.load_state_dict(reference.state_dict())
    torch.manual_seed(seed)

    def loss():
        logp = policy.logp(ALL.idx, ALL.mask) # (156, 3)
        found.append(logp.sum(1).detach())
        y = torch.multinomial(found[-1].exp(), n, replacement=True) # (n,) as if sampled token by token
        R = proxy[y] - beta * kl_k1(logp.detach(), ref)[y].sum(1) # (n,)
        A = advantages(R.view(-1, K), 'rloo').view(-1, 1) * ALL.mask[y] # (n, 3)
        return policy_loss(logp[y], logp[y].detach(), A, ALL.mask[y], 0.2)
    descend(policy.parameters(), loss, steps + 1, LR)
    return found

def main(seeds=(0, 1, 2), people=3, comparisons=(100, 1000, 10000), steps=200):
    models = {seed: new_reference(seed, steps) for seed in seeds}
    refs = {seed: log_pi(model).detach() for seed, model in models.items()} # log pi_ref (156,) each
    print("A word twice, share in the references:", *[f"{expected(ref, TWICE.float()):.3f}" for ref in refs.values()])
    found, proxies, fell, runs, few = {}, {}, {}, {}, comparisons[0]
    for n in comparisons:
        for seed in seeds:
            for person in range(people): # others see other answers
                proxy, _ = proxies[n, seed, person] = learn_proxy(100 * seed + person, refs[seed], n, steps)
                for name, policies in (('best of n', [best_of(k, refs[seed], proxy) for k in N_BEST]),
                                       ('pi*', [(refs[seed] + proxy / beta).log_softmax(0) for beta in BETAS])):
                    found.setdefault((n, name), []).append(follow(refs[seed], proxy, policies))
    found = {key: torch.stack(curves).mean(0) for key, curves in found.items()} # (policies, 3)
    print(f"Means of {len(seeds)} references, {people} reward models each. Best of n by proxies of {few} comparisons:"
          "\n\n    n     KL  bound  proxy   gold")
    for k, line in zip(N_BEST, found[few, 'best of n'].tolist()):
        print(f"{k:5}{line[0]:7.2f}{bound(k) or float('nan'):7.2f}{line[1]:7.2f}{line[2]:7.2f}")
    print("\ncomparisons  policy     highest gold  at KL  gold at the end  proxy at the end")
    for (n, name), curve in found.items():
        top, last = curve[curve[:, 2].argmax()], curve[-1]
        fell[n, name] = top[2] - last[2], curve[:, 1].max() - last[1]
        print(f"{n:11}  {name:9}{top[2]:14.2f}{top[0]:7.2f}{last[2]:17.2f}{last[1]:18.2f}")
    falls = [sum(fall >= 0.1 for fall in kind) for kind in zip(*fell.values())]
    print(f"Of {len(fell)} curves, gold ends 0.1 or more below its highest in {falls[0]}, the proxy in {falls[1]}.")
    print(f"\nWhy? The favourite of proxies of {few} comparisons, {2 * few} answers:")
    for seed in seeds:
        (proxy, seen), y = proxies[few, seed, 0], proxies[few, seed, 0][0].argmax()
        print(f"  {TOK.decode(ANSWERS[y])!r}: gold {GOLD[y]:.0f}, share in the reference {refs[seed][y].exp():.4f}, "
              f"seen {seen[y]}x")
    print(f"\nRLOO on the same proxies, {steps} steps. Gold at its highest and at the end:")
    for beta in (0.0, 0.5):
        for seed in seeds:
            proxy = proxies[few, seed, 0][0]
            run = runs[beta, seed] = follow(refs[seed], proxy, rloo(seed, models[seed], proxy, beta, steps))
            print(f"  beta {beta}, seed {seed}: {run[:, 2].max():5.2f} -> {run[-1, 2]:5.2f}, KL {run[-1, 0]:.1f}")

    def plot(name, ax):
        for n, colour in zip(comparisons, ('tab:red', 'tab:orange', 'tab:green')):
            kls, proxy, gold = found[n, name].T
            ax.plot(kls, proxy, '--', color=colour)
            ax.plot(kls, gold, '.-', color=colour, label=f"{n} comparisons")
        ax.set(xlabel='KL(pi || pi_ref) [nats]', ylabel='score: proxy dashed, gold solid', title=name)
        ax.legend(fontsize=7)

    draw('7_over_optimisation', partial(plot, 'best of n'), partial(plot, 'pi*'))
    tell_exercises(globals())
    return found, runs

def bound(n):
    """Return the bound on the KL of best of n."""

def pessimist(scores):
    """Return scores (156,) that follow the lowest of several proxies, scores (E, 156)."""

CHECKS = dict(bound=lambda f: abs(f(4) - 0.6363) < 1e-3,
              pessimist=lambda f: f(torch.tensor([[1.0, 5.0], [3.0, 2.0]])).tolist() == [1, 2])

if __name__ == '__main__':
    main()
