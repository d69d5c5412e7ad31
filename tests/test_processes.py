"""Every stage in two processes, and what is left when a process dies."""
import codecs
import contextlib
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import tensor as T

import collect
from common.batches import encode_prompts
from common.checkpoints import read_log
from common.records import LOCKS, read_records
from common.rollout import masked_mean, sample_answers, whiten
from common.run import Run, start, stop
from common.tokens import load_tokenizer
from model import GPT
from stages import SAMPLING, die_after, sample_by_row, sample_with, stages
from tiny import COMPARISONS, PROMPTS, ROOT, checkpoint, in_processes, losses, records, run, stops, weights

STAGES = ('sft', 'reward', 'dpo', 'dpo_lora', 'ipo', 'rrhf', 'kto', *SAMPLING)
KINDS = ('sft', 'reward', 'dpo', 'rrhf', 'kto', 'ppo', 'rloo') # one of each script

slow = pytest.mark.slow # all that waits for the torchrun of the fixture `folder`

def one(script, **options):
    lines = losses(run(importlib.import_module(script), **options))
    while LOCKS: # as if the process had ended: another one may go on in its folder
        LOCKS.popitem()[1].close()
    return lines

def log_of(folder):
    return losses(read_log(os.path.join(folder, 'log.jsonl')))

@contextlib.contextmanager
def sampling_by_row():
    sample_with(sample_by_row)
    try:
        yield
    finally:
        sample_with(sample_answers)

def assert_close(got, expected):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected):
        assert a == pytest.approx(b, abs=1e-5, rel=2e-6) # an answer's sum is above 20, in float32 with seven digits

# ---------------------------------------------------------------------------------------------------------------------
# two processes equal one: one torchrun runs everything

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """
    ONE/NAME: each stage in one process, four steps. TWO/NAME: the same in two. FREE/NAME: TWO, each process sampling
    from its own generator. HALVES/NAME: that, stopped after two steps and resumed. ONE-TWO/NAME: begun by one process,
    finished by two. TWO-ONE/NAME: the other way round, as yet unfinished. DIED: one of the two is killed after the
    third step.
    """
    folder = str(tmp_path_factory.mktemp('processes'))
    at, jobs = lambda *names: os.path.join(folder, *names), []
    with sampling_by_row():
        for name, (script, options) in stages(folder).items():
            four, two = (options | dict(max_steps=n) for n in (4, 2))
            one(script, out_dir=at('ONE', name), **four)
            jobs.append((script, four | dict(out_dir=at('TWO', name)), ['by row']))
            if name not in KINDS:
                continue
            jobs += [(script, two | dict(out_dir=at('HALVES', name)), []),
                     (script, four | dict(out_dir=at('HALVES', name), resume=True), [])]
            if name in SAMPLING:
                jobs.append((script, four | dict(out_dir=at('FREE', name)), []))
            one(script, out_dir=at('ONE-TWO', name), **two)
            jobs += [(script, four | dict(out_dir=at('ONE-TWO', name), resume=True), ['by row']),
                     (script, two | dict(out_dir=at('TWO-ONE', name)), ['by row'])]
    script, options = stages(folder)['sft']
    jobs.append((script, options | dict(out_dir=at('DIED'), max_steps=5, save_every=2), ['die']))
    with open(at('jobs.json'), 'w') as f:
        json.dump(jobs, f)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               os.path.join(ROOT, 'tests', 'stages.py'), at('jobs.json')]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1'),
                          capture_output=True, text=True, timeout=1200)
    with open(at('said'), 'w') as f:
        f.write(done.stdout + done.stderr)
    assert os.path.exists(at('DIED', 'state.pt')), done.stderr[-3000:]
    assert done.returncode == 1 and 'Signal 9 (SIGKILL) received' in done.stderr
    return folder

@slow
@pytest.mark.parametrize('name', STAGES)
def test_two_processes_equal_one(folder, name):
    """Every number of the log, evaluation included, and the weights."""
    assert_close(log_of(os.path.join(folder, 'TWO', name)), log_of(os.path.join(folder, 'ONE', name)))
    expected = GPT.from_pretrained(os.path.join(folder, 'ONE', name)).state_dict()
    got = GPT.from_pretrained(os.path.join(folder, 'TWO', name)).state_dict()
    assert got.keys() == expected.keys()
    for key in expected:
        # Adam's first steps are of size lr whatever the gradient: where it is 0 but for rounding, so are they
        assert (got[key] - expected[key]).abs().median() < 1e-5, key

