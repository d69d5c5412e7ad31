"""
Throughput: how fast this machine samples and trains with the functions of these scripts. One JSON line per shape.

    python bench.py --workload=sft --preset=small --threads=1
    python bench.py --workload=dpo --init_from=out/hh/sft --data=data/hh_rlhf/comparisons_train.jsonl --dtype=bfloat16

workload   what is timed                                                            tokens counted
generate   model.generate: 16 and then 64 prompts of 64 tokens, 128 new, no EOS     new ones
lm         sft.py's step on plain text: windows of 256 tokens                       all
sft        sft.py's step on the chosen answers                                      prompts and answers
rm         reward.py's step on pairs                                                prompts and answers of both texts
dpo        dpo.py's step on pairs, and the reference's single pass over them        prompts and answers of both texts
ppo        an iteration of ppo.py: 64 prompts of 32 tokens, 32 new, 4 epochs        new ones

    python bench.py --workload=memory --batch_size=4 --tokens=512 --dtype=bfloat16

times nothing: it prints the GiB that each stage needs for each GPT-2, by the formulas of memory.py, with and without
checkpointing. Micro-batches of batch_size rows; half of a row's tokens are answers'; ppo and reinforce sample 64 rows.

Rows are at most 256 tokens long and come in the batches of like length that the scripts make; padding is not counted.
Without --data the pairs are random ids: prompts of 16 to 127 tokens, answers of 8 to 127. A lap is `steps` optimizer
steps, from lists of ids to updated weights; of generate one call, of ppo one iteration. Every lap has the same batches.
The first one warms up; the line tells of the one of median speed among the others.
"""

import contextlib
import dataclasses
import io
import json
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import common
import memory
from common import checkpoint_file, fail, launch, require

import numpy as np
import torch

import dpo
import ppo
import reward
import sft
from model import GPT, GPTConfig, load_policy
from tokens import (Batches, Rows, Stream, Tokenizer, check_record, collate, collate_answers, encode_rankings,
                    load_tokenizer, parse_line, read_lines, train_bpe)

PRESETS = dict(tiny=(4, 4, 128, 512), small=(6, 6, 384, 50257), gpt2=(12, 12, 768, 50257)) # n_layer, n_head, n_embd, V
LONGEST = 256 # tokens in a row
DEFAULT_BATCHES = dict(generate=(16, 64), lm=(8,), sft=(8,), rm=(8,), dpo=(8,), ppo=(64,), memory=(8,))


@dataclass
class Config:
    workload: str = '' # generate, lm, sft, rm, dpo, ppo or memory
    preset: str = 'tiny' # tiny, small or gpt2: random weights of that shape
    init_from: str = '' # a language model, folder or on the hub, instead of random weights; then its shape counts
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64
    data: str = '' # comparisons; without: random ids
    batch_size: int = 0 # rows, pairs or prompts at a time; 0 = as above, 8 in the training steps
    tokens: int = 1024 # memory: of a row
    steps: int = 4 # optimizer steps in a lap
    repeats: int = 3 # laps that count
    threads: int = 0 # 0 = as many as torch takes
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'float32' # float32; bfloat16 or float16 (autocast)
    compile: bool = False # torch.compile, in the warm-up lap
    checkpointing: bool = False # work activations out again in the backward pass

    def __post_init__(self):
        at_least = dict(batch_size=0, tokens=2, steps=1, repeats=1, threads=0, seed=0)
        one_of = dict(workload=DEFAULT_BATCHES, preset=PRESETS, dtype=('float32', 'bfloat16', 'float16'))
        require(self, **{k: (getattr(self, k) >= low, f"at least {low}") for k, low in at_least.items()})
        require(self, device=(self.device in ('auto', 'cpu', 'cuda', 'mps') or self.device.startswith('cuda:'),
                              'auto, cpu, cuda, cuda:N or mps'))
        require(self, **{k: (getattr(self, k) in these, f"one of {', '.join(these)}") for k, these in one_of.items()})

# ----------------------------------------------------------------------------------------------------------------
# models and rows


