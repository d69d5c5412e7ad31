"""lab/frontier.py: best of n, its KL, fits and comparisons by hand, and the tables of a made-up run."""
import itertools
import json
import math
import os
from importlib import import_module

import numpy as np
import pytest

import demo
from common.options import parse_config
from lab import frontier
from lab.frontier import at_kl, best_of, best_of_kl, bound, chances, fit, fit_method
from tiny import by_hand, exits, records, run, stops

BON, RL = frontier.FORMS # the names of Gao et al.'s two forms

# ---------------------------------------------------------------------------------------------------------------------
# best of n

def test_the_chances_by_hand():
    """Of 4 answers 6 pairs: the third is the best of 2 of them, the highest of 3."""
    assert chances(4, 2).tolist() == by_hand([0, 1 / 6, 2 / 6, 3 / 6])
    assert chances(4, 1).tolist() == by_hand([1 / 4] * 4) and chances(4, 4).tolist() == by_hand([0, 0, 0, 1])
    assert chances(64, 64).sum() == by_hand(1) == chances(64, 16).sum()

def test_best_of_two_of_four_by_hand():
    """By rising reward the golds are .4 .6 .2 .1; of the six pairs one prefers .6, two .2, three .1."""
    row = best_of([0.5, -1.0, 2.0, 0.0], [0.2, 0.4, 0.1, 0.6], 2)
    assert row['gold'] == by_hand((0.6 + 2 * 0.2 + 3 * 0.1) / 6)
    assert row['reward'] == by_hand((0.0 + 2 * 0.5 + 3 * 2.0) / 6)
    # four different answers: q = (1, 3, 5, 7)/16 against 1/4
    assert row['kl'] == by_hand(sum(q / 16 * math.log(q / 4) for q in (1, 3, 5, 7)))
    # the first half, two answers: q = (1/4, 3/4) against 1/2
    assert row['kl_half'] == by_hand(math.log(0.5) / 4 + 3 * math.log(1.5) / 4)

def test_a_prompt_with_too_few_answers_gives_its_best():
    row = best_of([1.0, 3.0, 2.0], [0.1, 0.2, 0.9], 64)
    assert row['gold'] == by_hand(0.2) and row['reward'] == by_hand(3.0)

@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_the_kl_of_best_of_n_by_enumeration(n):
    """Three answers, the policy gives .5 .3 .2; all 3^n draws, of which the highest is kept."""
    p, best = [0.5, 0.3, 0.2], [0.0] * 3
    for draws in itertools.product(range(3), repeat=n):
        best[max(draws)] += math.prod(p[y] for y in draws)
    kl = best_of_kl(np.array(p), n)
    assert kl == by_hand(sum(q * math.log(q / r) for q, r in zip(best, p)))
    assert kl <= bound(n) + 1e-12
    if n == 2: # q = .25 .39 .36
        assert kl == by_hand(0.140638)

def test_the_bound_is_reached_where_no_answer_comes_twice():
    assert best_of_kl(np.full(10_000, 1e-4), 4) == pytest.approx(math.log(4) - 0.75, abs=1e-3)
    assert best_of_kl(np.ones(1), 64) == 0 # one answer alone: nothing to choose
    assert best_of_kl(np.array([1.0, 0.0]), 2) == 0
    assert bound(64) == by_hand(3.174508)

def test_answers_of_one_reward_count_as_one():
    """Two answers share the highest reward, each of chance 1/3: q = 1 - 1/9, and both halves have the ratio q / p."""
    q = 8 / 9
    one = best_of_kl(frontier.shares([1.0, 0.5, 1.0]), 2)
    assert one == by_hand((1 - q) * math.log((1 - q) * 3) + q * math.log(q * 3 / 2))

def test_the_estimated_kl_is_too_low():
    """Fifty equally likely answers, of which 64 samples miss some."""
    rng = np.random.default_rng(0)
    exact = best_of_kl(np.full(50, 1 / 50), 64)
    found = [best_of_kl(frontier.shares(rng.integers(50, size=m)), 64) for m in (64, 32) for _ in range(200)]
    assert np.mean(found[200:]) < np.mean(found[:200]) < exact

# ---------------------------------------------------------------------------------------------------------------------
# curves

E = math.e

@pytest.mark.parametrize('form, d, y', [
    (BON, [1, 2, 4], [2, 2, -4]), # d (3 - d)
    (RL, [1, E, E * E], [3, 2 * E, E * E]), # d (3 - log d)
    (BON, [1, 1, 2], [1, 3, 2]), # the mean of the first two lies on it
    (RL, [0, 1, E], [0, 3, 2 * E])]) # SFT itself says nothing
def test_fits_by_hand(form, d, y):
    """α = 3 and β = 1."""
    assert fit(np.array(d, float), np.array(y, float), form).tolist() == by_hand([3, 1])

