"""common/rewards.py by hand: ensembles, likelihoods, sums, the turns of a dialogue; whole runs."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import ppo
import reinforce
from common.rewards import Reward, RolloutOptions, combine, likelihood, mean_gold
from common.rollout import Rollouts, pack, pack_turns
from tiny import PROMPTS, by_hand, checkpoint, exits, records, run, rules

T = torch.tensor

# ---------------------------------------------------------------------------------------------------------------------
# rewards

def test_ensembles_by_hand():
    scores = T([[1.0, 4.0, -2.0], [3.0, 4.0, 0.0], [2.0, 1.0, 5.0]]) # three models, three answers
    assert combine(scores, 'mean').tolist() == by_hand([2.0, 3.0, 1.0])
    assert combine(scores, 'min').tolist() == by_hand([1.0, 1.0, -2.0])
    # variances 2/3, 2, 26/3: their roots are .816497, 1.414214, 2.943920
    assert combine(scores, 'lcb', 2.0).tolist() == by_hand([0.367007, 0.171573, -4.887841])
    assert combine(scores[:1], 'lcb', 9.0).tolist() == by_hand([1.0, 4.0, -2.0]) # of one model alone nothing is unsure

class Fixed:
    """A model whose log-probabilities, and scores of whole rows, were written down."""

    def __init__(self, logp=None, scores=None):
        self.table, self.scores = logp, scores

    def logp(self, idx, mask, groups):
        return (self.table * torch.ones_like(mask))[:, :mask.size(1)] * mask # one value per row

    def rewards(self, idx, lengths, groups):
        return 100.0 * lengths + idx[torch.arange(len(idx)), lengths - 1] # where it ends, and its last token

# a row with an answer of two tokens, and one of one; pads hold absurd ids
ROLLS = pack([[1, 2], [3]], [[5, 9], [7]], [[-1.0, -2.0], [-3.0]], 9)

def test_a_policy_as_its_own_reward_model_by_hand():
    rolls = replace(ROLLS, idx=ROLLS.idx.masked_fill(torch.arange(4) >= ROLLS.lengths[:, None], 777))
    policy, reference = Fixed(T(-0.5)), Fixed(T(-0.75))
    assert likelihood(policy, None, rolls).tolist() == by_hand([-0.5, -0.5]) # a mean per token
    # summed: -1.0 - (-1.5) and -0.5 - (-0.75)
    assert likelihood(policy, reference, rolls).tolist() == by_hand([0.5, 0.25])

def options(**more):
    return RolloutOptions(prompts='-', **more)

def test_a_reward_is_a_sum_of_its_parts():
    asked = [[(dict(prompt='p', worth=3.0), 'x')], [(dict(prompt='q', worth=-1.0), 'y')]]
    rolls = Rollouts(**vars(ROLLS) | dict(asked=asked))
    cfg = options(reward_model='a', reward='a:b', reward_weight=0.5, reward_policy='c', reward_beta=4.0,
                  length_penalty=10.0)
    reward = Reward([Fixed()], lambda record, response: record['worth'], Fixed(T(-0.5)), Fixed(T(-0.75)), cfg)
    # 409 and 207 by the model, 1.5 and -.5 by the function, 4 times .5 and .25 by the policy, 20 and 10 for the lengths
    total, earlier, parts = reward(rolls)
    assert total.tolist() == by_hand([409 + 1.5 + 2 - 20, 207 - 0.5 + 1 - 10]) and earlier.abs().max() == 0
    assert {name: x.item() for name, x in parts.items()} == by_hand(dict(
        reward_model=308.0, reward_function=0.5, reward_policy=1.5, length_penalty=-15.0))
    alone, _, parts = Reward([Fixed()])(rolls) # as bench.py and the lessons make it
    assert alone.tolist() == [409.0, 207.0] and parts == {}

def test_each_turn_has_its_own_reward():
    """A dialogue of two answers and one of one; the user's ids lie between, and count nowhere."""
    rows = [[([1, 2], None), ([5, 9], [-1.0, -1.0]), ([77, 78, 79], None), ([6, 9], [-1.0, -1.0])],
            [([3], None), ([8, 8, 9], [-1.0, -1.0, -1.0])]]
    asked = [[(dict(n=1.0), 'a'), (dict(n=2.0), 'b')], [(dict(n=4.0), 'c')]]
    rolls = replace(pack_turns(rows, 9, asked), K=2) # as of one prompt; its three turns are no two answers each
    assert rolls.ends == [[4, 9], [4]] and rolls.lengths.tolist() == [9, 4]
    assert rolls.mask.tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]
    cfg = options(user='u:u', max_turns=2, turn_rewards=True, length_penalty=0.5, reward='a:b')
    # of each turn: the model sees the row up to its end, the function its record; the length is that of its tokens
    reward = Reward([Fixed()], lambda record, response: 1000 * record['n'], cfg=cfg)
    total, earlier, measured = reward(rolls)
    assert total.tolist() == by_hand([(409 + 1000 - 1.0) + (909 + 2000 - 1.0), 409 + 4000 - 1.5])
    expected = torch.zeros(2, 8)
    expected[0, 2] = 409 + 1000 - 1.0 # position 2 describes token 3, the first answer's end
    assert torch.equal(earlier, expected) and measured['turns'] == 1.5
    whole, earlier, _ = Reward([Fixed()], cfg=options(user='u:u', max_turns=2, length_penalty=0.5))(rolls)
    assert whole.tolist() == by_hand([909 - 2.0, 409 - 1.5]) and earlier.abs().max() == 0 # one reward at the end

