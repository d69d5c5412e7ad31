"""
reinforce.py: the three kinds of advantage by hand; the enumerable test bed, where their gradients are sums over all
groups of answers; roll-outs and updates; resuming, micro-batches, and what is refused.
"""
import copy
import math

import pytest
import torch

import common
import ppo
import reinforce
from data.toy import world
from model import GPT
from reinforce import advantages, roll_out, update
from rollout import kl_k1, kl_k3, masked_mean, pack, policy_loss
from tiny import (ANSWERS, BED_TOK, EOS, N_TOKENS, PROMPT, PROMPTS, REWARDS, RUN, TOK, LikesOnes,
                  assert_ctrl_c_resumes_exactly, assert_resumes_exactly, bed, by_hand, checkpoint, enumerated,
                  has_checkpoint, records, run, stops, weights)

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


def test_one_loss_for_both_scripts():
    assert ppo.policy_loss is reinforce.policy_loss is policy_loss


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
    logp = policy.logp(r.idx, r.mask) # (13, T-1)
    old_logp = logp.detach()
    p = old_logp.sum(1).exp() # (13,)
    with torch.no_grad():
        rewards = scores - beta * (kl_k1(old_logp, reference.logp(r.idx, r.mask)) * r.mask).sum(1) # (13,)
    i, j = torch.cartesian_prod(torch.arange(13), torch.arange(13)).unbind(1) # all 169 groups of two
    first = advantages(torch.stack([rewards[i], rewards[j]], 1), kind, baseline)[:, 0] # (169,), of answer i
    weighted = torch.zeros(13).index_add(0, i, p[i] * p[j] * first) # (13,)
    (policy_loss(logp, old_logp, weighted[:, None] * r.mask, r.mask, 0.2) * N_TOKENS).backward()
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
    optimizer, net = common.make_optimizer(policy, cfg, eps=1e-5), RUN.parallel(policy)
    before = (enumerated(policy).exp() * REWARDS).sum().item()
    for step in range(iterations):
        batch, lengths, _ = roll_out(models, [PROMPT] * (cfg.batch_size // cfg.n_answers), ['?'] * cfg.batch_size,
                                     BED_TOK, cfg, 0.5, RUN)
        update(policy, net, optimizer, batch, lengths, cfg, RUN, step)
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
    monkeypatch.setattr(common, 'optimizer_step', lambda optimizer, model, *a: (
        seen.append([p.grad.clone() for p in model.parameters()]), optimizer.step(), optimizer.zero_grad())[0] or 0.0)
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return seen, update(policy, RUN.parallel(policy), optimizer, batch, lengths, cfg, RUN, 0)


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
    dict(kind='grpo', epochs=2, minibatches=2), dict(gold='toy')])
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


def test_the_answers_to_a_prompt_are_judged_together(tmp_path, given, monkeypatch):
    """Two prompts of four answers each an iteration: prompts and their answers stay in one row of the table."""
    seen = []
    monkeypatch.setattr(reinforce, 'sample_and_score', lambda *a: (seen.append(a[3:5]), score(*a))[1])
    tables, judge = [], reinforce.advantages
    monkeypatch.setattr(reinforce, 'advantages', lambda rewards, *a: (tables.append(rewards), judge(rewards, *a))[1])
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=4, kind='rloo', **given)
    asked = [text for _, questions in seen for text in questions]
    assert len(seen) == 4 and len(asked) == 32 and all(t.shape == (2, 4) for t in tables)
    assert all(len(set(asked[i:i + 4])) == 1 for i in range(0, 32, 4)) # four in a row
    assert sorted(asked[::4]) == sorted(r['prompt'] for r in PROMPTS) # an epoch of all eight prompts
    for ids, questions in seen:
        assert [len(set(map(tuple, ids[i:i + 4]))) for i in (0, 4)] == [1, 1] and ids[0] != ids[4]


score = reinforce.sample_and_score


def test_others_stay(tmp_path, given, monkeypatch):
    kept, load = [], reinforce.load_actors
    monkeypatch.setattr(reinforce, 'load_actors', lambda *a: (kept.append(load(*a)), kept[-1])[1])
    before = load(config(**{k: given[k] for k in ('policy', 'reward_model')}), RUN, TOK)
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=2, kind='grpo', **given)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    (policy, rm, reference), = kept
    assert same(before[1], rm) and same(before[2], reference) and same(before[0], reference)
    assert not same(before[0], policy)


@pytest.mark.parametrize('kind', KINDS)
def test_four_steps_equal_two_and_two_more(tmp_path, given, kind):
    assert_resumes_exactly(tmp_path, reinforce, kind=kind, **given | (dict(epochs=2) if kind == 'grpo' else {}))


