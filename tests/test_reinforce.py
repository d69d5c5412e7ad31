"""
reinforce.py: the kinds of advantage, the losses and the averages by hand; TRL's numbers; the enumerable test bed, where
gradients are sums over all groups of answers; roll-outs, refilling and updates. test_stages.py has the rest.
"""
import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import reinforce
from common.checkpoints import read_log
from common.rollout import kl_k1, kl_k3, masked_mean, pack
from common.tokens import prompt_ids
from common.rewards import Reward
from common.training import make_optimizer
from data.toy import world
from model import GPT
from ppo import policy_loss
from reinforce import advantages, reinforce_loss, roll_out, token_weights, update
from tiny import (ANSWERS, BED_TOK, CLIPPED, EOS, N_TOKENS, PROMPT, PROMPTS, REWARDS, RUN, TOK, LikesOnes, bed,
                  assert_resumes_exactly, by_hand, checkpoint, enumerated, in_processes, records, run, weights)

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

def test_dr_grpos_advantages_by_hand():
    # mean 3; 0 in the second prompt, whose answers all score alike. RLOO's, 3 / 2 times as large, are above
    got = advantages(T([[1., 2., 6.], [5., 5., 5.]]), 'grpo', scale_std=False)
    assert got.tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]

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
        self.logp = lambda idx, mask, groups: logp

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ratio, advantage, loss, grad', CLIPPED)
def test_the_clipped_surrogate_by_hand(kind, ratio, advantage, loss, grad):
    logp = T([[math.log(ratio) - 3, 9.0]], requires_grad=True) # the second token is padding
    b = dict(idx=None, groups=T([1]), mask=T([[1., 0.]]), old_logp=T([[-3., 1e6]]), ref_logp=T([[0., 0.]]),
             advantages=T([[advantage, 1e6]]), weight=T([[1.]]))
    out, measured, far = reinforce_loss(Says(logp), b, config(kind=kind, kl_coef=0.0, clip=0.2), RUN)
    out.backward()
    assert out.shape == () and out.item() == measured['policy_loss'].item() == by_hand(loss)
    assert logp.grad.tolist() == [by_hand([grad, 0.0])] and far.item() == by_hand(abs(ratio - 1))

def test_grpos_loss_by_hand():
    # two answers of two tokens and of one, at ratio 1: -(2 + 2 - 1) / 3 = -1, every token weighs the same
    # k3 with ref - logp = log 2 and 0, 0: (2 - 1 - log 2) / 3 = 0.102284; its gradient (1 - 2) / 3 at the first token
    logp = T([[-2., -1.], [-3., 1e6]], requires_grad=True)
    b = dict(idx=None, mask=T([[1., 1.], [1., 0.]]), old_logp=logp.detach(), advantages=T([[2., 2.], [-1., 1e6]]),
             ref_logp=T([[math.log(2) - 2, -1.], [-3., -1.]]), weight=T([[1.], [1.]]), groups=T([2]))
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
    b = dict(idx=None, groups=T([7]), mask=mask, old_logp=old_logp, ref_logp=old_logp, advantages=A,
             weight=torch.ones(7, 1))
    found, _, _ = reinforce_loss(Says(logp), b, config(kind='rloo', clip=0.1), RUN)
    assert found.item() == expected.item() != 0.0
    assert torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (found, expected)))

# ---------------------------------------------------------------------------------------------------------------------
# GRPO as people run it now. Two answers, of three tokens and of one; padding is absurd

MASK, A = T([[1., 1., 1.], [1., 0., 0.]]), T([[2., 2., 2.], [-1., 1e6, 1e6]])
RATIOS = T([[1.25, 0.5, 1.0], [0.9, 1e4, 1e4]])

def graded(weights=((1.,), (1.,)), advantages=A, ratios=RATIOS, **options):
    """Return loss, gradient by log pi (2, 3) and metrics; log pi is -3, -2 and -1, in the second answer -0.5."""
    logp = T([[-3., -2., -1.], [-0.5, 1e4, 1e4]], requires_grad=True)
    old_logp = logp.detach() - ratios.log()
    b = dict(idx=None, groups=T([2]), mask=MASK, old_logp=old_logp, ref_logp=logp.detach(), advantages=advantages,
             weight=T(weights))
    loss, measured, _ = reinforce_loss(Says(logp), b, config(**options), RUN)
    loss.backward()
    return loss.item(), logp.grad.tolist(), measured

