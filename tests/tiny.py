"""Tiny checkpoints, records and runs that several test files share."""
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import common
from model import GPT, GPTConfig
from rollout import pack
from tokens import load_tokenizer, write_records

torch.set_num_threads(1)
TOK = load_tokenizer('bytes')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# constant: a run of two steps has the learning rates of the first half of a run of four
FAST = dict(device='cpu', dtype='float32', lr_schedule='constant', lr=1e-3, warmup_steps=0, log_every=1)


def by_hand(values):
    return pytest.approx(values, abs=1e-6)


def checkpoint(folder, seed=0, **more):
    """A model of bytes, one layer, 16 wide, that gives the end of text a good chance everywhere."""
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
    """script.main with its options as a user types them; returns the lines of its log."""
    known = {f.name for f in fields(script.Config)}
    options = {k: v for k, v in FAST.items() if k in known} | options
    script.main(common.parse_config(script.Config, [f"--{k}={v}" for k, v in options.items()]))
    return common.read_log(os.path.join(options.get('out_dir', ''), 'log.jsonl'))


def stops(capsys, script, code=2, **options):
    """The line with which a run stops: for bad input the only one on stderr."""
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
    names = os.listdir(folder) if os.path.exists(folder) else []
    return any(name != 'log.jsonl' or os.path.getsize(os.path.join(folder, name)) > 0 for name in names)


def weights(folder):
    with open(os.path.join(folder, 'model.safetensors'), 'rb') as f:
        return f.read()


def losses(lines):
    """What a run logged, less the times."""
    return [{k: v for k, v in line.items() if k != 'time'} for line in lines]


def assert_resumes_exactly(tmp_path, script, **options):
    """Four steps equal two steps, a new start and two more: the log and the weights, bit for bit."""
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
    work(*args) in n forked processes that find each other as torchrun's do. Returns their exit codes, by rank, negative
    where a signal ended one; a process that is still there after so many seconds fails the test.
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
    """The gradients (lists of tensors) that each optimizer step of a run was given, and the run's log."""
    seen, step = [], common.optimizer_step

    def noting(optimizer, model, *args):
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return step(optimizer, model, *args)

    with monkeypatch.context() as m:
        m.setattr(common, 'optimizer_step', noting)
        lines = run(script, **options)
    return seen, lines


def assert_same_for_micro_batches(monkeypatch, tmp_path, script, keys, **options):
    """Gradients, losses and the named metrics with grad_accum 1 and 4."""
    whole, lines = gradients(monkeypatch, script, out_dir=str(tmp_path / '1'), grad_accum=1, **options)
    parts, others = gradients(monkeypatch, script, out_dir=str(tmp_path / '4'), grad_accum=4, **options)
    assert len(whole) == len(parts) > 0
    assert max(g.abs().max().item() for g in whole[0]) > 1e-3 # there is something to compare
    for a, b in zip(whole[0], parts[0], strict=True): # later ones follow from other weights
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for key in keys:
        assert lines[0][key] == pytest.approx(others[0][key], abs=1e-6), key


def interrupt_after(monkeypatch, step):
    """Ctrl-C while the step of that number is logged."""
    log = common.log

    def logging(run, cfg, done, **metrics):
        log(run, cfg, done, **metrics)
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(common, 'log', logging)


def launch(monkeypatch, script, **options):
    """As from the shell; returns the exit code."""
    options = {k: v for k, v in FAST.items() if k in {f.name for f in fields(script.Config)}} | options
    monkeypatch.setattr('sys.argv', ['script'] + [f"--{k}={v}" for k, v in options.items()])
    try:
        common.launch(script.main, script.Config)
    except SystemExit as stopped:
        return stopped.code
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def assert_ctrl_c_resumes_exactly(tmp_path, monkeypatch, capsys, script, **options):
    """Ctrl-C during the second of three steps: 130, a checkpoint of that step, and the same end."""
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
    """A loss that is no number: exit 1, the step's name, no checkpoint or the last one."""
    poisoned = str(tmp_path / 'poisoned')
    model = GPT.from_pretrained(options[option])
    with torch.no_grad():
        model.h[0].ln_1.weight.fill_(float('nan'))
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
# a test bed that can be enumerated: words 0 1 2 and the end of text 3, the prompt [0], answers of at most 2 tokens

RUN = common.Run('cpu', 'float32')
EOS, PROMPT = 3, [0]
BED_TOK = SimpleNamespace(eos=EOS)
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
    """log pi of all answers (13,), and, with a reference, KL(policy || reference), a sum over them."""
    r = pack([PROMPT] * 13, ANSWERS, [[0.0] * len(a) for a in ANSWERS], EOS)
    logp = policy.logp(r.idx, r.mask).sum(1) # (13,)
    if reference is None:
        return logp
    return logp, (logp.exp() * (logp - enumerated(reference))).sum()


class LikesOnes(torch.nn.Module):
    """A reward of 1 for each 1 in the answer."""

    def rewards(self, idx, lengths):
        return torch.tensor([float((row[1:n] == 1).sum()) for row, n in zip(idx, lengths)])


REWARDS = torch.tensor([float(a.count(1)) for a in ANSWERS])
