"""Rollouts of several turns by hand: what counts, what a user's words do to GAE, where the rewards go, how they end."""
import copy

import pytest
import torch

import ppo
import reinforce
from common.rewards import Reward
from common.rollout import frozen, pack_turns, sample_rollouts
from common.tokens import prompt_ids, render, user_ids
from feedback.functions import load_user
from model import GPT, GPTConfig
from ppo import gae, token_rewards
from tiny import (EOS, RUN, TOK, assert_resumes_exactly, assistant, by_hand, checkpoint, has_checkpoint, in_processes,
                  losses, records, run, user)

END = TOK.eos

# ---------------------------------------------------------------------------------------------------------------------
# masks

# prompt 1 2, answer 5 EOS, the user's 3 3 EOS (ids say nothing), answer 6 EOS; and one answer that fills its room
ROWS = [[([1, 2], None), ([5, EOS], [-.5, -.25]), ([3, 3, EOS], None), ([6, EOS], [-1., -2.])],
        [([4], None), ([7, 8], [-3., -4.])]]

def test_turns_are_packed_by_hand():
    rolls = pack_turns(ROWS, EOS, asked=['a', 'b'])
    assert rolls.idx[0].tolist() == [1, 2, 5, EOS, 3, 3, EOS, 6, EOS] and rolls.idx[1, :3].tolist() == [4, 7, 8]
    # position t describes token t+1: 5, EOS, then three of the user's, 6, EOS; 7, 8, then padding
    assert rolls.mask.tolist() == [[0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert rolls.logp.tolist() == [[0, -.5, -.25, 0, 0, 0, -1, -2], [-3, -4, 0, 0, 0, 0, 0, 0]]
    assert rolls.ends == [[4, 9], [3]] and rolls.lengths.tolist() == [9, 3] and rolls.ended.tolist() == [1, 0]
    assert rolls.asked == ['a', 'b']

class Speaker:
    """A policy with its answers prepared: of each first question, by turns. One that ends with | has no end of text."""
    config = GPTConfig(block_size=200, vocab_size=257, n_layer=1, n_head=1, n_embd=4)

    def __init__(self, **answers):
        self.answers, self.given = {question: iter(texts) for question, texts in answers.items()}, []

    def generate_with_logp(self, prompts, max_new_tokens, temperature, eos):
        texts = [TOK.decode(p) for p in prompts]
        self.given.append(texts)
        said = [next(self.answers[text.split('### Human: ')[1].split('\n')[0]]) for text in texts]
        answers = [TOK.encode(' ' + text.rstrip('|')) + [eos] * (not text.endswith('|')) for text in said]
        return answers, [[-float(i) for i, _ in enumerate(a, 1)] for a in answers]

def options(**more):
    return ppo.Config(**dict(dict(prompts='-', reward='-', user='-', max_turns=3, max_new_tokens=20), **more))

def sampled(model, prompts, talk, **more):
    asking = [dict(prompt=p) for p in prompts]
    return sample_rollouts(model, [prompt_ids(TOK, p) for p in prompts], asking, TOK, options(**more), talk), asking

SYSTEM = [dict(role='system', content='Be brief.'), user('Hi')] # a prompt may be messages

def test_a_dialogue_is_the_one_of_the_chat_template():
    """Ids and mask equal those of common.tokens.render, which demonstrations are learnt with."""
    heard = []

    def talk(record, messages):
        heard.append(messages)
        return {'Yo': 'And <|endoftext|>?', 'Yes': None, 'It is me.': ''}.get(messages[-1]['content'])

    model = Speaker(Hi=['Yo', 'Yes'], Who=['It is me.', 'No'])
    rolls, asking = sampled(model, [SYSTEM, 'Who'], talk)
    first = [*SYSTEM, assistant('Yo'), user('And <|endoftext|>?'), assistant('Yes')]
    second = [user('Who'), assistant('It is me.'), user(''), assistant('No')]
    for b, messages in enumerate((first, second)):
        ids, mask = render(TOK, messages)
        n = len(ids)
        assert rolls.idx[b, :n].tolist() == ids and rolls.lengths[b] == n
        assert rolls.mask[b].tolist() == [float(m) for m in mask[1:]] + [0.0] * (rolls.mask.size(1) - n + 1)
    assert rolls.mask[0].sum() == len(' Yo') + 1 + len(' Yes') + 1 # bytes, and an end of text each
    assert rolls.logp[0][rolls.mask[0] > 0].tolist() == [-1, -2, -3, -4, -1, -2, -3, -4, -5]
    assert rolls.logp[rolls.mask == 0].abs().max() == 0 and rolls.ended.tolist() == [1.0, 1.0]
    # a user hears all that was said before, and a reward function gets each answer's own record
    assert heard == [first[:3], second[:2], first, second]
    assert rolls.asked == [[(dict(prompt=SYSTEM), 'Yo'), (dict(prompt=first[:4]), 'Yes')],
                           [(dict(prompt=[user('Who')]), 'It is me.'), (dict(prompt=second[:3]), 'No')]]
    assert asking == [dict(prompt=SYSTEM), dict(prompt='Who')] # the records of the file are as they were
    assert model.given[1][1].endswith('### Human: And <|endoftext|>?\n### Assistant:')

def test_what_a_user_says_is_encoded_as_the_template_does():
    before, after = [user('Hi'), assistant('Yo')], [user('Bye'), assistant(None)]
    assert render(TOK, before)[0] + user_ids(TOK, 'Bye') == render(TOK, before + after)[0]

def test_how_dialogues_end():
    """By the user, by an answer without an end, by max_turns; each row alone, the others go on."""
    talk = lambda record, messages: None if messages[-1]['content'] == 'stop' else 'on'
    model = Speaker(p=['stop'], q=['cut|'], r=['a', 'd', 'e'], s=['b', 'stop'], t=['c', 'cut|'])
    rolls, _ = sampled(model, list('pqrst'), talk)
    assert [[text for _, text in asked] for asked in rolls.asked] == [['stop'], ['cut'], ['a', 'd', 'e'], ['b', 'stop'],
                                                                      ['c', 'cut']]
    assert rolls.ended.tolist() == [1, 0, 1, 1, 0] # only the last answer can lack its end
    assert [len(given) for given in model.given] == [5, 3, 1]
    assert [at[-1] for at in rolls.ends] == rolls.lengths.tolist()
    alone, _ = sampled(Speaker(p=['a']), ['p'], None)
    assert [len(asked) for asked in alone.asked] == [1] # nobody to talk to

def test_a_dialogue_ends_where_the_context_has_no_room():
    """One more turn needs the user's words and a whole answer: to a token."""
    said = len(prompt_ids(TOK, 'p')) + len(' a') + 1 + len(user_ids(TOK, 'on'))
    for block_size, turns in ((said + 20, 2), (said + 19, 1)):
        model = Speaker(p=['a', 'b|'])
        model.config = GPTConfig(block_size=block_size, vocab_size=257, n_layer=1, n_head=1, n_embd=4)
        rolls, _ = sampled(model, ['p'], lambda record, messages: 'on', max_new_tokens=20)
        assert len(rolls.asked[0]) == turns and rolls.ended.tolist() == [float(turns == 1)]

# ---------------------------------------------------------------------------------------------------------------------
# GAE and the places of the rewards

def T(values):
    return torch.tensor(values)

@pytest.mark.parametrize('absurd', [1e6, -7e8])
def test_gae_across_a_users_turn_by_hand(absurd):
    """
    Gamma .9, lambda ½. One answer of two tokens, three of the user's, one of two; r = 0 1 | 0 2, V = ½ 1 | 2 1.
    Backwards: delta 2 - 1 = 1, A 1; delta 0 + .9 * 1 - 2 = -1.1, A -1.1 + .45 * 1 = -.65; over the gap as if it were
    not there: delta 1 + .9 * 2 - 1 = 1.8, A 1.8 + .45 * -.65 = 1.5075; delta 0 + .9 * 1 - ½ = .4, A .4 + .45 * 1.5075
    = 1.078375. Returns A + V: 1.578375 2.5075 | 1.35 2.
    The second row is the same without a gap, before padding.
    """
    x = absurd
    rewards = T([[x, 0., 1., x, -x, x, 0., 2.], [x, 0., 1., 0., 2., x, x, -x]])
    values = T([[-x, .5, 1., x, x, -x, 2., 1.], [x, .5, 1., 2., 1., -x, x, x]])
    mask = T([[0., 1., 1., 0., 0., 0., 1., 1.], [0., 1., 1., 1., 1., 0., 0., 0.]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    a, r = [1.078375, 1.5075, -.65, 1.], [1.578375, 2.5075, 1.35, 2.]
    assert advantages[0].tolist() == by_hand([0, *a[:2], 0, 0, 0, *a[2:]])
    assert returns[0].tolist() == by_hand([0, *r[:2], 0, 0, 0, *r[2:]])
    assert advantages[1].tolist() == by_hand([0, *a, 0, 0, 0]) and returns[1].tolist() == by_hand([0, *r, 0, 0, 0])

def test_the_score_is_on_the_last_token_of_the_last_answer():
    rolls = pack_turns(ROWS, EOS)
    kl = T([[1e6, .5, .5, 1e6, -1e6, 1e6, 1., -1.], [1., 1., 1e6, 1e6, 1e6, 1e6, 1e6, 1e6]])
    got = token_rewards(T([3., -2.]), kl, rolls.mask, 0.1)
    assert got[0].tolist() == by_hand([0, -.05, -.05, 0, 0, 0, -.1, 3.1]) # 3 - .1 * -1
    assert got[1].tolist() == by_hand([-.1, -2.1, 0, 0, 0, 0, 0, 0])

# what each answer of the dialogues below is worth, and their user
WORTH = {'a': 1.0, 'b': 10.0, 'c': 100.0, 'd': 1000.0, 'cut': 10000.0}
talk = lambda record, messages: 'on' if messages[-1]['content'] in 'ab' else None

def rolled(script, **more):
    """Make a roll_out of script whose policy says what is prepared; return the batch and what was measured."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=200, vocab_size=257, n_layer=1, n_head=1, n_embd=4, value_head=True))
    policy = copy.deepcopy(model)
    # the dialogues a b c, b d, c and cut; in reinforce.py two of each prompt, whose turns come side by side
    said = dict(p=['a', 'b', 'c'], q=['b', 'd'], r=['c'], s=['cut|']) if script is ppo else dict(
        p=['a', 'b', 'b', 'd', 'c'], q=['c', 'cut|'])
    policy.generate_with_logp = Speaker(**said).generate_with_logp
    cfg = script.Config(**dict(dict(prompts='-', reward='-', user='-', max_turns=3, max_new_tokens=20, kl_coef=0.0,
                                    missing_eos_penalty=3.0, batch_size=4), **more))
    reward = Reward(function=lambda record, response: WORTH[response], cfg=cfg)
    models = ppo.Models(policy, model, reward, model) if script is ppo else (policy, reward, model)
    rows = [dict(prompt=p) for p in said]
    batch, lengths, measured = script.roll_out(models, [prompt_ids(TOK, r['prompt']) for r in rows], rows, TOK, cfg,
                                               cfg.kl_coef, RUN, user=talk)
    return batch, {k: v.item() for k, v in measured.items()}

def ends(mask):
    """Return the positions of each row that describe an answer's last token."""
    after = torch.cat([mask[:, 1:], torch.zeros(len(mask), 1)], 1)
    return [row.nonzero().flatten().tolist() for row in (mask > 0) & (after == 0)]

@pytest.mark.parametrize('turn_rewards', [True, False])
def test_ppos_returns_jump_where_an_answer_is_rewarded(turn_rewards):
    """With lambda = gamma = 1 and beta 0 a return is the sum of all rewards from its token on."""
    batch, measured = rolled(ppo, turn_rewards=turn_rewards, lam=1.0)
    batch['returns'] = batch['returns'].round(decimals=1)
    assert [len(at) for at in ends(batch['mask'])] == [3, 2, 1, 1] # a b c, b d, c, cut
    # per turn: 1 10 100; 10 1000; 100; 10000 - 3 without its end. At the end: 100; 1000; 100; 9997
    to_go = [[111, 110, 100], [1010, 1000], [100], [9997]] if turn_rewards else [[100] * 3, [1000] * 2, [100], [9997]]
    for returns, at, sums in zip(batch['returns'], ends(batch['mask']), to_go):
        assert returns[at].tolist() == sums
        assert [returns[i].item() for i in at for i in (i - 1, i)] == [x for x in sums for _ in range(2)]
    assert torch.all(batch['returns'][batch['mask'] == 0] == 0)
    assert torch.all(batch['advantages'][batch['mask'] == 0] == 0)
    total = [111, 1010, 100, 10000] if turn_rewards else [100, 1000, 100, 10000]
    assert measured['reward'] == sum(total) / 4 and measured['score'] == by_hand((sum(total) - 3) / 4)
    assert measured['turns'] == 7 / 4 and measured['ended'] == 3 / 4

@pytest.mark.parametrize('turn_rewards', [True, False])
def test_reinforce_compares_whole_dialogues(turn_rewards):
    """Two dialogues per prompt; all answers of one share its advantage, without KL at beta 0."""
    batch, measured = rolled(reinforce, turn_rewards=turn_rewards, n_answers=2)
    first, second, third, fourth = (111, 1010, 100, 9997) if turn_rewards else (100, 1000, 100, 9997)
    expected = T([first - second, second - first, third - fourth, fourth - third]).float() # of two: the other one
    assert torch.equal(batch['advantages'], expected[:, None] * batch['mask'])
    assert measured['score'] == (first + second + third + fourth) / 4

# ---------------------------------------------------------------------------------------------------------------------
# runs

FUNCTIONS = """
def talk(record, messages):
    said = len(messages) // 2 + 1
    return None if len(messages[-1]['content']) > 5 else f'{record["word"]} {said}?'

def worth(record, response):
    return len(response) - 2 * len(record['prompt'])

def raises(record, messages):
    return record['missing']

def number(record, messages):
    return 7
"""

@pytest.fixture
def given(tmp_path):
    (tmp_path / 'mine.py').write_text(FUNCTIONS)
    rows = [dict(prompt=p, word=w) for p, w in zip('abcdefgh', ('so', 'and', 'but', 'why', 'or', 'no', 'up', 'x'))]
    mine = str(tmp_path / 'mine.py')
    return dict(policy=checkpoint(tmp_path / 'sft', block_size=160), reward=f'{mine}:worth', user=f'{mine}:talk',
                reward_model='', max_turns=3, turn_rewards=True, prompts=records(tmp_path / 'prompts.jsonl', rows),
                max_new_tokens=12, batch_size=8, kl_coef=0.01)

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_a_run_on_dialogues(tmp_path, given, script):
    """Sampled turn by turn and scored in one pass: a ratio of 1 before the first update."""
    lines = run(script, out_dir=str(tmp_path / 'out'), max_steps=2, **given)
    assert 1.2 < lines[0]['turns'] <= 3.0 and lines[0]['first_ratio'] < 1e-4 and lines[1]['grad_norm'] > 0

def test_recorded_log_probabilities_of_dialogues_equal_recomputed_ones(given):
    model = GPT.from_pretrained(given['policy'])
    torch.manual_seed(0)
    rolls, _ = sampled(model, list('abcdefgh'), lambda record, messages: 'And then?', max_new_tokens=12)
    assert max(map(len, rolls.ends)) == 3
    again = frozen(model.logp, rolls.idx, rolls.mask, rolls.lengths, rows=3)
    torch.testing.assert_close(again, rolls.logp, rtol=0, atol=1e-5)

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_resume_is_exact(tmp_path, given, script):
    assert_resumes_exactly(tmp_path, script, **given)

@pytest.mark.slow
@pytest.mark.parametrize('script', [ppo, reinforce])
def test_two_processes(tmp_path, given, script):
    """Each has dialogues of its own lengths; both end, with finite numbers."""
    out = str(tmp_path / 'out')
    assert in_processes(2, lambda: run(script, out_dir=out, max_steps=2, **given)) == [0, 0]
    lines = losses(run(script, out_dir=out, max_steps=2, resume=True, **given)) # all done: it only reads
    assert len(lines) == 2 and 1.0 < lines[0]['turns'] <= 3.0 and has_checkpoint(out)

@pytest.mark.parametrize('script', [ppo, reinforce])
@pytest.mark.parametrize('function, message', [
    ('raises', "KeyError: 'missing'"), ('number', 'wanted a text or None, got 7'), ('nobody', 'cannot be imported')])
def test_a_user_that_fails_ends_the_run_with_one_line(tmp_path, given, capsys, script, function, message):
    name = given['user'].replace('talk', function)
    with pytest.raises(SystemExit) as stopped:
        run(script, out_dir=str(tmp_path / 'out'), max_steps=2, **given | dict(user=name))
    line, = (line for line in capsys.readouterr().err.split('\n') if 'error: ' in line) # others are the progress bar's
    assert stopped.value.code == 2 and f'error: --user={name}: ' in line and message in line
    assert function == 'nobody' or "'word': " in line # it names the record
    assert not has_checkpoint(str(tmp_path / 'out'))

def test_without_a_user_there_is_none():
    assert load_user(ppo.Config(prompts='-')) is None
