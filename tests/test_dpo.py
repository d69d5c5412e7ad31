"""dpo.py: the losses and the logged pair metrics by hand, pairs, the reference. test_stages.py has the rest."""
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import dpo
from common.batches import Row
from dpo import dpo_loss, hinge_loss, ipo_loss, orpo_loss, pair_loss, reference_logp, simpo_loss
from model import GPT
from tiny import COMPARISONS, by_hand, has_checkpoint, launch, records, run

def T(values):
    return torch.tensor(values, requires_grad=True)

# ---------------------------------------------------------------------------------------------------------------------
# the losses; -log sigmoid(x) = log(1 + e^-x): 1 -> 0.313262, -1 -> 1.313262, 0.5 -> 0.474077, -0.5 -> 0.974077

def test_dpo_loss_by_hand():
    # log-ratios: chosen +1 and -2, rejected -1 and 0; h = 0.5 * 2 = 1 and 0.5 * -2 = -1
    chosen, rejected, ref = T([-1., -4.]), T([-3., -2.]), torch.tensor([-2., -2.])
    loss, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, ref, ref, beta=0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.813262) # (0.313262 + 1.313262) / 2
    assert chosen_rewards.tolist() == [0.5, -1.0] and rejected_rewards.tolist() == [-0.5, 0.0]
    assert not (chosen_rewards.requires_grad or rejected_rewards.requires_grad)
    # beta sigmoid(-h) / 2: the pair that is ordered wrongly pulls harder; chosen up, rejected down
    assert chosen.grad.tolist() == by_hand([-0.067235, -0.182765])
    assert rejected.grad.tolist() == by_hand([0.067235, 0.182765])

def test_dpo_with_each_reference():
    # chosen -1 - -3 = 2, rejected -2 - -1 = -1: h = 0.1 * 3 = 0.3, log(1 + e^-0.3) = 0.554355
    loss, chosen, rejected = dpo_loss(T([-1.]), T([-2.]), torch.tensor([-3.]), torch.tensor([-1.]), beta=0.1)
    assert loss.item() == by_hand(0.554355) and (chosen.item(), rejected.item()) == by_hand((0.2, -0.1))

def test_label_smoothing_by_hand():
    ref = torch.tensor([-2.])
    chosen, rejected = T([-1.]), T([-3.])
    loss, *_ = dpo_loss(chosen, rejected, ref, ref, 0.5, label_smoothing=0.1)
    loss.backward()
    assert loss.item() == by_hand(0.413262) # h = 1: 0.9 * 0.313262 + 0.1 * 1.313262
    # 0.5 * (-0.9 sigmoid(-1) + 0.1 sigmoid(1)) = 0.5 * (-0.242047 + 0.073106)
    assert (chosen.grad.item(), rejected.grad.item()) == by_hand((-0.084471, 0.084471))
    # beyond h = log(0.9 / 0.1) = 2.197 the pair is trusted too much already: h = 4 is pushed back
    chosen, rejected = T([2.]), T([-6.])
    dpo_loss(chosen, rejected, ref, ref, 0.5, label_smoothing=0.1)[0].backward()
    # 0.5 * (-0.9 * 0.017986 + 0.1 * 0.982014)
    assert (chosen.grad.item(), rejected.grad.item()) == by_hand((0.041007, -0.041007))

def test_ipo_loss_by_hand():
    # the log-ratios of above: h = 2 and -2, target 1 / (2 * 0.5) = 1: (1 + 9) / 2
    chosen, rejected, ref = T([-1., -4.]), T([-3., -2.]), torch.tensor([-2., -2.])
    loss, chosen_rewards, rejected_rewards = ipo_loss(chosen, rejected, ref, ref, beta=0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(5.0)
    assert chosen_rewards.tolist() == [0.5, -1.0] and rejected_rewards.tolist() == [-0.5, 0.0]
    assert not (chosen_rewards.requires_grad or rejected_rewards.requires_grad)
    assert chosen.grad.tolist() == by_hand([1.0, -3.0]) # 2 (h - 1) / 2: beyond the target it is pulled back
    assert rejected.grad.tolist() == by_hand([-1.0, 3.0])

def test_hinge_loss_by_hand():
    # log-ratios: chosen 1, -2 and 6, rejected -1, 0 and -1; h = 0.25 * (2, -2, 7): (0.5 + 1.5 + 0) / 3
    chosen, rejected, ref = T([-1., -4., 4.]), T([-3., -2., -3.]), torch.tensor([-2., -2., -2.])
    loss, chosen_rewards, rejected_rewards = hinge_loss(chosen, rejected, ref, ref, beta=0.25)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.666667)
    assert chosen_rewards.tolist() == [0.25, -0.5, 1.5] and rejected_rewards.tolist() == [-0.25, 0.0, -0.25]
    assert not (chosen_rewards.requires_grad or rejected_rewards.requires_grad)
    assert chosen.grad.tolist() == by_hand([-0.083333, -0.083333, 0.0]) # beta / 3; beyond the margin nothing pulls
    assert rejected.grad.tolist() == by_hand([0.083333, 0.083333, 0.0])
    # chosen -1 - -3 = 2, rejected -2 - -1 = -1: h = 0.1 * 3
    assert hinge_loss(T([-1.]), T([-2.]), torch.tensor([-3.]), torch.tensor([-1.]), 0.1)[0].item() == by_hand(0.7)

