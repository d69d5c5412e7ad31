"""Measure throughput: how fast this machine samples and trains, by the scripts' own functions.

It prints one JSON line per shape.

    python bench.py --workload=sft --preset=small --threads=1
    python bench.py --workload=dpo --init_from=out/hh/sft --data=data/hh_rlhf/comparisons_train.jsonl --dtype=bfloat16

workload   timed                                                                    tokens counted
generate   model.generate: 16 and then 64 prompts of 64 tokens, 128 new, no EOS     new ones
lm         sft.update on plain text: windows of 256 tokens                          all
sft        sft.update on the chosen answers                                         prompts and answers
rm         reward.update on pairs                                                   prompts and answers of both texts
dpo        dpo.update on pairs, and the reference's single pass over them           prompts and answers of both texts
ppo        ppo.roll_out and ppo.update: 64 prompts of 32 tokens, 32 new, 4 epochs   new ones
rloo       the same of reinforce: 16 such prompts, 4 answers to each, one epoch     new ones

rloo rewards by a line of Python, as TRL's RLOOTrainer may: the policy and the reference are its only models.

    python bench.py --workload=memory --batch_size=4 --tokens=512 --dtype=bfloat16

This times nothing. It prints the memory that each stage needs for each GPT-2, by the formulas of lab/memory.py.

Rows are at most 256 tokens long. They come in the scripts' batches of like length, and padding is not counted. Without
--data the pairs are random ids: prompts of 16 to 127 tokens, answers of 8 to 127. A lap is `steps` optimizer steps,
from lists of ids to updated weights; for generate it is one call, for ppo and rloo one iteration. Every lap has the
same batches. The first one warms up. The line shows the lap of median speed among the others.

`gflops` is the useful arithmetic of that lap: 10^9 operations of matrix products a second, less the share that padding
takes. One more lap counts them. All models, passes and what checkpointing computes again are in it. Attention counts as
if nothing were masked. `share_of_best` puts it beside the best product of two square matrices on this device, of the
same type: on a GPU this is the model FLOPs utilisation (MFU), with a measured rate. One thread on a CPU is timed in CPU
seconds here, so that other work does not count.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import dpo
import ppo
import reinforce
import reward
import sft
from common.batches import Batches, Demonstrations, Row, Windows, encode_rankings
from common.checkpoints import load_policy
from common.options import RunOptions, fail, launch, require, unread
from common.records import check_record, parse_line, read_lines
from common.rewards import Reward
from common.run import place_among_processes, start, stop
from common.tokens import Tokenizer, load_tokenizer
from common.training import make_optimizer
from common.weights import checkpoint_file
from data.bpe import train_bpe
from lab import memory
from model import GPT, GPTConfig

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

PRESETS = { # n_layer, n_head, n_embd, vocab_size
    'tiny': (4, 4, 128, 512), 'small': (6, 6, 384, 50257), 'gpt2': (12, 12, 768, 50257),
    'gpt2-medium': (24, 16, 1024, 50257)}
LONGEST = 256 # tokens in a row
DEFAULT_BATCHES = dict(generate=(16, 64), lm=(8,), sft=(8,), rm=(8,), dpo=(8,), ppo=(64,), rloo=(16,),
                       memory=(8,))
NO_STEPS = 'generate', 'ppo', 'rloo' # workloads whose lap is no number of optimizer steps

@dataclass
class Config(RunOptions):
    workload: str = '' # generate, lm, sft, rm, dpo, ppo, rloo or memory
    preset: str = 'tiny' # tiny, small, gpt2 or gpt2-medium: random weights of that shape
    init_from: str = '' # a language model, folder or on the hub, instead of random weights; then its shape counts
    data: str = '' # comparisons; without: random ids
    batch_size: int = 0 # rows, pairs or prompts at a time; 0 = as above, 8 in the training steps
    tokens: int = 1024 # memory: of a row
    steps: int = 4 # optimizer steps in a lap
    repeats: int = 3 # laps that count
    threads: int = 0 # 0 = as many as torch takes
    dtype: str = 'float32' # float32; bfloat16 or float16 (autocast)
    compile: bool = False # torch.compile, in the warm-up lap
    checkpointing: bool = False # compute activations again in the backward pass
    lora_rank: int = 0 # above 0: train adapters of this rank
    lora_on: str = 'attn' # attn: queries, keys and values; all: every linear layer
    lora_alpha = 1.0 # no option: it changes neither time nor memory

    def __post_init__(self):
        super().__post_init__()
        at_least = dict(batch_size=0, tokens=2, steps=1, repeats=1, threads=0)
        one_of = dict(workload=DEFAULT_BATCHES, preset=PRESETS, dtype=('float32', 'bfloat16', 'float16'))
        require(self, **{k: (getattr(self, k) >= low, f"at least {low}") for k, low in at_least.items()})
        require(self, **{k: (getattr(self, k) in these, f"one of {', '.join(these)}") for k, these in one_of.items()})
        memory = self.workload == 'memory'
        unread(self, memory, 'workload=memory', 'tokens')
        unread(self, not memory, 'a workload that is timed', 'preset', 'init_from', 'data', 'steps', 'repeats',
               'threads', 'compile', 'checkpointing')
        unread(self, not self.init_from, 'a run without init_from', 'preset')
        unread(self, self.workload not in NO_STEPS, 'a workload of optimizer steps', 'steps')
        unread(self, self.workload != 'generate', 'a workload that trains', 'lora_rank')
        unread(self, self.lora_rank, 'lora_rank', 'lora_on')

# ---- models and rows --------------------------------------------------------------------------------------------

def make_model(cfg, run, **heads):
    """Load init_from, or make random weights of the preset's shape; with the heads asked for, untrained."""
    if cfg.init_from:
        return load_policy(cfg.init_from, 'init_from', **heads).to(run.device)
    n_layer, n_head, n_embd, vocab_size = PRESETS[cfg.preset]
    return GPT(GPTConfig(LONGEST + 1, vocab_size, n_layer, n_head, n_embd, **heads)).to(run.device)

