"""rrhf.py: the loss and the logged metrics by hand, a run's gradient, scores or ranks. test_stages.py has the rest."""
import math
from types import SimpleNamespace

import pytest
import torch

import rrhf
from common.batches import Row, collate, collate_answers, encode_demonstrations
from common.tokens import prompt_ids, response_ids
from model import GPT, GPTConfig
from rrhf import batch_loss, rrhf_loss
from sft import sft_loss
from tiny import COMPARISONS, RANKINGS, TOK, by_hand, gradients, records, run

NAN = float('nan')

def CFG(**more):
    return rrhf.Config(train_data='-', **more)

def T(values, requires_grad=False):
    return torch.tensor(values, requires_grad=requires_grad)

# ---------------------------------------------------------------------------------------------------------------------
# the loss

@pytest.mark.parametrize('p, scores, loss, grad', [
    # the wrong way round: 1 over 2 by 1, 1 over 3 by 2, 2 over 3 by 1; each pair pulls by 1 whatever its distance
    ([-1., -2., -3.], [0., 1., 2.], 4.0, [2.0, 0.0, -2.0]),
    ([-1., -2., -3.], [2., 1., 0.], 0.0, [0.0, 0.0, 0.0]), # in order: nothing, there is no margin
    ([-1., -.5, -2.], [1., 3., 3.], 1.0, [1.0, 0.0, -1.0]), # the tie of the last two gives no term; -1 over -2
    ([-1., -2., -3.], [5., 5., 5.], 0.0, [0.0, 0.0, 0.0]),
    ([-2., -2.5], [0.1, 0.2], 0.5, [1.0, -1.0]), # how far apart the scores are does not count
])
def test_rrhf_loss_by_hand(p, scores, loss, grad):
    p = T([p], True)
    out = rrhf_loss(p, T([scores]))
    out.backward()
    assert out.shape == () and out.item() == by_hand(loss) and p.grad.tolist() == [by_hand(grad)]

@pytest.mark.parametrize('absurd', [1e6, -7e8, math.inf, NAN])
def test_rrhf_loss_is_a_mean_over_prompts_and_blind_to_answers_that_are_not_there(absurd):
    p = T([[-1., -2., -3.], [-2., -2.5, absurd]], True)
    out = rrhf_loss(p, T([[0., 1., 2.], [0., 1., NAN]]))
    out.backward()
    assert out.item() == by_hand(2.25) # (4 + 0.5) / 2
    assert p.grad.tolist() == [by_hand([1.0, 0.0, -1.0]), by_hand([0.5, -0.5, 0.0])]

def test_batch_loss_by_hand():
    # answers of 2, 4, 1 tokens and of 1, 2; their mean log-probabilities -1 -0.5 -3 and -2 -1
    rows = [Row([7], [[1, 1], [1, 1, 1, 1], [1]], dict(ranks=[0, 1, 1])),
            Row([7], [[1], [1, 1]], dict(ranks=[0, 0], scores=[-0.75, -1.5]))] # scores come before ranks
    answers = SimpleNamespace(sizes=T([2, 4, 1, 1, 2]))
    logp = T([-2., -2., -3., -2., -2.], True)
    loss, metrics = batch_loss(logp, rows, answers, CFG(rank_coef=4.0))
    loss.backward()
    # prompt 1: its best, answer 1, is below answer 2 by 0.5; prompt 2: its best is below the other one by 1
    assert metrics['rank_loss'].item() == by_hand(0.75)
    assert metrics['sft_loss'].item() == by_hand(1.5) # (1 + 2) / 2
    assert loss.item() == by_hand(4.5) # 4 * 0.75 + 1.5
    assert metrics['accuracy'].item() == by_hand(0.25) # half of prompt 1's pairs, none of prompt 2's
    # d/dp: answer 1 is best, -1/2, and too unlikely, -4/2: -2.5 for 2 tokens; answer 2 +4/2 for 4 tokens; …
    assert logp.grad.tolist() == by_hand([-1.25, 0.5, 0.0, -2.5, 1.0])

def test_accuracy_of_ties_by_hand():
    # -1 and -1 - 4e-7 are equal within rounding: ½ and 1 of the best answer's two pairs
    rows = [Row([7], [[1], [1], [1]], dict(ranks=[0, 1, 1]))]
    logp = torch.tensor([-1.0, -1.0000004, -3.0], dtype=torch.float64)
    _, metrics = batch_loss(logp, rows, SimpleNamespace(sizes=T([1, 1, 1])), CFG())
    assert metrics['accuracy'].item() == 0.75

def test_the_first_of_equally_good_answers_is_learnt():
    rows = [Row([7], [[1], [1], [1]], dict(ranks=[1, 0, 0]))]
    logp = T([-3., -1., -2.], True)
    loss, _ = batch_loss(logp, rows, SimpleNamespace(sizes=T([1, 1, 1])), CFG(rank_coef=1.0))
    loss.backward()
    assert loss.item() == by_hand(1.0) and logp.grad.tolist() == by_hand([0.0, -1.0, 0.0])

