"""
Supervised training: a base model from plain text, or an assistant from demonstrations, by cross-entropy; or a student
that takes over the token distributions of a teacher.

On demonstrations the loss counts the tokens of the responses, end of text included, so that the model learns to stop
(Ouyang et al. 2022, InstructGPT, https://arxiv.org/abs/2203.02155, section 3.5, step 1). With --loss_on=all every
token counts; on plain text that is ordinary language modelling (Radford et al. 2019). With --teacher=FOLDER the
student learns, at the same tokens, the teacher's whole distribution (Hinton et al. 2015, Distilling the knowledge in a
neural network, https://arxiv.org/abs/1503.02531, section 2); the texts say only where.

    python sft.py config/toy/pretrain.py
    python sft.py config/toy/sft.py --lr=1e-3
    python sft.py config/toy/distill.py --temperature=2

Differs from InstructGPT: no dropout, a few epochs at most, and the loss is a mean over the tokens of the whole batch,
whatever micro-batch or process they lie in. Differs from Hinton et al.: the KL divergence and not the cross-entropy, so
that a perfect student's loss is 0 (their gradients are the same), and no second term on the texts' own tokens.
"""

import math
from dataclasses import dataclass

import common
import memory
from common import check_common, launch, require

import torch

from model import GPT, GPTConfig, load_policy
from rollout import check_context, check_same_vocabulary, masked_mean
from tokens import collate, load_tokenizer, load_training_set


@dataclass
class Config:
    out_dir: str = 'out/sft' # the checkpoint
    init_from: str = 'scratch' # scratch, a checkpoint folder, or a model on the hub: gpt2, gpt2-xl, OWNER/NAME
    tokenizer: str = 'gpt2' # with scratch: gpt2, bytes or a .tiktoken file
    n_layer: int = 12 # with scratch: the model's shape
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024 # with scratch: the model's context; rows are at most this long
    dropout: float = 0.0
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64 while training: GPUs like that; saved without them
    train_data: str = '' # demonstrations (.jsonl), or text (.jsonl or .txt)
    val_data: str = '' # the same, held out
    val_fraction: float = 0.0 # without val_data: hold out this last part of train_data
    loss_on: str = 'response' # response, or all tokens; text always counts all
    packed: bool = True # text: windows of block_size tokens, across documents; False: one document a row
    teacher: str = '' # a checkpoint folder: learn its token distributions in place of the tokens; empty = none
    temperature: float = 1.0 # with a teacher: both distributions are softened by it
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0, demonstrations only
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
    save_every: int = 500 # steps between checkpoints; 0 = only at the end
    log_every: int = 10
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that
    compile: bool = False # torch.compile: pays off after minutes
    checkpointing: bool = False # work activations out again in the backward pass: less memory, more time
    fsdp: bool = False # several processes: each keeps a part of the weights that are trained, for large models
    resume: bool = False # go on from the checkpoint in out_dir
    overwrite: bool = False # replace the checkpoint in out_dir

    def __post_init__(self):
        check_common(self)
        require(self, loss_on=(self.loss_on in ('response', 'all'), 'response or all'),
                train_data=(self.train_data != '', 'a file of demonstrations or text'),
                val_fraction=(0 <= self.val_fraction < 1, 'at least 0 and below 1'),
                dropout=(0 <= self.dropout < 1, 'at least 0 and below 1'),
                temperature=(self.temperature > 0, 'above 0'))


def sft_loss(logp, mask):
    """
    Cross-entropy () in nats per counted token: -sum(mask * logp) / sum(mask).

    logp: (B, T-1) log-probabilities of tokens 1 … T-1. mask: (B, T-1), 1 = counted.
    """
    return -masked_mean(logp, mask)


def distillation_loss(student, teacher, temperature):
    """
    Hinton et al. 2015, section 2: KL () in nats per counted token from the teacher to the student, both at temperature
    T, times T^2 so that the gradient keeps its size whatever T is (a softened gradient is smaller by 1 / T^2):

        p = softmax(teacher / T)      q = softmax(student / T)      L = T^2 * mean over n of sum_v p log(p / q)

    student, teacher: logits (N, V) at the N counted tokens. The teacher's carry no gradient.
    """
    logp = (teacher.detach() / temperature).log_softmax(-1) # (N, V)
    logq = (student / temperature).log_softmax(-1) # (N, V)
    return temperature ** 2 * (logp.exp() * (logp - logq)).sum() / max(1, len(logp))