def test_simpo_loss_by_hand():
    # h = 2 * 0.5 - 0.5 = 0.5 and 2 * -1 - 0.5 = -2.5: log(1 + e^-0.5) = 0.474077, log(1 + e^2.5) = 2.578890
    chosen, rejected = T([-1., -2.]), T([-1.5, -1.])
    loss, chosen_rewards, rejected_rewards = simpo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(1.526483)
    assert chosen_rewards.tolist() == [-2.0, -4.0] and rejected_rewards.tolist() == [-3.0, -2.0]
    assert not (chosen_rewards.requires_grad or rejected_rewards.requires_grad)
    assert chosen.grad.tolist() == by_hand([-0.377541, -0.924142]) # beta sigmoid(-h) / 2
    assert rejected.grad.tolist() == by_hand([0.377541, 0.924142])

def test_orpo_loss_by_hand():
    # chosen P = 1/2: odds 1; rejected P = 1/5: odds 1/4; log 2 + 0.1 * log(1 + 1/4) = 0.693147 + 0.1 * 0.223144
    chosen, rejected = T([-0.69314718]), T([-1.60943791])
    loss, chosen_odds, rejected_odds = orpo_loss(chosen, rejected, beta=0.1)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.715461)
    assert (chosen_odds.item(), rejected_odds.item()) == by_hand((0.0, -1.386294))
    assert not (chosen_odds.requires_grad or rejected_odds.requires_grad)
    # d log odds / d pi = 1 / (1 - P); sigmoid(-log 4) = 1/5: -1 - 0.1 * 1/5 * 2 and 0.1 * 1/5 * 5/4
    assert (chosen.grad.item(), rejected.grad.item()) == by_hand((-1.04, 0.025))

@pytest.mark.parametrize('pi', [([0.], [-1.]), ([-1.], [0.]), ([0.], [0.]), ([-1.], [-200.])])
def test_orpo_of_certain_and_of_impossible_answers_is_a_number(pi):
    chosen, rejected = map(T, pi)
    loss, *_ = orpo_loss(chosen, rejected, beta=0.1)
    loss.backward()
    assert all(torch.isfinite(x).all() for x in (loss, chosen.grad, rejected.grad))

@pytest.mark.parametrize('loss, expected', [('ipo', [-1.0, -2.0]), ('simpo', [-1.0, -2.0]), ('orpo', [-1.0, -2.0]),
                                            ('dpo', [-2.0, -6.0]), ('hinge', [-2.0, -6.0])])
def test_which_losses_take_means_and_which_sums(monkeypatch, loss, expected):
    taken, function = [], getattr(dpo, f"{loss}_loss")
    monkeypatch.setattr(dpo, f"{loss}_loss", lambda *a: (taken.append([x.item() for x in a[:2]]), function(*a))[1])
    answers = SimpleNamespace(sizes=torch.tensor([2, 3]), pairs=torch.tensor([[0, 1]]))
    pair_loss(torch.tensor([-2., -6.]), torch.zeros(2), answers, dpo.Config(train_data='-', loss=loss))
    assert taken == [expected]