@pytest.mark.parametrize('average, expected', [
    ('token', [[1.0], [1.0]]), # four tokens: n = 2 on average
    ('answer', [[2 / 3], [2.0]]), # n / 3 and n / 1: sums over tokens / 4 become 1/2 sum / 3 and 1/2 sum / 1
    ('constant', [[0.4], [0.4]])]) # n / 5
def test_token_weights_by_hand(average, expected):
    mask = torch.cat([MASK, torch.ones(5, 3)]) # other answers of the iteration do not count
    assert token_weights(mask, T([1, 0]), average, 5, RUN)[:2].tolist() == [by_hand(row) for row in expected]

@pytest.mark.parametrize('average, loss, grad', [
    # per token -A ratio, clipped at 1.2: -2.4, -1, -2 and 0.9; gradients 0, -1, -2 and 0.9
    ('token', -1.125, [[0.0, -0.25, -0.5], [0.225, 0.0, 0.0]]), # (-2.4 - 1 - 2 + 0.9) / 4
    ('answer', -0.45, [[0.0, -1 / 6, -1 / 3], [0.45, 0.0, 0.0]]), # ((-2.4 - 1 - 2) / 3 + 0.9 / 1) / 2
    ('constant', -0.45, [[0.0, -0.1, -0.2], [0.09, 0.0, 0.0]])]) # ((-2.4 - 1 - 2) + 0.9) / 2 / 5
def test_three_averages_by_hand(average, loss, grad):
    weights = token_weights(MASK, T([0, 1]), average, 5, RUN).tolist()
    found, by_logp, _ = graded(weights, average=average, max_new_tokens=5)
    assert (found, by_logp) == (by_hand(loss), [by_hand(row) for row in grad])

def test_the_kl_is_averaged_as_the_rest():
    """GRPO's equation 3 has it inside of the sums: k3 0.5 - log 1.5, 0, 0 and 2 - 1 - log 2."""
    logp = T([[-1., -1., -1.], [-1., 1e6, 1e6]], requires_grad=True)
    b = dict(idx=None, groups=T([2]), mask=MASK, old_logp=logp.detach(), advantages=0 * MASK, weight=T([[2 / 3], [2.]]),
             ref_logp=T([[math.log(1.5) - 1, -1., -1.], [math.log(2) - 1, 1e6, 1e6]]))
    out, measured, _ = reinforce_loss(Says(logp), b, config(kind='grpo', kl_coef=0.5, average='answer'), RUN)
    out.backward()
    # ((0.5 - 0.405465) / 3 + (1 - 0.693147)) / 2 = 0.169182; slopes 1 - 1.5 over 6 and 1 - 2 over 2
    assert measured['kl_loss'].item() == by_hand(0.169182) and out.item() == by_hand(0.084591)
    assert logp.grad.tolist() == [by_hand([-0.5 * 0.5 / 6, 0.0, 0.0]), by_hand([-0.25, 0.0, 0.0])]

def test_clip_higher_by_hand():
    # 1.25 is within 1.28: -2 * (1.25 + 0.5 + 1) + 0.9 = -4.6; the lower end stays: at A -1 a ratio of 0.7 counts 0.8
    loss, grad, measured = graded(clip_high=0.28)
    assert loss == by_hand(-1.15) and grad[0] == by_hand([-0.625, -0.25, -0.5])
    assert measured['clipfrac'].item() == 0.25 # 0.5, below 0.8
    loss, grad, measured = graded(clip_high=0.28, ratios=T([[1.25, 1.3, 1.0], [0.7, 1e4, 1e4]]))
    assert loss == by_hand((-2.5 - 2.56 - 2 + 0.8) / 4) and grad == [by_hand([-0.625, 0.0, -0.5]), [0.0, 0.0, 0.0]]
    assert measured['clipfrac'].item() == 0.5 # 1.3 and 0.7

