"""Measure how time and memory of each stage grow, and draw the formulas' lines through the points.

    python -m lab.scaling
    python -m lab.scaling --stages=sft,ppo --sizes=0.6M,3M --lengths=64 --answers=2 --batches=2

Each stage takes a few steps on random ids, in float32 on one thread of a CPU. Model size, tokens in a row T, answers K
to a prompt and prompts in a batch B vary in turn. The first of --lengths, --answers and --batches, and --base, hold
elsewhere. Half of a row's T tokens are the answer's. Seconds are CPU seconds of an optimizer step; those of ppo and
rloo are of an iteration with all its epochs. Tokens are counted as in bench.py.

    step     = FLOP / (share best) + AdamW's bytes / copy + overhead * passes through a layer + sampling
    sampling = (FLOP / best + bytes / copy) / share_s + overhead * layers * A             A: new tokens of an answer

Shapes give FLOP, bytes and passes. best and copy are the rates of this machine's best product and of copying, measured
beside each point. Three numbers are fitted to all points at once: share, share_s and overhead, the seconds that a layer
takes however small it is. Memory is the peak of a process of its own, less what it held before it made the models; its
formula is that of lab/memory.py.

It writes every point to results.json in out_dir, and reuses what is there. It prints tables in Markdown and draws
scaling.png. lab/plan.py uses the same formulas for GPUs.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import bench
import ppo
import reinforce
from common.batches import Row
from common.options import fail, launch, note, require
from common.records import is_number, read_json, write_atomic
from common.rewards import Reward
from common.rollout import sample_rollouts
from common.run import Run, keep_freed_memory
from common.training import make_optimizer
from lab import memory
from lab.figures import COLOURS, panels
from lab.seeds import numbers
from lab.tables import table
from model import GPT, GPTConfig

import numpy as np
import torch

SIZES = { # parameters, embeddings too -> n_layer, n_head, n_embd, vocab_size; a context of 1024 tokens
    '0.6M': (4, 4, 96, 512), '3M': (6, 6, 192, 2048), '12M': (8, 8, 320, 8192), '45M': (10, 8, 512, 24576),
    '124M': (12, 12, 768, 50257)}
STAGES = 'sft', 'reward', 'dpo', 'ppo', 'rloo'
SAMPLED = 'ppo', 'rloo' # stages that sample their answers
LEAST = 4 # points: three numbers are fitted, so fewer fit by themselves
AXES = dict(size='parameters', T='tokens in a row, T', K='answers to a prompt, K', B='prompts in a batch, B')

@dataclass
class Config:
    out_dir: str = 'out/scaling' # results.json and scaling.png
    stages: str = ','.join(STAGES)
    sizes: str = ','.join(SIZES)
    base: str = '3M' # the size with which the others vary
    lengths: str = '64,128,256,512' # T, prompt and answer together
    answers: str = '2,4,8,16' # K; sft learns from one answer, and its batch does not depend on K
    batches: str = '2,4,8,16,32' # B
    epochs: int = 2 # of ppo
    steps: int = 2 # optimizer steps in a lap, but for ppo and rloo, whose lap is an iteration
    repeats: int = 3 # laps that count, after one that warms up
    minutes: float = 15.0 # CPU minutes of all points together; no point begins later

    def __post_init__(self):
        among = lambda text, known: {*(names := text.split(','))} <= {*known} and len({*names}) == len(names)
        rising = lambda text, least: [] != (found := numbers(text)) == sorted({*found}) and found[0] >= least
        require(self, out_dir=(self.out_dir != '', 'a folder'),
                stages=(among(self.stages, STAGES), f"some of {','.join(STAGES)}, each once"),
                sizes=(among(self.sizes, SIZES), f"some of {','.join(SIZES)}, each once"),
                base=(self.base in SIZES, f"one of {', '.join(SIZES)}"),
                lengths=(rising(self.lengths, 4) and all(T % 2 == 0 and T <= 1024 for T in numbers(self.lengths)),
                         'rising even numbers from 4 to 1024, separated by commas'),
                answers=(rising(self.answers, 2), 'rising numbers from 2, separated by commas'),
                batches=(rising(self.batches, 1), 'rising numbers above 0, separated by commas'),
                **{key: (getattr(self, key) >= 1, 'at least 1') for key in ('epochs', 'steps', 'repeats')},
                minutes=(self.minutes > 0, 'above 0'))

# ---- formulas ---------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Hold the shape of a step: B prompts of P tokens, K answers of A tokens to each."""
    c: GPTConfig
    B: int
    P: int
    A: int
    K: int = 1
    epochs: int = 1 # passes over sampled answers

    @property
    def tokens(self):
        return self.B * self.K * (self.P + self.A)

    @property
    def n(self):
        return self.B * self.K # answers

    def rows(self, unread):
        """Return rows and their length, prompts shared where that is less work.

        It chooses as GPT.hidden. unread: 1 where the last token of an answer is not given, as for log-probabilities.
        """
        work = lambda shape: GPT.work(SimpleNamespace(config=self.c), *shape)
        return min((self.n, self.P + self.A - unread), (self.B, self.P + self.K * (self.A - unread)), key=work)

