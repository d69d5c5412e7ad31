"""Who ranks or rates the answers that collect.py shows: a simulated person, a person at the keyboard, a reward.

A reward is a function, a reward model, or the likelihood under a policy. page.py asks a person in a browser; judges.py
has the AI judges.
"""

import json
import math
import os
import random
import re
import sys
import time

import torch

from common.batches import Row, by_length, truncate
from common.checkpoints import load_policy, load_reward_model
from common.options import fail
from common.rollout import check_context, check_same_vocabulary, packed, score_packed
from common.tokens import as_messages, load_tokenizer, prompt_ids, response_ids

class Undo(Exception):
    """Ask for the row ranked last again."""

class Annotator:
    """Rank the answers of a row: rank(row) -> (ranks (K,), 0 = best, or None: left out; scores (K,) or None).

    row: a record with `prompt`, its K `responses` and, where they were sampled, `ended` (K): False for one that was cut
    off. People, real and simulated, also rate(row) -> (K) dicts {quality: whole number from 1 to cfg.scale}, or None. A
    person may raise Undo, to take back the last row, and KeyboardInterrupt, to stop. `about`: what else is to be kept
    of the row that a person was shown last, the `seconds` that it took, and why it was `skipped`.
    """

    def __init__(self, cfg, run=None):
        self.cfg, self.run, self.rng = cfg, run, random.Random(cfg.seed)
        self.progress, self.about = (0, 0), {} # rows ranked, rows in all

    def look_ahead(self, rows):
        """See a stretch of rows before it is ranked; a model can work on many at once."""

    def close(self):
        return '' # or a line to print

def distinct(answers):
    """Return answers, or texts, without repetitions, in their order."""
    return list(dict.fromkeys(answers))

def answers_of(row):
    """Return the answers of a record as (text, ended): a text that was cut off is another answer."""
    return list(zip(row['responses'], row.get('ended') or [True] * len(row['responses'])))

def shown(text, ended):
    """Return an answer as whoever reads it sees it."""
    return text if ended else text + '…'

def check_finite(numbers, whose):
    """End the program, exit code 1, where a number is not finite."""
    if not all(abs(x) < 1e38 for x in numbers): # as in common.records.is_number; NaN is not
        fail(f"{whose} are not finite; wanted sound weights, or --dtype=float32", code=1)

