"""feedback/annotators.py: the simulated person's choices, a reward model's ranks, and a person in the terminal."""
import fcntl
import io
import os
import pty
import re
import select
import sys
import termios
from subprocess import Popen
from types import SimpleNamespace

import pytest
import torch

import collect
from common.checkpoints import load_policy, load_reward_model
from common.records import parse_line, read_lines, read_records
from common.tokens import prompt_ids, response_ids
from feedback.annotators import (PolicyReward, RewardFunction, RewardModel, SimulatedPerson, Terminal, Undo,
                                 read_numbers, read_order, to_ranks, visible)
from tiny import ROOT, RUN, TOK, checkpoint, launch, records, run, stops

@pytest.mark.parametrize('values, tie, ranks', [
    ([1., 3., 2.], 0.0, [2, 0, 1]),
    ([.1, .9, .5, .9], 0.0, [2, 0, 1, 0]), # equal ones share a rank, the next rank follows
    ([5., 5., 5.], 0.0, [0, 0, 0]),
    ([1., .75, .5, 0.], 0.25, [0, 0, 0, 1]), # a chain of neighbours 0.25 apart
    ([0., 1.], 0.5, [1, 0]),
    ([-1., -2.], 0.0, [0, 1]),
])
def test_to_ranks(values, tie, ranks):
    assert to_ranks(values, tie) == ranks

def asked(responses, prompt='?', **more):
    return dict(prompt=prompt, responses=responses, **more)

def person(noise, tie=0.0, seed=1):
    """Make somebody for whom an answer is as good as the number it says."""
    return SimulatedPerson(SimpleNamespace(noise=noise, tie=tie, seed=seed), lambda row, response: float(response))

def test_without_noise_the_order_is_exact():
    assert person(0.0).rank(asked(['1', '3', '2', '3.0'])) == ([2, 0, 1, 0], [1.0, 3.0, 2.0, 3.0])
    assert person(0.0, tie=1.5).rank(asked(['1', '5', '2'])) == ([1, 0, 1], [1.0, 5.0, 2.0])

def test_the_same_text_ties_whatever_the_noise():
    someone = person(5.0)
    for _ in range(100):
        ranks, _ = someone.rank(asked(['1', '3', '1', '2']))
        assert ranks[0] == ranks[2] and sorted(set(ranks)) == [0, 1, 2]

@pytest.mark.parametrize('others', [[], ['0.25'], ['7', '-3']])
def test_noisy_choices_follow_bradley_terry(others):
    """
    Gold 0.5 apart, noise 0.5: sigmoid(1) = 0.731059. In 4000 draws the standard deviation of the share is
    sqrt(0.731 * 0.269 / 4000) = 0.0070, four of them 0.028. Other answers change nothing (Luce's axiom).
    """
    someone, first = person(0.5), 0
    for _ in range(4000):
        ranks, scores = someone.rank(asked(['0.5', '0'] + others))
        assert scores[:2] == [0.5, 0.0] # what is stored is free of noise
        first += ranks[0] < ranks[1]
    assert 0.703 < first / 4000 < 0.759

def test_a_person_is_the_same_for_the_same_seed():
    rows = [['1', '2', '1.5']] * 20
    again = [[person(1.0, seed=s).rank(asked(a))[0] for a in rows] for s in (1, 1, 2)]
    one = person(1.0)
    assert again[0] == again[1] != again[2] and len({tuple(one.rank(asked(a))[0]) for a in rows}) > 1

@pytest.mark.parametrize('gold, scale, number', [
    ('0', 5, 1), ('1', 5, 5), ('0.5', 5, 3), ('0.6', 5, 3), ('0.7', 5, 4), ('-3', 5, 1), ('7', 5, 5), # steps of 1/4
    ('0.5', 10, 5), ('0.6', 10, 6), ('1', 10, 10), ('0.4', 2, 1), ('0.6', 2, 2), # 4.5 is rounded to the even 4
])
def test_gold_scores_become_whole_numbers(gold, scale, number):
    assert rater(scale, noise=0.0).rate(asked([gold])) == [dict(score=number)]

def rater(scale, qualities='score', noise=0.1, seed=1):
    return SimulatedPerson(SimpleNamespace(noise=noise, seed=seed, scale=scale, qualities=qualities),
                           lambda row, response: float(response))

