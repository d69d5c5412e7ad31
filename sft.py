"""Train by cross-entropy on text or demonstrations, or learn from a teacher.

On demonstrations the loss counts the tokens of the responses, end of text included, so that the model learns to stop
(Ouyang et al. 2022, InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5, step 1). With --loss_on=all every token
counts. On plain text this is ordinary language modelling (Radford et al. 2019). With --teacher=FOLDER a student learns
the teacher's whole distribution at the same tokens (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2).
With --on_policy it does so on answers of its own; no gradient flows through their sampling (Agarwal et al. 2024, GKD,
https://arxiv.org/abs/2306.13649, algorithm 1).

    python sft.py config/toy/pretrain.py
    python sft.py config/toy/sft.py --lr=1e-3
    python sft.py config/toy/distill.py --temperature=2
    python sft.py config/toy/gkd.py --divergence=jsd --jsd_beta=0.9

docs/differences.md says what differs from the papers.
"""

import math
from dataclasses import dataclass

from common.batches import Demonstrations, collate, encode_prompts, load_training_set, own_parts
from common.checkpoints import load_policy, prepare_out_dir
from common.options import DataOptions, fail, launch, require, unread
from common.records import first_row, is_text_file, read_records
from common.rollout import load_frozen, masked_mean, sample_answers
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, begin, finish_step, take_step
from model import GPT, GPTConfig

import numpy as np
import torch

@dataclass
class Config(DataOptions):
    out_dir: str = 'out/sft' # the checkpoint
    init_from: str = 'scratch' # scratch, a checkpoint folder, or a model on the hub: gpt2, gpt2-xl, OWNER/NAME
    tokenizer: str = 'gpt2' # with scratch: gpt2, bytes or a .tiktoken file
    n_layer: int = 12 # with scratch: the model's shape
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024 # with scratch: the model's context; rows are at most this long
    dropout: float = 0.0
    train_data: str = '' # demonstrations (.jsonl), or text (.jsonl or .txt); with on_policy=1 prompts do
    val_fraction: float = 0.0 # without val_data: hold out this share of train_data's prompts, of packed text the end
    loss_on: str = 'response' # response, or all tokens; text always counts all
    packed: bool = True # text: windows of block_size tokens, across documents; False: one document a row
    teacher: str = '' # a checkpoint folder: learn its token distributions in place of the tokens; empty = none
    temperature: float = 1.0 # with a teacher: both distributions are softened by it
    divergence: str = 'forward' # with a teacher: forward or reverse (KL), or jsd
    jsd_beta: float = 0.5 # jsd: above 0 and below 1; near 0 it acts like forward, near 1 like reverse
    on_policy: float = 0.0 # with a teacher: lambda, the share of the batches whose answers the student writes
    max_new_tokens: int = 64 # on_policy: longest answer, EOS included; longer prompts lose their beginning
    lr: float = 1e-4
    lr_schedule: str = 'cosine'
    eval_every: int = 200 # steps between measurements on val_data; 0 = only at the end
    eval_batches: int = 50 # batches of val_data per measurement; 0 = all of it

    def __post_init__(self):
        super().__post_init__()
        require(self, loss_on=(self.loss_on in ('response', 'all'), 'response or all'),
                val_fraction=(0 <= self.val_fraction < 1, 'at least 0 and below 1'),
                temperature=(self.temperature > 0, 'above 0'),
                divergence=(self.divergence in ('forward', 'reverse', 'jsd'), 'forward, reverse or jsd'),
                lora_rank=(self.lora_rank == 0 or self.init_from != 'scratch', '0 with init_from=scratch'),
                jsd_beta=(0 < self.jsd_beta < 1, 'above 0 and below 1'),
                on_policy=(0 <= self.on_policy <= 1, 'at least 0 and at most 1'))
        require(self, loss_on=(self.on_policy == 0 or self.loss_on == 'response', 'response with on_policy'))
        unread(self, self.init_from == 'scratch', 'init_from=scratch', 'tokenizer', 'n_layer', 'n_head', 'n_embd',
               'block_size')
        unread(self, not self.val_data, 'a run without val_data', 'val_fraction')
        unread(self, self.val_data or self.val_fraction, 'val_data', 'eval_batches')
        unread(self, self.teacher, 'teacher', 'temperature', 'divergence', 'on_policy')
        unread(self, self.divergence == 'jsd', 'divergence=jsd', 'jsd_beta')
        unread(self, self.on_policy > 0, 'on_policy', 'max_new_tokens')

def sft_loss(logp, mask):
    """Return the cross-entropy () in nats per counted token (Radford et al. 2018, equation 1, negated).

        L = -sum(mask * logp) / sum(mask)

    logp: (B, T-1) log-probabilities of tokens 1 … T-1. mask: (B, T-1), 1 = counted.
    """
    return -masked_mean(logp, mask)

