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
    ('rules_of_mine', 'SyntaxError'), (':score', 'ValueError'), ('rules_of_mine:', 'SyntaxError'),
    ('nowhere.py:score', 'FileNotFoundError'), ('rules_of_mine:scaled(by=len)', 'ValueError'),
    ('rules_of_mine:scaled(2)', 'ValueError: arguments are given by name'), ('rules_of_mine:a.b', 'AttributeError')])
def test_no_such_function_is_told_in_one_line(rules, capsys, name, why):
    line = one_line(capsys, lambda: load_function(name, 'reward'))
    assert line.startswith(f'--reward={name}: cannot be imported ({why}'), line
    assert line.endswith('; wanted MODULE:FUNCTION or FILE.py:FUNCTION, as in data.toy.world:gold')

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
    assert "rules_of_mine.py:4), with the record data/p.jsonl: {'prompt': 'Why?'}" in line
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
