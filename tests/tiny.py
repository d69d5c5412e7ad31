"""Tiny checkpoints, records and runs that several test files share."""
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch

from common import options as command_line, training
from common.checkpoints import read_log
from common.options import TrainOptions, parse_config, require
from common.records import write_records
from common.rollout import pack
from common.run import Run
from common.tokens import load_tokenizer
from model import GPT, GPTConfig

torch.set_num_threads(1)
TOK = load_tokenizer('bytes')
# "### Human: Hi\n### Assistant:" and " Yo" with its end of text, byte by byte
PROMPT_HI = [35, 35, 35, 32, 72, 117, 109, 97, 110, 58, 32, 72, 105, 10,
             35, 35, 35, 32, 65, 115, 115, 105, 115, 116, 97, 110, 116, 58]
RESPONSE_YO = [32, 89, 111, 256]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# constant: a run of two steps has the learning rates of the first half of a run of four
FAST = dict(device='cpu', dtype='float32', lr_schedule='constant', lr=1e-3, warmup_steps=0, log_every=1)

def by_hand(values):
    return pytest.approx(values, abs=1e-6)

def one_line(capsys, call, code=2):
    """Return the one line on stderr with which `call` ends the program, less "error: "."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    err = capsys.readouterr().err
    assert stopped.value.code == code and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err[len('error: '):-1]

def exits(capsys, message, function, *args):
    """Check that function(*args) ends the program with one line that contains `message`."""
    line = one_line(capsys, lambda: function(*args))
    assert message in line, line

def killed(monkeypatch, moment, work, begun=lambda: True):
    """Call work(), as if killed at the change of the file system after `moment` others; return whether it was.

    begun: tells whether a change counts.
    """
    real, calls = {name: getattr(os, name) for name in ('rename', 'replace', 'rmdir', 'makedirs', 'remove')}, []

    def killing(name):
        def call(*args, **kwargs):
            if begun():
                calls.append(name)
            if len(calls) > moment:
                raise KeyboardInterrupt # nothing in common/ catches it: as good as a kill
            return real[name](*args, **kwargs)
        return call

    with monkeypatch.context() as m:
        for name in real:
            m.setattr(os, name, killing(name))
        try:
            work()
        except KeyboardInterrupt:
            return True
    return False

def user(text):
    return {'role': 'user', 'content': text}

def assistant(text):
    return {'role': 'assistant', 'content': text}

@dataclass
class Config(TrainOptions):
    """The options of a script that trains nothing, for tests of the plumbing."""
    out_dir: str = 'out/test'
    init_from: str = ''
    lr: float = 8.0
    lr_schedule: str = 'constant'
    max_steps: int = 12
    warmup_steps: int = 4
    weight_decay: float = 0.0
    beta2: float = 0.99
    grad_clip: float = 1.0
    batch_size: int = 4
    grad_accum: int = 1
    save_every: int = 2
    eval_every: int = 0
    device: str = 'cpu'
    dtype: str = 'float32'

    def __post_init__(self):
        super().__post_init__()
        require(self, lr=(self.lr < 100, 'below 100'))

def checkpoint(folder, seed=0, **more):
    """Save a model of bytes, one layer, 16 wide, that gives the end of text a good chance everywhere."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(dict(block_size=64, vocab_size=TOK.n_vocab, n_layer=1, n_head=2, n_embd=16), **more)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        model.ln_f.bias.copy_(torch.randn(model.config.n_embd))
        model.wte.weight[-1] += 0.25 * model.ln_f.bias
    model.save_pretrained(folder)
    TOK.save(folder)
    return str(folder)

def records(path, rows):
    write_records(path, rows)
    return str(path)

# answers of different lengths, so that micro-batches hold different numbers of tokens
DEMONSTRATIONS = [dict(prompt=p, response=r) for p, r in (
    ('Hi', 'Yo'), ('Who?', 'It is me.'), ('A', 'b'), ('Why', 'Because it is so.'), ('No', 'Yes'), ('Up', 'Down we go'),
    ('1', '2 3 4'), ('x', 'y'))]
