"""common/rollout.py by hand: masks typed out, padding that holds absurd numbers, an enumerated KL."""
import math
from types import SimpleNamespace

import pytest
import torch

from common.batches import Row
from common.rollout import (beats, check_same_vocabulary, describe, describe_critic, frozen, frozen_rewards,
                            in_chunks, kl_k1, kl_k3, masked_mean, micro_batches, minibatches, pack,
                            pair_agreement, ratio_stats, sample_answers, sample_rollouts, score_packed, whiten)
from common.tokens import Tokenizer, prompt_ids, response_ids
from feedback.scores import score_answers, score_records
from model import GPT
from models import all_values, full_logp, random_model
from tiny import RUN, TOK, by_hand, checkpoint, one_line

EOS = 9
CFG = lambda **more: SimpleNamespace(**dict(n_answers=1, grad_accum=1) | more)

# ---------------------------------------------------------------------------------------------------------------------
# masked statistics

X = torch.tensor([[1., 2., -1e6], [777., 6., 3.]])
MASK = torch.tensor([[1., 1., 0.], [0., 1., 1.]])

def test_masked_mean_by_hand():
    assert masked_mean(X, MASK).item() == by_hand(3.0) # (1 + 2 + 6 + 3) / 4
    assert masked_mean(X, torch.zeros(2, 3)).item() == 0.0

def test_masked_mean_gradient_by_hand():
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    assert x.grad.tolist() == [[0.25, 0.25, 0.0], [0.0, 0.25, 0.25]]

def test_whiten_by_hand():
    # mean 3, deviations -2 -1 3 0, variance (4 + 1 + 9 + 0) / 4 = 3.5, root 1.870829
    white = whiten(X, MASK)
    assert white.flatten().tolist() == by_hand([-1.069045, -0.534522, 0.0, 0.0, 1.603567, 0.0])
    assert white.sum().item() == by_hand(0.0) # masked mean 0 ...
    assert (white ** 2).sum().item() / 4 == by_hand(1.0) # ... and variance 1

def test_whiten_of_equal_numbers_is_zero():
    assert whiten(torch.full((2, 3), 5.0), MASK).tolist() == [[0.0] * 3] * 2

# ---------------------------------------------------------------------------------------------------------------------
# KL: pi = (.7, .2, .1), ref = (.4, .4, .2)
#     KL(pi || ref) = .7 ln 1.75 + .2 ln .5 + .1 ln .5 = .391731 - .207944 = 0.183787, enumerated, no sampling noise

PI, REF = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])

@pytest.mark.parametrize('estimator', [kl_k1, kl_k3])
def test_the_expected_estimate_is_the_kl(estimator):
    assert (PI * estimator(PI.log(), REF.log())).sum().item() == by_hand(0.183787)
    # the other way round: .4 ln(4/7) + .6 ln 2 = -.223846 + .415888 = 0.192042
    assert (REF * estimator(REF.log(), PI.log())).sum().item() == by_hand(0.192042)

def test_kl_estimates_by_hand():
    assert kl_k1(PI.log(), REF.log()).tolist() == by_hand([0.559616, -0.693147, -0.693147]) # ln 1.75, ln .5, ln .5
    # q/p - 1 - ln q/p: 4/7 - 1 + .559616 = .131044; 2 - 1 - .693147 = .306853; never negative, whatever the sign of k1
    assert kl_k3(PI.log(), REF.log()).tolist() == by_hand([0.131044, 0.306853, 0.306853])
    assert kl_k3(PI.log(), PI.log()).tolist() == kl_k1(PI.log(), PI.log()).tolist() == [0.0] * 3

def test_kl_gradients_by_hand():
    logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    ref_logp = torch.tensor([0.25, 0.5]).log()
    # d/dlogp (q/p - 1 - ln q/p) = 1 - q/p: 1 - 1/2, 1 - 2
    assert torch.autograd.grad(kl_k3(logp, ref_logp).sum(), logp)[0].tolist() == by_hand([0.5, -1.0])
    assert torch.autograd.grad(kl_k1(logp, ref_logp).sum(), logp)[0].tolist() == by_hand([1.0, 1.0])

