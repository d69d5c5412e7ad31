"""Make a world of sums: problems with one right answer each, which code can check.

Somebody asks for the sum or the difference of two whole numbers of three digits, and writers answer. On a scratch line
they note for each column, from the right, what they carry or borrow, then the digit:

    345+278    careful    13 12 06    5+8 = 13, 4+7+1 = 12, 3+2+1 = 6        345-278    careful    17 16 00
                          #### 0623                                                                #### 0067
               hasty      13 11 05    4+7 = 11, 3+2 = 5                                 hasty      03 03 01
                          #### 0513                                                                #### 0133

A hasty writer never adds what is carried, and takes the smaller digit from the larger. The latter is the commonest of
children's errors in subtraction (Brown and Burton 1978, Cognitive Science 2). Without the scratch line an answer is the
number alone. Numbers are filled up with zeros, so that every digit has its place.

A problem belongs to one split, by a hash of its two numbers: 278+345 is where 345+278 is. Everything is a pure function
of its arguments.
"""

import hashlib
import random

DIGITS = (3,) # of both numbers, in all that is learnt
OTHERS = (2, 4, 5, 6) # only to be measured
CAREFUL = dict(practice=0.3, demonstrations=0.25) # share of careful writers

def columns(a, op, b, careful=True):
    """Return what a writer notes for each column: [(carried or borrowed, digit)], from the right.

    In a difference a >= b.
    """
    found, carry = [], 0
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        if op == '-' and not careful:
            x, y = max(x, y), min(x, y)
        carry, digit = divmod(x + y + carry if op == '+' else x - y - carry, 10)
        found.append((abs(carry), digit))
        carry = abs(carry) * careful
    return found

def response(problem, scratch, careful=True):
    """Return a writer's answer to a problem (a, op, b)."""
    found = columns(*problem, careful)
    number = f"{found[-1][0]}{''.join(str(digit) for _, digit in reversed(found))}" # a last carry is written down
    return f"{' '.join(f'{carry}{digit}' for carry, digit in found)}\n#### {number}" if scratch else number

def split_of(problem):
    """Return the split that a problem belongs to: test or val, a tenth each, or train."""
    a, op, b = problem
    a, b = sorted((a, b))
    return {0: 'test', 1: 'val'}.get(hashlib.sha256(f'{a}{op}{b}'.encode()).digest()[0] % 10, 'train')

def problems(split, n, rng, digits=DIGITS):
    """Draw n problems (a, op, b) of a split. Both numbers have the same number of digits, and a >= b where op is -."""
    found = []
    while len(found) < n:
        low = 10 ** (rng.choice(digits) - 1)
        a, b, op = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low), rng.choice('+-')
        problem = (max(a, b), op, min(a, b)) if op == '-' else (a, op, b)
        if split_of(problem) == split:
            found.append(problem)
    return found

ask = lambda problem: '{}{}{}'.format(*problem)

def answers(kind, split, n, seed, scratch):
    """Return n records {"prompt", "response"}; kind, a key of CAREFUL, says which share of writers is careful."""
    rng = random.Random(f'{kind} {split} {seed}')
    return [{'prompt': ask(p), 'response': response(p, scratch, rng.random() < CAREFUL[kind])}
            for p in problems(split, n, rng)]

def prompts(split, n, seed, digits=DIGITS):
    """Return different records {"prompt", "answer", "category"}; the category is the number of digits."""
    rng, rows = random.Random(f'prompts {split} {seed}'), {}
    while len(rows) < n:
        for a, op, b in problems(split, n - len(rows), rng, digits):
            rows[ask((a, op, b))] = {'prompt': ask((a, op, b)), 'answer': str(a + b if op == '+' else a - b),
                                     'category': f'{len(str(a))} digits'}
    return list(rows.values())
