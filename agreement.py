"""
How far annotators agree, with each other and with themselves, and one file of rankings from several.

Two files are compared where they rank the same texts for the same prompt. Every pair of answers is a small decision
with three outcomes: one is better, the other is better, both are equal.
"""

import json
import os
from itertools import combinations

from common import fail

from annotators import to_ranks
from rollout import pair_agreement
from tokens import read_preferences, write_records


def key(row):
    """What makes two rows the same task: the prompt and the set of answers, in any order."""
    return json.dumps([row['prompt'], sorted(set(row['responses']))])


def by_text(row, ranks='ranks'):
    """Ranks of the distinct texts, in one order for all rows of the same key."""
    ranks = dict(zip(row['responses'], row[ranks]))
    return [ranks[text] for text in sorted(ranks)]


def kappa(ours, theirs):
    """
    Cohen's kappa (Cohen 1960) of two annotators' ranks, lists of (K,), over all pairs of answers:

        kappa = (p_o - p_e) / (1 - p_e)

    p_o is the share of pairs on which they decide alike, p_e what chance gives. Which answer of a pair comes first
    means nothing, so each pair counts in both directions: "better" and "worse" are then equally frequent, and with t
    and u the two annotators' shares of ties p_e = t u + (1 - t)(1 - u) / 2.
    Returns (kappa, p_o, number of pairs); kappa is None where p_e is 1.
    """
    sign = lambda a, b: (a > b) - (a < b)
    pairs = [(sign(a[i], a[j]), sign(b[i], b[j])) for a, b in zip(ours, theirs)
             for i, j in combinations(range(len(a)), 2)]
    n = max(len(pairs), 1)
    p_o = sum(a == b for a, b in pairs) / n
    t, u = (sum(pair[k] == 0 for pair in pairs) / n for k in (0, 1))
    p_e = t * u + (1 - t) * (1 - u) / 2
    return (p_o - p_e) / (1 - p_e) if p_e < 1 else None, p_o, len(pairs)


def report(ours, theirs):
    """One line on two lists of ranks (K,) of the same answers."""
    k, p_o, n = kappa(ours, theirs)
    if n == 0:
        return "no pair in common"
    points, decided = map(sum, zip(*(pair_agreement([-r for r in a], b) for a, b in zip(ours, theirs))))
    return (f"the same on {p_o:.3f} of {n} pairs, kappa {'–' if k is None else f'{k:.3f}'}; "
            f"{points / max(decided, 1):.3f} of the {decided} that the second does not tie (a tie of the first: half)")


def compare(rows, others):
    """One line: how rows agree with others, both ranking records, on the tasks that both have."""
    theirs = {key(row): row for row in others}
    both = [(row, theirs[key(row)]) for row in rows if key(row) in theirs]
    line = f"{len(both)} rows in common; " + report(*([by_text(r) for r in side] for side in zip(*both))) if both else \
        "no row in common (the same prompt with the same answers)"
    gold = [(by_text(row), by_text(other | dict(ranks=to_ranks(other['scores']))))
            for row, other in both if other.get('scores')]
    if gold: # the scores behind the ranks, of a simulated person the gold scores without noise
        line += "\n  and with its scores: " + report(*zip(*gold))
    return line


def with_oneself(rows):
    """One line: how a rater who saw some rows twice (`again`: the second ranks) agrees with themself."""
    twice = [row for row in rows if 'again' in row]
    return f"{len(twice)} rows ranked twice; " + report([by_text(row) for row in twice],
                                                       [by_text(row, 'again') for row in twice])


def merge(files, out):
    """
    Several raters' files as one: a task that several ranked has the mean of their opinions, by how many of the other
    answers each answer beats (a tie is half; the Borda count). Prints who agrees with whom.
    """
    tables = [read_preferences(path) for path in files]
    for path, rows in zip(files, tables):
        if any('again' in row for row in rows):
            print(f"{path}, with themself: {with_oneself(rows)}")
    for (path, rows), (other, others) in combinations(zip(files, tables), 2):
        print(f"{path} and {other}: {compare(rows, others)}")
    tasks = {} # task -> {rater's file: its row}
    for path, rows in zip(files, tables):
        for row in rows:
            tasks.setdefault(key(row), {}).setdefault(path, row) # what a file holds twice counts once
    merged = []
    for rows in (list(by_file.values()) for by_file in tasks.values()):
        row = {k: v for k, v in rows[0].items() if k not in ('scores', 'again', 'chosen', 'rejected', 'margin')}
        wins = dict.fromkeys(row['responses'], 0.0)
        for r in rows:
            ranks = dict(zip(r['responses'], r['ranks']))
            for text in wins:
                wins[text] += sum((ranks[text] < o) + 0.5 * (ranks[text] == o) for o in ranks.values()) # itself: half
        names = dict.fromkeys(str(r['annotator']) for r in rows if 'annotator' in r)
        merged.append(row | dict(ranks=to_ranks([wins[text] for text in row['responses']]), raters=len(rows))
                      | (dict(annotator=', '.join(names)) if names else {}))
    try:
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        write_records(out, merged)
    except OSError as e:
        fail(f"--out={out}: {e.strerror}")
    several = sum(len(rows) > 1 for rows in tasks.values())
    print(f"{out}: {len(merged)} prompts, {several} of them ranked in several files")
