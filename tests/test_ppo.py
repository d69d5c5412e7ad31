"""
ppo.py: the losses, GAE and the rewards per token by hand; a test bed whose 13 answers can be enumerated, so that the
expected reward and the KL are sums; the options of the update. test_stages.py has the rest.
"""
import copy
import math
from types import SimpleNamespace

import pytest
import torch

import ppo
from common import training
from common.rewards import Reward
from common.rollout import kl_k1, masked_mean, pack
from common.training import make_optimizer
from data.toy import world
from model import GPT, GPTConfig
from ppo import (Models, adapt_kl_coef, gae, policy_loss, ppo_loss, ptx_backward, roll_out, token_rewards, update,
                 value_loss)
from tiny import (ANSWERS, BED_TOK, CLIPPED, DEMONSTRATIONS, EOS, N_TOKENS, PROMPT, PROMPTS, REWARDS, RUN, TOK,
                  LikesOnes, assert_resumes_exactly, bed, by_hand, checkpoint, enumerated, gradients, records, run)

def T(values, requires_grad=False):
    return torch.tensor(values, requires_grad=requires_grad)

# ---------------------------------------------------------------------------------------------------------------------
# rewards per token and advantages

def test_token_rewards_by_hand():
    # an answer that ends within the row, one that fills it, and one of a single token at the very start
    mask = T([[0., 1., 1., 0.], [0., 0., 1., 1.], [1., 0., 0., 0.]])
    kl = T([[9., 0.5, -1., 1e6], [1e6, 9., 0.25, 0.5], [0.1, 1e6, 1e6, 1e6]])
    got = token_rewards(T([2., -1., 3.]), kl, mask, 0.1)
    assert got.tolist() == [by_hand([0.0, -0.05, 2.1, 0.0]), by_hand([0.0, 0.0, -0.025, -1.05]), # 0.1 + 2, -0.05 - 1
                            by_hand([2.99, 0.0, 0.0, 0.0])] # -0.01 + 3

@pytest.mark.parametrize('absurd', [1e6, -7e8])
def test_gae_by_hand(absurd):
    """
    r = 0 0 1, V = ½ ½ ½, gamma 1, lambda ½, backwards: delta 1 - ½ = ½, A ½; delta 0, A ¼; delta 0, A 1/8.
    The same after a prompt of two tokens and before padding: neither the values there nor the rewards count.
    """
    x = absurd
    rewards = T([[0., 0., 1., x, x], [x, x, 0., 0., 1.], [x, 0., 0., 1., x]])
    values = T([[.5, .5, .5, x, -x], [-x, x, .5, .5, .5], [x, .5, .5, .5, x]])
    mask = T([[1., 1., 1., 0., 0.], [0., 0., 1., 1., 1.], [0., 1., 1., 1., 0.]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    a, r = [.125, .25, .5], [.625, .75, 1.]
    assert advantages.tolist() == [a + [0, 0], [0, 0] + a, [0] + a + [0]]
    assert returns.tolist() == [r + [0, 0], [0, 0] + r, [0] + r + [0]]

def test_gae_discounts():
    # gamma ½, lambda ½: delta 1 - 2 = -1, A -1; delta 0 + ½ 2 - 1 = 0, A 0 + ¼ (-1) = -¼; returns -1 + 2, -¼ + 1
    advantages, returns = gae(T([[0., 1.]]), T([[1., 2.]]), torch.ones(1, 2), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.25, -1.0]] and returns.tolist() == [[0.75, 1.0]]

def test_gae_at_its_ends():
    rewards, values, mask = T([[1., 2., 4.]]), T([[10., 20., 30.]]), torch.ones(1, 3)
    # lambda 1: reward to go 7 6 4, less the value; lambda 0: the one-step error 1 + 20 - 10, 2 + 30 - 20, 4 - 30
    assert gae(rewards, values, mask, 1.0, 1.0)[0].tolist() == [[-3.0, -14.0, -26.0]]
    assert gae(rewards, values, mask, 1.0, 0.0)[0].tolist() == [[11.0, 12.0, -26.0]]

# ---------------------------------------------------------------------------------------------------------------------
# losses

@pytest.mark.parametrize('ratio, advantage, loss, grad', CLIPPED)
def test_policy_loss_by_hand(ratio, advantage, loss, grad):
    logp = T([[math.log(ratio) - 3, 9.0]], requires_grad=True) # the second token is padding
    out = policy_loss(logp, T([[-3., 1e6]]), T([[advantage, 1e6]]), T([[1., 0.]]), 0.2)
    out.backward()
    assert out.shape == () and out.item() == by_hand(loss)
    assert logp.grad.tolist() == [by_hand([grad, 0.0])]

def test_policy_loss_is_a_mean_over_tokens():
    logp = torch.log(T([[1.5, 0.5, 7.0], [1.5, 0.5, 7.0]])).requires_grad_()
    advantages, mask = T([[1., 1., 5.], [-1., -1., 5.]]), T([[1., 1., 0.], [1., 0., 0.]])
    out = policy_loss(logp, torch.zeros(2, 3), advantages, mask, 0.2)
    out.backward()
    assert out.item() == by_hand(-0.066667) # (-1.2 - 0.5 + 1.5) / 3
    assert logp.grad.tolist() == [by_hand([0.0, -0.166667, 0.0]), by_hand([0.5, 0.0, 0.0])]

def test_value_loss_by_hand():
    # V, V_old, R: 1 0 0: max(1, 0.2²) = 1; ½ 0 1: max(¼, (0.2 - 1)²) = 0.64; 0.1 0 1: both 0.81; the fourth is padding
    values = T([[1., .5, .1, 1e6]], requires_grad=True)
    loss = value_loss(values, torch.zeros(1, 4), T([[0., 1., 1., -1e6]]), T([[1., 1., 1., 0.]]), 0.2)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.408333) # ½ (1 + 0.64 + 0.81) / 3
    # (V - R) / 3, and nothing where the clipped value is the worse one
    assert values.grad.tolist() == [by_hand([0.333333, 0.0, -0.3, 0.0])]

