"""common/run.py: device, precision, Ctrl-C, and several processes that train as one."""
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoints import prepare_out_dir
from common.options import fail, launch
from common.run import Run, default_signals, progress, start, stop
from common.training import Means, optimizer_step
from model import GPT, GPTConfig
from tiny import ROOT, RUN, Config, by_hand, in_processes, one_line

def small(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=8, dropout=0.2))

def test_a_run_of_one_process():
    assert RUN.is_master and RUN.rows([1, 2, 3]) == [1, 2, 3]
    assert RUN.sum(2.5).item() == 2.5 and RUN.sum(torch.tensor([1, 2])).tolist() == [1.0, 2.0]
    assert not Run('cpu', 'float32', rank=1).is_master
    assert [Run('cpu', 'float32', r, 3).rows([0, 1, 2, 3, 4, 5, 6]) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]

def test_prepare_sets_the_model_up_as_it_is_told(monkeypatch):
    """One process: the model stays itself, and its passes are compiled where that is asked for."""
    model, idx, mask, compiled = small(), torch.tensor([[1, 2, 3]]), torch.tensor([[0., 1.]]), []
    expected = model.eval().logp(idx, mask)
    RUN.prepare(model, Config(checkpointing=True))
    assert model.checkpointing and model.compiled is None and torch.equal(model.logp(idx, mask), expected)
    monkeypatch.setattr(torch, 'compile', lambda fn, **options: compiled.append(fn.__name__) or fn)
    RUN.prepare(model, Config(compile=True))
    assert compiled == ['logits_at', 'logp', 'values', 'logp_entropy_values', 'rewards', 'logp_rewards',
                        'decode']
    assert not model.checkpointing and model.compiled and torch.equal(model.logp(idx, mask), expected)

def test_autocast_is_for_products_alone():
    a = torch.eye(2)
    with Run('cpu', 'float32').autocast():
        assert (a @ a).dtype == torch.float32
    for dtype in ('bfloat16', 'float16'):
        with Run('cpu', dtype).autocast():
            assert (a @ a).dtype == getattr(torch, dtype) and a.log_softmax(-1).dtype == torch.float32
            logp, entropy, _ = small().logp_entropy_values(torch.tensor([[1, 2, 3]]), torch.ones(1, 2), True)
            assert logp.dtype == entropy.dtype == torch.float32

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_a_frozen_model_takes_less_and_answers_the_same(dtype):
    run, model, idx, mask = Run('cpu', dtype), small().eval(), torch.tensor([[1, 2, 3]]), torch.ones(1, 2)
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

def test_slurms_and_dockers_signals_are_as_ctrl_c(capsys, monkeypatch):
    """They wait for the end of the step, however often they come, and Ctrl-C then does not."""
    monkeypatch.setattr('sys.argv', ['script'])
    for name, code in (('SIGTERM', 143), ('SIGHUP', 129), ('SIGTERM', 130)):
        number = getattr(signal, name)

        def main(cfg):
            run = start(cfg)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert run.stop_requested() == number
            if code == 130:
                os.kill(os.getpid(), signal.SIGINT)
            raise KeyboardInterrupt(run.stop_requested()) # as save_if_due does

        try:
            with pytest.raises(SystemExit) as ended:
                launch(main, Config)
        finally:
            default_signals()
        assert ended.value.code == code and 'interrupted' in capsys.readouterr().err
        assert signal.getsignal(number) == signal.SIG_DFL

@pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no nohup')
def test_nohup_is_respected():
    code = ('import signal; from common.options import RunOptions; from common.run import start, stop\n'
            'run = start(RunOptions()); during = signal.getsignal(signal.SIGHUP)\n'
            'stop(run); print(during, signal.getsignal(signal.SIGHUP))')
    said = lambda *words: subprocess.run([*words, sys.executable, '-c', code], cwd=ROOT, text=True, check=True,
                                         stdin=subprocess.DEVNULL, capture_output=True).stdout
    assert said('nohup') == f'{signal.SIG_IGN} {signal.SIG_IGN}\n' != said()

@pytest.mark.parametrize('told', [dict(RANK='0'), dict(WORLD_SIZE='2'), dict(RANK='0', WORLD_SIZE='2'),
                                  dict(RANK='a', WORLD_SIZE='2'), dict(RANK='2', WORLD_SIZE='2')])
