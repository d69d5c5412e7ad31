"""common/training.py: learning rate, optimizer step, running means, the tail of a step."""
import math

import pytest
import torch

from common.checkpoints import read_log
from common.run import Run
from common.training import (Means, check_finite, finish_step, lr_at, make_optimizer, optimizer_step, training_bar)
from tiny import RUN, Config, by_hand, one_line

# warmup: 8 * 1/4 ... 8 * 4/4; then 8 steps from 8 down. Step 11 has 1/8 of the way left: linear 8/8 = 1, cosine
# 8 * (.1 + .45 * (1 + cos(7/8 pi))) = 8 * (.1 + .45 * .0761205) = 1.074034
@pytest.mark.parametrize('schedule, expected', [
    ('constant', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 8.0, 11: 8.0}),
    ('linear', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 4.0, 11: 1.0, 12: 0.0}),
    ('cosine', {0: 2.0, 1: 4.0, 3: 8.0, 4: 8.0, 8: 4.4, 11: 1.074034, 12: 0.8}),
])
def test_lr_by_hand(schedule, expected):
    cfg = Config(lr_schedule=schedule)
    assert {step: lr_at(step, cfg, cfg.lr) for step in expected} == pytest.approx(expected, abs=1e-6)

def test_lr_without_warmup_or_with_nothing_but_warmup():
    assert lr_at(0, Config(warmup_steps=0, lr_schedule='linear'), 8.0) == 8.0
    assert lr_at(0, Config(warmup_steps=1, max_steps=1, lr_schedule='cosine'), 8.0) == 8.0
    assert lr_at(5, Config(warmup_steps=10, max_steps=6), 8.0) == pytest.approx(4.8)

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
    assert optimizer_step(RUN, Config(grad_clip=clip), 0, model, optimizer, 0.5) == by_hand(5.0)
    assert model.w.tolist() == pytest.approx(expected, abs=1e-6)
    assert model.w.grad is None

def test_weight_decay_is_for_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(model, Config(weight_decay=0.5, lr=0.1))
    optimizer_step(RUN, Config(), 0, model, optimizer, 0.1)
    # AdamW: w - lr * decay * w = 1 - .05
    assert [p.flatten()[0].item() for p in model.parameters()] == pytest.approx([0.95, 1.0, 1.0, 1.0], abs=1e-6)

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops(capsys, value):
    cfg = Config(out_dir='out/x')
    check_finite(cfg, 3, 'loss', 1.0)
    line = one_line(capsys, lambda: check_finite(cfg, 16, 'policy loss', value), code=1) # steps are counted from 1
    assert 'policy loss' in line and 'step 17' in line and 'out/x' in line

# The gradient (3, 4) comes scaled by 2^16 and is unscaled before it is clipped. An infinite one is left out, and halves
# the scale; where another optimizer steps after the same pass the scale has to wait.
def test_float16_steps_by_hand(capsys):
    model, run = Line(), Run('cpu', 'float16')
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    run.backward((model.w * torch.tensor([3., 4.])).sum())
    assert model.w.grad.tolist() == [3 * 65536.0, 4 * 65536.0]
    assert optimizer_step(run, Config(), 0, model, optimizer, 0.5) == by_hand(5.0)
    assert model.w.tolist() == by_hand([-0.3, -0.4]) and run.scaler.get_scale() == 65536.0
    for last, scale in ((False, 65536.0), (True, 32768.0)):
        run.backward((model.w * torch.tensor([3., math.inf])).sum())
        assert optimizer_step(run, Config(), 0, model, optimizer, 0.5, last) == 0.0
        assert model.w.tolist() == by_hand([-0.3, -0.4]) and model.w.grad is None
        assert run.scaler.get_scale() == scale
        if not last: # the other optimizer's turn
            run.scaler.update(65536.0)
    run.scaler.update(0.5) # nothing is scaled up any more, and still it is infinite
    run.backward((model.w * torch.tensor([3., math.inf])).sum())
    line = one_line(capsys, lambda: optimizer_step(run, Config(), 16, model, optimizer, 0.5), code=1)
    assert 'the gradient norm is inf at step 17' in line and Config().out_dir in line

def test_other_dtypes_are_not_scaled():
    model = Line()
    for dtype in ('float32', 'bfloat16'):
        Run('cpu', dtype, world_size=2).backward((model.w * torch.tensor([3., 4.])).sum())
        assert model.w.grad.tolist() == [3.0, 4.0] # nor by the number of processes: their gradients are summed
        model.w.grad = None

def test_a_gradient_that_is_no_number_stops(capsys):
    model = Line()
    (model.w * torch.tensor([3., math.nan])).sum().backward()
    step = lambda: optimizer_step(RUN, Config(), 2, model, torch.optim.SGD(model.parameters(), lr=1.0), 0.5)
    assert 'the gradient norm is nan at step 3' in one_line(capsys, step, code=1)