@pytest.mark.parametrize('kl, expected', [
    (12.0, 0.102), # error clipped at 0.2: 0.1 (1 + 0.1 * 0.2)
    (6.6, 0.101), # 6.6 / 6 - 1 = 0.1
    (6.0, 0.1),
    (5.4, 0.099),
    (0.0, 0.098),
    (-3.0, 0.098), # an estimate may be negative
])
def test_adapt_kl_coef_by_hand(kl, expected):
    assert adapt_kl_coef(0.1, kl, target=6.0, gain=0.1) == by_hand(expected)
    assert adapt_kl_coef(0.1, kl, target=6.0, gain=0.5) == by_hand(0.1 + 5 * (expected - 0.1))

def test_beta_grows_sevenfold_in_a_hundred_iterations_far_above_the_target():
    kl_coef = 0.1
    for _ in range(100):
        kl_coef = adapt_kl_coef(kl_coef, 100.0, target=6.0, gain=0.1)
    assert kl_coef == by_hand(0.724465) # 0.1 * 1.02^100: 100 log 1.02 = 1.980263

# ---------------------------------------------------------------------------------------------------------------------
# the test bed of tiny.py

def test_the_bed_is_complete():
    assert enumerated(bed(0)).exp().sum().item() == by_hand(1.0)

@pytest.mark.parametrize('beta', [0.0, 0.7])
def test_the_losss_gradient_is_that_of_the_enumerated_objective(beta):
    """
    At ratio 1, with lambda 1 and every answer weighted by its probability, the surrogate's gradient is exactly that of
    E[r] - beta KL(policy || reference), whatever the critic says of the states.
    """
    policy, reference, critic = bed(1), bed(2), bed(3, value_head=True)
    with torch.no_grad():
        critic.value_head.weight.normal_()
    scores = torch.linspace(-1, 2, 13)[torch.randperm(13)] # the reward of each answer
    logp, kl = enumerated(policy, reference)
    (-((logp.exp() * scores).sum() - beta * kl)).backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()

    r = pack([PROMPT] * 13, ANSWERS, [[0.0] * len(a) for a in ANSWERS], EOS)
    logp = policy.logp(r.idx, r.mask) # (13, T-1)
    old_logp = logp.detach()
    with torch.no_grad():
        kl = kl_k1(old_logp, reference.logp(r.idx, r.mask)) * r.mask
        values = critic.values(r.idx, r.mask)
    rewards = token_rewards(scores, kl, r.mask, beta)
    advantages, _ = gae(rewards, values, r.mask, gamma=1.0, lam=1.0)
    weighted = advantages * old_logp.sum(1).exp()[:, None] # by the answer's probability
    (policy_loss(logp, old_logp, weighted, r.mask, 0.2) * N_TOKENS).backward() # the loss is a mean over 25 tokens
    assert max(g.abs().max().item() for g in expected) > 0.01
    for p, g in zip(policy.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-6)

