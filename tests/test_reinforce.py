"""
reinforce.py: the three kinds of advantage by hand; the enumerable test bed, where their gradients are sums over all
groups of answers; roll-outs and updates. test_stages.py has the rest.
"""
import copy
import math

import pytest
import torch

import reinforce
from common.rollout import kl_k1, kl_k3, masked_mean, pack
from common.tokens import prompt_ids
from common.training import make_optimizer
from data.toy import world
from model import GPT
from ppo import policy_loss
from reinforce import advantages, reinforce_loss, roll_out, update
from tiny import (ANSWERS, BED_TOK, CLIPPED, EOS, N_TOKENS, PROMPT, PROMPTS, REWARDS, RUN, TOK, LikesOnes, bed,
                  by_hand, checkpoint, enumerated, records, run, weights)

KINDS = ['reinforce', 'rloo', 'grpo']

def T(values, requires_grad=False):
    return torch.tensor(values, requires_grad=requires_grad)

# ---------------------------------------------------------------------------------------------------------------------
# advantages

@pytest.mark.parametrize('kind, baseline, expected', [
    ('reinforce', 0.0, [1.0, 2.0, 6.0]), # a baseline that does not look at the answers
    ('reinforce', 2.5, [-1.5, -0.5, 3.5]),
    ('rloo', 0.0, [-3.0, -1.5, 4.5]), # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    ('grpo', 0.0, [-0.925820, -0.462910, 1.388730]), # mean 3, std sqrt((4 + 1 + 9) / 3) = 2.160247
])
def test_advantages_by_hand(kind, baseline, expected):
    got = advantages(T([[1., 2., 6.]]), kind, baseline)
    assert got.tolist() == [by_hand(expected)]
    # a prompt knows nothing of another's answers; the order of its own is that of the rewards
    got = advantages(T([[1e6, -1e6, 0.], [6., 1., 2.]]), kind, baseline)
    assert got[1].tolist() == by_hand([expected[2], expected[0], expected[1]])

def test_advantages_of_two_answers():
    assert advantages(T([[3., 7.]]), 'rloo').tolist() == [[-4.0, 4.0]]
    assert advantages(T([[3., 7.]]), 'grpo').tolist() == [by_hand([-1.0, 1.0])]
    assert advantages(T([[3.], [7.]]), 'reinforce', 5.0).tolist() == [[-2.0], [2.0]] # one answer is enough

@pytest.mark.parametrize('kind', ['rloo', 'grpo'])
def test_answers_that_score_alike_teach_nothing(kind):
    assert advantages(T([[2.5, 2.5, 2.5, 2.5]]), kind).tolist() == [[0.0] * 4]

def test_a_constant_added_to_a_prompts_rewards_changes_nothing():
    rewards = T([[0.5, -1., 2.], [3., 0.25, 1.]])
    shifted = rewards + T([[8.], [-16.]])
    for kind in ('rloo', 'grpo'):
        torch.testing.assert_close(advantages(shifted, kind), advantages(rewards, kind), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages(4 * rewards, 'rloo'), 4 * advantages(rewards, 'rloo'))
    torch.testing.assert_close(advantages(4 * rewards, 'grpo'), advantages(rewards, 'grpo'), rtol=0, atol=1e-6)

def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind must be reinforce, rloo or grpo, got 'ppo'"):
        advantages(T([[1., 2.]]), 'ppo')

# ---------------------------------------------------------------------------------------------------------------------
# the loss

class Says:
    """Stand in for a policy whose log-probabilities are given."""

    def __init__(self, logp):
        self.logp = lambda idx, mask: logp

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ratio, advantage, loss, grad', CLIPPED)
def test_the_clipped_surrogate_by_hand(kind, ratio, advantage, loss, grad):
    logp = T([[math.log(ratio) - 3, 9.0]], requires_grad=True) # the second token is padding
    b = dict(idx=None, mask=T([[1., 0.]]), old_logp=T([[-3., 1e6]]), ref_logp=T([[0., 0.]]),
             advantages=T([[advantage, 1e6]]))
    out, measured, far = reinforce_loss(Says(logp), b, config(kind=kind, kl_coef=0.0, clip=0.2), RUN)
    out.backward()
    assert out.shape == () and out.item() == measured['policy_loss'].item() == by_hand(loss)
    assert logp.grad.tolist() == [by_hand([grad, 0.0])] and far.item() == by_hand(abs(ratio - 1))

