"""Solutions of lesson 6. Run this file to see the numbers of exercises 1 and 3.

1. DPO. At beta 0.5 pi* wants "very very good" often: its reward of 3 is worth a factor of e^6. The reference writes it
   once in 200 answers, so few comparisons show it, and DPO learns from comparisons alone. PPO and RLOO sample from the
   policy: as it gets better, such answers come up. More comparisons, or comparisons of the policy's answers, help.
2. log pi* - log pi_ref = r / beta - log c. So r = beta (log pi - log pi_ref), up to a constant.
3. k3 does. Without the division GRPO ends about as far from pi*. k3 in the loss has, at each token, the gradient of
   KL(pi_ref || pi), so the policy stops where pi_ref beta / pi + A is the same number c for all tokens.
   `grpo_optimum` solves this, and GRPO ends there.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from lessons.course import load
from lessons.world import ALL, ANSWERS, EOS, LONGEST, NUMBER, REWARDS, TOK, by_value, kl, log_pi, new_policy, optimum
from lessons.world import root
from reinforce import advantages

import torch

def implied_reward(logp, ref, beta):
    """Return r (156,), mean 0 under the reference; logp, ref: (156,)."""
    r = beta * (logp - ref) # (156,)
    return r - (ref.exp() * r).sum()

def centred(rewards, kind):
    """Return advantages (B, K) of rewards (B, K): GRPO's without the division, the others as they are."""
    return rewards - rewards.mean(1, keepdim=True) if kind == 'grpo' else advantages(rewards, kind)

def mean_advantages(logp, advantages_of, K=4):
    """Return each answer's expected advantage (156,) among K - 1 others."""
    levels, level = REWARDS.unique(return_inverse=True) # (L,), (156,)
    others = torch.cartesian_prod(*[torch.arange(len(levels))] * (K - 1)) # (L^3, 3)
    weights = by_value(logp)[others].prod(1).float() # (L^3,)
    groups = [torch.cat([r.expand(len(others), 1), levels[others]], 1) for r in levels] # (L^3, K) each
    return torch.stack([(weights * advantages_of(group, 'grpo')[:, 0]).sum() for group in groups])[level]

def grpo_step(logp, ref, beta, advantages_of):
    """Return log pi (156,) that solves pi = pi_ref beta / (c - A) per token; ref: (156, 3); A is that of log pi."""
    A, out = mean_advantages(logp, advantages_of), torch.zeros(len(ANSWERS))

    def solve(start):
        """Fill in the tokens after start; return the mean advantage, and the answers that begin so."""
        if len(start) == LONGEST or EOS in start:
            return A[NUMBER[start]], [NUMBER[start]]
        Q, answers = zip(*[solve((*start, token)) for token in range(EOS + 1)])
        Q = torch.stack(Q) # (6,) the mean advantage after each token
        p = lambda c: beta * ref[[a[0] for a in answers], len(start)].exp() / (c - Q) # (6,)
        p = p(root(lambda c: p(c).sum() - 1, Q.max().item() + 1e-6, Q.max().item() + 50))
        for a, x in zip(answers, p):
            out[a] += x.log()
        return (p * Q).sum() / p.sum(), sum(answers, [])
    solve(())
    return out.log_softmax(0)

def grpo_optimum(ref, beta, advantages_of=advantages, rounds=8):
    """Return log pi (156,) at which GRPO stops; ref: (156, 3) log pi_ref per token."""
    logp = ref.sum(1) # (156,)
    for _ in range(rounds): # A depends on pi: go half of the way each time
        logp = ((logp + grpo_step(logp, ref, beta, advantages_of)) / 2).log_softmax(0)
    return logp

def exercise_1(seed=0, steps=600, n=512, beta=0.5):
    """Return {method: (KL(pi || pi*), {answer: its probability})} with this beta, and that of the reference."""
    lesson, ref = load('6_dpo'), log_pi(new_policy(seed)).detach()
    lesson.BETA = beta
    best = optimum(ref, beta).topk(2).indices # the two answers that pi* gives most often
    policies = {'pi*': optimum(ref, beta), 'reference': ref}
    policies |= {method: lesson.train(method, seed, steps, n) for method in ('RLOO', 'DPO')}
    return {name: (kl(logp, optimum(ref, beta)).item(), {TOK.decode(ANSWERS[y]): logp[y].exp().item() for y in best})
            for name, logp in policies.items()}

def exercise_3(seed=0, steps=600, n=512):
    """Return {with the division: (KL to pi*, KL to grpo_optimum)} of GRPO."""
    lesson, ref, found = load('6_dpo'), new_policy(seed).logp(ALL.idx, ALL.mask).detach(), {}
    for division in (True, False):
        lesson.advantages = advantages if division else centred
        logp = lesson.train('GRPO', seed, steps, n) # (156,)
        own = grpo_optimum(ref, lesson.BETA, lesson.advantages) # (156,)
        found[division] = kl(logp, optimum(ref.sum(1), lesson.BETA)).item(), kl(logp, own).item()
    return found

if __name__ == '__main__':
    for name, (distance, answers) in exercise_1().items():
        print(f"{name:10} KL(pi||pi*) {distance:.3f} " + ', '.join(f"{text!r}: {p:.4f}" for text, p in answers.items()))
    for division, distances in exercise_3().items():
        print('GRPO', 'with' if division else 'without', "division: KL to pi* %.3f, to its own %.4f" % distances)
