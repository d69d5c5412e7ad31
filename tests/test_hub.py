"""
Names of the hub: a small hub on loopback answers huggingface_hub as the real one does, so its cache, its token and its
switches are those that people know. Each test asks from a process of its own: they are read when it is imported.
"""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from tiny import COMPARISONS, DEMONSTRATIONS, PROMPTS, RANKINGS, ROOT, TOK, checkpoint, records

import torch
from safetensors.torch import load_file, save_file

import common
from model import GPT, GPTConfig
from tokens import load_tokenizer

pytest.importorskip('huggingface_hub', reason="names of the hub are fetched with it")

WORKER = '''
import contextlib, io, json, sys, time
import common, torch
from common import fetch_from_hub
from model import GPT, load_policy, load_reward_model
from tokens import load_tokenizer

def logits(*args, **kwargs):
    return GPT.from_pretrained(*args, **kwargs)(torch.tensor([[1, 5, 2, 6]]))[0][0, :, :7].tolist()

def run(script, **options):
    script = __import__(script)
    script.main(common.parse_config(script.Config, [f"--{k}={v}" for k, v in options.items()]))

for call in json.loads(sys.argv[1]):
    said, started = io.StringIO(), time.time()
    with contextlib.redirect_stderr(said):
        try:
            result = eval(call)
        except SystemExit as stopped:
            result = stopped.code
    print('RESULT', json.dumps([result, said.getvalue(), time.time() - started]))
'''


class Hub(http.server.BaseHTTPRequestHandler):
    """/REPO/resolve/main/FILE and /datasets/REPO/resolve/main/FILE, from server.folder; what it answers is noted."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        repo, _, file = self.path[1:].partition('/resolve/main/')
        path = os.path.join(self.server.folder, repo, file)
        token = self.headers.get('Authorization')
        self.server.asked.append((self.command, repo, file, token))
        error = None
        if repo == 'gpt2': # the old name of openai-community/gpt2
            self.send_response(307)
            self.send_header('Location', f"/openai-community/gpt2/resolve/main/{file}")
        elif repo == 'someone/gated':
            error = 403, 'GatedRepo'
        elif not os.path.isdir(os.path.join(self.server.folder, repo)) or (
                repo == 'someone/private' and token != 'Bearer hf_secret'):
            error = 401, 'RepoNotFound'
        elif not os.path.isfile(path):
            error = 404, 'EntryNotFound'
        else:
            with open(path, 'rb') as f:
                content = f.read()
            self.send_response(200)
            self.send_header('ETag', f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header('Content-Length', str(len(content)))
            self.send_header('X-Repo-Commit', '0' * 40)
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content)
            return
        if error:
            self.send_response(error[0])
            self.send_header('X-Error-Code', error[1])
            self.send_header('X-Error-Message', error[1])
        self.send_header('Content-Length', '0')
        self.end_headers()

    do_GET = do_HEAD


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.folder, server.asked = str(tmp_path_factory.mktemp('hub')), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    checkpoint(os.path.join(server.folder, 'someone/ours'))
    checkpoint(os.path.join(server.folder, 'someone/private'))
    checkpoint(os.path.join(server.folder, 'someone/reward'), reward_head=True)
    os.makedirs(os.path.join(server.folder, 'datasets/someone/data'))
    records(os.path.join(server.folder, 'datasets/someone/data/train.jsonl'), PROMPTS)
    os.makedirs(os.path.join(server.folder, 'someone/empty'))
    theirs = os.path.join(server.folder, 'openai-community/gpt2') # the hub's GPT-2: no prefix, no tokenizer of ours
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)).save_pretrained(theirs)
    path = os.path.join(theirs, 'model.safetensors')
    save_file({k.removeprefix('transformer.'): t for k, t in load_file(path).items()}, path)
    sharded(os.path.join(server.folder, 'someone/ours'), os.path.join(server.folder, 'someone/sharded'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sharded(folder, new):
    """The same weights in two files and an index."""
    os.makedirs(new)
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (i >= 7)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, os.path.join(new, file))
    for name, text in (('model.safetensors.index.json', json.dumps(dict(metadata={}, weight_map=files))),
                       ('config.json', open(os.path.join(folder, 'config.json')).read())):
        with open(os.path.join(new, name), 'w') as f:
            f.write(text)


def ask(hub, home, *calls, **env):
    """[(result or exit code, stderr, seconds)] of Python expressions; the hub's files are cached below `home`."""
    os.makedirs(os.path.join(home, 'work'), exist_ok=True)
    others = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING')) and 'proxy' not in k.lower()}
    env = others | dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS='1', PYTHONPATH=ROOT,
                        OMP_NUM_THREADS='1') | env
    hub.asked.clear()
    done = subprocess.run([sys.executable, '-c', WORKER, json.dumps(calls)], env=env, text=True, capture_output=True,
                          cwd=os.path.join(home, 'work'))
    results = [json.loads(line[7:]) for line in done.stdout.split('\n') if line.startswith('RESULT ')]
    assert len(results) == len(calls), done.stderr
    return results


