"""
The page on which a person ranks: page.html, served to this machine's own browser by `collect.py --page=True`.

    GET /        the page itself, which holds nothing secret
    GET /task    what is to be ranked, once there is something (the reply waits for it)
    POST /said   {"id": the task's, "said": ranks (K,), "skip", "undo" or "quit"}; the reply is the next task, so it
                 comes when this answer is on the disk

Only this machine may come in, and of its browser only this page. The socket listens on 127.0.0.1. A Host header with
any other name is refused (DNS rebinding: a stranger's name that was made to point here), so is an Origin that is not
this page (requests that other sites send), and but for the bare page everything needs the token that stands behind the
# of the printed address, which no other site knows and no browser sends along by itself.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from annotators import Person, Undo, to_ranks
from common import fail

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'page.html'), 'rb') as f:
    HTML = f.read()


def content_policy(html):
    """Only the page's own script and style run, whatever a text holds, and they speak to this server alone."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
             "frame-ancestors 'none'"]
    for tag in ('script', 'style'):
        text = re.search(f'<{tag}>(.*)</{tag}>'.encode(), html, re.DOTALL)[1]
        rules.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    return '; '.join(rules)


POLICY = content_policy(HTML)


class Server(ThreadingHTTPServer):
    daemon_threads = False # closing waits until the last replies are out

    def handle_error(self, *args):
        if not isinstance(sys.exception(), OSError): # a closed tab
            super().handle_error(*args)


class Page(Person):
    """A person in front of a browser. `ask` runs in the main thread, the requests in threads of their own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.token, self.changed = secrets.token_urlsafe(16), threading.Condition()
        self.task = self.said = None # what is shown, None while there is nothing; what was said to it
        self.n_tasks = 0
        try:
            self.server = Server(('127.0.0.1', cfg.port), type('Bound', (Handler,), dict(page=self)))
        except OSError as e:
            fail(f"--port={cfg.port}: {e.strerror}; wanted a free port of this machine, 0 = any")
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()
        print(f"open http://127.0.0.1:{self.server.server_port}/#{self.token}", flush=True)

    def show(self, **task):
        self.task, self.said = task | dict(done=self.progress[0], total=self.progress[1]), None
        self.changed.notify_all()

    def ask(self, messages, texts):
        with self.changed:
            self.n_tasks += 1
            self.show(id=self.n_tasks, messages=messages, texts=texts)
            self.changed.wait_for(lambda: self.said is not None)
            said, self.task = self.said, None
        if said == 'undo':
            raise Undo
        if said == 'quit':
            raise KeyboardInterrupt
        return None if said == 'skip' else to_ranks([-r for r in said])

    def close(self):
        with self.changed:
            self.show(over=True)
        self.server.shutdown()
        self.server.server_close()
        return ''


class Handler(BaseHTTPRequestHandler):
    page = None # a Page
    timeout = 2 # seconds: a browser opens connections that it does not use
    server_version = sys_version = ''

    def log_message(self, *args):
        pass

    def reply(self, status, content, kind='application/json'):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (('Content-Type', kind + '; charset=utf-8'), ('Content-Length', str(len(body))),
                            ('Content-Security-Policy', POLICY), ('X-Content-Type-Options', 'nosniff'),
                            ('Referrer-Policy', 'no-referrer'), ('Cache-Control', 'no-store'),
                            ('Cross-Origin-Resource-Policy', 'same-origin')):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        """Whether this request comes from anywhere but the page; says so."""
        hosts = [f'{name}:{self.server.server_port}' for name in ('127.0.0.1', 'localhost')]
        host, origin = self.headers.get_all('Host', []), self.headers.get_all('Origin', [])
        token = self.headers.get('X-Token', '').encode(errors='replace')
        if len(host) != 1 or host[0] not in hosts:
            self.reply(403, dict(error='wrong Host'))
        elif origin and origin != ['http://' + host[0]]:
            self.reply(403, dict(error='wrong Origin'))
        elif self.path != '/' and not hmac.compare_digest(token, self.page.token.encode()):
            self.reply(403, dict(error='wrong token'))
        else:
            return False
        return True

    def next_task(self, status=200):
        page = self.page
        with page.changed: # while an answer is being written, and the model writes new ones
            page.changed.wait_for(lambda: page.task and page.said is None)
            task = page.task
        self.reply(status, task)

    def do_GET(self):
        if self.refused():
            return
        if self.path == '/':
            self.reply(200, HTML, 'text/html')
        elif self.path == '/task':
            self.next_task()
        else:
            self.reply(404, dict(error='no such page'))

    def do_POST(self):
        if self.refused():
            return
        length = self.headers.get('Content-Length', '')
        if self.path != '/said' or not length.isdecimal() or int(length) > 10_000:
            return self.reply(400, dict(error='wanted a small POST to /said'))
        page = self.page
        try:
            row = json.loads(self.rfile.read(int(length)))
            number, said = row['id'], row['said']
        except (ValueError, TypeError, KeyError, RecursionError, OSError):
            return self.reply(400, dict(error='wanted id and said'))
        with page.changed:
            if page.task is None or page.said is not None or number != page.task.get('id'):
                status = 409 # another tab was faster; what is said here is about a task that is no more
            else:
                K = len(page.task['texts'])
                if said not in ('skip', 'undo', 'quit') and not (
                        isinstance(said, list) and len(said) == K and all(type(r) is int and 0 <= r < K for r in said)):
                    return self.reply(400, dict(error=f'wanted {K} ranks, skip, undo or quit'))
                page.said, status = said, 200
                page.changed.notify_all()
        self.next_task(status)