def config(**more):
    return ppo.Config(**dict(dict(prompts='-', max_new_tokens=2, device='cpu', dtype='float32', lr=0.02, critic_lr=0.02,
                                  lr_schedule='constant', batch_size=64, missing_eos_penalty=0.0), **more))

def train(cfg, iterations=8):
    """PPO on the test bed; returns the expected reward before and after, and the KL after, all enumerated."""
    policy, critic = bed(1), bed(3, value_head=True)
    models = Models(policy, critic, Reward([LikesOnes()]), copy.deepcopy(policy))
    optimizers = dict(policy=make_optimizer(policy, cfg, eps=1e-5), critic=make_optimizer(critic, cfg, eps=1e-5))
    before = (enumerated(policy).exp() * REWARDS).sum().item()
    for step in range(iterations):
        batch, lengths, _ = roll_out(models, [PROMPT] * cfg.batch_size, [{}] * cfg.batch_size, BED_TOK, cfg,
                                     cfg.kl_coef, RUN)
        update(models, optimizers, batch, lengths, cfg, RUN, step)
    with torch.no_grad():
        logp, kl = enumerated(policy, models.reference)
        return before, (logp.exp() * REWARDS).sum().item(), kl.item()

def test_ppo_raises_the_expected_reward_and_beta_holds_it_back():
    before, free, far = train(config(kl_coef=0.0))
    _, held, near = train(config(kl_coef=20.0))
    assert free > before + 0.5 and far > 0.2
    assert abs(held - before) < 0.2 and 0 <= near < 0.05

# ---------------------------------------------------------------------------------------------------------------------
# the steps of an iteration

def rolled(**more):
    """Roll-outs of the test bed; the same answers for every option."""
    cfg, policy = config(**more), bed(1)
    models = Models(policy, bed(3, value_head=True), Reward([LikesOnes()]), bed(2))
    with torch.no_grad():
        models.critic.value_head.weight.normal_()
        torch.manual_seed(5)
        return models, *roll_out(models, [PROMPT] * 64, [{}] * 64, BED_TOK, cfg, cfg.kl_coef, RUN)

def test_the_parts_of_a_roll_out_agree():
    models, batch, lengths, measured = rolled(gamma=1.0, lam=1.0, missing_eos_penalty=0.5, kl_coef=0.3)
    idx, mask = batch['idx'], batch['mask']
    answers = [row[1:n].tolist() for row, n in zip(idx, lengths)]
    assert all(a in ANSWERS for a in answers)
    assert mask.tolist() == [[1.0, float(len(a) == 2)] for a in answers]
    with torch.no_grad():
        logp, ref = models.policy.logp(idx, mask), models.reference.logp(idx, mask)
    torch.testing.assert_close(batch['old_logp'], logp, rtol=0, atol=1e-5)
    ones, cut = T([float(a.count(1)) for a in answers]), T([float(a[-1] != EOS) for a in answers])
    kl = (logp - ref).sum(1) # nats per answer
    # with gamma = lambda = 1 the return of the first token is all that follows: score less beta KL
    torch.testing.assert_close(batch['returns'][:, 0], ones - 0.5 * cut - 0.3 * kl, rtol=0, atol=1e-5)
    assert measured['reward'].item() == pytest.approx(ones.mean().item(), abs=1e-5)
    assert measured['score'].item() == pytest.approx((ones - 0.5 * cut).mean().item(), abs=1e-5)
    assert measured['kl'].item() == pytest.approx(kl.mean().item(), abs=1e-5)
    assert measured['ended'].item() == pytest.approx(1 - cut.mean().item()) and 0 < cut.mean() < 1
    assert measured['length'].item() == pytest.approx(sum(map(len, answers)) / 64)
    assert measured['entropy'].item() == pytest.approx(-logp.sum().item() / mask.sum().item(), abs=1e-5)
    # advantages are whitened over the mask and 0 outside it
    a = batch['advantages']
    assert masked_mean(a, mask).item() == by_hand(0.0)
    assert masked_mean(a * a, mask).item() == pytest.approx(1.0, abs=1e-4)
    assert (a * (1 - mask)).abs().max().item() == (batch['returns'] * (1 - mask)).abs().max().item() == 0.0
    # a critic that knows the returns explains all of their variance, this one does not
    assert measured['explained_variance'].item() < 0.9

