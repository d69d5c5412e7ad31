"""common.py: options, learning rate, checkpoints that survive a kill, processes, Ctrl-C."""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from common import (Run, check_common, check_finite, finish_save, launch, load_checkpoint, log, lr_at, make_optimizer,
                    optimizer_step, parse_config, prepare_out_dir, read_log, require, save_checkpoint, save_if_due,
                    split, split_by_tokens, start, stop, write_atomic)
from model import GPT, GPTConfig
from tiny import ROOT, by_hand, in_processes
from tokens import load_tokenizer


@dataclass
class Config:
    out_dir: str = 'out/test'
    init_from: str = ''
    lr: float = 8.0
    lr_schedule: str = 'constant'
    max_steps: int = 12
    warmup_steps: int = 4
    weight_decay: float = 0.0
    batch_size: int = 4
    grad_accum: int = 1
    save_every: int = 2
    seed: int = 1
    device: str = 'cpu'
    dtype: str = 'float32'
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self):
        check_common(self)
        require(self, lr=(self.lr < 100, 'below 100'))


def one_line(capsys, call, code=2):
    """The one line on stderr with which `call` stops the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    err = capsys.readouterr().err
    assert stopped.value.code == code and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err[len('error: '):-1]


# ---------------------------------------------------------------------------------------------------------------------
# options

def test_defaults_files_left_to_right_and_flags(tmp_path):
    a, b = tmp_path / 'a.py', tmp_path / 'b.py'
    a.write_text("'''What this is for.'''\nlr = 1.5 # a comment\nmax_steps = 30\nseed = 3\ninit_from = 'a'\n")
    b.write_text("max_steps = 40\nseed = 4\nresume = True\n")
    cfg = parse_config(Config, [str(a), '--seed=5', str(b), '--seed=6'])
    assert (cfg.lr, cfg.max_steps, cfg.seed, cfg.init_from, cfg.resume) == (1.5, 40, 6, 'a', True)
    assert cfg.batch_size == 4
    assert parse_config(Config, []) == Config()


@pytest.mark.parametrize('files_first', [True, False])
def test_a_flag_wins_wherever_it_stands(tmp_path, files_first):
    (tmp_path / 'a.py').write_text("seed = 4\n")
    argv = [str(tmp_path / 'a.py'), '--seed=6']
    assert parse_config(Config, argv if files_first else argv[::-1]).seed == 6


@pytest.mark.parametrize('flag, key, value', [
    ('--lr=1', 'lr', 1.0), # an integer is a fine float
    ('--lr=1e-3', 'lr', 0.001),
    ('--seed=7', 'seed', 7),
    ('--resume=True', 'resume', True),
    ('--init_from=a=b=c', 'init_from', 'a=b=c'), # split at the first = only
    ('--init_from=', 'init_from', ''),
    ('--init_from=123', 'init_from', '123'), # text needs no quotes
    ('--init_from=__import__("os")', 'init_from', '__import__("os")'), # and is never evaluated
])
def test_flags(flag, key, value):
    got = getattr(parse_config(Config, [flag]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('arg, expected', [
    ('--batchsize=3', '--batchsize=3: unknown option batchsize, did you mean batch_size?'),
    ('--zzz=3', '--zzz=3: unknown option zzz; the options are out_dir, init_from'),
    ('--seed=1.0', '--seed=1.0: seed must be int, got 1.0'),
    ('--seed=True', '--seed=True: seed must be int, got True'),
    ('--seed=', "--seed=: seed must be int, got ''"),
    ('--resume=1', '--resume=1: resume must be bool, got 1'),
    ('--resume=true', "--resume=true: resume must be bool, got 'true'"),
    ('--lr=fast', "--lr=fast: lr must be float, got 'fast'"),
    ('--lr=True', '--lr=True: lr must be float, got True'),
    ('--lr=nan', "--lr=nan: lr must be float, got 'nan'"),
    ('--lr=[1]', '--lr=[1]: lr must be float, got [1]'),
    ('--lr={[]: 1}', '--lr={[]: 1}: lr must be float'), # no literal although it parses
    ('--seed=2*3', "--seed=2*3: seed must be int, got '2*3'"),
    ('--seed=__import__("os").getpid()', 'seed must be int'),
    ('--resume', '--resume: expected --key=value'),
    ('--lr=-1', '--lr=-1: lr must be at least 0, got -1.0'),
    ('--lr=100', '--lr=100: lr must be below 100, got 100.0'),
    ('--batch_size=0', '--batch_size=0: batch_size must be at least 1, got 0'),
    ('--device=gpu', "--device=gpu: device must be one of auto, cpu, cuda, mps, got 'gpu'"),
    ('--lr_schedule=cos', '--lr_schedule=cos: lr_schedule must be one of constant, linear, cosine'),
    ('nowhere.py', 'nowhere.py: no such config file'),
    ('.', '.: no such config file'),
])
def test_a_wrong_option_is_told_in_one_line(capsys, arg, expected):
    assert expected in one_line(capsys, lambda: parse_config(Config, [arg]))


@pytest.mark.parametrize('text, expected', [
    ('seed = 1\nbatchsize = 3\n', ':2: unknown option batchsize, did you mean batch_size?'),
    ('\n\nlr = "fast"\n', ":3: lr must be float, got 'fast'"),
    ('seed = 1\nlr = -1\n', ':2: lr must be at least 0, got -1.0'), # __post_init__ speaks of the line too
    ('seed = 5 * 8\n', ':1: expected `name = literal`'),
    ('seed = {[]: 1}\n', ':1: expected `name = literal`'),
    ('seed: int = 5\n', ':1: expected `name = literal`'),
    ('a = seed = 5\n', ':1: expected `name = literal`'),
    ('a, seed = 4, 5\n', ':1: expected `name = literal`'),
    ('seed += 1\n', ':1: expected `name = literal`'),
    ('if True:\n    seed = 1\n', ':1: expected `name = literal`'),
    ('seed = = 1\n', ':1: expected a file of `name = literal` lines'),
    ('{"seed": 1', 'expected a file of `name = literal` lines'),
    ('seed = 1\0\n', 'a.py'),
])
def test_a_wrong_config_file_is_told_in_one_line(tmp_path, capsys, text, expected):
    path = tmp_path / 'a.py'
    path.write_text(text)
    line = one_line(capsys, lambda: parse_config(Config, [str(path)]))
    assert line.startswith(str(path)) and expected in line


def test_a_config_file_is_never_executed(tmp_path, capsys):
    for code in ('__import__("os").mkdir("{}")', 'import os; os.mkdir("{}")',
                 'init_from = [__import__("os").mkdir("{}")]'):
        (tmp_path / 'a.py').write_text(code.format(tmp_path / 'executed') + '\n')
        assert 'expected `name = literal`' in one_line(capsys, lambda: parse_config(Config, [str(tmp_path / 'a.py')]))
    (tmp_path / 'a.py').write_bytes(b'init_from = "\xff"\n')
    assert 'a.py' in one_line(capsys, lambda: parse_config(Config, [str(tmp_path / 'a.py')]))
    assert os.listdir(tmp_path) == ['a.py']


def test_help_shows_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Config, ['--help'])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and 'lr: float = 8.0' in out and 'check_common' not in out


# ---------------------------------------------------------------------------------------------------------------------
# optimisation

# warmup: 8 * 1/4 ... 8 * 4/4; then 8 steps from 8 down. Step 11 has 1/8 of the way left: linear 8/8 = 1, cosine
# 8 * (.1 + .45 * (1 + cos(7/8 pi))) = 8 * (.1 + .45 * .0761205) = 1.074034
@pytest.mark.parametrize('schedule, expected', [
    ('constant', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 8.0, 11: 8.0}),
    ('linear', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 4.0, 11: 1.0, 12: 0.0}),
    ('cosine', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 4.4, 11: 1.074034, 12: 0.8}),
])
def test_lr_by_hand(schedule, expected):
    cfg = Config(lr_schedule=schedule)
    assert {step: lr_at(step, cfg) for step in expected} == pytest.approx(expected, abs=1e-6)


def test_lr_without_warmup_or_with_nothing_but_warmup():
    assert lr_at(0, Config(warmup_steps=0, lr_schedule='linear')) == 8.0
    assert lr_at(0, Config(warmup_steps=1, max_steps=1, lr_schedule='cosine')) == 8.0
    assert lr_at(5, Config(warmup_steps=10, max_steps=6)) == pytest.approx(4.8)


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))


# the gradient (3, 4) has norm 5; clipped to 1 it is (.6, .8)
@pytest.mark.parametrize('clip, expected', [(1.0, [-0.3, -0.4]), (10.0, [-1.5, -2.0]), (0.0, [-1.5, -2.0])])
def test_optimizer_step_by_hand(clip, expected):
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    (model.w * torch.tensor([3., 4.])).sum().backward()
    assert optimizer_step(optimizer, model, 0.5, clip) == pytest.approx(5.0, abs=1e-6)
    assert model.w.tolist() == pytest.approx(expected, abs=1e-6)
    assert model.w.grad is None


def test_weight_decay_is_for_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(model, Config(weight_decay=0.5, lr=0.1))
    optimizer_step(optimizer, model, 0.1, 1.0)
    # AdamW: w - lr * decay * w = 1 - .05
    assert [p.flatten()[0].item() for p in model.parameters()] == pytest.approx([0.95, 1.0, 1.0, 1.0], abs=1e-6)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops(capsys, value):
    check_finite('loss', 1.0, 3, 'out/x')
    line = one_line(capsys, lambda: check_finite('policy loss', value, 17, 'out/x'), code=1)
    assert 'policy loss' in line and 'step 17' in line and 'out/x' in line


# The gradient (3, 4) comes scaled by 2^16 and is unscaled before it is clipped. An infinite one is left out, and halves
# the scale; where another optimizer steps after the same pass the scale has to wait.
def test_float16_steps_by_hand():
    model, run = Line(), Run('cpu', 'float16')
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    run.backward((model.w * torch.tensor([3., 4.])).sum())
    assert model.w.grad.tolist() == [3 * 65536.0, 4 * 65536.0]
    assert optimizer_step(optimizer, model, 0.5, 1.0, run.scaler) == by_hand(5.0)
    assert model.w.tolist() == by_hand([-0.3, -0.4]) and run.scaler.get_scale() == 65536.0
    for last, scale in ((False, 65536.0), (True, 32768.0)):
        run.backward((model.w * torch.tensor([3., math.inf])).sum())
        assert optimizer_step(optimizer, model, 0.5, 1.0, run.scaler, last) == 0.0
        assert model.w.tolist() == by_hand([-0.3, -0.4]) and model.w.grad is None
        assert run.scaler.get_scale() == scale
        if not last: # the other optimizer's turn
            run.scaler.update(65536.0)
    run.scaler.update(0.5) # nothing is scaled up any more, and still it is infinite
    run.backward((model.w * torch.tensor([3., math.inf])).sum())
    assert not math.isfinite(optimizer_step(optimizer, model, 0.5, 1.0, run.scaler))


def test_other_dtypes_are_not_scaled():
    model = Line()
    for dtype in ('float32', 'bfloat16'):
        Run('cpu', dtype, world_size=2).backward((model.w * torch.tensor([3., 4.])).sum())
        assert model.w.grad.tolist() == [6.0, 8.0] # times two: the processes' gradients are averaged
        model.w.grad = None


def test_parts():
    assert split([1, 2, 3, 4, 5, 6], 3) == [[1, 2], [3, 4], [5, 6]]
    assert split([1, 2, 3], 1) == [[1, 2, 3]]


@pytest.mark.parametrize('parts, least, expected', [
    (1, 1, ['bcdefa']), # 18 tokens, short rows first
    (2, 1, ['bcdef', 'a']), # 9 and 9
    (2, 2, ['bcde', 'fa']), # two processes: two rows each
    (3, 1, ['bcde', 'f', 'a']), # 4, 5 and 9: from 6 on, and from 12 on
    (6, 1, ['b', 'c', 'd', 'e', 'f', 'a']),
    (3, 2, ['bc', 'de', 'fa'])])
def test_micro_batches_hold_like_numbers_of_tokens(parts, least, expected):
    found = split_by_tokens(list('abcdef'), [9, 1, 1, 1, 1, 5], parts, least)
    assert [''.join(part) for part in found] == expected


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

RUN = Run('cpu', 'float32')
BYTES = load_tokenizer('bytes')


def tiny(seed=0, n_embd=8):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=n_embd, dropout=0.2))


def config(folder, **more):
    return Config(out_dir=str(folder), **more)


def train(cfg, first, last):
    """Steps first + 1 ... last of a toy run with dropout and random data, saved at the end as a script would do it."""
    run = start(cfg)
    prepare_out_dir(run, cfg)
    model = tiny(seed=5 + cfg.resume)
    optimizer = make_optimizer(model, cfg)
    state = load_checkpoint(run, cfg, model, {'adam': optimizer})
    assert (state['step'] if state else 0) == first
    model.train()
    for step in range(first, last):
        idx = torch.randint(257, (2, 8))
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer_step(optimizer, model, 0.01, 1.0)
        log(run, cfg, step + 1, loss=loss.item())
    save_checkpoint(run, cfg, model, BYTES, last, {'adam': optimizer}, kept=torch.tensor([1.5]), cursor=7)
    stop(run)
    return model, optimizer, state


def test_four_steps_equal_two_and_two_more_bitwise(tmp_path):
    model, optimizer, _ = train(config(tmp_path / 'a'), 0, 4)
    after = torch.rand(3)
    train(config(tmp_path / 'b'), 0, 2)
    resumed, resumed_optimizer, state = train(config(tmp_path / 'b', resume=True), 2, 4)
    assert torch.equal(torch.rand(3), after)
    assert state['kept'].tolist() == [1.5] and state['cursor'] == 7 # what the script had put beside it
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    for p, q in zip(optimizer.state.values(), resumed_optimizer.state.values()):
        assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
    losses = [[line['loss'] for line in read_log(str(tmp_path / d / 'log.jsonl'))] for d in 'ab']
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_scale_of_float16_is_resumed(tmp_path):
    run, model = Run('cpu', 'float16'), tiny()
    run.backward(model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1])
    run.scaler.update(1024.0)
    save_checkpoint(run, config(tmp_path), model, BYTES, 1, {})
    for dtype, scale in (('float16', 1024.0), ('float32', 1.0)): # 1: not scaled
        other = Run('cpu', dtype)
        load_checkpoint(other, config(tmp_path, resume=True), tiny(), {})
        assert other.scaler.get_scale() == scale
    save_checkpoint(other, config(tmp_path), model, BYTES, 1, {})
    load_checkpoint(run, config(tmp_path, resume=True), tiny(), {}) # another dtype's checkpoint has no scale
    assert run.scaler.get_scale() == 1024.0


def test_the_files_of_a_checkpoint(tmp_path):
    train(config(tmp_path), 0, 1)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'log.jsonl', 'model.safetensors', 'state.pt',
                                            'tokenizer_name']
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert state['options']['lr'] == 8.0 and state['step'] == 1
    assert load_tokenizer(str(tmp_path)).name == 'bytes'


def save_step(folder, step):
    """A checkpoint whose weights, state and log all say `step`."""
    model = tiny()
    with torch.no_grad():
        model.wte.weight.fill_(step)
    save_checkpoint(RUN, config(folder), model, BYTES, step, {'adam': make_optimizer(model, Config())})


def loaded_step(folder):
    """What a resumed run finds: the step of the state, and the one of the weights."""
    cfg, model = config(folder, resume=True), tiny()
    prepare_out_dir(RUN, cfg)
    state = load_checkpoint(RUN, cfg, model, {'adam': make_optimizer(model, cfg)})
    return state['step'], model.wte.weight[0, 0].item()


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every change of the file system during a save is once the last that happens."""
    real, outcomes = {name: getattr(os, name) for name in ('rename', 'replace', 'rmdir', 'makedirs')}, []
    for moment in range(100):
        folder = tmp_path / str(moment)
        os.makedirs(folder)
        save_step(folder, 1)
        calls = []

        def killing(name):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) > moment:
                    raise KeyboardInterrupt # nothing in common.py catches it: as good as a kill
                return real[name](*args, **kwargs)
            return call

        with monkeypatch.context() as m:
            for name in real:
                m.setattr(os, name, killing(name))
            try:
                save_step(folder, 2)
                done = True
            except KeyboardInterrupt:
                done = False
        step, weights = loaded_step(folder)
        assert step == weights
        outcomes.append(step)
        assert sorted(set(os.listdir(folder)) - {'.saving', 'log.jsonl'}) == [
            'config.json', 'model.safetensors', 'state.pt', 'tokenizer_name']
        save_step(folder, 3) # what the kill left behind is in nobody's way
        assert loaded_step(folder) == (3, 3.0) and not os.path.exists(folder / '.saving')
        if done:
            break
    # makedirs twice, tokenizer_name, rename; from the rename on the new one counts: four files to move, one rmdir
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes) and outcomes.count(2) >= 6