def test_a_simulated_rater_sees_through_noise_without_bias():
    """
    Gumbel's standard deviation is pi / sqrt(6) = 1.282550, times 0.05 is 0.064. On a scale of 10, in steps of 1/9, gold
    0.5 becomes 1 + 9 * 0.5 = 5.5 on average: no end is within four deviations. Of 4000 ratings the standard deviation
    is sqrt((9 * 0.064)^2 + 1/12) / sqrt(4000) = 0.0102; four of them are 0.041.
    """
    someone = rater(10, noise=0.05)
    ratings = [someone.rate(asked(['0.5']))[0]['score'] for _ in range(4000)]
    assert all(type(x) is int and 1 <= x <= 10 for x in ratings) and len(set(ratings)) > 3
    assert abs(sum(ratings) / 4000 - 5.5) < 0.041

def test_a_simulated_rater_rates_each_answer_once_and_each_quality_anew():
    someone = rater(10, 'helpful,honest', noise=0.3)
    rows = [someone.rate(asked(['0.5', '0.4', '0.5'])) for _ in range(50)]
    assert all(a == c and {*a} == {'helpful', 'honest'} for a, _, c in rows)
    assert any(a != b for a, b, _ in rows) and any(a['helpful'] != a['honest'] for a, *_ in rows)
    rows = [someone.rate(asked(['0.5', '0.5'], ended=[True, False])) for _ in range(50)]
    assert any(a != b for a, b in rows) # one was cut off: two answers

def test_a_function_ranks(tmp_path):
    """It sees the whole record; what it ranks highest is 0."""
    someone = RewardFunction(SimpleNamespace(seed=1, tie=0.5), lambda row, text: len(text) * row['sign'])
    assert someone.rank(asked(['a', 'ccc', 'bb'], sign=1)) == ([2, 0, 1], [1, 3, 2])
    assert someone.rank(asked(['a', 'ccc', 'bb'], sign=-1)) == ([0, 2, 1], [-1, -3, -2])
    assert someone.rank(asked(['a', 'b', 'ccc'], sign=0.25)) == ([0, 0, 0], [0.25, 0.25, 0.75]) # at most 0.5 apart

def test_a_policy_ranks_as_rrhf_and_dpo_score(tmp_path):
    """Each answer alone, token by token: the mean of log pi; or the sum, less the reference's. The end counts."""
    folders = [checkpoint(tmp_path / 'policy'), checkpoint(tmp_path / 'reference', seed=5)]
    texts, ended, found = ['Yo', 'Hello there', 'Yo', '?', 'Yo'], [True, True, False, True, True], []
    for folder in folders:
        model, totals = load_policy(folder).eval(), []
        for text, end in zip(texts, ended):
            prompt, answer = prompt_ids(TOK, 'Hi'), [*f' {text}'.encode()] + [256] * end
            logp = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)[0]
            totals.append(sum(logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)))
        found.append(totals)
    sizes = [4, 13, 3, 3, 4] # the space, the bytes, the end
    row = dict(prompt='Hi', responses=texts, ended=ended)
    for reference, expected in (('', [x / n for x, n in zip(found[0], sizes)]),
                                (folders[1], [x - y for x, y in zip(*found)])):
        cfg = SimpleNamespace(reward_policy=folders[0], reward_reference=reference, seed=1, tie=0.0)
        someone = PolicyReward(cfg, RUN)
        someone.look_ahead([row, dict(prompt='Other', responses=['x'])])
        ranks, scores = someone.rank(row)
        assert scores == pytest.approx(expected, abs=1e-4) and ranks[0] == ranks[4] and len(set(ranks)) == 4
        assert all((ranks[i] < ranks[j]) == (scores[i] > scores[j]) for i in range(5) for j in range(5))

def ranked(prompt, responses, tie=0.0, folder=None):
    someone = RewardModel(SimpleNamespace(reward_model=folder, tie=tie, seed=1), RUN)
    someone.look_ahead([dict(prompt=prompt, responses=responses)])
    return someone.rank(dict(prompt=prompt, responses=responses))

