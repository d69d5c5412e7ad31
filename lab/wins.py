"""What votes and ratings tell of policies: win rates, also at equal length, strengths, means, and intervals."""

import json
import math
from collections import Counter, namedtuple
from itertools import permutations
from statistics import fmean

from common.options import fail
from common.records import is_text
from feedback.annotators import answers_of, visible

import torch

Vote = namedtuple('Vote', 'prompt policy other win length other_length') # win: 1, 0, or 1/2 for a tie

def wilson(p, n, z=1.959964):
    """Return the 95 % interval of a share p in n trials.

    Wilson 1927. It stays within [0, 1] and keeps a width at p = 0 and 1. Ties as half a win make it rather too wide.
    """
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]

def length_controlled(wins, lengths, baseline_lengths):
    """Return the win rate that answers of equal length would have.

    Length-controlled AlpacaEval, Dubois et al. 2024, https://arxiv.org/abs/2404.04475:

        P(win) = sigmoid(theta + phi tanh((l - l_b) / std(l - l_b)))            result: sigmoid(theta)

    Maximum likelihood finds theta and phi from wins (N,), 0 to 1, and the answers' lengths in characters, (N,) each.
    -phi^2 / 2 is added to the log-likelihood, so phi stays finite where length alone decides. Left out is the paper's
    term for the difficulty of each instruction, which is learnt from many models.
    """
    y = torch.tensor(wins, dtype=torch.float64) # (N,)
    if y.mean() in (0.0, 1.0): # theta is infinite
        return y.mean().item()
    d = torch.tensor(lengths, dtype=torch.float64) - torch.tensor(baseline_lengths, dtype=torch.float64) # (N,)
    x = torch.stack([torch.ones_like(d), torch.tanh(d / d.std(correction=0).clamp(min=1e-6))], 1) # (N, 2)
    b, penalty = torch.zeros_like(x[0]), torch.tensor([0.0, 1.0], dtype=torch.float64) # (2,): theta, phi
    for _ in range(30): # Newton's method
        p = torch.sigmoid(x @ b) # (N,)
        b = b + torch.linalg.solve((x.T * p * (1 - p)) @ x + penalty.diag(), x.T @ (y - p) - penalty * b)
    return torch.sigmoid(b[0]).item()

def strengths(wins):
    """Return Bradley–Terry strengths (…, P) on the Elo scale, their mean 1000.

    Bradley and Terry 1952. wins: (…, P, P), how often i beat j.

        P(i beats j) = sigmoid(theta_i - theta_j)            Elo = 1000 + 400 / ln 10 (theta - mean of theta)

    Newton's method finds the likeliest theta. Half a win and half a loss against an average policy, theta = 0, are
    added for each, so theta stays finite for one that won everything.
    """
    games, theta = wins + wins.mT, torch.zeros_like(wins[..., 0]) # (…, P, P), (…, P)
    for _ in range(100):
        p, q = torch.sigmoid(theta[..., :, None] - theta[..., None, :]), torch.sigmoid(theta) # (…, P, P), (…, P)
        slope, curve = wins.sum(-1) - (games * p).sum(-1) + 0.5 - q, games * p * (1 - p)
        step = torch.linalg.solve(torch.diag_embed(curve.sum(-1) + q * (1 - q)) - curve, slope)
        theta = theta + step / step.abs().amax(-1, keepdim=True).clamp(min=1) # a longer step could overshoot
        if step.abs().max() < 1e-9:
            break
    return 1000 + 400 / math.log(10) * (theta - theta.mean(-1, keepdim=True))

def resample(table, n, seed):
    """Sum a table (prompts, …) over prompts that are drawn anew with replacement: (n, …).

    The bootstrap, Efron 1979. All that was said of a prompt stays together, since it is not independent.
    """
    rng, prompts = torch.Generator().manual_seed(seed), len(table)
    counts = (torch.randint(prompts, (prompts,), generator=rng).bincount(minlength=prompts) for _ in range(n))
    return torch.stack([torch.tensordot(count.to(table), table, 1) for count in counts])