@pytest.mark.parametrize('form', frontier.FORMS)
def test_fits_with_noise(form):
    """Three seeds of six settings and 400 prompts; the noise of a point is .5/20 = .025."""
    rng = np.random.default_rng(3)
    kl = rng.uniform(0.2, 6, (3, 6))
    gain = frontier.curve(np.sqrt(kl), 0.5, 0.1, form)[:, :, None] + rng.normal(0, 0.5, (3, 6, 400))
    found = fit_method(kl, gain, form, rng)
    for key, value in (('alpha', 0.5), ('beta', 0.1)):
        low, high = found[key + '_interval']
        assert low < value < high and low < found[key] < high and high - low < 0.2, found
    assert 0.015 < found['rms'] < 0.04 and max(map(abs, found['residuals'])) < 0.05

def test_residuals_and_spread_by_hand():
    """Points 1 above and 1 below d (3 - d) in two seeds: residuals of the means 0, RMS 1, standard deviation √2."""
    kl = np.array([[1.0, 4.0, 16.0]] * 2)
    gain = np.array([[3.0, 3.0, -3.0], [1.0, 1.0, -5.0]])[:, :, None]
    found = fit_method(kl, gain, BON, np.random.default_rng(0), draws=10)
    assert found['residuals'] == by_hand([0, 0, 0])
    assert found['rms'] == pytest.approx(1) and found['spread'] == pytest.approx(math.sqrt(2))
    assert fit_method(kl[:1], gain[:1], BON, np.random.default_rng(0), draws=10)['spread'] is None

def test_interpolation_by_hand():
    """From SFT .3 over (KL 1, .5) to (KL 4, .7), straight in √KL."""
    between = lambda kl: at_kl([4.0, 1.0], [0.7, 0.5], 0.3, kl)
    assert [between(kl) for kl in (0, 0.25, 1, 2.25, 4)] == by_hand([0.3, 0.4, 0.5, 0.6, 0.7])
    assert between(4.01) is None

# ---------------------------------------------------------------------------------------------------------------------
# a run

def test_the_stages_are_commands():
    cfg = frontier.Config(methods='ppo,rloo,dpo,rrhf,rejection,best_of_n', betas='ppo=0,0.1 dpo=2', answers=8)
    at = demo.Config(seed=2, out_dir='out/f/2', methods='rejection,distill')
    todo, before = frontier.stages(cfg, at), set()
    for name, script, config, options, product, needs in todo:
        assert {*needs} <= before and name not in before, name
        before.add(name)
        if config:
            parse_config(import_module(script[:-3]).Config, [config, *(f'--{k}={v}' for k, v in options.items())])
    words = {stage[0]: {*demo.command_of(stage, at)} for stage in todo}
    assert list(words)[-8:] == ['ppo_0', 'ppo_0.1', 'rloo', 'dpo_2', 'rrhf', 'rejection', 'answers', 'policies']
    assert {'--kl_coef=0.1', '--out_dir=out/f/2/ppo_0.1', '--policy=out/f/2/sft', '--reward_model=out/f/2/reward',
            '--seed=2', 'config/toy/ppo.py'} <= words['ppo_0.1']
    assert {'--beta=2', 'config/toy/dpo.py'} <= words['dpo_2']
    assert {'--n_answers=8', '--keep=all', '--prompts=data/toy/prompts_test.jsonl', '--policy=out/f/2/sft',
            '--out=out/f/2/answers.jsonl'} <= words['answers']
    names = 'sft', 'ppo_0', 'ppo_0.1', 'rloo', 'dpo_2', 'rrhf', 'rejection'
    assert '--models=' + ','.join(f'{name}=out/f/2/{name}' for name in names) in words['policies']

PROMPTS = ['What is 1 plus 1?', 'What is 2 plus 2?']
SAID = [['It is 2.', 'It is 3.', 'Sure! It is 2.', 'blah'], ['It is 3.'] * 4] # gold .9 .1 1 0, and .1 each
POLICIES = { # of seeds 1 and 2: the KL, and the gold of both prompts; the reward is ten times as much
    'sft': [(0.0, 0.3, 0.3)] * 2, 'ppo_0': [(4.0, 0.9, 0.5), (4.0, 0.9, 0.5)],
    'ppo_0.1': [(1.0, 0.9, 0.3), (1.0, 0.7, 0.3)], 'ppo_1': [(0.25, 0.5, 0.3)] * 2,
    'rloo': [(0.25, 0.6, 0.3), (1.0, 0.7, 0.4)]}

@pytest.fixture
def fake(monkeypatch):
    """What the stages of two seeds leave."""
    def run_stages(todo, at):
        policies = {name: seeds[at.seed - 1] for name, seeds in POLICIES.items()}
        rows = [dict(prompt=p, responses=said, ranks=[0] * 4, scores=scores)
                for p, said, scores in zip(PROMPTS, SAID, ([2.0, 1.0, 3.0, 0.0], [1.0] * 4))]
        records(f'{at.out_dir}/answers.jsonl', rows)
        os.makedirs(f'{at.out_dir}/policies')
        records(f'{at.out_dir}/policies/samples.jsonl', [
            dict(prompt=p, model=name, sampled_gold=row[1 + i], sampled_reward=10 * row[1 + i])
            for i, p in enumerate(PROMPTS) for name, row in policies.items()])
        with open(f'{at.out_dir}/policies/results.json', 'w') as f:
            json.dump(dict(models={name: dict(kl=row[0]) for name, row in policies.items()}), f)

    monkeypatch.setattr(demo, 'run_stages', run_stages)

