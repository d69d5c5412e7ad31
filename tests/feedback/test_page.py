"""feedback/page.py: who is let in, what is taken, when it replies; the page in a real browser, from start to end."""
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from browser import MISSING, Browser
from common.records import read_records
from feedback import annotators, page as page_module
from feedback.annotators import Undo
from feedback.page import HTML, Page, Server
from tiny import ROOT, by_hand, exits, records

TEXTS = ['one', 'two', 'three']

class Asked:
    """Let a page ask one question in a thread, for ranks or `numbers`; `got` is what came of it."""

    def __init__(self, page, numbers=False, prompt='Hi', texts=TEXTS):
        self.ask_for, self.page, self.got = page.ask_numbers if numbers else page.ask, page, []
        self.said = [dict(role='user', content=prompt)], texts
        self.thread = threading.Thread(target=self.ask, daemon=True)
        self.thread.start()
        while page.task is None:
            time.sleep(0.01)

    def ask(self):
        try:
            self.got.append(self.ask_for(*self.said))
        except (Undo, KeyboardInterrupt) as e:
            self.got.append(type(e))

    def wait(self):
        self.thread.join(5)
        return self.got

def a_page(**options):
    page = Page(SimpleNamespace(**dict(port=0, seed=1, qualities='helpful,honest', scale=5, guidelines='', rater='',
                                       out='out.jsonl') | options))
    page.progress = 4, 10
    return page

@pytest.fixture
def page():
    page = a_page()
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
    dict(Host='127.0.0.1'), dict(Host='127.0.0.1:PORT.evil.example'), dict(Host=None), dict(Host='127.0.0.1:'),
    dict(Host='127.0.0.1.evil.example:PORT'), dict(Host='localhost.evil.example:PORT'), dict(Host='127.0.0.2:PORT'),
    dict(Host='127.0.0.1:1@evil.example'), dict(Host='127x0x0x1:PORT'), dict(Host='localhost:999999'),
    dict(Host='localhost:9000', Origin='http://evil.example:9000'), dict(Host='localhost:9000', X_Token='wrong'),
    dict(Host='localhost:9000', Origin='http://127.0.0.1:9000'), dict(Host='localhost:9000', Origin='http://localhost'),
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

@pytest.mark.parametrize('host', ['localhost:9000', '127.0.0.1:1', 'localhost:65535'])
def test_another_port_of_this_machine_may_lead_here(page, host):
    """As `ssh -L 9000:127.0.0.1:PORT` does: the browser names the port that it opened."""
    Asked(page)
    assert call(page, 'GET', '/', Host=host, X_Token=None)[0] == 200
    assert call(page, 'GET', '/task', Host=host, Origin=f'http://{host}')[1]['texts'] == TEXTS
    assert call(page, 'GET', '/task', Host=host, Origin=f'http://{host}', X_Token='wrong')[0] == 403