def test_gspo_by_hand():
    # the first answer's ratio: (1.5 * 0.9 * 1.1)^(1/3) = 1.485^(1/3) = 1.140886; the second's 0.9
    ratios = T([[1.5, 0.9, 1.1], [0.9, 1e4, 1e4]])
    options = dict(ratio='sequence', average='answer', ratios=ratios, weights=[[2 / 3], [2.]])
    loss, grad, measured = graded(**options) # mean over answers of -A ratio: (-2 * 1.140886 + 0.9) / 2
    assert loss == by_hand(-0.690886)
    # d ratio / d logp of each token = ratio / |o|: -2 * 1.140886 / 3 / 2 and 0.9 / 2
    assert grad == [by_hand([-0.380295] * 3), by_hand([0.45, 0.0, 0.0])]
    assert measured['clipfrac'].item() == 0.0 and measured['ratio'].item() == by_hand((1.5 + 0.9 + 1.1 + 0.9) / 4)
    # an answer is clipped as a whole
    loss, grad, measured = graded(**options, clip=0.12) # at 1.12: (-2 * 1.12 + 0.9) / 2
    assert loss == by_hand(-0.67) and grad == [[0.0, 0.0, 0.0], by_hand([0.45, 0.0, 0.0])]
    assert measured['clipfrac'].item() == 0.75

def test_cispo_by_hand():
    # weights 1.2, 0.5, 1 and 0.9, from below not clipped: -2 * (1.2 * -3 + 0.5 * -2 + 1 * -1) + 0.9 * -0.5 = 10.75
    loss, grad, measured = graded(loss='cispo')
    assert loss == by_hand(2.6875) # / 4
    assert grad == [by_hand([-0.6, -0.25, -0.5]), by_hand([0.225, 0.0, 0.0])] # the clipped token still learns
    assert measured['clipfrac'].item() == 0.25
    # a bad answer's weight is capped too: A -2, ratio 9, at 1 + 3
    loss, grad, _ = graded(loss='cispo', clip_high=3.0, advantages=-A, ratios=T([[9.0, 0.5, 1.0], [0.9, 1e4, 1e4]]))
    assert loss == by_hand((2 * (4 * -3 + 0.5 * -2 + 1 * -1) - 0.9 * -0.5) / 4)
    assert grad == [by_hand([2.0, 0.25, 0.5]), by_hand([-0.225, 0.0, 0.0])]

@pytest.mark.parametrize('options', [dict(), dict(loss='cispo'), dict(ratio='sequence'), dict(clip_high=0.3)])
def test_on_policy_all_of_them_are_reinforce(options):
    """At ratio 1 the gradient is that of -A log pi."""
    _, grad, _ = graded(**options, ratios=T([[1.0, 1.0, 1.0], [1.0, 1e4, 1e4]]))
    assert grad == [by_hand([-0.5, -0.5, -0.5]), by_hand([0.25, 0.0, 0.0])]

# ---------------------------------------------------------------------------------------------------------------------
# TRL 1.16's GRPOTrainer: its loss and gradients on four answers; no token of theirs is padding but for the mask's

LOGP = [[-0.8, -1.9, -0.2, -1.1, -0.6], [-2.3, -0.5, -1.4, -9., -9.], [-0.9, -9., -9., -9., -9.],
        [-1.3, -0.4, -0.7, -2.0, -9.]]
OLD = [[-1.1, -1.8, -0.2, -1.33, -1.0], [-2.2, -0.9, -1.3, -3., -3.], [-0.6, -3., -3., -3., -3.],
       [-1.7, -0.1, -0.8, -2.2, -3.]]
REF = [[-1.0, -1.7, -0.4, -1.2, -0.7], [-2.0, -0.6, -1.5, -1., -1.], [-0.8, -1., -1., -1., -1.],
       [-1.3, -0.5, -0.9, -1.6, -1.]]