def test_grpos_loss_by_hand():
    # two answers of two tokens and of one, at ratio 1: -(2 + 2 - 1) / 3 = -1, every token weighs the same
    # k3 with ref - logp = log 2 and 0, 0: (2 - 1 - log 2) / 3 = 0.102284; its gradient (1 - 2) / 3 at the first token
    logp = T([[-2., -1.], [-3., 1e6]], requires_grad=True)
    b = dict(idx=None, mask=T([[1., 1.], [1., 0.]]), old_logp=logp.detach(), advantages=T([[2., 2.], [-1., 1e6]]),
             ref_logp=T([[math.log(2) - 2, -1.], [-3., -1.]]))
    out, measured, _ = reinforce_loss(Says(logp), b, config(kind='grpo', kl_coef=0.5), RUN)
    out.backward()
    assert out.item() == by_hand(-0.948858) # -1 + 0.5 * 0.102284
    assert (measured['policy_loss'].item(), measured['kl_loss'].item()) == by_hand((-1.0, 0.102284))
    # (-A + 0.5 (1 - e^(ref - logp))) / 3: (-2 - 0.5) / 3, -2 / 3, 1 / 3
    assert logp.grad.tolist() == [by_hand([-0.833333, -0.666667]), by_hand([0.333333, 0.0])]

def test_both_scripts_clip_alike():
    """The surrogate is written out in each; here are many tokens in which any difference would show."""
    torch.manual_seed(0)
    old_logp, mask = torch.randn(7, 11), (torch.rand(7, 11) < 0.6).float()
    logp, A = (old_logp + 0.3 * torch.randn(7, 11)).requires_grad_(), torch.randn(7, 11)
    expected = policy_loss(logp, old_logp, A, mask, 0.1)
    b = dict(idx=None, mask=mask, old_logp=old_logp, ref_logp=old_logp, advantages=A)
    found, _, _ = reinforce_loss(Says(logp), b, config(kind='rloo', clip=0.1), RUN)
    assert found.item() == expected.item() != 0.0
    assert torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (found, expected)))

# ---------------------------------------------------------------------------------------------------------------------
# the test bed: every pair of answers, weighted by its probability

def everything():
    return pack([PROMPT] * 13, ANSWERS, [[0.0] * len(a) for a in ANSWERS], EOS)

@pytest.mark.parametrize('kind, baseline', [('reinforce', 0.0), ('reinforce', -3.0), ('rloo', 0.0)])
@pytest.mark.parametrize('beta', [0.0, 0.7])
def test_the_losss_gradient_is_that_of_the_enumerated_objective(kind, baseline, beta):
    """At ratio 1 the surrogate's expected gradient is exactly that of E[r] - beta KL(policy || reference)."""
    policy, reference = bed(1), bed(2)
    scores = torch.linspace(-1, 2, 13)[torch.randperm(13)] # the reward of each answer
    logp, kl = enumerated(policy, reference)
    (-((logp.exp() * scores).sum() - beta * kl)).backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    r = everything()
    with torch.no_grad():
        old_logp, ref_logp = policy.logp(r.idx, r.mask), reference.logp(r.idx, r.mask) # (13, T-1)
    p = old_logp.sum(1).exp() # (13,)
    rewards = scores - beta * (kl_k1(old_logp, ref_logp) * r.mask).sum(1) # (13,)
    i, j = torch.cartesian_prod(torch.arange(13), torch.arange(13)).unbind(1) # all 169 groups of two
    first = advantages(torch.stack([rewards[i], rewards[j]], 1), kind, baseline)[:, 0] # (169,), of answer i
    weighted = torch.zeros(13).index_add(0, i, p[i] * p[j] * first) # (13,)
    b = dict(idx=r.idx, mask=r.mask, old_logp=old_logp, ref_logp=ref_logp, advantages=weighted[:, None] * r.mask)
    (reinforce_loss(policy, b, config(kind=kind), RUN)[0] * N_TOKENS).backward()
    assert max(g.abs().max().item() for g in expected) > 0.01
    for param, g in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, g, rtol=0, atol=1e-6)

def config(**more):
    return reinforce.Config(**dict(dict(prompts='-', max_new_tokens=2, device='cpu', dtype='float32', lr=0.02,
                                        lr_schedule='constant', batch_size=64, missing_eos_penalty=0.0), **more))