def test_whitened_rewards_keep_their_mean():
    found = []
    for whiten_rewards in (False, True): # gamma = lambda = 1: a reward is the difference of two returns
        _, batch, _, _ = rolled(gamma=1.0, lam=1.0, kl_coef=0.3, whiten_rewards=whiten_rewards)
        returns = torch.nn.functional.pad(batch['returns'], (0, 1)) # (B, T)
        rewards = (returns[:, :-1] - returns[:, 1:])[batch['mask'] > 0]
        found.append((rewards.mean().item(), rewards.var(unbiased=False).item()))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5) and abs(found[0][0]) > 0.1
    assert found[1][1] == pytest.approx(1.0, abs=1e-4) and abs(found[0][1] - 1) > 0.1

def updated(monkeypatch, models, batch, lengths, **more):
    """One call of update on copies of the models; the gradients of its optimizer steps and what it measured."""
    cfg, models, seen = config(**more), copy.deepcopy(models), []
    monkeypatch.setattr(ppo, 'optimizer_step', lambda run, cfg, step, model, optimizer, *a: (
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None]), optimizer.step(),
        optimizer.zero_grad())[0] or 0.0)
    optimizers = {name: torch.optim.SGD(getattr(models, name).parameters(), lr=0.1) for name in ('policy', 'critic')}
    torch.manual_seed(6)
    return seen, update(models, optimizers, batch, lengths, cfg, RUN, 0)

def test_micro_batches_of_different_token_counts(monkeypatch):
    models, batch, lengths, _ = rolled()
    (whole, one), (parts, four) = (updated(monkeypatch, models, batch, lengths, grad_accum=n, epochs=2, minibatches=2,
                                           batch_size=32, entropy_coef=0.1) for n in (1, 4))
    assert len(whole) == len(parts) == 8 # two epochs of two minibatches, for policy and critic
    for n, (a, b) in enumerate(zip(whole, parts)):
        assert max(g.abs().max().item() for g in a) > 1e-3
        for g, h in zip(a, b, strict=True): # from the second step on the weights differ by rounding
            torch.testing.assert_close(g, h, rtol=1e-6, atol=1e-6 if n < 2 else 1e-5)
    assert one == pytest.approx(four, abs=1e-5)

def test_every_answer_is_in_every_epoch(monkeypatch):
    models, batch, lengths, _ = rolled()
    seen, in_one_pass = [], GPT.logp_entropy_values
    batch['idx'] = torch.cat([batch['idx'], torch.zeros(64, 1, dtype=torch.long)], 1) # room to mark the rows
    monkeypatch.setattr(GPT, 'logp_entropy_values', lambda self, idx, mask, *a: (
        seen.append(idx.tolist()), in_one_pass(self, idx, mask, *a))[1])
    _, measured = updated(monkeypatch, models, batch, lengths, epochs=3, minibatches=4, batch_size=16, grad_accum=2)
    assert measured['updates'] == 12 and len(seen) == 24
    answers = sorted(row[:n] for row, n in zip(batch['idx'].tolist(), lengths.tolist()))
    strip = lambda rows: sorted(row if len(row) == 2 or row[1] != EOS else row[:2] for row in rows)
    for epoch in range(3):
        rows = [row for part in seen[8 * epoch:8 * epoch + 8] for row in part]
        assert strip(rows) == answers

