"""The AI judges: a GPT checkpoint of ours, or a server that speaks the OpenAI chat API."""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future, wait
from itertools import permutations
from pathlib import Path

import torch

from common.batches import pad
from common.checkpoints import load_policy
from common.options import fail
from common.records import parse_line, read_lines, to_lines, write_records
from common.rollout import in_chunks
from common.tokens import as_messages, load_tokenizer, prompt_ids
from feedback.annotators import Annotator, answers_of, distinct, shown, to_ranks, visible
from model import last_places

def read_instruction(path, option='judge_instruction'):
    """Read what a judge or a person is told, a text file."""
    try:
        text = Path(path).read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--{option}={path}: cannot be read: {e}")
    return text or fail(f"--{option}={path}: is empty, wanted a text")

def comparison(instruction, prompt, a, b):
    """Return what a judge is asked: the instruction, the conversation, the answers A and B.

    Every part begins a line, and the further lines of a text are indented: no text can pass itself off as another part.
    """
    names = dict(user='Human', assistant='Assistant', system='System')
    parts = [(names[m['role']], m['content']) for m in as_messages(prompt)] + [('A', a), ('B', b)]
    return '\n'.join([instruction] + [f"{name}: " + '\n  '.join(text.splitlines()) for name, text in parts])

class Judge(Annotator):
    """Compare the answers two by two, in both orders, so that position does not decide.

    p_ij = (p(i, j) + 1 - p(j, i)) / 2, where p(a, b) is the judge's probability that a, shown first, is better (RLAIF,
    Lee et al. 2023, https://arxiv.org/abs/2309.00267, section 2.1). An answer's score is the mean of its p_ij over the
    other answers j. A row with a verdict that cannot be read is left out and counted.
    """

    def __init__(self, cfg, run=None):
        super().__init__(cfg, run)
        self.instruction = read_instruction(cfg.judge_instruction)
        self.asked = {} # question -> verdict
        self.seen = [] # of each row {(i, j): the probability that i, shown first, is better than j, or None}

    def questions(self, prompt, answers):
        """Return {(i, j): what is asked with answer i first} of all ordered pairs of distinct answers."""
        return {(i, j): comparison(self.instruction, prompt, shown(*answers[i]), shown(*answers[j]))
                for i, j in permutations(range(len(answers)), 2)}

    def look_ahead(self, rows):
        questions = [q for row in rows for q in self.questions(row['prompt'], distinct(answers_of(row))).values()]
        self.asked = self.ask(distinct(questions)) if questions else {} # none where all answers are equal

    def verdict(self, question):
        return self.asked[question] # the probability that A is better; None: cannot be read

    def rank(self, row):
        answers = answers_of(row)
        once = distinct(answers) # equal ones need no judge
        if len(once) == 1:
            return [0] * len(answers), [0.5] * len(answers)
        p = {ij: self.verdict(q) for ij, q in self.questions(row['prompt'], once).items()}
        self.seen.append(p)
        if None in p.values():
            return None, None
        wins = [0.0] * len(once)
        for i, j in p:
            wins[i] += (p[i, j] + 1 - p[j, i]) / 2
        scores = [wins[once.index(answer)] / (len(once) - 1) for answer in answers] # (K,)
        return to_ranks(scores, self.cfg.tie), scores

    def close(self):
        read = [p for p in self.seen if None not in p.values()]
        pairs = [(p[i, j], p[j, i]) for p in read for i, j in p if i < j]
        n = max(len(pairs), 1)
        alike = sum((a > 0.5, a < 0.5) == (b < 0.5, b > 0.5) for a, b in pairs)
        unreadable = sum(v is None for p in self.seen for v in p.values())
        return (f"judge: {len(pairs)} pairs in both orders, the same verdict in {alike / n:.0%}; "
                f"{sum(map(sum, pairs)) / (2 * n):.0%} of the verdicts for the answer shown first; {unreadable} "
                f"verdicts could not be read, {len(self.seen) - len(read)} rows left out for it")