# ---------------------------------------------------------------------------------------------------------------------
# running means

def test_means_by_hand():
    means = Means()
    loss = torch.tensor(4.0, requires_grad=True)
    means.add(dict(loss=loss, ended=torch.tensor(1.0)), 0.25) # a quarter of the tokens
    means.add(dict(loss=torch.tensor(8.0), ended=torch.tensor(0.0)), 0.75)
    assert means.sum(RUN) == means.mean(RUN) == dict(loss=7.0, ended=0.25) # 4/4 + 8 * 3/4
    means.add(dict(loss=torch.tensor(0.0), ended=torch.tensor(1.0)), 1.0)
    assert means.sum(RUN) == dict(loss=7.0, ended=1.25) and means.mean(RUN) == dict(loss=3.5, ended=0.625)
    assert not any(x.requires_grad for x in means.totals.values())

def test_means_of_numbers_of_rows():
    means = Means()
    for mean, n in ((2.0, 3), (5.0, 1)):
        means.add(dict(loss=torch.tensor(mean)), n)
    assert means.mean(RUN) == dict(loss=2.75) # (3 * 2 + 5) / 4

# ---------------------------------------------------------------------------------------------------------------------
# the tail of a step

def test_a_step_ends_with_log_bar_and_checkpoint(tmp_path, capsys):
    cfg = Config(out_dir=str(tmp_path), max_steps=5, save_every=2, log_every=3)
    bar, saved, measured = training_bar(RUN, cfg, 0), [], []
    for step in bar:
        finish_step(RUN, cfg, bar, step + 1, dict(loss=step / 4, lr=0.1), ['loss'], saved.append,
                    lambda: measured.append(1) or dict(val_loss=9.0))
    assert saved == [2, 4, 5] and len(measured) == 1 # held-out data after the last step alone
    lines = [{k: v for k, v in line.items() if k != 'time'} for line in read_log(str(tmp_path / 'log.jsonl'))]
    assert lines == [dict(step=3, loss=0.5, lr=0.1), dict(step=5, loss=1.0, lr=0.1), dict(step=5, val_loss=9.0)]
    out = capsys.readouterr()
    assert 'held-out: loss 9.0000' in out.out + out.err and 'loss=1.000' in out.err

def test_held_out_data_are_measured_before_the_first_step_and_then_every_eval_every(tmp_path):
    cfg, measured = Config(out_dir=str(tmp_path), max_steps=5, save_every=0, eval_every=2), []
    evaluate = lambda: measured.append(1) or dict(val_loss=float(len(measured)))
    for step in (bar := training_bar(RUN, cfg, None, evaluate)):
        finish_step(RUN, cfg, bar, step + 1, dict(loss=1.0), ['loss'], lambda done: None, evaluate)
    found = [(line['step'], line['val_loss']) for line in read_log(str(tmp_path / 'log.jsonl')) if 'val_loss' in line]
    assert found == [(0, 1.0), (2, 2.0), (4, 3.0), (5, 4.0)]
    list(training_bar(RUN, cfg, dict(step=4), evaluate)) # a resumed run has measured before
    assert len(measured) == 4

def test_other_processes_write_no_line(tmp_path, capsys):
    cfg, second = Config(out_dir=str(tmp_path), max_steps=1), Run('cpu', 'float32', rank=1)
    for step in (bar := training_bar(second, cfg, 0)):
        finish_step(second, cfg, bar, step + 1, dict(loss=1.0), ['loss'], lambda done: None, lambda: dict(val_loss=9.0))
    assert not (tmp_path / 'log.jsonl').exists() and capsys.readouterr() == ('', '')

# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard

def test_tensorboard_is_refused_where_it_is_absent(monkeypatch):
    monkeypatch.setattr('common.options.find_spec', lambda name: None)
    with pytest.raises(ValueError, match='tensorboard must be False before pip install tensorboard'):
        Config(tensorboard=True)

def test_tensorboard_reads_the_log(tmp_path):
    """Killed after its second step, saved after its first, and resumed: each step is there once."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator',
                                      reason='needs tensorboard')
    cfg = Config(out_dir=str(tmp_path), max_steps=3, log_every=1, save_every=0, tensorboard=True)
    for state, steps, factor in ((None, (1, 2), 10), (dict(step=1), (2, 3), 100)):
        run = Run('cpu', 'float32')
        bar = training_bar(run, cfg, state)
        for step in steps:
            finish_step(run, cfg, bar, step, dict(loss=float(factor * step)), ['loss'], lambda step: None)
    read = accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [(event.step, event.value) for event in read.Scalars('loss')] == [(1, 10.0), (2, 200.0), (3, 300.0)]