def test_the_first_update_is_at_ratio_one(monkeypatch):
    models, batch, lengths, _ = rolled()
    _, first = updated(monkeypatch, models, batch, lengths, epochs=1)
    assert first['first_ratio'] < 1e-4 and first['ratio'] == pytest.approx(1.0, abs=1e-5) and first['clipfrac'] == 0.0
    assert abs(first['policy_loss']) < 1e-5 and abs(first['approx_kl']) < 1e-6 # whitened advantages have mean 0
    assert first['value_clipfrac'] == 0.0
    _, more = updated(monkeypatch, models, batch, lengths, epochs=6)
    assert more['approx_kl'] > 1e-6 and more['first_ratio'] == first['first_ratio']

def test_a_wrong_old_logp_shows(monkeypatch):
    models, batch, lengths, _ = rolled()
    batch['old_logp'] = batch['old_logp'] - 0.5 * batch['mask']
    _, first = updated(monkeypatch, models, batch, lengths, epochs=1)
    assert first['first_ratio'] == pytest.approx(0.648721, abs=1e-4) # e^0.5 - 1
    assert first['ratio'] == pytest.approx(1.648721, abs=1e-4) and first['clipfrac'] == 1.0
    # KL(old || new) per token, k3 with new/old = e^0.5: 1.648721 - 1 - 0.5
    assert first['approx_kl'] == pytest.approx(0.148721, abs=1e-4)

def test_early_stop_leaves_out_the_step_that_goes_too_far(monkeypatch):
    models, batch, lengths, _ = rolled()
    seen, all_of_it = updated(monkeypatch, models, batch, lengths, epochs=6)
    assert all_of_it['updates'] == 6 and len(seen) == 12
    seen, stopped = updated(monkeypatch, models, batch, lengths, epochs=6, early_stop_kl=1e-5)
    assert stopped['updates'] == 1 and len(seen) == 2 # one step, of policy and critic; then the ratio is off 1

def trained(models, batch, lengths, step=0, **more):
    """One call of update with optimizers of its own, on copies of the models; these, and what it measured."""
    cfg, models = config(**more), copy.deepcopy(models)
    optimizers = {name: make_optimizer(getattr(models, name), cfg) for name in ('policy', 'critic')}
    return models, optimizers, update(models, optimizers, batch, lengths, cfg, RUN, step)

def test_an_early_stop_leaves_no_gradient():
    """The loss that went too far was taken back; the next iteration must not add it to its own."""
    models, batch, lengths, _ = rolled()
    for more in (dict(), dict(grad_accum=2)):
        after, _, measured = trained(models, batch, lengths, epochs=6, early_stop_kl=1e-5, **more)
        assert measured['updates'] == 1
        for model in (after.policy, after.critic):
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())

@pytest.mark.parametrize('limit, updates', [(0.2, 1), (0.1, 0)])
def test_early_stop_is_about_the_kl_per_token(monkeypatch, limit, updates):
    """0.148721 per token, as in test_a_wrong_old_logp_shows: most answers have two, and a sum over them exceeds 0.2."""
    models, batch, lengths, _ = rolled()
    assert batch['mask'].sum(1).mean() > 1.5
    batch['old_logp'] = batch['old_logp'] - 0.5 * batch['mask']
    _, measured = updated(monkeypatch, models, batch, lengths, epochs=1, early_stop_kl=limit)
    assert measured['updates'] == updates and measured['approx_kl'] == pytest.approx(0.148721, abs=1e-4)
    assert ('grad_norm' in measured) == (updates > 0) # there is no mean of no norms