def train(cfg, iterations=16):
    """Training on the test bed; returns the expected reward before and after, and the KL after, all enumerated."""
    policy = bed(1)
    models = policy, LikesOnes(), copy.deepcopy(policy)
    optimizer = make_optimizer(policy, cfg, eps=1e-5)
    before = (enumerated(policy).exp() * REWARDS).sum().item()
    for step in range(iterations):
        batch, lengths, _ = roll_out(models, [PROMPT] * (cfg.batch_size // cfg.n_answers), ['?'] * cfg.batch_size,
                                     BED_TOK, cfg, 0.5, RUN)
        update(policy, optimizer, batch, lengths, cfg, RUN, step)
    with torch.no_grad():
        logp, kl = enumerated(policy, models[2])
        return before, (logp.exp() * REWARDS).sum().item(), kl.item()

@pytest.mark.parametrize('kind, beta', [('reinforce', 20.0), ('rloo', 20.0), ('grpo', 50.0)])
def test_every_kind_raises_the_expected_reward_and_beta_holds_it_back(kind, beta):
    epochs = 3 if kind == 'grpo' else 1
    before, free, far = train(config(kind=kind, kl_coef=0.0, epochs=epochs))
    _, held, near = train(config(kind=kind, kl_coef=beta, epochs=epochs))
    assert free > before + 0.5 and far > 0.2
    assert abs(held - before) < 0.2 and 0 <= near < 0.05

# ---------------------------------------------------------------------------------------------------------------------
# the steps of an iteration

def rolled(**more):
    """Roll-outs of the test bed: 16 groups of 4; the same answers for every option."""
    cfg, models = config(**more), (bed(1), LikesOnes(), bed(2))
    with torch.no_grad():
        torch.manual_seed(5)
        return models, *roll_out(models, [PROMPT] * 16, ['?'] * 16, BED_TOK, cfg, 0.5, RUN)

@pytest.mark.parametrize('kind', KINDS)
def test_the_parts_of_a_roll_out_agree(kind):
    models, batch, lengths, measured = rolled(kind=kind, missing_eos_penalty=0.5, kl_coef=0.3)
    idx, mask = batch['idx'], batch['mask']
    answers = [row[1:n].tolist() for row, n in zip(idx, lengths)]
    assert len(answers) == 64 and all(a in ANSWERS for a in answers)
    with torch.no_grad():
        logp, ref = models[0].logp(idx, mask), models[2].logp(idx, mask)
    torch.testing.assert_close(batch['old_logp'], logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch['ref_logp'], ref, rtol=0, atol=1e-5)
    ones, cut = T([float(a.count(1)) for a in answers]), T([float(a[-1] != EOS) for a in answers])
    kl = (logp - ref).sum(1) # nats per answer
    rewards = ones - 0.5 * cut - (0.0 if kind == 'grpo' else 0.3) * kl # grpo's KL is in the loss
    groups = rewards.tolist()
    groups = [groups[i:i + 4] for i in range(0, 64, 4)] # four answers to a prompt in a row
    for n, group in enumerate(groups):
        mean = sum(group) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in group) / 4)
        for k, x in enumerate(group):
            a = {'reinforce': x - 0.5, 'rloo': x - (4 * mean - x) / 3, 'grpo': (x - mean) / max(std, 1e-9)}[kind]
            expected = [a * m for m in mask[4 * n + k].tolist()] # all tokens of an answer share it, padding has none
            assert batch['advantages'][4 * n + k].tolist() == pytest.approx(expected, abs=1e-4)
    assert measured['score'].item() == pytest.approx((ones - 0.5 * cut).mean().item(), abs=1e-5)
    assert measured['reward'].item() == pytest.approx(ones.mean().item(), abs=1e-5)
    assert measured['kl'].item() == pytest.approx(kl.mean().item(), abs=1e-5)
    assert measured['returns'].item() == pytest.approx(rewards.mean().item(), abs=1e-5)
    stds = [math.sqrt(sum((x - sum(g) / 4) ** 2 for x in g) / 4) for g in groups]
    assert measured['group_std'].item() == pytest.approx(sum(stds) / 16, abs=1e-5)
    assert measured['ended'].item() == pytest.approx(1 - cut.mean().item()) and 0 < cut.mean() < 1

def updated(monkeypatch, models, batch, lengths, **more):
    """One call of update on a copy of the policy; the gradients of its optimizer steps and what it measured."""
    cfg, policy, seen = config(**more), copy.deepcopy(models[0]), []
    monkeypatch.setattr(reinforce, 'optimizer_step', lambda run, cfg, step, model, optimizer, *a: (
        seen.append([p.grad.clone() for p in model.parameters()]), optimizer.step(), optimizer.zero_grad())[0] or 0.0)
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return seen, update(policy, optimizer, batch, lengths, cfg, RUN, 0)

