"""The whole pipeline on the toy world, from text to an aligned model, in minutes on two CPU cores:

    pretrain -> SFT -> collect preferences -> reward model -> PPO, DPO and what else --methods asks for -> evaluate

    python demo.py
    python demo.py --methods=all --seed=2 --out_dir=out/toy2
    python demo.py --world=sums
    python demo.py --world=reviews --source=pros_cons.zip

It prints and runs the commands that one would type, says what each is for and what it changed, and ends with answers on
which the models differ. What the stages themselves print is in the folder printed of out_dir. A second run reuses what
is finished, and resumes what is not.
Ctrl-C, SIGTERM and SIGHUP reach the stages: they save and end. If demo.py itself is killed, Linux ends them likewise.

The methods: ppo, dpo, reinforce, rloo, grpo, rrhf, ipo, hinge, simpo, orpo, kto, rejection, distill.

With --world=sums the reward is a checker: a model that adds and subtracts is pretrained, fine-tuned and trained by
grpo, with and without a scratch line for what is carried (data/sums/world.py). The methods are grpo, rloo and ppo.

With --world=reviews words and labels are people's: remarks on products, written under Pros or Cons (lab/reviews.py).
The methods are ppo, dpo, rrhf and dpo_people, which is dpo on people's own pairs, without a reward model.

With --rounds=N the feedback is online (Bai et al. 2022, https://arxiv.org/abs/2204.05862, section 4.5): the last policy
answers the training prompts, its answers are ranked, and the method --rounds_of trains that policy further. That policy
is the reference: beta prices what one round changes.

    ppo          the reward model is trained anew from the SFT model, on all rankings so far
    dpo, rrhf    on the new rankings alone: those of before were of another policy's answers, and are learnt already

The simulated person ranks the first round. --rounds_by says who ranks the later ones: also the toy world's AI judge or,
for dpo and rrhf, the reward model of the first round (Guo et al. 2024, https://arxiv.org/abs/2402.04792).
"""

import ctypes
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from common import OMP
from common.options import fail, launch, leave_closed_terminal, require, unread
from common.records import LOCKS, lock, read_json, read_records, write_atomic
from lab import reviews, story, sums

for key in OMP: # each stage finds out for itself what else runs (common/__init__.py)
    del os.environ[key]
DEFAULT = 'out/toy' # where the files in config/toy point
WORLDS = dict(sums=sums, reviews=reviews) # beside the toy one: their stages, results and ending
RANKINGS = ['collect train', 'collect test']
METHODS = dict( # a config file and a folder each: the script, and the stages that it stands on
    ppo=('ppo.py', ['reward']), dpo=('dpo.py', RANKINGS), reinforce=('reinforce.py', ['reward']),
    rloo=('reinforce.py', ['reward']), grpo=('reinforce.py', ['reward']), rrhf=('rrhf.py', RANKINGS),
    ipo=('dpo.py', RANKINGS), hinge=('dpo.py', RANKINGS), simpo=('dpo.py', RANKINGS), orpo=('dpo.py', RANKINGS),
    kto=('kto.py', RANKINGS), rejection=('sft.py', ['collect best']), distill=('sft.py', ['rejection']))
ANNOTATORS = dict( # of later rounds: collect.py's config file, options that differ from it, and the stage it stands on
    person=('collect', {}, 'sft'), reward_model=('collect_best', dict(keep='all'), 'reward'),
    ai=('collect_ai', dict(answers='', compare='', max_new_tokens=32), 'judge'))
AT_ONCE = 2 # stages that run side by side, where they do not stand on one another
POSIX = os.name == 'posix' # else Windows, where none of this was ever run