def test_a_reward_model_ranks_by_its_scores(tmp_path):
    """Each answer's score is what the reward model gives to prompt, answer and end of text alone."""
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    texts, model = ['Yo', 'Hello there', 'Yo', '?'], load_reward_model(folder)
    rows = [prompt_ids(TOK, 'Hi') + response_ids(TOK, t) for t in texts]
    alone = [model.rewards(torch.tensor([row]), torch.tensor([len(row)])).item() for row in rows]
    ranks, scores = ranked('Hi', texts, folder=folder)
    assert scores == pytest.approx(alone, abs=1e-5) and len(set(ranks)) == 3 and ranks[0] == ranks[2]
    for i in range(4):
        for j in range(4):
            assert (ranks[i] < ranks[j]) == (scores[i] > scores[j])
    assert ranked('Hi', texts, tie=1e6, folder=folder)[0] == [0, 0, 0, 0]
    long = 'x' * 100 # the prompt is cut, the answers are not
    assert len(ranked(long, texts, folder=folder)[1]) == 4
    assert ranked('Hi', ['Yo', long], folder=folder) == (None, None) # nor is there room for this one

def test_a_reward_model_scores_an_answer_as_it_was_written(tmp_path):
    """With its end only if it has one; the same text with and without are two answers."""
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    texts, ended, model = ['Yo', 'Yo', 'Yo', 'x'], [True, False, True, False], load_reward_model(folder)
    rows = [prompt_ids(TOK, 'Hi') + [*f' {text}'.encode()] + [256] * end for text, end in zip(texts, ended)]
    alone = [model.rewards(torch.tensor([row]), torch.tensor([len(row)])).item() for row in rows]
    someone = RewardModel(SimpleNamespace(reward_model=folder, tie=0.0, seed=1), RUN)
    someone.look_ahead([dict(prompt='Hi', responses=texts, ended=ended)])
    ranks, scores = someone.rank(dict(prompt='Hi', responses=texts, ended=ended))
    assert scores == pytest.approx(alone, abs=1e-5) and len(set(ranks)) == 3 and ranks[0] == ranks[2] != ranks[1]

# ---------------------------------------------------------------------------------------------------------------------
# a person in the terminal

@pytest.mark.parametrize('text, ranks', [
    ('2 1=3', [1, 0, 1]), ('213', [1, 0, 2]), ('31', [1, 2, 0]), # the last one is clear
    ('1=2=3', [0, 0, 0]), ('=', [0, 0, 0]), (' 3=1 ', [0, 1, 0]), ('1 = 3 2', [0, 1, 0]),
])
def test_read_order(text, ranks):
    assert read_order(text, 3) == ranks

def test_read_order_of_two_and_of_many():
    assert read_order('2', 2) == [1, 0] and read_order('1=2', 2) == [0, 0]
    assert read_order('10 9=8 7 6 5 4 3 2 11', 11) == [9, 7, 6, 5, 4, 3, 2, 1, 1, 0, 8] # 1 is left out: last

@pytest.mark.parametrize('text, wanted', [
    ('', 'numbers 1 to 3'), ('abc', 'numbers 1 to 3'), ('=12', 'numbers 1 to 3'), ('12=', 'numbers 1 to 3'),
    ('1==2', 'numbers 1 to 3'), ('1,2,3', 'numbers 1 to 3'), ('1 -2', 'numbers 1 to 3'), ('٣12', 'numbers 1 to 3'),
    ('124', 'got 4'), ('012', 'got 0'), ('112', 'got 1 again'), ('2', 'places of 1, 3'),
])
def test_read_order_says_what_was_wanted(text, wanted):
    with pytest.raises(ValueError, match=wanted):
        read_order(text, 3)

@pytest.mark.parametrize('text, n, numbers', [('3', 1, [3]), (' 10 ', 1, [10]), ('7 10 8', 3, [7, 10, 8]),
                                              ('7,10, 8', 3, [7, 10, 8])])
def test_read_numbers(text, n, numbers):
    assert read_numbers(text, n, 10) == numbers

@pytest.mark.parametrize('text, n', [('', 1), ('0', 1), ('11', 1), ('7 10', 3), ('7 10 8 1', 3), ('7.5', 1), ('-1', 1),
                                     ('x', 1), ('٣', 1), ('1' * 5000, 1)])
