"""The page on which a person ranks: page.html, which `collect.py --page=True` serves to this machine's own browser.

    GET /        the page itself, which holds nothing secret
    GET /task    what is to be ranked or rated, once there is something (the reply waits for it)
    POST /said   {"id": the task's, "said": ranks (K,), numbers (K, qualities), "skip", "undo" or "quit"}, and "why" it
                 was skipped; the reply is the next task, so it comes when this answer is on the disk

Only this page may speak to the socket, which listens on 127.0.0.1. Another name in the Host header is refused (DNS
rebinding), and so is another Origin (requests that other sites send). Any port will do: ssh may lead another one here.
All but the bare page needs the token behind the # of the printed address, which no browser sends along by itself.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common.options import fail
from common.records import parse_line
from feedback.annotators import Person, Undo, to_ranks
from feedback.judges import read_instruction

HTML = Path(__file__).with_name('page.html').read_bytes()

def content_policy(html):
    """Allow the page's own script and style alone, whatever a text holds. They may speak to this server."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
             "frame-ancestors 'none'"]
    for tag in ('script', 'style'):
        text = re.search(f'<{tag}>(.*)</{tag}>'.encode(), html, re.DOTALL)[1]
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    return '; '.join(rules)

HEADERS = {'Content-Security-Policy': content_policy(HTML), 'X-Content-Type-Options': 'nosniff',
           'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store', 'Cross-Origin-Resource-Policy': 'same-origin'}

def is_list(said, n):
    return isinstance(said, list) and len(said) == n

def are_numbers(said, n, low, high):
    return is_list(said, n) and all(type(x) is int and low <= x <= high for x in said)

class Page(Person):
    """Ask a person in front of a browser. `ask` runs in the main thread, the requests in threads of their own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.token, self.changed = secrets.token_urlsafe(16), threading.Condition()
        self.task = self.said = None # what is shown, None while there is nothing; what was said to the one before
        self.n_tasks, self.waiting = 0, set() # the handlers that have let a request in and not replied yet
        self.more = dict(guidelines=read_instruction(cfg.guidelines, 'guidelines')) if cfg.guidelines else {}
        try:
            self.server = Server(('127.0.0.1', cfg.port), Handler)
        except OSError as e:
            fail(f"--port={cfg.port}: {e.strerror}; wanted a free port of this machine, 0 = any")
        self.server.page = self
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()
        print(f"open http://127.0.0.1:{self.server.server_port}/#{self.token} in a browser on this machine", flush=True)

    def put(self, **task):
        self.task = task | self.more | dict(done=self.progress[0], total=self.progress[1])
        self.changed.notify_all()

    def wait(self, **task):
        """Show a task and return what the person says; None: skip."""
        with self.changed:
            self.n_tasks += 1
            self.put(id=self.n_tasks, **task)
            while self.task is not None: # a Ctrl-C that another thread was given does not wake this one
                self.changed.wait(0.2)
        if self.said == 'undo':
            raise Undo
        if self.said == 'quit':
            raise KeyboardInterrupt
        return None if self.said == 'skip' else self.said

    def ask(self, messages, texts):
        said = self.wait(messages=messages, texts=texts)
        return said and to_ranks([-r for r in said])

    def ask_numbers(self, messages, texts):
        return self.wait(messages=messages, texts=texts, qualities=self.cfg.qualities.split(','), scale=self.cfg.scale)

    def close(self):
        with self.changed:
            self.put(over=True)
            self.changed.wait_for(lambda: not self.waiting, 5) # until the last replies are out
        self.server.shutdown()
        self.server.server_close()
        return ''

class Server(ThreadingHTTPServer):
    daemon_threads = True # nobody's open connection keeps the program from ending
    request_queue_size = 128 # connections that wait to be taken

class Handler(BaseHTTPRequestHandler):
    timeout = 2 # seconds: a browser opens connections that it does not use
    server_version = sys_version = ''

    def log_message(self, *args):
        pass

    def handle(self):
        page = self.server.page
        try:
            with contextlib.suppress(OSError): # a closed tab
                super().handle()
        finally:
            with page.changed:
                page.waiting.discard(self)
                page.changed.notify_all()

    def reply(self, status, content, kind='application/json'):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        more = {'Content-Type': f'{kind}; charset=utf-8', 'Content-Length': str(len(body))}
        for name, value in (more | HEADERS).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def parse_request(self):
        """Refuse a request that comes from anywhere but the page."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get_all('Host', []), self.headers.get_all('Origin', [])
        token = self.headers.get('X-Token', '').encode(errors='replace')
        wrong = ''
        if len(host) != 1 or not re.fullmatch(r'(127\.0\.0\.1|localhost):[0-9]{1,5}', host[0]):
            wrong = 'Host'
        elif origin and origin != ['http://' + host[0]]:
            wrong = 'Origin'
        elif self.path != '/' and not hmac.compare_digest(token, self.server.page.token.encode()):
            wrong = 'token'
        if wrong:
            self.reply(403, dict(error=f'wrong {wrong}'))
        else:
            with self.server.page.changed:
                self.server.page.waiting.add(self)
        return not wrong

    def next_task(self, status=200):
        page = self.server.page
        with page.changed: # while an answer is being written, and the model writes new ones
            page.changed.wait_for(lambda: page.task)
            task, page.since = page.task, time.monotonic() # now it is shown
        self.reply(status, task)

    def do_GET(self):
        if self.path == '/':
            self.reply(200, HTML, 'text/html')
        elif self.path == '/task':
            self.next_task()
        else:
            self.reply(404, dict(error='no such page'))

    def do_POST(self):
        length, page = self.headers.get('Content-Length', ''), self.server.page
        if self.path != '/said' or not re.fullmatch('[0-9]{1,5}', length) or int(length) > 10_000:
            return self.reply(400, dict(error='wanted a small POST to /said'))
        try:
            row = parse_line(self.rfile.read(int(length)))
            number, said, why = row['id'], row['said'], row.get('why', '')
        except (ValueError, KeyError, OSError):
            return self.reply(400, dict(error='wanted id and said'))
        with page.changed:
            task = page.task or {}
            shown = 'id' in task and number == task['id']
            if shown:
                K, n = len(task['texts']), len(task.get('qualities', ()))
                fits = (is_list(said, K) and all(are_numbers(numbers, n, 1, task['scale']) for numbers in said) if n
                        else are_numbers(said, K, 0, K - 1))
                if said not in ('skip', 'undo', 'quit') and not fits or not isinstance(why, str):
                    wanted = f"{K} times {n} numbers" if n else f"{K} ranks"
                    return self.reply(400, dict(error=f"wanted {wanted}, skip, undo or quit"))
                page.task, page.said, page.why = None, said, why
                page.changed.notify_all()
        self.next_task(200 if shown else 409) # else another tab was faster: this task is no more