def pass_flop(c, rows, T, places, predicted):
    """Return a forward pass's products and its attention, both in FLOP.

    A product of (m, k) and (k, n) takes 2 m k n. The last layer works on all rows * T tokens for queries, keys and
    values alone (3 C^2 of 12 C^2), and on `places` for the rest. predicted: places that meet the vocabulary.
    """
    C, L = c.n_embd, c.n_layer
    heads = (c.value_head + c.reward_head) * C
    weights = rows * T * (12 * L - 9) * C * C + places * (9 * C * C + heads) + predicted * c.vocab_size * C
    return 2 * weights, 4 * L * rows * T * T * C # two products of T * T * C each

def forward_flop(*shape):
    return sum(pass_flop(*shape))

def train_flop(*shape, checkpointing=False):
    """Return FLOP of a pass and its backward pass; checkpointing computes the blocks twice.

    Backwards, each product has two: the gradients of its input and of its weights. Attention has five instead of two,
    since it works the scores out again.
    """
    products, attention = pass_flop(*shape)
    again = sum(pass_flop(*shape[:4], 0)) if checkpointing else 0
    return 3 * products + attention * 7 // 2 + again

def passes(stage, b):
    """Return the passes that only score, and those that train: lists of arguments of pass_flop."""
    critic, reward = replace(b.c, value_head=True), replace(b.c, reward_head=True)
    pi = b.c, *b.rows(1), b.n * b.A, b.n * b.A
    V, r = (critic, *b.rows(1), b.n * b.A, 0), (reward, *b.rows(0), b.n, 0)
    return dict(sft=([], [pi]), reward=([], [r]), dpo=([pi], [pi]), ppo=([pi, V, r], b.epochs * [pi, V]),
                rloo=([pi, r], b.epochs * [pi]))[stage] # pi that scores is the reference

def flop(stage, b, checkpointing=False):
    """Return a step's FLOP without sampling; of ppo and rloo those of an iteration."""
    scored, trained = passes(stage, b)
    return (sum(forward_flop(*shape) for shape in scored)
            + sum(train_flop(*shape, checkpointing=checkpointing) for shape in trained))

def all_flop(stage, b, checkpointing=False):
    """Return a step's FLOP, with sampling."""
    return flop(stage, b, checkpointing) + (sampling_flop(b) if stage in SAMPLED else 0)

def layer_passes(stage, b, checkpointing=False):
    """Return a step's passes through layers, without sampling.

    A backward pass counts as two; checkpointing adds a forward pass.
    """
    scored, trained = passes(stage, b)
    return b.c.n_layer * (len(scored) + (3 + checkpointing) * len(trained))

def sampling_flop(b):
    """Return FLOP of sampling: a pass over the prompts, then one token at a time, A - 1 times."""
    c, n, steps = b.c, b.n, b.A - 1
    seen = sum(b.P + t for t in range(1, b.A)) # keys of a row over all steps
    weights = 12 * c.n_layer * c.n_embd ** 2 + c.vocab_size * c.n_embd
    return forward_flop(c, b.B, b.P, b.B, n) + 2 * steps * n * weights + 4 * c.n_layer * n * seen * c.n_embd