COUNTED = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
TRL = { # ours, theirs; what theirs gives: loss, gradient by log pi. Their epsilon_high of cispo is our 1 + clip_high
    'grpo': (dict(average='answer'), dict(loss_type='grpo'), 0.04969, [
        [0.000906, -0.055397, -0.059094, 0.000476, 0.000476], [0.049867, 0.087816, 0.053575, 0.0, 0.0],
        [-0.076711, 0.0, 0.0, 0.0, 0.0], [0.083915, 0.000595, 0.063299, 0.06563, 0.0]]),
    'dapo': (dict(clip_high=0.28), dict(loss_type='dapo', epsilon_high=0.28), -0.051691, [
        [0.001394, -0.085227, -0.090913, -0.115446, 0.000732], [0.046031, 0.081061, 0.049454, 0.0, 0.0],
        [-0.023603, 0.0, 0.0, 0.0, 0.0], [0.10328, 0.000732, 0.077906, 0.080775, 0.0]]),
    'dr_grpo': (dict(average='constant'), dict(loss_type='dr_grpo'), -0.012802, [
        [0.000566, -0.034623, -0.036934, 0.000297, 0.000297], [0.0187, 0.032931, 0.020091, 0.0, 0.0],
        [-0.009589, 0.0, 0.0, 0.0, 0.0], [0.041958, 0.000297, 0.031649, 0.032815, 0.0]]),
    'gspo': (dict(ratio='sequence', average='answer', clip=0.05),
        dict(loss_type='grpo', importance_sampling_level='sequence', epsilon=0.05), 0.048335, [
        [0.000906, -0.001107, 0.000906, 0.000476, 0.000476], [0.059439, 0.063148, 0.063148, 0.0, 0.0],
        [-0.076711, 0.0, 0.0, 0.0, 0.0], [0.062166, 0.062761, 0.063299, 0.059092, 0.0]]),
    'cispo': (dict(loss='cispo', clip_high=0.25), dict(loss_type='cispo', epsilon_high=1.25), -0.081571, [
        [-0.11399, -0.085227, -0.090913, -0.114653, -0.114653], [0.046031, 0.06804, 0.049454, 0.0, 0.0],
        [-0.023603, 0.0, 0.0, 0.0, 0.0], [0.086538, 0.052019, 0.077906, 0.080775, 0.0]]),
}

def trl_loss(loss_type, epsilon=0.2, epsilon_high=None, importance_sampling_level='token', beta=0.1):
    """Return the loss of TRL's GRPOTrainer and its gradient by log pi; max_completion_length is 8."""
    trl = pytest.importorskip('trl', reason="other people's trainers")
    logp, same = T(LOGP, requires_grad=True), lambda x, **_: x
    trainer = SimpleNamespace(
        loss_type=loss_type, importance_sampling_level=importance_sampling_level, epsilon_low=epsilon, beta=beta,
        epsilon_high=epsilon_high or epsilon, max_completion_length=8, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same),
        _metrics=dict(train=defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros(4, 5), None))
    nothing, counted = torch.zeros(4, 0, dtype=torch.long), T(COUNTED)
    loss = trl.GRPOTrainer._compute_loss(trainer, None, dict(
        prompt_ids=nothing, prompt_mask=nothing, completion_ids=counted, completion_mask=counted,
        advantages=T(ADVANTAGES), old_per_token_logps=T(OLD), ref_per_token_logps=T(REF),
        num_items_in_batch=counted.sum()))
    return loss.detach(), torch.autograd.grad(loss, logp)[0]

def our_loss(**options):
    mask, logp = T(COUNTED).float(), T(LOGP, requires_grad=True)
    cfg = config(**dict(dict(kind='grpo', kl_coef=0.1, max_new_tokens=8), **options))
    b = dict(idx=None, groups=T([4]), mask=mask, old_logp=T(OLD), ref_logp=T(REF),
             advantages=T(ADVANTAGES)[:, None] * mask, weight=token_weights(mask, torch.arange(4), cfg.average, 8, RUN))
    loss, _, _ = reinforce_loss(Says(logp), b, cfg, RUN)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]

@pytest.mark.parametrize('name', TRL)
def test_loss_and_gradient_are_those_of_trl(name):
    options, _, loss, grad = TRL[name]
    found, by_logp = our_loss(**options)
    assert found.item() == by_hand(loss) and by_logp.tolist() == [by_hand(row) for row in grad]