def make_model(cfg, run, **heads):
    """The weights of init_from, or random ones of the preset's shape; with the heads asked for, untrained."""
    if cfg.init_from:
        return load_policy(cfg.init_from, 'init_from', pad_vocab=cfg.pad_vocab, **heads).to(run.device)
    n_layer, n_head, n_embd, vocab_size = PRESETS[cfg.preset]
    config = GPTConfig(LONGEST + 1, vocab_size, n_layer, n_head, n_embd, pad_vocab=cfg.pad_vocab, **heads)
    return GPT(config).to(run.device)


def choose_tokenizer(cfg, pairs, vocab_size):
    """The tokenizer beside the weights; else one of the model's size: gpt2, bytes, or a BPE trained on the data."""
    ours = ('tokenizer.tiktoken', 'tokenizer_name')
    if cfg.init_from and any(checkpoint_file(cfg.init_from, name, absent_ok=True) for name in ours):
        return load_tokenizer(cfg.init_from)
    if vocab_size in (50257, 257):
        return load_tokenizer('gpt2' if vocab_size == 50257 else 'bytes')
    if vocab_size < 257:
        fail(f"--data={cfg.data}: wanted a model of 257 tokens or more, got {vocab_size}")
    return Tokenizer('tiktoken', train_bpe([text for r in pairs for text in r['responses']], vocab_size))


