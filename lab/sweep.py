"""Sweep options of a stage on the toy world, over a grid or at random; measure on the validation prompts.

    python -m lab.sweep --stage=dpo --grid="lr=1e-4,3e-4,1e-3 beta=0.05,0.1,0.2"
    python -m lab.sweep --stage=rloo --random="lr=1e-4:3e-3:log kl_coef=0.02:0.5:log" --trials=12
    python -m lab.sweep --stage=dpo,ipo,hinge --random="lr=1e-4:3e-3:log beta=0.05:5:log" --trials=12
    python -m lab.sweep --stage=kto --grid="lr=1e-4,3e-4,1e-3 beta=0.1,0.3,1" --seeds=4,5,6 --finalists=3

A stage is a config file of config/toy. A setting changes some of its options, and is trained once for each seed, on the
base model, SFT model and reward model that demo.py makes with that seed. --random draws from a range low:high, or
low:high:log evenly on a logarithmic scale, or among listed values; several stages get the same draws. The score is the
mean over the seeds. Nothing is measured on the test prompts. A setting whose loss is not finite in one seed comes last.
--finalists=3 spends less: all settings are trained with the first seed, and the best three with the others too (one
step of successive halving, Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943). They come first. Their mean
holds the first seed, which chose them, so it is a little too high.

It prints each command, runs two at a time and reuses finished ones: after Ctrl-C the same command goes on, and a larger
grid or more --trials keep the old settings. It prints a table in Markdown and the best setting's command, and writes
STAGE.png and results.json, in which stages of earlier sweeps stay.
"""

import hashlib
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import product
from statistics import fmean

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import fail, launch, parse_config, require, unread
from common.records import is_number, read_json, write_atomic
from lab.figures import COLOURS, panels
from lab.seeds import Seeds, numbers
from lab.tables import show, table

STAGES = demo.METHODS | dict( # the script, and the stages that it stands on
    sft=('sft.py', ['pretrain']), reward=('reward.py', ['collect train']),
    **dict.fromkeys(('cispo', 'dapo', 'drgrpo', 'gspo'), ('reinforce.py', ['reward'])))
OWN = ('seed', 'out_dir', 'resume', 'overwrite') # of each run; nobody sweeps them
VAL = 'data/toy/prompts_val.jsonl'

@dataclass
class Config(Seeds):
    out_dir: str = 'out/sweep' # seed N in a folder N; several sweeps may share it
    stage: str = 'dpo' # one of config/toy, or several
    grid: str = '' # "option=value,value option=value,…": all combinations
    random: str = '' # or "option=low:high:log option=low:high option=value,value": so many draws as --trials says
    trials: int = 12 # settings of each stage, with random
    finalists: int = 0 # only the best so many of the first seed are trained with the others too; 0: all
    seed: int = 1 # of the draws
    score: str = '' # a number of results.json, higher is better; empty: models.gold, of reward reward_model.accuracy

    def __post_init__(self):
        super().__post_init__()
        names = self.stage.split(',')
        require(self, stage=(set(names) <= {*STAGES} and len(set(names)) == len(names),
                             f"names among {','.join(STAGES)}, each once"),
                grid=(bool(self.grid) != bool(self.random), 'given, or random, and not both'),
                trials=(self.trials >= 1, 'at least 1'), finalists=(
                    self.finalists == 0 or self.finalists > 0 and len(numbers(self.seeds)) > 1,
                    '0, or above 0 with several seeds'),
                score=(re.fullmatch(r'(\w+(\.\w+)+)?', self.score), 'keys of results.json, as in greedy.gold'))
        unread(self, self.random, 'random', 'trials', 'seed')

# ---- settings ---------------------------------------------------------------------------------------------------

def read_space(text, name):
    """Parse 'lr=1e-4,3e-4 beta=1' to {'lr': ['1e-4', '3e-4'], 'beta': ['1']}."""
    space = {}
    for part in text.split():
        key, _, values = part.partition('=')
        values = values.split(',')
        if not key.isidentifier() or key in space or not all(values) or len(set(values)) < len(values):
            fail(f"--{name}={text}: wanted option=value,value,… with a space between options, all different, got "
                 f"{part!r}")
        space[key] = values
    return space

def draw(values, kind, rng, name):
    """Draw one of several values, or a number from a range.

    The range is low:high or low:high:log. kind: the option's type.
    """
    if len(values) > 1 or ':' not in values[0] or kind is str:
        return rng.choice(values)
    try:
        low, high, *log = values[0].split(':')
        low, high = kind(low), kind(high)
        if not (low < high < math.inf and log in ([], ['log']) and (low > 0 or not log)):
            raise ValueError
    except ValueError:
        what = 'whole numbers' if kind is int else 'numbers'
        fail(f"--random: {name}={values[0]}: wanted low:high or low:high:log, {what}, low below high, above 0 with log")
    if kind is int: # each whole number has its share
        low, high = low - 0.5, high + 0.5
    x = math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
    return str(round(x)) if kind is int else f'{x:.3g}'