def distillation_loss(student, teacher, temperature, divergence='forward', beta=0.5):
    """Return the divergence () of student from teacher, in nats per counted token.

    Both are softened by the temperature T (Hinton et al. 2015, section 2); T^2 restores the gradient's size:

        p = softmax(teacher / T)      q = softmax(student / T)      L = T^2 * mean over n of D(p, q)

        forward    D = KL(p || q) = sum_v p log(p / q)
        reverse    D = KL(q || p)
        jsd        D = beta KL(p || m) + (1 - beta) KL(q || m)      m = beta p + (1 - beta) q

    jsd: Agarwal et al. 2024, equation 1. D / beta is KL(p || q) in the limit of beta 0, and D / (1 - beta) KL(q || p)
    in that of beta 1. student, teacher: logits (N, V) at the N counted tokens. The teacher's carry no gradient.
    """
    kl = lambda a, b: (a.exp() * (a - b)).sum() # (), of log-probabilities (N, V), summed over the tokens
    logp = (teacher.detach() / temperature).log_softmax(-1) # (N, V)
    logq = (student / temperature).log_softmax(-1) # (N, V)
    if divergence == 'jsd':
        logm = torch.logaddexp(logp + math.log(beta), logq + math.log(1 - beta)) # (N, V)
        total = beta * kl(logp, logm) + (1 - beta) * kl(logq, logm)
    else:
        total = kl(logp, logq) if divergence == 'forward' else kl(logq, logp)
    return temperature ** 2 * total / max(1, len(logp))

def own_answers(model, rows, tok, cfg, run):
    """Replace the answers in rows (ids, mask) by the student's own."""
    room = model.config.block_size - cfg.max_new_tokens
    mine = run.rows(rows) # the share of this process
    prompts = [ids[:len(mask) - mask[::-1].index(0)][-room:] for ids, mask in mine] # up to the last answer
    with run.autocast():
        answers, _ = sample_answers(model, prompts, tok, cfg.max_new_tokens)
    mine = [(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for prompt, answer in zip(prompts, answers)]
    return [row for share in run.gather(mine) for row in share]

@torch.no_grad()
def evaluate(model, data, cfg, run):
    """Measure the cross-entropy in nats per counted token of held-out data; a student's too."""
    total = counted = 0.0
    model.eval()
    for batch in run.rows(data.in_order(cfg.eval_batches, cfg.grad_accum)): # the share of this process
        idx, mask = (x.to(run.device) for x in collate(batch))
        with run.autocast():
            logp = model.logp(idx, mask) # (B, T-1)
        total, counted = total + (logp * mask).sum().item(), counted + mask.sum().item()
    model.train()
    return dict(val_loss=-(run.sum(total) / run.sum(counted)).item())

def update(model, teacher, optimizer, rows, cfg, run, step):
    """Take one optimizer step on rows (ids, mask); return its metrics. Every counted token weighs the same."""
    n_tokens = sum(sum(mask[1:]) for _, mask in rows) # nothing predicts a row's first token
    means = Means()
    for part in own_parts(rows, [len(ids) for ids, _ in rows], cfg, run):
        idx, mask = (x.to(run.device) for x in collate(part)) # (B, T), (B, T-1)
        with run.autocast():
            if teacher:
                with torch.no_grad():
                    wanted = teacher.logits_at(idx, mask) # (N, V), at the counted tokens only
                loss = distillation_loss(model.logits_at(idx, mask), wanted, cfg.temperature, cfg.divergence,
                                         cfg.jsd_beta) # ()
            else:
                loss = sft_loss(model.logp(idx, mask), mask) # ()
        share = mask.sum() / n_tokens # (), of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
    seen = dict(tokens=n_tokens) if teacher else {}
    return take_step(run, cfg, step, model, optimizer, means.sum(run) | seen)

def main(cfg):
    run = start(cfg)
    if cfg.init_from == 'scratch':
        tok = load_tokenizer(cfg.tokenizer)
        model = GPT(GPTConfig(cfg.block_size, tok.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout))
    else:
        tok = load_tokenizer(cfg.init_from, 'init_from')
        model = load_policy(cfg.init_from, 'init_from', dropout=cfg.dropout)
    model.to(run.device)
    teacher = load_frozen(load_policy, cfg.teacher, 'teacher', model, tok, run, "student's") if cfg.teacher else None
    how = (tok, model.config.block_size, cfg.batch_size, cfg.seed, cfg.loss_on, cfg.packed)
    room = model.config.block_size - cfg.max_new_tokens
    if cfg.on_policy and is_text_file(cfg.train_data):
        fail(f"--train_data={cfg.train_data}: holds plain text; on_policy wanted demonstrations or prompts to answer")
    if cfg.on_policy and room < 1:
        fail(f"--max_new_tokens={cfg.max_new_tokens}: wanted less than the context of {model.config.block_size} tokens")
    if cfg.on_policy == 1 and not {'response', 'messages'} & first_row(cfg.train_data).keys():
        if cfg.val_fraction:
            fail(f"--val_fraction={cfg.val_fraction}: {cfg.train_data} has no answers to hold out; wanted 0")
        prompts = encode_prompts(tok, read_records(cfg.train_data, 'prompts'), room)
        train, val = Demonstrations([(ids, [0] * len(ids)) for ids in prompts], cfg.batch_size, cfg.seed), None
    else:
        train, val = load_training_set(cfg.train_data, *how, 'train', 0.0 if cfg.val_data else cfg.val_fraction)
    if cfg.val_data:
        val, _ = load_training_set(cfg.val_data, *how, 'val')
    prepare_out_dir(run, cfg, train.epoch_steps)
    measure = (lambda: evaluate(model, val, cfg, run)) if val else None
    optimizer, bar, save = begin(run, cfg, model, tok, measure)
    for step in bar:
        rows = train.at(step)
        if np.random.default_rng([cfg.seed, step]).random() < cfg.on_policy: # alike in all processes and after a resume
            rows = own_answers(model, rows, tok, cfg, run)
        measured = update(model, teacher, optimizer, rows, cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