def test_sft_is_rrhf_without_the_ranking_part():
    """With rank_coef 0 the loss and its gradients are those of sft.py on the prompt's best answer alone."""
    texts, best = ['No.', 'Yes, it is.', 'Well'], 1
    row = Row(prompt_ids(TOK, 'Hi'), [response_ids(TOK, text) for text in texts], dict(ranks=[1, 0, 2]))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=TOK.n_vocab, n_layer=1, n_head=2, n_embd=16))

    answers = collate_answers([row])
    logp = model.logp(answers.idx, answers.mask, answers.groups).sum(1) # (3,)
    loss, _ = batch_loss(logp, [row], answers, CFG(rank_coef=0.0))
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    idx, mask = collate(encode_demonstrations(TOK, [dict(prompt='Hi', response=texts[best])], 64))
    expected = sft_loss(model.logp(idx, mask), mask)
    expected.backward()
    assert loss.item() == by_hand(expected.item()) and expected > 1
    for a, p in zip(found, model.parameters()):
        assert torch.allclose(a, p.grad, atol=1e-6)

# ---------------------------------------------------------------------------------------------------------------------
# runs

def test_the_gradient_of_a_run_by_one_answer_at_a_time(tmp_path, sft_model, data, monkeypatch):
    """The whole loss of all eight prompts, each answer on its own row, pair by pair."""
    (grads,), log = gradients(monkeypatch, rrhf, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data,
                              batch_size=8, max_steps=1, rank_coef=3.0)
    model, total = GPT.from_pretrained(sft_model), 0.0
    for r in RANKINGS:
        prompt, p = prompt_ids(TOK, r['prompt']), []
        for response in r['responses']:
            ids = prompt + response_ids(TOK, response)
            logp = model(T([ids]))[0].log_softmax(-1)[0]
            p.append(sum(logp[t - 1, ids[t]] for t in range(len(prompt), len(ids))) / (len(ids) - len(prompt)))
        total = total - p[r['ranks'].index(0)] / 8
        for i, worse in enumerate(r['ranks']):
            for j, better in enumerate(r['ranks']):
                if better < worse and p[i] > p[j]:
                    total = total + 3.0 * (p[i] - p[j]) / 8
    assert log[0]['loss'] == pytest.approx(total.item(), abs=1e-5)
    for g, e in zip(grads, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-5)

def test_a_run_learns_the_order(tmp_path, sft_model, data):
    log = run(rrhf, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, val_data=data, batch_size=8,
              max_steps=40, lr=0.01, eval_every=20)
    names = ['loss', 'rank_loss', 'sft_loss', 'accuracy']
    assert set(log[0]) == {'step', 'time'} | {'val_' + name for name in names}
    assert set(log[1]) == {'step', 'time', 'lr', 'grad_norm'} | set(names)
    assert [line['step'] for line in log if 'val_loss' in line] == [0, 20, 40]
    for name in names: # before the first update the training batch is the held-out set
        assert log[0]['val_' + name] == pytest.approx(log[1][name], abs=1e-5)
    assert log[-1]['val_accuracy'] > 0.9 and log[-1]['val_loss'] < log[0]['val_loss'] - 0.5

def test_scores_come_before_ranks(tmp_path, sft_model):
    """Scores that contradict the ranks win; use_scores=False, and records without scores, go by the ranks."""
    turned = [r | dict(scores=[float(k) for k in r['ranks']]) for r in RANKINGS] # the worst rank scores best
    reverse = [r | dict(ranks=[max(r['ranks']) - k for k in r['ranks']]) for r in RANKINGS]
    options = dict(init_from=sft_model, batch_size=8, max_steps=1)
    first = lambda name, rows, **more: run(rrhf, out_dir=str(tmp_path / name), **options | more,
                                           train_data=records(tmp_path / f"{name}.jsonl", rows))[0]['loss']
    by_ranks = first('a', RANKINGS)
    assert first('b', turned) == by_hand(first('c', reverse)) != by_ranks
    assert first('d', turned, use_scores=False) == by_hand(by_ranks)

def test_comparisons_are_rankings_of_two(tmp_path, sft_model):
    rows = [dict(prompt=r['prompt'], responses=[r['rejected'], r['chosen']], ranks=[1, 0]) for r in COMPARISONS]
    logs = [run(rrhf, out_dir=str(tmp_path / name), init_from=sft_model, batch_size=4, max_steps=2,
                train_data=records(tmp_path / f"{name}.jsonl", data))
            for name, data in (('a', COMPARISONS), ('b', rows))]
    for a, b in zip(*logs, strict=True):
        assert a['loss'] == by_hand(b['loss']) and a['accuracy'] == by_hand(b['accuracy'])
