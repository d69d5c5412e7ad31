"""Which prompts are worth a person's time: some are chosen by their answers, before anybody has seen them.

random      the baseline
uncertain   where reward models of an ensemble disagree most (Gleave and Irving 2022,
            https://arxiv.org/abs/2203.07472). Let the members differ in seed and in training data.
diverse     answers unlike those chosen before: greedy k-center (Gonzalez 1985; Sener and Savarese 2018,
            https://arxiv.org/abs/1708.00489) on the Jaccard distance of the sets of words in the answers

Each orders the prompts by worth: a smaller budget takes the first of a larger one.
"""

import random

import numpy as np
import torch

from common.checkpoints import load_reward_model
from common.rollout import check_context, check_same_vocabulary
from common.tokens import load_tokenizer
from feedback.annotators import check_finite
from feedback.scores import score_records

def disagreement(scores):
    """Measure how far M reward models disagree on K answers; scores: (M, K).

    The standard deviation over the models of the score difference of two answers, a mean over all pairs.
    """
    scores = torch.as_tensor(scores, dtype=torch.float32)
    first, second = torch.triu_indices(scores.size(1), scores.size(1), 1) # all pairs, (K(K-1)/2,) each
    return (scores[:, first] - scores[:, second]).std(0, correction=0).mean().item()

def most_uncertain(scores, n):
    """Return the numbers of the n prompts with the largest disagreement. scores: per prompt (M, K)."""
    return sorted(range(len(scores)), key=lambda i: -disagreement(scores[i]))[:n]

def words_of(rows):
    """Tell which of all V words the answers of each row contain: (N, V) 0/1."""
    found = [set(' '.join(row['responses']).split()) for row in rows]
    column = {word: v for v, word in enumerate(sorted(set().union(*found)))}
    table = np.zeros((len(rows), len(column)), dtype=np.float32)
    for i, words in enumerate(found):
        table[i, [column[word] for word in words]] = 1
    return table

def farthest_first(table, n):
    """Choose n rows by greedy k-center, and return their numbers.

    Row 0 comes first, then again and again the row whose nearest chosen row is farthest away, the first of equal ones.
    table: (N, V) 0/1, sets; the distance of two is Jaccard's, 1 - |a and b| / |a or b|.
    """
    sizes, nearest, chosen = table.sum(1), np.full(len(table), np.inf), [] # nearest: (N,) distance to a chosen row
    for _ in range(min(n, len(table))):
        i = int(nearest.argmax())
        both = table @ table[i] # (N,)
        nearest = np.minimum(nearest, 1 - both / (sizes + sizes[i] - both).clip(1))
        nearest[i] = -1 # never again
        chosen.append(i)
    return chosen

def load_ensemble(cfg, run, writers):
    """Load the reward models of select=uncertain as (name, model, tokenizer); writers: see collect.load_writer.

    This comes before any answer is sampled: one that does not fit ends the program.
    """
    ensemble = []
    for name in cfg.ensemble.split(',') if cfg.ensemble else []:
        tok, model = load_tokenizer(name, 'ensemble'), load_reward_model(name, 'ensemble').to(run.device).eval()
        for _, policy, its_tok, _ in writers:
            check_same_vocabulary(policy, model, 'ensemble', name, its_tok)
            check_context(policy, model, 'ensemble', name)
        ensemble.append((name, model, tok))
    return ensemble

def choose(rows, cfg, run, ensemble=()):
    """Choose cfg.budget of the rows with two answers, the most worthwhile first; ensemble: see load_ensemble."""
    rows = [row for row in rows if len(row['responses']) >= 2]
    if cfg.select == 'uncertain':
        by_model = [] # per reward model: id of a row -> scores of its answers
        for name, model, tok in ensemble:
            with run.autocast():
                scored = score_records(model, tok, rows, model.config.block_size, name, run.device)
            check_finite([x for _, scores in scored for x in scores], f"--ensemble={name}: its scores")
            by_model.append({id(row): scores for row, scores in scored})
        rows = [row for row in rows if all(id(row) in scores for scores in by_model)] # others are too long: reported
        chosen = most_uncertain([[scores[id(row)] for scores in by_model] for row in rows], cfg.budget)
    elif cfg.select == 'diverse':
        chosen = farthest_first(words_of(rows), cfg.budget)
    else:
        chosen = random.Random(cfg.seed).sample(range(len(rows)), len(rows))[:cfg.budget]
    return [rows[i] for i in chosen]
