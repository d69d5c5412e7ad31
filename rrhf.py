"""
RRHF: rank responses to align with human feedback. The model's own length-normalised log-probability is its score of an
answer: answers to a prompt are to be as likely as they were found good, and the best one is learnt by heart.

Yuan et al. 2023, https://arxiv.org/abs/2304.05302. One model: no reference, no critic, no sampling while it trains.

    python rrhf.py config/toy/rrhf.py
    python rrhf.py --init_from=out/hh/sft --train_data=data/hh_rlhf/comparisons_train.jsonl

Differs from the paper: the cross-entropy on the best answer is a mean over its tokens and not a sum, so that both parts
of the loss are log-probabilities per token, and `rank_coef` weighs the ranking part; prompts whose answers all tie are
left out. Each answer passes through the model once, behind a prompt that all its answers share.
"""

from dataclasses import dataclass

import common
import memory
from common import check_common, launch, require

import torch

from model import load_policy
from tokens import Batches, by_length, collate_answers, encode_rankings, load_tokenizer, read_ranked, to_table


@dataclass
class Config:
    out_dir: str = 'out/rrhf' # the checkpoint
    init_from: str = 'out/sft' # the SFT model, a folder or a model on the hub
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64 while training: GPUs like that; saved without them
    train_data: str = '' # rankings or comparisons; several files are separated by commas
    val_data: str = '' # the same, held out
    use_scores: bool = True # rank by the records' scores where they have them; False: by the ranks always
    rank_coef: float = 1.0 # weight of the ranking part; that of the cross-entropy is 1
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0
    batch_size: int = 32 # prompts per optimizer step, each with all its answers
    grad_accum: int = 1 # micro-batches a batch is split into
    lr: float = 5e-6
    lr_schedule: str = 'linear' # after warmup: constant, linear (to 0), cosine (to a tenth)
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta2: float = 0.99 # AdamW
    grad_clip: float = 1.0 # largest gradient norm; 0 = no clipping
    eval_every: int = 100 # steps between measurements on val_data; 0 = only at the end
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
        require(self, train_data=(self.train_data != '', 'a file of rankings or comparisons'),
                rank_coef=(self.rank_coef >= 0, 'at least 0'))


def rrhf_loss(mean_logp, scores):
    """
    The ranking part, Yuan et al. 2023, equations 1 and 2, with p = log pi(y|x) / |y|:

        L = sum over all pairs with score_i < score_j of max(0, p_i - p_j)

    the mean () over prompts. mean_logp: (B, K), mean log-probability per token of K answers, EOS included. scores:
    (B, K), larger = better; ties make no pair; nan marks an answer that is not there.
    """
    better = scores[:, :, None] > scores[:, None, :] # (B, K, K), [b, j, i]; no number is above or below nan
    excess = mean_logp[:, None, :] - mean_logp[:, :, None] # (B, K, K), p_i - p_j
    return excess[better].relu().sum() / len(scores)


def batch_loss(logp, rows, answers, cfg):
    """
    The loss (), a mean over prompts, and what is logged, given summed log-probabilities (N,) of the answers of rows
    (prompt, [answers], ranks).
    """
    mean_logp = to_table(logp / answers.sizes, rows, 0.0) # (B, K)
    ranks = torch.tensor([float(r) for _, _, ranks in rows for r in ranks], device=logp.device) # (N,)
    scores = -to_table(ranks, rows, float('nan')) # (B, K)
    best = scores.nan_to_num(nan=-torch.inf).argmax(1) # (B,) the first of equals
    rank_loss = rrhf_loss(mean_logp, scores)
    sft_loss = -mean_logp.gather(1, best[:, None]).mean() # equation 3, per token
    pairs = scores[:, :, None] > scores[:, None, :] # (B, K, K)
    right = pairs & (mean_logp[:, :, None] > mean_logp[:, None, :]) # (B, K, K)
    return cfg.rank_coef * rank_loss + sft_loss, dict(
        rank_loss=rank_loss.detach(), sft_loss=sft_loss.detach(),
        accuracy=(right.sum((1, 2)) / pairs.sum((1, 2))).mean()) # share of each prompt's pairs in order


@torch.no_grad()
def evaluate(model, rows, cfg, run):
    """The loss and the logged metrics, mean over held-out prompts."""
    totals, n = {}, 0
    model = run.whole(model).eval()
    for part in run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum)):
        some = [rows[i] for i in part]
        answers = collate_answers(some).to(run.device)
        with run.autocast():
            logp = model.answer_logp(answers) # (N,)
        loss, metrics = batch_loss(logp, some, answers, cfg)
        for k, v in (metrics | dict(loss=loss)).items():
            totals[k] = totals.get(k, 0.0) + v.item() * len(some)
        n += len(some)
    model.train()
    return {'val_' + k: v for k, v in run.mean(totals, n).items()}


def main(cfg):
    run = common.start(cfg)
    tok = load_tokenizer(cfg.init_from)
    model = load_policy(cfg.init_from, 'init_from', pad_vocab=cfg.pad_vocab).to(run.device)

    def load(path, name):
        return encode_rankings(tok, read_ranked(path, cfg.use_scores), model.config.block_size, name)

    rows = load(cfg.train_data, 'train') # (prompt, [answers], ranks or -scores)
    val = load(cfg.val_data, 'val') if cfg.val_data else None
    batches = Batches([len(p) + sum(map(len, answers)) for p, answers, _ in rows], cfg.batch_size, cfg.seed)
    cfg.max_steps = cfg.max_steps or cfg.epochs * batches.epoch_steps
    words = max(sum(map(len, answers)) for _, answers, _ in rows) # of the answers to one prompt
    memory.check(run, cfg, [model], int(batches.lengths.max()), words, words, sharing=True)
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
            common.log(run, cfg, step, **evaluate(model, val, cfg, run))

        batch, measured = batches.at(step), {}
        for part in common.split_by_tokens(batch, batches.lengths[batch], cfg.grad_accum, run.world_size):
            some = [rows[i] for i in run.rows(part)]
            answers = collate_answers(some).to(run.device)
            with run.autocast():
                logp = net('answer_logp', answers) # (N,)
            loss, metrics = batch_loss(logp, some, answers, cfg)
            share = len(some) / len(batch) # every prompt of the batch weighs the same
            run.backward(loss * share)
            for k, v in (metrics | dict(loss=loss.detach())).items():
                measured[k] = measured.get(k, 0.0) + v * share
        measured, lr = {k: run.sum(v).item() for k, v in measured.items()}, common.lr_at(step, cfg)
        common.check_finite('the loss', measured['loss'], step + 1, cfg.out_dir)
        grad_norm = common.optimizer_step(optimizer, model, lr, cfg.grad_clip, run.scaler)
        common.check_finite('the gradient norm', grad_norm, step + 1, cfg.out_dir)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            common.log(run, cfg, done, **measured, lr=lr, grad_norm=grad_norm)
            bar.set_postfix(loss=f"{measured['loss']:.4f}", accuracy=f"{measured['accuracy']:.3f}")
        if done == cfg.max_steps and val:
            found = evaluate(model, val, cfg, run)
            common.log(run, cfg, done, **found)
            common.say(run, bar, "held-out: " + ", ".join(f"{k[4:]} {v:.3f}" for k, v in found.items()))
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
