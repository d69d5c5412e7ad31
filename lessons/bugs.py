"""Find planted bugs: a stage of the toy world, healthy and sick, side by side.

    python lessons/bugs.py                          # lists the bugs
    python lessons/bugs.py --bug=runaway            # about a minute
    python lessons/bugs.py --table=True             # what gives each bug away, as in lessons/README.md; much longer

Each file in lessons/bugs/ is a real function of the project with one or two lines changed. It trains without an error.
Its docstring says what somebody saw. Read the two logs first and then the file: which line is wrong, what should stand
there, and which number told you? The answers are in lessons/solutions/bugs.md.

The stages start from what `python demo.py` made in out/toy. They only read it, and leave nothing behind.
"""
import importlib
import io
import os
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common import training
from common.checkpoints import DATA, MODELS, read_log
from common.options import fail, launch, parse_config, require, unread
from common.records import files_of
from common.run import progress
from demo import DEFAULT, command_of
from lessons.course import HERE, load

STAGES = dict( # files in config/toy: the script, and the steps from line to line of the log
    sft=('sft', 5), reward=('reward', 10), ppo=('ppo', 1), rloo=('reinforce', 1), grpo=('reinforce', 1), dpo=('dpo', 5),
    ipo=('dpo', 5))
BUGS = sorted(path.stem for path in (HERE / 'bugs').glob('*.py'))
SILENT = ('step', 'time', 'lr', 'updates', 'kl_coef', 'score') # keys that tell nothing here
SEEDS = 1, 2, 3 # of the healthy runs in the table
OTHERS = 4, 5 # of more healthy runs, which are judged like bugs

@dataclass
class Config:
    bug: str = '' # one of lessons/bugs/; empty: list them
    iterations: int = 20 # lines of the log: one iteration each, in sft and dpo five steps, in reward ten
    out_toy: str = DEFAULT # where demo.py made the models
    seed: int = 1 # of the stage
    table: bool = False # measure what gives the bug away, or every bug

    def __post_init__(self):
        require(self, bug=(self.bug in ('', *BUGS), f"one of {', '.join(BUGS)}"), seed=(self.seed >= 0, 'at least 0'),
                iterations=(self.iterations >= 5, 'at least 5'))
        unread(self, self.bug or self.table, 'bug or table', 'iterations', 'out_toy')
        unread(self, self.bug and not self.table, 'bug without table', 'seed')

def run_stage(cfg, stage, seed, options, patches=(), name='healthy'):
    """Run a stage; return its log and {key: what the health monitor said}.

    options: further ones of the stage. patches: (module, function) pairs; each function takes the place of the module's
    one of this name. name: of the progress bar.
    """
    script, every = STAGES[stage]
    module = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, redirect_stdout(io.StringIO()) as said:
        options = dict(max_steps=every * cfg.iterations, log_every=every, save_every=0, device='cpu', dtype='float32',
                       out_dir=f'{folder}/{name}') | options
        toy = SimpleNamespace(out_dir=cfg.out_toy, seed=seed)
        chosen = parse_config(module.Config, command_of((stage, script, f'config/toy/{stage}.py', options), toy)[2:])
        for path in (path for key in MODELS + DATA for path in files_of(getattr(chosen, key, '')) if path):
            if not os.path.exists(path):
                fail(f"--out_toy={cfg.out_toy}: {path} is missing; wanted what `python demo.py` makes, run it first")
        stack.enter_context(mock.patch.object(training, 'progress', lambda steps, **bar: progress(
            steps, **bar | dict(desc=name)))) # in place of the temporary folder's name
        for place, function in patches:
            stack.enter_context(mock.patch.object(place, function.__name__, function))
        module.main(chosen)
        alarms = [line.removeprefix('health: ') for line in said.getvalue().splitlines()
                  if line.startswith('health: step')] # "step 7: kl 24, above …"
        return read_log(f'{chosen.out_dir}/log.jsonl'), {line.split(': ')[1].split()[0]: line for line in alarms}

def columns(lines):
    """Return {key: its values} of a log, less the keys that tell nothing."""
    keys = dict.fromkeys(key for line in lines for key in line if key not in SILENT)
    return {key: [line[key] for line in lines if key in line] for key in keys}

def outside(sick, healthy):
    """Return {key: how far it is outside of healthy runs}, the furthest first.

    Two places count: the first value, and the median of the last five. The range is that of all values of the healthy
    runs there. Fifteen of them have to be left by more than the range is wide. Three tell little of a range, so it is
    ten times that; and never less than 0.001. That is a distance of 1. sick: a log; healthy: several.
    """
    found = {}
    for place in (lambda v: v[:1]), (lambda v: v[-5:] if len(v) > 5 else v[-1:]):
        for key, values in columns(sick).items():
            known = [x for log in healthy for x in place(columns(log).get(key, []))]
            if known:
                low, high, x = min(known), max(known), median(place(values))
                limit = (10 if len(known) == len(healthy) else 1) * max(high - low, 1e-3)
                found[key] = max(found.get(key, 0), (low - x) / limit, (x - high) / limit)
    return {key: far for key, far in sorted(found.items(), key=lambda item: -item[1]) if far > 1}