def to_ranks(values, tie=0.0):
    """Turn values (K,), larger = better, into ranks (K,), 0 = best; neighbours at most `tie` apart tie."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks, rank = [0] * len(values), 0
    for before, i in zip(order, order[1:]):
        rank += values[before] - values[i] > tie
        ranks[i] = rank
    return ranks

class RewardFunction(Annotator):
    """Rank by a function of (row, response) that returns a number, as of feedback.functions.load_reward_function."""

    def __init__(self, cfg, reward):
        super().__init__(cfg)
        self.reward = reward

    def rank(self, row):
        scores = [self.reward(row, response) for response in row['responses']] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

class SimulatedPerson(Annotator):
    """See each answer's gold score through Gumbel noise, and sort, or give it a number.

    Two answers then come in the order of their gold scores with probability sigmoid((gold_i - gold_j) / noise): the
    Bradley-Terry model (Luce 1959; Yellott 1977). Equally good answers tie. gold: (row, response) -> number.
    """

    def __init__(self, cfg, gold):
        super().__init__(cfg)
        self.gold = gold

    def gumbel(self):
        return -math.log(-math.log(self.rng.random() or 1e-300))

    def rank(self, row):
        scores = [self.gold(row, response) for response in row['responses']] # (K,)
        seems = {} # gold score -> how good it seems
        for score in scores:
            gumbel = self.gumbel()
            seems.setdefault(score, score + self.cfg.noise * gumbel)
        return to_ranks([seems[score] for score in scores], self.cfg.tie), scores

    def rate(self, row):
        """Map gold scores, seen through the same noise, onto whole numbers.

            rating = 1 + round((S - 1) * (gold + noise * (gumbel - 0.5772)))        at least 1, at most S

        S is cfg.scale; gold goes from 0 to 1. 0.5772 (Euler's constant) is the noise's mean. Every quality of every
        answer is seen anew.
        """
        top, seen = self.cfg.scale - 1, {} # answer -> its numbers
        for answer in distinct(answers_of(row)):
            gold = self.gold(row, answer[0])
            seems = {quality: gold + self.cfg.noise * (self.gumbel() - 0.5772)
                     for quality in self.cfg.qualities.split(',')}
            seen[answer] = {quality: 1 + min(top, max(0, round(top * value))) for quality, value in seems.items()}
        return [seen[answer] for answer in answers_of(row)]

class RewardModel(Annotator):
    """Rank by a reward model's scores. A row with an answer that alone fills its context is left out and counted."""
    option = 'reward_model' # which names its folder

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.model, self.left_out = self.load(self.option), 0
        self.tok = load_tokenizer(getattr(cfg, self.option), self.option)
        self.scores = {} # (prompt, distinct answers) as a string -> their scores

    def load(self, option):
        return self.run.freeze(load_reward_model(getattr(self.cfg, option), option).to(self.run.device).eval())

    def score(self, rows):
        return score_packed(self.model, rows, self.run) # (N,)

    def look_ahead(self, rows):
        """Score each distinct answer of a row once. Rows of like length share a batch."""
        room, encoded = self.model.config.block_size, {} # name of a row -> its encoded form
        for row in rows:
            answers = distinct(answers_of(row))
            ids = [response_ids(self.tok, *answer) for answer in answers]
            prompt = truncate(prompt_ids(self.tok, row['prompt']), max(map(len, ids), default=room), room)
            if prompt:
                name = str((row['prompt'], answers))
                encoded[name] = Row(prompt, ids, dict(name=name))
        rows, self.scores = list(encoded.values()), {}
        for part in by_length(rows, 32) if rows else []:
            part = [rows[i] for i in part]
            scores = iter(self.score(part).tolist())
            self.scores |= {row.record['name']: [next(scores) for _ in row.answers] for row in part}

    def rank(self, row):
        answers = answers_of(row)
        found = self.scores.get(str((row['prompt'], distinct(answers))))
        if found is None:
            self.left_out += 1
            return None, None
        scores = [found[distinct(answers).index(answer)] for answer in answers] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

    def close(self):
        return (f"{self.option}: {self.left_out} rows left out, in which an answer alone fills its context"
                if self.left_out else '')

class PolicyReward(RewardModel):
    """Rank by a policy's mean log pi per token, as RRHF does; with a reference by log pi - log pi_ref, as DPO does.

        Yuan et al. 2023, https://arxiv.org/abs/2304.05302, equation 1          mean over y's tokens of log pi
        Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 5      log pi(y|x) - log pi_ref(y|x)

    DPO's beta > 0 changes no order. An answer's end counts where it has one.
    """
    option = 'reward_policy'

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.reference = self.load('reward_reference') if cfg.reward_reference else None
        if self.reference:
            check_same_vocabulary(self.model, self.reference, 'reward_reference', cfg.reward_reference, self.tok)
            check_context(self.model, self.reference, 'reward_reference', cfg.reward_reference)

    def load(self, option):
        return self.run.freeze(load_policy(getattr(self.cfg, option), option).to(self.run.device).eval())

    @torch.no_grad()
    def score(self, rows):
        (answers, logp), *ref = [packed(m, rows, self.run) for m in (self.model, self.reference) if m] # (N,) each
        return logp - ref[0][1] if ref else logp / answers.sizes

class Person(Annotator):
    """Show a person the distinct answers in random order: another one for each rater's file, the same after an undo.

    Nobody sees who wrote them; equal ones share their rank or numbers. A row with nothing to compare gets no ranks.
    """

    def show(self, row, ask):
        """Return what ask(messages, texts) returns of the shuffled distinct answers, by answer (K); None stays None."""
        order = distinct(answers_of(row))
        rater = self.cfg.rater or os.path.basename(self.cfg.out)
        random.Random(json.dumps([self.cfg.seed, rater, row['prompt'], order, row.get('repeat')])).shuffle(order)
        self.since, self.why = time.monotonic(), ''
        said = ask(as_messages(row['prompt']), [shown(*answer) for answer in order])
        self.about = dict(seconds=round(time.monotonic() - self.since, 1))
        if said is None:
            self.about['skipped'] = self.why.strip().encode(errors='replace').decode() # a terminal may send anything
        return said and [said[order.index(answer)] for answer in answers_of(row)]

    def rank(self, row):
        if len(distinct(answers_of(row))) == 1:
            return None, None
        return self.show(row, self.ask), None

    def rate(self, row):
        qualities = self.cfg.qualities.split(',')
        said = self.show(row, self.ask_numbers)
        return said and [dict(zip(qualities, numbers)) for numbers in said]

def read_order(text, K):
    """Turn what a person types into ranks (K,); ValueError says what was wanted.

    From best to worst, `=` between equals, the last may be left out: "2 1=3" -> [1, 0, 1]; "31" -> [1, 2, 0]; "=": all
    are equal.
    """
    if text.strip() == '=':
        return [0] * K
    if K < 10:
        text = re.sub(r'(\d)', r' \1 ', text) # no spaces needed
    if not re.fullmatch(r'\s*\d+(\s*[\s=]\s*\d+)*\s*', text, re.ASCII):
        raise ValueError(f"wanted the numbers 1 to {K} from best to worst, as in {'21' if K == 2 else '2 1=3'}")
    ranks, rank = {}, 0
    for equal, n in re.findall(r'(=?)\s*(\d+)', text):
        rank += bool(ranks) and not equal
        if not 1 <= int(n) <= K or int(n) in ranks:
            raise ValueError(f"wanted each number from 1 to {K} once, got {n}" + ' again' * (int(n) in ranks))
        ranks[int(n)] = rank
    missing = [n for n in range(1, K + 1) if n not in ranks]
    if len(missing) > 1:
        raise ValueError(f"wanted the places of {', '.join(map(str, missing))} too; only the last may be left out")
    return [ranks.get(n, rank + 1) for n in range(1, K + 1)]

def read_numbers(text, n, scale):
    """Read n whole numbers from 1 to `scale`, as a person types them; ValueError says what was wanted."""
    numbers = text.replace(',', ' ').split()
    if len(numbers) != n or not all(re.fullmatch('[0-9]{1,3}', x) and 1 <= int(x) <= scale for x in numbers):
        raise ValueError(f"wanted {'a whole number' if n == 1 else f'{n} whole numbers'} from 1 to {scale}")
    return [int(x) for x in numbers]

def visible(text):
    """Make a text harmless for a terminal: U+FFFD replaces cursor movements, colours and directions of writing."""
    return re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]', '\ufffd', text.replace('\r\n', '\n'))