def test_the_critic_has_a_learning_rate_of_its_own():
    """Both follow the schedule: after two of four warmup steps they are at the half of their peaks."""
    models, batch, lengths, _ = rolled()
    options = dict(epochs=1, warmup_steps=4, lr_schedule='linear')
    _, optimizers, measured = trained(models, batch, lengths, step=1, lr=0.02, critic_lr=0.005, **options)
    assert measured['lr'] == optimizers['policy'].param_groups[0]['lr'] == by_hand(0.01)
    assert optimizers['critic'].param_groups[0]['lr'] == by_hand(0.0025)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for rates, moves in ((dict(lr=0.0), 'critic'), (dict(critic_lr=0.0), 'policy')):
        after, _, _ = trained(models, batch, lengths, **options | rates)
        moved = [name for name in ('policy', 'critic') if not same(getattr(after, name), getattr(models, name))]
        assert moved == [moves]

@pytest.mark.parametrize('shared, weight', [(False, 1.0), (True, 0.25)])
def test_value_coef_is_for_a_shared_critic(shared, weight):
    """A separate one has an optimizer, and a learning rate, of its own."""
    models, batch, _, _ = rolled()
    cfg = config()
    cfg.value_coef = 0.25
    if shared:
        models = models._replace(policy=models.critic)
    loss, measured, _ = ppo_loss(models, batch | dict(groups=T([1] * 64)), cfg, RUN)
    assert measured['value_loss'].item() > 0.01
    assert loss.item() == by_hand(measured['policy_loss'].item() + weight * measured['value_loss'].item())
    assert measured['loss'].item() == loss.item()

def test_the_entropy_bonus_pulls_towards_the_uniform_policy(monkeypatch):
    """With nothing else to gain, a step along the gradient raises the entropy."""
    models, batch, lengths, _ = rolled()
    batch['advantages'] = torch.zeros_like(batch['advantages'])
    plain, _ = updated(monkeypatch, models, batch, lengths, epochs=1)
    bonus, _ = updated(monkeypatch, models, batch, lengths, epochs=1, entropy_coef=0.25)
    _, entropy, _ = models.policy.logp_entropy_values(batch['idx'], batch['mask'], True)
    expected = torch.autograd.grad(-0.25 * entropy.sum() / batch['mask'].sum(), list(models.policy.parameters()))
    assert max(g.abs().max().item() for g in plain[0]) == 0.0
    for g, e in zip(bonus[0], expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-6)

# ---------------------------------------------------------------------------------------------------------------------
# runs

@pytest.fixture
def given(tmp_path):
    return dict(policy=checkpoint(tmp_path / 'sft'), reward_model=checkpoint(tmp_path / 'rm', 1, reward_head=True),
                prompts=records(tmp_path / 'prompts.jsonl', PROMPTS), max_new_tokens=6, batch_size=4, minibatches=2,
                epochs=2, critic_lr=1e-3)

LOGGED = {'step', 'time', 'reward', 'score', 'kl', 'kl_k3', 'entropy', 'ended', 'length', 'values', 'returns',
          'returns_std', 'explained_variance', 'loss', 'policy_loss', 'value_loss', 'ratio', 'clipfrac', 'approx_kl',
          'value_clipfrac', 'grad_norm', 'first_ratio', 'updates', 'kl_coef', 'lr'}

@pytest.mark.parametrize('options', [
    dict(), dict(critic='shared', critic_lr=1e-5), dict(whiten_rewards=True, entropy_coef=0.01),
    dict(kl_target=1.0, kl_gain=0.08),
    dict(grad_accum=2, early_stop_kl=1e-6), dict(n_answers=4),
    dict(n_answers=2, grad_accum=2, critic='shared', critic_lr=1e-5), dict(gold='data.toy.world:gold')])
def test_two_iterations(tmp_path, given, options):
    if 'gold' in options: # it knows no other prompts
        given['prompts'] = records(tmp_path / 'toy.jsonl', world.prompts('train', 8, 1))
    log = run(ppo, out_dir=str(tmp_path / 'out'), max_steps=2, **given | options)
    assert [set(line) for line in log] == [LOGGED | ({'gold'} if 'gold' in options else set())] * 2
    assert all(math.isfinite(v) for line in log for v in line.values())
    assert log[0]['first_ratio'] < 1e-4 and log[1]['first_ratio'] < 1e-4
    assert log[0]['kl'] == pytest.approx(0.0, abs=1e-4) and abs(log[1]['kl']) > 1e-6 # it starts at the reference
    assert log[0]['updates'] == (1 if 'early_stop_kl' in options else 4)
    if 'kl_target' in options: # below the target: 0.05 (1 - 0.08 * 0.2)
        assert [line['kl_coef'] for line in log] == by_hand([0.05, 0.0492])
    assert GPT.from_pretrained(str(tmp_path / 'out')).config.value_head == (options.get('critic') == 'shared')