@pytest.mark.parametrize('body, status', [
    (b'', 400), (b'not json', 400), (b'[1]', 400), (b'{"id": 1}', 400), (b'[' * 9999, 400), (b' ' * 10_001, 400),
    (dict(id=1, said=[0, 1]), 400), (dict(id=1, said=[0, 1, 3]), 400), (dict(id=1, said=[0, 1, -1]), 400),
    (dict(id=1, said=[0, 1, True]), 400), (dict(id=1, said=[0, 1, None]), 400), (dict(id=1, said='delete'), 400),
    (dict(id=1, said={}), 400), (dict(id=1, said='skip', why=7), 400),
    (dict(id=1, said='skip', why=None), 400), (b'{"id": 1, "said": "skip", "why": "\\ud83d"}', 400),
    (dict(id=2, said='skip'), 409), (dict(id=[], said='skip'), 409),
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

@pytest.mark.parametrize('said, seconds, about', [
    (dict(said=[0, 1, 2]), 172.34, dict(seconds=12.3)), (dict(said='skip'), 160, dict(seconds=0, skipped='')),
    (dict(said='skip', why='  all\nwrong 你 '), 1160.06, dict(seconds=1000.1, skipped='all\nwrong 你')),
    (dict(said=[0, 1, 2], why='none'), 161, dict(seconds=1))]) # a reason for nothing
def test_seconds_and_reasons(page, monkeypatch, said, seconds, about):
    """The clock says 100 when the task is there, 160 when the page shows it, then `seconds`."""
    clock = [100]
    for module in (annotators, page_module):
        monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    row, got = dict(prompt='Hi', responses=TEXTS), []
    rank = threading.Thread(target=lambda: got.append(page.rank(row)), daemon=True)
    rank.start()
    while page.task is None:
        time.sleep(0.01)
    clock[0] = 160
    assert call(page, 'GET', '/task')[1]['id'] == 1
    clock[0] = seconds
    threading.Thread(target=call, args=(page, 'POST', '/said', dict(id=1) | said), daemon=True).start()
    rank.join(5)
    assert page.about == about and (got[0][0] is None) == ('skipped' in about)

def test_guidelines(tmp_path, capsys):
    path = tmp_path / 'guide.txt'
    path.write_text('Short is <b>better</b>.\n', encoding='utf-8')
    page = a_page(guidelines=str(path))
    Asked(page)
    assert call(page, 'GET', '/task')[1]['guidelines'] == 'Short is <b>better</b>.'
    assert b'better' not in call(page, 'GET', '/', X_Token=None)[1].replace(b'are better', b'') # whoever has no token
    page.close()
    none = f'{tmp_path}/none.txt'
    exits(capsys, f'--guidelines={none}: cannot be read', lambda: a_page(guidelines=none))
    path.write_text(' \n')
    exits(capsys, f'--guidelines={path}: is empty, wanted a text', lambda: a_page(guidelines=str(path)))
    path.write_bytes(b'\xff\xfe')
    exits(capsys, f'--guidelines={path}: cannot be read', lambda: a_page(guidelines=str(path)))

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
        browser.wait(f'document.getElementById("count").textContent.startsWith("Prompt {count} of 4;") '
                     '&& !document.getElementById("skip").disabled')
        place.clear()
        place.update({text_of(n)[:4]: str(n + 1) for n in range(3)})

    process, url = start(tmp_path, rater='Anna 安娜')
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
        process, url = start(tmp_path, resume=True, rater='Anna 安娜')
        browser.open(url)
        showing(3)
        browser.press('u') # back to the one before
        showing(2)
        assert len(saved()) == 1
        browser.press(place['poor'], place['good'], 'Enter')
        showing(3)
        assert saved()[1]['ranks'] == [1, 2, 0]
        # Tab and Space, the way of those who see no page; Enter on a placed answer takes it back
        browser.js('document.querySelector(".pick").focus()')
        browser.press('Space', 'Tab', 'Space')
        spoken = lambda: browser.js('document.getElementById("spoken").textContent')
        assert spoken() == 'Answer 1, 1st; Answer 2, 2nd' and not browser.js('document.getElementById("save").disabled')
        browser.press('Enter')
        assert spoken() == 'Answer 1, 1st' and len(saved()) == 2
        browser.press('Enter', 'Tab', 'Tab')
        assert browser.js('document.activeElement.id') == 'save' and spoken() == 'Answer 1, 1st; Answer 2, 2nd'
        browser.press('Enter')
        showing(4)
        assert len(saved()) == 3
        # the last one is skipped, for a reason; letters in it are no keys
        browser.press('W', *'us <b>1', 'Escape', 'w', *'2', 'Enter')
        browser.wait('document.getElementById("count").textContent.startsWith("All 4")')
        assert process.wait(60) == 0
        assert browser.js('document.title') == '4 of 4 ranked'
    finally:
        process.kill()
        browser.close()
    skipped, = read_records(tmp_path / 'out.jsonl.skipped', 'prompts')
    assert skipped['prompt'] == f'{EVIL} 3' and skipped['skipped'] == 'us <b>12' and skipped['rater'] == 'Anna 安娜'
    out = read_records(tmp_path / 'out.jsonl', 'rankings')
    assert all(row['rater'] == 'Anna 安娜' and 0 <= row['seconds'] < 600 and 'skipped' not in row for row in out)
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
        browser.wait(f'document.getElementById("count").textContent.startsWith("Prompt {count} of 3;") '
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
        # Enter on a number that is not chosen chooses it; on a chosen one it saves, as after a click
        browser.js('document.querySelectorAll(".scale button")[4].focus()')
        browser.press('Enter')
        assert spoken() == 'Answer 1: helpful 5, honest 10; Answer 2: helpful 8, honest 1' and not saved()
        browser.js('document.querySelectorAll(".scale button")[2].focus()')
        browser.press('Enter', 'Enter')
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
    assert all(0 <= row['seconds'] < 600 and 'rater' not in row for row in out)
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

# ---------------------------------------------------------------------------------------------------------------------
# how it looks

CODE = f'''# Heads stand out
**so** do words, `{EVIL}` is code, ``two`` ticks too
```python
    x = 1 # {EVIL} ```
```
after
~~~
fence of tildes, `ticks` in it
~~~~
|a|b|
|-|-|
|1|2|
|no table|

```not a fence``` is inline
- a list
\tand a tab\r
```
cut off, without an en'''
LONG = '\n'.join(f'line {n} of a long one' for n in range(60))

@contextmanager
def opened(tmp_path, page, **question):
    """Open a page that asks a question; yield (the browser, a function for Chromium's own commands)."""
    asked, browser = Asked(page, **question), Browser(tmp_path / 'profile')
    try:
        browser.open(f'http://127.0.0.1:{page.server.server_port}/#{page.token}')
        browser.wait('task && !document.getElementById("skip").disabled')
        yield browser, lambda cmd, **params: browser.send('POST', '/goog/cdp/execute', cmd=cmd, params=params)
    finally:
        browser.close()
        with page.changed: # so that the thread ends
            page.task, page.said = None, 'skip'
            page.changed.notify_all()
        asked.wait()

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_markdown_stays_text(tmp_path, page):
    """Every character of it is there, in its place; code has a fixed width; nothing of it is markup."""
    with opened(tmp_path, page, prompt=CODE, texts=[CODE, '`a` b' * 50 + '*' * 99, '```\n' * 101]) as (browser, _):
        texts = browser.js("[...document.querySelectorAll('#answers .text')].map(t => t.textContent)")
        assert texts == page.task['texts']
        for place in ('#conversation .text', 'li:nth-child(1) .text'):
            assert browser.js(f"document.querySelector('{place}').textContent") == CODE
            found = browser.js(f"[...document.querySelectorAll('{place} *')].map(e => [e.tagName, e.className,"
                               "e.textContent, getComputedStyle(e).fontFamily.includes('monospace'),"
                               "e.childElementCount])")
            assert found == [
                ['B', '', '# Heads stand out', False, 0], ['B', '', '**so**', False, 0],
                ['CODE', '', f'`{EVIL}`', True, 0], ['CODE', '', '`two`', True, 0],
                ['CODE', 'block', f'```python\n    x = 1 # {EVIL} ```\n```\n', True, 0],
                ['CODE', 'block', '~~~\nfence of tildes, `ticks` in it\n~~~~\n', True, 0],
                ['CODE', 'block', '|a|b|\n|-|-|\n|1|2|\n|no table|\n', True, 0], ['CODE', '', '`not a fence`', True, 0],
                ['CODE', 'block', '```\ncut off, without an en', True, 0]]
        assert browser.js('document.querySelectorAll("#main img, #main script").length') == 0
        assert browser.js('getComputedStyle(document.querySelector(".text")).fontFamily').startswith('system-ui')

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize('numbers', [False, True])
def test_long_answers_fold_and_the_page_says_so(tmp_path, page, numbers):
    with opened(tmp_path, page, numbers=numbers, texts=['short', LONG, LONG.upper()]) as (browser, _):
        folded = lambda: browser.js('document.getElementById("folded").textContent')
        buttons = lambda: browser.js('[...document.querySelectorAll(".fold")]'
                                     '.map(b => [b.textContent, b.ariaExpanded])')
        hidden = lambda: browser.js('[...document.querySelectorAll("#answers .text")].map(t => '
                                    'Math.round(100 * (1 - t.clientHeight / t.scrollHeight)))')
        chosen = lambda: browser.js('order.length')
        rest = hidden()
        assert rest[0] == 0 and rest[1] == rest[2] > 70
        assert folded() == 'Folded, in part hidden: answer 2, 3' and browser.js(
            '(r => r.top >= 0 && r.bottom <= innerHeight)(document.getElementById("folded").getBoundingClientRect())')
        assert buttons() == [[f'Show the other {rest[1]} % of answer {n}', 'false'] for n in (2, 3)]
        browser.js('document.querySelector("li:nth-child(2) .fold").scrollIntoView({block: "nearest"})')
        browser.click('li:nth-child(2) .fold') # which chooses nothing, and is not behind the buttons below
        assert hidden() == [0, 0, rest[2]] and folded() == 'Folded, in part hidden: answer 3' and chosen() == 0
        # keys: F shows and folds all; Tab and Enter do it for one answer
        browser.press('f')
        assert hidden() == [0, 0, 0] and folded() == 'Nothing is folded' and buttons()[1] == ['Fold answer 3', 'true']
        browser.press('f')
        assert hidden() == rest
        browser.js('document.querySelectorAll("#answers button.fold")[0].focus()')
        browser.press('Enter')
        assert hidden() == [0, 0, rest[2]] and chosen() == 0
        browser.press('Space')
        assert hidden() == rest
        browser.click('#folds')
        assert hidden() == [0, 0, 0]

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_short_answers_have_no_fold(tmp_path, page):
    with opened(tmp_path, page) as (browser, _):
        assert browser.js('document.querySelectorAll(".fold").length') == 0
        assert browser.js('document.getElementById("folding").hidden')

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_enter_after_the_mouse_saves(tmp_path, page):
    with opened(tmp_path, page) as (browser, _):
        browser.click('li:nth-child(2) .pick')
        browser.click('li:nth-child(1) .pick')
        browser.press('Enter')
        browser.wait('busy')
        assert page.said == [1, 0, 2]

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_guidelines_are_open_until_something_is_said(tmp_path):
    path = tmp_path / 'guide.txt'
    path.write_text(f'Right before polite. {EVIL}\n')
    page = a_page(guidelines=str(path))
    with opened(tmp_path, page) as (browser, _):
        is_open = lambda: browser.js('document.getElementById("guidelines").open')
        assert is_open() and f'Right before polite. {EVIL}' in browser.js('document.body.innerText')
        assert browser.js('document.querySelectorAll("img").length') == 0
        url = browser.send('GET', '/url')
        browser.open('about:blank')
        browser.open(url)
        browser.wait('task && !document.getElementById("skip").disabled')
        assert is_open()
        browser.press('s')
        Asked(page, prompt='Two')
        browser.wait('task.id === 2 && !busy')
        assert not is_open()
        browser.js('document.querySelector("summary").focus()')
        browser.press('Enter')
        assert is_open() and page.task['id'] == 2
    page.close()

def luminance(colour):
    """Return the relative luminance of `rgb(r, g, b)` (WCAG 2.2)."""
    parts = [int(x) / 255 for x in colour.removeprefix('rgb(').removesuffix(')').split(',')]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b

def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)

def test_contrast_by_hand():
    """White on black: 1.05 / 0.05. Pure red has 0.2126: 1.05 / 0.2626, and 0.2626 / 0.05."""
    white, black, red = 'rgb(255, 255, 255)', 'rgb(0, 0, 0)', 'rgb(255, 0, 0)'
    assert contrast(white, black) == contrast(black, white) == by_hand(21)
    assert contrast(red, white) == by_hand(3.998477) and contrast(red, black) == by_hand(5.252)

BORDERS = """(() => { // of all that one can use: [what, border, background inside, background outside]
  const behind = e => { // the first ground that is no glass
    const colour = getComputedStyle(e).backgroundColor
    return colour === 'rgba(0, 0, 0, 0)' ? behind(e.parentElement) : colour
  }
  return [...document.querySelectorAll('button, input, details')].filter(e => e.offsetParent)
    .map(e => [e.id || e.textContent, getComputedStyle(e).borderTopColor, behind(e), behind(e.parentElement),
               getComputedStyle(e).opacity])
})()"""

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize('numbers', [False, True])
def test_borders_and_width(tmp_path, numbers):
    """Borders of 3:1 by day and by night; on a phone nothing is too wide, and fingers have 44 pixels."""
    path = tmp_path / 'guide.txt'
    path.write_text('Right before polite.\n')
    page = a_page(guidelines=str(path), scale=10)
    wide = 'W' * 300
    texts = [f'```\n{wide}\n```\n{LONG}', wide, f'|{wide}|\n|-|']
    with opened(tmp_path, page, numbers=numbers, prompt=f'`{wide}`', texts=texts) as (browser, cdp):
        for mode in ('light', 'dark'):
            cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=mode)])
            for change in ('order = []', 'order = [[0, task.qualities ? 3 : false]]', 'act.ask()'):
                browser.js(f'({change}, draw())')
                borders = browser.js(BORDERS)
                assert len(borders) >= 10 and all(opacity == '1' for *_, opacity in borders)
                for what, border, inside, outside, _ in borders:
                    assert contrast(border, outside) >= 3, (mode, what, border, outside)
                    assert border == inside or contrast(border, inside) >= 3, (mode, what, border, inside)
            browser.js('act.ask()')
        assert not browser.js('document.getElementById("footer").hidden')
        for width in (390, 320):
            cdp('Emulation.setDeviceMetricsOverride', width=width, height=844, deviceScaleFactor=2, mobile=True)
            browser.js('(act.ask(), 0)')
            assert browser.js('[document.documentElement.scrollWidth, innerWidth]') == [width, width]
            # all but margins, and the number where it is beside the answer
            beside = 0 if numbers else 44 + 13
            assert browser.js('document.querySelector("#answers .text").offsetWidth') >= width - 56 - beside
            small = browser.js('[...document.querySelectorAll("button, input, summary")].filter(e => e.offsetParent)'
                               '.map(e => [e.id || e.textContent, e.offsetWidth, e.offsetHeight])'
                               '.filter(([, width, height]) => width < 44 || height < 44)')
            assert small == []
            browser.js('(act.ask(), 0)')
    page.close()

