"""Lessons 5 to 8: they run, what they print holds, and the solutions pass the checks of the exercises."""
import math

import pytest
import torch

from lessons import course, world
from tiny import by_hand

LESSONS = {5: '5_kl', 6: '6_dpo', 7: '7_over_optimisation', 8: '8_noise'}
SETTINGS = {5: dict(seeds=(0,), steps=150), 6: dict(steps=80, n=256),
            7: dict(seeds=(0,), people=1, comparisons=(100, 1000), steps=60), 8: dict(seeds=(0,), n=300, steps=30)}

# ---------------------------------------------------------------------------------------------------------------------
# the world

UNIFORM = torch.full((156,), -math.log(156.0))

def test_best_of_by_hand():
    """Two values, the better one with mass 1/4: it wins unless all n are of the other, 1 - (3/4)^n."""
    values = (torch.arange(156) < 39).float() # a quarter
    for n in (1, 2, 5):
        p = world.best_of(n, UNIFORM, values).exp()
        assert p[:39].sum().item() == by_hand(1 - 0.75**n) and p.sum().item() == by_hand(1.0)
        assert p[:39].max().item() == by_hand((1 - 0.75**n) / 39)
    assert world.by_value(UNIFORM, values).tolist() == by_hand([0.75, 0.25])

def test_best_of_keeps_a_finite_kl():
    assert math.isfinite(world.kl(world.best_of(4096, UNIFORM), UNIFORM))

def test_compare_asks_a_bradley_terry_person():
    """Half of the answers are worth log 3 more: of mixed pairs, which are half of all, these win 3 in 4."""
    torch.manual_seed(0)
    values = (torch.arange(156) < 78) * math.log(3.0)
    w, l = world.compare(20000, UNIFORM, values)
    mixed = values[w] != values[l]
    assert abs(mixed.float().mean().item() - 0.5) < 0.02 # four standard deviations are 0.014
    assert abs((values[w] > values[l])[mixed].float().mean().item() - 0.75) < 0.02

def test_root_by_hand():
    assert world.root(lambda c: 2 - c**3, 0.0, 2.0) == by_hand(2 ** (1 / 3))

# ---------------------------------------------------------------------------------------------------------------------
# the lessons and their exercises

@pytest.mark.parametrize('n', LESSONS)
def test_a_lesson_runs_and_draws(ran, n):
    *_, out = ran(n)
    pytest.importorskip('matplotlib')
    assert (out / f"{LESSONS[n]}.png").stat().st_size > 10000

@pytest.mark.parametrize('n', LESSONS)
def test_solutions_pass_and_gaps_do_not(n):
    lesson, solution = course.load(LESSONS[n]), course.load(f"solutions/{n}")
    for name, check in lesson.CHECKS.items():
        assert course.passes(check, getattr(solution, name)), name
        assert not course.passes(check, getattr(lesson, name)), name

def test_5_values_and_gradients_of_the_estimators(ran):
    """k1 and k3 have no bias, k2 has; as a loss k2 has the gradient of KL(pi || q), k3 that of KL(q || pi)."""
    found, _ = ran(5)[1]
    for exact, lines in found.values():
        for name in ('k1', 'k3', 'k3 per token'):
            assert abs(lines[name][0]) < 1e-4 * max(1, exact), name
        assert lines['k2'][0] > 1e-3 and lines['k2'][3] > 0.9999 and lines['k2'][4] < 0.999
        assert lines['k3'][4] > 0.9999 and lines['k3'][3] < 0.999
        assert lines['k1'][3] == lines['k1'][4] == 0
    (_, near), (_, far) = found[0.1, 0], found[1.0, 0]
    assert near['k3'][1] < near['k1'][1] / 2 and far['k3'][1] > far['k1'][1]

def test_5_one_direction_covers_and_the_other_seeks(ran):
    lesson, (_, fits), _ = ran(5)
    share = lambda logp, texts: sum(logp[lesson.number(text)].exp().item() for text in texts)
    assert share(fits[True, 0], lesson.MIXED) > 0.4 and share(fits[False, 0], lesson.MIXED) < 0.05
    assert max(fits[False, 0][lesson.number(text)].exp().item() for text in lesson.MODES) > 0.9

def test_5_unbiased_says_little_about_one_run():
    for exact, mean, spread in course.load('solutions/5').exercise_1():
        assert mean < 0.9 * exact and spread > 1000 * exact

