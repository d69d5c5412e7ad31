"""Train by cross-entropy on text or demonstrations, or learn from a teacher.

On demonstrations the loss counts the tokens of the responses, end of text included, so that the model learns to stop
(Ouyang et al. 2022, InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5, step 1). With --loss_on=all every token
counts. On plain text this is ordinary language modelling (Radford et al. 2019). With --teacher=FOLDER a student learns
the teacher's whole distribution at the same tokens (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2).

    python sft.py config/toy/pretrain.py
    python sft.py config/toy/sft.py --lr=1e-3
    python sft.py config/toy/distill.py --temperature=2

Differs from InstructGPT: no dropout; the loss is a mean over all tokens of the whole batch. Differs from Hinton et al.:
the KL divergence, so that a perfect student's loss is 0, and no second term on the texts' own tokens.
"""

from dataclasses import dataclass

from common.batches import collate, load_training_set, split_by_tokens
from common.checkpoints import load_checkpoint, load_policy, log, prepare_out_dir, save_checkpoint
from common.options import TrainOptions, launch, require
from common.rollout import check_context, check_same_vocabulary, masked_mean
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, finish_step, make_optimizer, take_step, training_bar
from model import GPT, GPTConfig

import torch

@dataclass
class Config(TrainOptions):
    out_dir: str = 'out/sft' # the checkpoint
    init_from: str = 'scratch' # scratch, a checkpoint folder, or a model on the hub: gpt2, gpt2-xl, OWNER/NAME
    tokenizer: str = 'gpt2' # with scratch: gpt2, bytes or a .tiktoken file
    n_layer: int = 12 # with scratch: the model's shape
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024 # with scratch: the model's context; rows are at most this long
    dropout: float = 0.0
    train_data: str = '' # demonstrations (.jsonl), or text (.jsonl or .txt)
    val_data: str = '' # the same, held out
    val_fraction: float = 0.0 # without val_data: hold out this share of train_data's prompts, of packed text the end
    loss_on: str = 'response' # response, or all tokens; text always counts all
    packed: bool = True # text: windows of block_size tokens, across documents; False: one document a row
    teacher: str = '' # a checkpoint folder: learn its token distributions in place of the tokens; empty = none
    temperature: float = 1.0 # with a teacher: both distributions are softened by it
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0
    batch_size: int = 32 # rows per optimizer step, over all processes and micro-batches
    grad_accum: int = 1 # micro-batches a batch is split into
    lr: float = 1e-4
    lr_schedule: str = 'cosine' # after warmup: constant, linear (to 0), cosine (to a tenth)
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta2: float = 0.99 # AdamW
    grad_clip: float = 1.0 # largest gradient norm; 0 = no clipping
    eval_every: int = 200 # steps between measurements on val_data; 0 = only at the end
    eval_batches: int = 50 # batches of val_data per measurement; 0 = all of it

    def __post_init__(self):
        super().__post_init__()
        require(self, loss_on=(self.loss_on in ('response', 'all'), 'response or all'),
                train_data=(self.train_data != '', 'a file of demonstrations or text'),
                val_fraction=(0 <= self.val_fraction < 1, 'at least 0 and below 1'),
                dropout=(0 <= self.dropout < 1, 'at least 0 and below 1'),
                temperature=(self.temperature > 0, 'above 0'))

def sft_loss(logp, mask):
    """Return the cross-entropy () in nats per counted token (Radford et al. 2018, equation 1, negated).

        L = -sum(mask * logp) / sum(mask)

    logp: (B, T-1) log-probabilities of tokens 1 … T-1. mask: (B, T-1), 1 = counted.
    """
    return -masked_mean(logp, mask)