def test_pair_metrics_by_hand():
    # three answers; 0 is better than 1, which is better than 2
    answers = SimpleNamespace(sizes=torch.tensor([1, 2, 4]), pairs=torch.tensor([[0, 1], [1, 2]]))
    logp, ref = T([-2., -6., -4.]), torch.tensor([-3., -5., -4.])
    loss, metrics = pair_loss(logp, ref, answers, SimpleNamespace(loss='dpo', beta=0.5, label_smoothing=0.0))
    # implicit rewards 0.5 * (1, -1, 0) = 0.5, -0.5, 0; h = 1 and -0.5: (0.313262 + 0.974077) / 2
    assert loss.item() == by_hand(0.643669)
    assert {k: v.item() for k, v in metrics.items()} == by_hand(dict(
        accuracy=0.5, margin=0.25, chosen_reward=0.0, rejected_reward=-0.25, chosen_logp=-4.0, rejected_logp=-5.0))
    assert not any(v.requires_grad for v in metrics.values())
    loss.backward()
    # pair 0: 0.25 sigmoid(-1) = 0.067235; pair 1: 0.25 sigmoid(0.5) = 0.155615; answer 1 is in both
    assert logp.grad.tolist() == by_hand([-0.067235, -0.088380, 0.155615])

    loss, metrics = pair_loss(logp, ref, answers, SimpleNamespace(loss='ipo', beta=0.5))
    # per token: 1 / 1, -1 / 2, 0 / 4; h = 1.5 and -0.5, target 1: (0.25 + 2.25) / 2
    assert loss.item() == by_hand(1.25)
    assert (metrics['margin'].item(), metrics['chosen_logp'].item()) == by_hand((0.25, -4.0)) # log-probs are sums

    loss, metrics = pair_loss(logp, ref, answers, SimpleNamespace(loss='hinge', beta=0.5))
    assert loss.item() == by_hand(0.75) # h = 1 and -0.5 as above: (0 + 1.5) / 2

    # without a reference; per token -2, -3 and -1
    nothing = torch.full((3,), float('nan'))
    loss, metrics = pair_loss(logp, nothing, answers, SimpleNamespace(loss='simpo', beta=1.0, simpo_margin=0.5))
    assert loss.item() == by_hand(1.526483) # h = 1 - 0.5 and -2 - 0.5, as in test_simpo_loss_by_hand
    assert {k: v.item() for k, v in metrics.items()} == by_hand(dict(
        accuracy=0.5, margin=-0.5, chosen_reward=-2.5, rejected_reward=-2.0, chosen_logp=-4.0, rejected_logp=-5.0))
    # log odds -2 - log(1 - e^-2) = -1.854587, -3 - log(1 - e^-3) = -2.948931, -1 - log(1 - e^-1) = -0.541325:
    # differences 1.094344 and -2.407606; (2 + 3) / 2 + 0.5 * (0.288751 + 2.493812) / 2
    loss, metrics = pair_loss(logp, nothing, answers, SimpleNamespace(loss='orpo', beta=0.5))
    assert loss.item() == by_hand(3.195641) and metrics['margin'].item() == by_hand(-0.656631)

def test_accuracy_of_ties_by_hand():
    # rewards 0.5 * (0, 2, 2 + 4e-7): the first beats none, the last two are equal within rounding: 0, 1, ½
    answers = SimpleNamespace(sizes=torch.tensor([1, 1, 1]), pairs=torch.tensor([[0, 1], [2, 0], [2, 1]]))
    pi = torch.tensor([-1.0, 1.0, 1.0000004], dtype=torch.float64)
    cfg = SimpleNamespace(loss='dpo', beta=0.5, label_smoothing=0.0)
    _, metrics = pair_loss(pi, torch.full((3,), -1.0), answers, cfg)
    assert metrics['accuracy'].item() == 0.5

# ---------------------------------------------------------------------------------------------------------------------
# runs

@pytest.mark.parametrize('loss, first', [('dpo', 0.693147), ('ipo', 25.0), ('hinge', 1.0)])
def test_a_run_starts_at_the_reference_and_learns(tmp_path, sft_model, data, loss, first):
    """h = 0 before the first update: log 2, (1 / (2 * 0.1))^2 = 25, or the whole margin."""
    log = run(dpo, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, loss=loss,
              batch_size=8, max_steps=40, log_every=1, lr=0.01, eval_every=20)
    names = ['loss', 'accuracy', 'margin', 'chosen_reward', 'rejected_reward', 'chosen_logp', 'rejected_logp']
    assert set(log[0]) == {'step', 'time'} | {'val_' + name for name in names}
    assert set(log[1]) == {'step', 'time', 'lr', 'grad_norm'} | set(names)
    assert log[0]['val_loss'] == pytest.approx(first, abs=1e-5) and log[1]['loss'] == pytest.approx(first, abs=1e-5)
    assert log[1]['margin'] == pytest.approx(0.0, abs=1e-5)
    assert log[0]['val_accuracy'] == log[1]['accuracy'] == 0.5 # all rewards are 0 within rounding: half a point each
    assert log[-1]['val_loss'] < first - 0.1 and log[-1]['val_accuracy'] > 0.9