def test_k3_as_a_loss_has_the_gradient_of_the_other_kl():
    """On policy k3's mean is KL(pi || ref), but the mean of its gradient is that of KL(ref || pi).

    By logits z: d KL(ref || pi) / dz = pi - ref, and d KL(pi || ref) / dz = pi (log(pi / ref) - KL(pi || ref)).
    """
    def mean_gradient(loss): # the mean over tokens sampled from pi; the sampling itself has no gradient
        z = PI.log().requires_grad_()
        return torch.autograd.grad((PI * loss(z.log_softmax(0))).sum(), z)[0].tolist()

    assert mean_gradient(lambda logp: kl_k3(logp, REF.log())) == by_hand([0.3, -0.2, -0.1])
    # as a loss k1 has none; as a reward, a number times log pi, it has that of KL(pi || ref):
    # .7 (.559616 - .183787), .2 (-.693147 - .183787), .1 (the same)
    assert mean_gradient(lambda logp: kl_k1(logp, REF.log())) == by_hand([0.0, 0.0, 0.0])
    assert mean_gradient(lambda logp: kl_k1(logp, REF.log()).detach() * logp) == by_hand(
        [0.263080, -0.175387, -0.087693])

# ---------------------------------------------------------------------------------------------------------------------
# what an update is made of

def test_ratio_stats_by_hand():
    logp = torch.log(torch.tensor([[1.5, 1.1, 3.0], [0.4, 5.0, 5.0]])) # the last column and the row's end are padding
    mask = torch.tensor([[1., 1., 0.], [1., 0., 0.]])
    far, stats = ratio_stats(logp * mask, torch.zeros(2, 3), mask, 0.2)
    assert far.item() == by_hand(0.6) # 1 - 0.4
    assert stats['ratio'].item() == by_hand(1.0) # (1.5 + 1.1 + 0.4) / 3
    assert stats['clipfrac'].item() == by_hand(0.666667) # 1.1 alone is within 0.8 to 1.2
    # k3 = ratio - 1 - log(ratio): 0.5 - 0.405465, 0.1 - 0.095310, -0.6 + 0.916291; their mean
    assert stats['approx_kl'].item() == by_hand(0.138505)

def test_micro_batches_by_hand():
    lengths = torch.tensor([5, 3, 4, 2])
    mask = torch.tensor([[0., 0., 1., 1.], [1., 1., 0., 0.], [0., 0., 1., 0.], [1., 0., 0., 0.]])
    batch = dict(idx=torch.arange(20).view(4, 5), mask=mask, x=torch.arange(16).view(4, 4))
    parts = list(micro_batches(batch, lengths, torch.tensor([0, 3, 1]), CFG(grad_accum=2), RUN))
    # rows by length are 3 1 0, in parts of two and one; 1 + 2 and 2 of their 5 tokens; row 2 is not asked for
    assert [share.item() for _, share in parts] == by_hand([0.6, 0.4])
    (first, _), (second, _) = parts
    assert first['idx'].tolist() == [[15, 16, 17], [5, 6, 7]] and first['x'].tolist() == [[12, 13], [4, 5]]
    assert first['mask'].tolist() == [[1, 0], [1, 1]]
    assert second['idx'].tolist() == [[0, 1, 2, 3, 4]] and second['x'].tolist() == [[0, 1, 2, 3]]
    assert [part['groups'].tolist() for part, _ in parts] == [[1, 1], [1]]

@pytest.mark.parametrize('rows, grad_accum, expected, groups', [
    ([2, 3, 0, 1, 4, 5], 2, [[2, 3, 4, 5], [0, 1]], [[2, 2], [2]]), # prompts of 4, 10 and 5 tokens: 9 and 10
    ([2, 3, 0, 1, 4, 5], 3, [[2, 3], [4, 5], [0, 1]], [[2], [2], [2]]),
    ([0, 1, 2, 3], 3, [[2, 3], [0], [1]], [[1, 1], [1], [1]]), # fewer prompts than parts: rows of 2 2 5 5 tokens
    ([0, 1], 2, [[0], [1]], [[1], [1]])])
