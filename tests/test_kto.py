"""kto.py: the loss and its z0 by hand, which answers are good and bad, the reference. test_stages.py has the rest."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

import kto
from common.batches import Batches, Row
from common.checkpoints import load_policy, read_log
from common.records import read_unpaired
from common.rollout import answer_logp
from common.run import Run
from common.tokens import prompt_ids, response_ids
from kto import describe, kl_estimate, kto_loss, labels_of, mismatched
from tiny import COMPARISONS, FAST, ROOT, TOK, by_hand, losses, records, run

CPU = Run('cpu', 'float32')

def T(values):
    return torch.tensor(values, requires_grad=True)

# ---------------------------------------------------------------------------------------------------------------------
# the loss; s(x) = sigmoid(x): s(0.5) = 0.622459, s(1) = 0.731059, s(-x) = 1 - s(x), s' = s (1 - s)

def test_kto_loss_by_hand():
    # log-ratios 3, 0, 3, 0 and z0 = 1, so beta (r - z0) = 1, -0.5, 1, -0.5; two good answers, two bad ones:
    # v = sigmoid(1), sigmoid(-0.5), sigmoid(-1), sigmoid(0.5); 1 - v = 0.268941, 0.622459, 0.731059, 0.377541
    pi, ref = T([-1., -2., -1., -2.]), torch.tensor([-4., -2., -4., -2.])
    label = torch.tensor([1., 1., 0., 0.])
    loss, rewards = kto_loss(pi, ref, label, torch.tensor(1.0), beta=0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.5) # a quarter of 2.0
    assert rewards.tolist() == [1.5, 0.0, 1.5, 0.0] and not rewards.requires_grad
    # beta / 4 * sigmoid': 0.125 * 0.196612 and 0.125 * 0.235004; the good ones are pulled up, the bad ones down
    assert pi.grad.tolist() == by_hand([-0.024576, -0.029376, 0.024576, 0.029376])

    pi.grad = None
    loss, _ = kto_loss(pi, ref, label, torch.tensor(1.0), 0.5, desirable_weight=2.0, undesirable_weight=0.5)
    loss.backward()
    assert loss.item() == by_hand(0.584275) # (2 * 0.891400 + 0.5 * 1.108600) / 4
    assert pi.grad.tolist() == by_hand([-0.049153, -0.058751, 0.012288, 0.014688])

def test_z0_by_hand():
    pi = T([-1., -2., -6.])
    z0 = kl_estimate(pi, torch.tensor([-4., -2., -6.])) # (3 + 0 + 0) / 3
    assert z0.shape == () and z0.item() == by_hand(1.0) and not z0.requires_grad
    assert kl_estimate(pi, torch.tensor([-4., -2., 0.])).item() == 0.0 # (3 + 0 - 6) / 3 is below 0

def test_mismatched_rows():
    rows = [Row([1], [[10]], dict(label=True)), Row([2], [[20, 21]], dict(label=False)),
            Row([3], [[30]], dict(label=True))]
    assert [(row.prompt, row.answers) for row in mismatched(rows, 64)] == [
        ([1], [[20, 21]]), ([2], [[30]]), ([3], [[10]])]
    assert labels_of(rows).tolist() == [1.0, 0.0, 1.0]

def test_a_prompts_own_answers_are_no_mismatch():
    rows = [Row([prompt], [[answer]], {}) for prompt, answer in ((1, 10), (1, 11), (2, 20), (1, 12), (1, 10))]
    pairs = lambda rows: [(row.prompt[0], row.answers[0][0]) for row in mismatched(rows, 64)]
    assert pairs(rows) == [(1, 20), (1, 20), (2, 12), (1, 20), (1, 20)]
    assert pairs(rows[:2]) == [(1, 11), (1, 10)] # there is no other prompt

def test_no_row_is_its_own_neighbour_where_an_epoch_begins_again():
    """The last batch of 33 rows holds 31 of them once more, next to themselves by their length."""
    rows, met = [Row([i], [[100 + i] * (i + 1)], {}) for i in range(33)], 0
    batches = Batches([row.length for row in rows], 32, 1)
    for step in range(8):
        batch = [rows[i] for i in batches.at(step)]
        met += any(a.prompt == b.prompt for a, b in zip(batch, batch[1:]))
        assert all(row.answers[0][0] != 100 + row.prompt[0] for row in mismatched(batch, 64))
    assert met > 0

def test_a_mismatched_prompt_that_does_not_fit_is_cut():
    cut = mismatched([Row([1, 2], [[8, 9]], {}), Row([4, 5, 6, 7], [[3]], {})], block_size=4)
    assert [(row.prompt, row.answers) for row in cut] == [([1, 2], [[3]]), ([6, 7], [[8, 9]])]

def alone(model, prompt, answer):
    """log pi(y|x) of one row by itself, token by token."""
    logp = model(torch.tensor([prompt + answer]))[0][0].log_softmax(-1) # (T, V)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))

def test_log_probabilities_are_those_of_each_row_alone(sft_model):
    model = load_policy(sft_model)
    texts = [('Hi', 'Yo'), ('A', 'longer than that'), ('x', 'y')]
    rows = [(prompt_ids(TOK, p), response_ids(TOK, r)) for p, r in texts]
    for at_once in (64, 1):
        cfg = kto.Config(train_data='-', batch_size=64, grad_accum=64 // at_once)
        got = torch.cat(answer_logp(model, [Row(p, [r], {}) for p, r in rows], cfg, CPU)).tolist()
        assert got == pytest.approx([alone(model, *row) for row in rows], abs=1e-4)

def test_what_is_logged():
    assert describe([1.0, 0.5, -2.0], [1.0, 0.0, 1.0]) == by_hand(dict(
        desirable_reward=-0.5, undesirable_reward=0.5, margin=-1.0))
    # what there is no answer for is not 0: it is not there
    assert describe([1.0], [1.0]) == dict(desirable_reward=1.0)
    assert describe([1.0], [0.0]) == dict(undesirable_reward=1.0) and describe([], []) == {}

def test_a_run_without_bad_answers(tmp_path, sft_model, capsys):
    data = records(tmp_path / 'good.jsonl', [dict(prompt=r['prompt'], response=r['chosen'], label=True)
                                             for r in COMPARISONS])
    log = run(kto, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, batch_size=4,
              max_steps=1)
    assert set(log[0]) == {'step', 'time', 'val_loss', 'val_kl', 'val_desirable_reward'}
    assert set(log[1]) == {'step', 'time', 'loss', 'kl', 'desirable_reward', 'lr', 'grad_norm'}
    assert 'loss=0.500' in capsys.readouterr().err # the bar, without a margin

# ---------------------------------------------------------------------------------------------------------------------
# records

def test_rankings_taken_apart(tmp_path):
    """Beats more than it is beaten by: good. The middle one of three, and answers that all tie, are left out."""
    rows = [dict(prompt='a', responses=['x', 'y', 'z'], ranks=[1, 0, 2]),
            dict(prompt='b', responses=['p', 'q', 'r', 's'], ranks=[0, 1, 2, 3]),
            dict(prompt='c', responses=['t', 'u', 'v'], ranks=[0, 0, 1]),
            dict(prompt='d', responses=['w', 'w'], ranks=[0, 0])]
    found = read_unpaired(records(tmp_path / 'r.jsonl', rows))
    assert [(r['prompt'], r['response'], r['label']) for r in found] == [
        ('a', 'y', True), ('a', 'z', False), ('b', 'p', True), ('b', 'q', True), ('b', 'r', False), ('b', 's', False),
        ('c', 't', True), ('c', 'u', True), ('c', 'v', False)]

def test_rows_are_shuffled(tmp_path):
    """A file holds a prompt's good answer beside its bad one: in batches, those of other prompts lie between."""
    rows = [dict(prompt=f"Say {i}", chosen=f"It is {i}.", rejected='No.') for i in range(16)]
    path = records(tmp_path / 'c.jsonl', rows)
    order = lambda: [(row.record['prompt'], row.record['label']) for row in kto.load_data(path, TOK, 64, 'train')]
    in_file = [(row['prompt'], label) for row in rows for label in (True, False)]
    assert sorted(order()) == sorted(in_file) and order() == order() != in_file
    together = sum(a[0] == b[0] for a, b in zip(order(), order()[1:]))
    assert together < 5 # of 16; about 1 by chance

