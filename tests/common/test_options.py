"""common/options.py: options, --help, and how a script ends when something is wrong."""
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from common.checkpoints import log, read_log
from common.options import RunOptions, TrainOptions, launch, parse_config
from common.records import write_atomic
from tiny import ROOT, RUN, Config, one_line

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

@pytest.mark.parametrize('args, key, value', [
    ('--lr 1e-5', 'lr', 1e-5), ('--lr -0.0', 'lr', 0.0), ('--init_from a', 'init_from', 'a'),
    ('--init-from=a', 'init_from', 'a'), ('--batch-size 3', 'batch_size', 3),
    ('--resume', 'resume', True), ('--resume --lr 1', 'resume', True), ('--resume true', 'resume', True),
    ('--resume auto', 'resume', 'auto'), ('--resume=auto', 'resume', 'auto'), ('--compile=true', 'compile', True),
    ('--compile=false', 'compile', False), ('--compile false', 'compile', False)])
def test_what_people_type(args, key, value):
    got = getattr(parse_config(Config, args.split()), key)
    assert got == value and type(got) is type(value)

def test_resume_and_overwrite_do_not_go_together(capsys):
    assert '--overwrite: overwrite must be False with resume' in one_line(
        capsys, lambda: parse_config(Config, ['--overwrite', '--resume=auto'])).replace('=True', '')

def test_a_switch_takes_no_config_file(tmp_path):
    (tmp_path / 'a.py').write_text("seed = 4\n")
    cfg = parse_config(Config, ['--resume', str(tmp_path / 'a.py')])
    assert cfg.resume is True and cfg.seed == 4

@pytest.mark.parametrize('value', ['inf', '-inf', 'nan', '1e400', '-1e400'])
def test_no_option_of_any_script_takes_what_is_not_finite(capsys, tmp_path, value):
    """Config files say them as literals."""
    for name in ('sft', 'reward', 'dpo', 'kto', 'rrhf', 'ppo', 'reinforce', 'collect', 'evaluate', 'sample', 'bench'):
        cls = importlib.import_module(name).Config
        floats = [field.name for field in dataclasses.fields(cls) if field.type is float]
        for key in floats:
            assert f"{key} must be " in one_line(capsys, lambda: parse_config(cls, [f"--{key}={value}"]))
        assert floats or name in ('evaluate', 'bench')