def test_several_answers_to_a_prompt(tmp_path, given, monkeypatch):
    """Each prompt four times side by side, two prompts an iteration; an epoch asks all eight. Resumes exactly."""
    asked, widths, roll, trunk = [], [], ppo.roll_out, GPT.trunk

    def noting(*args):
        batch, lengths, measured = roll(*args)
        asked.append([TOK.decode(ids.tolist()).split('Human: ')[1].split('\n')[0] for ids in batch['idx']])
        return batch, lengths, measured

    monkeypatch.setattr(ppo, 'roll_out', noting)
    monkeypatch.setattr(GPT, 'trunk', lambda self, idx, *a, **k: (
        widths.append(len(idx)) if torch.is_grad_enabled() else None, trunk(self, idx, *a, **k))[1])
    run(ppo, out_dir=str(tmp_path / 'out'), max_steps=4, **given | dict(n_answers=4))
    assert all(len(set(prompts[i:i + 4])) == 1 for prompts in asked for i in (0, 4)) and {8} == set(map(len, asked))
    assert sorted(prompts[i] for prompts in asked for i in (0, 4)) == sorted(r['prompt'] for r in PROMPTS)
    assert widths == [1] * 32 # 4 iterations, 2 epochs, 2 minibatches of 4 answers to one prompt, policy and critic
    assert_resumes_exactly(tmp_path, ppo, **given | dict(n_answers=2, minibatches=1))

def test_the_very_first_update_of_a_run(tmp_path, given):
    log = run(ppo, out_dir=str(tmp_path / 'out'), max_steps=1, **given | dict(epochs=1, minibatches=1, batch_size=8))
    assert log[0]['first_ratio'] < 1e-4 and log[0]['clipfrac'] == 0.0 and abs(log[0]['policy_loss']) < 1e-5

def test_a_shared_critic_adds_no_bias_to_a_policy_without(tmp_path, given):
    """What was trained is what a policy is loaded as: without a final bias."""
    policy, out = str(tmp_path / 'plain'), str(tmp_path / 'out')
    GPT(GPTConfig(64, 257, n_layer=1, n_head=2, n_embd=16, bias=False)).save_pretrained(policy)
    TOK.save(policy)
    run(ppo, out_dir=out, max_steps=2, **given | dict(policy=policy, critic='shared', critic_lr=1e-5, lr=1e-2))
    trained = GPT.from_pretrained(out)
    assert trained.ln_f.bias.abs().max() == 0 and trained.value_head.weight.abs().max() > 0

def test_the_critic_starts_as_the_reward_model_and_others_stay(tmp_path, given, monkeypatch):
    kept, load_models = [], ppo.load_models
    monkeypatch.setattr(ppo, 'load_models', lambda *a: (kept.append(load_models(*a)), kept[-1])[1])
    before = load_models(config(**{k: given[k] for k in ('policy', 'reward_model')}), RUN, TOK)
    assert torch.equal(before.critic.value_head.weight, before.reward.models[0].reward_head.weight)
    run(ppo, out_dir=str(tmp_path / 'out'), max_steps=2, **given)
    after = kept[0]
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert same(before.reward.models[0], after.reward.models[0]) and same(before.reference, after.reference)
    assert same(before.policy, before.reference)
    assert not same(before.policy, after.policy) and not same(before.critic, after.critic)

