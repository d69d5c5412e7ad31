"""
Who ranks the answers that collect.py shows: a simulated person, a person at the keyboard (page.py serves the same task
in a browser), a reward model, or an AI judge: a GPT checkpoint of ours, or any server that speaks the OpenAI chat API.

An annotator has `rank(prompt, responses) -> (ranks (K,), 0 = best, or None: left out; scores (K,) or None)`. Before the
first of a stretch of rows is ranked, `look_ahead(rows)` shows them all, so that a judge can work on many at once; `rng`
is seeded anew then. `progress` is (rows ranked, rows in all). `close()` ends it and returns a line to print, or ''. A
person who takes back the last row raises Undo, one who has had enough KeyboardInterrupt.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

from common import fail

import torch

from model import last_places, load_policy, load_reward_model
from rollout import in_chunks
from tokens import (as_messages, by_length, check, collate_answers, load_tokenizer, pad, parse_line, prompt_ids,
                    read_lines, response_ids, to_lines, truncate, write_records)


class Undo(Exception):
    """The person wants the row ranked last again."""


class Annotator:
    def __init__(self, cfg, run=None):
        self.cfg, self.run, self.rng, self.progress = cfg, run, random.Random(cfg.seed), (0, 0)

    def look_ahead(self, rows):
        pass

    def close(self):
        return ''


def make_annotator(cfg, run):
    if cfg.annotator == 'simulated':
        return SimulatedPerson(cfg)
    if cfg.annotator == 'human':
        from page import Page
        return Page(cfg) if cfg.page else Terminal(cfg)
    if cfg.annotator == 'reward_model':
        return RewardModel(cfg, run)
    return ApiJudge(cfg) if cfg.judge_url else GPTJudge(cfg, run)


def to_ranks(values, tie=0.0):
    """Ranks (K,), 0 = best, of values (K,), larger = better; a value at most `tie` below its better neighbour ties."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks, rank = [0] * len(values), 0
    for before, i in zip(order, order[1:]):
        rank += values[before] - values[i] > tie
        ranks[i] = rank
    return ranks


class SimulatedPerson(Annotator):
    """
    Sees each answer's gold score through Gumbel noise and sorts. Two answers then come in the order of their gold
    scores with probability sigmoid((gold_i - gold_j) / noise): the Bradley-Terry model (Luce 1959; Yellott 1977).
    Equally good answers tie, and neighbours that seem at most `tie` apart.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        from data.toy import world
        self.gold = world.gold

    def rank(self, prompt, responses):
        scores = [self.gold(prompt, r) for r in responses] # (K,)
        seems = {} # gold score -> how good it seems
        for score in scores:
            gumbel = -math.log(-math.log(self.rng.random() or 1e-300))
            seems.setdefault(score, score + self.cfg.noise * gumbel)
        return to_ranks([seems[score] for score in scores], self.cfg.tie), scores


class RewardModel(Annotator):
    """
    Ranks by a reward model's scores, with a tokenizer of its own; neighbours at most `tie` apart tie. A row with an
    answer that alone fills its context is left out and counted.
    """

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.model = run.freeze(load_reward_model(cfg.reward_model).to(run.device).eval())
        self.tok, self.left_out = load_tokenizer(cfg.reward_model), 0
        self.scores = {} # of the rows looked at: (prompt, texts) as a string -> {text: score}, or None

    @torch.no_grad()
    def look_ahead(self, rows):
        """Equal texts of a row are scored once, rows of like length together."""
        self.scores, encoded = {}, {}
        for row in rows:
            texts = list(dict.fromkeys(row['responses']))
            answers, name = [response_ids(self.tok, text) for text in texts], str((row['prompt'], texts))
            prompt = answers and truncate(prompt_ids(self.tok, row['prompt']), max(map(len, answers)),
                                          self.model.config.block_size)
            self.scores[name] = None
            if prompt:
                encoded[name] = texts, (prompt, answers, [0] * len(answers))
        names, some = list(encoded), [row for _, row in encoded.values()]
        for part in by_length(some, 32) if some else []:
            with self.run.autocast():
                scores = self.model.answer_rewards(collate_answers([some[i] for i in part]).to(self.run.device)).tolist()
            for i in part:
                texts, _ = encoded[names[i]]
                self.scores[names[i]] = dict(zip(texts, scores))
                scores = scores[len(texts):]

    def rank(self, prompt, responses):
        name = str((prompt, list(dict.fromkeys(responses))))
        if name not in self.scores:
            self.look_ahead([dict(prompt=prompt, responses=responses)])
        if self.scores[name] is None:
            self.left_out += 1
            return None, None
        scores = [self.scores[name][text] for text in responses] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

    def close(self):
        return (f"reward model: {self.left_out} rows left out, in which an answer alone fills its context"
                if self.left_out else '')

# ----------------------------------------------------------------------------------------------------------------
# a person

class Person(Annotator):
    """Sees the distinct answers in random order, and nothing of who wrote them; equal texts share their rank."""

    def rank(self, prompt, responses):
        texts = list(dict.fromkeys(responses))
        if len(texts) == 1:
            return [0] * len(responses), None
        self.rng.shuffle(texts)
        ranks = self.ask(as_messages(prompt), texts)
        return ranks and [ranks[texts.index(r)] for r in responses], None


def read_order(text, K):
    """
    What a person types to ranks (K,): the answers' numbers from best to worst, `=` between equals, the last one may be
    left out. "2 1=3" -> [1, 0, 1]; "31" -> [1, 2, 0]; "=" alone: all are equal. ValueError says what was wanted.
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
    """Text for a terminal: what would move the cursor, change colours or the direction of writing becomes U+FFFD."""
    return re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]', '\ufffd', text.replace('\r\n', '\n'))


