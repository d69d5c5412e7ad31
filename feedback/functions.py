"""Load the functions that people write: rewards, gold scores, and users who talk to a policy.

Whatever goes wrong in them ends the program with one line that names the option, the function and the record.
"""

import ast
import functools
import importlib
import importlib.util
import math
import os
import sys
import traceback

from common.options import fail

def load_function(name, option):
    """Load a function: MODULE:FUNCTION or FILE.py:FUNCTION, with arguments in brackets if it takes some.

        data.toy.world:gold          my_rewards.py:exact          data.toy.world:abstaining(price=-0.5)

    Whatever goes wrong ends the program with one line that names the option. The file runs: it is the user's own code.
    """
    wanted = 'wanted MODULE:FUNCTION or FILE.py:FUNCTION, as in data.toy.world:gold'
    module, _, call = name.partition(':')
    try:
        call = ast.parse(call, mode='eval').body
        given = {}
        if isinstance(call, ast.Call):
            if call.args:
                raise ValueError('arguments are given by name')
            given, call = {k.arg: ast.literal_eval(k.value) for k in call.keywords}, call.func
        function = call.id
        if module.endswith('.py'):
            sys.path.insert(0, os.path.dirname(os.path.abspath(module))) # it may import its neighbours
            spec = importlib.util.spec_from_file_location(os.path.basename(module)[:-3], module)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module)
        function = getattr(module, function)
    except Exception as e: # a file of the user's may raise anything
        fail(f"--{option}={name}: cannot be imported ({type(e).__name__}: {e}); {wanted}")
    if not callable(function):
        fail(f"--{option}={name}: is no function; {wanted}")
    return functools.partial(function, **given) if given else function

def guarded(function, option, name, path):
    """Return function(record, …); where it raises, the program ends with one line that names the record."""
    def call(record, *args):
        try:
            return function(record, *args)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            fail(f"--{option}={name}: {type(e).__name__}: {e} ({last.filename}:{last.lineno}), with the record "
                 f"{path}: {str(record)[:200]}")
    return call

def load_reward_function(name, option, records, path):
    """Load a reward function of (record, response) that returns a number; '' is None.

    It is tried on every record with an empty response. Where it raises, or returns what is no finite number, then or
    later, the program ends with one line; path: the records' file.
    """
    if not name:
        return None
    function = guarded(load_function(name, option), option, name, path)

    def reward(record, response):
        value = function(record, response)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            fail(f"--{option}={name}: wanted a finite number, got {value!r} for the response {response[:80]!r} to the "
                 f"record {path}: {str(record)[:200]}")
        return number

    for record in records:
        reward(record, '')
    return reward

def load_user(cfg):
    """Load the function that plays the user; None without one. What is no text ends the program with one line."""
    speak = guarded(load_function(cfg.user, 'user'), 'user', cfg.user, cfg.prompts) if cfg.user else None

    def user(record, messages):
        text = speak(record, messages)
        if not isinstance(text, str | None):
            fail(f"--user={cfg.user}: wanted a text or None, got {text!r} with the record {cfg.prompts}: "
                 f"{str(record)[:200]}")
        return text

    return speak and user

def load_functions(cfg, records):
    """Load what --reward, --gold and --user name, None where they name nothing; records: of cfg.prompts."""
    reward, gold = (load_reward_function(getattr(cfg, name), name, records, cfg.prompts) for name in ('reward', 'gold'))
    return reward, gold, load_user(cfg)