def choose_tokenizer(cfg, pairs, vocab_size):
    """Choose the tokenizer beside the weights, else one of the model's size: gpt2, bytes, or a BPE of the data."""
    ours = ('tokenizer.tiktoken', 'tokenizer_name')
    if cfg.init_from and any(checkpoint_file(cfg.init_from, name, absent_ok=True) for name in ours):
        return load_tokenizer(cfg.init_from, 'init_from')
    if vocab_size in (50257, 257):
        return load_tokenizer('gpt2' if vocab_size == 50257 else 'bytes')
    if vocab_size < 257:
        fail(f"--data={cfg.data}: wanted a model of 257 tokens or more, got {vocab_size}")
    return Tokenizer('tiktoken', train_bpe([text for r in pairs for text in r['responses']], vocab_size))

def read_pairs(path):
    """Read comparisons as rankings of two; a row with an empty text is left out."""
    pairs, reason = [], 'an empty file'
    for n, line in read_lines(path):
        try:
            row = parse_line(line)
            check_record(row, 'comparisons')
            pairs.append(dict(prompt=row['prompt'], responses=[row['chosen'], row['rejected']], ranks=[0, 1]))
        except ValueError as error:
            reason = f"line {n}: {error}"
    return pairs or fail(f"--data={path}: no comparison in it ({reason})")

