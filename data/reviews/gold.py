"""Judge remarks by a naive Bayes classifier of people's labels: the gold score of config/reviews.

    python -m data.reviews.gold

It has seen the labels in data/reviews/gold_train.jsonl alone; no model is trained on these. The command says how often
it is right on gold_test.jsonl.
"""

import math
import os
import re
from collections import Counter
from functools import cache

from common.options import fail
from common.records import read_records

FOLDER = 'data/reviews'

def features(text):
    """Return a remark's words and signs, and its pairs of neighbours."""
    words = ['<', *re.findall(r"[\w'-]+|[^\w\s]", text.lower()), '>']
    return words[1:-1] + list(zip(words, words[1:]))

def read(path):
    """Read remarks with their labels, `pros`."""
    rows = read_records(path, 'demonstrations')
    if (found := {repr(row.get('pros')) for row in rows}) != {'True', 'False'}:
        fail(f"{path}: wanted `pros` in each row, true in some and false in others; got {', '.join(sorted(found))}")
    return rows

@cache
def log_odds(path):
    """Return {feature: log P(feature | Pros) - log P(feature | Cons)}, and the log odds of Pros.

    Multinomial naive Bayes with add-one smoothing: P(feature | label) = (its count + 1) / (all counts + features).
    """
    counts, labels = {True: Counter(), False: Counter()}, Counter()
    for row in read(path):
        labels[row['pros']] += 1
        counts[row['pros']].update(features(f"{row['prompt']} {row['response']}"))
    both = counts[True] | counts[False]
    total = {label: math.log(counts[label].total() + len(both)) for label in counts}
    logp = lambda feature, label: math.log(counts[label][feature] + 1) - total[label]
    return ({feature: logp(feature, True) - logp(feature, False) for feature in both},
            math.log(labels[True] / labels[False]))

def gold(record, response, folder=FOLDER):
    """Return the probability of Pros for prompt and response as one remark."""
    odds, prior = log_odds(os.path.abspath(f'{folder}/gold_train.jsonl'))
    x = prior + sum(odds.get(feature, 0.0) for feature in features(f"{record['prompt']} {response}"))
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))

def accuracy(folder=FOLDER):
    """Return the share of held-out labels it gets right, and their number."""
    rows = read(f'{folder}/gold_test.jsonl')
    return sum((gold(row, row['response'], folder) > 0.5) == row['pros'] for row in rows) / len(rows), len(rows)

if __name__ == '__main__':
    print('right on {:.1%} of {} held-out remarks'.format(*accuracy()))
