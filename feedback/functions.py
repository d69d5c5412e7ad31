"""Load the functions that people write: rewards, gold scores, and users who talk to a policy.

Whatever goes wrong in them ends the program with one line that names the option, the function and the record.
"""

import ast
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
import time
import traceback

from common.options import fail
from common.records import is_number, is_text

def load_function(name, option):
    """Load a function: MODULE:FUNCTION or FILE.py:FUNCTION, with arguments in brackets if it takes some.

        data.toy.world:gold          my_rewards.py:exact          data.toy.world:abstaining(price=-0.5)

    Whatever goes wrong ends the program with one line that names the option. The file runs: it is the user's own code.
    """
    wanted = 'wanted MODULE:FUNCTION or FILE.py:FUNCTION, as in data.toy.world:gold'
    path, _, call = name.partition(':')
    try:
        function, given = parse_call(call)
    except (SyntaxError, ValueError, AttributeError):
        fail(f"--{option}={name}: {call!r} names no function; {wanted}, or FUNCTION(name=3, other='text')")
    try:
        module = run(path) if path.endswith('.py') else importlib.import_module(path)
        function = getattr(module, function)
    except (Exception, SystemExit) as e: # a file of the user's may raise anything
        fail(f"--{option}={name}: cannot be imported ({type(e).__name__}: {e}); {wanted}")
    if not callable(function):
        fail(f"--{option}={name}: is no function; {wanted}")
    try:
        inspect.signature(function).bind(None, None, **given)
    except (TypeError, ValueError) as e: # the latter of some that are built in
        fail(f"--{option}={name}: {e}; wanted a function of two arguments, see docs/rewards.md")
    return functools.partial(function, **given) if given else function

def parse_call(text):
    """Parse 'name' or 'name(key=literal, …)' to the name and {key: value}."""
    call = ast.parse(text, mode='eval').body
    if not isinstance(call, ast.Call):
        return call.id, {}
    if call.args:
        raise ValueError('arguments are given by name')
    return call.func.id, {k.arg: ast.literal_eval(k.value) for k in call.keywords}

def module_of(name):
    """Return the name in sys.modules of the module of MODULE:FUNCTION or FILE.py:FUNCTION."""
    path = name.partition(':')[0]
    return 'the file ' + os.path.abspath(path) if path.endswith('.py') else path # it hides no module, as torch.py would

def run(path):
    """Run a file of the user's as a module of its own; it may import its neighbours."""
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(module_of(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def guarded(function, option, name, path, wanted='', fits=lambda value: True):
    """Return function(record, …); where it raises, the program ends with one line that names the record.

    So it does where what it returns does not fit; wanted: what does. The function gets copies: what it changes in them
    reaches nobody.
    """
    def call(record, *args):
        called = f"called with {repr(args)[1:-2][-80:]} and the record {path}: {str(record)[:200]}"
        try:
            value = function(*copy.deepcopy((record, *args)))
        except (Exception, SystemExit) as e: # of a program that exits nothing would be said
            last = traceback.extract_tb(e.__traceback__)[-1]
            fail(f"--{option}={name}: {type(e).__name__}: {e} ({last.filename}:{last.lineno}), {called}")
        return value if fits(value) else fail(f"--{option}={name}: wanted {wanted}, got {value!r}, {called}")
    return call

def load_reward_function(name, option, records, path):
    """Load a reward function of (record, response) that returns a number; '' is None.

    It is tried on the records with an empty response, for five seconds at most. Where it raises, or returns what is no
    number of float32, then or later, the program ends with one line; path: the records' file.
    """
    if not name:
        return None
    function = guarded(load_function(name, option), option, name, path)

    def reward(record, response):
        value = function(record, response)
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except Exception: # of whatever object this is
            number = math.nan
        if not is_number(number):
            fail(f"--{option}={name}: wanted a finite number, got {value!r} for the response {response[:80]!r} to the "
                 f"record {path}: {str(record)[:200]}")
        return number

    end = time.monotonic() + 5
    for record in records:
        reward(record, '')
        if time.monotonic() > end:
            break
    return reward

def load_user(cfg):
    """Load the function that plays the user; None without one. What is no text ends the program with one line."""
    return guarded(load_function(cfg.user, 'user'), 'user', cfg.user, cfg.prompts, 'a text or None',
                   lambda text: text is None or is_text(text)) if cfg.user else None

def load_functions(cfg, records):
    """Load what --reward, --gold and --user name, None where they name nothing; records: of cfg.prompts."""
    reward, gold = (load_reward_function(getattr(cfg, name), name, records, cfg.prompts) for name in ('reward', 'gold'))
    return reward, gold, load_user(cfg)