def test_ctrl_c(tmp_path, given, monkeypatch, capsys):
    assert_ctrl_c_resumes_exactly(tmp_path, monkeypatch, capsys, reinforce, kind='reinforce', **given)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused

def test_a_loss_that_is_no_number_stops(tmp_path, given, capsys):
    model = GPT.from_pretrained(given['reward_model'])
    with torch.no_grad():
        model.ln_f.bias.fill_(float('nan'))
    model.save_pretrained(given['reward_model'])
    out = str(tmp_path / 'out')
    line = stops(capsys, reinforce, code=1, out_dir=out, max_steps=2, **given)
    assert 'nan' in line and 'step 1' in line and not has_checkpoint(out)


def test_a_step_that_throws_the_weights_far_away_stops(tmp_path, given, capsys):
    out = str(tmp_path / 'out')
    run(reinforce, out_dir=out, max_steps=1, save_every=1, **given)
    before = weights(out)
    line = stops(capsys, reinforce, code=1, out_dir=out, max_steps=2, resume=True, lr=1e30, grad_clip=0.0, epochs=2,
                 **given)
    assert 'step 2' in line and weights(out) == before and GPT.from_pretrained(out)


@pytest.mark.parametrize('options, expected', [
    (dict(n_answer=2), '--n_answer=2: unknown option n_answer, did you mean n_answers?'),
    (dict(max_steps=0), '--max_steps=0: max_steps must be at least 1, got 0'),
    (dict(kind='ppo'), "--kind=ppo: kind must be reinforce, rloo or grpo, got 'ppo'"),
    (dict(kind='rloo', n_answers=1), '--n_answers=1: n_answers must be at least 2 with kind=rloo, got 1'),
    (dict(kind='reinforce', n_answers=0), '--n_answers=0: n_answers must be at least 1 with kind=reinforce, got 0'),
    (dict(batch_size=6), '--batch_size=6: batch_size must be a multiple of n_answers=4, got 6'),
    (dict(batch_size=4, grad_accum=3), '--batch_size=4: must be a multiple of 3'),
    (dict(clip=-0.1), '--clip=-0.1: clip must be at least 0, got -0.1'),
    (dict(kl_coef=-1), '--kl_coef=-1: kl_coef must be at least 0, got -1.0'),
    (dict(epochs=0), '--epochs=0: epochs must be at least 1, got 0'),
    (dict(baseline_decay=1.0), '--baseline_decay=1.0: baseline_decay must be at least 0 and below 1, got 1.0'),
    (dict(gold='sums'), "--gold=sums: gold must be toy or empty, got 'sums'"),
    (dict(prompts=''), "prompts must be a file of prompts, got ''"),
    (dict(prompts='nowhere.jsonl'), 'nowhere.jsonl: no such file'),
    (dict(policy='nowhere'), 'nowhere'),
    (dict(reward_model='nowhere'), 'nowhere'),
    (dict(max_new_tokens=64), 'wanted block_size above max_new_tokens'),
    (dict(resume=True), 'state.pt is missing'),
])
def test_bad_options(tmp_path, given, capsys, options, expected):
    out = str(tmp_path / 'out')
    assert expected in stops(capsys, reinforce, out_dir=out, **given | options)
    assert not has_checkpoint(out)


def test_a_bad_row_is_named_by_file_and_line(tmp_path, given, capsys):
    path = tmp_path / 'p.jsonl'
    path.write_text('{"prompt": "Hi"}\n{"question": "Hi"}\n')
    said = stops(capsys, reinforce, out_dir=str(tmp_path / 'out'), **given | dict(prompts=str(path)))
    assert said.startswith(f"{path}:2: ") and 'to have `prompt`' in said


def test_checkpoints_that_do_not_fit(tmp_path, given, capsys):
    out, policy, rm = str(tmp_path / 'out'), given['policy'], given['reward_model']
    said = stops(capsys, reinforce, out_dir=out, **given | dict(policy=rm))
    assert said == f"--policy={rm}: is a reward model, wanted a language model"
    said = stops(capsys, reinforce, out_dir=out, **given | dict(reward_model=policy))
    assert said == f"--reward_model={policy}: is a language model, wanted a reward model (made by reward.py)"
    short = checkpoint(tmp_path / 'short', block_size=32, reward_head=True)
    said = stops(capsys, reinforce, out_dir=out, **given | dict(reward_model=short))
    assert said == (f"--reward_model={short}: its context is 32 tokens, the policy's 64; wanted one at least as long")
    assert not has_checkpoint(out)
    assert 'is --policy too; wanted another folder' in stops(capsys, reinforce, out_dir=policy, **given)
