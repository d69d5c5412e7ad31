"""
The reward model: a language model whose head gives one score to a prompt and its answer, read off the last token, and
trained so that the answer that people preferred scores higher.

Stiennon et al. 2020, https://arxiv.org/abs/2009.01325, and Ouyang et al. 2022 (InstructGPT),
https://arxiv.org/abs/2203.02155, equation 1: K ranked answers make all their K(K-1)/2 pairs, in one batch.

    python reward.py config/toy/reward.py
    python reward.py --init_from=out/hh/sft --train_data=data/hh_rlhf/comparisons_train.jsonl

With --lm_coef the model goes on learning to write the preferred answers while it learns to score, which keeps what it
knows: the text-generation regularisation of Yang et al. 2024 (GRM), https://arxiv.org/abs/2406.10216, section 3.

Differs from InstructGPT: ties make no pair; the final shift and gain (mean 0, standard deviation 1 on the training
answers, which the SFT model wrote; Ziegler et al. 2019) are folded into the weights.
"""

import sys
from dataclasses import dataclass

import common
import memory
from common import check_common, launch, require

import torch
import torch.nn.functional as F

from model import load_policy
from rollout import pair_agreement
from tokens import Batches, collate_answers, encode_rankings, load_tokenizer, read_ranked, to_table


@dataclass
class Config:
    out_dir: str = 'out/reward' # the checkpoint
    init_from: str = 'out/sft' # the SFT model: a folder, or a model on the hub
    dropout: float = 0.0
    train_data: str = '' # rankings or comparisons; several files are separated by commas
    val_data: str = '' # the same, held out
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0; reward models overfit after one or two
    batch_size: int = 32 # prompts per optimizer step, each with all its answers
    grad_accum: int = 1 # micro-batches a batch is split into
    lr: float = 1e-5
    lr_schedule: str = 'cosine' # after warmup: constant, linear (to 0), cosine (to a tenth)
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta2: float = 0.99 # AdamW
    grad_clip: float = 1.0 # largest gradient norm; 0 = no clipping
    eval_every: int = 100 # steps between measurements on val_data; 0 = only at the end
    save_every: int = 500 # steps between checkpoints; 0 = only at the end
    log_every: int = 10
    lm_coef: float = 0.0 # above 0: weight of the cross-entropy on each prompt's best answers, see the docstring
    normalise_on: int = 500 # training prompts whose answers are to score mean 0, standard deviation 1 in the end
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
                lm_coef=(self.lm_coef >= 0, 'at least 0'), normalise_on=(self.normalise_on >= 1, 'at least 1'),
                dropout=(0 <= self.dropout < 1, 'at least 0 and below 1'))


def bradley_terry_loss(chosen, rejected, margin=None):
    """
    Bradley and Terry 1952: P(chosen is preferred) = sigmoid(chosen - rejected). Returns -log of it, the mean ().

    chosen, rejected: (B,) scores. margin: (B,) or None; how much better the chosen one was found, which then has to
    be exceeded (Touvron et al. 2023, Llama 2, https://arxiv.org/abs/2307.09288, equation 2).
    """
    difference = chosen - rejected # (B,)
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference).mean()


def ranking_loss(scores, ranks):
    """
    InstructGPT, equation 1: for each prompt the mean over its pairs of -log sigmoid(score_w - score_l), w ranked above
    l; then the mean () over the prompts that have a pair.

    scores: (B, K). ranks: (B, K) integers, 0 = best; ties make no pair; -1 marks an answer that is not there.
    """
    there = ranks >= 0
    better = ((ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]).float() # (B, K, K)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) # (B, K, K), [b, w, l]
    n_pairs = better.sum((1, 2)) # (B,)
    per_prompt = (losses * better).sum((1, 2)) / n_pairs.clamp(min=1) # (B,)
    return per_prompt.sum() / (n_pairs > 0).sum().clamp(min=1)