def settings_of(cfg, types):
    """Return the settings [{option: value as typed}]. types: {option: its type}, of the script."""
    name = 'grid' if cfg.grid else 'random'
    space, rng, found = read_space(cfg.grid or cfg.random, name), random.Random(cfg.seed), []
    for key in OWN:
        if key in space:
            fail(f"--{name}: each run has its own {key}; wanted another option")
    if cfg.grid:
        return [dict(zip(space, values)) for values in product(*space.values())]
    for _ in range(100 * cfg.trials):
        setting = {key: draw(values, types.get(key, float), rng, key) for key, values in space.items()}
        if setting not in found:
            found.append(setting)
        if len(found) == cfg.trials:
            return found
    fail(f"--trials={cfg.trials}: {cfg.random} gave only {len(found)} different settings; wanted fewer trials")

def read_settings(cfg):
    """Return {stage: [(setting, options that it is run with)]}; its script has checked each."""
    found = {}
    for stage in cfg.stage.split(','):
        script, config = import_module(STAGES[stage][0][:-3]), f'config/toy/{stage}.py'
        found[stage] = []
        for setting in settings_of(cfg, {f.name: f.type for f in fields(script.Config)}):
            parsed = parse_config(script.Config, [config, *(f'--{key}={value}' for key, value in setting.items())])
            unseen = dict(val_data='') if 'test' in getattr(parsed, 'val_data', '') else {}
            found[stage].append((setting, setting | unseen))
    return found

def name_of(stage, setting):
    """Name a trial's folder: 'dpo_lr1e-4_beta0.1'; a digest ends a long name, and one that could be another's."""
    name = re.sub('[^a-zA-Z0-9_.+-]', '_', '_'.join([stage, *(key + value for key, value in setting.items())]))
    if len(name) <= 100 and all(re.fullmatch('[a-zA-Z0-9.+-]+', value) for value in setting.values()):
        return name
    return f'{name[:100]}_{hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:12]}'

def typed(stage, setting):
    """Write the command that trains this setting, as one types it."""
    flags = [f'--{key}={value}' for key, value in setting.items()]
    return demo.typed(['python', STAGES[stage][0], f'config/toy/{stage}.py', *flags])

# ---- running ----------------------------------------------------------------------------------------------------

def needed(todo, names):
    """Return the named stages and all that they stand on, in order."""
    wanted = {*names}
    for name, *_, needs in reversed(todo): # a stage stands on earlier ones
        wanted |= {*needs} if name in wanted else set()
    return [stage for stage in todo if stage[0] in wanted]

def stages(at, stage, settings):
    """Return the stages of one seed: what demo.py makes, then each setting and its evaluation.

    settings: of `read_settings`. An evaluation's name is that of its setting with ' val'.
    """
    script, needs = STAGES[stage]
    out, todo = at.out_dir, needed(demo.stages(at), ['reward', *needs])
    options = dict(models=f'sft={out}/sft', prompts=VAL, reward_model=f'{out}/reward', best_of=0, text='', rankings='',
                   comparisons='', figures=False)
    if stage == 'reward':
        rankings = f'{out}/rankings_val.jsonl'
        todo.append(('collect val', 'collect.py', 'config/toy/collect.py', dict(prompts=VAL, out=rankings), rankings,
                     ['sft']))
    for setting, given in settings:
        name = name_of(stage, setting)
        folder = f'{out}/{name}'
        todo.append((name, script, f'config/toy/{stage}.py', given | dict(out_dir=folder),
                     f'{folder}/model.safetensors', needs))
        if stage == 'reward':
            mine = dict(reward_model=folder, rankings=rankings)
        else:
            mine = dict(models=f"{options['models']},trial={folder}")
        todo.append((f'{name} val', 'evaluate.py', 'config/toy/evaluate.py',
                     options | mine | dict(out_dir=f'{folder}/val'), f'{folder}/val/results.json',
                     ['reward', name, *['collect val'] * (stage == 'reward')]))
    return todo

def run(todo, at, settings, failed=()):
    """Run stages; return the names of those in `settings` that failed, as where a loss is not finite.

    failed: those of an earlier call; they and what stands on them are left out. demo.run_stages ends with the first
    that fails. Those that had begun by then are tried alone, to know which it was.
    """
    failed = {*failed}
    while True:
        left = [stage for stage in todo if not failed & {stage[0], *stage[5]}]
        try:
            demo.run_stages(left, at)
            return failed
        except SystemExit as ended:
            begun = [name for name, (_, _, end) in demo.read_record(at).items() if end is None]
            begun = [name for name, *_ in left if name in begun]
            if ended.code != 1 or not begun or not {*begun} <= {*settings}: # bad input, a signal, or what all stand on
                raise
        for name in begun:
            try:
                demo.run_stages(needed(todo, [name]), at)
            except SystemExit as ended:
                if ended.code != 1:
                    raise
                failed.add(name)