@dataclass
class Config:
    world: str = 'toy' # toy, sums or reviews
    source: str = '' # in reviews: pros_cons.zip or its folder; empty = fetch it
    out_dir: str = '' # everything that is made, but for the data; empty = out/toy, out/sums or out/reviews
    methods: str = '' # what to train: some of the methods above, or all; empty = ppo,dpo, in sums grpo
    rounds: int = 1 # of collecting and training; those after the first start from the round before
    rounds_of: str = 'ppo' # ppo, dpo or rrhf, one of the methods
    rounds_by: str = 'person' # who ranks after the first round: person, ai or reward_model
    seed: int = 1 # of every stage
    fresh: bool = False # do everything again

    def __post_init__(self):
        known = WORLDS[self.world].METHODS if self.world in WORLDS else METHODS
        self.out_dir = self.out_dir or f'out/{self.world}'
        self.methods = self.methods or ('grpo' if self.world == 'sums' else 'ppo,dpo')
        if self.methods == 'all':
            self.methods = ','.join(known)
        names = self.methods.split(',')
        require(self, world=(self.world == 'toy' or self.world in WORLDS and self.rounds == 1,
                             'toy, or sums or reviews with rounds=1'))
        unread(self, self.world == 'reviews', 'world=reviews', 'source')
        require(self, seed=(0 <= self.seed < 2**32, 'at least 0 and below 2^32'),
                out_dir=(re.fullmatch('[^,=]+', self.out_dir), 'a folder with no comma and no = in its name'),
                rounds_of=(self.rounds_of in ('ppo', 'dpo', 'rrhf'), 'ppo, dpo or rrhf'),
                rounds=(self.rounds == 1 or self.rounds > 1 and self.rounds_of in names,
                        f"1, or more with {self.rounds_of} among the methods"),
                rounds_by=(self.rounds_by in ANNOTATORS, f"one of {', '.join(ANNOTATORS)}"),
                methods=(set(names) <= set(known) and len(set(names)) == len(names),
                         f"all, or names among {','.join(known)}, each once"))
        require(self, methods=('distill' not in names or 'rejection' in names, 'with rejection, who teaches distill'),
                rounds_by=(self.rounds_by != 'reward_model' or self.rounds_of != 'ppo',
                           'person or ai with rounds_of=ppo, whose reward model learns from these rankings'))
        unread(self, self.rounds > 1, '--rounds above 1', 'rounds_of', 'rounds_by')

def policies_of_rounds(cfg):
    """Return the folder and stage of each round's policy: ppo, ppo2, …; or dpo, dpo2_ai, …"""
    by = '' if cfg.rounds_by == 'person' else f'_{cfg.rounds_by}'
    return [cfg.rounds_of, *(f'{cfg.rounds_of}{n}{by}' for n in range(2, cfg.rounds + 1))]

def stages(cfg):
    """List every stage: name, script, config file or '', further options, product, stages that it stands on.

    The product is the file that is there once the stage is done.
    """
    out, methods, policies = cfg.out_dir, cfg.methods.split(','), policies_of_rounds(cfg)
    if cfg.world in WORLDS:
        return WORLDS[cfg.world].stages(out, methods, cfg.source)
    todo = [('data', 'data/toy/prepare.py', '', {}, 'data/toy/toy.tiktoken', [])]

    def add(name, script, config, product, *needs, **options):
        todo.append((name, script, f'config/toy/{config}.py', options, f'{out}/{product}', needs))

    add('pretrain', 'sft.py', 'pretrain', 'base/model.safetensors', 'data')
    add('sft', 'sft.py', 'sft', 'sft/model.safetensors', 'pretrain')
    for split in ('train', 'test'):
        file = f'rankings_{split}.jsonl'
        add(f'collect {split}', 'collect.py', 'collect', file, 'sft', prompts=f'data/toy/prompts_{split}.jsonl',
            out=f'{out}/{file}')
    add('reward', 'reward.py', 'reward', 'reward/model.safetensors', *RANKINGS)
    if 'rejection' in methods:
        add('collect best', 'collect.py', 'collect_best', 'best_of_n.jsonl', 'reward')
    for name in methods:
        script, needs = METHODS[name]
        add(name, script, name, f'{name}/model.safetensors', *needs)
    if cfg.rounds > 1 and cfg.rounds_by == 'ai':
        todo.append(('verdicts', 'data/toy/judge.py', '', {}, 'data/toy/verdicts_train.jsonl', ['data']))
        add('judge', 'sft.py', 'judge', 'judge/model.safetensors', 'pretrain', 'verdicts')
    config, options, annotator = ANNOTATORS[cfg.rounds_by]
    rankings = f'{out}/rankings_train.jsonl' # of all rounds so far
    for last, name in pairwise(policies):
        new, start, folder = f'rankings_{name}.jsonl', f'{out}/{last}', f'{out}/{name}'
        rankings += f',{out}/{new}'
        add(f'collect {name}', 'collect.py', config, new, last, annotator, prompts='data/toy/prompts_train.jsonl',
            out=f'{out}/{new}', policy=start, **options)
        if cfg.rounds_of == 'ppo':
            reward = name.replace('ppo', 'reward')
            add(reward, 'reward.py', 'reward', f'{reward}/model.safetensors', f'collect {name}', train_data=rankings,
                out_dir=f'{out}/{reward}')
            add(name, 'ppo.py', 'ppo', f'{name}/model.safetensors', reward, policy=start, out_dir=folder,
                reward_model=f'{out}/{reward}')
        else:
            add(name, METHODS[cfg.rounds_of][0], cfg.rounds_of, f'{name}/model.safetensors', f'collect {name}',
                init_from=start, train_data=f'{out}/{new}', out_dir=folder)
    trained = [*methods, *policies[1:]]
    models = ','.join(f'{name}={out}/{name}' for name in ['base', 'sft', *trained])
    add('evaluate', 'evaluate.py', 'evaluate', 'evaluate/results.json', 'reward', *trained, models=models)
    return todo