RANKINGS = [dict(prompt=p, responses=r, ranks=k) for p, r, k in (
    ('Hi', ['Yo', 'Hello there', 'hm'], [1, 0, 2]), ('Who?', ['me', 'It is me.'], [1, 0]),
    ('A', ['b', 'bb', 'bbbbbb', 'c'], [0, 1, 1, 2]), ('Why', ['Because it is so.', 'so'], [0, 1]),
    ('No', ['Yes', 'no no no'], [0, 1]), ('Up', ['Down we go', 'up', 'Down'], [0, 1, 0]),
    ('1', ['2 3 4', '1'], [0, 1]), ('x', ['y', 'z', 'xyxyxyxy'], [2, 0, 1]))]
COMPARISONS = [dict(prompt=p, chosen=c, rejected=r, margin=m) for p, c, r, m in (
    ('Hi', 'Yo', 'Hello there', 0.5), ('Who?', 'me', 'It is me.', 0.0), ('A', 'bb', 'b', 1.0),
    ('Why', 'so', 'hm', 0.25))]
PROMPTS = [dict(prompt=p) for p in ('Hi', 'Who?', 'A', 'Why', 'No', 'Up', '1', 'x')]

def run(script, **options):
    """Run script.main with its options as a user types them; return the lines of its log."""
    known = {f.name for f in fields(script.Config)}
    options = {k: v for k, v in FAST.items() if k in known} | options
    script.main(parse_config(script.Config, [f"--{k}={v}" for k, v in options.items()]))
    return read_log(os.path.join(options.get('out_dir', ''), 'log.jsonl'))

def flags(command):
    """Return the options in a command's words, {name: its value as typed}."""
    return dict(word[2:].split('=', 1) for word in command if word.startswith('--'))

def stops(capsys, script, code=2, **options):
    """Return the line with which a run stops: for bad input the only one on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(script, **options)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    err = capsys.readouterr().err
    assert stopped.value.code == code, err
    if code == 2:
        assert err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    return next(line for line in err.split('\n') if 'error: ' in line).split('error: ')[1]

def has_checkpoint(folder):
    names = set(os.listdir(folder)) - {'.lock'} if os.path.exists(folder) else []
    return any(name != 'log.jsonl' or os.path.getsize(os.path.join(folder, name)) > 0 for name in names)

def weights(folder):
    with open(os.path.join(folder, 'model.safetensors'), 'rb') as f:
        return f.read()

def losses(lines):
    """Return what a run logged, less the times."""
    return [{k: v for k, v in line.items() if k != 'time'} for line in lines]

def assert_resumes_exactly(tmp_path, script, **options):
    """Check that four steps equal two, a new start and two more: log and weights, bit for bit."""
    whole, halves = str(tmp_path / 'whole'), str(tmp_path / 'halves')
    expected = run(script, out_dir=whole, max_steps=4, save_every=2, **options)
    run(script, out_dir=halves, max_steps=2, **options)
    assert weights(halves) != weights(whole)
    torch.manual_seed(12345) # a new process has another generator
    got = run(script, out_dir=halves, max_steps=4, resume=True, **options)
    assert [line['step'] for line in got] == [1, 2, 3, 4]
    assert losses(got) == losses(expected)
    assert weights(halves) == weights(whole)

def in_processes(n, work, *args, within=120):
    """
    Call work(*args) in n forked processes that find each other as torchrun's do.

    Returns their exit codes, by rank, negative where a signal ended one. A process that is still there after `within`
    seconds fails the test.
    """
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            code = 1
            try: # nothing of pytest must run on in here
                if n > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1',
                                      MASTER_PORT=str(port))
                work(*args)
                code = 0
            except SystemExit as stopped:
                code = stopped.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes, end = {}, time.time() + within
    while len(codes) < n and time.time() < end:
        for rank in set(range(n)) - set(codes):
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    hanging = [rank for rank in range(n) if rank not in codes]
    for rank in hanging:
        os.kill(pids[rank], signal.SIGKILL)
        os.waitpid(pids[rank], 0)
    assert not hanging, f"still there after {within} s: {hanging}"
    return [codes[rank] for rank in range(n)]

def gradients(monkeypatch, script, **options):
    """Return the gradients (lists of tensors) that each optimizer step of a run was given, and the run's log."""
    seen, step_with = [], training.optimizer_step

    def noting(run, cfg, step, model, *args, **more):
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return step_with(run, cfg, step, model, *args, **more)

    with monkeypatch.context() as m:
        for module in (training, script) if hasattr(script, 'optimizer_step') else (training,):
            m.setattr(module, 'optimizer_step', noting) # ppo.py and reinforce.py call it themselves
        lines = run(script, **options)
    return seen, lines