def sampling_bytes(b, dtype='float32'):
    """Return the bytes that sampling reads: weights and cache, once for each token of an answer."""
    size = 4 if dtype == 'float32' else 2
    return b.A * (size * memory.n_parameters(b.c) + memory.kv_cache(b.c, b.n, b.P + b.A // 2, dtype))

def optimizer_bytes(stage, b):
    """Return the bytes of AdamW's steps.

    Weight, gradient and both averages are read, and all but the gradient written: 7 * 4 bytes a parameter.
    """
    return 28 * sum(memory.n_parameters(shape[0]) for shape in passes(stage, b)[1])

@dataclass
class Rates:
    """Hold what a machine does; see this file's docstring."""
    best: float # FLOP a second
    copy: float # bytes a second, read and written
    share: float
    share_s: float
    overhead: float # seconds for a layer
    ahead: bool = False # a GPU computes while the next kernels are launched: the longer of the two counts, not the sum

    def seconds(self, work, passes):
        return max(work, self.overhead * passes) if self.ahead else work + self.overhead * passes

def sampling_seconds(b, rates, dtype='float32'):
    work = (sampling_flop(b) / rates.best + sampling_bytes(b, dtype) / rates.copy) / rates.share_s
    return rates.seconds(work, b.c.n_layer * b.A)

def update_seconds(stage, b, rates, parts=1, checkpointing=False):
    """Return the seconds of a step without sampling; parts: micro-batches, each with its own passes."""
    return (rates.seconds(flop(stage, b, checkpointing) / (rates.share * rates.best),
                          parts * layer_passes(stage, b, checkpointing)) + optimizer_bytes(stage, b) / rates.copy)

def held(stage, b):
    """Return the bytes of a stage by lab/memory.py, in float32."""
    c, reward = b.c, replace(b.c, reward_head=True)
    rows, T = b.rows(0 if stage == 'reward' else 1)
    mine = b.n // rows # answers in a row
    places, predicted = (mine, 0) if stage == 'reward' else (mine * b.A, mine * b.A)
    trained = dict(reward=[reward], ppo=[c, reward]).get(stage, [c])
    frozen = [c, reward] if stage in SAMPLED else []
    need = memory.needs(trained, frozen, rows, T, places, predicted, 'float32', sharing=mine > 1, several=False)
    if stage not in SAMPLED:
        return need['total']
    # answers are sampled in rows of their own
    return max(need['total'], memory.needs(trained, frozen, 0, b.P + b.A, 0, 0, 'float32', sampled=b.n)['total'])

# ---- measuring --------------------------------------------------------------------------------------------------

def config_of(size):
    n_layer, n_head, n_embd, vocab_size = SIZES[size]
    return GPTConfig(1024, vocab_size, n_layer, n_head, n_embd)

def batch_of(stage, size, T, K, B, epochs):
    return Batch(config_of(size), B, T // 2, T // 2, 1 if stage == 'sft' else K, epochs if stage == 'ppo' else 1)

def tokens_of(stage, b):
    """Return the tokens that bench.py counts: new ones where answers are sampled, else all."""
    return b.n * b.A if stage in SAMPLED else b.tokens

def random_rows(b, n):
    """Make n rows of random ids, all of the same shape."""
    text = lambda length: torch.randint(b.c.vocab_size, (length,)).tolist()
    return [Row(text(b.P), [text(b.A) for _ in range(b.K)], dict(ranks=list(range(b.K)))) for _ in range(n)]

def training_lap(stage, b, steps, run):
    """Return bench.py's lap of this many steps."""
    workload = 'rm' if stage == 'reward' else stage
    cfg = bench.Config(workload=workload, batch_size=b.B, steps=steps, device='cpu', dtype='float32')
    model = GPT(replace(b.c, reward_head=stage == 'reward'))
    return bench.WORKLOADS[workload](cfg, run, model, random_rows(b, b.B * steps)), None

def rollout_lap(stage, b, steps, run):
    """Return a lap of one iteration, and one that samples alone; bench.py has other lengths and another K."""
    script = dict(ppo=ppo, rloo=reinforce)[stage]
    options = script.Config(prompts='rows', n_answers=b.K, max_new_tokens=b.A, batch_size=b.n, epochs=b.epochs)
    prompts, records = [row.prompt for row in random_rows(b, b.B)], [{}] * b.B
    make = lambda **heads: GPT(replace(b.c, **heads))
    policy, reward, reference = make(), Reward([run.freeze(make(reward_head=True))]), run.freeze(make())
    adam = lambda model: make_optimizer(model, options, eps=1e-5)
    if stage == 'ppo':
        models = ppo.Models(policy, make(value_head=True), reward, reference)
        trained, optimizers = models, dict(policy=adam(policy), critic=adam(models.critic))
    else:
        models, trained, optimizers = (policy, reward, reference), policy, adam(policy)

    def lap():
        *answers, _ = script.roll_out(models, prompts, records, bench.UNENDING, options, 0.0, run)
        script.update(trained, optimizers, *answers, options, run, 0)
        return ()

    return lap, lambda: (sample_rollouts(policy, prompts, records, bench.UNENDING, options), ())[1]

def copy_rate():
    """Return the bytes that copying reads and writes in a CPU second."""
    x = torch.ones(2**24)
    y = x.clone()
    return max(2 * x.nbytes / bench.timed(lambda: (y.copy_(x), ())[1], 'cpu')[-1] for _ in range(5))

def measure(stage, b, steps, repeats):
    """Time laps in this process, on one thread; return a point of results.json."""
    torch.set_num_threads(1)
    keep_freed_memory() # as the scripts do
    torch.manual_seed(1)
    run, make = Run('cpu', 'float32'), rollout_lap if stage in SAMPLED else training_lap
    make(stage, Batch(GPTConfig(8, 16, 1, 1, 8), 1, 4, 4, b.K), 1, run)[0]() # torch loads some of its code late
    before = bench.peak_rss_mb()
    lap, sample = make(stage, b, steps, run)
    cpu_seconds = lambda work: bench.timed(work, 'cpu')[-1]
    seconds = [cpu_seconds(lap) / (1 if sample else steps) for _ in range(1 + repeats)][1:]
    peak = bench.peak_rss_mb()
    return dict(seconds=seconds, sampling=[cpu_seconds(sample) for _ in range(repeats)] if sample else [],
                peak_mb=peak and peak - before, copy=copy_rate(),
                best=1e9 * bench.best_product('cpu', 'float32', time.process_time))

def apart(*args):
    """Measure in a process of its own; its peak of memory is the point's."""
    how = 'fork' if sys.platform == 'linux' else 'spawn' # a fork need not import torch again
    quiet = signal.signal, (signal.SIGINT, signal.SIG_IGN) # Ctrl-C is this process's
    with multiprocessing.get_context(how).Pool(1, *quiet) as pool:
        return pool.apply(measure, args)

def points(cfg):
    """Return {name: (stage, size, T, K, B)} of all points, the largest models last."""
    lengths, answers, batches = map(numbers, (cfg.lengths, cfg.answers, cfg.batches))
    T, K, B = lengths[0], answers[0], batches[0]
    shapes = [*((cfg.base, t, K, B) for t in lengths), *((cfg.base, T, k, B) for k in answers),
              *((cfg.base, T, K, b) for b in batches), *((size, T, K, B) for size in cfg.sizes.split(','))]
    shapes.sort(key=lambda shape: list(SIZES).index(shape[0])) # stable
    found = {}
    for shape in dict.fromkeys(shapes):
        for stage in cfg.stages.split(','):
            if stage != 'sft' or shape[2] == K:
                found[name_of(stage, *shape)] = stage, *shape
    return found

def name_of(stage, size, T, K, B):
    return f'{stage} {size} T={T} K={K} B={B}'

def check_points(found, path):
    """End the program where points are not as `measure` returns them."""
    if not isinstance(found, dict):
        fail(f"{path}: wanted `points`, an object, got {found!r}; another --out_dir measures anew")
    above_0 = lambda x: is_number(x) and x > 0
    for name, p in found.items():
        laps = dict(seconds=True, sampling=name.split(' ')[0] in SAMPLED) # whether there are any
        good = isinstance(p, dict) and above_0(p.get('best')) and above_0(p.get('copy')) and all(
            isinstance(p.get(key), list) and all(map(above_0, p[key])) and (p[key] or not needed)
            for key, needed in laps.items()) and (p.get('peak_mb', '') is None or is_number(p.get('peak_mb')))
        if not good:
            fail(f"{path}: point {name}: wanted seconds, sampling, best and copy above 0, and peak_mb, got {p!r}; "
                 "another --out_dir measures anew")

def measure_all(cfg, path):
    """Measure what results.json lacks, as far as the minutes go; return the points {name: …} that there are."""
    how = dict(epochs=cfg.epochs, steps=cfg.steps, repeats=cfg.repeats, torch=torch.__version__)
    known = read_json(path) if os.path.exists(path) else dict(how=how, points={})
    if known.get('how') != how:
        fail(f"{path}: its points are of {known.get('how')}; wanted {how}, or another --out_dir")
    done = known.get('points')
    check_points(done, path)
    wanted, left = points(cfg), []
    for name, (stage, *shape) in wanted.items():
        if name in done:
            continue
        # all laps, the one that warms up too
        spent = sum((1 + cfg.repeats) * (median(p['seconds']) * (1 if p['sampling'] else cfg.steps)
                                         + median(p['sampling'] or [0])) for p in done.values())
        if spent > 60 * cfg.minutes:
            left.append(name)
            continue
        done[name] = apart(stage, batch_of(stage, *shape, cfg.epochs), cfg.steps, cfg.repeats)
        write_atomic(path, json.dumps(dict(how=how, points=done), indent=1) + '\n')
        print(f"{name}: {median(done[name]['seconds']):.3g} CPU seconds", flush=True)
    if left:
        note(f"--minutes={cfg.minutes:g}: {len(left)} points are not measured: {', '.join(left)}")
    return {name: done[name] for name in wanted if name in done}

# ---- points and lines -------------------------------------------------------------------------------------------

def fit(found, batches):
    """Fit Rates to points, least squares of relative errors; return them and the errors' root mean square.

    batches: {name of a point: (stage, Batch)}. Each point of ppo or rloo counts twice: its sampling, and the whole.
    """
    best, copy = (median(p[key] for p in found.values()) for key in ('best', 'copy'))
    rows = [] # factors of 1 / share, 1 / share_s and overhead; seconds; those of AdamW, which are not fitted
    for name, (stage, b) in batches.items():
        sampling = 0, 0
        if stage in SAMPLED:
            sampling = sampling_flop(b) / best + sampling_bytes(b) / copy, b.c.n_layer * b.A
            rows.append((0, *sampling, median(found[name]['sampling']), 0))
        rows.append((flop(stage, b) / best, sampling[0], layer_passes(stage, b) + sampling[1],
                     median(found[name]['seconds']), optimizer_bytes(stage, b) / copy))
    *X, y, known = np.array(rows).T
    X, y = np.stack(X, 1) / y[:, None], 1 - known / y # (N, 3), (N,): relative to what was measured
    x = np.linalg.lstsq(X, y, rcond=None)[0]
    if x[2] < 0: # too few points to tell
        x = np.array([*np.linalg.lstsq(X[:, :2], y, rcond=None)[0], 0.0])
    shares = [1 / each if each > 0 else 1.0 for each in x[:2].tolist()] # without ppo and rloo nothing tells share_s
    rates = Rates(best, copy, *shares, float(x[2]))
    x = np.array([1 / rates.share, 1 / rates.share_s, rates.overhead]) # the error is of these, whatever was replaced
    return rates, float(np.sqrt(np.mean((X @ x - y) ** 2)))

def predict(stage, b, rates):
    return update_seconds(stage, b, rates) + (sampling_seconds(b, rates) if stage in SAMPLED else 0)

def lines_of(cfg, found, rates):
    """Return {axis: {stage: [(x, measured seconds, formula, measured MiB, formula, tokens)]}}."""
    wanted, base = points(cfg), (cfg.base, *(numbers(text)[0] for text in (cfg.lengths, cfg.answers, cfg.batches)))
    lines = {}
    for i, axis in enumerate(AXES):
        for name, (stage, *shape) in wanted.items():
            others = [j for j in range(4) if j != i]
            if name in found and all(shape[j] == base[j] for j in others) and (axis, stage) != ('K', 'sft'):
                b, p = batch_of(stage, *shape, cfg.epochs), found[name]
                lines.setdefault(axis, {}).setdefault(stage, []).append(
                    (memory.n_parameters(b.c) if axis == 'size' else shape[i], shape[i], p['seconds'],
                     predict(stage, b, rates), p['peak_mb'], held(stage, b) / 2**20, tokens_of(stage, b)))
    for of_axis in lines.values():
        for of_stage in of_axis.values():
            of_stage.sort()
    return lines

def print_lines(lines, rates, error):
    """Print a table for each axis: tokens per second, seconds and MiB, measured and by the formulas.

    error: None where the points are too few to tell.
    """
    few = lambda x: f'{x:.0f}' if x >= 100 else f'{x:.3g}'
    for axis, stages in lines.items():
        names = list(dict.fromkeys(point[1] for of_stage in stages.values() for point in of_stage))
        rows = []
        for stage, of_stage in stages.items():
            cells = {name: (few(tokens / median(s)),
                            f'{few(median(s))} ({few(min(s))}–{few(max(s))}) / {few(formula)}',
                            f"{'–' if mb is None else mb} / {few(bytes_held)}")
                     for _, name, s, formula, mb, bytes_held, tokens in of_stage}
            for k, what in enumerate(('tokens/s', 's / formula', 'MiB / formula')):
                rows.append([f'{stage}, {what}', *(cells.get(name, '–' * 3)[k] for name in names)])
        table([AXES[axis], *map(str, names)], rows)
    print(f"\nbest product {rates.best / 1e9:.0f} GFLOP/s, copying {rates.copy / 1e9:.0f} GB/s")
    if error is None:
        print(f"too few points to fit share, share_s and overhead: wanted at least {LEAST}")
    else:
        print(f"fitted: share {rates.share:.2f}, share_s {rates.share_s:.2f}, overhead {1e3 * rates.overhead:.2f} ms\n"
              f"root mean square of the relative errors: {error:.2f}")

def draw(lines, path):
    """Draw points and lines: seconds above, memory below, a column for each axis."""
    with panels(path, 2 * len(lines), 3.6, 3.1, len(lines)) as axes:
        for i, (axis, stages) in enumerate(lines.items()):
            ticks = {}
            for stage, of_stage in stages.items():
                colour = COLOURS[STAGES.index(stage)]
                x, names, seconds, formula, mb, bytes_held, _ = zip(*of_stage)
                ticks |= dict(zip(x, names))
                above, below = axes[i], axes[len(lines) + i]
                above.vlines(x, [min(s) for s in seconds], [max(s) for s in seconds], color=colour, lw=1)
                for ax, dots, line in ((above, [median(s) for s in seconds], formula), (below, mb, bytes_held)):
                    ax.plot(x, dots, 'o', color=colour, ms=4)
                    ax.plot(x, line, '-', color=colour, lw=1.3, label=stage)
            for ax, what in ((above, 'CPU seconds of a step'), (below, 'MiB')):
                ax.set(xscale='log', yscale='log', xlabel=AXES[axis], ylabel=what)
                ax.set_xticks(list(ticks), [str(name) for name in ticks.values()])
                ax.set_xticks([], minor=True)
        axes[len(lines) - 1].legend(title='dots: measured\nlines: formula', loc='upper left', bbox_to_anchor=(1, 1))

def main(cfg):
    os.makedirs(cfg.out_dir, exist_ok=True)
    path = f'{cfg.out_dir}/results.json'
    found = measure_all(cfg, path)
    wanted = {name: point for name, point in points(cfg).items() if name in found}
    rates, error = fit(found, {name: (stage, batch_of(stage, *shape, cfg.epochs))
                               for name, (stage, *shape) in wanted.items()})
    error = error if len(found) >= LEAST else None
    write_atomic(path, json.dumps(read_json(path) | dict(fit=asdict(rates), error=error), indent=1) + '\n')
    lines = lines_of(cfg, found, rates)
    print_lines(lines, rates, error)
    draw(lines, f'{cfg.out_dir}/scaling.png')

if __name__ == '__main__':
    launch(main, Config)