@torch.no_grad()
def score_rows(model, rows, run):
    """Scores of all answers of rows (prompt, [answers], ranks), a flat list in their order."""
    model.eval()
    parts, mine = common.split(rows, max(1, len(rows) // 32)), {}
    for i in run.rows(range(len(parts))): # each process takes its share
        with run.autocast():
            mine[i] = model.answer_rewards(collate_answers(parts[i]).to(run.device)).tolist()
    model.train()
    scores = run.merge(mine)
    return [score for i in range(len(parts)) for score in scores[i]]


def evaluate(model, rows, records, run):
    """
    Held-out agreement with the preferences, of the model and of two references: {name: share of pairs}.

    ceiling: the annotator's own noise-free scores, where the records have them. shorter_wins: take the shorter answer.
    """
    flat = score_rows(run.whole(model), rows, run)
    points, start = {}, 0
    for (_, answers, ranks), record in zip(rows, records):
        guesses = {'accuracy': flat[start:start + len(answers)], 'ceiling': record.get('scores'),
                   'shorter_wins': [-len(text) for text in record['responses']]}
        start += len(answers)
        for name, scores in guesses.items():
            if scores is not None:
                right, n = pair_agreement(scores, ranks)
                total = points.setdefault(name, [0, 0])
                total[0], total[1] = total[0] + right, total[1] + n
    return {name: right / max(1, n) for name, (right, n) in points.items()}


def load_data(path, tok, block_size, name):
    """Encoded rows (prompt, [answers], ranks) and the records they come from, those left out by length excepted."""
    records = read_ranked(path)
    numbered = [r | {'ranks': i} for i, r in enumerate(records)] # the encoder passes them through
    rows = encode_rankings(tok, numbered, block_size, name)
    return [(p, answers, records[i]['ranks']) for p, answers, i in rows], [records[i] for _, _, i in rows]


def main(cfg):
    run = common.start(cfg)
    tok = load_tokenizer(cfg.init_from)
    model = load_policy(cfg.init_from, 'init_from', reward_head=True, dropout=cfg.dropout).to(run.device)
    block_size = model.config.block_size

    rows, records = load_data(cfg.train_data, tok, block_size, 'train')
    val = load_data(cfg.val_data, tok, block_size, 'val') if cfg.val_data else None
    margins = [float(r.get('margin', 0.0)) if 'chosen' in r else 0.0 for r in records] # comparisons alone have one
    batches = Batches([len(p) + sum(map(len, answers)) for p, answers, _ in rows], cfg.batch_size, cfg.seed)
    cfg.max_steps = cfg.max_steps or cfg.epochs * batches.epoch_steps
    K = max(len(answers) for _, answers, _ in rows)
    words = max(sum(map(len, answers)) for _, answers, _ in rows) if cfg.lm_coef else 0 # learnt in one row, at most
    memory.check(run, cfg, [model], int(batches.lengths.max()), K + words, words, sharing=True)
    common.prepare_out_dir(run, cfg) # once all input is read: what is wrong with it costs no old checkpoint

    net = run.parallel(model, cfg.compile, cfg.fsdp, cfg.checkpointing)
    optimizer = common.make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = common.load_checkpoint(run, cfg, model, dict(policy=optimizer))
    if state and state['before_normalising']: # the run had come to its end: go on from the scores it trained
        common.load_weights(model, state['before_normalising'])
    first = state['step'] if state else 0

    def save(step):
        whole, before = run.whole(model), {}
        if step == cfg.max_steps:
            changed = ('reward_head.weight', 'ln_f.bias')
            before = {k: v.clone() for k, v in whole.state_dict().items() if k in changed}
            scores = torch.tensor(score_rows(whole, rows[:cfg.normalise_on], run))
            if not scores.std() > 1e-6: # one text alone, or a model that has fallen silent
                print(f"error: the scores of the training answers do not differ, they cannot be normalised; nothing "
                      f"was saved since the last checkpoint in {cfg.out_dir}", file=sys.stderr)
                raise SystemExit(1)
            whole.normalise_rewards(scores.mean(), scores.std())
        common.save_checkpoint(run, cfg, whole, tok, step, dict(policy=optimizer), before_normalising=before)

    bar = common.training_bar(run, cfg, first)
    for step in bar:
        if val and cfg.eval_every and step % cfg.eval_every == 0:
            common.log(run, cfg, step, val_accuracy=evaluate(model, *val, run)['accuracy'])

        batch = batches.at(step)
        # tokens of every prompt's best answers, in the whole batch
        n_best = sum(len(a) for i in batch for a, rank in zip(*rows[i][1:]) if rank == min(rows[i][2]))
        loss = right = n_pairs = 0.0
        for part in common.split_by_tokens(batch, batches.lengths[batch], cfg.grad_accum, run.world_size):
            part = run.rows(part)
            some = [rows[i] for i in part]
            answers = collate_answers(some) # N answers to B prompts
            best = torch.tensor([r == min(ranks) for _, _, ranks in some for r in ranks]) # (N,)
            answers = answers.learnt(best).to(run.device)
            with run.autocast():
                if cfg.lm_coef:
                    scores, logp = net('answer_rewards_and_logp', answers) # (N,) each, logp of the best answers alone
                else:
                    scores = net('answer_rewards', answers) # (N,)
            better, worse = scores[answers.pairs].unbind(1) # one entry per pair
            if any(margins):
                margin = torch.tensor([margins[i] for i in part], device=run.device) # (B,), comparisons: one pair each
                loss_part = bradley_terry_loss(better, worse, margin)
            else:
                ranks = torch.tensor([r for _, _, ranks in some for r in ranks], device=run.device) # (N,)
                loss_part = ranking_loss(to_table(scores, some, 0.0), to_table(ranks, some, -1)) # (B, K) each
            loss_part = loss_part * len(part) / len(batch) # every prompt of the batch weighs the same
            if cfg.lm_coef: # and every token of the best answers
                loss_part = loss_part - cfg.lm_coef * logp.sum() / n_best
            run.backward(loss_part)
            loss += loss_part.detach()
            right, n_pairs = right + (better > worse).sum(), n_pairs + len(better)
        loss, lr = run.sum(loss).item(), common.lr_at(step, cfg)
        common.check_finite('the loss', loss, step + 1, cfg.out_dir)
        grad_norm = common.optimizer_step(optimizer, model, lr, cfg.grad_clip, run.scaler)
        common.check_finite('the gradient norm', grad_norm, step + 1, cfg.out_dir)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            accuracy = (run.sum(right) / run.sum(n_pairs)).item()
            common.log(run, cfg, done, loss=loss, accuracy=accuracy, lr=lr, grad_norm=grad_norm)
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.3f}")
        if done == cfg.max_steps and val:
            measured = evaluate(model, *val, run)
            common.log(run, cfg, done, **{'val_' + k: v for k, v in measured.items()})
            text = ", ".join(f"{k} {v:.3f}" for k, v in measured.items())
            common.say(run, bar, "held-out pairs ordered as preferred: " + text)
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