@pytest.mark.parametrize('name', TRL)
def test_trl_itself_gives_these_numbers(name):
    _, options, loss, grad = TRL[name]
    found, by_logp = trl_loss(**options)
    assert found.item() == by_hand(loss) and by_logp.tolist() == [by_hand(row) for row in grad]

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
    b = dict(idx=r.idx, groups=T([13]), mask=r.mask, old_logp=old_logp, ref_logp=ref_logp,
             advantages=weighted[:, None] * r.mask, weight=torch.ones(13, 1))
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
    models = policy, Reward([LikesOnes()]), copy.deepcopy(policy)
    optimizer = make_optimizer(policy, cfg, eps=1e-5)
    before = (enumerated(policy).exp() * REWARDS).sum().item()
    for step in range(iterations):
        batch, lengths, _ = roll_out(models, [PROMPT] * (cfg.batch_size // cfg.n_answers), [{}] * cfg.batch_size,
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
    cfg, models = config(**more), (bed(1), Reward([LikesOnes()]), bed(2))
    with torch.no_grad():
        torch.manual_seed(5)
        return models, *roll_out(models, [PROMPT] * 16, [{}] * 16, BED_TOK, cfg, 0.5, RUN)

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

def test_dr_grpo_is_rloo_but_for_a_factor():
    """K / (K - 1), where the reward holds no KL."""
    (_, ours, *_), (_, rloo, *_) = (rolled(kl_coef=0.0, **kind) for kind in (
        dict(kind='grpo', scale_std=False, average='constant'), dict(kind='rloo')))
    torch.testing.assert_close(ours['advantages'] * 4 / 3, rloo['advantages'], rtol=0, atol=1e-6)
    assert rloo['advantages'].abs().max() > 0.5

def updated(monkeypatch, models, batch, lengths, **more):
    """One call of update on a copy of the policy; the gradients of its optimizer steps and what it measured."""
    cfg, policy, seen = config(**more), copy.deepcopy(models[0]), []
    monkeypatch.setattr(reinforce, 'optimizer_step', lambda run, cfg, step, model, optimizer, *a: (
        seen.append([p.grad.clone() for p in model.parameters()]), optimizer.step(), optimizer.zero_grad())[0] or 0.0)
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    return seen, update(policy, optimizer, batch, lengths, cfg, RUN, 0)

@pytest.mark.parametrize('options', [
    dict(kind='rloo'), dict(kind='grpo'), dict(kind='grpo', ratio='sequence', average='answer', clip=0.01),
    dict(kind='grpo', scale_std=False, average='constant'),
    dict(kind='reinforce', loss='cispo', average='answer', clip_high=0.03)])
def test_micro_batches_of_different_token_counts(monkeypatch, options):
    models, batch, lengths, _ = rolled(**options)
    assert len(set(lengths.tolist())) > 1
    (whole, one), (parts, four) = (updated(monkeypatch, models, batch, lengths, grad_accum=n, epochs=2, minibatches=2,
                                           batch_size=32, **options) for n in (1, 4))
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
    monkeypatch.setattr(GPT, 'logp', lambda self, idx, mask, groups: (
        seen.append([row[:1 + int(m.sum())].tolist() for row, m in zip(idx, mask)]), logp(self, idx, mask, groups))[1])
    _, measured = updated(monkeypatch, models, batch, lengths, epochs=3, minibatches=4, batch_size=16, grad_accum=2)
    assert measured['updates'] == 12 and len(seen) == 24
    answers = sorted(row[:n] for row, n in zip(batch['idx'].tolist(), lengths.tolist()))
    for epoch in range(3):
        assert sorted(row for part in seen[8 * epoch:8 * epoch + 8] for row in part) == answers

# ---------------------------------------------------------------------------------------------------------------------
# dynamic sampling

def drawn(*draws):
    """Return a draw() for `refill`: each of two prompts with two answers; a draw is its scores and its width T."""
    left = list(enumerate(draws, 1))

    def draw():
        n, (scores, width) = left.pop(0)
        wide = T(scores).view(-1, 1) * torch.ones(1, width - 1)
        idx = 100 * n + torch.arange(4)[:, None] + torch.zeros(1, width, dtype=torch.long)
        return (dict(idx=idx, mask=torch.ones(4, width - 1), scores=wide), torch.full((4,), width),
                dict(reward=T(scores).mean()))

    return draw, left

def test_refill_by_hand():
    some, more, none = [[1., 1.], [0., 1.]], [[2., 2.], [3., 4.]], [[5., 5.], [6., 6.]]
    cfg = config(kind='grpo', n_answers=2, refill=2)
    draw, left = drawn((some, 4), (more, 5), (none, 6)) # the second prompts of two draws are enough
    batch, lengths, measured = reinforce.refill(draw, cfg, RUN)
    assert batch['idx'].tolist() == [[102] * 4 + [0], [103] * 4 + [0], [202] * 5, [203] * 5] and len(left) == 1
    assert batch['mask'].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1] * 4, [1] * 4] and lengths.tolist() == [4, 4, 5, 5]
    assert (measured['alike'].item(), measured['reward'].item()) == by_hand((0.5, (0.75 + 2.75) / 2))
    # in three draws there is one: the first prompt, left out before, fills the iteration
    batch, lengths, measured = reinforce.refill(drawn((none, 4), (some, 4), (none, 4), (more, 4))[0], cfg, RUN)
    assert batch['idx'][:, 0].tolist() == [202, 203, 100, 101] and measured['alike'].item() == by_hand(5 / 6)
    # nothing is drawn again where the first prompts will do
    batch, _, measured = reinforce.refill(drawn(([[0., 1.], [1., 0.]], 4))[0], cfg, RUN)
    assert batch['idx'][:, 0].tolist() == [100, 101, 102, 103] and measured['alike'].item() == 0.0