def test_read_numbers_says_what_was_wanted(text, n):
    with pytest.raises(ValueError, match='wanted a whole number from 1 to 10' if n == 1 else 'wanted 3 whole numbers'):
        read_numbers(text, n, 10)

def test_no_text_commands_the_terminal():
    """Cursor movements, colours, a title, a bell, an overwritten line, letters from right to left; text stays."""
    assert visible('a\x1b[2J\x1b]0;t\x07b\rc\u202ed\x9b31m') == 'a\ufffd[2J\ufffd]0;t\ufffdb\ufffdc\ufffdd\ufffd31m'
    assert visible('é 中\n\tשלום\u00a0x\r\n') == 'é 中\n\tשלום\u00a0x\n'

def typing(monkeypatch, *lines):
    """Let somebody type these lines, then Ctrl-D. An entry may be a function of the texts on the screen, in order."""
    screen, lines = io.StringIO(), iter(lines)
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr('builtins.print', lambda *words, **_: screen.write(' '.join(map(str, words)) + '\n'))

    def reading(prompt):
        line = next(lines, None)
        if line is None:
            raise EOFError
        shown = screen.getvalue().rpartition('─ ')[2]
        return line(re.findall(r'\n\[\d+\]\n(.*)\n', shown)) if callable(line) else line

    monkeypatch.setattr('builtins.input', reading)
    return screen

def by_name(texts):
    """Rank texts by the alphabet, as a person types it."""
    return ''.join(str(texts.index(t) + 1) for t in sorted(texts))

def someone_there(seed=1):
    return Terminal(SimpleNamespace(seed=seed, rater='anna', out='out.jsonl'))

def test_a_person_sees_shuffled_distinct_answers(monkeypatch):
    orders = []
    look = lambda texts: (orders.append(tuple(texts)), by_name(texts))[1]
    screen = typing(monkeypatch, *[look] * 50)
    someone = someone_there()
    for n in range(50):
        assert someone.rank(asked(['c', 'a', 'c', 'b'], f'Who is {n}?')) == ([2, 0, 2, 1], None)
    assert len(set(orders)) == 6 and set(orders[0]) == {'a', 'b', 'c'} # all 3! orders; "c" once
    assert 'user: Who is 49?' in screen.getvalue()
    assert someone.rank(asked(['a', 'a'])) == (None, None) # nothing to ask, so no ranks

def test_a_person_sees_what_was_cut_off(monkeypatch):
    """The same text, once ended and once cut off, is shown twice, and has two ranks."""
    typing(monkeypatch, lambda texts: (sorted(texts) == ['a', 'a…', 'b…'] and by_name(texts)))
    assert someone_there().rank(asked(['b', 'a', 'a', 'a'], ended=[False, True, False, True])) == ([2, 0, 1, 0], None)

def test_undo_goes_back_to_answers_that_differ_in_their_end(some, tmp_path, monkeypatch):
    rows = [dict(prompt=f'{n}', responses=['a', 'a'], ended=[True, n == 1], ranks=[0, 1]) for n in range(3)]
    seen = []
    look = lambda texts: (seen.append(len(texts)), by_name(texts))[1]
    typing(monkeypatch, look, 'u', look, look) # the second needs no answer: undo goes over it, to the first
    run(collect, annotator='human', **some | dict(answers=records(tmp_path / 'ends.jsonl', rows)))
    assert seen == [2, 2, 2]
    found = read_records(some['out'], 'rankings')
    assert [(row['prompt'], row['ended'], row['ranks']) for row in found] == [
        ('0', [True, False], [0, 1]), ('2', [True, False], [0, 1])]

def test_two_raters_see_other_orders(some, tmp_path, monkeypatch):
    """With the same seed; one who goes on later sees the order that they would have seen."""
    orders = {}
    for name in ('anna', 'ben', 'anna'):
        orders.setdefault(name, [])
        with monkeypatch.context() as m:
            typing(m, *[lambda texts: (orders[name].append(texts), by_name(texts))[1]] * 6)
            run(collect, annotator='human', **some | dict(out=str(tmp_path / f'{name}.jsonl'), overwrite=True))
    assert orders['anna'][:6] == orders['anna'][6:] != orders['ben']