def make_rows(cfg, model):
    """Make rows of chosen and rejected, as reward.py and dpo.py do."""
    V, longest = model.config.vocab_size, min(LONGEST, model.config.block_size)
    if cfg.data:
        pairs = read_pairs(cfg.data)
        with contextlib.redirect_stdout(io.StringIO()): # the encoder's report
            return encode_rankings(choose_tokenizer(cfg, pairs, V), pairs, longest, cfg.data)
    if longest < 34:
        fail(f"--init_from={cfg.init_from}: wanted a context of 34 tokens at least, got {longest}")
    rng = np.random.default_rng(cfg.seed)
    text = lambda shortest: rng.integers(V, size=rng.integers(shortest, longest // 2)).tolist()
    return [Row(text(16), [text(8), text(8)], dict(ranks=[0, 1])) for _ in range(1000)]

def make_prompts(cfg, model, rows, n, new):
    """Make batch_size prompts of n tokens: the beginnings of long enough rows, over and over."""
    if model.config.block_size < n + new:
        fail(f"--init_from={cfg.init_from}: wanted a context of {n + new} tokens, got {model.config.block_size}")
    prompts = [ids[:n] for ids in (p + answers[0] for p, answers, _ in rows) if len(ids) >= n]
    if not prompts:
        fail(f"--data={cfg.data}: wanted a row of {n} tokens or more for the prompts")
    return [prompts[i % len(prompts)] for i in range(cfg.batch_size)]

# ----------------------------------------------------------------------------------------------------------------
# workloads: each returns a function that runs one lap and returns three numbers: the tokens that count, the positions
# that a model is given in one pass, and the positions that it computes: padding is only among the latter. A prompt that
# several answers share counts once

def generate_lap(cfg, run, model, rows):
    prompts = make_prompts(cfg, model, rows, 64, 128)
    run.prepare(model, cfg)

    def lap():
        with run.autocast():
            new = sum(map(len, model.generate(prompts, 128)))
        given = 64 * len({*map(tuple, prompts)}) + new - len(prompts) # nothing follows the last new token
        return new, given, given

    return lap

def training_lap(cfg, run, model, options, batch_at, update, sizes, begin=None):
    """Make laps of optimizer steps: update(optimizer, batch, step) on batch_at(step), counted by sizes(batch)."""
    model.train()
    run.prepare(model, cfg)
    optimizer = make_optimizer(model, options)

    def lap():
        if begin:
            begin()
        batches = [batch_at(step) for step in range(cfg.steps)]
        for step, batch in enumerate(batches):
            update(optimizer, batch, step)
        return tuple(map(sum, zip(*map(sizes, batches))))

    return lap

STEPS = dict(lr=1e-4, lr_schedule='constant', warmup_steps=0, max_steps=1) # options of the timed steps

def supervised_lap(cfg, run, model, data, extra):
    """Time sft.update; a window of text holds `extra` = 1 token more than the model is given."""
    def sizes(rows):
        lengths = [len(ids) - 1 for ids, _ in rows] # nothing follows the last token
        return sum(lengths) + (1 - extra) * len(rows), sum(lengths), max(lengths) * len(rows)

    options = sft.Config(train_data='rows', batch_size=cfg.batch_size, **STEPS)
    update = lambda optimizer, rows, step: sft.update(model, None, optimizer, rows, options, run, step)
    return training_lap(cfg, run, model, options, data.at, update, sizes)

def lm_lap(cfg, run, model, rows):
    text = np.concatenate([row.prompt + row.answers[0] for row in rows])
    windows = Windows(text, min(LONGEST, model.config.block_size), cfg.batch_size, cfg.seed)
    return supervised_lap(cfg, run, model, windows, extra=1)

def sft_lap(cfg, run, model, rows):
    examples = [(p + answers[0], [0] * len(p) + [1] * len(answers[0])) for p, answers, _ in rows]
    return supervised_lap(cfg, run, model, Demonstrations(examples, cfg.batch_size, cfg.seed), extra=0)

def sizes_of(rows, model, unread):
    """Count tokens and positions of Rows; the last `unread` tokens of an answer are not given."""
    alone = [len(row.prompt) + len(answer) - unread for row in rows for answer in row.answers]
    shared = [row.length - unread * len(row.answers) for row in rows]
    given = min(alone, shared, key=lambda lengths: model.work(len(lengths), max(lengths))) # as GPT.hidden chooses
    return sum(alone) + unread * len(alone), sum(given), len(given) * max(given)

def rm_lap(cfg, run, model, rows):
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    options = reward.Config(train_data='rows', batch_size=cfg.batch_size, **STEPS)
    update = lambda optimizer, some, step: reward.update(model, optimizer, some, options, run, step)
    return training_lap(cfg, run, model, options, lambda step: [rows[i] for i in batches.at(step)], update,
                        lambda some: sizes_of(some, model, unread=0))

def dpo_lap(cfg, run, model, rows):
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    options = dpo.Config(train_data='rows', batch_size=cfg.batch_size, **STEPS)
    ref = {} # row's number -> (K,) log-probabilities of the reference

    def begin(): # an epoch's worth: each row of the lap once
        used = sorted({i for step in range(cfg.steps) for i in batches.at(step)})
        with contextlib.redirect_stderr(io.StringIO()): # its progress bar
            ref.update(zip(used, dpo.reference_logp(model, [rows[i] for i in used], options, run, 'rows')))

    def update(optimizer, chosen, step):
        dpo.update(model, optimizer, [rows[i] for i in chosen], [ref[i] for i in chosen], options, run, step)

    return training_lap(cfg, run, model, options, batches.at, update,
                        lambda chosen: sizes_of([rows[i] for i in chosen], model, unread=1), begin)

UNENDING = SimpleNamespace(eos=-1, decode=str) # a tokenizer whose EOS is never sampled

def rollout_lap(cfg, run, trained, options, rows, roll_out, update):
    """Make laps of an iteration: roll_out(prompts, records), then update(optimizers, batch, lengths)."""
    prompts = make_prompts(cfg, trained[0], rows, 32, 32)
    for model in trained:
        run.prepare(model, cfg)
    optimizers = [make_optimizer(model, options, eps=1e-5) for model in trained]
    sampled = [Row(prompt, [[0] * 32] * options.n_answers, {}) for prompt in prompts] # as long as those that come

    def lap():
        batch, lengths, _ = roll_out(prompts, [{}] * len(prompts))
        update(optimizers, batch, lengths)
        return int(batch['mask'].sum()), *sizes_of(sampled, trained[0], unread=1)[1:]

    return lap

def ppo_lap(cfg, run, model, rows):
    options = ppo.Config(prompts='rows', max_new_tokens=32, batch_size=cfg.batch_size)
    frozen = lambda **heads: run.freeze(make_model(cfg, run, **heads))
    models = ppo.Models(model, make_model(cfg, run, value_head=True), Reward([frozen(reward_head=True)]), frozen())
    return rollout_lap(
        cfg, run, models[:2], options, rows,
        lambda *prompts: ppo.roll_out(models, *prompts, UNENDING, options, options.kl_coef, run),
        lambda optimizers, *answers: ppo.update(models, dict(zip(('policy', 'critic'), optimizers)), *answers, options,
                                                run, 0))

def rloo_lap(cfg, run, model, rows):
    options = reinforce.Config(prompts='rows', n_answers=4, max_new_tokens=32, batch_size=4 * cfg.batch_size)
    reward = Reward(function=lambda record, text: len(text) % 2, cfg=options)
    models = model, reward, run.freeze(make_model(cfg, run))
    return rollout_lap(
        cfg, run, models[:1], options, rows,
        lambda *prompts: reinforce.roll_out(models, *prompts, UNENDING, options, 0.0, run),
        lambda optimizers, *answers: reinforce.update(model, *optimizers, *answers, options, run, 0))

WORKLOADS = dict(generate=generate_lap, lm=lm_lap, sft=sft_lap, rm=rm_lap, dpo=dpo_lap, ppo=ppo_lap,
                 rloo=rloo_lap)

# ----------------------------------------------------------------------------------------------------------------

def timed(lap, device):
    """Run a lap; return its three numbers, wall seconds and this process's CPU seconds."""
    start, cpu_start = time.perf_counter(), time.process_time()
    counts = lap()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return *counts, time.perf_counter() - start, time.process_time() - cpu_start

def count_operations(work):
    """Return the floating point operations of the matrix products in work()."""
    aten = torch.ops.aten # torch's own table lacks attention on a CPU
    on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
              aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        work()
    return counter.get_total_flops()

def best_product(device, dtype, clock):
    """Return the best rate of square products, 10^9 operations per second of clock()."""
    n, seconds, best = 128, 0.0, 0.0
    while seconds < 0.005:
        n *= 2
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        seconds = math.inf
        for x, y in 3 * [(a, a.T), (a, a), (a.T, a)]: # a layer's output, and the gradients of its input and weights
            start = clock()
            (x @ y)[0, 0].item() # waits for a GPU
            seconds = min(seconds, clock() - start)
        best = max(best, 2 * n**3 / (seconds or math.inf) / 1e9) # Windows' clocks may stand still so long
    return best

def peak_rss_mb():
    """Return this process's peak memory in MB of 2^20 bytes, None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10))

def measure(cfg, run):
    """Time the workload's laps and print a JSON line."""
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, run, reward_head=cfg.workload == 'rm')
    rows = make_rows(cfg, model)
    lap = WORKLOADS[cfg.workload](cfg, run, model, rows)
    laps = [timed(lap, run.device) for _ in range(1 + cfg.repeats)][1:]
    laps.sort(key=lambda x: x[3] / x[0])
    tokens, given, positions, seconds, cpu_seconds = laps[len(laps) // 2]
    c = model.config
    shape = (c.n_layer, c.n_head, c.n_embd, c.vocab_size)
    line = dict(
        workload=cfg.workload, preset=next((name for name, these in PRESETS.items() if these == shape), 'other'),
        tokens=tokens, seconds=round(seconds, 4), tokens_per_s=round(tokens / seconds, 1),
        peak_rss_mb=peak_rss_mb(), cpu_seconds=round(cpu_seconds, 4),
        tokens_per_cpu_s=round(tokens / cpu_seconds, 1), positions=positions, padding=round(1 - given / positions, 3),
        fastest=round(laps[0][0] / laps[0][3], 1), slowest=round(laps[-1][0] / laps[-1][3], 1),
        batch_size=cfg.batch_size, steps=1 if cfg.workload in NO_STEPS else cfg.steps, repeats=cfg.repeats,
        model=dict(zip(('n_layer', 'n_head', 'n_embd', 'vocab_size'), shape)), init_from=cfg.init_from, data=cfg.data,
        device=run.device, dtype=run.dtype, threads=torch.get_num_threads(), torch=torch.__version__)
    if run.device.startswith('cuda'):
        line['peak_gpu_mb'] = round(torch.cuda.max_memory_allocated(run.device) / 2**20)
    in_cpu_seconds = run.device == 'cpu' and torch.get_num_threads() == 1
    gflops = count_operations(lap) * given / positions / (cpu_seconds if in_cpu_seconds else seconds) / 1e9
    best = best_product(run.device, run.dtype, time.process_time if in_cpu_seconds else time.perf_counter)
    line |= dict(gflops=round(gflops, 2), best_gflops=round(best, 2), share_of_best=round(gflops / best, 3))
    print(json.dumps(line), flush=True)

def main(cfg):
    if place_among_processes()[1] > 1:
        fail("bench.py measures one process; wanted it started without torchrun")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.workload == 'memory':
        return memory.print_table(cfg.batch_size or DEFAULT_BATCHES['memory'][0], cfg.tokens, cfg.dtype,
                                  (cfg.lora_rank, cfg.lora_on))
    run = start(cfg)
    stop(run) # nothing to save: Ctrl-C ends the program at once
    for batch_size in (cfg.batch_size,) if cfg.batch_size else DEFAULT_BATCHES[cfg.workload]:
        measure(dataclasses.replace(cfg, batch_size=batch_size), run)

if __name__ == '__main__':
    launch(main, Config)
