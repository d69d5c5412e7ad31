"""feedback/annotators.py: the simulated person's choices, a reward model's ranks, and a person in the terminal."""
import fcntl
import io
import os
import pty
import re
import sys
import termios
from subprocess import Popen
from types import SimpleNamespace

import pytest
import torch

import collect
from common.checkpoints import load_reward_model
from common.records import parse_line, read_lines, read_records
from common.tokens import prompt_ids, response_ids
from feedback.annotators import RewardModel, SimulatedPerson, Terminal, Undo, read_order, to_ranks, visible
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

def person(noise, tie=0.0, seed=1):
    """Make somebody for whom an answer is as good as the number it says."""
    return SimulatedPerson(SimpleNamespace(noise=noise, tie=tie, seed=seed), lambda prompt, response: float(response))

def test_without_noise_the_order_is_exact():
    assert person(0.0).rank('?', ['1', '3', '2', '3.0']) == ([2, 0, 1, 0], [1.0, 3.0, 2.0, 3.0])
    assert person(0.0, tie=1.5).rank('?', ['1', '5', '2']) == ([1, 0, 1], [1.0, 5.0, 2.0])

def test_the_same_text_ties_whatever_the_noise():
    someone = person(5.0)
    for _ in range(100):
        ranks, _ = someone.rank('?', ['1', '3', '1', '2'])
        assert ranks[0] == ranks[2] and sorted(set(ranks)) == [0, 1, 2]

@pytest.mark.parametrize('others', [[], ['0.25'], ['7', '-3']])
def test_noisy_choices_follow_bradley_terry(others):
    """
    Gold 0.5 apart, noise 0.5: sigmoid(1) = 0.731059. In 4000 draws the standard deviation of the share is
    sqrt(0.731 * 0.269 / 4000) = 0.0070, four of them 0.028. Other answers change nothing (Luce's axiom).
    """
    someone, first = person(0.5), 0
    for _ in range(4000):
        ranks, scores = someone.rank('?', ['0.5', '0'] + others)
        assert scores[:2] == [0.5, 0.0] # what is stored is free of noise
        first += ranks[0] < ranks[1]
    assert 0.703 < first / 4000 < 0.759

def test_a_person_is_the_same_for_the_same_seed():
    asked = [['1', '2', '1.5']] * 20
    again = [[person(1.0, seed=s).rank('?', a)[0] for a in asked] for s in (1, 1, 2)]
    one = person(1.0)
    assert again[0] == again[1] != again[2] and len({tuple(one.rank('?', a)[0]) for a in asked}) > 1

def ranked(prompt, responses, tie=0.0, folder=None):
    someone = RewardModel(SimpleNamespace(reward_model=folder, tie=tie, seed=1), RUN)
    someone.look_ahead([dict(prompt=prompt, responses=responses)])
    return someone.rank(prompt, responses)

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
    ranks, scores = someone.rank('Hi', texts, ended)
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
    return Terminal(SimpleNamespace(seed=seed))

def test_a_person_sees_shuffled_distinct_answers(monkeypatch):
    orders = []
    look = lambda texts: (orders.append(tuple(texts)), by_name(texts))[1]
    screen = typing(monkeypatch, *[look] * 50)
    someone = someone_there()
    for _ in range(50):
        assert someone.rank('Who?', ['c', 'a', 'c', 'b']) == ([2, 0, 2, 1], None)
    assert len(set(orders)) == 6 and set(orders[0]) == {'a', 'b', 'c'} # all 3! orders; "c" once
    assert 'user: Who?' in screen.getvalue()
    assert someone.rank('Who?', ['a', 'a']) == ([0, 0], None) # nothing to ask

def test_a_person_sees_what_was_cut_off(monkeypatch):
    """The same text, once ended and once cut off, is shown twice, and has two ranks."""
    typing(monkeypatch, lambda texts: (sorted(texts) == ['a', 'a…', 'b…'] and by_name(texts)))
    assert someone_there().rank('Who?', ['b', 'a', 'a', 'a'], [False, True, False, True]) == ([2, 0, 1, 0], None)

def test_undo_goes_back_to_answers_that_differ_in_their_end(some, tmp_path, monkeypatch):
    rows = [dict(prompt=f'{n}', responses=['a', 'a'], ended=[True, n == 1], ranks=[0, 1]) for n in range(3)]
    seen = []
    look = lambda texts: (seen.append(len(texts)), by_name(texts))[1]
    typing(monkeypatch, look, 'u', look, look) # the second needs no answer: undo goes over it, to the first
    run(collect, annotator='human', **some | dict(answers=records(tmp_path / 'ends.jsonl', rows)))
    assert seen == [2, 2, 2]
    assert [row['ended'] for row in read_records(some['out'], 'rankings')] == [row['ended'] for row in rows]
    assert [row['ranks'] for row in read_records(some['out'], 'rankings')] == [[0, 1], [0, 0], [0, 1]]

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
    assert someone.rank('?', ['a', 'b', 'c']) == (None, None)
    assert 'numbers 1 to 3' in screen.getvalue() and 'places of 2, 3' in screen.getvalue()
    with pytest.raises(Undo):
        someone.rank('?', ['a', 'b'])
    for _ in range(2): # q, Ctrl-D
        with pytest.raises(KeyboardInterrupt):
            someone.rank('?', ['a', 'b'])

def test_ranked_by_a_person(some, monkeypatch):
    """Digits come before letters: the third answer is best, then "a". Stretches of three; undo goes back over both."""
    typing(monkeypatch, by_name, by_name, 's', '1=2=3', 'u', 'u', 'u', by_name, by_name, by_name, by_name, by_name)
    run(collect, annotator='human', rows=3, **some)
    rows = read_records(some['out'], 'rankings')
    assert [row['number'] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert all(row['ranks'] == ([2, 1, 0] if row['number'] != 3 else [0, 0]) for row in rows)
    assert all(row['annotator'] == 'human' for row in rows)

def test_undo_at_the_beginning_asks_again(some, monkeypatch):
    typing(monkeypatch, 'u', *[by_name] * 6)
    run(collect, annotator='human', **some)
    assert len(read_records(some['out'], 'rankings')) == 7

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
    assert [row['number'] for row in read_records(some['out'], 'rankings')] == [0, 1, 2, 3, 4, 5, 6]
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
    assert len(rows) == 7 and all('repeat' not in row for row in rows)
    again = {row['responses'][2]: row['again'] for row in rows if 'again' in row and len(row['responses']) == 3}
    assert again == dict.fromkeys(twice, [2, 0, 1]) and 2 <= len(twice) <= 3 and set(twice) <= {'0', '1', '2'}
    assert all(row['ranks'] == [2, 1, 0] for row in rows if len(row['responses']) == 3)
    # p_o = 2/3 and, without ties, p_e = 1/2: kappa = (1/6) / (1/2) = 1/3
    assert f"the same on 0.667 of {3 * len(twice)} pairs, kappa 0.333" in screen.getvalue()

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

    def until(text):
        nonlocal screen
        while text not in screen:
            screen += os.read(mine, 4096).decode()
        before, _, screen = screen.partition(text)
        return before

    until('1 of 2')
    until('quit > ')
    os.write(mine, b'1\x7f23\n') # a slip of the finger, taken back
    assert 'places of' not in until('2 of 2')
    until('quit > ')
    os.write(mine, b'\x03') # Ctrl-C
    until('--resume=True continues')
    assert process.wait(60) == 130
    assert len(open(some['out'] + '.partial').readlines()) == 1
    os.close(mine)