def load_teacher(cfg, model, tok):
    """The teacher, if there is one: it has to read the student's tokens, and rows as long as the student's."""
    if not cfg.teacher:
        return None
    teacher = load_policy(cfg.teacher, 'teacher')
    check_same_vocabulary(model, teacher, 'teacher', cfg.teacher, tok)
    check_context(model, teacher, 'teacher', cfg.teacher, "student's")
    return teacher.eval()


@torch.no_grad()
def evaluate(model, data, run, cfg):
    """
    Mean cross-entropy in nats per counted token over the first eval_batches batches of held-out data; of a teacher's
    student too, so that it can be compared with the teacher's own.
    """
    total = counted = 0.0
    model = run.whole(model).eval()
    for batch in run.rows(data.in_order(cfg.eval_batches, cfg.grad_accum)): # each process takes its share of them
        idx, mask = (x.to(run.device) for x in collate(batch))
        with run.autocast():
            logp = model.logp(idx, mask) # (B, T-1)
        total, counted = total + (logp * mask).sum().item(), counted + mask.sum().item()
    model.train()
    return -(run.sum(total) / run.sum(counted)).item()


def main(cfg):
    run = common.start(cfg)

    # model
    if cfg.init_from == 'scratch':
        tok = load_tokenizer(cfg.tokenizer)
        model = GPT(GPTConfig(cfg.block_size, tok.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout,
                              pad_vocab=cfg.pad_vocab))
    else:
        tok = load_tokenizer(cfg.init_from)
        model = load_policy(cfg.init_from, 'init_from', dropout=cfg.dropout, pad_vocab=cfg.pad_vocab)
    model.to(run.device)
    block_size = model.config.block_size
    teacher = load_teacher(cfg, model, tok)
    if teacher:
        run.freeze(teacher.to(run.device))

    # data
    train, val = load_training_set(cfg.train_data, tok, block_size, cfg.batch_size, cfg.seed, cfg.loss_on, cfg.packed,
                                   'train', 0.0 if cfg.val_data else cfg.val_fraction)
    if cfg.val_data:
        val, _ = load_training_set(cfg.val_data, tok, block_size, cfg.batch_size, cfg.seed, cfg.loss_on, cfg.packed,
                                    'val')
    cfg.max_steps = cfg.max_steps or cfg.epochs * train.epoch_steps
    memory.check(run, cfg, [model], train.T, train.words, train.words, [teacher] if teacher else [])
    common.prepare_out_dir(run, cfg) # once all input is read: what is wrong with it costs no old checkpoint

    net = run.parallel(model, cfg.compile, cfg.fsdp, cfg.checkpointing)
    optimizer = common.make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = common.load_checkpoint(run, cfg, model, dict(policy=optimizer))
    first = state['step'] if state else 0

    def save(step):
        common.save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer))

    bar = common.training_bar(run, cfg, first)
    for step in bar:
        if val and cfg.eval_every and step % cfg.eval_every == 0:
            common.log(run, cfg, step, val_loss=evaluate(model, val, run, cfg))

        # every counted token of the whole batch weighs the same, whatever micro-batch or process it lands in
        rows = train.at(step)
        parts = common.split_by_tokens(rows, [len(ids) for ids, _ in rows], cfg.grad_accum, run.world_size)
        micro = [collate(run.rows(part)) for part in parts]
        n_tokens = run.sum(sum(mask.sum() for _, mask in micro)) # ()
        loss = 0.0
        for idx, mask in micro: # (B, T), (B, T-1)
            idx, mask = idx.to(run.device), mask.to(run.device)
            with run.autocast():
                if teacher:
                    with torch.no_grad():
                        wanted = teacher.masked_logits(idx, mask) # (N, V), at the counted tokens only
                    part = distillation_loss(net('masked_logits', idx, mask), wanted, cfg.temperature) # ()
                else:
                    part = sft_loss(net('logp', idx, mask), mask) # ()
            part = part * mask.sum() / n_tokens # this micro-batch's share of the mean, ()
            run.backward(part)
            loss += part.detach()
        loss, lr = run.sum(loss).item(), common.lr_at(step, cfg)
        common.check_finite('the loss', loss, step + 1, cfg.out_dir)
        grad_norm = common.optimizer_step(optimizer, model, lr, cfg.grad_clip, run.scaler)
        common.check_finite('the gradient norm', grad_norm, step + 1, cfg.out_dir)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            common.log(run, cfg, done, loss=loss, lr=lr, grad_norm=grad_norm)
            bar.set_postfix(loss=f"{loss:.4f}")
        if done == cfg.max_steps and val:
            val_loss = evaluate(model, val, run, cfg)
            common.log(run, cfg, done, val_loss=val_loss)
            common.say(run, bar, f"held-out loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}")
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
