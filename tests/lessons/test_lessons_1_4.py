"""Lessons 1 to 4: they run, what they print holds, and the solutions pass the checks of the exercises."""
import glob
import os
import sys
from statistics import fmean

import pytest
import torch

from lessons import course, world
from tiny import ROOT, by_hand

FILES = sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, 'lessons', '**', '*.py'),
                                                                 recursive=True))
LESSONS = {1: '1_policy_gradient', 2: '2_bradley_terry', 3: '3_ppo', 4: '4_gae'}
SETTINGS = {1: dict(seeds=(0,), n_samples=4096, steps=3), 2: dict(seeds=(0,), n=5000, steps=120),
            3: dict(seeds=(0,), batches=1, iterations=3), 4: dict(seeds=(0,))}

@pytest.mark.parametrize('path', [path for path in FILES if os.path.basename(path) != 'bugs.py']) # is no lesson
def test_a_lesson_has_at_most_150_lines(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        assert len(f.read().splitlines()) <= 150

@pytest.mark.parametrize('path', [path for path in FILES if os.path.basename(path)[0].isdigit()])
def test_a_lesson_finds_the_project_from_anywhere(path):
    """The root is put in front before anything of the project is imported."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        before, _, _ = f.read().partition('\nfrom lessons')
    assert f"sys.path.insert(0, str(Path(__file__).resolve().parents[{path.count(os.sep)}]))" in before

# ---------------------------------------------------------------------------------------------------------------------
# the world

def test_the_world_by_hand():
    """1 + 5 + 25 answers that end with ".", and 125 that are cut off."""
    assert len(world.ANSWERS) == len(world.NUMBER) == 156 and world.ALL.ended.sum() == 31
    by_text = {world.TOK.decode(answer): reward for answer, reward in zip(world.ANSWERS, world.REWARDS.tolist())}
    assert by_text['.'] == 0 and by_text['good .'] == 1 and by_text['not good .'] == -1 and by_text['not bad .'] == 1
    assert by_text['very very good'] == 3 and by_text['not very good'] == -3 and by_text['very um bad'] == -3
    assert by_text['very good bad'] == 0 and by_text['um um um'] == -1 # 2 - 1 - 1: "very" doubles one word

def test_the_world_is_all_that_a_policy_can_say():
    policy = world.new_policy(0)
    logp = world.log_pi(policy)
    assert logp.exp().sum().item() == by_hand(1.0)
    assert all(tuple(answer) in world.NUMBER for answer in policy.generate([world.PROMPT] * 500, 3, eos=world.EOS))
    sampled, _ = course.load('1_policy_gradient').sample(policy, 20000)
    share = sampled.bincount(minlength=156) / 20000
    assert (share - logp.exp()).abs().max() < 0.015 # 4 standard errors of a share of a half

def test_the_optimum_of_the_world():
    """Its objective is beta log sum of pi_ref e^(r / beta), and no neighbour does better."""
    ref = world.log_pi(world.new_policy(0)).detach()
    objective = lambda logp: (world.expected(logp) - 0.5 * world.kl(logp, ref)).item()
    best = world.optimum(ref, 0.5)
    assert objective(best) == pytest.approx(0.5 * (ref + 2 * world.REWARDS).logsumexp(0).item(), abs=1e-5)
    assert all(objective(near) < objective(best) for near in (world.optimum(ref, 0.45), world.optimum(ref, 0.55)))
    assert world.kl(best, best).item() == 0 and world.kl(best, ref) > 0.1

# ---------------------------------------------------------------------------------------------------------------------
# what the lessons say

def test_lesson_1(ran):
    """The loss has the exact gradient on average. Baselines that do not know their answer change only the noise."""
    lesson, (measured, curves), _ = ran(1)
    same, errors, table = measured[0]
    none, exact, rloo, group = lesson.BASELINES
    assert same > 0.99999
    assert errors[16] / errors[256] == pytest.approx(4, abs=0.8)
    for (shift, name), (share, wide, _) in table.items():
        assert abs(share - (0.75 if name == group else 1.0)) < 2 * wide, (shift, name)
    assert table[5.0, none][2] > 3 * table[0.0, none][2]
    assert table[5.0, rloo] == pytest.approx(table[0.0, rloo], abs=1e-4)
    assert table[0.0, group][0] == pytest.approx(0.75 * table[0.0, rloo][0], abs=1e-4)
    assert {len(runs[0]) for runs in curves.values()} == {4} and len({runs[0][0] for runs in curves.values()}) == 1

def test_lesson_2(ran):
    lesson, found, _ = ran(2)
    (loss, within, between), (moved_loss, moved_within, moved_between) = found[0]['shift']
    assert moved_loss == pytest.approx(loss, abs=1e-5) and moved_within == within > 0.95
    assert between > 0.9 and moved_between < 0.6
    slopes = [lesson.slope(scores) for scores, _ in found[0]['noise'].values()]
    assert slopes[0] > 1.3 * slopes[1] > 1.69 * slopes[2]
    ranges = [(scores.max() - scores.min()).item() for scores in found[0]['certain']]
    assert ranges[0] + 1 < ranges[1] < ranges[2] - 1
    assert found[0]['ties'][1] > 1.1 * slopes[1]
    longer = found[0]['length']
    assert longer[0]['usual'] > 0.95 and longer[0]['other'] < 0.3 and longer[1]['other'] > 0.95
    assert longer[0]['ums'] > 2 * longer[1]['ums'] and longer[0]['reward'] < longer[1]['reward']

def test_lesson_3(ran):
    """With the clip many epochs stay near, without it they run away; nothing beats the optimum."""
    lesson, (found, curves, best), _ = ran(3)
    assert [lesson.pull(r, A, 0.2) for r in (0.5, 1.1, 1.5) for A in (1.0, -1.0)] == by_hand(
        [0.5, 0, 1.1, -1.1, 0, -1.5])
    clipped, free = found[0.2][0], found[lesson.NO_CLIP][0]
    assert clipped[0][2:] == [0, 0] and clipped[1] == pytest.approx(free[1], abs=1e-4) # the first step is at ratio 1
    assert clipped[4][0] > clipped[1][0] > clipped[0][0]
    assert free[16][2] > 2 * clipped[16][2] and free[16][0] < clipped[16][0]
    assert all(max(run) < bound for runs in curves.values() for run, bound in zip(runs, best))

def test_lesson_4(ran):
    """By hand: the deltas are 0.1, -0.5, 0.6, 0 and 0.1; at 1/2, from behind: 0.1, 0.05, 0.625, -0.1875, 0.00625."""
    lesson, (sums, measured, best), _ = ran(4)
    assert sums[0.5].tolist() == by_hand([0.00625, -0.1875, 0.625, 0.05, 0.1])
    for lam, advantages in sums.items():
        assert lesson.by_code(lesson.R5, lesson.V5, lam).tolist() == by_hand(advantages.tolist())
    for name, by_lam in measured[0].items():
        biases = [by_lam[lam][0] for lam in (0.0, 0.5, 0.9, 1.0)]
        assert biases[-1] < 1e-5
        assert biases[0] < 1e-5 if name == 'exact' else biases[0] > biases[1] > biases[2] > 0.01
    assert measured[0]['exact'][0.0][1] < 0.8 * measured[0]['exact'][1.0][1]
    assert best['wrong by 0.5', 1] < best['wrong by 0.5', 256] < best['wrong by 0.5', 4096] == [1.0]

# ---------------------------------------------------------------------------------------------------------------------
# figures and exercises

@pytest.mark.parametrize('n', LESSONS)
def test_a_lesson_draws_its_figure(ran, n):
    pytest.importorskip('matplotlib')
    _, _, folder = ran(n)
    assert (folder / f"{LESSONS[n]}.png").stat().st_size > 10000

def test_without_matplotlib_the_text_still_comes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    course.draw('nothing', None)
    assert 'pip install matplotlib' in capsys.readouterr().out

@pytest.mark.parametrize('n', LESSONS)
def test_the_solutions_pass_and_the_empty_functions_do_not(n, capsys):
    lesson, solution = course.load(LESSONS[n]), course.load(f"solutions/{n}")
    for name, check in lesson.CHECKS.items():
        assert check(getattr(solution, name)), name
        assert not course.passes(check, getattr(lesson, name)), name
    course.tell_exercises(vars(lesson))
    assert capsys.readouterr().out.count('not right yet') == len(lesson.CHECKS) == 2
    course.tell_exercises(vars(lesson) | {name: getattr(solution, name) for name in lesson.CHECKS})
    assert 'not right' not in capsys.readouterr().out

def test_solution_1():
    """With K = 2 a half of the gradient is left; GRPO's gradient points a little elsewhere."""
    solution = course.load('solutions/1')
    group, rloo = solution.exercise_1(4096)
    assert group == pytest.approx(0.5 * rloo, abs=1e-4) and abs(rloo - 1) < 0.15
    grpo, rloo = solution.exercise_3(1, 8192)
    assert grpo < 0.99 < rloo
    # the best baseline: an error in either direction costs
    weights = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 3.0, 2.0])
    noise = lambda b: (weights[0] * (weights[1] - b) ** 2 * weights[2]).sum()
    b = solution.best_baseline(*weights)
    assert noise(b) < min(noise(b + 0.1), noise(b - 0.1))