def distillation_loss(student, teacher, temperature):
    """Return the KL () from teacher to student, in nats per counted token.

    Both are softened by the temperature T (Hinton et al. 2015, section 2). Softening shrinks the gradient by 1 / T^2,
    so T^2 restores its size:

        p = softmax(teacher / T)      q = softmax(student / T)      L = T^2 * mean over n of sum_v p log(p / q)

    student, teacher: logits (N, V) at the N counted tokens. The teacher's carry no gradient.
    """
    logp = (teacher.detach() / temperature).log_softmax(-1) # (N, V)
    logq = (student / temperature).log_softmax(-1) # (N, V)
    return temperature ** 2 * (logp.exp() * (logp - logq)).sum() / max(1, len(logp))

def load_teacher(cfg, model, tok):
    """Load the teacher, if there is one; it has to read the student's tokens and rows."""
    if not cfg.teacher:
        return None
    teacher = load_policy(cfg.teacher, 'teacher')
    check_same_vocabulary(model, teacher, 'teacher', cfg.teacher, tok)
    check_context(model, teacher, 'teacher', cfg.teacher, "student's")
    return teacher.eval()

@torch.no_grad()
def evaluate(model, data, cfg, run):
    """Measure the cross-entropy in nats per counted token of held-out data; a student's too."""
    total = counted = 0.0
    model = run.whole(model).eval()
    for batch in run.rows(data.in_order(cfg.eval_batches, cfg.grad_accum)): # the share of this process
        idx, mask = (x.to(run.device) for x in collate(batch))
        with run.autocast():
            logp = model.logp(idx, mask) # (B, T-1)
        total, counted = total + (logp * mask).sum().item(), counted + mask.sum().item()
    model.train()
    return dict(val_loss=-(run.sum(total) / run.sum(counted)).item())

def update(model, teacher, optimizer, rows, cfg, run, step):
    """Take one optimizer step on rows (ids, mask); return its metrics. Every counted token weighs the same."""
    parts = split_by_tokens(rows, [len(ids) for ids, _ in rows], cfg.grad_accum, run.world_size)
    micro = [collate(run.rows(part)) for part in parts] # (B, T), (B, T-1) each
    n_tokens = run.sum(sum(mask.sum() for _, mask in micro)) # ()
    means = Means()
    for idx, mask in micro:
        idx, mask = idx.to(run.device), mask.to(run.device)
        with run.autocast():
            if teacher:
                with torch.no_grad():
                    wanted = teacher.logits_at(idx, mask) # (N, V), at the counted tokens only
                loss = distillation_loss(model.logits_at(idx, mask), wanted, cfg.temperature) # ()
            else:
                loss = sft_loss(model.logp(idx, mask), mask) # ()
        share = mask.sum() / n_tokens # (), of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
    return take_step(run, cfg, step, model, optimizer, means.sum(run))

def main(cfg):
    run = start(cfg)

    # model
    if cfg.init_from == 'scratch':
        tok = load_tokenizer(cfg.tokenizer)
        model = GPT(GPTConfig(cfg.block_size, tok.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout))
    else:
        tok = load_tokenizer(cfg.init_from, 'init_from')
        model = load_policy(cfg.init_from, 'init_from', dropout=cfg.dropout)
    model.to(run.device)
    teacher = load_teacher(cfg, model, tok)
    if teacher:
        run.freeze(teacher.to(run.device))

    # data
    how = (tok, model.config.block_size, cfg.batch_size, cfg.seed, cfg.loss_on, cfg.packed)
    train, val = load_training_set(cfg.train_data, *how, 'train', 0.0 if cfg.val_data else cfg.val_fraction)
    if cfg.val_data:
        val, _ = load_training_set(cfg.val_data, *how, 'val')
    cfg.max_steps = cfg.max_steps or cfg.epochs * train.epoch_steps
    prepare_out_dir(run, cfg)

    run.prepare(model, cfg)
    optimizer = make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = load_checkpoint(run, cfg, model, dict(policy=optimizer))

    measure = lambda: evaluate(model, val, cfg, run)

    def save(step):
        save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer))

    bar = training_bar(run, cfg, state)
    for step in bar:
        if val and cfg.eval_every and step % cfg.eval_every == 0:
            log(run, cfg, step, **measure())
        measured = update(model, teacher, optimizer, train.at(step), cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss'], save, measure if val else None)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