def test_the_answers_to_a_prompt_stay_together(rows, grad_accum, expected, groups):
    lengths, T = torch.tensor([5, 5, 2, 2, 3, 2]), 5
    batch = dict(idx=torch.arange(6)[:, None].expand(6, T), mask=(torch.arange(1, T) < lengths[:, None]).float())
    parts = list(micro_batches(batch, lengths, torch.tensor(rows), CFG(n_answers=2, grad_accum=grad_accum), RUN))
    assert [part['idx'][:, 0].tolist() for part, _ in parts] == expected
    assert [part['groups'].tolist() for part, _ in parts] == groups
    assert [part['idx'].size(1) for part, _ in parts] == [max(lengths[r].item() for r in part) for part in expected]
    assert sum(share.item() for _, share in parts) == by_hand(1.0)

def test_minibatches_are_shuffled_by_prompt():
    found = [rows.tolist() for rows in minibatches(12, CFG(n_answers=3, epochs=20, minibatches=2))]
    assert len(found) == 40 and all(len(rows) == 6 for rows in found)
    prompts = [rows[i:i + 3] for rows in found for i in (0, 3)]
    assert all(rows[0] % 3 == 0 and rows == [rows[0], rows[0] + 1, rows[0] + 2] for rows in prompts)
    epochs = [found[i] + found[i + 1] for i in range(0, 40, 2)]
    assert all(sorted(rows) == list(range(12)) for rows in epochs) and len({tuple(rows) for rows in epochs}) > 5
    assert sorted(next(minibatches(8, CFG(epochs=1, minibatches=1))).tolist()) == list(range(8))

# ---------------------------------------------------------------------------------------------------------------------
# rollouts

def test_pack_by_hand():
    # the middle prompt holds the EOS id, its answer ends with it; the last answer fills its room and never ends
    rollouts = pack([[1, 2, 3], [5, EOS], [4]], [[6, EOS], [EOS], [7, 8, 7]],
                    [[-0.5, -0.25], [-2.0], [-1.0, -1.5, -3.0]], EOS)
    lengths, (row0, row1, row2) = rollouts.lengths.tolist(), rollouts.idx.tolist()
    assert lengths == [5, 3, 4]
    assert (row0, row1[:3], row2[:4]) == ([1, 2, 3, 6, EOS], [5, EOS, EOS], [4, 7, 8, 7])
    # position t describes token t+1
    assert rollouts.mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]]
    assert rollouts.logp.tolist() == [[0, 0, -0.5, -0.25], [0, -2.0, 0, 0], [-1.0, -1.5, -3.0, 0]]
    assert rollouts.ended.tolist() == [1.0, 1.0, 0.0]
    assert rollouts.idx.dtype == torch.long and rollouts.mask.dtype == rollouts.logp.dtype == torch.float32
    assert rollouts.ends == [[5], [3], [4]]
    as_lists = lambda r: [x.tolist() if isinstance(x, torch.Tensor) else x for x in vars(r).values()]
    assert as_lists(rollouts.to('cpu')) == as_lists(rollouts)

class Scripted:
    """A policy whose answer is the prompt's first token as often as the prompt is long, then EOS; notes its batches."""

    def __init__(self):
        self.batches = []

    def generate_with_logp(self, prompts, max_new_tokens, temperature, eos):
        self.batches.append([len(p) for p in prompts])
        answers = [([p[0]] * len(p) + [eos])[:max_new_tokens] for p in prompts]
        return answers, [[-float(p[0])] * len(a) for p, a in zip(prompts, answers)]

def test_sample_answers_keeps_the_order_of_the_prompts():
    model = Scripted()
    prompts = [[3, 3, 3, 3], [1], [2, 2, 2], [4], [5, 5]]
    answers, logps = sample_answers(model, prompts, SimpleNamespace(eos=EOS), max_new_tokens=4, rows=2)
    assert answers == [[3, 3, 3, 3], [1, EOS], [2, 2, 2, EOS], [4, EOS], [5, 5, EOS]]
    assert logps == [[-3.0] * 4, [-1.0] * 2, [-2.0] * 4, [-4.0] * 2, [-5.0] * 3]
    assert model.batches == [[1, 1], [2, 3], [4]] # like lengths together

def test_a_prompt_is_answered_n_times_in_neighbouring_rows():
    model, records = Scripted(), [dict(prompt='a'), dict(prompt='b')]
    rolls = sample_rollouts(model, [[3, 3], [1]], records, SimpleNamespace(eos=EOS, decode=str),
                            CFG(n_answers=3, max_new_tokens=9))
    assert rolls.idx.tolist() == [[3, 3, 3, 3, EOS]] * 3 + [[1, 1, EOS, 0, 0]] * 3
    assert rolls.K == rolls.to('cpu').K == 3 and rolls.lengths.tolist() == [5] * 3 + [3] * 3
    assert [record for (record, _), in rolls.asked] == [records[0]] * 3 + [records[1]] * 3
    assert pack([[1]], [[2]], [[0.0]], EOS).K == 1