def test_solution_2():
    old, new = course.load('solutions/2').exercise_1(n=5000, steps=100)
    assert new == pytest.approx(old, abs=0.1)
    assert course.load('solutions/2').exercise_3(n=5000, steps=100) < 0.9 * old

def test_solution_3():
    solution = course.load('solutions/3')
    seeds = [solution.exercise_1(seed) for seed in range(3)] # of one seed rounding alone may make half as much again
    found = {how: [fmean(of[how][epoch] for of in seeds) for epoch in (0, 1)] for how in seeds[0]}
    first, last = zip(found[0.9, 0.0], found[0.0, 0.0])
    assert 0 < first[0] == by_hand(first[1]) and last[1] < 1.4 * first[1] < last[0] # momentum goes on, gradients hardly
    assert last[0] < 0.8 * found[0.9, 0.2][1] and last[1] < 0.5 * found[0.0, 0.2][1] # clip 0 gets less far than 0.2
    assert solution.effective_samples(torch.tensor([100.0] + 31 * [1.0]).log(), torch.zeros(32)) == pytest.approx(
        131**2 / 10031, abs=1e-3)

def test_solution_4():
    """n_step and weights together are GAE."""
    solution, lesson = course.load('solutions/4'), course.load('4_gae')
    right, wrong = solution.exercise_1(0.0), solution.exercise_1(5.0)
    assert wrong[0.0][0] > 1 > wrong[1.0][0] + 0.99 and wrong[1.0][1] > 3 * right[1.0][1]
    steps = torch.stack([solution.n_step(lesson.R5, lesson.V5, n) for n in range(1, 6)]) # (5, T)
    mixed = [sum(w * steps[k, t] for k, w in enumerate(solution.weights(0.7, 5 - t))).item() for t in range(5)]
    assert mixed == by_hand(lesson.by_code(lesson.R5, lesson.V5, 0.7).tolist())
