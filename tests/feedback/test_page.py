"""feedback/page.py: who is let in, what is taken, when it replies; the page in a real browser, from start to end."""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from browser import MISSING, Browser
from common.records import read_records
from feedback.annotators import Undo
from feedback.page import HTML, Page, Server
from tiny import ROOT, records

TEXTS = ['one', 'two', 'three']

class Asked:
    """Let a page ask one question in a thread, for ranks or `numbers`; `got` is what came of it."""

    def __init__(self, page, numbers=False):
        self.ask_for, self.page, self.got = page.ask_numbers if numbers else page.ask, page, []
        self.thread = threading.Thread(target=self.ask, daemon=True)
        self.thread.start()
        while page.task is None:
            time.sleep(0.01)

    def ask(self):
        try:
            self.got.append(self.ask_for([dict(role='user', content='Hi')], TEXTS))
        except (Undo, KeyboardInterrupt) as e:
            self.got.append(type(e))

    def wait(self):
        self.thread.join(5)
        return self.got

@pytest.fixture
def page():
    page = Page(SimpleNamespace(port=0, seed=1, qualities='helpful,honest', scale=5))
    page.progress = 4, 10
    yield page
    page.close()

def call(page, method, path, body=None, **headers):
    """Send a request with these headers beside a right Host and token; None leaves one out. Returns (status, JSON)."""
    here = f'127.0.0.1:{page.server.server_port}'
    headers = {'Host': here, 'X-Token': page.token} | {k.replace('_', '-'): v for k, v in headers.items()}
    connection = http.client.HTTPConnection(here, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if body is not None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers.setdefault('Content-Length', str(len(body)))
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value.replace('PORT', str(page.server.server_port)))
    connection.endheaders(body)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, json.loads(text) if text.startswith(b'{') else text

@pytest.mark.parametrize('headers', [
    dict(Host='evil.example'), dict(Host='evil.example:PORT'), # DNS rebinding: the name is the attacker's
    dict(Host='127.0.0.1'), dict(Host='127.0.0.1:1'), dict(Host='127.0.0.1:PORT.evil.example'), dict(Host=None),
    dict(Origin='http://evil.example'), dict(Origin='null'), dict(Origin='https://127.0.0.1:PORT'),
    dict(Origin='http://127.0.0.1:1'), dict(Origin='http://localhost:PORT'), # this page came from 127.0.0.1
    dict(X_Token=None), dict(X_Token=''), dict(X_Token='wrong'), dict(X_Token='\xe9'),
])
def test_strangers_are_refused(page, headers):
    asked = Asked(page)
    assert call(page, 'POST', '/said', dict(id=1, said=[0, 1, 2]), **headers)[0] == 403
    assert call(page, 'GET', '/task', **headers)[0] == 403
    if 'X_Token' not in headers: # the bare page holds nothing secret
        assert call(page, 'GET', '/', **headers)[0] == 403
    assert not asked.got and page.said is None
    with page.changed: # so that the thread ends
        page.task, page.said = None, 'skip'
        page.changed.notify_all()

def test_the_page_alone_is_let_in(page):
    assert page.server.server_address[0] == '127.0.0.1'
    status, html = call(page, 'GET', '/', X_Token=None)
    assert status == 200 and html == HTML and page.token.encode() not in html
    assert b'http' not in html and b' src=' not in html # everything it needs is in it
    asked = Asked(page)
    assert call(page, 'GET', '/task', Host='localhost:PORT', Origin='http://localhost:PORT') == (200, dict(
        id=1, messages=[dict(role='user', content='Hi')], texts=TEXTS, done=4, total=10))
    assert call(page, 'GET', '/etc/passwd')[0] == call(page, 'GET', '/../page.py')[0] == 404
    assert not asked.got