def test_what_else_a_person_says(monkeypatch):
    screen = typing(monkeypatch, 'what?', '1', 's', 'u', 'Q')
    someone = someone_there()
    assert someone.rank(asked(['a', 'b', 'c'])) == (None, None)
    assert 'numbers 1 to 3' in screen.getvalue() and 'places of 2, 3' in screen.getvalue()
    with pytest.raises(Undo):
        someone.rank(asked(['a', 'b']))
    for _ in range(2): # q, Ctrl-D
        with pytest.raises(KeyboardInterrupt):
            someone.rank(asked(['a', 'b']))

def test_ranked_by_a_person(some, monkeypatch):
    """Digits come before letters: the third answer is best, then "a". Stretches of three; undo goes back over both."""
    typing(monkeypatch, by_name, by_name, 's', '1=2=3', 'u', 'u', 'u', by_name, by_name, by_name, by_name, by_name)
    run(collect, annotator='human', rows=3, **some)
    rows = read_records(some['out'], 'rankings')
    assert [row['number'] for row in rows] == [0, 1, 2, 4, 5, 6] # nobody saw the fourth, so nobody ranked it
    assert all(row['ranks'] == [2, 1, 0] and row['annotator'] == 'human' for row in rows)

def test_undo_at_the_beginning_asks_again(some, monkeypatch):
    screen = typing(monkeypatch, 'u', *[by_name] * 6)
    run(collect, annotator='human', **some)
    assert len(read_records(some['out'], 'rankings')) == 6
    assert screen.getvalue().count('nothing to undo: this is the first prompt') == 1
    assert screen.getvalue().endswith('out.jsonl: 6 prompts, 18 answers, 18 pairs, 1 prompts left out '
                                      '(skipped, or without two different answers)\n')

@pytest.mark.parametrize('ask', ['ranks', 'ratings'])
def test_undo_shows_the_same_order_again(tmp_path, monkeypatch, ask):
    """Also where it goes back to the stretch before: 0, 1, 2, back to 1 and 0, then on to 3."""
    texts = lambda n: [f'{letter}{n}' for letter in 'abcdefg'] # 7! orders: no two are alike by chance
    rows, seen = [dict(prompt=f'{n}', responses=texts(n), ranks=[0] * 7) for n in range(4)], []
    typing(monkeypatch, *[lambda shown, said=said: (seen.append(tuple(shown)), said)[1] for said in 'ssuussss'])
    with pytest.raises(SystemExit): # all are skipped
        run(collect, annotator='human', ask=ask, rows=2, device='cpu', out=str(tmp_path / 'out.jsonl'),
            answers=records(tmp_path / 'a.jsonl', rows))
    orders = {n: [[text[0] for text in shown] for shown in seen if shown[0][1] == str(n)] for n in range(4)}
    assert [len(orders[n]) for n in range(4)] == [2, 3, 2, 1]
    assert all(order == orders[n][0] for n in range(4) for order in orders[n])
    assert orders[0][0] != orders[1][0]

def test_what_is_asked_a_second_time_has_another_order(monkeypatch):
    """Nobody shall rank it from memory of the places."""
    seen = []
    typing(monkeypatch, *[lambda shown: (seen.append(''.join(shown).lower()), 's')[1]] * 4)
    for texts, more in (('abcdefg', {}), ('abcdefg', dict(repeat=0)), ('abcdefg', {}), ('ABCDEFG', {})):
        someone_there().rank(asked([*texts], **more))
    assert seen[0] == seen[2] and len(set(seen)) == 3 # other answers to the same prompt have their own order too

def test_quit_and_go_on_later(some, monkeypatch, capsys):
    """What was said is on the disk before the next question; a half-written line is asked again."""
    partial = some['out'] + '.partial'
    saved = lambda: [parse_line(line) for _, line in read_lines(partial)]
    with monkeypatch.context() as m:
        counts = []
        look = lambda texts: (counts.append(len(saved()) if os.path.exists(partial) else 0), by_name(texts))[1]
        typing(m, look, look, look, look, 'q')
        assert launch(m, collect, annotator='human', rows=4, **some) == 130
    assert counts == [0, 1, 2, 4] # after the third the one that needs no answer
    assert not os.path.exists(some['out']) and len(saved()) == 5
    with open(partial, 'ab') as f:
        f.write(b'{"prompt": "Q5", "ra')
    typing(monkeypatch, by_name, by_name)
    run(collect, annotator='human', rows=4, resume=True, **some)
    assert [row['number'] for row in read_records(some['out'], 'rankings')] == [0, 1, 2, 4, 5, 6]
    assert not os.path.exists(partial)