def logits(folder):
    return GPT.from_pretrained(folder)(torch.tensor([[1, 5, 2, 6]]))[0][0, :, :7].tolist()


def one_line(result):
    code, err, seconds = result
    assert code == 2 and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    assert seconds < 20 # huggingface_hub alone would go on asking for 25, on an idle machine
    return err


def test_names_of_the_hub_give_what_its_folders_give(hub, tmp_path):
    """Fetched once, and found in the cache where nothing answers any more."""
    names = ('someone/ours', 'someone/sharded', 'gpt2')
    folders = [os.path.join(hub.folder, name) for name in ('someone/ours', 'someone/sharded', 'openai-community/gpt2')]
    calls = [f"logits({name!r})" for name in names] + ["load_tokenizer('someone/ours').name"]
    first = ask(hub, tmp_path, *calls)
    assert [r[0] for r in first] == [logits(folder) for folder in folders] + ['bytes']
    assert first[0][0] == first[1][0] != first[2][0]
    fetched = [file for command, repo, file, _ in hub.asked if command == 'GET' and repo == 'someone/ours']
    assert sorted(fetched) == ['config.json', 'model.safetensors', 'tokenizer_name']
    offline = ask(hub, tmp_path, *calls, HF_ENDPOINT='http://127.0.0.1:9') # nobody listens at port 9
    assert [r[0] for r in offline] == [r[0] for r in first]


def test_a_data_set_and_a_token(hub, tmp_path):
    calls = ("open(fetch_from_hub('someone/data', 'train.jsonl', 'dataset')).read()",
             "fetch_from_hub('someone/data', 'nothing.jsonl', 'dataset', absent_ok=True)", "logits('someone/private')")
    data, nothing, private = ask(hub, tmp_path, *calls, HF_TOKEN='hf_secret')
    assert data[0] == open(os.path.join(hub.folder, 'datasets/someone/data/train.jsonl')).read()
    assert nothing[0] is None
    assert private[0] == logits(os.path.join(hub.folder, 'someone/private'))


def test_what_the_hub_does_not_give_is_told_in_one_line(hub, tmp_path):
    os.makedirs(tmp_path / 'work/models')
    calls = dict(
        nobody="GPT.from_pretrained('someone/nobody')", private="load_policy('someone/private')",
        gated="load_reward_model('someone/gated')", empty="GPT.from_pretrained('someone/empty')",
        file="fetch_from_hub('someone/data', 'val.jsonl', repo_type='dataset')",
        data="fetch_from_hub('someone/nothing', 'train.jsonl', repo_type='dataset')",
        kind="load_policy('someone/reward', 'init_from')", tokenizer="load_tokenizer('someone/sharded')",
        out="GPT.from_pretrained('out/nowhere')", below="GPT.from_pretrained('models/nowhere')",
        word="GPT.from_pretrained('nowhere')", deep="GPT.from_pretrained('a/b/c')", dot="GPT.from_pretrained('./gpt2')")
    said = dict(zip(calls, map(one_line, ask(hub, tmp_path, *calls.values()))))
    assert 'someone/nobody: cannot fetch config.json' in said['nobody']
    assert 'no folder of this name here, and no such model there' in said['nobody']
    assert 'a private one needs HF_TOKEN' in said['private'] and 'it is gated: ask for access' in said['gated']
    assert 'someone/empty: the model on the hub has no file config.json' in said['empty']
    assert 'someone/data: the dataset on the hub has no file val.jsonl' in said['file']
    assert 'no such dataset there' in said['data'] and 'put train.jsonl into a folder' in said['data']
    assert said['kind'] == 'error: --init_from=someone/reward: is a reward model, wanted a language model\n'
    assert 'someone/sharded: wanted a checkpoint with tokenizer.tiktoken' in said['tokenizer']
    for name in ('out/nowhere', 'models/nowhere', 'nowhere', 'a/b/c', './gpt2'): # nobody went looking for these
        line = next(line for line in said.values() if line.startswith(f"error: {name}/config.json: No such file"))
        assert 'wanted a checkpoint folder' in line and 'gpt2-xl, distilgpt2 or OWNER/NAME' in line
        assert name not in [repo for _, repo, *_ in hub.asked]


