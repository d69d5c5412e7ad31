"""A headless Chromium for tests, driven by ChromeDriver's own protocol (W3C WebDriver): JSON over HTTP."""
import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
MISSING = None if CHROMIUM and DRIVER else 'needs chromium and chromedriver (Debian: chromium, chromium-driver)'
ARGUMENTS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
             '--disable-background-networking', '--disable-component-update', '--no-proxy-server',
             '--window-size=1000,900']
KEYS = dict(Enter='\ue007', Backspace='\ue003', Tab='\ue004', Space=' ', Escape='\ue00c')

class Browser:
    def __init__(self, folder):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.process = subprocess.Popen([DRIVER, f'--port={port}'], stdout=subprocess.DEVNULL)
        self.url = f'http://127.0.0.1:{port}'
        options = dict(binary=CHROMIUM, args=ARGUMENTS + [f'--user-data-dir={folder}'])
        for _ in range(100):
            try:
                self.send('GET', '/status')
                break
            except OSError:
                time.sleep(0.1)
        session = self.send('POST', '/session', capabilities=dict(alwaysMatch={'goog:chromeOptions': options}))
        self.url += '/session/' + session['sessionId']

    def send(self, method, path, **body):
        data = json.dumps(body).encode() if method == 'POST' else None
        request = urllib.request.Request(self.url + path, data, method=method)
        with self.opener.open(request, timeout=60) as reply:
            return json.load(reply)['value']

    def open(self, url):
        self.send('POST', '/url', url=url)

    def js(self, expression):
        return self.send('POST', '/execute/sync', script=f'return {expression}', args=[])

    def wait(self, expression, seconds=60):
        """Wait until an expression holds."""
        for _ in range(10 * seconds):
            if self.js(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"{expression} does not hold after {seconds} s; the page says: "
                             + self.js('document.body.innerText'))

    def click(self, selector):
        element = self.send('POST', '/element', using='css selector', value=selector)
        self.send('POST', f'/element/{next(iter(element.values()))}/click')

    def press(self, *keys):
        for key in keys:
            self.send('POST', '/actions', actions=[dict(type='key', id='keyboard', actions=[
                dict(type=kind, value=KEYS.get(key, key)) for kind in ('keyDown', 'keyUp')])])

    def screenshot(self, path):
        with open(path, 'wb') as f:
            f.write(base64.b64decode(self.send('GET', '/screenshot')))

    def close(self):
        try:
            self.send('DELETE', '')
        finally:
            self.process.terminate()
            self.process.wait()