class GPTJudge(Judge):
    """Ask a checkpoint of ours that answers by A or B: p = sigmoid(log p(A) - log p(B))."""

    def __init__(self, cfg, run):
        super().__init__(cfg, run)
        self.tok, self.cut = load_tokenizer(cfg.judge, 'judge'), 0
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

        def p_first(rows, T, groups):
            last = self.model.hidden(idx[rows, :T], keep=last_places(lengths[rows], T)) # (n, C)
            logits = (last @ self.model.wte.weight[self.letters].T).float() # (n, 2)
            return (logits[:, 0] - logits[:, 1]).sigmoid() # (n,)

        with self.run.autocast():
            p = in_chunks(p_first, lengths, 64, torch.zeros(len(ids), device=self.run.device)) # (B,)
        return dict(zip(questions, p.tolist()))

    def close(self):
        return super().close() + (f"; {self.cut} comparisons cut to the judge's context" if self.cut else '')

URL = r'https?://([^\s/:@?#\\\[\]]+|\[[0-9a-f:.]+\])(:[0-9]+)?(/[!-~]*)?'
LOCAL = '127.0.0.1', 'localhost', '::1' # a key may go there without encryption

def is_url(url):
    """Tell whether this is http://HOST or https://HOST. A port and a path may follow."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.port != 0 and parts.hostname.encode('idna') # as it is looked up
        return bool(known and re.fullmatch(URL, url, re.IGNORECASE))
    except (ValueError, AttributeError): # no such port, no such name; no host at all
        return False

class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None # a redirect is an error: the key is for judge_url alone

class JudgeError(Exception):
    """Say why a server gives no reply: (what happened, exit code)."""

def read_verdict(reply):
    """Return the probability that A is better. The last line says A, B or TIE; None: it says none of them."""
    lines = [line for line in reply.splitlines() if line.strip()]
    match = re.fullmatch(r'\W*(?:verdict\W+|answer\W+)?(A|B|TIE)\W*', lines[-1] if lines else '', re.IGNORECASE)
    return dict(A=1.0, B=0.0, TIE=0.5)[match[1].upper()] if match else None

def settle(future, work, *args):
    """Put what work(*args) returns, or raises, into a Future."""
    try:
        future.set_result(work(*args))
    except BaseException as e:
        future.set_exception(e)

def in_thread(work, *args):
    """Return the Future of work(*args). Its thread keeps no program from ending."""
    future = Future()
    threading.Thread(target=settle, args=(future, work, *args), daemon=True).start()
    return future

class ApiJudge(Judge):
    """Ask a server that speaks the OpenAI chat API at judge_url; its key stands in the environment's JUDGE_API_KEY.

    Too many requests (429), server errors and broken connections are tried again. The cache file keeps the replies.
    """
    pause = 1.0 # seconds before the second try; doubles from then on, up to a minute
    longest = 10**6 # bytes of a reply

    def __init__(self, cfg, run=None):
        super().__init__(cfg, run)
        self.url = cfg.judge_url.rstrip('/') + '/chat/completions'
        self.key = os.environ.get('JUDGE_API_KEY', '').strip()
        if not (self.key.isascii() and self.key.isprintable()):
            fail("JUDGE_API_KEY: wanted printable ASCII characters alone")
        parts = urllib.parse.urlsplit(self.url)
        if self.key and parts.scheme != 'https' and parts.hostname not in LOCAL:
            fail(f"--judge_url={cfg.judge_url}: JUDGE_API_KEY would cross the network in the clear; wanted https://")
        self.cache = read_cache(cfg.judge_cache) if cfg.judge_cache else {}
        self.requests = self.retries = 0
        proxies = [urllib.request.ProxyHandler({})] * (parts.hostname in LOCAL) # or it would see the key
        self.opener = urllib.request.build_opener(NoRedirect, *proxies)
        self.lock, self.closed = threading.Lock(), threading.Event()

    def ask(self, questions):
        asked = {q: Future() for q in questions}
        todo = iter(list(asked.items())) # the threads take turns
        for _ in range(min(self.cfg.judge_requests, len(asked))):
            in_thread(self.work, todo)
        return asked

    def work(self, todo):
        for question, future in todo:
            if self.closed.is_set():
                break
            settle(future, self.reply, question)

    def verdict(self, question):
        while not wait([self.asked[question]], timeout=0.2).done: # a Ctrl-C wakes nobody who waits
            if self.run.interrupted:
                raise KeyboardInterrupt(self.run.interrupted)
        return read_verdict(self.asked[question].result())

    def reply(self, question):
        """Return the judge's reply, from the cache or from the server. Runs in several threads."""
        body = json.dumps(dict(model=self.cfg.judge_model, messages=[dict(role='user', content=question)],
                               temperature=0, max_tokens=self.cfg.judge_tokens)).encode()
        key = hashlib.sha256(self.url.encode() + b'\n' + body).hexdigest()
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

    def hide(self, text):
        """Return what a server says without the key, which it may repeat."""
        return text.replace(self.key, '***') if self.key else text

    def one_line(self, text):
        """Return what a server says as it may be printed."""
        return visible(' '.join(self.hide(text).split()))[:300]

    def fetch(self, body):
        """Send a request once and return the bytes of its reply. A server that drips them makes this endless."""
        headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {self.key}'} if self.key else {})
        try:
            request = urllib.request.Request(self.url, body, headers)
            with self.opener.open(request, timeout=self.cfg.judge_timeout) as answer:
                return answer.read(self.longest + 1)
        except urllib.error.HTTPError as e:
            if e.code == 429 or e.code >= 500:
                raise
            problem = f"HTTP {e.code} {e.reason}"
            with contextlib.suppress(OSError, http.client.HTTPException): # its reasons may not come through
                problem += ': ' + e.read(10_000).decode(errors='replace')
            raise JudgeError(self.one_line(problem), 2)

    def request(self, body):
        for attempt in range(self.cfg.judge_tries):
            pause = self.pause * 2**attempt * random.uniform(0.5, 1.5)
            try:
                reply = in_thread(self.fetch, body).result(10 * self.cfg.judge_timeout)
                if len(reply) > self.longest:
                    raise JudgeError(f"a reply of more than {self.longest:,} bytes", 1)
                text = json.loads(reply)['choices'][0]['message']['content']
                return self.hide((text or '').encode(errors='replace').decode()) # half a surrogate pair is not stored
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {e.reason}"
                seconds = e.headers.get('Retry-After', '')
                pause = max(pause, float(seconds) if seconds.isdecimal() else 0.0)
            except (OSError, http.client.HTTPException) as e:
                reason = getattr(e, 'reason', e)
                problem = str(reason) or type(reason).__name__
                if isinstance(reason, ssl.SSLCertVerificationError) or isinstance(
                        reason, socket.gaierror) and not self.requests: # no such host: it was never there
                    raise JudgeError(self.one_line(problem), 2)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                problem = "the reply is not one of the chat API"
            with self.lock:
                self.retries += 1
            if attempt + 1 < self.cfg.judge_tries and self.closed.wait(min(60.0, pause)):
                break
        raise JudgeError(f"no reply in {self.cfg.judge_tries} tries, at last: {self.one_line(problem)}", 1)

    def close(self):
        self.closed.set() # nobody waits any longer
        return super().close() + f"; {self.requests} requests answered, {self.retries} failed and tried again"

def read_cache(path):
    """Read a cache of replies, {hash of the request: reply}, and write it anew."""
    cache = {}
    for n, line in read_lines(path) if os.path.exists(path) else []:
        if line.endswith(b'\n'): # a kill may have cut the last one
            try:
                row = parse_line(line)
                cache[row['key']] = str(row['reply'])
            except (ValueError, KeyError, TypeError):
                fail(f"{path}:{n}: wanted a line with key and reply")
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    write_records(path, [dict(key=k, reply=v) for k, v in cache.items()])
    return cache