def test_recorded_logp_equals_the_recomputed_one():
    """Sampled, packed, recomputed: a ratio of 1 before the first update."""
    model = random_model()
    prompts = [[1, 2, 3], [4], [EOS, 6], [7, 8, 10, 0, 1]] * 3
    answers, logps = sample_answers(model, prompts, SimpleNamespace(eos=EOS), max_new_tokens=8, rows=5)
    rollouts = pack(prompts, answers, logps, EOS)
    again = frozen(model.logp, rollouts.idx, rollouts.mask, rollouts.lengths, rows=5)
    torch.testing.assert_close(again, rollouts.logp, rtol=0, atol=1e-5)
    assert rollouts.mask.sum().item() == sum(map(len, answers)) # every sampled token counts, EOS included
    assert 0 < rollouts.ended.mean().item() < 1

# ---------------------------------------------------------------------------------------------------------------------
# frozen models

ROWS = [([1, 2, 3], [4, 5, EOS]), ([6], [EOS]), ([7, 7, 7, 7], [8, 10, 0, 1, 2]), ([3, 1], [2, EOS]), ([5], [0, 0, 0])]

@pytest.mark.parametrize('fill', [0, 10])
@pytest.mark.parametrize('rows', [1, 2, 64])
def test_frozen_models_in_chunks_equal_each_row_alone(fill, rows):
    model = random_model(value_head=True, reward_head=True)
    r = pack([p for p, _ in ROWS], [a for _, a in ROWS], [[0.0] * len(a) for _, a in ROWS], EOS)
    for b, length in enumerate(r.lengths.tolist()):
        r.idx[b, length:] = fill
    logp = frozen(model.logp, r.idx, r.mask, r.lengths, rows)
    values = frozen(model.values, r.idx, r.mask, r.lengths, rows)
    rewards = frozen_rewards(model, r.idx, r.lengths, rows)
    scores = score_answers(model, [p for p, _ in ROWS], [a for _, a in ROWS], 'cpu', rows)
    assert not (logp.requires_grad or values.requires_grad or rewards.requires_grad)
    assert logp.shape == values.shape == (5, 8) and rewards.shape == scores.shape == (5,)
    for b, (prompt, answer) in enumerate(ROWS):
        one, P, L = torch.tensor([prompt + answer]), len(prompt), len(prompt) + len(answer)
        expected = torch.zeros(2, 8) # logp and values; 0 in the prompt and after the end
        expected[0, P - 1:L - 1] = full_logp(model(one)[0], one)[0, P - 1:]
        expected[1, P - 1:L - 1] = all_values(model, one)[0, P - 1:L - 1]
        torch.testing.assert_close(torch.stack([logp[b], values[b]]), expected, rtol=0, atol=1e-5)
        reward = model.rewards(one, torch.tensor([L])).item()
        assert [rewards[b].item(), scores[b].item()] == pytest.approx([reward, reward], abs=1e-5)

@pytest.mark.parametrize('rows, expected', [
    (4, [([2, 3, 4, 5], 4, [2, 2]), ([6, 7, 0, 1], 9, [2, 2])]), # the longest answers to the prompts: 9 3 4 8 tokens
    (5, [([2, 3, 4, 5], 4, [2, 2]), ([6, 7, 0, 1], 9, [2, 2])]),
    (1, [([2, 3], 3, [2]), ([4, 5], 4, [2]), ([6, 7], 8, [2]), ([0, 1], 9, [2])])]) # no prompt is torn apart
def test_chunks_of_whole_prompts_by_hand(rows, expected):
    seen = []
    out = in_chunks(lambda c, T, groups: (seen.append((c.tolist(), T, groups.tolist())), 10.0 * c)[1],
                    torch.tensor([9, 2, 3, 3, 4, 1, 1, 8]), rows, torch.zeros(8), K=2)
    assert seen == expected and out.tolist() == [0, 10, 20, 30, 40, 50, 60, 70]