@pytest.mark.parametrize('critic, scale_may_change', [('separate', [False, True]), ('shared', [True])])
def test_float16(tmp_path, given, monkeypatch, critic, scale_may_change):
    """After the last of the optimizers the scale may change; the frozen models are held in 16 bits, the others not."""
    kept, load_models, last, optimizer_step = [], ppo.load_models, [], training.optimizer_step
    monkeypatch.setattr(ppo, 'load_models', lambda *a: (kept.append(load_models(*a)), kept[-1])[1])
    monkeypatch.setattr(ppo, 'optimizer_step', lambda run, cfg, step, model, optimizer, lr, *more: (
        last.append((more or (True,))[0]), optimizer_step(run, cfg, step, model, optimizer, lr, *more))[1])
    lines = run(ppo, out_dir=str(tmp_path / 'out'), max_steps=1, dtype='float16', critic=critic,
                **given | dict(epochs=1, minibatches=1, batch_size=8, critic_lr=1e-5))
    assert last == scale_may_change and lines[0]['grad_norm'] > 0
    models = kept[0]._replace(reward=kept[0].reward.models[0])
    held = [m.h[0].mlp.c_fc.weight.dtype for m in models] # policy, critic, reward model, reference
    assert held == [torch.float32] * 2 + [torch.float16] * 2

class Falls(torch.nn.Module):
    """Gives token number k the log-probability -w k; a pad's is absurd."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0))

    def logp(self, idx, mask):
        return -self.w * torch.where(idx[:, 1:] == 0, 1e6, idx[:, 1:].float()) * mask

@pytest.mark.parametrize('grad_accum', [1, 3])
def test_ptx_loss_by_hand(grad_accum):
    examples = [([5, 2, 1], [0, 1, 1]), ([7, 9, 4, 3], [0, 0, 1, 1]), ([6, 8], [0, 1])]
    policy = Falls()
    loss = ptx_backward(policy, examples, SimpleNamespace(ptx_coef=0.5, grad_accum=grad_accum), RUN)
    assert loss == by_hand(3.6) # (2 + 1 + 4 + 3 + 8) / 5 tokens, whatever rows they are in; not times ptx_coef
    assert policy.w.grad.item() == by_hand(1.8) # 0.5 * 3.6

@pytest.mark.parametrize('grad_accum', [1, 2])
def test_ptx_adds_the_pretraining_gradient_and_walks_through_its_data(tmp_path, given, monkeypatch, grad_accum):
    data = records(tmp_path / 'demonstrations.jsonl', DEMONSTRATIONS)
    options = given | dict(max_steps=2, grad_clip=0.0, grad_accum=grad_accum)
    asked, load = [], ppo.load_training_set

    def noting(*args, **more):
        rows, other = load(*args, **more)
        at = rows.at
        rows.at = lambda step: (asked.append(step), at(step))[1]
        return rows, other

    plain, lines = gradients(monkeypatch, ppo, out_dir=str(tmp_path / 'plain'), **options)
    assert 'ptx_loss' not in lines[0]
    monkeypatch.setattr(ppo, 'load_training_set', noting)
    mixed, _ = gradients(monkeypatch, ppo, out_dir=str(tmp_path / 'mixed'), ptx_coef=0.5, ptx_data=data,
                         ptx_batch_size=8, **options)
    assert asked == list(range(8)) # two iterations of two epochs of two minibatches: no batch twice, none left out
    _, lines = gradients(monkeypatch, ppo, out_dir=str(tmp_path / 'once'), ptx_coef=0.5, ptx_data=data,
                         ptx_batch_size=8, early_stop_kl=1e-6, **options)
    policy = GPT.from_pretrained(given['policy'])
    rows = load(data, TOK, 64, 8, 1)[0].at(0)
    loss = 0.0 # the mean over all 64 answer tokens, one row at a time
    for ids, mask in rows:
        logp = policy(T([ids]))[0].log_softmax(-1)[0]
        loss = loss - sum(logp[t - 1, ids[t]] for t in range(len(ids)) if mask[t]) / 64
    expected = torch.autograd.grad(0.5 * loss, list(policy.parameters()))
    for a, b, e in zip(plain[0], mixed[0], expected, strict=True):
        torch.testing.assert_close(b - a, e, rtol=0, atol=1e-5)
    assert lines[0]['updates'] == 1 and lines[0]['ptx_loss'] == by_hand(loss.item()) # of the updates that were made