def test_a_file_of_labels_equals_the_comparisons_it_says(tmp_path, sft_model):
    labels = [dict(prompt=r['prompt'], response=r[key], label=key == 'chosen')
              for r in COMPARISONS for key in ('chosen', 'rejected')]
    logs = [run(kto, out_dir=str(tmp_path / name), init_from=sft_model, batch_size=4, max_steps=2,
                train_data=records(tmp_path / f"{name}.jsonl", rows))
            for name, rows in (('a', COMPARISONS), ('b', labels))]
    assert losses(logs[0]) == losses(logs[1])

# ---------------------------------------------------------------------------------------------------------------------
# runs

def test_a_run_starts_at_the_reference_and_learns(tmp_path, sft_model, data):
    """Before the first update r = 0 and z0 = 0: every answer's value is a half of its weight."""
    log = run(kto, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, batch_size=8,
              max_steps=60, lr=0.01, eval_every=30)
    names = {'loss', 'kl', 'desirable_reward', 'undesirable_reward', 'margin'}
    assert set(log[0]) == {'step', 'time'} | {'val_' + name for name in names}
    assert set(log[1]) == {'step', 'time', 'lr', 'grad_norm'} | names
    assert log[0]['val_loss'] == by_hand(0.5) and log[1]['loss'] == by_hand(0.5)
    assert log[1]['kl'] == pytest.approx(0.0, abs=1e-5) and log[1]['margin'] == pytest.approx(0.0, abs=1e-5)
    assert log[-1]['val_loss'] < 0.4
    assert log[-1]['val_desirable_reward'] > 0.1 and log[-1]['val_undesirable_reward'] < -0.1