def test_a_save_cut_short_is_ignored_and_a_finished_one_moved_into_place(tmp_path):
    save_step(tmp_path, 1)
    os.makedirs(tmp_path / '.saving')
    (tmp_path / '.saving/state.pt').write_bytes(b'half of')
    finish_save(str(tmp_path))
    assert loaded_step(tmp_path) == (1, 1.0)
    save_step(tmp_path / 'other', 2)
    os.rename(tmp_path / 'other', tmp_path / '.saved')
    assert loaded_step(tmp_path) == (2, 2.0) and not os.path.exists(tmp_path / '.saved')


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch, error):
    save_step(tmp_path, 1)
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(error))
        line = one_line(capsys, lambda: save_step(tmp_path, 2), code=1)
    assert str(tmp_path) in line and 'step 2' in line
    assert loaded_step(tmp_path) == (1, 1.0)


def test_weights_that_cannot_be_written_leave_the_last_checkpoint(tmp_path, capsys):
    """The system lets no file grow above 8 kB: the weights, 257 times 8 numbers and more, do not fit."""
    resource = pytest.importorskip('resource', reason="limits of a process are a thing of POSIX")
    save_step(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    try:
        line = one_line(capsys, lambda: save_step(tmp_path, 2), code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert 'File too large' in line and str(tmp_path) in line and 'the last one is intact' in line
    assert loaded_step(tmp_path) == (1, 1.0) and not os.path.exists(tmp_path / '.saving')


def test_a_checkpoint_is_only_replaced_when_told_so(tmp_path, capsys):
    log(RUN, config(tmp_path), 1, loss=2.0)
    save_step(tmp_path, 1)
    line = one_line(capsys, lambda: prepare_out_dir(RUN, config(tmp_path)))
    assert f"--out_dir={tmp_path}: holds a checkpoint" in line
    assert '--resume=True' in line and '--overwrite=True' in line
    assert loaded_step(tmp_path) == (1, 1.0) and len(read_log(str(tmp_path / 'log.jsonl'))) == 1
    prepare_out_dir(RUN, config(tmp_path, overwrite=True))
    assert os.listdir(tmp_path) == ['log.jsonl'] and read_log(str(tmp_path / 'log.jsonl')) == []


def test_an_overwritten_checkpoints_tokenizer_goes_too(tmp_path):
    save_step(tmp_path, 1)
    os.remove(tmp_path / 'tokenizer_name')
    (tmp_path / 'tokenizer.tiktoken').write_text('of the old run')
    prepare_out_dir(RUN, config(tmp_path, overwrite=True))
    save_step(tmp_path, 1)
    assert load_tokenizer(str(tmp_path)).name == 'bytes'


def test_a_new_folder_is_made_and_one_that_cannot_be_is_told(tmp_path, capsys):
    prepare_out_dir(RUN, config(tmp_path / 'a/b'))
    assert os.listdir(tmp_path / 'a/b') == ['log.jsonl']
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file/below', '/proc/nowhere'):
        assert f"--out_dir={folder}: " in one_line(capsys, lambda: prepare_out_dir(RUN, config(folder)))


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize('resume', [False, True])
def test_a_folder_without_permission_is_told(tmp_path, capsys, resume):
    save_step(tmp_path, 1)
    os.chmod(tmp_path, 0o500)
    try:
        cfg = config(tmp_path, resume=resume, overwrite=not resume)
        assert f"--out_dir={tmp_path}: " in one_line(capsys, lambda: prepare_out_dir(RUN, cfg))
    finally:
        os.chmod(tmp_path, 0o700)


def test_resume_without_a_checkpoint_is_told(tmp_path, capsys):
    cfg, model = config(tmp_path, resume=True), tiny()
    assert 'state.pt is missing' in one_line(capsys, lambda: load_checkpoint(RUN, cfg, model, {}))
    assert load_checkpoint(RUN, config(tmp_path), model, {}) is None


def test_the_end_of_text_is_the_tokenizers_where_the_model_has_more_words(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8))
    save_checkpoint(RUN, config(tmp_path), model, BYTES, 1, {})
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert (saved['vocab_size'], saved['eos_token_id'], saved['bos_token_id']) == (300, 256, 256)


def test_resume_with_another_shape_is_told(tmp_path, capsys):
    save_step(tmp_path, 1)
    line = one_line(capsys, lambda: load_checkpoint(RUN, config(tmp_path, resume=True), tiny(n_embd=16), {}))
    assert f"n_embd is 8 in {tmp_path} and 16 in this run" in line


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('damage', ['text', 'empty', 'half', 'not a zip', 'pickle', 'no optimizer', 'no rng', 'a list',
                                    'another optimizer', 'code', 'wrong rng'])
def test_a_damaged_state_is_told_in_one_line(tmp_path, capsys, damage):
    save_step(tmp_path, 1)
    path = tmp_path / 'state.pt'
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage == 'no optimizer':
        torch.save({k: v for k, v in state.items() if k != 'optimizers'}, path)
    elif damage == 'no rng':
        torch.save({k: v for k, v in state.items() if k != 'rng'}, path)
    elif damage == 'wrong rng':
        torch.save({**state, 'rng': {'cpu': torch.zeros(3)}}, path)
    elif damage == 'a list':
        torch.save([1, 2], path)
    elif damage == 'another optimizer':
        other = torch.optim.AdamW(Line().parameters())
        torch.save({**state, 'optimizers': {'adam': other.state_dict()}}, path)
    elif damage == 'code':
        torch.save(Malicious(str(tmp_path / 'executed')), path)
    else:
        path.write_bytes({'text': b'hello world', 'empty': b'', 'half': whole[:len(whole) // 2], 'pickle': b'\x80\x02.',
                          'not a zip': b'PK\x03\x04 and so on'}[damage])
    model, cfg = tiny(), config(tmp_path, resume=True)
    optimizers = {'adam': make_optimizer(model, cfg)}
    line = one_line(capsys, lambda: load_checkpoint(RUN, cfg, model, optimizers))
    assert f"{path}: not a state to go on from" in line
    assert not os.path.exists(tmp_path / 'executed')


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    cfg = config(tmp_path)
    for step in (1, 2, 2, 3, 4): # of the second step a second line, that of a measurement made after the checkpoint
        log(RUN, cfg, step, loss=step / 2, lr=1e-5)
        if step == 2 and not os.path.exists(tmp_path / 'state.pt'):
            save_step(tmp_path, 2)
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": 5, "lo') # cut short by a kill
    assert loaded_step(tmp_path) == (2, 2.0)
    lines = read_log(str(tmp_path / 'log.jsonl'))
    assert [(line['step'], line['loss'], line['lr']) for line in lines] == [(1, 0.5, 1e-5), (2, 1.0, 1e-5)]
    log(RUN, cfg, 3, loss=9.0)
    assert json.loads(open(tmp_path / 'log.jsonl').read().splitlines()[2])['loss'] == 9.0


def test_resuming_with_other_options(tmp_path):
    """What the optimizer is told is what this run's options say; what it has learnt stays."""
    model = tiny()
    adam = make_optimizer(model, Config(weight_decay=0.1), betas=(0.9, 0.95))
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    adam.step()
    save_checkpoint(RUN, config(tmp_path), model, BYTES, 1, {'adam': adam})
    again = make_optimizer(model, Config(weight_decay=0.3), betas=(0.9, 0.99))
    load_checkpoint(RUN, config(tmp_path, resume=True), model, {'adam': again})
    assert [g['weight_decay'] for g in again.param_groups] == [0.3, 0.0]
    assert again.param_groups[0]['betas'] == (0.9, 0.99)
    first = lambda optimizer: optimizer.state[model.wte.weight]['exp_avg']
    assert torch.equal(first(again), first(adam)) and first(adam).abs().min() > 0


def test_another_script_cannot_go_on(tmp_path, capsys):
    save_step(tmp_path, 1)
    path = str(tmp_path / 'state.pt')
    state = torch.load(path, weights_only=True)
    del state['script']
    for more, name in ((dict(script='dpo.py'), 'dpo.py'), ({}, 'an older version')):
        torch.save(state | more, path)
        assert one_line(capsys, lambda: loaded_step(tmp_path)) == (
            f"--resume=True: the checkpoint in {tmp_path} is one of {name}; wanted one of test_common.py")


def test_a_folder_that_is_not_where_it_began(tmp_path, monkeypatch):
    """No model to begin from, or the word scratch: no folder can be meant."""
    monkeypatch.chdir(tmp_path)
    prepare_out_dir(RUN, Config(out_dir='.', init_from=''))
    prepare_out_dir(RUN, Config(out_dir='scratch', init_from='scratch'))
    assert os.path.exists('log.jsonl') and os.path.exists('scratch/log.jsonl')


def test_small_numbers_survive_the_log(tmp_path):
    log(RUN, config(tmp_path), 1, lr=1.234e-7, tokens=12345678)
    line = read_log(str(tmp_path / 'log.jsonl'))[0]
    assert line['lr'] == pytest.approx(1.234e-7, rel=1e-3) and line['tokens'] == pytest.approx(12345678, rel=1e-5)


def test_only_the_first_process_writes(tmp_path):
    second = Run('cpu', 'float32', rank=1)
    save_checkpoint(second, config(tmp_path), tiny(), BYTES, 1, {})
    log(second, config(tmp_path), 1, loss=1.0)
    assert os.listdir(tmp_path) == []


def test_write_atomic(tmp_path):
    path = str(tmp_path / 'a')
    for text in ('old', 'new é'):
        write_atomic(path, text)
        assert open(path, encoding='utf-8').read() == text
    assert os.listdir(tmp_path) == ['a']


# ---------------------------------------------------------------------------------------------------------------------
# processes, Ctrl-C

def test_a_run_of_one_process():
    assert RUN.is_master and RUN.rows([1, 2, 3]) == [1, 2, 3]
    assert RUN.sum(2.5).item() == 2.5 and RUN.sum(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert not Run('cpu', 'float32', rank=1).is_master
    assert [Run('cpu', 'float32', r, 3).rows([0, 1, 2, 3, 4, 5, 6]) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_parallel_calls_the_methods_of_the_model():
    model, idx, mask = tiny().eval(), torch.tensor([[1, 2, 3]]), torch.tensor([[0., 1.]])
    net = RUN.parallel(model)
    assert torch.equal(net('logp', idx, mask), model.logp(idx, mask))
    assert torch.equal(net('forward', idx)[0], model(idx)[0])


def test_autocast_is_for_products_alone():
    a = torch.eye(2)
    with Run('cpu', 'float32').autocast():
        assert (a @ a).dtype == torch.float32
    for dtype in ('bfloat16', 'float16'):
        with Run('cpu', dtype).autocast():
            assert (a @ a).dtype == getattr(torch, dtype) and a.log_softmax(-1).dtype == torch.float32
            logp, entropy = tiny().logp_and_entropy(torch.tensor([[1, 2, 3]]), torch.ones(1, 2), True)
            assert logp.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_frozen_model_takes_less_and_answers_the_same(dtype):
    run, model, idx, mask = Run('cpu', dtype), tiny().eval(), torch.tensor([[1, 2, 3]]), torch.ones(1, 2)
    with run.autocast():
        expected = model.logp(idx, mask)
    run.freeze(model)
    assert model.h[0].mlp.c_fc.weight.dtype == getattr(torch, dtype) and model.wte.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    with run.autocast():
        assert torch.equal(model.logp(idx, mask), expected)


# a GPU of its own kind: with bfloat16 units, with none, and none asked for
@pytest.mark.parametrize('units, dtype, expected', [
    (True, 'auto', 'bfloat16'), (False, 'auto', 'float16'), (True, 'float32', 'float32')])
def test_the_dtype_of_a_gpu(monkeypatch, units, dtype, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: units or including_emulation)
    precision = []
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', precision.append)
    run = start(Config(device='cuda', dtype=dtype))
    stop(run)
    assert run.dtype == expected and run.scaler.is_enabled() == (expected == 'float16')
    assert precision == ['high'] # TF32


def test_start_seeds_and_refuses_what_is_not_there(capsys):
    for _ in range(2):
        run = start(Config(seed=11))
        drawn = torch.rand(2)
        torch.manual_seed(11)
        assert torch.equal(torch.rand(2), drawn)
        stop(run)
    line = one_line(capsys, lambda: start(Config(batch_size=6, grad_accum=4)))
    assert '--batch_size=6' in line and 'multiple of 4' in line
    if not torch.cuda.is_available():
        assert '--device=cuda: torch sees no CUDA device' in one_line(capsys, lambda: start(Config(device='cuda')))


def test_the_first_ctrl_c_waits_for_the_step_and_the_second_does_not(capsys):
    run = start(Config())
    try:
        assert not run.stop_requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert run.interrupted and run.stop_requested()
        assert 'stopping after this step' in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop(run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_with_130(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['script.py', '--seed=3'])

    def main(cfg):
        assert cfg.seed == 3
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        launch(main, Config)
    assert stopped.value.code == 130 and capsys.readouterr().err.count('\n') == 1


def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    """The system lets no file grow above 4 kB: the log does, and so does a file that is written as a whole."""
    resource = pytest.importorskip('resource', reason="limits of a process are a thing of POSIX")
    monkeypatch.setattr('sys.argv', ['script.py', f'--out_dir={tmp_path}'])
    old, path = resource.getrlimit(resource.RLIMIT_FSIZE), str(tmp_path / 'records.jsonl')
    write_atomic(path, 'as it was')
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        for work in (lambda cfg: [log(RUN, cfg, step, loss=1.0) for step in range(200)],
                     lambda cfg: write_atomic(path, 'x' * 5000)):
            assert 'File too large' in one_line(capsys, lambda: launch(work, Config), code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with open(path) as f:
        assert f.read() == 'as it was'
    assert not os.path.exists(path + '.tmp')
    assert read_log(str(tmp_path / 'log.jsonl'))[0]['step'] == 0 # what could be written is there


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['script.py'])
    (tmp_path / 'file').write_text('')
    line = one_line(capsys, lambda: launch(lambda cfg: os.makedirs(tmp_path / 'file' / 'out'), Config))
    assert line == f"{tmp_path}/file/out: Not a directory"
    with pytest.raises(ConnectionResetError): # no file's fault: a bug's traceback stays
        launch(lambda cfg: (_ for _ in ()).throw(ConnectionResetError(104, 'reset')), Config)


def test_nobody_reads_on(tmp_path):
    """As in `tokens.py --peek FILE | head -1`."""
    rows = tmp_path / 'rows.jsonl'
    rows.write_text('{"text": "Hello"}\n' * 5000)
    script = os.path.join(ROOT, 'tokens.py')
    peek = subprocess.Popen([sys.executable, script, '--peek', str(rows), '--tokenizer=bytes', '--rows=5000'],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b'5000 text' in peek.stdout.readline()
    peek.stdout.close()
    assert peek.stderr.read() == b'' and peek.wait(60) == 141


def test_save_if_due(capsys):
    run, saved = Run('cpu', 'float32'), []
    cfg = Config(max_steps=5, save_every=2)
    for step in range(1, 6):
        save_if_due(run, cfg, step, saved.append)
    assert saved == [2, 4, 5]
    for step in range(1, 6):
        save_if_due(run, Config(max_steps=5, save_every=0), step, saved.append)
    assert saved == [2, 4, 5, 5]
    run.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        save_if_due(run, cfg, 3, saved.append)
    assert saved[-1] == 3 and 'step 3' in capsys.readouterr().err


IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
MASK = torch.tensor([[1., 1., 1.], [0., 0., 1.], [0., 1., 1.], [1., 0., 0.]]) # 4 rows share 7 tokens unevenly


def gradient(run):
    """The gradient of the mean loss over all 7 tokens, this process seeing its own rows alone."""
    model = tiny(seed=run.rank).eval() # DDP gives every process the first one's weights
    net = run.parallel(model)
    n_tokens = run.sum(run.rows(MASK).sum())
    logp = net('logp', run.rows(IDX), run.rows(MASK))
    (-logp.sum() * run.world_size / n_tokens).backward() # DDP averages over the processes: undo that
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_of_two(folder):
    cfg = config(os.path.join(folder, 'out'))
    run = start(cfg)
    rank = run.rank
    prepare_out_dir(run, cfg)
    run.interrupted = rank == 1 # one process was sent Ctrl-C
    mean = run.mean(dict(a=6.0), 4) if rank == 0 else run.mean({}, 0) # the second one had no rows
    torch.save(dict(grads=gradient(run), sum=run.sum(rank + 1.0).item(), stop=run.stop_requested(), mean=mean,
                    drawn=torch.rand(2)), os.path.join(folder, f"{rank}.pt"))
    stop(run)


def test_two_processes_equal_one(tmp_path):
    assert in_processes(2, one_of_two, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = gradient(RUN)
    assert first['grads'].keys() == second['grads'].keys() == expected.keys()
    for name in expected:
        assert torch.equal(first['grads'][name], second['grads'][name])
        torch.testing.assert_close(first['grads'][name], expected[name], rtol=0, atol=1e-6)
    assert first['sum'] == second['sum'] == 3.0 # 1 + 2
    assert first['mean'] == second['mean'] == dict(a=1.5)
    assert first['stop'] and second['stop'] # both stop after one was asked to
    assert not torch.equal(first['drawn'], second['drawn']) # each process samples its own answers