def test_some_are_asked_twice(some, monkeypatch):
    """
    7 tasks and round(0.4 * 7) = 3 more, from the first half. The second time the two best are exchanged: of three pairs
    two are the same. The first ranks stay; what was skipped at first and ranked then counts as ranked once.
    """
    seen, asked = [], []

    def look(texts):
        name = next(t for t in texts if t.isdigit())
        asked.append(name)
        order = by_name(texts)
        if name in seen:
            return order[1] + order[0] + order[2]
        seen.append(name)
        return order

    screen = typing(monkeypatch, *[look] * 9)
    run(collect, annotator='human', repeat=0.4, **some)
    twice = asked[6:]
    rows = read_records(some['out'], 'rankings')
    assert len(rows) == 6 and all('repeat' not in row for row in rows)
    again = {row['responses'][2]: row['again'] for row in rows if 'again' in row}
    assert again == dict.fromkeys(twice, [2, 0, 1]) and 2 <= len(twice) <= 3 and set(twice) <= {'0', '1', '2'}
    assert all(row['ranks'] == [2, 1, 0] for row in rows)
    # p_o = 2/3 and, without ties, p_e = 1/2: kappa = (1/6) / (1/2) = 1/3
    assert f"the same on 0.667 of {3 * len(twice)} pairs of answers, kappa 0.333" in screen.getvalue()

@pytest.mark.parametrize('first, said', [('xy', 'x first'), ('xxy', 'x first'), ('xy', 's')])
def test_the_second_opinion_is_of_the_same_row(tmp_path, monkeypatch, first, said):
    """Two rows with the same prompt and texts, in other orders or numbers: each keeps its own second ranks."""
    rows = [dict(prompt='Q', responses=list(first), ranks=list(range(len(first)))),
            dict(prompt='Q', responses=['y', 'x'], ranks=[0, 1])]
    x_first = lambda texts: str(1 + texts.index('x')) + str(1 + texts.index('y'))
    y_first = lambda texts: str(1 + texts.index('y')) + str(1 + texts.index('x'))
    typing(monkeypatch, x_first if said == 'x first' else said, y_first, x_first)
    out = str(tmp_path / 'out.jsonl')
    run(collect, annotator='human', repeat=0.5, answers=records(tmp_path / 'a.jsonl', rows), device='cpu', out=out)
    one, two = read_records(out, 'rankings') # the first of the two is asked again
    x_is_best = [int(c == 'y') for c in first]
    assert one['ranks'] == x_is_best and one.get('again') == (x_is_best if said == 'x first' else None)
    assert two['ranks'] == [0, 1] and 'again' not in two

def test_second_opinions_of_an_older_version(some, tmp_path, monkeypatch, capsys):
    """They did not say of which row they are: guessing would mix them up."""
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    records(tmp_path / 'out.jsonl.partial', [dict(prompt='Q0', responses=['b', 'a'], ranks=[0, 1], repeat=True)])
    said = stops(capsys, collect, annotator='human', resume=True, repeat=0.4, **some)
    assert 'was written by an older version' in said