def interval(values):
    """Return the middle 95 % of the values; NaN does not count."""
    return values.nanquantile(torch.tensor([0.025, 0.975]).to(values)).tolist()

def votes_of(rows, where):
    """Return the votes between policies, and counts of the pairs left out.

    Each vote is there twice, as its two policies see it. where: names the files in an error.
    """
    votes, left_out = [], Counter()
    for row in rows:
        writers, prompt = row.get('policies'), json.dumps(row['prompt'], ensure_ascii=False)
        if not (isinstance(writers, list) and len(writers) == len(row['ranks']) and all(map(is_text, writers))):
            fail(f"{where}: prompt {prompt}: wanted `policies`, the name of each response's writer, as collect.py "
                 f"--policy=A,B writes them; got {json.dumps(writers)}")
        answers = zip(map(visible, writers), row['ranks'], answers_of(row))
        for (policy, rank, answer), (other, other_rank, other_answer) in permutations(answers, 2):
            if policy == other or answer == other_answer:
                left_out['by one policy' if policy == other else 'of equal answers'] += 1
                continue
            win = (rank < other_rank) + 0.5 * (rank == other_rank)
            votes.append(Vote(prompt, policy, other, win, len(answer[0]), len(other_answer[0])))
    return votes, {why: n // 2 for why, n in left_out.items()}

def measure(votes, baseline, n, seed):
    """Return {policy: its numbers} from votes, the strongest first; n, seed: of resample."""
    names, prompts = ({x: i for i, x in enumerate(dict.fromkeys(column))} for column in list(zip(*votes))[1::-1])
    wins = torch.zeros(len(prompts), len(names), len(names), dtype=torch.float64) # (prompts, P, P)
    for v in votes:
        wins[prompts[v.prompt], names[v.policy], names[v.other]] += v.win
    many, table = resample(wins, n, seed), {} # (n, P, P)
    drawn = strengths(many).masked_fill((many + many.mT).sum(-1) == 0, torch.nan) # (n, P); NaN: not drawn
    for name, elo, values in sorted(zip(names, strengths(wins.sum(0)).tolist(), drawn.T), key=lambda row: -row[1]):
        mine = [v for v in votes if v.policy == name]
        against = list(zip(*(v[3:] for v in mine if v.other == baseline))) # wins, lengths, the baseline's lengths
        rate, trials = fmean(v.win for v in mine), len({v.prompt for v in mine})
        table[name] = {
            'comparisons': len(mine), 'win_rate': rate, 'win_rate_interval': wilson(rate, trials),
            'elo': elo, 'elo_interval': interval(values), 'wins_vs_baseline': fmean(against[0]) if against else None,
            'at_equal_length': length_controlled(*against) if against else None,
            'characters': fmean(v.length for v in mine)}
    return table

def measure_ratings(rows, qualities, n, seed):
    """Return {policy: how many ratings, and the mean of each quality}; n, seed: of resample."""
    policies, table = {}, {} # policies: {policy: {prompt: [the numbers of each rating, and a 1]}}
    for row in rows:
        for policy in visible(row['policy']).split(','): # a text may be of several
            prompts = policies.setdefault(policy, {})
            prompts.setdefault(json.dumps(row['prompt']), []).append([*map(row.get, qualities), 1])
    for name, prompts in policies.items():
        sums = torch.tensor([[*map(sum, zip(*said))] for said in prompts.values()], dtype=torch.float64)
        (*totals, count), drawn = sums.sum(0).tolist(), resample(sums, n, seed) # of (prompts, Q + 1); (n, Q + 1)
        table[name] = {'ratings': round(count)}
        for quality, total, column in zip(qualities, totals, drawn.T):
            table[name] |= {quality: total / count, f'{quality}_interval': interval(column / drawn[:, -1])}
    return table
