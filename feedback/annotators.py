"""Who ranks the answers that collect.py shows: a simulated person, a person at the keyboard, or a reward model.

page.py asks a person in a browser; judges.py has the AI judges.
"""

import math
import random
import re
import sys

from common.batches import Row, by_length, truncate
from common.checkpoints import load_reward_model
from common.options import fail
from common.rollout import score_packed
from common.tokens import as_messages, load_tokenizer, prompt_ids, response_ids

class Undo(Exception):
    """Ask for the row ranked last again."""

class Annotator:
    """Rank answers: rank(prompt, responses, ended) -> (ranks (K,), 0 = best, or None: left out; scores (K,) or None).

    ended (K,): False for an answer that was cut off while it was written; None: there is none. A person may raise Undo,
    to take back the last row, and KeyboardInterrupt, to stop.
    """

    def __init__(self, cfg, run=None):
        self.cfg, self.run, self.rng = cfg, run, random.Random(cfg.seed)
        self.progress = 0, 0 # rows ranked, rows in all

    def look_ahead(self, rows):
        """See a stretch of rows before it is ranked; a model can work on many at once."""

    def close(self):
        return '' # or a line to print

def distinct(answers):
    """Return answers, or texts, without repetitions, in their order."""
    return list(dict.fromkeys(answers))

def with_ends(responses, ended=None):
    """Return answers as (text, ended): a text that was cut off is another answer."""
    return list(zip(responses, ended or [True] * len(responses)))

def answers_of(row):
    """Return the answers of a record as (text, ended)."""
    return with_ends(row['responses'], row.get('ended'))

def shown(text, ended):
    """Return an answer as whoever reads it sees it."""
    return text if ended else text + '…'

def check_finite(numbers, whose):
    """End the program, exit code 1, where a number is not finite."""
    if not all(abs(x) < 1e38 for x in numbers): # as in common.records.is_number; NaN is not
        print(f"error: {whose} are not finite: the model is broken", file=sys.stderr)
        raise SystemExit(1)

def to_ranks(values, tie=0.0):
    """Turn values (K,), larger = better, into ranks (K,), 0 = best; neighbours at most `tie` apart tie."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks, rank = [0] * len(values), 0
    for before, i in zip(order, order[1:]):
        rank += values[before] - values[i] > tie
        ranks[i] = rank
    return ranks

class SimulatedPerson(Annotator):
    """See each answer's gold score through Gumbel noise, and sort.

    Two answers then come in the order of their gold scores with probability sigmoid((gold_i - gold_j) / noise): the
    Bradley-Terry model (Luce 1959; Yellott 1977). Equally good answers tie. gold: (prompt, response) -> number.
    """

    def __init__(self, cfg, gold):
        super().__init__(cfg)
        self.gold = gold

    def rank(self, prompt, responses, ended=None):
        scores = [self.gold(prompt, r) for r in responses] # (K,)
        seems = {} # gold score -> how good it seems
        for score in scores:
            gumbel = -math.log(-math.log(self.rng.random() or 1e-300))
            seems.setdefault(score, score + self.cfg.noise * gumbel)
        return to_ranks([seems[score] for score in scores], self.cfg.tie), scores

class RewardModel(Annotator):
    """Rank by a reward model's scores. A row with an answer that alone fills its context is left out and counted."""

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.model = run.freeze(load_reward_model(cfg.reward_model).to(run.device).eval())
        self.tok, self.left_out = load_tokenizer(cfg.reward_model, 'reward_model'), 0
        self.scores = {} # (prompt, distinct answers) as a string -> their scores

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
            scores = iter(score_packed(self.model, part, self.run).tolist())
            self.scores |= {row.record['name']: [next(scores) for _ in row.answers] for row in part}

    def rank(self, prompt, responses, ended=None):
        answers = with_ends(responses, ended)
        found = self.scores.get(str((prompt, distinct(answers))))
        if found is None:
            self.left_out += 1
            return None, None
        scores = [found[distinct(answers).index(answer)] for answer in answers] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

    def close(self):
        return (f"reward model: {self.left_out} rows left out, in which an answer alone fills its context"
                if self.left_out else '')

class Person(Annotator):
    """Show a person the distinct answers in random order, another one for each rater's file.

    Nobody sees who wrote them; equal ones share their rank.
    """

    def rank(self, prompt, responses, ended=None):
        answers = with_ends(responses, ended)
        order = distinct(answers)
        if len(order) == 1:
            return [0] * len(answers), None
        self.rng.shuffle(order)
        ranks = self.ask(as_messages(prompt), [shown(*answer) for answer in order])
        return ranks and [ranks[order.index(answer)] for answer in answers], None

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

    def ask(self, messages, texts):
        done, total = self.progress
        print(f"\n{'─' * 60} {done + 1} of {total}")
        for m in messages:
            print(f"\n{m['role']}: {visible(m['content'])}")
        for n, text in enumerate(texts, 1):
            print(f"\n[{n}]\n{visible(text)}")
        print()
        while True:
            try:
                said = input("best first, = between equals; s skip, u undo, q quit > ").strip().lower()
                if said in ('s', 'skip'):
                    return None
                if said in ('u', 'undo'):
                    raise Undo
                if said in ('q', 'quit'):
                    raise KeyboardInterrupt
                return read_order(said, len(texts))
            except ValueError as e:
                print(e)
            except EOFError:
                raise KeyboardInterrupt