def test_rated_by_a_person(some, monkeypatch):
    """Digits get 9 9 9, "a" 5 6 7, "b" 1 2 3. A lone answer is shown too. Undo goes back to a task that was skipped."""
    numbers, screens = dict(a='5 6 7', b='1 2 3'), [None, 0] # the texts on the screen, and how many have their numbers

    def look(texts):
        screens[:] = texts, (screens[1] + 1 if texts == screens[0] else 0)
        return numbers.get(texts[screens[1]], '9 9 9')

    screen = typing(monkeypatch, '5 6', *[look] * 6, 's', 'u', *[look] * 13)
    run(collect, annotator='human', ask='ratings', qualities='helpful,harmless,honest', **some)
    rows = read_records(some['out'], 'ratings')
    for row in rows:
        said = ' '.join(str(row[quality]) for quality in ('helpful', 'harmless', 'honest'))
        assert said == numbers.get(row['response'], '9 9 9')
        assert set(row) == {'prompt', 'number', 'annotator', 'response', 'ended', 'helpful', 'harmless', 'honest',
                            'seconds'}
        assert row['annotator'] == 'human' and row['ended'] is True
    assert 'wanted 3 whole numbers from 1 to 10' in screen.getvalue()
    assert [row['number'] for row in rows] == [n for n in range(7) for _ in range(3 if n != 3 else 1)]

def test_undo_within_a_task_takes_back_one_answer(tmp_path, monkeypatch):
    rows = [dict(prompt=f'{n}', responses=['a', 'b'], ranks=[0, 1]) for n in range(2)]
    typing(monkeypatch, '1', 'u', '2', '3', 'u', '4', '5', '6', '7') # the second task's u goes back to the first
    out = str(tmp_path / 'out.jsonl')
    run(collect, annotator='human', ask='ratings', scale=7, answers=records(tmp_path / 'a.jsonl', rows), device='cpu',
        out=out)
    found = read_records(out, 'ratings')
    assert sorted(row['score'] for row in found[:2]) == [4, 5] and sorted(row['score'] for row in found[2:]) == [6, 7]