class Terminal(Person):
    """A person at the keyboard."""

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
            except EOFError:
                said = 'q'
            if said in ('q', 'quit'):
                raise KeyboardInterrupt
            if said in ('u', 'undo'):
                raise Undo
            if said in ('s', 'skip'):
                return None
            try:
                return read_order(said, len(texts))
            except ValueError as e:
                print(e)

# ----------------------------------------------------------------------------------------------------------------
# an AI judge

def read_instruction(path, option='judge_instruction'):
    """What a judge is told, a text file."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read().strip()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--{option}={path}: cannot be read: {e}")
    if not text:
        fail(f"--{option}={path}: is empty, wanted what the judge is told")
    return text


def comparison(instruction, prompt, a, b):
    """
    What a judge is asked, as one text: the instruction, the conversation, the answers A and B. Every part begins a
    line, and the further lines of a text are indented, so that no text can pass itself off as another part.
    """
    names = dict(user='Human', assistant='Assistant', system='System')
    parts = [(names[m['role']], m['content']) for m in as_messages(prompt)] + [('A', a), ('B', b)]
    return '\n'.join([instruction] + [f"{name}: " + '\n  '.join(text.splitlines()) for name, text in parts])


class Judge(Annotator):
    """
    Compares the answers two by two, each pair in both orders; the two probabilities are averaged, so that position does
    not decide: p_ij = (p(i, j) + 1 - p(j, i)) / 2, where p(a, b) is the judge's probability that a, shown first, is
    better (RLAIF, Lee et al. 2023, https://arxiv.org/abs/2309.00267, section 2.1). An answer's score is the mean of its
    p_ij over the other answers j. A row with a verdict that cannot be read is left out and counted.
    """

    def __init__(self, cfg, run=None):
        super().__init__(cfg, run)
        self.instruction = read_instruction(cfg.judge_instruction)
        self.asked = {} # question -> verdict
        self.pairs = self.consistent = self.unreadable = self.left_out = 0
        self.first = 0.0 # sum of the probabilities of the answer that was shown first

    def questions(self, prompt, texts):
        """{(i, j): what is asked with text i first}, for all ordered pairs of distinct texts."""
        return {(i, j): comparison(self.instruction, prompt, texts[i], texts[j])
                for i, j in permutations(range(len(texts)), 2)}

    def look_ahead(self, rows):
        questions = [q for row in rows for q in
                     self.questions(row['prompt'], list(dict.fromkeys(row['responses']))).values()]
        self.asked = self.ask(list(dict.fromkeys(questions))) if questions else {} # none where all answers are equal

    def verdict(self, question):
        return self.asked[question]

    def rank(self, prompt, responses):
        texts = list(dict.fromkeys(responses)) # equal ones need no judge
        if len(texts) == 1:
            return [0] * len(responses), [0.5] * len(responses)
        questions = self.questions(prompt, texts)
        new = [q for q in questions.values() if q not in self.asked]
        if new:
            self.asked |= self.ask(new)
        p = {ij: self.verdict(q) for ij, q in questions.items()} # probability that i is better, shown first
        self.unreadable += sum(v is None for v in p.values())
        if None in p.values():
            self.left_out += 1
            return None, None
        wins = [0.0] * len(texts)
        for i, j in p:
            wins[i] += (p[i, j] + 1 - p[j, i]) / 2
            self.first += p[i, j]
            self.pairs += i < j
            self.consistent += i < j and (p[i, j] > 0.5, p[i, j] < 0.5) == (p[j, i] < 0.5, p[j, i] > 0.5)
        scores = [wins[texts.index(r)] / (len(texts) - 1) for r in responses] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

    def close(self):
        n = max(self.pairs, 1)
        return (f"judge: {self.pairs} pairs in both orders, the same verdict in {self.consistent / n:.0%}; "
                f"{self.first / (2 * n):.0%} of the verdicts for the answer shown first; {self.unreadable} verdicts "
                f"could not be read, {self.left_out} rows left out for it")


class GPTJudge(Judge):
    """A checkpoint of ours that answers a comparison by A or B: p = sigmoid(log p(A) - log p(B))."""

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.tok, self.cut = load_tokenizer(cfg.judge), 0
        self.model = load_policy(cfg.judge, 'judge').to(run.device).eval()
        a, b = self.tok.encode(' A'), self.tok.encode(' B') # as a response begins, with a space
        if a[:-1] != b[:-1]:
            fail(f"--judge={cfg.judge}: its tokenizer writes ' A' and ' B' as {a} and {b}; wanted them to differ in "
                 "the last token alone")
        self.opening, self.letters = a[:-1], [a[-1], b[-1]] # the opening is empty, or a space

    @torch.no_grad()
    def ask(self, questions):
        room = self.model.config.block_size - len(self.opening)
        ids = [prompt_ids(self.tok, q) for q in questions]
        self.cut += sum(len(q) > room for q in ids)
        ids = [q[-room:] + self.opening for q in ids] # the beginning, the instruction, goes first
        idx = pad(ids).to(self.run.device) # (B, T)
        lengths = torch.tensor([len(q) for q in ids], device=self.run.device) # (B,)

        def p_first(rows, T):
            last = self.model.hidden(idx[rows, :T], keep=last_places(lengths[rows], T)) # (n, C)
            logits = (last @ self.model.wte.weight[self.letters].T).float() # (n, 2)
            return (logits[:, 0] - logits[:, 1]).sigmoid() # (n,)

        with self.run.autocast():
            p = in_chunks(p_first, lengths, 64, torch.zeros(len(ids), device=self.run.device)) # (B,)
        return dict(zip(questions, p.tolist()))

    def close(self):
        return super().close() + (f"; {self.cut} comparisons cut to the judge's context" if self.cut else '')


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None # a redirect is an error: the key is for judge_url alone


class JudgeError(Exception):
    """The server refuses, or gives no reply: (what happened, exit code)."""


def read_verdict(reply):
    """A judge's reply to the probability that A is better: its last line says A, B or TIE. None: it says neither."""
    lines = [line for line in reply.splitlines() if line.strip()]
    match = re.fullmatch(r'\W*(?:verdict\W+|answer\W+)?(A|B|TIE)\W*', lines[-1] if lines else '', re.IGNORECASE)
    return dict(A=1.0, B=0.0, TIE=0.5)[match[1].upper()] if match else None


class ApiJudge(Judge):
    """
    Any server that speaks the OpenAI chat API at judge_url, with the key in the environment's JUDGE_API_KEY where it
    wants one. At most judge_requests requests are under way; too many requests (429), server errors and broken
    connections are tried again, later and later. Replies are kept in the cache file under a hash of the request.
    """
    pause = 1.0 # seconds before the second try; doubles from then on, up to a minute

    def __init__(self, cfg):
        super().__init__(cfg)
        self.url = cfg.judge_url.rstrip('/') + '/chat/completions'
        self.key = os.environ.get('JUDGE_API_KEY', '').strip()
        if not (self.key.isascii() and self.key.isprintable()):
            fail("JUDGE_API_KEY: wanted printable ASCII characters alone")
        host = urllib.parse.urlsplit(self.url).hostname
        if self.key and self.url.startswith('http:') and host not in ('127.0.0.1', 'localhost', '::1'):
            fail(f"--judge_url={cfg.judge_url}: JUDGE_API_KEY would cross the network in the clear; wanted https://")
        self.cache, self.requests, self.retries = {}, 0, 0
        if os.path.exists(cfg.judge_cache):
            lines = [(n, line) for n, line in read_lines(cfg.judge_cache) if line.endswith(b'\n')] # a kill may cut it
            for n, line in lines:
                try:
                    row = parse_line(line)
                    check('key and reply', all(isinstance(row.get(name), str) for name in ('key', 'reply')))
                    self.cache[row['key']] = row['reply']
                except ValueError:
                    fail(f"{cfg.judge_cache}:{n}: wanted a line with key and reply")
        if cfg.judge_cache:
            try:
                os.makedirs(os.path.dirname(cfg.judge_cache) or '.', exist_ok=True)
                write_records(cfg.judge_cache, [dict(key=k, reply=v) for k, v in self.cache.items()])
            except OSError as e:
                fail(f"--judge_cache={cfg.judge_cache}: {e.strerror}")
        self.opener = urllib.request.build_opener(NoRedirect)
        self.pool, self.lock, self.closed = ThreadPoolExecutor(cfg.judge_requests), threading.Lock(), threading.Event()

    def ask(self, questions):
        return {q: self.pool.submit(self.reply, q) for q in questions}

    def verdict(self, question):
        return read_verdict(self.asked[question].result())

    def reply(self, question):
        """The judge's reply to a question, from the cache or from the server. Runs in the pool's threads."""
        body = json.dumps(dict(model=self.cfg.judge_model, messages=[dict(role='user', content=question)],
                               temperature=0, max_tokens=self.cfg.judge_tokens)).encode()
        key = hashlib.sha256(self.url.encode() + b'\n' + body).hexdigest()
        with self.lock:
            if key in self.cache:
                return self.cache[key]
        text = self.request(body)
        with self.lock:
            self.requests += 1
            self.cache[key] = text
            if self.cfg.judge_cache:
                with open(self.cfg.judge_cache, 'a', encoding='utf-8') as f:
                    f.write(to_lines([dict(key=key, reply=text)]))
        return text

    def request(self, body):
        headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {self.key}'} if self.key else {})
        for attempt in range(self.cfg.judge_tries):
            wait = 0.0
            try:
                request = urllib.request.Request(self.url, body, headers)
                with self.opener.open(request, timeout=self.cfg.judge_timeout) as answer:
                    text = json.loads(answer.read())['choices'][0]['message']['content']
                return (text or '').encode(errors='replace').decode() # half a surrogate pair cannot be stored
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {e.reason}"
                if e.code != 429 and e.code < 500:
                    said = ''
                    with contextlib.suppress(OSError, http.client.HTTPException): # its reasons may not come through
                        said = ' '.join(e.read(300).decode(errors='replace').split())
                    raise JudgeError(f"{problem}: {said}".replace(self.key or '\0', '***'), 2)
                seconds = e.headers.get('Retry-After', '')
                wait = float(seconds) if seconds.isdecimal() else 0.0
            except (OSError, http.client.HTTPException) as e:
                problem = str(getattr(e, 'reason', e)) or type(e).__name__
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                problem = "the reply is not one of the chat API"
            with self.lock:
                self.retries += 1
            if attempt + 1 < self.cfg.judge_tries:
                self.closed.wait(min(60.0, max(wait, self.pause * 2**attempt * random.uniform(0.5, 1.5))))
            if self.closed.is_set():
                break
        raise JudgeError(f"no reply in {self.cfg.judge_tries} tries, at last: {problem}", 1)

    def close(self):
        self.closed.set() # nobody waits any longer
        self.pool.shutdown(cancel_futures=True)
        return super().close() + f"; {self.requests} requests answered, {self.retries} failed and tried again"