@pytest.mark.parametrize('arg, expected', [
    ('--batchsize=3', '--batchsize=3: unknown option batchsize, did you mean batch_size?'),
    ('--zzz=3', '--zzz=3: unknown option zzz; --help lists the options'),
    ('--seed=1.0', '--seed=1.0: seed must be int, got 1.0'),
    ('--seed=True', '--seed=True: seed must be int, got True'),
    ('--seed=', "--seed=: seed must be int, got ''"),
    ('--resume=1', '--resume=1: resume must be bool or str, got 1'),
    ('--resume=yes', "--resume=yes: resume must be True, False or auto, got 'yes'"),
    ('--compile=1', '--compile=1: compile must be bool, got 1'),
    ('--lr=fast', "--lr=fast: lr must be float, got 'fast'"),
    ('--lr=True', '--lr=True: lr must be float, got True'),
    ('--lr=nan', "--lr=nan: lr must be float, got 'nan'"),
    ('--lr=[1]', '--lr=[1]: lr must be float, got [1]'),
    ('--lr={[]: 1}', '--lr={[]: 1}: lr must be float'), # no literal although it parses
    ('--seed=2*3', "--seed=2*3: seed must be int, got '2*3'"),
    ('--seed=__import__("os").getpid()', 'seed must be int'),
    ('--lr', '--lr: expected --key=value'),
    ('--lr=1e400', '--lr=1e400: lr must be finite, got inf'),
    ('--lr=' + '9' * 400, 'lr must be finite, got inf'),
    ('--seed=' + '9' * 40, 'seed must be below 2^63, got 9'),
    ('--beta2=1.5', '--beta2=1.5: beta2 must be below 1, got 1.5'),
    ('--beta2=-1', '--beta2=-1: beta2 must be at least 0, got -1.0'),
    ('--lr=-1', '--lr=-1: lr must be at least 0, got -1.0'),
    ('--lr=100', '--lr=100: lr must be below 100, got 100.0'),
    ('--batch_size=0', '--batch_size=0: batch_size must be at least 1, got 0'),
    ('--device=gpu', "--device=gpu: device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
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

# ---------------------------------------------------------------------------------------------------------------------
# --help

WHERE = 'out/small'

@dataclass
class Small(TrainOptions):
    lr: float = 0.5 # learning rate: the peak
    out_dir: str = WHERE # the checkpoint
    n_layer: int = 2

@dataclass
class Smaller(RunOptions):
    prompt: str = ''

def help_of(capsys, cls):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        parse_config(cls, ['--seed=3', '--help'])
    assert stopped.value.code == 0
    return capsys.readouterr().out

def test_help_shows_own_options_first_and_then_the_shared_ones(capsys):
    """In groups by who has them: the real default, also where the source names a constant, and the comment."""
    out = help_of(capsys, Small)
    assert out.startswith(__doc__ + '\n\noptions, as --key=value or as lines of a config file:\n\n')
    own, shared, every = re.split('\noptions of all .*:\n\n', out)
    assert '\noptions of all training scripts: how they compute, save and resume:\n\n' in out
    assert own.splitlines()[-3:] == [
        "  --lr=0.5    # learning rate: the peak", "  --out_dir='out/small'    # the checkpoint", "  --n_layer=2"]
    assert shared.splitlines()[0] == "  --compile=False    # torch.compile: meant for long runs"
    assert every.startswith("  --seed=1\n") and "  --device='auto'    # auto, cpu, cuda, cuda:N, mps\n" in every
    for field in dataclasses.fields(Small):
        assert out.count(f"  --{field.name}=") == 1 # told once, be it the script's own or not

def test_help_of_a_script_that_trains_nothing(capsys):
    own, shared = help_of(capsys, Smaller).split('\noptions of all scripts: device, precision and seed:\n\n')
    assert own.endswith("\n  --prompt=''\n")
    assert [line.split('=')[0] for line in shared.splitlines()] == ['  --seed', '  --device', '  --dtype']

def test_help_of_the_demo(capsys):
    """It shares nothing, and its defaults hang on the world."""
    import demo
    out = help_of(capsys, demo.Config)
    assert out.startswith(demo.__doc__.strip()) and "\n  --out_dir=''    # " in out and 'empty = out/toy' in out
    assert 'DEFAULT' not in out.removeprefix(demo.__doc__.strip()) and 'options of all' not in out
    assert all(f"\n  --{field.name}={field.default!r}" in out for field in dataclasses.fields(demo.Config))

# ---------------------------------------------------------------------------------------------------------------------
# how a script ends

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
    """As in `python -m data.peek FILE | head -1`."""
    rows = tmp_path / 'rows.jsonl'
    rows.write_text('{"text": "Hello"}\n' * 5000)
    peek = subprocess.Popen([sys.executable, '-m', 'data.peek', str(rows), '--tokenizer=bytes', '--rows=5000'],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert b'5000 text' in peek.stdout.readline()
    peek.stdout.close()
    assert peek.stderr.read() == b'' and peek.wait(60) == 141

def on_a_gpu(cfg):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 12')

# for a CPU's memory torch has no class of its own
@pytest.mark.parametrize('work', [on_a_gpu, lambda cfg: torch.empty(2 ** 60)], ids=['cuda', 'cpu'])
def test_too_little_memory_is_one_line_that_says_what_to_lower(capsys, monkeypatch, work):
    monkeypatch.setattr('sys.argv', ['script.py'])
    line = one_line(capsys, lambda: launch(work, Config), code=1)
    assert line.startswith('out of memory; ') and '--grad_accum' in line and '--batch_size' in line
    assert '--checkpointing=True' in line and 'what was saved before is intact' in line

def test_a_bugs_traceback_stays(monkeypatch):
    monkeypatch.setattr('sys.argv', ['script.py'])
    with pytest.raises(RuntimeError, match='must match the size'):
        launch(lambda cfg: torch.ones(2) + torch.ones(3), Config)