def command_of(stage, cfg):
    """Return the words of a stage's command, as one types them."""
    name, script, config, options, *_ = stage
    text = Path(config).read_text(encoding='utf-8') if config and cfg.out_dir != DEFAULT else ''
    paths = re.findall(rf'^(\w+) = ["\']([^"\']*{DEFAULT}[^"\']*)', text, re.MULTILINE)
    options = {key: path.replace(DEFAULT, cfg.out_dir) for key, path in paths} | options
    if not script.startswith('data/'):
        options.setdefault('seed', cfg.seed)
    return ['python', script, *([config] if config else []), *(f'--{k}={v}' for k, v in options.items())]

def read_record(cfg):
    """Return demo.json: {stage: [its command, when it began, when it ended or null]}."""
    path = f'{cfg.out_dir}/demo.json'
    record = read_json(path) if os.path.exists(path) else {}
    is_text, is_time = lambda x: isinstance(x, str), lambda x: type(x) in (int, float)
    return {name: entry for name, entry in record.items() # older ones had two parts
            if isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], list)
            and all(map(is_text, entry[0])) and is_time(entry[1]) and (entry[2] is None or is_time(entry[2]))}

def claim(cfg):
    """Take out_dir for this process and this seed alone; if `fresh` forget what was done in it."""
    if not os.path.exists('config/toy/pretrain.py'):
        fail(f"{os.getcwd()}: demo.py runs in the repository alone; wanted: cd {Path(__file__).resolve().parent}")
    os.makedirs(cfg.out_dir, exist_ok=True)
    lock(f'{cfg.out_dir}/.lock')
    if cfg.fresh: # every stage replaces its own; what else lies there is not the demo's
        Path(cfg.out_dir, 'demo.json').unlink(missing_ok=True)
    seed = f'--seed={cfg.seed}'
    for word in chain.from_iterable(words for words, *_ in read_record(cfg).values()):
        if word.startswith('--seed=') and word != seed:
            fail(f"{seed}: {cfg.out_dir} was made with {word}; wanted that, another --out_dir, or --fresh=True, which "
                 "replaces it")

def end_with(parent):
    """Let the kernel send this child SIGTERM when its parent is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM) # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1) # it was gone before

def typed(words):
    """Write a command's words as one types them."""
    return shlex.join(words) if POSIX else subprocess.list2cmdline(words)

def say(text, command=''):
    """Print a text, and a command below it. In a terminal the stages' bars make room, and are drawn again."""
    if POSIX and sys.stdout.isatty():
        text = '\r\x1b[J' + text
        command = command if 'NO_COLOR' in os.environ or not command else f'\x1b[2m{command}\x1b[0m'
    print(f'{text}\n{command}' if command else text, flush=True)

def alone(todo):
    """Return the stages that run with nothing beside them, {stage: those that end before it}.

    As SFT: all others come before it or after it. The only method that learns from the reward model is one, too: those
    that learn from rankings run beside the reward model, and end before it. So PPO has both cores.
    """
    needs = {stage[0]: {*stage[5]} for stage in todo}
    online = [name for name in needs if name in METHODS and needs[name] & {'reward', 'collect best'}]
    for stage in needs: # in order: those that a stage stands on come before it
        needs[stage] |= set().union(*(needs[n] for n in needs[stage]))
    later = {name: {other for other in needs if name in needs[other]} for name in needs}
    return {name: needs.keys() - later[name] - {name} for name in needs
            if online == [name] or needs.keys() == needs[name] | later[name] | {name}}