@slow
@pytest.mark.parametrize('name', KINDS)
def test_two_processes_resume_exactly(folder, name):
    whole = os.path.join(folder, 'FREE' if name in SAMPLING else 'TWO', name)
    halves = [line for line in log_of(os.path.join(folder, 'HALVES', name))
              if line['step'] != 2 or 'loss' in line] # less what was measured at the end of the first half
    assert halves == log_of(whole)
    assert weights(os.path.join(folder, 'HALVES', name)) == weights(whole)

@slow
@pytest.mark.parametrize('name', KINDS)
def test_two_processes_go_on_from_one_and_one_from_two(folder, name):
    expected = [line for line in log_of(os.path.join(folder, 'ONE', name)) if line['step'] > 2]
    got = [line for line in log_of(os.path.join(folder, 'ONE-TWO', name)) if line['step'] > 2]
    assert_close(got, expected)
    script, options = stages(folder)[name]
    with sampling_by_row():
        got = one(script, out_dir=os.path.join(folder, 'TWO-ONE', name), **options, max_steps=4, resume=True)
    assert_close([line for line in got if line['step'] > 2], expected)

@slow
def test_one_process_speaks_for_both(folder):
    with open(os.path.join(folder, 'said')) as f:
        said = f.read()
    assert said.count('resumed from') == 2 * len(KINDS)
    with open(os.path.join(folder, 'FREE', 'ppo', 'log.jsonl')) as f:
        assert [json.loads(line)['step'] for line in f] == [1, 2, 3, 4]

@slow
def test_when_one_of_two_is_killed_torchrun_ends_and_the_last_checkpoint_is_whole(folder):
    for rank in (0, 1):
        with open(os.path.join(folder, f"jobs.json.{rank}.pid")) as f:
            assert not os.path.exists(f"/proc/{f.read()}")
    died = os.path.join(folder, 'DIED')
    assert torch.load(os.path.join(died, 'state.pt'), weights_only=True)['step'] == 2
    script, options = stages(folder)['sft']
    assert one(script, out_dir=died, **options, max_steps=5, resume=True)[-1]['step'] == 5

# ---------------------------------------------------------------------------------------------------------------------
# processes that die, in forks: nothing to import, nobody who would end the others

def killed(script, options, rank):
    if os.environ.get('RANK', '0') == rank:
        die_after(3)
    run(importlib.import_module(script), **options)

@pytest.mark.parametrize('name', STAGES)
def test_a_kill_loses_what_came_after_the_last_checkpoint(tmp_path, name):
    script, options = stages(str(tmp_path))[name]
    out, options = str(tmp_path / 'killed'), options | dict(max_steps=4, save_every=2)
    expected = one(script, out_dir=str(tmp_path / 'whole'), **options)
    assert in_processes(1, killed, script, options | dict(out_dir=out), '0') == [-9]
    assert log_of(out)[-1]['step'] == 3 # which was never saved
    assert one(script, out_dir=out, resume=True, **options) == expected
    assert weights(out) == weights(tmp_path / 'whole')

@pytest.mark.parametrize('name', KINDS)
def test_the_other_process_ends_by_itself(tmp_path, name):
    script, options = stages(str(tmp_path))[name]
    out, options = str(tmp_path / 'out'), options | dict(max_steps=5, save_every=2)
    assert in_processes(2, killed, script, options | dict(out_dir=out), '1') == [1, -9]
    assert torch.load(os.path.join(out, 'state.pt'), weights_only=True)['step'] == 2
    assert one(script, out_dir=out, resume=True, **options)[-1]['step'] == 5

# ---------------------------------------------------------------------------------------------------------------------
# gradients

def counting(script, options, folder):
    """Run a stage, and write down how often each of the model's matrices was summed over the processes."""
    shapes, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, *a, **k: (shapes.append(tuple(x.shape)), all_reduce(x, *a, **k))[1]
    run(importlib.import_module(script), **options)
    found = {str(shape): shapes.count(shape) for shape in set(shapes) if len(shape) == 2}
    with open(os.path.join(folder, f"{os.environ['RANK']}.json"), 'w') as f:
        json.dump(found, f)