def test_without_a_network_one_line_says_what_to_put_where(hub, tmp_path):
    names = ('gpt2', 'someone/reward', 'someone/ours')
    calls = ("GPT.from_pretrained('gpt2')", "load_reward_model('someone/reward')", "load_tokenizer('someone/ours')")
    for env in (dict(HF_ENDPOINT='http://127.0.0.1:9'), dict(HF_HUB_OFFLINE='1')):
        for name, result in zip(names, ask(hub, tmp_path, *calls, **env)):
            line = one_line(result)
            assert line.startswith(f"error: {name}: cannot fetch config.json from the hub (")
            assert 'put config.json and model.safetensors into a folder and name that folder instead' in line


def test_a_folder_of_that_name_is_the_folder(hub, tmp_path):
    for name in ('gpt2', 'someone/ours'):
        checkpoint(str(tmp_path / 'work' / name), seed=5)
    results = ask(hub, tmp_path, "logits('gpt2')", "logits('someone/ours')", "load_tokenizer('gpt2').name")
    assert results[0][0] == results[1][0] == logits(str(tmp_path / 'work/gpt2')) != logits(
        os.path.join(hub.folder, 'someone/ours'))
    assert results[2][0] == 'bytes' and hub.asked == []


def test_every_script_takes_names_of_the_hub(hub, tmp_path):
    work = tmp_path / 'work'
    os.makedirs(work)
    files = {k: records(work / f"{k}.jsonl", rows) for k, rows in dict(
        demonstrations=DEMONSTRATIONS, rankings=RANKINGS, comparisons=COMPARISONS, prompts=PROMPTS).items()}
    toy = records(work / 'toy.jsonl', [dict(prompt=p, category='home') for p in ('Where does the fox live?',) * 2])
    steps = "device='cpu', dtype='float32', max_steps=1, batch_size=4"
    ours, reward = "'someone/ours'", "'someone/reward'"
    calls = [
        f"run('sft', init_from={ours}, out_dir='sft', train_data={files['demonstrations']!r}, pad_vocab=True, {steps})",
        f"run('reward', init_from={ours}, out_dir='reward', train_data={files['rankings']!r}, {steps})",
        f"run('dpo', init_from={ours}, out_dir='dpo', train_data={files['comparisons']!r}, {steps})",
        f"run('ppo', policy={ours}, reward_model={reward}, prompts={files['prompts']!r}, out_dir='ppo', "
        f"max_new_tokens=4, {steps})",
        f"run('collect', policy={ours}, prompts={toy!r}, out='out.jsonl', n_answers=2, max_new_tokens=4, device='cpu')",
        f"run('evaluate', models='a=someone/ours', baseline='a', reward_model={reward}, prompts={files['prompts']!r}, "
        "max_new_tokens=4, device='cpu', figures=False, out_dir='evaluate')",
        f"run('sample', policy={ours}, reward_model={reward}, prompt='Hi', max_new_tokens=4, device='cpu')",
        f"run('bench', workload='sft', init_from={ours}, data={files['comparisons']!r}, steps=1, repeats=1, "
        "batch_size=2, device='cpu')"]
    for call, (result, err, _) in zip(calls, ask(hub, tmp_path, *calls)):
        assert result is None, (call, result, err)
    for name in ('sft', 'dpo', 'ppo'):
        assert GPT.from_pretrained(work / name).config.vocab_size == TOK.n_vocab
    assert load_tokenizer(str(work / 'reward')).name == 'bytes'


@pytest.mark.parametrize('name, expected', [
    ('gpt2', True), ('gpt2-xl', True), ('distilgpt2', True), ('owner/name', True), ('owner.1/gpt2-x_y.z', True),
    ('gpt3', False), ('out/x', False), ('/gpt2', False), ('./gpt2', False), ('../gpt2', False), ('~/gpt2', False),
    ('a/b/c', False), ('owner/', False), ('owner/na me', False), ('', False), ('here/gpt2', False), ('here', False)])
def test_what_means_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs('here')
    assert common.on_hub(name) == expected