def assert_same_for_micro_batches(monkeypatch, tmp_path, script, keys, **options):
    """Compare gradients, losses and the named metrics of grad_accum 1 and 4."""
    whole, lines = gradients(monkeypatch, script, out_dir=str(tmp_path / '1'), grad_accum=1, **options)
    parts, others = gradients(monkeypatch, script, out_dir=str(tmp_path / '4'), grad_accum=4, **options)
    assert len(whole) == len(parts) > 0
    assert max(g.abs().max().item() for g in whole[0]) > 1e-3 # there is something to compare
    for a, b in zip(whole[0], parts[0], strict=True): # later ones follow from other weights
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for key in keys:
        assert lines[0][key] == pytest.approx(others[0][key], abs=1e-6), key

def interrupt_after(monkeypatch, step, number=signal.SIGINT):
    """Send Ctrl-C, or another signal, while the step of that number is logged."""
    log = training.log

    def logging(run, cfg, done, **metrics):
        log(run, cfg, done, **metrics)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training, 'log', logging)

def launch(monkeypatch, script, **options):
    """Run a script as the shell does; return the exit code."""
    options = {k: v for k, v in FAST.items() if k in {f.name for f in fields(script.Config)}} | options
    monkeypatch.setattr('sys.argv', ['script'] + [f"--{k}={v}" for k, v in options.items()])
    try:
        command_line.launch(script.main, script.Config)
    except SystemExit as stopped:
        return stopped.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0

def assert_ctrl_c_resumes_exactly(tmp_path, monkeypatch, capsys, script, **options):
    """Interrupt the second of three steps: 130, a checkpoint of that step, and the same end."""
    whole, halves = str(tmp_path / 'whole'), str(tmp_path / 'halves')
    expected = run(script, out_dir=whole, max_steps=3, save_every=0, **options)
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        assert launch(m, script, out_dir=halves, max_steps=3, save_every=0, **options) == 130
    assert 'saved' in capsys.readouterr().err
    assert torch.load(os.path.join(halves, 'state.pt'), weights_only=True)['step'] == 2
    torch.manual_seed(12345)
    got = run(script, out_dir=halves, max_steps=3, save_every=0, resume=True, **options)
    assert losses(got) == losses(expected)
    assert weights(halves) == weights(whole)

def assert_nan_stops(tmp_path, capsys, script, option, **options):
    """Check that a loss of NaN ends with 1, the step's name, and no checkpoint or the last one."""
    poisoned = str(tmp_path / 'poisoned')
    model = GPT.from_pretrained(options[option])
    with torch.no_grad():
        model.h[0].ln_1.weight.fill_(1e30) # finite, or it would not load; the scores of attention overflow
    model.save_pretrained(poisoned)
    TOK.save(poisoned)
    out = str(tmp_path / 'never')
    line = stops(capsys, script, code=1, out_dir=out, max_steps=2, **options | {option: poisoned})
    assert 'nan' in line and 'step 1' in line and out in line
    assert not has_checkpoint(out)

    out = str(tmp_path / 'once') # the first step is fine, and throws the weights far away
    line = stops(capsys, script, code=1, out_dir=out, max_steps=3, save_every=1, **options | dict(lr=1e30))
    assert 'step 2' in line
    assert torch.load(os.path.join(out, 'state.pt'), weights_only=True)['step'] == 1
    GPT.from_pretrained(out)