@pytest.mark.parametrize('fill', [0, 10])
def test_frozen_models_share_prompts_and_say_the_same(monkeypatch, fill):
    model = random_model(value_head=True, reward_head=True)
    prompts = [[1, 2, 3, 4, 5]] * 3 + [[6, 7]] * 3
    r = pack(prompts, [[4, 5, EOS], [4, EOS], [8, 0, 1, 2], [EOS], [EOS], [3]],
             [[0.0] * n for n in (3, 2, 4, 1, 1, 1)], EOS)
    r.idx[torch.arange(r.idx.size(1)) >= r.lengths[:, None]] = fill
    shapes, trunk = [], GPT.trunk
    monkeypatch.setattr(GPT, 'trunk', lambda self, idx, *a, **k: (
        shapes.append(tuple(idx.shape)), trunk(self, idx, *a, **k))[1])
    every = lambda **more: [frozen(model.logp, r.idx, r.mask, r.lengths, **more),
                            frozen(model.values, r.idx, r.mask, r.lengths, **more),
                            frozen_rewards(model, r.idx, r.lengths, **more)]
    shared = every(K=3, rows=3)
    # prompts apart. Without an answer's last token 2, or 5 + 2 + 1 + 3 (one 4 less: not all begin with it); with it
    # 2 and two ends that are alike in two rows of three, 5 + 3 + 2 + 4
    assert shapes == [(1, 2), (1, 11), (1, 2), (1, 11), (1, 5), (1, 14)]
    for a, b in zip(shared, every(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

def test_chunks_are_as_long_as_their_longest_row(monkeypatch):
    model, seen, hidden = random_model(reward_head=True), [], GPT.hidden
    monkeypatch.setattr(GPT, 'hidden', lambda self, idx, *a, **k: (
        seen.append(tuple(idx.shape)), hidden(self, idx, *a, **k))[1])
    score_answers(model, [p for p, _ in ROWS], [a for _, a in ROWS], 'cpu', rows=2)
    assert seen == [(2, 4), (2, 6), (1, 9)] # rows of 2 4 4 6 9 tokens

def test_scores_of_answers_in_one_row_equal_those_of_rows_of_their_own():
    model = random_model(reward_head=True)
    found = score_packed(model, [Row([1, 2, 3], [[4, 5, EOS], [EOS]], {}), Row([6], [[8, 0]], {})], RUN)
    alone = score_answers(model, [[1, 2, 3], [1, 2, 3], [6]], [[4, 5, EOS], [EOS], [8, 0]], 'cpu')
    assert not found.requires_grad
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)

def test_scores_come_with_their_records(tmp_path, capsys):
    """One that does not fit the context is left out, and moves nobody else's."""
    records = [dict(prompt='Hi', responses=['Yo', 'No'], ranks=[0, 1]),
               dict(prompt='Hi', responses=['x' * 70, 'y'], ranks=[0, 1]), dict(prompt='Who?', responses=['me'])]
    model = random_model(block_size=64, vocab_size=TOK.n_vocab, reward_head=True)
    found = score_records(model, TOK, records, 64, 'test', 'cpu')
    assert 'test: 2 rows, 0 prompts cut, 1 left out' in capsys.readouterr().out
    assert [record is r for (record, _), r in zip(found, (records[0], records[2]), strict=True)] == [True, True]
    alone = [score_answers(model, [prompt_ids(TOK, r['prompt'])], [response_ids(TOK, text)], 'cpu').item()
             for r in (records[0], records[2]) for text in r['responses']]
    assert [score for _, scores in found for score in scores] == pytest.approx(alone, abs=1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# what is logged

def test_what_is_logged_of_rollouts_by_hand():
    logp = torch.tensor([[-1.0, -2.0, 9.0], [9.0, -3.0, -0.5]]) # 9: outside the mask
    ref_logp = torch.tensor([[-1.5, -1.0, 2.0], [2.0, -3.0, -0.5]])
    rolls = SimpleNamespace(logp=logp, mask=MASK, ended=torch.tensor([1.0, 0.0]))
    found = describe(rolls, ref_logp, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), RUN)
    # k1 of the first answer 0.5 - 1; k3 exp(-.5) - 1 + .5 = .106531 and exp(1) - 1 - 1 = .718282; the second is the
    # reference's own; 6.5 nats over four tokens
    assert {k: v.item() for k, v in found.items()} == by_hand(dict(
        reward=1.5, score=1.0, kl=-0.25, kl_k3=0.412406, entropy=1.625, ended=0.5, length=2.0))

def test_what_is_logged_of_a_critic_by_hand():
    values = torch.tensor([[2.0, 2.0, 55.0], [-44.0, 6.0, 4.0]])
    # the returns 1 2 6 3 have mean 3 and variance 3.5; they exceed the values by -1 0 0 -1, of variance .25
    assert {k: v.item() for k, v in describe_critic(values, X, MASK, RUN).items()} == by_hand(dict(
        values=3.5, returns=3.0, returns_std=1.870829, explained_variance=0.928571)) # 1 - .25 / 3.5
    # returns that are all 3 leave no variance to explain
    assert {k: v.item() for k, v in describe_critic(values, torch.full_like(X, 3.0), MASK, RUN).items()} == by_hand(
        dict(values=3.5, returns=3.0, returns_std=0.0))

# ---------------------------------------------------------------------------------------------------------------------
# measuring

@pytest.mark.parametrize('scores, ranks, points, pairs', [
    ([3.0, 2.0, 1.0], [0, 1, 2], 3.0, 3),
    ([1.0, 2.0, 3.0], [0, 1, 2], 0.0, 3),
    ([2.0, 3.0, 1.0], [0, 1, 2], 2.0, 3), # only the best two are swapped
    ([1.0, 1.0, 0.0], [0, 1, 2], 2.5, 3), # a tie in the scores is half a point
    ([5.0, 1.0, 0.0], [0, 0, 1], 2.0, 2), # a tie in the ranks is no pair
    ([5.0, 1.0], [3, 3], 0.0, 0),
    ([0.3, 0.3000004, 0.3], [0, 1, 1], 1.0, 2), # what only rounding tells apart is a tie
])
def test_pair_agreement_by_hand(scores, ranks, points, pairs):
    assert pair_agreement(scores, ranks) == (points, pairs)
    assert pair_agreement(torch.tensor(scores), torch.tensor(ranks)) == (points, pairs)

# slack 1e-5 (1 + |a| + |b|): 1e-5 near 0, 3e-5 near 1, 0.02001 near 1000
@pytest.mark.parametrize('a, b, expected', [
    (2.0, 1.0, 1.0), (1.0, 2.0, 0.0), (1.0, 1.0, 0.5), (0.0, 4e-7, 0.5), (0.0, 2e-5, 0.0), (0.0, -2e-5, 1.0),
    (1.0, 1.00002, 0.5), (1.0, 1.00004, 0.0), (1.00004, 1.0, 1.0), (-1000.0, -1000.01, 0.5), (-1000.0, -1000.03, 1.0)])
def test_equal_within_rounding_is_a_tie(a, b, expected):
    assert beats(a, b) == expected and beats(b, a) == 1 - expected
    both = beats(torch.tensor([a, b], requires_grad=True), torch.tensor([b, a]))
    assert both.tolist() == [expected, 1 - expected] and not both.requires_grad

def test_another_vocabulary_is_told_in_one_line(tmp_path, capsys):
    """Another size, or one of the same size that means other bytes."""
    def model(n):
        return SimpleNamespace(config=SimpleNamespace(vocab_size=n))
    folder = checkpoint(tmp_path / 'rm')
    check_same_vocabulary(model(257), model(257), 'reward_model', folder, TOK)
    other = Tokenizer('tiktoken', {bytes([255 - i]): i for i in range(256)})
    for n, tok, expected in ((50257, TOK, 'its vocabulary has 50257 tokens'),
                             (257, other, 'has a tokenizer of its own')):
        with pytest.raises(SystemExit) as stopped:
            check_same_vocabulary(model(257), model(n), 'reward_model', folder, tok)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count('\n') == 1 and f'--reward_model={folder}: {expected}' in err

def test_hand_numbers_above():
    """The derivations in the comments, once more by math alone."""
    assert 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.4) + 0.1 * math.log(0.1 / 0.2) == by_hand(0.183787)
    assert [d / math.sqrt(3.5) for d in (-2, -1, 3)] == by_hand([-1.069045, -0.534522, 1.603567])