def places(values):
    """Return four of the values and their mean jump, as text; of fewer each once, and no jump."""
    last = len(values) - 1
    at = [round(i * last / 3) for i in range(4)]
    cells = [values[k] if i == 3 or k not in at[:i] + [last] else '' for i, k in enumerate(at)] if values else ['–'] * 4
    jump = f'{fmean(abs(b - a) for a, b in zip(values, values[1:])):.2g}' if last > 2 else ''
    return ''.join(f"{x if isinstance(x, str) else f'{x:.3g}':>10}" for x in cells) + f'{jump:>9}'

def show(name, healthy, sick):
    """Print two runs side by side, both as run_stage returns them."""
    (log, alarms), (sick_log, sick_alarms) = healthy, sick
    theirs = columns(sick_log)
    print("Four lines of the log. jump: how far a number moves from line to line, on average. Few values: each once.\n")
    print(f"{'':25}{'healthy':50}{name}\n{'':20}" + ' '.join(['     begin       1/3       2/3       end     jump'] * 2))
    for key, values in columns(log).items():
        print(f"{key:20}{places(values)} {places(theirs.get(key, []))}".rstrip())
    for who, said in (('healthy', alarms), (name, sick_alarms)):
        print(f"\nhealth, {who}:", *(said.values() or ['nothing']), sep='\n    ')

def measure(cfg, names):
    """Print a row for each bug: what gives it away; and below how many bugs and healthy runs are given away."""
    healthy, given_away, judged, wrong = {}, 0, 0, []
    print("| bug | stage | the monitor's alarms | other numbers, the furthest first |\n|--|--|--|--|")
    for name in names:
        bug = load(f'bugs/{name}')
        options = getattr(bug, 'OPTIONS', {})
        kind = bug.STAGE, *options.items()
        if kind not in healthy:
            runs = [run_stage(cfg, bug.STAGE, seed, options) for seed in SEEDS]
            healthy[kind] = [log for log, _ in runs]
            for seed, (_, alarms) in zip(SEEDS, runs):
                for line in alarms.values():
                    print(f"healthy {bug.STAGE}, seed {seed}: {line}", file=sys.stderr)
            for seed in OTHERS:
                log, alarms = run_stage(cfg, bug.STAGE, seed, options)
                judged += 1
                if keys := {**alarms, **outside(log, healthy[kind])}:
                    wrong.append(f"healthy {bug.STAGE}, seed {seed}: {', '.join(keys)}")
        log, alarms = run_stage(cfg, bug.STAGE, SEEDS[0], options, bug.PATCHES, name)
        numbers = [key for key in outside(log, healthy[kind]) if key not in alarms]
        given_away += bool(alarms or numbers)
        code = lambda keys: ', '.join(f"`{key}`" for key in keys) or '–'
        print(f"| {name} | {bug.STAGE} | {code(alarms)} | {code(numbers[:3])} |", flush=True)
    print(f"\n{given_away} of {len(names)} bugs are given away, and {len(wrong)} of {judged} more healthy runs")
    for line in wrong:
        print(line)

def main(cfg):
    if not os.path.exists('config/toy/ppo.py'):
        fail(f"{os.getcwd()}: not the repository; wanted: cd {HERE.parent}")
    if cfg.table:
        measure(cfg, [cfg.bug] if cfg.bug else BUGS)
    elif cfg.bug:
        bug = load(f'bugs/{cfg.bug}')
        options = getattr(bug, 'OPTIONS', {})
        print(f"Trains {bug.STAGE} twice, healthy and with the bug. It takes about a minute.", flush=True)
        runs = [run_stage(cfg, bug.STAGE, cfg.seed, options, *sick) for sick in ((), (bug.PATCHES, cfg.bug))]
        print(f"\n{cfg.bug}, stage {bug.STAGE}: {bug.__doc__}\n")
        show(cfg.bug, *runs)
        print(f"\nWhich line of lessons/bugs/{cfg.bug}.py is wrong? The answer: lessons/solutions/bugs.md")
    else:
        for name in BUGS:
            bug = load(f'bugs/{name}')
            print(f"{name:18} {bug.STAGE:7} {bug.__doc__}")
        print("\npython lessons/bugs.py --bug=NAME")

if __name__ == '__main__':
    launch(main, Config)