@pytest.mark.parametrize('kind', ['rloo', 'grpo'])
def test_micro_batches_of_different_token_counts(monkeypatch, kind):
    models, batch, lengths, _ = rolled(kind=kind)
    (whole, one), (parts, four) = (updated(monkeypatch, models, batch, lengths, kind=kind, grad_accum=n, epochs=2,
                                           minibatches=2, batch_size=32) for n in (1, 4))
    assert len(whole) == len(parts) == 4 # two epochs of two minibatches
    for n, (a, b) in enumerate(zip(whole, parts)):
        assert max(g.abs().max().item() for g in a) > 1e-3
        for g, h in zip(a, b, strict=True): # from the second step on the weights differ by rounding
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-6 if n < 1 else 1e-5)
    assert one == pytest.approx(four, abs=1e-5)

def test_only_grpo_has_the_kl_in_its_loss(monkeypatch):
    models, batch, lengths, _ = rolled()
    mask = batch['mask']
    (plain,), first = updated(monkeypatch, models, batch, lengths, kind='rloo', kl_coef=0.3)
    (with_kl,), second = updated(monkeypatch, models, batch, lengths, kind='grpo', kl_coef=0.3)
    policy = copy.deepcopy(models[0])
    logp = policy.logp(batch['idx'], mask)
    # d/dlogp of e^(ref - logp) - 1 - (ref - logp) = 1 - e^(ref - logp), a mean over all counted tokens
    slope = (1 - (batch['ref_logp'] - logp.detach()).exp()) * mask * 0.3 / mask.sum()
    expected = torch.autograd.grad((logp * slope).sum(), list(policy.parameters()))
    assert max(g.abs().max().item() for g in expected) > 1e-3
    for a, b, e in zip(plain, with_kl, expected, strict=True):
        torch.testing.assert_close(b - a, e, rtol=0, atol=1e-6)
    assert first['loss'] == first['policy_loss'] == second['policy_loss']
    k3 = masked_mean(kl_k3(batch['old_logp'], batch['ref_logp']), mask).item()
    assert second['kl_loss'] == pytest.approx(k3, abs=1e-5)
    assert second['loss'] == pytest.approx(second['policy_loss'] + 0.3 * k3, abs=1e-5)

def test_several_epochs_are_clipped(monkeypatch):
    models, batch, lengths, _ = rolled()
    _, first = updated(monkeypatch, models, batch, lengths)
    assert first['updates'] == 1 and first['first_ratio'] < 1e-4 and first['clipfrac'] == 0.0
    assert first['ratio'] == pytest.approx(1.0, abs=1e-5) and abs(first['approx_kl']) < 1e-6
    _, more = updated(monkeypatch, models, batch, lengths, epochs=6)
    assert more['updates'] == 6 and more['approx_kl'] > 1e-6 and more['first_ratio'] == first['first_ratio']
    far = batch | dict(old_logp=batch['old_logp'] - 0.5 * batch['mask'], # ratio e^0.5 = 1.65 everywhere
                       advantages=batch['mask'])
    (grads,), off = updated(monkeypatch, models, far, lengths)
    assert off['first_ratio'] == pytest.approx(0.648721, abs=1e-4) and off['clipfrac'] == 1.0
    assert off['loss'] == pytest.approx(-1.2, abs=1e-5) # likelier by more than the clip already: no push
    assert max(g.abs().max().item() for g in grads) == 0.0

def test_every_answer_is_in_every_epoch(monkeypatch):
    models, batch, lengths, _ = rolled()
    seen, logp = [], GPT.logp
    monkeypatch.setattr(GPT, 'logp', lambda self, idx, mask: (
        seen.append([row[:1 + int(m.sum())].tolist() for row, m in zip(idx, mask)]), logp(self, idx, mask))[1])
    _, measured = updated(monkeypatch, models, batch, lengths, epochs=3, minibatches=4, batch_size=16, grad_accum=2)
    assert measured['updates'] == 12 and len(seen) == 24
    answers = sorted(row[:n] for row, n in zip(batch['idx'].tolist(), lengths.tolist()))
    for epoch in range(3):
        assert sorted(row for part in seen[8 * epoch:8 * epoch + 8] for row in part) == answers

# ---------------------------------------------------------------------------------------------------------------------
# runs

@pytest.fixture
def given(tmp_path):
    return dict(policy=checkpoint(tmp_path / 'sft'), reward_model=checkpoint(tmp_path / 'rm', 1, reward_head=True),
                prompts=records(tmp_path / 'prompts.jsonl', PROMPTS), max_new_tokens=6, batch_size=8, n_answers=4)

LOGGED = {'step', 'time', 'reward', 'score', 'kl', 'kl_k3', 'entropy', 'ended', 'length', 'returns', 'group_std',
          'loss', 'policy_loss', 'kl_loss', 'ratio', 'clipfrac', 'approx_kl', 'grad_norm', 'first_ratio', 'updates',
          'baseline', 'lr'}

