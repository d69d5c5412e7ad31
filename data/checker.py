"""Reward answers that code can check: exact match of the final answer.

    python reinforce.py config/sums/grpo.py --reward=data.checker:exact_match

The prompts' records hold the right `answer`. A response's final answer stands after the last "####", as in GSM8K
(Cobbe et al. 2021, https://arxiv.org/abs/2110.14168), or else on the last line. What comes before it is not judged.
"""

import re
from decimal import Decimal

NUMBER = re.compile(r'(-?)\$?([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(\.[0-9]+)?\.?') # -$1,200.50, and "18." too

def final_answer(text):
    """Return what stands after the last "####", or else on the last line."""
    _, mark, after = text.rpartition('####')
    return (after if mark else text.strip().rpartition('\n')[2]).strip()

def as_number(text):
    """Return the number that a text is, as a Decimal, or None: -$1,200.50 is one, "18 men" is none."""
    match = NUMBER.fullmatch(text)
    digits = ''.join(part or '' for part in match.groups()).replace(',', '') if match else ''
    return Decimal(digits) if digits.strip('-') else None

def exact_match(record, response):
    """Return 1.0 if a response's final answer is the record's `answer`, else 0.0.

    Numbers are compared as numbers: 1,200 is $1200.00. Others are compared as text. ValueError: there is no `answer`.
    """
    wanted = '' if record.get('answer') is None else str(record['answer']).strip()
    if not wanted:
        raise ValueError('wanted a record with a key `answer`')
    given = final_answer(response)
    number = as_number(wanted)
    return float(as_number(given) == number if number is not None else given == wanted)