@pytest.fixture
def two_scores(tmp_path, given):
    """Return options of runs whose reward is 0, 1 or 2; about a third of the pairs of answers score alike."""
    file = tmp_path / 'judge.py'
    file.write_text("def judge(record, response):\n    return len(response) % 3\n")
    return given | dict(reward_model='', reward=f'{file}:judge', kind='grpo', n_answers=2, refill=2, epochs=2,
                        missing_eos_penalty=0.0)

def test_refilled_runs_resume_exactly(tmp_path, two_scores):
    assert_resumes_exactly(tmp_path, reinforce, **two_scores)
    log = read_log(str(tmp_path / 'whole' / 'log.jsonl'))
    assert all(set(line) == LOGGED | {'alike'} for line in log) and 0 < max(line['alike'] for line in log) < 1
    state = torch.load(tmp_path / 'whole' / 'state.pt', weights_only=True)
    assert 4 < state['drawn'] <= 12

def test_refill_in_two_processes(tmp_path, two_scores):
    """Each draws until both are full."""
    out = str(tmp_path / 'out')
    assert in_processes(2, lambda: run(reinforce, out_dir=out, max_steps=3, **two_scores)) == [0, 0]
    assert 0 < max(line['alike'] for line in read_log(out + '/log.jsonl')) < 1

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
    seen, texts, tables, judge, sample = [], [], [], reinforce.advantages, reinforce.sample_rollouts
    monkeypatch.setattr(reinforce, 'sample_rollouts', lambda model, prompts, *a: (
        seen.append(prompts), sample(model, prompts, *a))[1])
    monkeypatch.setattr(reinforce, 'mean_gold', lambda gold, rolls: (
        texts.append([record['prompt'] for (record, _), in rolls.asked]), {})[1])
    monkeypatch.setattr(reinforce, 'load_functions', lambda *a: (None, len, None))
    monkeypatch.setattr(reinforce, 'advantages', lambda rewards, *a: (tables.append(rewards), judge(rewards, *a))[1])
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=4, kind='rloo', **given)
    asked = [text for questions in texts for text in questions]
    assert len(seen) == len(texts) == 4 and len(asked) == 32 and all(t.shape == (2, 4) for t in tables)
    assert all(len(set(asked[i:i + 4])) == 1 for i in range(0, 32, 4)) # four in a row
    assert sorted(asked[::4]) == sorted(r['prompt'] for r in PROMPTS) # an epoch of all eight prompts
    for ids, questions in zip(seen, texts):
        assert len(ids) == 2 and ids[0] != ids[1]
        assert [prompt_ids(TOK, question) for question in questions] == [prompt for prompt in ids for _ in range(4)]

def test_others_stay(tmp_path, given, monkeypatch):
    kept, load = [], reinforce.load_actors
    monkeypatch.setattr(reinforce, 'load_actors', lambda *a: (kept.append(load(*a)), kept[-1])[1])
    before = load(config(**{k: given[k] for k in ('policy', 'reward_model')}), RUN, TOK)
    run(reinforce, out_dir=str(tmp_path / 'out'), max_steps=2, kind='grpo', **given)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    (policy, rm, reference), = kept
    assert same(before[1].models[0], rm.models[0]) and same(before[2], reference) and same(before[0], reference)
    assert not same(before[0], policy)
