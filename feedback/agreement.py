"""How far annotators agree with each other and with themselves, and how several files of rankings become one.

Every pair of answers is a small decision with three outcomes: one is better, the other is better, both are equal. Of
ratings the numbers themselves are compared.
"""

import json
import os
from itertools import chain, combinations
from statistics import fmean, pstdev, variance

from common.options import fail, note
from common.records import QUALITIES, check_record, first_row, read_preferences, write_records
from common.rollout import pair_agreement
from feedback.annotators import answers_of, to_ranks, visible

def key(row):
    """Return what rows of the same task share: the prompt and the set of answers, in any order."""
    return json.dumps([row['prompt'], sorted(set(answers_of(row)))])

def differ(row):
    """Return whether a row has two different answers. If not, there was nothing to decide, and it does not count."""
    return len(set(answers_of(row))) > 1

def by_text(row, ranks='ranks'):
    """Return the ranks of the distinct answers. Rows of the same key have one order."""
    ranks = dict(zip(answers_of(row), row[ranks]))
    return [ranks[answer] for answer in sorted(ranks)]

def kappa(ours, theirs):
    """Compute Cohen's kappa (Cohen 1960) of two annotators' ranks, lists of (K,):

        kappa = (p_o - p_e) / (1 - p_e)

    p_o is the share of pairs of answers on which they decide alike, p_e the share that chance gives. Each pair counts
    in both directions, so that "better" and "worse" are equally frequent: p_e = t u + (1 - t)(1 - u) / 2, where t and u
    are the two annotators' shares of ties. Returns (kappa, or None where p_e is 1; p_o; number of pairs).
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
    """Say in one line how far two annotators agree; ours, theirs: as for kappa."""
    k, p_o, n = kappa(ours, theirs)
    if n == 0:
        return "no pair of answers to compare"
    points, decided = map(sum, zip(*(pair_agreement([-r for r in a], b) for a, b in zip(ours, theirs))))
    return (f"the same on {p_o:.3f} of {n} pairs of answers, kappa {'–' if k is None else f'{k:.3f}'}; of the "
            f"{decided} that the second does not tie, {points / max(decided, 1):.3f} in its order "
            "(a tie of the first: half)")

def compare(rows, others):
    """Say how far two lists of rankings agree on their common tasks."""
    theirs = {key(row): row for row in others}
    both = [(row, theirs[key(row)]) for row in rows if key(row) in theirs and differ(row)]
    if not both:
        return "no prompt in common (with the same answers)"
    said = f"{len(both)} prompts in common; " + report([by_text(row) for row, _ in both], [by_text(o) for _, o in both])
    gold = [(by_text(row), by_text(o | dict(ranks=to_ranks(o['scores'])))) for row, o in both if o.get('scores')]
    if gold: # the scores behind the ranks: of a simulated person, the gold scores without noise
        said += "\n  and with its scores: " + report(*zip(*gold))
    return said

def alpha(rated):
    """Compute Krippendorff's alpha for numbers (Krippendorff 1970, https://doi.org/10.1177/001316447003000105):

        alpha = 1 - D_o / D_e        D_o = 1/n * sum over answers of m * variance of its m ratings

    D_e is the variance of all n ratings, of answers with m >= 2 alone; both variances divide by m - 1 and n - 1. 1 is
    full agreement, 0 is chance. rated: of each answer its raters' numbers (m). None where all are equal.
    """
    expected = variance(chain(*rated))
    observed = sum(len(said) * variance(said) for said in rated) / sum(map(len, rated))
    return 1 - observed / expected if expected else None

def of_raters(rated):
    """Say in one line how far raters agree. rated: as for alpha; answers with one rating do not count."""
    several = [said for said in rated if len(said) > 1]
    line = f"{sum(map(len, rated))} ratings of {len(rated)} answers, {len(several)} of them rated several times"
    if several:
        apart = fmean(abs(a - b) for said in several for a, b in combinations(said, 2))
        agree = alpha(several)
        line += f": {apart:.2f} apart on average, Krippendorff's alpha {'–' if agree is None else f'{agree:.3f}'}"
    return line

def standardise(rows, path):
    """Standardise the ratings of rows in place; say how far raters agree.

        z = (rating - mean) / std            both over all answers of the rows

    rows: of common.batches, from `path`. Rankings with `scores` count as ratings.
    """
    ratings = [row.record.get('ratings') or row.record.get('scores') or [] for row in rows] # (K,) each
    if not all(ratings) or len({*chain(*ratings)}) == 1:
        fail(f"{path}: wanted ratings, or rankings with `scores`, that differ, with loss=regression")
    mean, std = fmean(chain(*ratings)), pstdev(chain(*ratings))
    for row, values in zip(rows, ratings):
        row.record['ratings'] = [(value - mean) / std for value in values]
    if 'rated' in rows[0].record:
        note(f"{path}: {of_raters([said for row in rows for said in row.record['rated']])}")
    return rows

def with_oneself(rows):
    """Say how far a rater agrees with themself on rows ranked twice. `again` holds the second ranks."""
    twice = [row for row in rows if 'again' in row and differ(row)]
    return f"{len(twice)} prompts ranked twice; " + report([by_text(row) for row in twice],
                                                       [by_text(row, 'again') for row in twice])

def by_rater(files, task=key):
    """Return {rater: {task(row): their row}}; who is not named is called by the file.

    A row that was merged before is one of each of its raters. What a rater said twice counts once.
    """
    tables = {}
    for path in files:
        rows = read_preferences(path)
        if same := sum(not differ(row) for row in rows):
            note(f"{path}: {same} of {len(rows)} prompts left out, all their answers are the same")
        for row in filter(differ, rows):
            try:
                for said in row.pop('opinions', None) or [{}]:
                    check_record(row | said, 'rankings')
                    rater = visible(str((row | said).get('rater', path)))
                    tables.setdefault(rater, {}).setdefault(task(row), row | said)
            except (TypeError, ValueError) as e:
                fail(f"{path}: wanted `opinions` as --merge writes them: {e}")
    if not tables:
        fail(f"--merge={','.join(files)}: wanted prompts with two different answers, found none")
    return tables

def merge(files, out):
    """Merge several raters' files into one, and print who agrees with whom.

    A task's new ranks follow the number of other answers that each answer beats (a tie is half; the Borda count).
    `opinions` keeps who said what: of each rater the ranks, in the same order of the answers.
    """
    for path in files:
        if 'response' in (row := first_row(path)) and {*QUALITIES} & row.keys():
            fail(f"{path}: wanted rankings, got ratings, which need no merging; reward.py --train_data=A,B reads "
                 "several files of them")
    tables, tasks, merged = by_rater(files), {}, [] # tasks: task -> {rater: their row}
    for rater, rows in tables.items():
        if any('again' in row for row in rows.values()):
            print(f"{rater} with oneself: {with_oneself(rows.values())}")
        for task, row in rows.items():
            tasks.setdefault(task, {})[rater] = row
    for rater, other in combinations(tables, 2):
        print(f"{rater} and {other}: {compare(tables[rater].values(), tables[other].values())}")
    for said in tasks.values():
        row = {k: v for k, v in next(iter(said.values())).items()
               if k not in ('scores', 'again', 'chosen', 'rejected', 'margin', 'rater', 'seconds', 'annotator')}
        ranks = {rater: dict(zip(answers_of(r), r['ranks'])) for rater, r in said.items()} # of each answer
        wins = [sum((o[answer] < rank) + 0.5 * (o[answer] == rank) for o in ranks.values() for rank in o.values())
                for answer in answers_of(row)] # over itself: half
        row |= dict(ranks=to_ranks(wins), raters=len(said), opinions=[
            dict(rater=rater, ranks=[ranks[rater][answer] for answer in answers_of(row)])
            | {k: r[k] for k in ('annotator', 'seconds') if k in r} for rater, r in said.items()])
        if names := dict.fromkeys(str(r['annotator']) for r in said.values() if 'annotator' in r):
            row['annotator'] = ', '.join(names)
        merged.append(row)
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    write_records(out, merged)
    several = sum(row['raters'] > 1 for row in merged)
    print(f"{out}: {len(merged)} prompts, {several} of them ranked by several raters")