ARGS = dict(seeds='1,2', answers=4, methods='ppo,rloo,best_of_n', betas='ppo=0,0.1,1', at='0.25,2.25,9')

@pytest.mark.parametrize('axis', ['kl', 'sqrt'])
def test_tables_results_and_figure(fake, tmp_path, capsys, axis):
    pytest.importorskip('matplotlib')
    run(frontier, out_dir=str(tmp_path), axis=axis, **ARGS)
    out = capsys.readouterr().out
    # SFT's 4 answers have a mean gold of .5 and .1, and a mean proxy of 1.5 and 1
    for row in ('| sft | 0.000 | 0.300 | 1.250 |', '| ppo 0.1 | 1.000 | 0.550 (0.500–0.600) | 5.500 (5.000–6.000) |',
                '| rloo | 0.625 (0.250–1.000) | 0.500 (0.450–0.550) | 5.000 (4.500–5.500) |'):
        assert row in out
    # n=2: the first prompt's gold is (.1 + 2 .9 + 3 1)/6 = .816667, its KL .173980 (see above), half .130812; n=4: it
    # is 1, the KL of (1, 15, 65, 175)/256 against 1/4 .590315, and half of (1, 15)/16 against 1/2 .459356. The second's
    # answers are all alike.
    for row in ('| 1 | 0.000 | 0.000 | 0.000 | 0.300 | 1.250 |', '| 2 | 0.087 | 0.065 | 0.193 | 0.458 | 1.667 |',
                '| 4 | 0.295 | 0.230 | 0.636 | 0.550 | 2.000 |'):
        assert row in out
    # √.25 lies .825709 of the way from √.086990 to √.295157, so best of n has .458333 + .825709 * .091667
    assert '| gold at KL | ppo | rloo | best_of_n | ppo − rloo | ppo − best_of_n |' in out
    for row in ('| 0.25 | 0.400 | – | 0.534 | – | -0.134 |', '| 2.25 | 0.625 (0.600–0.650) | – | – | – | – |',
                '| 9 | – | – | – | – | – |',
                "| rloo's, 0.62 (0.25–1.00) | 0.450 (0.400–0.500) | 0.500 (0.450–0.550) | – | -0.050 | – |"):
        assert row in out
    with open(tmp_path / 'results.json') as f:
        results = json.load(f)
    assert results['seeds'] == [1, 2] and results['points']['ppo']['ppo_0.1']['gold'] == by_hand([0.6, 0.5])
    assert results['points']['best_of_n']['2']['kl'] == by_hand([0.08699024] * 2)
    assert results['at_equal_kl']['0.25']['ppo'] == by_hand([0.4, 0.4])
    # best of n has two points beside n=1, which is SFT: too few for two parameters
    assert list(results['fits']) == ['ppo'] and len(results['fits']['ppo']['gold'][RL]['residuals']) == 3
    assert (tmp_path / 'frontier.png').read_bytes().startswith(b'\x89PNG')

def test_a_prompt_that_is_missing(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f'{__name__}.SAID', SAID[:1]) # zip leaves out the second
    cfg = parse_config(frontier.Config, [f'--out_dir={tmp_path}', *(f'--{k}={v}' for k, v in ARGS.items())])
    exits(capsys, f'{tmp_path}/1/answers.jsonl: has 1 of 2 prompts; wanted all of them', frontier.main, cfg)

@pytest.mark.parametrize('options, line', [
    (dict(methods='ppo,sft'), 'methods must be names among ppo,'), (dict(methods='ppo,ppo'), 'each once'),
    (dict(betas='ppo=0.1,x'), 'betas must be method=number,number,…'), (dict(betas='ppo'), '--betas=ppo: wanted'),
    (dict(betas='rrhf=1'), 'of methods with a price on the KL'), (dict(betas='ppo=-1'), 'betas must be'),
    (dict(at='1,x'), "at must be KLs, separated by commas, got '1,x'"), (dict(answers=2), 'answers must be at least 4'),
    *[(dict(betas=betas), 'a beta above 0')
      for betas in ('dpo=0,0.1', 'kto=0', 'ppo=0_1', 'simpo=1', 'ppo=.', 'ppo=1e999')],
    (dict(axis='log'), 'axis must be kl or sqrt'), (dict(seeds='0.5'), 'seeds must be numbers'),
    (dict(max_prompts=-1), 'max_prompts must be at least 0')])
def test_bad_options(tmp_path, capsys, options, line):
    assert line in stops(capsys, frontier, out_dir=str(tmp_path / 'out'), **options)
    assert not (tmp_path / 'out').exists()