def test_the_mean_gold_score_is_that_of_the_last_answers():
    rolls = SimpleNamespace(asked=[[(dict(w=9.0), 'a'), (dict(w=1.0), 'bb')], [(dict(w=2.0), 'ccc')]])
    measured = mean_gold(lambda record, response: record['w'] * len(response), rolls)
    assert measured['gold'].item() == by_hand(4.0) # (2 + 6) / 2
    assert mean_gold(None, rolls) == {}

@pytest.mark.parametrize('wrong, wanted', [
    (dict(ensemble='median'), 'ensemble must be mean, min or lcb'),
    (dict(ensemble='min'), 'with several reward models'),
    (dict(reward_model='a,,b'), 'reward_model must be folders'), (dict(lcb_coef=-1.0), 'lcb_coef must be at least 0'),
    (dict(length_penalty=-0.1), 'length_penalty must be at least 0'),
    (dict(reward_reference='a'), 'reward_reference must be empty without reward_policy'),
    (dict(max_turns=2), 'max_turns must be at least 2 with user, else 1'),
    (dict(user='a:b'), 'max_turns must be at least 2'), (dict(turn_rewards=True), 'turn_rewards must be False')])
def test_bad_options_name_the_option(wrong, wanted):
    for module in (ppo, reinforce):
        with pytest.raises(ValueError, match=wanted):
            module.Config(prompts='-', **wrong)

def test_without_another_reward_there_is_the_usual_reward_model():
    assert options().reward_model == 'out/reward' and options(reward='a:b').reward_model == ''

# ---------------------------------------------------------------------------------------------------------------------
# whole runs

@pytest.fixture
def given(tmp_path):
    return dict(policy=checkpoint(tmp_path / 'policy'), prompts=records(tmp_path / 'prompts.jsonl', PROMPTS),
                max_new_tokens=6, batch_size=8, max_steps=2)

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_training_by_a_function_alone(tmp_path, given, rules, script):
    """PPO's critic then starts as the policy, with a value head of zeros."""
    log = run(script, out_dir=str(tmp_path / 'out'), reward='rules_of_mine:scaled(by=0.25)',
              gold='rules_of_mine:scaled', missing_eos_penalty=0.0, **given)
    assert all(line['reward'] == pytest.approx(0.25 * line['gold'], rel=1e-5) for line in log)
    assert script is reinforce or log[0]['values'] == 0.0

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_training_by_everything_at_once(tmp_path, given, rules, script):
    models = [checkpoint(tmp_path / f'rm{seed}', seed, reward_head=True) for seed in (1, 2, 3)]
    log = run(script, out_dir=str(tmp_path / 'out'), reward='rules_of_mine:scaled(by=0.25)', reward_weight=2.0,
              reward_model=','.join(models), ensemble='lcb', reward_policy=given['policy'],
              reward_reference=given['policy'], length_penalty=0.125, **given)
    for line in log:
        parts = [line[name] for name in ('reward_model', 'reward_function', 'reward_policy', 'length_penalty')]
        assert line['reward'] == pytest.approx(sum(parts), abs=1e-4)
        assert line['length_penalty'] == pytest.approx(-0.125 * line['length'], abs=1e-5)
        assert math.isclose(line['reward_policy'], 0.0, abs_tol=1e-4) # of the policy against itself

@pytest.mark.parametrize('wrong, said', [
    (dict(reward='rules_of_mine:score'), "unknown prompt 'Why?'"), (dict(reward='rules_of_mine:exact'), "'answer'"),
    (dict(reward_model='nowhere'), '--reward_model=nowhere: no such folder'),
    (dict(reward_policy='nowhere'), '--reward_policy=nowhere: no such folder'),
    (dict(user='rules_of_mine:nobody', max_turns=2), '--user=rules_of_mine:nobody: cannot be imported')])
def test_bad_input_is_one_line_and_touches_nothing(tmp_path, given, rules, capsys, wrong, said):
    prompts = records(tmp_path / 'more.jsonl', [*PROMPTS, dict(prompt='Why?')])
    wrong = dict(reward='rules_of_mine:scaled') | wrong
    for script in (ppo, reinforce):
        exits(capsys, said, lambda: run(script, out_dir=str(tmp_path / 'out'), **given | dict(prompts=prompts) | wrong))
    assert not (tmp_path / 'out').exists()

def test_a_reward_policy_has_to_be_a_language_model(tmp_path, given, capsys):
    folder = checkpoint(tmp_path / 'rm', reward_head=True)
    exits(capsys, f'--reward_policy={folder}: is a reward model', lambda: run(
        ppo, out_dir=str(tmp_path / 'out'), reward_policy=folder, **given))

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_a_resumed_run_has_the_models_that_it_began_with(tmp_path, given, rules, capsys, script):
    """One more or one less in the reward is another reward."""
    options = given | dict(out_dir=str(tmp_path / 'out'), reward='rules_of_mine:scaled')
    run(script, **options | dict(max_steps=1, reward_policy=given['policy']))
    for more in (dict(), dict(reward_policy=given['policy'], reward_reference=given['policy'])):
        exits(capsys, 'is not what the run in', lambda: run(script, resume=True, **options | more))
    assert len(run(script, resume=True, **options | dict(reward_policy=given['policy']))) == 2