PHONE = ['A pot of lentil soup with bread is cheap and can stand on the stove until they come.',
         'Try pasta with tomatoes and basil; it takes twenty minutes.',
         'Order pizza. Nobody minds, and you have the evening for your friends instead of the kitchen.']

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_three_answers_can_be_read_on_a_phone(tmp_path, page):
    """The buttons take one row, below the third answer; which prompt it is stands at the top."""
    with opened(tmp_path, page, prompt='What should I cook for four friends?', texts=PHONE) as (browser, cdp):
        box = lambda selector: browser.js(f'(r => [r.top, r.bottom])(document.querySelector("{selector}")'
                                          '.getBoundingClientRect())')
        for width in (390, 320):
            cdp('Emulation.setDeviceMetricsOverride', width=width, height=844, deviceScaleFactor=2, mobile=True)
            rows = browser.js('[...document.querySelectorAll("footer button")].filter(e => e.offsetParent)'
                              '.map(e => [e.offsetTop, e.scrollWidth - e.clientWidth])')
            assert len(rows) == 6 and len({top for top, _ in rows}) == 1 and not any(over for _, over in rows)
            assert box('footer')[1] <= 844 and box('footer')[1] - box('footer')[0] < 64
            browser.js('(scrollTo(0, 9999), 0)')
            assert box('#answers li:nth-child(3)')[1] <= box('footer')[0]
        cdp('Emulation.setDeviceMetricsOverride', width=390, height=844, deviceScaleFactor=2, mobile=True)
        browser.js('(scrollTo(0, 0), 0)')
        assert box('#answers li:nth-child(3) .text')[1] <= box('footer')[0] # without scrolling
        # the number is beside the answer, and the place in the number's button, so that neither takes a line
        height = browser.js('document.querySelector("#answers").offsetHeight')
        browser.js('(pick(1), pick(0), 0)')
        for n, word in (1, '2nd'), (2, '1st'), (3, '3rd'):
            card = f'#answers li:nth-child({n})'
            (top, bottom), text, place = (box(f'{card} .{part}') for part in ('pick', 'text', 'place'))
            assert abs(top - text[0]) < 8 and top + 16 < place[1] <= bottom
            assert browser.js(f'document.querySelector("{card} .place").innerText') == word
        assert browser.js('document.querySelector("#answers").offsetHeight') == height
        assert browser.js('document.getElementById("ask").innerText') == 'Skip, why'
        for mode in ('light', 'dark'):
            cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=mode)])
            for word, ground in browser.js('[...document.querySelectorAll(".place")].map(e => [getComputedStyle(e)'
                                           '.color, getComputedStyle(e.parentElement.firstChild).backgroundColor])'):
                assert contrast(word, ground) >= 4.5, (mode, word, ground)
        assert browser.js('document.getElementById("count").innerText') == 'Prompt 5 of 10; saved as you go'

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_keys_that_do_nothing_say_why(tmp_path, page):
    page.progress = 0, 10
    with opened(tmp_path, page) as (browser, _):
        said = lambda: browser.js('document.getElementById("hint").textContent')
        chosen = lambda: browser.js('order.map(([i]) => i + 1)')
        assert said() == '' and browser.js('document.getElementById("hint").role') == 'status' # a reader reads it out
        first, three = 'Nothing to undo: this is the first prompt', 'There are 3 answers: press 1 to 3'
        for key, why in (('u', first), ('4', three), ('Backspace', first), ('0', three), ('9', three),
                         ('Enter', 'Place all answers first: 1, 2, 3 have no place yet'),
                         ('=', 'Choose the best answer first; then = says that the next one is as good'),
                         ('f', 'No answer is long enough to be folded')):
            browser.press(key)
            assert said() == why and chosen() == [] and page.said is None
        assert browser.js('(r => r.top >= 0 && r.bottom <= innerHeight)'
                          '(document.getElementById("hint").getBoundingClientRect())')
        browser.press('2')
        assert said() == '' and chosen() == [2]
        browser.press('Enter')
        assert said() == 'Place all answers first: 1, 3 have no place yet' and page.said is None
        browser.click('li:nth-child(1) .pick')
        assert said() == '' and chosen() == [2, 1]
        browser.press('3', '=')
        assert said() == 'All answers have a place: none is left to be equal' and not browser.js('tie')
        browser.press('u', 'u', 'u')
        assert said() == '' and chosen() == []
        browser.click('#undo')
        assert said() == first and page.said is None

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_keys_for_numbers_that_do_nothing_say_why(tmp_path, page):
    with opened(tmp_path, page, numbers=True, texts=['one', 'two']) as (browser, _):
        said = lambda: browser.js('document.getElementById("hint").textContent')
        for keys, why in (('7', 'The numbers go from 1 to 5'), ('0', 'The numbers go from 1 to 5'), ('123', ''),
                          (['Enter'], 'Give all numbers first: some are missing at answer 2'), ('4', ''),
                          ('5', 'All answers have their numbers: Enter saves, U takes the last one back')):
            browser.press(*keys)
            assert said() == why and page.said is None
        browser.press('Enter')
        browser.wait('busy')
        assert page.said == [[1, 2], [3, 4]]

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize('key, said', [('S', 'skip'), ('U', 'undo')])
def test_capitals_are_the_same_keys(tmp_path, page, key, said):
    """With Caps Lock or Shift."""
    with opened(tmp_path, page, texts=['short', LONG]) as (browser, _):
        folded = lambda: browser.js('document.querySelectorAll("#answers .folded").length')
        assert folded() == 1
        browser.press('F')
        assert folded() == 0
        browser.press('F', '2', 'U') # its own choice first
        assert folded() == 1 and browser.js('order.length') == 0 and page.said is None
        browser.press(key)
        browser.wait('busy')
        assert page.said == said

@contextmanager
def forwarded(port):
    """Lead another port of this machine to `port`, as ssh -L does. Yields that port."""
    def lead(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def take():
        with contextlib.suppress(OSError):
            while True:
                here, there = listening.accept()[0], socket.create_connection(('127.0.0.1', port))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=lead, args=pair, daemon=True).start()

    with socket.create_server(('127.0.0.1', 0)) as listening:
        threading.Thread(target=take, daemon=True).start()
        yield listening.getsockname()[1]

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_through_another_local_port(tmp_path, page):
    with forwarded(page.server.server_port) as port, opened(tmp_path, page) as (browser, _):
        assert port != page.server.server_port
        browser.open(f'http://localhost:{port}/#{page.token}')
        browser.wait('task && !document.getElementById("skip").disabled')
        browser.press('3', '1', 'Enter')
        browser.wait('busy')
        assert page.said == [1, 2, 0]