@pytest.mark.parametrize('options', [
    dict(kind='reinforce', n_answers=1), dict(kind='reinforce'), dict(kind='rloo', grad_accum=2),
    dict(kind='grpo', epochs=2, minibatches=2), dict(gold='data.toy.world:gold')])
def test_two_iterations(tmp_path, given, options):
    if 'gold' in options: # it knows no other prompts
        given['prompts'] = records(tmp_path / 'toy.jsonl', world.prompts('train', 8, 1))
    out = str(tmp_path / 'out')
    log = run(reinforce, out_dir=out, max_steps=2, **given | options)
    assert [set(line) for line in log] == [LOGGED | ({'gold'} if 'gold' in options else set())] * 2
    assert all(math.isfinite(v) for line in log for v in line.values())
    assert log[0]['first_ratio'] < 1e-4 and log[1]['first_ratio'] < 1e-4
    assert log[0]['kl'] == pytest.approx(0.0, abs=1e-4) and abs(log[1]['kl']) > 1e-6 # it starts at the reference
    assert log[0]['updates'] == (4 if options.get('kind') == 'grpo' else 1)
    assert log[0]['baseline'] == 0.0 and log[1]['baseline'] == by_hand(0.1 * log[0]['returns']) # 0.9 * 0 + 0.1 R
    assert weights(out) != weights(given['policy'])

def test_the_baseline_is_a_mean_of_what_earlier_iterations_maximised(tmp_path, given, monkeypatch):
    """Of scores less the KL's price, before this iteration's answers: else it would not be free of bias."""
    used, roll = [], reinforce.roll_out
    monkeypatch.setattr(reinforce, 'roll_out', lambda models, prompts, questions, tok, cfg, baseline, *a: (
        used.append(baseline), roll(models, prompts, questions, tok, cfg, baseline, *a))[1])
    log = run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=4, kind='reinforce', baseline_decay=0.75, kl_coef=5.0,
              **given | dict(lr=0.03))
    expected = 0.0
    for line, baseline in zip(log, used, strict=True):
        assert (baseline, line['baseline']) == by_hand((expected, expected))
        assert line['returns'] == pytest.approx(line['score'] - 5.0 * line['kl'], abs=1e-4)
        expected = 0.75 * expected + 0.25 * line['returns']
    assert all(abs(line['returns'] - line['score']) > 0.1 for line in log[1:3]) # which reach the last two baselines

def test_the_answers_to_a_prompt_are_judged_together(tmp_path, given, monkeypatch):
    """Two prompts of four answers each an iteration: prompts and their answers stay in one row of the table."""
    seen, texts, tables, judge, sample = [], [], [], reinforce.advantages, reinforce.sample_answers
    monkeypatch.setattr(reinforce, 'sample_answers', lambda model, prompts, *a: (
        seen.append(prompts), sample(model, prompts, *a))[1])
    monkeypatch.setattr(reinforce, 'mean_gold', lambda gold, questions, *a: (texts.append(questions), T(0.))[1])
    monkeypatch.setattr(reinforce, 'load_gold', lambda *a: len)
    monkeypatch.setattr(reinforce, 'advantages', lambda rewards, *a: (tables.append(rewards), judge(rewards, *a))[1])
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=4, kind='rloo', **given)
    asked = [text for questions in texts for text in questions]
    assert len(seen) == len(texts) == 4 and len(asked) == 32 and all(t.shape == (2, 4) for t in tables)
    assert all(len(set(asked[i:i + 4])) == 1 for i in range(0, 32, 4)) # four in a row
    assert sorted(asked[::4]) == sorted(r['prompt'] for r in PROMPTS) # an epoch of all eight prompts
    for ids, questions in zip(seen, texts):
        assert [len(set(map(tuple, ids[i:i + 4]))) for i in (0, 4)] == [1, 1] and ids[0] != ids[4]
        assert [prompt_ids(TOK, question) for question in questions] == ids

def test_others_stay(tmp_path, given, monkeypatch):
    kept, load = [], reinforce.load_actors
    monkeypatch.setattr(reinforce, 'load_actors', lambda *a: (kept.append(load(*a)), kept[-1])[1])
    before = load(config(**{k: given[k] for k in ('policy', 'reward_model')}), RUN, TOK)
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=2, kind='grpo', **given)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    (policy, rm, reference), = kept
    assert same(before[1], rm) and same(before[2], reference) and same(before[0], reference)
    assert not same(before[0], policy)
