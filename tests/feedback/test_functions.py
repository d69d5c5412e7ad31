"""feedback/functions.py: functions by their names, in modules and files; their faults in one line."""
from types import SimpleNamespace

import pytest

from data.toy import world
from feedback.functions import load_function, load_reward_function, load_user
from tiny import exits, one_line, rules

def test_a_function_of_a_module_and_of_a_file(rules):
    assert load_function('rules_of_mine:score', 'reward')(dict(prompt='Hi'), 'Hello') == 3
    assert load_function(f"{rules / 'mine' / 'file_of_mine.py'}:score", 'reward')({}, 'abc') == 13

def test_a_function_with_arguments(rules):
    assert load_function('rules_of_mine:scaled(by=-2)', 'reward')({}, 'abc') == -6
    assert load_function("rules_of_mine:scaled(by=2, plus=-0.5)", 'reward')({}, 'abc') == 5.5

@pytest.mark.parametrize('name, why', [
    ('nowhere_at_all:score', "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('rules_of_mine:silver', "AttributeError: module 'rules_of_mine' has no attribute 'silver'"),
    (':score', 'ValueError'), ('nowhere.py:score', 'FileNotFoundError')])
def test_no_such_function_is_told_in_one_line(rules, capsys, name, why):
    line = one_line(capsys, lambda: load_function(name, 'reward'))
    assert line.startswith(f'--reward={name}: cannot be imported ({why}'), line
    assert line.endswith('; wanted MODULE:FUNCTION or FILE.py:FUNCTION, as in data.toy.world:gold')

@pytest.mark.parametrize('call', ['', 'scaled(by=len)', 'scaled(2)', 'scaled(by=2', 'a.b', '3'])
def test_what_names_no_function_is_told_in_one_line(rules, capsys, call):
    """Only literals are arguments, and each by its name."""
    line = one_line(capsys, lambda: load_function(f'rules_of_mine:{call}', 'reward'))
    assert line == (f"--reward=rules_of_mine:{call}: {call!r} names no function; wanted MODULE:FUNCTION or "
                    "FILE.py:FUNCTION, as in data.toy.world:gold, or FUNCTION(name=3, other='text')")

def test_arguments_that_the_function_does_not_take_are_told_in_one_line(rules, capsys):
    exits(capsys, "--reward=rules_of_mine:scaled(bye=2): got an unexpected keyword argument 'bye'; wanted a function",
          load_function, 'rules_of_mine:scaled(bye=2)', 'reward')
    exits(capsys, '--reward=rules_of_mine:one: too many positional arguments; wanted a function of two arguments',
          load_function, 'rules_of_mine:one', 'reward')

def test_a_file_hides_no_module(rules):
    """Not even where it has the name of a library."""
    (rules / 'mine' / 'random.py').write_text('def score(record, response):\n    return 7\n')
    assert load_function(f"{rules / 'mine' / 'random.py'}:score", 'reward')({}, '') == 7
    import random
    assert random.Random(1).random() < 1
    (rules / 'random.py').write_text('def score(record, response):\n    return 8\n') # another of the same name
    one, two = (load_function(f'{folder}/random.py:score', 'reward') for folder in (rules / 'mine', rules))
    assert (one({}, ''), two({}, '')) == (7, 8)

@pytest.mark.parametrize('name, why', [('leaves', 'SystemExit: 3'), ('bad', 'OverflowError')])
def test_a_function_that_exits_or_overflows_is_an_error(rules, capsys, name, why):
    exits(capsys, f'--reward=rules_of_mine:{name}: {why}', load_reward_function, f'rules_of_mine:{name}', 'reward',
          [dict(prompt='Hi')], 'p.jsonl')

@pytest.mark.parametrize('name', ['text', 'huge', 'odd'])
def test_what_is_no_number_of_float32_is_refused(rules, capsys, name):
    exits(capsys, f'--reward=rules_of_mine:{name}: wanted a finite number, got ', load_reward_function,
          f'rules_of_mine:{name}', 'reward', [dict(prompt='Hi')], 'p.jsonl')

def test_what_a_function_changes_reaches_nobody(rules):
    record = dict(prompt=[dict(role='user', content='Hi')])
    load_reward_function('rules_of_mine:changes', 'reward', [record], 'p.jsonl')
    assert record == dict(prompt=[dict(role='user', content='Hi')])

def test_a_file_with_a_mistake_and_what_is_no_function(rules, capsys):
    exits(capsys, 'SyntaxError', load_function, f"{rules / 'mine' / 'broken_of_mine.py'}:score", 'gold')
    exits(capsys, '--gold=rules_of_mine:LIST: is no function', load_function, 'rules_of_mine:LIST', 'gold')

def test_a_reward_function_takes_the_whole_record(rules):
    exact = load_reward_function('rules_of_mine:exact', 'reward', [dict(prompt='Hi', answer='Yo')], 'p.jsonl')
    assert (exact(dict(prompt='Hi', answer='Yo'), 'Yo'), exact(dict(prompt='Hi', answer='Yo'), 'No')) == (1.0, 0.0)
    assert load_reward_function('', 'reward', [{}], 'p.jsonl') is None

def test_a_record_that_a_function_cannot_read_is_told_before_anything_begins(rules, capsys):
    asked = [dict(prompt='Hi'), dict(prompt='Why?')]
    line = one_line(capsys, lambda: load_reward_function('rules_of_mine:score', 'gold', asked, 'data/p.jsonl'))
    assert line.startswith("--gold=rules_of_mine:score: ValueError: unknown prompt 'Why?' (")
    assert "rules_of_mine.py:4), called with '' and the record data/p.jsonl: {'prompt': 'Why?'}" in line
    exits(capsys, "KeyError: 'answer'", load_reward_function, 'rules_of_mine:exact', 'reward', asked, 'p.jsonl')

@pytest.mark.parametrize('name, response, got', [('nothing', 'x', 'None'), ('infinite', 'oo', 'inf')])
def test_what_is_no_finite_number_is_told_with_its_record(rules, capsys, name, response, got):
    function = load_reward_function(f'rules_of_mine:{name}', 'reward', [dict(prompt='Hi')], 'p.jsonl')
    line = one_line(capsys, lambda: function(dict(prompt='Who?'), response))
    assert line == (f"--reward=rules_of_mine:{name}: wanted a finite number, got {got} for the response {response!r} "
                    "to the record p.jsonl: {'prompt': 'Who?'}")

def test_the_toy_worlds_gold_score():
    gold = load_reward_function('data.toy.world:gold', 'gold', [dict(prompt='Where does the fox live?')], 'p.jsonl')
    assert gold(dict(prompt='Where does the fox live?'), 'Sure! It lives in a den.') == 1.0
    assert world.gold('Where does the fox live?', 'It lives in a barn.') == pytest.approx(0.1)

def test_a_user_function_that_fails_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / 'user_of_mine.py').write_text('def user(record, messages):\n    return messages[0]["name"]\n')
    talk = load_user(SimpleNamespace(user=f"{tmp_path / 'user_of_mine.py'}:user", prompts='p.jsonl'))
    exits(capsys, "KeyError: 'name'", talk, dict(prompt='Hi'), [dict(role='user', content='Hi')])