def read_score(path, score):
    """Return a number of results.json; score: its keys, models.gold is [models][trial][gold]."""
    first, *keys = score.split('.')
    value = read_json(path)
    for key in [first, *['trial'] * (first in ('models', 'greedy')), *keys]:
        value = value.get(key) if isinstance(value, dict) else None
    if not is_number(value):
        fail(f"--score={score}: {path} has no such number; wanted one as in models.gold, greedy.gold or "
             "models.answerable.right")
    return value

# ---- what came out ----------------------------------------------------------------------------------------------

def mean_score(trial):
    """Return a trial's mean score, -infinity where a seed failed."""
    return -math.inf if None in trial['scores'] else fmean(trial['scores'])

def rank(trials):
    """Return trials, best first: those of more seeds before those of fewer, and last what failed in a seed."""
    key = lambda trial: (None not in trial['scores'], len(trial['scores']), mean_score(trial))
    return sorted(trials, key=key, reverse=True)

def draw_figure(trials, score, path):
    """Draw the score against each option that differs between trials.

    Small dots are seeds. The axis is logarithmic where its numbers span more than a factor of ten.
    """
    trials = [trial for trial in trials if None not in trial['scores']]
    values = {key: [trial['options'][key] for trial in trials] for key in (trials[0]['options'] if trials else ())}
    values = {key: texts for key, texts in values.items() if len(set(texts)) > 1}
    if not values:
        return
    with panels(path, len(values), 3.6, 3) as axes:
        for ax, (key, texts) in zip(axes, values.items()):
            try:
                x = list(map(float, texts))
                if max(x) > 10 * min(x) > 0:
                    ax.set_xscale('log')
            except ValueError: # words
                words = sorted({*texts})
                x = [words.index(text) for text in texts]
                ax.set_xticks(range(len(words)), words)
            for x0, trial in zip(x, trials):
                ax.plot([x0] * len(trial['scores']), trial['scores'], '.', color=COLOURS[0], alpha=0.4, ms=5)
                ax.plot(x0, mean_score(trial), 'o', color=COLOURS[0], ms=6)
            ax.set(xlabel=key, ylabel=score)

def main(cfg):
    settings = read_settings(cfg) # all are checked before anything runs
    path, found = f'{cfg.out_dir}/results.json', {}
    results = read_json(path) if os.path.exists(path) else {}
    for stage, of_stage in settings.items():
        score = cfg.score or ('reward_model.accuracy' if stage == 'reward' else 'models.gold')
        trials = [dict(options=setting, scores=[]) for setting, _ in of_stage]
        given, racing = {name_of(stage, setting): (setting, options) for setting, options in of_stage}, trials
        for at in cfg.each(methods='rejection,distill'): # which stand on others; no method runs unless it is needed
            names = [name_of(stage, trial['options']) for trial in racing]
            todo, failed = stages(at, stage, [given[name] for name in names]), set()
            mine = [*names, *(f'{name} val' for name in names)]
            if cfg.score and not trials[0]['scores']: # is it there? Known before all are trained
                first = names[:demo.AT_ONCE]
                failed = run(needed(todo, [f'{name} val' for name in first]), at, mine)
                for name in first:
                    if not failed & {name, f'{name} val'}:
                        read_score(f'{at.out_dir}/{name}/val/results.json', score)
            failed = run(todo, at, mine, failed)
            for name, trial in zip(names, racing):
                lost = failed & {name, f'{name} val'}
                trial['scores'].append(None if lost else read_score(f'{at.out_dir}/{name}/val/results.json', score))
            if cfg.finalists:
                racing = [trial for trial in rank(racing)[:cfg.finalists] if None not in trial['scores']]
        trials = rank(trials)
        found[stage] = dict(score=score, seeds=numbers(cfg.seeds), trials=trials)
        table([f'{stage}, {score}', *trials[0]['options']],
              [[show(trial['scores'], 3), *trial['options'].values()] for trial in trials])
        if None not in trials[0]['scores']:
            print(f"\nthe best of {len(trials)}: {typed(stage, trials[0]['options'])}")
        write_atomic(path, json.dumps(results | found, indent=1) + '\n')
        draw_figure(trials, score, f'{cfg.out_dir}/{stage}.png')
    if len(found) > 1:
        table(['best of each', 'score', 'command'],
              [[stage, show(of_stage['trials'][0]['scores'], 3), f"`{typed(stage, of_stage['trials'][0]['options'])}`"]
               for stage, of_stage in found.items()])

if __name__ == '__main__':
    launch(main, Config)