def test_half_of_what_torchrun_sets_is_told_in_one_line(monkeypatch, capsys, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    line = one_line(capsys, lambda: start(Config()))
    assert line.startswith(f"RANK={told.get('RANK')}, WORLD_SIZE={told.get('WORLD_SIZE')} in the environment")

def ranks_that_differ(folder):
    cfg = Config(out_dir=os.path.join(folder, 'out'), init_from='')
    run = start(cfg)
    cfg.max_steps += run.rank # one has more rows
    prepare_out_dir(run, cfg)

def a_folder_that_is_taken(folder):
    run = start(cfg := Config(out_dir=folder))
    prepare_out_dir(run, cfg)

def test_processes_that_would_wait_in_vain_end_at_once(tmp_path, capfd):
    assert in_processes(2, ranks_that_differ, str(tmp_path)) == [2, 2]
    err = capfd.readouterr().err
    assert err.count('error: ') == 2 and '--max_steps: process 1 has another one than process 0' in err
    (tmp_path / 'config.json').write_text('{}')
    assert in_processes(2, a_folder_that_is_taken, str(tmp_path)) == [2, 2] # what the first refuses ends both
    err = capfd.readouterr().err
    assert err.count('error: ') == 1 and 'holds a checkpoint' in err and 'Traceback' not in err

IDX = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
MASK = torch.tensor([[1., 1., 1.], [0., 0., 1.], [0., 1., 1.], [1., 0., 0.]]) # 4 rows share 7 tokens unevenly

def gradient(run):
    """Return the gradient of the mean loss over all 7 tokens, each process seeing its own rows alone."""
    model = small(seed=run.rank).eval() # every process gets the first one's weights
    run.prepare(model, Config())
    n_tokens = run.sum(run.rows(MASK).sum())
    run.backward(-model.logp(run.rows(IDX), run.rows(MASK)).sum() / n_tokens)
    run.sum_gradients(model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

def one_of_two(folder):
    cfg = Config(out_dir=os.path.join(folder, 'out'))
    run = start(cfg)
    rank = run.rank
    prepare_out_dir(run, cfg)
    run.interrupted = rank == 1 # one process was sent Ctrl-C
    line = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(line.weight)
    run.backward((line.weight * torch.tensor([[3., 0.], [0., 4.]][rank])).sum()) # (3, 4) in all, of norm 5
    norm = optimizer_step(run, cfg, 0, line, torch.optim.SGD(line.parameters(), lr=1.0), 0.5)
    shares, rows = Means(), Means()
    shares.add(dict(a=torch.tensor(4.0 * (rank + 1))), 0.25 + 0.5 * rank) # of a batch
    if rank == 0:
        rows.add(dict(a=torch.tensor(1.5)), 4) # the second one had no rows
    torch.save(dict(grads=gradient(run), norm=norm, stepped=line.weight.tolist(), sum=run.sum(rank + 1.0).item(),
                    stop=run.stop_requested(), mean=rows.mean(run), means=shares.sum(run),
                    merged=run.merge({rank: rank + 5}), drawn=torch.rand(2)), os.path.join(folder, f"{rank}.pt"))
    stop(run)

def test_two_processes_equal_one(tmp_path):
    assert in_processes(2, one_of_two, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = gradient(RUN)
    assert first['grads'].keys() == second['grads'].keys() == expected.keys()
    for name in expected:
        assert torch.equal(first['grads'][name], second['grads'][name])
        torch.testing.assert_close(first['grads'][name], expected[name], rtol=0, atol=1e-6)
    for found in (first, second): # summed, then clipped to norm 1: (.6, .8)
        assert found['norm'] == by_hand(5.0) and found['stepped'][0] == by_hand([-0.3, -0.4])
    assert first['sum'] == second['sum'] == 3.0 # 1 + 2
    assert first['mean'] == second['mean'] == dict(a=1.5)
    assert first['means'] == second['means'] == dict(a=7.0) # 4 / 4 + 8 * 3 / 4
    assert first['merged'] == second['merged'] == {0: 5, 1: 6}
    assert first['stop'] and second['stop'] # both stop after one was asked to
    assert not torch.equal(first['drawn'], second['drawn']) # each process samples its own answers

def said_by(program):
    """Return the lines that a program wrote to a piped stderr."""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    return done.stderr.split('\n')

def test_in_a_pipe_a_bar_is_lines_and_an_error_has_its_own():
    """The clock goes on by half a second whenever it is asked."""
    said = said_by("""if True:
        import itertools, time
        clock = itertools.count()
        time.time = lambda: next(clock) / 2
        from common.run import progress
        from common.options import fail
        for step in progress(range(1000), desc='steps'):
            if step == 900:
                fail("--lr=3: is too large")""")
    bars = [line for line in said if line.startswith('steps: ')]
    assert len(bars) > 5 and all('\r' not in line for line in said)
    assert said[-3 if said[-2].startswith('steps') else -2] == 'error: --lr=3: is too large' and said[-1] == ''

def test_in_a_terminal_an_error_has_its_own_line(capsys, monkeypatch):
    """The bar's line is cleared first."""
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    bar = progress(range(3), desc='steps')
    with pytest.raises(SystemExit):
        fail('--lr=3: is too large')
    bar.close()
    said = capsys.readouterr().err
    before, after = said.split('error: --lr=3: is too large\n')
    assert 'steps: ' in before and before.endswith('\r') and before.split('\r')[-2].strip() == '' and 'steps: ' in after

@pytest.mark.parametrize('runs, own, expected', [
    ('0.9 0.5 0.1 1/345 77', {}, dict(OMP_WAIT_POLICY='PASSIVE', GOMP_SPINCOUNT='10000')),
    ('0.1 0.1 0.1 3/111 77', {}, dict(OMP_WAIT_POLICY='PASSIVE')),
    ('0.1 0.1 0.1 1/9 77', dict(GOMP_SPINCOUNT='5'), {}), ('0.1 0.1 0.1 1/9 77', dict(OMP_WAIT_POLICY='ACTIVE'), {})])
def test_threads_spin_only_where_nothing_else_runs(runs, own, expected, monkeypatch):
    """The fourth number is what runs at this moment and what there is; the first three are means over minutes. What
    the user set stays."""
    monkeypatch.setattr(Path, 'read_text', lambda self: runs)
    monkeypatch.setattr(Path, 'exists', lambda self: True)
    monkeypatch.setattr(os, 'environ', environ := dict(own))
    found = runpy.run_path(os.path.join(ROOT, 'common', '__init__.py'))
    assert found['OMP'] == expected and environ == own | expected

def test_demo_leaves_the_choice_to_its_stages():
    """It takes back what common/__init__.py set, and not what the user did."""
    code = "import os, demo; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    plain = {key: value for key, value in os.environ.items() if key not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    said = lambda **own: subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, check=True,
                                        env=plain | own, capture_output=True).stdout
    assert said() == 'None None\n' and said(GOMP_SPINCOUNT='5') == 'None 5\n'