@pytest.mark.parametrize('body, status', [
    (b'', 400), (b'not json', 400), (b'[1]', 400), (b'{"id": 1}', 400), (b'[' * 9999, 400), (b' ' * 10_001, 400),
    (dict(id=1, said=[0, 1]), 400), (dict(id=1, said=[0, 1, 3]), 400), (dict(id=1, said=[0, 1, -1]), 400),
    (dict(id=1, said=[0, 1, True]), 400), (dict(id=1, said=[0, 1, None]), 400), (dict(id=1, said='delete'), 400),
    (dict(id=1, said={}), 400), (dict(id=2, said='skip'), 409), (dict(id=[], said='skip'), 409),
])
def test_what_is_no_answer_changes_nothing(page, body, status):
    asked = Asked(page)
    assert call(page, 'POST', '/said', body)[0] == status
    for length in ('-1', '9' * 5000, '+1', '\xb2'):
        assert call(page, 'POST', '/said', dict(id=1, said='skip'), Content_Length=length)[0] == 400
    assert call(page, 'POST', '/elsewhere', dict(id=1, said='skip'))[0] == 400
    assert not asked.got and page.task['id'] == 1 and page.said is None

@pytest.mark.parametrize('said, got', [
    ([2, 0, 1], [2, 0, 1]), ([2, 0, 0], [1, 0, 0]), ([1, 1, 1], [0, 0, 0]), # ranks without gaps
    ('skip', None), ('undo', Undo), ('quit', KeyboardInterrupt),
])
def test_what_is_said(page, said, got):
    asked = Asked(page)
    threading.Thread(target=call, args=(page, 'POST', '/said', dict(id=1, said=said)), daemon=True).start()
    assert asked.wait() == [got]

def test_numbers_are_asked_for_and_said(page):
    asked = Asked(page, numbers=True)
    assert call(page, 'GET', '/task')[1] == dict(id=1, messages=[dict(role='user', content='Hi')], texts=TEXTS, done=4,
                                                 total=10, qualities=['helpful', 'honest'], scale=5)
    for said in ([1, 2, 3], [[1, 2], [3, 4]], [[1, 2], [3, 4], [5]], [[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 0]],
                 [[1, 2], [3, 4], [5, True]], [[1, 2], [3, 4], [5, None]], [[1, 2], [3, 4], 'ab'], [], 'delete'):
        assert call(page, 'POST', '/said', dict(id=1, said=said)) == (
            400, dict(error='wanted 3 times 2 numbers, skip, undo or quit'))
    assert not asked.got
    threading.Thread(target=call, args=(page, 'POST', '/said', dict(id=1, said=[[1, 2], [3, 4], [5, 5]])),
                     daemon=True).start()
    assert asked.wait() == [[[1, 2], [3, 4], [5, 5]]]

@pytest.mark.parametrize('said, got', [('skip', None), ('undo', Undo), ('quit', KeyboardInterrupt)])
def test_what_is_said_instead_of_numbers(page, said, got):
    asked = Asked(page, numbers=True)
    threading.Thread(target=call, args=(page, 'POST', '/said', dict(id=1, said=said)), daemon=True).start()
    assert asked.wait() == [got]

def test_the_reply_comes_when_the_answer_is_saved(page):
    """`ask` has returned, but its caller, who saves, has not asked again: no reply yet. Then comes the next task."""
    asked, replies = Asked(page), []
    post = threading.Thread(target=lambda: replies.append(call(page, 'POST', '/said', dict(id=1, said='skip'))))
    post.start()
    assert asked.wait() == [None]
    time.sleep(0.3)
    assert not replies
    page.progress = 5, 10
    Asked(page)
    post.join(5)
    assert replies[0][0] == 200 and (replies[0][1]['id'], replies[0][1]['done']) == (2, 5)
    # a second tab, which still shows the first task, is told so and given the new one
    status, task = call(page, 'POST', '/said', dict(id=1, said=[0, 1, 2]))
    assert status == 409 and task['id'] == 2