def read_pairs(path):
    """The comparisons of a file, as rankings of two. A row with an empty text is left out: it is no reason to stop."""
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
    """Rows (prompt ids, [chosen ids, rejected ids], ranks), as reward.py and dpo.py make them."""
    V, longest = model.config.vocab_size, min(LONGEST, model.config.block_size)
    if cfg.data:
        pairs = read_pairs(cfg.data)
        with contextlib.redirect_stdout(io.StringIO()): # the encoder's report of what it cut
            return encode_rankings(choose_tokenizer(cfg, pairs, V), pairs, longest, cfg.data)
    if longest < 34:
        fail(f"--init_from={cfg.init_from}: wanted a context of 34 tokens at least, got {longest}")
    rng = np.random.default_rng(cfg.seed)
    text = lambda shortest: rng.integers(V, size=rng.integers(shortest, longest // 2)).tolist()
    return [(text(16), [text(8), text(8)], [0, 1]) for _ in range(1000)]


def make_prompts(cfg, model, rows, n, new):
    """batch_size prompts of n tokens: the beginnings of the rows that are long enough, over and over."""
    if model.config.block_size < n + new:
        fail(f"--init_from={cfg.init_from}: wanted a context of {n + new} tokens, got {model.config.block_size}")
    prompts = [ids[:n] for ids in (p + answers[0] for p, answers, _ in rows) if len(ids) >= n]
    if not prompts:
        fail(f"--data={cfg.data}: wanted a row of {n} tokens or more for the prompts")
    return [prompts[i % len(prompts)] for i in range(cfg.batch_size)]

# ----------------------------------------------------------------------------------------------------------------
# workloads: each returns a function that runs one lap; it gives back the tokens that count, and the positions that a
# model worked on in one pass: padding too, but a prompt that several answers share only once


def generate_lap(cfg, run, model, rows):
    prompts = make_prompts(cfg, model, rows, 64, 128)
    run.parallel(model, cfg.compile)

    def lap():
        with run.autocast():
            new = sum(map(len, model.generate(prompts, 128)))
        return new, new + 64 * len(prompts)

    return lap


def training_lap(cfg, run, model, step_loss, begin=None):
    """Laps of optimizer steps; step_loss(net, step) -> the loss, the tokens that count, and the positions."""
    model.train()
    net = run.parallel(model, cfg.compile, checkpointing=cfg.checkpointing)
    optimizer = common.make_optimizer(model, SimpleNamespace(lr=1e-4, weight_decay=0.0))

    def lap():
        if begin:
            begin()
        tokens = positions = 0
        for step in range(cfg.steps):
            loss, n, n_positions = step_loss(net, step)
            run.backward(loss)
            common.optimizer_step(optimizer, model, lr=1e-4, grad_clip=1.0, scaler=run.scaler)
            tokens, positions = tokens + n, positions + n_positions
        return tokens, positions

    return lap


def supervised_lap(cfg, run, model, data, extra):
    """sft.py's step; a window of text holds `extra` = 1 token more than the model is given."""
    def step_loss(net, step):
        examples = data.at(step)
        idx, mask = (x.to(run.device) for x in collate(examples)) # (B, T), (B, T-1)
        with run.autocast():
            logp = net('logp', idx, mask) # (B, T-1)
        return sft.sft_loss(logp, mask), sum(len(ids) - extra for ids, _ in examples), idx.numel() - extra * len(idx)

    return training_lap(cfg, run, model, step_loss)


def lm_lap(cfg, run, model, rows):
    text = np.concatenate([p + answers[0] for p, answers, _ in rows])
    windows = Stream(text, min(LONGEST, model.config.block_size), cfg.batch_size, cfg.seed)
    return supervised_lap(cfg, run, model, windows, extra=1)


def sft_lap(cfg, run, model, rows):
    examples = [(p + answers[0], [0] * len(p) + [1] * len(answers[0])) for p, answers, _ in rows]
    return supervised_lap(cfg, run, model, Rows(examples, cfg.batch_size, cfg.seed), extra=0)


def pair_batches(cfg, rows):
    return Batches([len(p) + sum(map(len, answers)) for p, answers, _ in rows], cfg.batch_size, cfg.seed)


def sizes(rows, answers):
    """The tokens of all texts of a batch, each answer with its prompt, and the positions that the model worked on."""
    return sum(len(p) + len(answer) for p, some, _ in rows for answer in some), answers.idx.numel()


def rm_lap(cfg, run, model, rows):
    batches = pair_batches(cfg, rows)

    def step_loss(net, step):
        some = [rows[i] for i in batches.at(step)]
        answers = collate_answers(some).to(run.device) # N answers to B prompts
        with run.autocast():
            scores = net('answer_rewards', answers) # (N,)
        ranks = torch.tensor([r for _, _, ranks in some for r in ranks], device=run.device) # (N,)
        loss = reward.ranking_loss(reward.to_table(scores, some, 0.0), reward.to_table(ranks, some, -1)) # (B, K) each
        return loss, *sizes(some, answers)

    return training_lap(cfg, run, model, step_loss)


def dpo_lap(cfg, run, model, rows):
    batches, options = pair_batches(cfg, rows), dpo.Config(train_data='rows')
    ref = {} # row -> (K,) log-probabilities of the reference

    def begin(): # an epoch's worth: each row of the lap once
        used = sorted({i for step in range(cfg.steps) for i in batches.at(step)})
        with contextlib.redirect_stderr(io.StringIO()): # its progress bar
            ref.update(zip(used, dpo.reference_logp(model, [rows[i] for i in used], options, run, 'rows')))

    def step_loss(net, step):
        batch = batches.at(step)
        some, ref_logp = [rows[i] for i in batch], torch.cat([ref[i] for i in batch]).to(run.device) # (N,)
        answers = collate_answers(some).to(run.device) # N answers to B prompts
        with run.autocast():
            logp = net('answer_logp', answers) # (N,)
        loss, _ = dpo.pair_loss(logp, ref_logp, answers, options)
        return loss, *sizes(some, answers)

    return training_lap(cfg, run, model, step_loss, begin)


def ppo_lap(cfg, run, model, rows):
    options = ppo.Config(prompts='rows', max_new_tokens=32, batch_size=cfg.batch_size)
    prompts, tok = make_prompts(cfg, model, rows, 32, 32), SimpleNamespace(eos=-1) # an id that is never sampled
    frozen = lambda **heads: run.freeze(make_model(cfg, run, **heads))
    models = ppo.Models(model, make_model(cfg, run, value_head=True), frozen(reward_head=True), frozen())
    trained = dict(policy=models.policy, critic=models.critic)
    optimizers = {name: common.make_optimizer(net, options, eps=1e-5) for name, net in trained.items()}
    nets = {name: run.parallel(net, cfg.compile, checkpointing=cfg.checkpointing) for name, net in trained.items()}

    def lap():
        batch, lengths, _ = ppo.roll_out(models, prompts, prompts, tok, options, options.kl_coef, run)
        ppo.update(models, nets, optimizers, batch, lengths, options, run, 0, None)
        return int(batch['mask'].sum()), batch['idx'].numel()

    return lap


WORKLOADS = dict(generate=generate_lap, lm=lm_lap, sft=sft_lap, rm=rm_lap, dpo=dpo_lap, ppo=ppo_lap)

# ----------------------------------------------------------------------------------------------------------------


def timed(lap, device):
    """One lap: its tokens and positions, wall seconds and this process's CPU seconds."""
    start, cpu_start = time.perf_counter(), time.process_time()
    tokens, positions = lap()
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return tokens, positions, time.perf_counter() - start, time.process_time() - cpu_start


def peak_rss_mb():
    """The most memory this process has held so far, in MB of 2^20 bytes."""
    import resource # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def print_memory(cfg):
    """What a stage needs is a matter of arithmetic: one line for each stage and size."""
    for name, (n_layer, n_head, n_embd) in memory.SIZES.items():
        c = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        judge, half = dataclasses.replace(c, reward_head=True), cfg.tokens // 2
        sampling = dict(places=half, words=half, sampled=64)
        stages = dict( # models that are trained, frozen ones, and the rest
            sft=([c], [], dict(places=cfg.tokens, words=cfg.tokens)),
            reward=([judge], [], dict(places=2, words=0, sharing=True)),
            dpo=([c], [], dict(places=half, words=half, sharing=True)), # and rrhf
            ppo=([c, judge], [c, judge], sampling), reinforce=([c], [c, judge], sampling))
        for stage, (trained, frozen, more) in stages.items():
            need, less = (memory.needs(trained, frozen, cfg.batch_size, cfg.tokens, dtype=cfg.dtype,
                                       checkpointing=checkpointing, **more) for checkpointing in (False, True))
            need |= dict(activations_checkpointing=less['activations'], total_checkpointing=less['total'])
            print(json.dumps(dict(workload='memory', model=name, stage=stage, batch_size=cfg.batch_size,
                                  tokens=cfg.tokens, dtype=cfg.dtype, unit='GiB',
                                  **{k: round(size / memory.GiB, 2) for k, size in need.items()})), flush=True)


def measure(cfg, run):
    torch.manual_seed(cfg.seed)
    model = make_model(cfg, run, reward_head=cfg.workload == 'rm')
    rows = make_rows(cfg, model)
    lap = WORKLOADS[cfg.workload](cfg, run, model, rows)
    laps = [timed(lap, run.device) for _ in range(1 + cfg.repeats)][1:]
    laps.sort(key=lambda x: x[2] / x[0])
    tokens, positions, seconds, cpu_seconds = laps[len(laps) // 2]
    c = model.config
    shape = (c.n_layer, c.n_head, c.n_embd, c.vocab_size)
    line = dict(
        workload=cfg.workload, preset=next((name for name, these in PRESETS.items() if these == shape), 'other'),
        tokens=tokens, seconds=round(seconds, 4), tokens_per_s=round(tokens / seconds, 1),
        peak_rss_mb=round(peak_rss_mb()), cpu_seconds=round(cpu_seconds, 4),
        tokens_per_cpu_s=round(tokens / cpu_seconds, 1), positions=positions,
        fastest=round(laps[0][0] / laps[0][2], 1), slowest=round(laps[-1][0] / laps[-1][2], 1),
        batch_size=cfg.batch_size, steps=1 if cfg.workload in ('generate', 'ppo') else cfg.steps, repeats=cfg.repeats,
        model=dict(zip(('n_layer', 'n_head', 'n_embd', 'vocab_size'), shape)), init_from=cfg.init_from, data=cfg.data,
        device=run.device, dtype=run.dtype, threads=torch.get_num_threads(), torch=torch.__version__)
    if run.device.startswith('cuda'):
        line['peak_gpu_mb'] = round(torch.cuda.max_memory_allocated(run.device) / 2**20)
    print(json.dumps(line), flush=True)


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run = common.start(cfg)
    common.stop(run) # nothing to save: Ctrl-C ends the program at once
    for batch_size in (cfg.batch_size,) if cfg.batch_size else DEFAULT_BATCHES[cfg.workload]:
        cfg = dataclasses.replace(cfg, batch_size=batch_size)
        print_memory(cfg) if cfg.workload == 'memory' else measure(cfg, run)


if __name__ == '__main__':
    launch(main, Config)