class Terminal(Person):
    """Ask a person at the keyboard."""

    def __init__(self, cfg):
        super().__init__(cfg)
        sys.stdout.reconfigure(errors='replace') # a character that the terminal does not know is no reason to stop
        if not (sys.stdin and sys.stdin.isatty()):
            fail("--annotator=human: stdin is not a terminal, nobody can be asked; --page=True serves a page instead")

    def print_task(self, messages, texts):
        done, total = self.progress
        print(f"\n{'─' * 60} prompt {done + 1} of {total}")
        for m in messages:
            print(f"\n{m['role']}: {visible(m['content'])}")
        for n, text in enumerate(texts, 1):
            print(f"\n[{n}]\n{visible(text)}")
        print()

    def hear(self, wish, read):
        """Return read(what was typed), None to skip; where it raises ValueError, ask again."""
        while True:
            try:
                said = input(f"{wish}; s skip (or s WHY), u undo, q quit > ").strip()
                word, _, self.why = said.partition(' ')
                if word.lower() in ('s', 'skip'):
                    return None
                said = said.lower()
                if said in ('u', 'undo'):
                    raise Undo
                if said in ('q', 'quit'):
                    raise KeyboardInterrupt
                return read(said)
            except ValueError as e:
                print(e)
            except EOFError:
                raise KeyboardInterrupt

    def ask(self, messages, texts):
        self.print_task(messages, texts)
        return self.hear("best first, = between equals", lambda said: read_order(said, len(texts)))

    def ask_numbers(self, messages, texts):
        """Ask for the numbers of one answer after the other; undo takes back the one before."""
        qualities, scale, rated = self.cfg.qualities.split(','), self.cfg.scale, []
        self.print_task(messages, texts)
        while len(rated) < len(texts):
            try:
                numbers = self.hear(f"[{len(rated) + 1}] {', '.join(qualities)}, from 1 to {scale}",
                                    lambda said: read_numbers(said, len(qualities), scale))
            except Undo:
                if not rated:
                    raise
                rated.pop()
                continue
            if numbers is None:
                return None
            rated.append(numbers)
        return rated