@pytest.mark.parametrize('loss, options', [('simpo', dict(beta=2.0, simpo_margin=0.5)), ('orpo', dict(beta=1.0))])
def test_losses_without_a_reference_learn(tmp_path, sft_model, data, monkeypatch, loss, options):
    """One pass over each batch and two over the held-out rows: none for a reference."""
    passes, logp = [], GPT.logp
    monkeypatch.setattr(GPT, 'logp', lambda *a: (passes.append(1), logp(*a))[1])
    log = run(dpo, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, loss=loss,
              batch_size=8, max_steps=40, lr=0.01, **options)
    assert len(passes) == 42
    assert log[-1]['val_loss'] < log[0]['val_loss'] - 0.1 and log[-1]['val_accuracy'] > 0.9

def test_zeros_stand_in_for_no_reference():
    rows = [Row([1], [[2], [3]], {}), Row([1], [[2], [3], [4]], {})]
    for loss in ('simpo', 'orpo'): # no model, no device: nothing is computed
        ref = reference_logp(None, rows, SimpleNamespace(loss=loss), None, 'train')
        assert [r.tolist() for r in ref] == [[0.0, 0.0], [0.0, 0.0, 0.0]]

def test_the_reference_does_not_move(tmp_path, sft_model, data):
    """The margins of an epoch later are against the model that training started from, also after going on."""
    out = str(tmp_path / 'out')
    options = dict(init_from=sft_model, train_data=data, val_data=data, batch_size=8, lr=0.01)
    whole = run(dpo, out_dir=str(tmp_path / 'whole'), max_steps=6, **options)
    run(dpo, out_dir=out, max_steps=5, **options)
    resumed = run(dpo, out_dir=out, max_steps=6, resume=True, **options)
    assert resumed[-1]['val_margin'] == whole[-1]['val_margin'] > 0.01

def test_comparisons_are_rankings_of_two(tmp_path, sft_model):
    rows = [dict(prompt=r['prompt'], responses=[r['rejected'], r['chosen']], ranks=[1, 0]) for r in COMPARISONS]
    logs = [run(dpo, out_dir=str(tmp_path / name), init_from=sft_model, batch_size=4, max_steps=2,
                train_data=records(tmp_path / f"{name}.jsonl", data))
            for name, data in (('a', COMPARISONS), ('b', rows))]
    for a, b in zip(*logs, strict=True):
        assert a['loss'] == by_hand(b['loss']) and a['chosen_logp'] == pytest.approx(b['chosen_logp'], abs=1e-4)

def test_all_pairs_of_a_prompt_weigh_the_same(tmp_path, sft_model, data, monkeypatch):
    """17 pairs in all, whichever prompt they are of: each pulls its better answer by beta sigmoid(0) / 17."""
    pulls = []

    def noting(logp, ref_logp, answers, cfg):
        logp.retain_grad()
        pulls.append((logp, answers.pairs))
        return pair_loss(logp, ref_logp, answers, cfg)

    monkeypatch.setattr(dpo, 'pair_loss', noting)
    run(dpo, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, batch_size=8, max_steps=1, beta=1.7)
    (logp, pairs), = pulls
    assert len(pairs) == 17
    wins = [(pairs[:, 0] == n).sum().item() - (pairs[:, 1] == n).sum().item() for n in range(len(logp))]
    assert logp.grad.tolist() == by_hand([-0.05 * n for n in wins]) # 1.7 * 0.5 / 17

def test_the_reference_reads_only_the_rows_that_are_trained_on(tmp_path, sft_model, data, monkeypatch):
    read, logp = [], GPT.logp
    monkeypatch.setattr(GPT, 'logp', lambda self, idx, mask, groups: (
        read.append(len(groups)), logp(self, idx, mask, groups))[1])
    run(dpo, init_from=sft_model, train_data=data, out_dir=str(tmp_path / 'out'), max_steps=1, batch_size=2)
    assert sum(read) == 2 + 2 # once by the reference, once by the policy; the file has more
    assert read.count(2) == 2 and len(open(data).readlines()) > 2

def test_a_signal_ends_the_reference_at_once(tmp_path, sft_model, data, monkeypatch):
    """There is nothing to save yet, and a large file takes long."""
    read, logp = [], GPT.logp

    def reading(*args):
        read.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return logp(*args)

    monkeypatch.setattr(GPT, 'logp', reading)
    assert launch(monkeypatch, dpo, init_from=sft_model, train_data=data, out_dir=str(tmp_path / 'out'),
                  batch_size=2) == 143
    assert len(read) == 1 and not has_checkpoint(str(tmp_path / 'out'))