def test_the_reference_does_not_move(tmp_path, sft_model, data):
    out = str(tmp_path / 'out')
    options = dict(init_from=sft_model, train_data=data, val_data=data, batch_size=8, lr=0.01)
    whole = run(kto, out_dir=str(tmp_path / 'whole'), max_steps=6, **options)
    run(kto, out_dir=out, max_steps=5, **options)
    resumed = run(kto, out_dir=out, max_steps=6, resume=True, **options)
    assert resumed[-1]['val_margin'] == whole[-1]['val_margin'] > 0.01

def test_z0_is_of_answers_to_other_prompts(tmp_path, sft_model, data, monkeypatch):
    """The sixth step's z0, and the held-out one of the model before it, worked out row by row; both reach the loss."""
    out, used = str(tmp_path / 'out'), []
    options = dict(init_from=sft_model, train_data=data, val_data=data, batch_size=17, lr=0.01)
    monkeypatch.setattr(kto, 'kto_loss', lambda *a: (used.append(a[3].item()), kto_loss(*a))[1])
    run(kto, out_dir=out, max_steps=5, **options)
    del used[:-1] # the held-out one is the last
    model, reference = load_policy(out), load_policy(sft_model)
    log = run(kto, out_dir=out, max_steps=6, resume=True, eval_every=5, **options)

    rows = kto.load_data(data, TOK, 64, 'train')
    batch = [rows[i] for i in Batches([len(p) + len(a) for p, (a,), _ in rows], 17, 1).at(5)]
    def answer_to_another(part, i):
        return next(row.answers[0] for row in part[i + 1:] + part[:i] if row.prompt != part[i].prompt)

    mixed_up = [[(part[i].prompt, answer_to_another(part, i)) for i in range(17)] for part in (rows, batch)]
    expected = [sum(alone(model, *row) - alone(reference, *row) for row in part) / 17 for part in mixed_up]
    assert min(expected) > 0.01 # not at the clamp
    assert used[:2] == pytest.approx(expected, abs=1e-4)
    kl = next(line['kl'] for line in log if line['step'] == 6 and 'kl' in line)
    val_kl = [line['val_kl'] for line in log if line['step'] == 5 and 'val_kl' in line][-1]
    assert [val_kl, kl] == pytest.approx(expected, abs=1e-4)

def test_the_weights_reach_the_loss(tmp_path, sft_model, data):
    """At the start each value is half its weight. RANKINGS are 9 good answers, 8 bad ones and 3 in the middle."""
    log = run(kto, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, batch_size=2,
              max_steps=1, eval_every=1, desirable_weight=3.0, undesirable_weight=0.0)
    assert log[0]['val_loss'] == by_hand(0.794118) # 3 * 9 / 17 / 2

@pytest.mark.slow
def test_micro_batches_and_processes_share_one_z0(tmp_path, sft_model, data):
    """One more step from the same checkpoint, where z0 is above 0: whole, in four parts, by two processes."""
    options = dict(init_from=sft_model, train_data=data, batch_size=8, lr=0.01, beta=0.5, undesirable_weight=0.0)
    out = {name: str(tmp_path / name) for name in ('whole', 'parts', 'processes')}
    run(kto, out_dir=out['whole'], max_steps=3, **options)
    shutil.copytree(out['whole'], out['parts'])
    shutil.copytree(out['whole'], out['processes'])
    options |= dict(max_steps=4, resume=True)
    lines = [run(kto, out_dir=out['whole'], **options)[-1]]
    lines += [run(kto, out_dir=out['parts'], grad_accum=4, **options)[-1]]
    argv = [f"--{k}={v}" for k, v in (FAST | options | dict(out_dir=out['processes'])).items()]
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           os.path.join(ROOT, 'kto.py'), *argv], env=os.environ | dict(OMP_NUM_THREADS='1'),
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines += [read_log(os.path.join(out['processes'], 'log.jsonl'))[-1]]
    whole, parts, processes = losses(lines)
    assert whole['step'] == 4 and whole['kl'] > 0.1
    assert whole == pytest.approx(parts, abs=1e-4) and whole == pytest.approx(processes, abs=1e-4)