# two steps, or iterations of two epochs; PPO-ptx has a backward pass more, and a critic of its own as many steps
@pytest.mark.parametrize('name, steps', [('sft', 2), ('dpo', 2), ('rloo', 4), ('ppo', 8), ('ppo_shared', 4)])
@pytest.mark.parametrize('grad_accum', [1, 2])
def test_gradients_are_summed_once_per_optimizer_step(tmp_path, name, steps, grad_accum):
    script, options = stages(str(tmp_path))[name]
    options |= dict(out_dir=str(tmp_path / 'out'), max_steps=2, grad_accum=grad_accum)
    assert in_processes(2, counting, script, options, str(tmp_path)) == [0, 0]
    for rank in (0, 1):
        with open(tmp_path / f"{rank}.json") as f:
            found = json.load(f)
        found.pop('(1, 16)', None) # a value head
        # two layers of four matrices each; the positions' embedding has the shape of their c_fc
        assert found == {shape: n * steps for shape, n in {
            '(257, 16)': 1, '(64, 16)': 3, '(48, 16)': 2, '(16, 16)': 2, '(16, 64)': 2}.items()}

# ---------------------------------------------------------------------------------------------------------------------
# what the torchrun above leaves out, in forks

def test_processes_share_the_rows():
    shares = [Run('cpu', 'float32', rank, 3).rows(list(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]] # every row once

def options_of(kind, folder):
    """Return (script, options); half of the answers alone would decide on other early stops."""
    made = stages(folder)
    if kind in ('grpo', 'gspo', 'constant'):
        own = dict(grpo={}, gspo=dict(ratio='sequence', average='answer', clip=0.01), constant=dict(average='constant'))
        return 'reinforce', made['rloo'][1] | dict(kind='grpo', kl_coef=0.5) | own[kind]
    if kind == 'margins': # three rows for batches of four
        return 'reward', made['reward'][1] | dict(
            train_data=records(os.path.join(folder, 'margins.jsonl'), COMPARISONS[:3]), lm_coef=0.0,
            val_data=records(os.path.join(folder, 'one_margin.jsonl'), COMPARISONS[3:]))
    if kind == 'ratings': # each prompt has as many answers as its number says: the shares of the processes differ
        rows = [dict(prompt=f'{n}', response='x' * k, score=(3 * n + k) % 5)
                for n in range(1, 6) for k in range(1, n + 1)]
        path = records(os.path.join(folder, 'ratings.jsonl'), rows)
        return 'reward', made['reward'][1] | dict(train_data=path, val_data=path, loss='regression')
    if kind == 'teacher':
        return 'sft', made['sft'][1] | dict(teacher=os.path.join(folder, 'sft_model'), temperature=2.0)
    if kind == 'on policy': # three of the four batches are the student's
        return 'sft', made['sft'][1] | dict(teacher=os.path.join(folder, 'sft_model'), on_policy=0.5, max_new_tokens=6,
                                            divergence='jsd', jsd_beta=0.9)
    more = dict(n_answers=2) if kind == 'two answers' else dict(early_stop_kl=0.1, lr=0.01, epochs=4)
    return 'ppo', made['ppo'][1] | more

@pytest.mark.parametrize('kind', ['grpo', 'gspo', 'constant', 'margins', 'ratings', 'teacher', 'on policy',
                                  'two answers', 'early stop'])
def test_two_forks_train_as_one(tmp_path, kind):
    script, options = options_of(kind, str(tmp_path))
    options |= dict(max_steps=4)
    ONE, TWO = str(tmp_path / 'ONE'), str(tmp_path / 'TWO')
    with sampling_by_row():
        expected = one(script, out_dir=ONE, **options)
        assert in_processes(2, lambda: one(script, out_dir=TWO, **options), within=30) == [0, 0]
    assert_close(log_of(TWO), expected)
    a, b = (GPT.from_pretrained(out).state_dict() for out in (ONE, TWO))
    assert all((a[key] - b[key]).abs().median() < 1e-5 for key in a)
    if kind == 'early stop': # in the midst of an iteration
        assert {line['updates'] for line in expected} & {1, 2, 3}

# ---------------------------------------------------------------------------------------------------------------------
# statistics, collect.py

def whitened():
    run = start(SimpleNamespace(device='cpu', dtype='float32', seed=1))
    x, mask = (T([[1., 2.]]), T([[1., 1.]])) if run.is_master else (T([[3., 1e6, 6.]]), T([[1., 0., 1.]]))
    # mean (1 + 2 + 3 + 6) / 4 = 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, its root 1.8708287
    expected = [[-1.069045, -0.534522]] if run.is_master else [[0.0, 0.0, 1.603567]]
    assert masked_mean(x, mask, run).item() == 3.0
    torch.testing.assert_close(whiten(x, mask, run), T(expected), rtol=0, atol=1e-6)
    assert run.merge({run.rank: 'ab'[run.rank]}) == {0: 'a', 1: 'b'}
    stop(run)

def test_whitening_is_over_both_processes():
    assert in_processes(2, whitened) == [0, 0]

@pytest.fixture
def prompts(tmp_path):
    rows = [row | dict(number=i) for i, row in enumerate(PROMPTS[:7])] # stretches of 3, 3 and 1
    return dict(policy=checkpoint(tmp_path / 'sft', n_layer=2), prompts=records(tmp_path / 'prompts.jsonl', rows),
                n_answers=2, max_new_tokens=5, rows=3, gold='data.toy.world:gold')

def test_two_processes_share_the_prompts(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr('data.toy.world.gold', lambda prompt, response: len(response) / 10)
    out, again = str(tmp_path / 'r.jsonl'), str(tmp_path / 'again.jsonl')
    assert in_processes(2, lambda: run(collect, out=out, **prompts)) == [0, 0]
    assert not os.path.exists(out + '.partial')
    rows = read_records(out, 'rankings')
    # the second stretch: prompts 3 and 5 are the first process's, 4 the second's, whose seed is the next one
    tok, model = load_tokenizer(prompts['policy']), GPT.from_pretrained(prompts['policy'])
    expected = {}
    for share, seed in (((3, 5), 1_000_003 + 3), ((4,), 1_000_003 + 4)):
        torch.manual_seed(seed)
        ids = encode_prompts(tok, [PROMPTS[i] for i in share for _ in (0, 1)], 59)
        answers, _ = sample_answers(model, ids, tok, 5)
        for n, i in enumerate(share):
            expected[i] = [codecs.utf_8_decode(tok.decode_bytes(a), 'replace', a[-1] == tok.eos)[0].removeprefix(' ')
                           for a in answers[2 * n:2 * n + 2]] # cut off, less the half of a character
    assert [row['number'] for row in rows] == [0, 1, 2, 3, 4, 5, 6] # in their order, none left out
    assert {row['number']: row['responses'] for row in rows[3:6]} == expected

    with open(out, 'rb') as f: # as if killed in the second stretch
        lines = f.read().splitlines(keepends=True)
    with open(again + '.partial', 'wb') as f:
        f.writelines(lines[:4])
    assert in_processes(2, lambda: run(collect, out=again, resume=True, **prompts)) == [0, 0]
    with open(again, 'rb') as f:
        assert f.read() == b''.join(lines)

# ---------------------------------------------------------------------------------------------------------------------
# what is refused

def test_what_several_processes_cannot_do(tmp_path, capsys, monkeypatch):
    made = stages(str(tmp_path))
    refused = lambda name, **more: stops(capsys, importlib.import_module(made[name][0]), out_dir=str(tmp_path / 'out'),
                                         max_steps=1, **made[name][1] | more)
    for name, value in dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='3', MASTER_ADDR='127.0.0.1', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value) # refused before any of them waits for another
    assert refused('sft') == '--batch_size=4: must be a multiple of 6, processes x grad_accum'
    assert refused('dpo') == '--batch_size=4: must be a multiple of 3, processes x grad_accum'
    for name in ('ppo', 'rloo'): # a prompt's answers are sampled by one process
        assert (refused(name, batch_size=9, n_answers=2) ==
                '--batch_size=9: must be a multiple of 6, processes x n_answers')
    assert not os.path.exists(tmp_path / 'out')