def start(command, slot, purpose='', stdout=None, settings=None):
    """Say what a command is for, print it and start it.

    slot: the terminal's line for its progress bar; stdout: a file for what it prints, None: the terminal. Errors and
    the bar are for the terminal. It does not know the new process group, so one Ctrl-C is one signal: that which
    `run_stages` passes on. The lock is inherited: a stage that outlives demo.py, as on macOS, keeps a second demo.py
    away. settings: of its environment; OMP_NUM_THREADS=1 unless the user's own say otherwise.
    """
    settings = dict(OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1')) | (settings or {})
    setting, more = ' '.join(f"set {key}={value}&" for key, value in settings.items()), {}
    if POSIX:
        setting = ' '.join(f"{key}={value}" for key, value in settings.items())
        more = dict(process_group=0, pass_fds=[file.fileno() for file in LOCKS.values()],
                    preexec_fn=partial(end_with, os.getpid()) if sys.platform == 'linux' else None)
    say(f'\n{purpose}'.rstrip(), f"$ {setting} {typed(command)}")
    return subprocess.Popen([sys.executable, *command[1:]], stdout=stdout,
                            env=os.environ | settings | dict(TQDM_POSITION=str(slot)), **more)

def tell(running, number):
    """Send the stages of {slot: (name, process)} a signal; Windows can only end them."""
    for _, process in running.values():
        process.send_signal(number) if POSIX else process.terminate()

def first_to_end(running):
    """Wait for the first of {slot: (name, process)} to end."""
    while True:
        for slot, (_, process) in running.items():
            if process.poll() is not None:
                return slot
        time.sleep(0.02)

def run_stages(todo, cfg):
    """Run stages, two at a time, and return {stage: its seconds}. What an earlier run did is reused.

    todo: a list as `stages` returns it. Where a stage fails, or after a signal, the program ends with that exit code.
    """
    waiting, running, done, record = list(todo), {}, set(), read_record(cfg) # running: {slot: (name, process)}
    # a stage that stands alone takes a second core. The order is fixed beforehand, not by what ends first: how many
    # threads there are changes how sums round
    two = dict(OMP_NUM_THREADS='2') if (os.cpu_count() or 1) > 1 and 'OMP_NUM_THREADS' not in os.environ else {}
    standing_alone = alone(todo)
    printed = {name: Path(cfg.out_dir, 'printed', re.sub(r'[^\w.-]', '_', name) + '.txt') for name, *_ in todo}
    code = 0
    sys.stdout.reconfigure(errors='replace') # a character that the terminal does not know is no reason to stop

    def put(name, *entry):
        record[name] = entry
        write_atomic(f'{cfg.out_dir}/demo.json', json.dumps(record, indent=1))

    def on_signal(number, frame):
        nonlocal code
        leave_closed_terminal()
        if POSIX and (not code or number == signal.SIGINT): # a second Ctrl-C ends them; Windows told them itself
            tell(running, number)
        code = code or 128 + number

    def on_stop(number, frame): # Ctrl-Z
        tell(running, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP) # goes on at `fg`
        tell(running, signal.SIGCONT)

    before = {} # {signal: its handler}
    for name, handler in dict(SIGINT=on_signal, SIGTERM=on_signal, SIGHUP=on_signal, SIGTSTP=on_stop).items():
        number = getattr(signal, name, None) # Windows has the first two
        if number and signal.getsignal(number) is not signal.SIG_IGN: # as nohup sets it
            before[number] = signal.signal(number, handler)

    while running or waiting and not code:
        for stage in list(waiting):
            name, script, _, _, product, needs = stage
            if code or len(running) == AT_ONCE or not done.issuperset(standing_alone.get(name, needs)):
                continue
            waiting.remove(stage)
            command = command_of(stage, cfg)
            last, began, ended = record.get(name, (None, 0, None))
            same = last == command and all(record[n][2] <= began for n in needs) # it was made from what is there now
            if same and ended and os.path.exists(product):
                say(f"[{name}] done before, in {ended - began:.0f} s")
                done.add(name)
                continue
            state = product + '.partial' if script == 'collect.py' else f'{os.path.dirname(product)}/state.pt'
            stopped = same and not ended and os.path.exists(state) and os.path.getmtime(state) >= began
            put(name, command, time.time(), None)
            if not script.startswith('data/'):
                if stopped: # and a later start sees again that it is not of an older run
                    os.utime(state)
                command = [*command, '--resume=True' if stopped else '--overwrite=True']
            slot = min(set(range(AT_ONCE)) - running.keys())
            printed[name].parent.mkdir(exist_ok=True)
            with open(printed[name], 'a' if stopped else 'w') as file:
                running[slot] = name, start(command, slot, story.before(name, cfg.world), file,
                                            two if name in standing_alone else {})
            if code: # a signal came meanwhile
                tell({slot: running[slot]}, signal.SIGTERM)
        if running:
            name, process = running.pop(first_to_end(running))
            sick = story.alarms(printed[name])
            if process.returncode == 0:
                put(name, *record[name][:2], time.time())
                done.add(name)
                stage, = (stage for stage in todo if stage[0] == name)
                say('\n'.join([story.after(stage, cfg.world, record[name][2] - record[name][1]), *sick]))
                continue
            failed = process.returncode if process.returncode > 0 else 128 - process.returncode # or a signal ended it
            then = "mend what is wrong, then the" if failed == 2 else "the"
            print(f"{name} ended with exit code {failed}; {then} same command continues from here", file=sys.stderr)
            if failed < 128: # else a signal ended it
                say('\n'.join([*sick, f"what {name} printed: {printed[name]}"]))
            if not code:
                tell(running, signal.SIGINT) # the other one saves and ends
            code = code or failed
    for number, handler in before.items():
        signal.signal(number, handler)
    if code:
        raise SystemExit(code)
    return {name: round(record[name][2] - record[name][1], 2) for name, *_ in todo}

def drop_foreign(path, names):
    """Remove results without these models: evaluate.py was run into this folder by hand."""
    if os.path.exists(path) and not set(names) <= read_json(path).get('models', {}).keys():
        os.remove(path)

def busy(spans):
    """Return the seconds in which at least one of (begin, end) was at work."""
    total, last = 0.0, -math.inf
    for begin, end in sorted(spans):
        total, last = total + max(0.0, end - max(begin, last)), max(end, last)
    return total

def run_world(cfg):
    """Run everything in a world but the toy one; write and print the results."""
    world, methods, path = WORLDS[cfg.world], cfg.methods.split(','), f'{cfg.out_dir}/results.json'
    todo = stages(cfg)
    for *_, product, _ in todo:
        if product.endswith('results.json'):
            drop_foreign(product, methods)
    stages_seconds, record = run_stages(todo, cfg), read_record(cfg)
    seconds = round(busy(record[name][1:] for name, *_ in todo), 2) # of earlier calls, too, but not between them
    results = world.results(cfg.out_dir, methods) | dict(seconds=seconds, stages=stages_seconds, seed=cfg.seed)
    write_atomic(path, json.dumps(results, indent=1))
    print(f"\n{seconds:.0f} s in all, {AT_ONCE} stages at a time; results: {path}\n")
    print(world.ending(cfg.out_dir, methods, results, typed))

def main(cfg):
    began, methods, policies = time.time(), cfg.methods.split(','), policies_of_rounds(cfg)
    claim(cfg)
    if cfg.world in WORLDS:
        return run_world(cfg)
    path = f'{cfg.out_dir}/evaluate/results.json'
    drop_foreign(path, [*methods, *policies[1:]])
    seconds = run_stages(stages(cfg), cfg)
    results = read_json(path) | dict(seconds=seconds, seed=cfg.seed)
    if cfg.rounds > 1:
        results['rounds'] = [results['models'][policy]['gold'] for policy in policies]
        print(f"\ngold score of {cfg.rounds_of}, sampled, by round: "
              + ', '.join(f'{gold:.3f}' for gold in results['rounds']))
    write_atomic(path, json.dumps(results, indent=1))
    print(f"\n{time.time() - began:.0f} s in all, {AT_ONCE} stages at a time; results: {path}\n")
    samples = read_records(f'{cfg.out_dir}/evaluate/samples.jsonl', 'prompts')
    print(story.ending(cfg.out_dir, methods, results, samples, typed))

if __name__ == '__main__':
    launch(main, Config)