def test_the_end_reaches_the_browser(page):
    replies = []
    poll = threading.Thread(target=lambda: replies.append(call(page, 'GET', '/task')))
    poll.start()
    time.sleep(0.2)
    assert not replies # nothing to show yet: the request waits
    page.progress = 10, 10
    page.close()
    poll.join(5)
    assert replies == [(200, dict(over=True, done=10, total=10))]

@pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='no signals to threads')
def test_ctrl_c_is_noticed_whichever_thread_gets_it(page, monkeypatch):
    """The kernel may give it to a thread that serves a request: that alone does not wake the one that waits."""
    def press():
        time.sleep(0.3)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        time.sleep(3)
        with page.changed: # or it would wait for ever
            page.task, page.said = None, 'skip'
            page.changed.notify_all()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press, daemon=True).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            page.ask([dict(role='user', content='Hi')], TEXTS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 2

def test_slow_connections_do_not_keep_it_open(page):
    """Each sends a byte now and then, more often than the timeout."""
    slow, over = [], threading.Event()
    for _ in range(5):
        slow.append(socket.create_connection(('127.0.0.1', page.server.server_port)))
        slow[-1].sendall(b'GET / HTTP/1.1\r\nX: ')

    def drip():
        while not over.wait(0.3):
            for s in slow:
                s.sendall(b'x')

    threading.Thread(target=drip, daemon=True).start()
    time.sleep(0.2)
    closing = threading.Thread(target=page.close)
    closing.start()
    closing.join(2)
    assert not closing.is_alive()
    over.set()
    for s in slow:
        s.close()

def test_many_may_connect_at_once():
    assert Server.request_queue_size >= 100

# ---------------------------------------------------------------------------------------------------------------------
# in a browser: the whole of collect.py, killed and resumed

EVIL = '<img src=x onerror="document.title=\'broken into\'"><script>document.title="broken into"</script>&amp;'

def start(tmp_path, **options):
    """Start collect.py in a process of its own; return that and the address it prints."""
    words = [f'--{k}={v}' for k, v in (dict(annotator='human', page=True, device='cpu', answers=tmp_path / 'a.jsonl',
                                            out=tmp_path / 'out.jsonl') | options).items()]
    process = subprocess.Popen([sys.executable, 'collect.py', *words], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1'))
    for line in process.stdout:
        if line.startswith('open http'):
            return process, line.split()[1]
    raise AssertionError('it ended')

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_in_a_browser(tmp_path):
    rows = [dict(prompt=f'{EVIL} {n}', responses=[f'good {EVIL}', 'fair', 'poor'], ranks=[2, 1, 0],
                 policies=['secret_a', 'secret_b', 'secret_a']) for n in range(4)]
    records(tmp_path / 'a.jsonl', rows)
    partial = tmp_path / 'out.jsonl.partial'
    saved = lambda: [json.loads(line) for line in open(partial)] if partial.exists() else []
    browser = Browser(tmp_path / 'profile')
    place = {} # text -> its number on the page
    text_of = lambda n: browser.js(f'document.querySelectorAll("#answers .text")[{n}].textContent')

    def showing(count):
        browser.wait(f'document.getElementById("count").textContent.startsWith("{count} of 4") '
                     '&& !document.getElementById("skip").disabled')
        place.clear()
        place.update({text_of(n)[:4]: str(n + 1) for n in range(3)})

    process, url = start(tmp_path)
    try:
        browser.open(url)
        showing(1)
        assert set(place) == {'good', 'fair', 'poor'}
        said = browser.js('document.body.innerText')
        assert EVIL + ' 0' in said and 'good ' + EVIL in said and 'secret' not in browser.js('document.body.outerHTML')
        assert browser.js('document.querySelectorAll("img").length') == 0
        assert browser.js('document.title') == '0 of 4 ranked'
        assert browser.js('document.getElementById("save").disabled')
        # the keyboard alone: best first, the last one is clear
        browser.press(place['good'], place['poor'], 'Backspace', place['fair'], 'Enter')
        showing(2)
        assert [row['ranks'] for row in saved()] == [[0, 1, 2]]
        # the mouse: two equal, and the first taken back by a second click
        browser.click(f'.card:nth-child({place["poor"]}) .text')
        browser.click(f'.card:nth-child({place["poor"]}) .pick')
        browser.click(f'.card:nth-child({place["fair"]})')
        browser.click('#tie')
        browser.click(f'.card:nth-child({place["poor"]})')
        # the tab is closed and opened again: nothing of it is lost
        browser.open('about:blank')
        browser.open(url)
        showing(2)
        assert browser.js('document.getElementById("spoken").textContent') == (
            f'Answer {place["fair"]}, 1st; Answer {place["poor"]}, 1st')
        browser.click('#save')
        showing(3)
        assert saved()[1]['ranks'] == [1, 0, 0]
        # killed and resumed
        process.kill()
        process.wait()
        browser.press('s')
        browser.wait('document.getElementById("notice").textContent.includes("No connection")')
        process, url = start(tmp_path, resume=True)
        browser.open(url)
        showing(3)
        browser.press('u') # back to the one before
        showing(2)
        assert len(saved()) == 1
        browser.press(place['poor'], place['good'], 'Enter')
        showing(3)
        assert saved()[1]['ranks'] == [1, 2, 0]
        # Tab and Space, the way of those who see no page
        browser.js('document.querySelector(".pick").focus()')
        browser.press('Space', 'Tab', 'Space', 'Enter')
        showing(4)
        assert len(saved()) == 3
        browser.press('s')
        browser.wait('document.getElementById("count").textContent.startsWith("All 4")')
        assert process.wait(60) == 0
        assert browser.js('document.title') == '4 of 4 ranked'
    finally:
        process.kill()
        browser.close()
    out = read_records(tmp_path / 'out.jsonl', 'rankings')
    assert [row['ranks'] for row in out[:2]] == [[0, 1, 2], [1, 2, 0]] and len(out) == 3 # the skipped one is left out
    assert out[0]['policies'] == ['secret_a', 'secret_b', 'secret_a'] and out[0]['annotator'] == 'human'

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_rating_in_a_browser(tmp_path):
    """By keys and by mouse; a closed tab and a killed program lose nothing; skip, undo, quit."""
    rows = [dict(prompt=f'{EVIL} {n}', responses=[f'good {EVIL}', 'poor'], ranks=[0, 1]) for n in range(3)]
    records(tmp_path / 'a.jsonl', rows)
    partial, options = tmp_path / 'out.jsonl.partial', dict(ask='ratings', qualities='helpful,honest')
    saved = lambda: [json.loads(line).get('ratings') for line in open(partial)] if partial.exists() else []
    browser, place = Browser(tmp_path / 'profile'), {} # text -> its number on the page, from 0
    number = lambda n, q, x: f'.card:nth-child({n + 1}) .scale:nth-of-type({q + 1}) button:nth-of-type({x})'
    text_of = lambda n: browser.js(f'document.querySelectorAll("#answers .text")[{n}].textContent')
    spoken = lambda: browser.js('document.getElementById("spoken").textContent')

    def showing(count):
        browser.wait(f'document.getElementById("count").textContent.startsWith("{count} of 3") '
                     '&& !document.getElementById("skip").disabled')
        place.clear()
        place.update({text_of(n)[:4]: n for n in range(2)})

    process, url = start(tmp_path, **options)
    try:
        browser.open(url)
        showing(1)
        assert 'How good are the answers?' in browser.js('document.body.innerText')
        assert 'a number from 1 (bad) to 10 (good)' in browser.js('document.body.innerText')
        assert browser.js('document.querySelectorAll("img").length') == 0
        assert browser.js('document.getElementById("save").disabled')
        # keys: from the first answer's first quality on; 0 is 10; Backspace takes the last one back
        browser.press('3', '0', '7', 'Backspace', '8', '1')
        assert spoken() == 'Answer 1: helpful 3, honest 10; Answer 2: helpful 8, honest 1'
        browser.press('Enter')
        showing(2)
        found, = saved()
        # the page shuffles; the file has the answers in their own order, and the numbers follow the shown order
        first, second = dict(helpful=3, honest=10), dict(helpful=8, honest=1)
        assert found in ([first, second], [second, first])
        # the mouse, in any order, and one changed
        browser.click(number(place['poor'], 1, 2))
        browser.click(number(place['good'], 0, 9))
        browser.click(number(place['good'], 0, 10))
        browser.open('about:blank')
        browser.open(url)
        showing(2)
        assert browser.js('document.getElementById("save").disabled')
        browser.click(number(place['poor'], 0, 1))
        browser.click(number(place['good'], 1, 4))
        browser.click('#save')
        showing(3)
        assert saved()[1] == [dict(helpful=10, honest=4), dict(helpful=1, honest=2)]
        process.kill()
        process.wait()
        process, url = start(tmp_path, resume=True, **options)
        browser.open(url)
        showing(3)
        browser.press('u') # nothing to take back here: the task before
        showing(2)
        assert len(saved()) == 1
        browser.press('5', '5', '5', '5', 'Enter')
        showing(3)
        browser.press('s')
        browser.wait('document.getElementById("count").textContent.startsWith("All 3")')
        assert process.wait(60) == 0
    finally:
        process.kill()
        browser.close()
    out = read_records(tmp_path / 'out.jsonl', 'ratings')
    assert [row['response'][:4] for row in out] == ['good', 'poor'] * 2 # the skipped one is left out
    assert [(row['helpful'], row['honest']) for row in out[2:]] == [(5, 5)] * 2

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_another_site_cannot_speak_for_the_person(tmp_path, page):
    """A page of another origin (here from a file): the browser itself says where a request comes from."""
    asked = Asked(page)
    (tmp_path / 'evil.html').write_text('<title>evil</title>')
    browser = Browser(tmp_path / 'profile')
    try:
        browser.open(f'file://{tmp_path}/evil.html')
        here = f'http://127.0.0.1:{page.server.server_port}'
        browser.js(f"""fetch('{here}/said', {{method: 'POST', mode: 'no-cors', body: '{{"id": 1, "said": "skip"}}'}})
            .then(() => document.title = 'sent', e => document.title = 'blocked') && 0""")
        browser.wait('document.title != "evil"')
        browser.js(f"""fetch('{here}/task', {{headers: {{'X-Token': '{page.token}'}}}})
            .then(() => document.title = 'read', e => document.title = 'not read') && 0""")
        browser.wait('document.title.endsWith("read")')
        assert browser.js('document.title') == 'not read'
    finally:
        browser.close()
    assert not asked.got and page.said is None

def test_stopping_on_the_page_ends_with_130(tmp_path):
    records(tmp_path / 'a.jsonl', [dict(prompt='Hi', responses=TEXTS, ranks=[0, 0, 0]) for _ in range(2)])
    process, url = start(tmp_path)
    port, token = url.split('127.0.0.1:')[1].split('/#')
    there = SimpleNamespace(server=SimpleNamespace(server_port=int(port)), token=token)
    try:
        _, task = call(there, 'GET', '/task')
        assert sorted(task['texts']) == sorted(TEXTS) and task['total'] == 2
        _, task = call(there, 'POST', '/said', dict(id=task['id'], said=[0, 1, 2]))
        assert task['done'] == 1
        assert call(there, 'POST', '/said', dict(id=task['id'], said='quit')) == (200, dict(over=True, done=1, total=2))
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert len(open(tmp_path / 'out.jsonl.partial').readlines()) == 1 and not os.path.exists(tmp_path / 'out.jsonl')
