"""
Which prompts are worth a person's time: those to rank first, chosen from the answers before anybody has seen them.
collect.py calls this with --select and --budget.

    python collect.py config/toy/collect.py --select=diverse --budget=500 --out=out/toy/diverse.jsonl
    python collect.py config/toy/collect.py --select=uncertain --ensemble=out/a,out/b --budget=500 --out=out/u.jsonl

random      the baseline
uncertain   where reward models of an ensemble disagree most (Gleave and Irving 2022,
            https://arxiv.org/abs/2203.07472, who found it no better than random: members that start from one language
            model are alike). Let theirs differ in seed and in what they were trained on.
diverse     answers unlike those chosen before: greedy k-center (Gonzalez 1985; Sener and Savarese 2018,
            https://arxiv.org/abs/1708.00489) on the Jaccard distance of the sets of words in the answers. No model is
            needed; what an answer means is not seen, and rare words count as much as any.

Every one gives the prompts in order of worth: the first 100 of 500 are the 100 that a budget of 100 would have got.
"""

import random

import common # before torch

import numpy as np
import torch

from model import load_reward_model
from rollout import score_records
from tokens import load_tokenizer


def disagreement(scores):
    """
    How far M reward models disagree on the K answers to one prompt: the standard deviation over the models of the score
    difference of two answers, a mean over the pairs, which weigh alike in the ranking loss. scores: (M, K) -> number.
    A constant that a model adds to all its scores changes nothing.
    """
    scores = torch.as_tensor(scores, dtype=torch.float32)
    first, second = torch.triu_indices(scores.size(1), scores.size(1), 1) # all pairs, (K(K-1)/2,) each
    return (scores[:, first] - scores[:, second]).std(0, correction=0).mean().item()


def most_uncertain(scores, n):
    """The n prompts on which the models disagree most. scores: per prompt (M, K). Returns numbers, largest first."""
    return sorted(range(len(scores)), key=lambda i: -disagreement(scores[i]))[:n]


def words_of(rows):
    """(N, V) 0/1: which of all V words stand in any answer of each row."""
    found = [set(' '.join(row['responses']).split()) for row in rows]
    column = {word: v for v, word in enumerate(sorted(set().union(*found)))}
    table = np.zeros((len(rows), len(column)), dtype=np.float32)
    for i, words in enumerate(found):
        table[i, [column[word] for word in words]] = 1
    return table


def farthest_first(table, n):
    """
    Greedy k-center: row 0, then again and again the row whose nearest chosen row is farthest away, the first of equal
    ones. table: (N, V) 0/1, sets; the distance of two is Jaccard's, 1 - |a and b| / |a or b|. Returns n row numbers.
    """
    sizes, nearest, chosen = table.sum(1), np.full(len(table), np.inf), [] # nearest: (N,) distance to a chosen row
    for _ in range(min(n, len(table))):
        i = int(nearest.argmax())
        both = table @ table[i] # (N,)
        nearest = np.minimum(nearest, 1 - both / (sizes + sizes[i] - both).clip(1))
        nearest[i] = -1 # never again
        chosen.append(i)
    return chosen


def choose(rows, cfg, run):
    """The cfg.budget rows with `responses` to rank, the most worthwhile first, of those with two answers."""
    rows = [row for row in rows if len(row['responses']) >= 2]
    if cfg.select == 'uncertain':
        by_model = []
        for name in cfg.ensemble.split(','):
            model, tok = load_reward_model(name, 'ensemble').to(run.device).eval(), load_tokenizer(name)
            with run.autocast():
                by_model.append(dict(score_records(model, tok, rows, model.config.block_size, name, run.device)))
        rows = [(row, [scores[i] for scores in by_model]) for i, row in enumerate(rows)
                if all(i in scores for scores in by_model)] # an answer longer than a context was left out, and reported
        chosen = most_uncertain([scores for _, scores in rows], cfg.budget)
        rows = [row for row, _ in rows]
    elif cfg.select == 'diverse':
        chosen = farthest_first(words_of(rows), cfg.budget) if rows else []
    else:
        chosen = random.Random(cfg.seed).sample(range(len(rows)), len(rows))[:cfg.budget]
    return [rows[i] for i in chosen]