def test_rating_goes_on_later(some, monkeypatch, capsys):
    """After q what was said is kept; a task half said is asked again."""
    with monkeypatch.context() as m:
        typing(m, *'123', *'45', 'q')
        assert launch(m, collect, annotator='human', ask='ratings', **some) == 130
    kept = [parse_line(line) for _, line in read_lines(some['out'] + '.partial')]
    assert len(kept) == 1 and sorted(x['score'] for x in kept[0]['ratings']) == [1, 2, 3]
    assert 'read it as it is' not in capsys.readouterr().out # reward.py reads the finished file
    said = stops(capsys, collect, annotator='human', ask='ratings', scale=3, resume=True, **some)
    assert 'stdin is not a terminal' in said or said.startswith('--scale=3: ')
    typing(monkeypatch, *'123', *'123', 's', *'123', *'123', *'123')
    run(collect, annotator='human', ask='ratings', resume=True, **some)
    rows = read_records(some['out'], 'ratings')
    assert [row['number'] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3 + [4] * 3 + [5] * 3 + [6] * 3

@pytest.mark.parametrize('ask', ['ranks', 'ratings'])
def test_skips_have_reasons_and_are_not_asked_again(some, tmp_path, monkeypatch, capsys, ask):
    """Of seven the first is skipped, taken back and skipped for another reason; the third too, without one.

    The second is skipped, taken back and ranked.
    """
    say, skipped = (by_name if ask == 'ranks' else '1'), some['out'] + '.skipped'
    options = dict(annotator='human', ask=ask, rater='Anna', **some)
    more = 1 if ask == 'ranks' else 3 # inputs a task
    with monkeypatch.context() as m:
        typing(m, 's No idea', 'u', 'S  All WRONG, \udcff ', 's oops', 'u', *[say] * more, 's', 'q')
        assert launch(m, collect, **options) == 130
    kept = [parse_line(line) for _, line in read_lines(some['out'] + '.partial')]
    assert [row.get('skipped') for row in kept[:3]] == ['All WRONG, ?', None, '']
    typing(monkeypatch, *[say] * 20)
    run(collect, resume=True, **options)
    rows = read_records(some['out'], 'rankings' if ask == 'ranks' else 'ratings')
    assert {row['number'] for row in rows} == ({1, 4, 5, 6} if ask == 'ranks' else {1, 3, 4, 5, 6})
    assert all(row['rater'] == 'Anna' and 'skipped' not in row for row in rows)
    assert all('seconds' in row for row in rows)
    left = read_records(skipped, 'prompts')
    assert [(row['number'], row['skipped'], row['rater'], len(row['responses'])) for row in left] == [
        (0, 'All WRONG, ?', 'Anna', 3), (2, '', 'Anna', 3)]
    # another run does not overwrite the reasons unasked, and leaves none behind that are not its own
    os.remove(some['out'])
    assert f'{skipped} exists already' in stops(capsys, collect, **options)
    typing(monkeypatch, *[say] * 40)
    run(collect, overwrite=True, **options)
    assert not os.path.exists(skipped)

def test_all_skipped(some, monkeypatch, capsys):
    typing(monkeypatch, *['s no'] * 6)
    options = some | dict(answers=records(some['answers'], read_records(some['answers'], 'rankings')[:3]))
    assert stops(capsys, collect, code=1, annotator='human', **options).endswith('not written, no prompt was ranked')
    assert [row['skipped'] for row in read_records(some['out'] + '.skipped', 'prompts')] == ['no'] * 3
    assert not os.path.exists(some['out'])

def test_skipped_at_first_and_ranked_when_asked_again(tmp_path, monkeypatch):
    """It is no skip then, and the seconds are those of the ranking."""
    clock = iter([0, 7, 10, 15, 20, 22])
    monkeypatch.setattr('feedback.annotators.time', SimpleNamespace(monotonic=lambda: next(clock)))
    rows = [dict(prompt=f'{n}', responses=['a', 'b'], ranks=[0, 1]) for n in range(2)]
    typing(monkeypatch, 's why', by_name, by_name)
    out = str(tmp_path / 'out.jsonl')
    run(collect, annotator='human', repeat=0.5, answers=records(tmp_path / 'a.jsonl', rows), device='cpu', out=out)
    found = read_records(out, 'rankings')
    assert [(row['ranks'], row['seconds']) for row in found] == [([0, 1], 2.0), ([0, 1], 5.0)]
    assert not any({'skipped', 'repeat', 'again'} & row.keys() for row in found)
    assert not os.path.exists(out + '.skipped')

def test_the_rater_shapes_the_order_and_the_file(some, tmp_path, monkeypatch, capsys):
    """Two raters whose files have one name see other orders; nobody goes on with another's file."""
    orders = {}
    for rater in ('anna', 'ben'):
        with monkeypatch.context() as m:
            typing(m, *[lambda texts: (orders.setdefault(rater, []).append(texts), by_name(texts))[1]] * 5, 'q')
            out = str(tmp_path / rater / 'out.jsonl')
            assert launch(m, collect, annotator='human', rater=rater, **some | dict(out=out)) == 130
    assert orders['anna'] != orders['ben']
    typing(monkeypatch)
    assert stops(capsys, collect, annotator='human', rater='cleo', resume=True, **some | dict(out=out)) == (
        f'--rater=cleo: {out}.partial began with ben; wanted the same, or --overwrite=True')

def test_nobody_there(some, capsys):
    assert stops(capsys, collect, annotator='human', **some) == (
        '--annotator=human: stdin is not a terminal, nobody can be asked; --page=True serves a page instead')
    assert not os.path.exists(some['out'] + '.partial')

def test_in_a_real_terminal(some):
    mine, theirs = pty.openpty()
    own_terminal = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) # whose Ctrl-C goes to this process
    process = Popen([sys.executable, 'collect.py', '--annotator=human', '--max_prompts=2',
                     *(f'--{k}={v}' for k, v in some.items())], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
                    start_new_session=True, preexec_fn=own_terminal)
    os.close(theirs)
    screen = ''

    def until(text, again=b''):
        nonlocal screen
        for _ in range(12):
            if text in screen:
                break
            if select.select([mine], [], [], 10)[0]:
                screen += os.read(mine, 4096).decode()
            else:
                os.write(mine, again)
        else:
            process.kill()
            pytest.fail(f'{text!r} does not come: {screen!r}')
        before, _, screen = screen.partition(text)
        return before

    until('1 of 2')
    until('quit > ')
    os.write(mine, b'1\x7f23\n') # a slip of the finger, taken back
    assert 'places of' not in until('2 of 2')
    until('quit > ')
    os.write(mine, b'\x03') # Ctrl-C; Python loses one that comes between its look for signals and its read
    until('--resume=True continues', again=b'\x03')
    assert process.wait(60) == 130
    assert len(open(some['out'] + '.partial').readlines()) == 1
    os.close(mine)