# ---------------------------------------------------------------------------------------------------------------------
# a test bed that can be enumerated: tokens 0 1 2 and the end of text 3, the prompt [0], answers of at most 2 tokens

RUN = Run('cpu', 'float32')
EOS, PROMPT = 3, [0]
BED_TOK = SimpleNamespace(eos=EOS, decode=str)
ANSWERS = [[EOS]] + [[a, b] for a in range(3) for b in range(4)] # all 13 of them
N_TOKENS = 25 # 1 + 12 * 2

def bed(seed, **heads):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=8, **heads))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model

def enumerated(policy, reference=None):
    """Return log pi of all answers (13,); with a reference also KL(policy || reference), a sum over them."""
    r = pack([PROMPT] * 13, ANSWERS, [[0.0] * len(a) for a in ANSWERS], EOS)
    logp = policy.logp(r.idx, r.mask).sum(1) # (13,)
    if reference is None:
        return logp
    return logp, (logp.exp() * (logp - enumerated(reference))).sum()

class LikesOnes(torch.nn.Module):
    """Give a reward of 1 for each 1 in the answer."""

    def rewards(self, idx, lengths, groups=None):
        return torch.tensor([float((row[1:n] == 1).sum()) for row, n in zip(idx, lengths)])

REWARDS = torch.tensor([float(a.count(1)) for a in ANSWERS])

# ---------------------------------------------------------------------------------------------------------------------
# the clipped surrogate of one token at clip 0.2: ratio, advantage, loss, its gradient by log pi

CLIPPED = [
    (1.5, +1.0, -1.2, 0.0), # a good action is 50 % likelier already: clipped, no push
    (0.5, +1.0, -0.5, -0.5), # a good action became rarer: not clipped, d/dlogp = -A ratio
    (1.5, -1.0, +1.5, +1.5), # a bad action became likelier: not clipped
    (0.5, -1.0, +0.8, 0.0), # a bad action has halved already: clipped
    (1.1, +2.0, -2.2, -2.2), # within the clip
]

# ---------------------------------------------------------------------------------------------------------------------
# functions as a user writes them

@pytest.fixture
def rules(tmp_path, monkeypatch):
    """Write functions as a user would, into a module and into a file with a neighbour."""
    text = '''
def score(record, response):
    if record['prompt'] == 'Why?':
        raise ValueError(f'unknown prompt {record["prompt"]!r}')
    return len(response) - len(record['prompt'])

def scaled(record, response, by=1, plus=0):
    return by * len(response) + plus

def exact(record, response):
    return response == record['answer']

def nothing(record, response):
    return None if response else 0

def infinite(record, response):
    return float('inf') if response == 'oo' else 0.5

def one(record):
    return 1

def leaves(record, response):
    raise SystemExit(3)

def bad(record, response):
    raise OverflowError('too large')

def text(record, response):
    return '1.5'

def huge(record, response):
    return 10**400

def odd(record, response):
    return 1e300

def changes(record, response):
    record['prompt'][0]['content'] += '!'
    return 0

LIST = []
'''
    (tmp_path / 'rules_of_mine.py').write_text(text)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'neighbour_of_mine.py').write_text('OFFSET = 10\n')
    (tmp_path / 'mine' / 'file_of_mine.py').write_text(
        'from neighbour_of_mine import OFFSET\n\ndef score(record, response):\n    return OFFSET + len(response)\n')
    (tmp_path / 'mine' / 'broken_of_mine.py').write_text('def score(record, response):\n    return (\n')
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path

def drawn_axes(monkeypatch, module):
    """Return the list that will hold the axes of a picture that a module of lab/ draws."""
    pytest.importorskip('matplotlib')
    seen, panels = [], module.panels

    @contextmanager
    def watched(*args):
        with panels(*args) as axes:
            yield axes
            seen.extend(axes)

    monkeypatch.setattr(module, 'panels', watched)
    return seen