def test_6_the_shapes_of_the_optima_by_hand():
    """With rewards 0 and log 3 in equal parts, p is 3/8 and 5/8."""
    lesson = course.load('6_dpo')
    lesson.REWARDS, lesson.SIZES = torch.tensor([0.0, math.log(3.0)]), torch.ones(2)
    ref = torch.tensor([0.5, 0.5]).log()
    assert lesson.own_optimum('RRHF', ref).tolist() == by_hand([3 / 8, 5 / 8])
    odds = math.exp(1 / 4) # e^(5/8 - 3/8)
    assert lesson.own_optimum('IPO', ref).tolist() == by_hand([1 / (1 + odds), odds / (1 + odds)])
    assert lesson.own_optimum('KTO', ref).tolist() == by_hand([0, 1]) # the first one mostly loses
    assert lesson.own_optimum('DPO', ref) is None

def test_6_who_comes_near_the_optimum(ran):
    """Already after a short training: all raise the reward, RLOO and DPO halve the distance, IPO goes elsewhere."""
    found = {name: lines[0] for name, lines in ran(6)[1].items()}
    assert all(line[1] > found['reference'][1] + 0.1 for name, line in found.items() if name != 'reference') # reward
    assert found['pi*'][0] == by_hand(0.0) and found['pi*'][3] == pytest.approx(1.0)
    for name in ('RLOO', 'DPO'):
        assert found[name][0] < found['reference'][0] / 2, name
    assert found['RLOO'][0] < found['GRPO'][0] and found['IPO'][4] < found['IPO'][0] / 2

def test_6_ppo_and_rloo_reach_the_optimum():
    lesson = course.load('6_dpo')
    ref = world.log_pi(world.new_policy(0)).detach()
    for method, steps in (('RLOO', 200), ('PPO', 400)):
        assert lesson.measure(lesson.train(method, 0, steps, 256), ref, method)[0] < 0.03, method

def test_6_grpo_ends_at_its_own_optimum():
    """Whether its rewards are divided by their spread or not."""
    for to_star, to_own in course.load('solutions/6').exercise_3(steps=200, n=256).values():
        assert to_own < 0.03 < 0.06 < to_star

def test_7_the_proxy_rises_and_gold_turns_over(ran):
    found, runs = ran(7)[1]
    for curve in found.values():
        assert (curve[1:, 1] - curve[:-1, 1]).min() > -1e-3 # the proxy never falls
        assert curve[0, 0] < 0.1
    curve = found[100, 'best of n']
    top = curve[:, 2].argmax()
    assert 0 < top < len(curve) - 1 and curve[top:, 2].min() < curve[top, 2] - 0.3
    assert runs[0.0, 0][-1, 0] > runs[0.5, 0][-1, 0] # beta holds the policy back

def test_8_noise_costs_and_a_model_averages_errors(ran):
    found, dpo = ran(8)[1]
    labels = {tuple(kind.items()): (count, right) for kind, count, right, _, _ in found}
    at = lambda **kind: labels[tuple(kind.items())]
    assert at(noise=0.0)[1] == 1 > at(noise=1.0)[1] > at(noise=4.0)[1]
    assert at(noise=0.0, wrong=0.1)[1] > at(noise=0.0, wrong=0.4)[1]
    assert at(noise=1.0, tie=2.0)[0] < at(noise=1.0)[0] and at(noise=1.0, tie=2.0)[1] > at(noise=1.0)[1]
    for wrong in (0.0, 0.2, 0.4):
        assert all(smoothed[1] < plain[1] for smoothed, plain in zip(dpo[wrong, 0.2], dpo[wrong, 0.0]))

def test_8_wrong_labels_are_turned_clean_ones():
    """The same people and pairs: about 40 % of the labels are turned round."""
    lesson, ref = course.load('8_noise'), UNIFORM
    clean, turned = lesson.label(0, ref, 2000, noise=0.0), lesson.label(0, ref, 2000, noise=0.0, wrong=0.4)
    assert (world.REWARDS[clean[0]] > world.REWARDS[clean[1]]).all()
    flipped = clean[0] != turned[0]
    assert torch.equal(clean.flip(0)[:, flipped], turned[:, flipped])
    assert abs(flipped.float().mean().item() - 0.4) < 0.06 # five standard deviations
