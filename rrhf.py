"""Learn from ranked answers by RRHF: the better an answer, the likelier it becomes.

Rank responses to align with human feedback: Yuan et al. 2023, https://arxiv.org/abs/2304.05302. The model scores an
answer by its own length-normalised log-probability, and also learns the best answer by cross-entropy. One model: no
reference, no critic, no sampling while it trains.

    python rrhf.py config/toy/rrhf.py
    python rrhf.py --init_from=out/hh/sft --train_data=data/hh_rlhf/comparisons_train.jsonl

docs/differences.md says what differs from the papers.
"""

from dataclasses import dataclass

from common.batches import Batches, by_length, load_rankings, own_parts, to_table
from common.checkpoints import load_policy, prepare_out_dir
from common.options import DataOptions, launch
from common.records import goodness
from common.rollout import beats, packed
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, begin, finish_step, take_step

import torch

@dataclass
class Config(DataOptions):
    out_dir: str = 'out/rrhf' # the checkpoint
    init_from: str = 'out/sft' # the SFT model, a folder or a model on the hub
    train_data: str = '' # rankings or comparisons; several files are separated by commas
    use_scores: bool = True # rank by the records' scores where they have them; False: by the ranks always
    rank_coef: float = 1.0 # weight of the ranking part; that of the cross-entropy is 1
    lr: float = 5e-6

def rrhf_loss(mean_logp, scores):
    """Return the ranking part (), a mean over prompts (Yuan et al. 2023, equations 1 and 2).

        p = log pi(y|x) / |y|          L = sum over all pairs with score_i < score_j of max(0, p_i - p_j)

    mean_logp: (B, K), mean log-probability per token of K answers, EOS included. scores: (B, K), larger = better; ties
    make no pair; nan marks an answer that is not there.
    """
    better = scores[:, :, None] > scores[:, None, :] # (B, K, K), [b, j, i]; no number is above or below nan
    excess = mean_logp[:, None, :] - mean_logp[:, :, None] # (B, K, K), p_i - p_j
    return excess[better].relu().sum() / len(scores)

def batch_loss(logp, rows, answers, cfg):
    """Return the loss (), a mean over prompts, and its metrics.

    It is rank_coef times rrhf_loss, plus the cross-entropy per token on the best answer (equation 3). logp: (N,),
    summed over the tokens of each answer of rows.
    """
    mean_logp = to_table(logp / answers.sizes, rows, 0.0) # (B, K)
    scores = torch.tensor([float(x) for row in rows for x in goodness(row.record, cfg.use_scores)], device=logp.device)
    scores = to_table(scores, rows, float('nan')) # (B, K)
    best = scores.nan_to_num(nan=-torch.inf).argmax(1) # (B,) the first of equals
    rank_loss = rrhf_loss(mean_logp, scores)
    sft_loss = -mean_logp.gather(1, best[:, None]).mean()
    pairs = scores[:, :, None] > scores[:, None, :] # (B, K, K)
    right = pairs * beats(mean_logp[:, :, None], mean_logp[:, None, :]) # (B, K, K)
    return cfg.rank_coef * rank_loss + sft_loss, dict(
        rank_loss=rank_loss, sft_loss=sft_loss,
        accuracy=(right.sum((1, 2)) / pairs.sum((1, 2))).mean()) # share of each prompt's pairs in order

@torch.no_grad()
def evaluate(model, rows, cfg, run):
    """Measure the loss and its metrics on held-out rows, means over prompts."""
    means, model = Means(), model.eval()
    for part in run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum)):
        some = [rows[i] for i in part]
        answers, logp = packed(model, some, run) # N answers, (N,)
        loss, metrics = batch_loss(logp, some, answers, cfg)
        means.add(metrics | dict(loss=loss), len(some))
    model.train()
    return {'val_' + name: value for name, value in means.mean(run).items()}

def update(model, optimizer, rows, cfg, run, step):
    """Take one optimizer step on rows; return its metrics. Every prompt weighs the same."""
    means = Means()
    for some in own_parts(rows, [row.length for row in rows], cfg, run):
        answers, logp = packed(model, some, run) # N answers, (N,)
        loss, metrics = batch_loss(logp, some, answers, cfg)
        share = len(some) / len(rows) # of the mean over the whole batch
        run.backward(loss * share)
        means.add(metrics | dict(loss=loss), share)
    return take_step(run, cfg, step, model, optimizer, means.sum(run))

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.init_from, 'init_from')
    model = load_policy(cfg.init_from, 'init_from').to(run.device)
    rows = load_rankings(cfg.train_data, tok, model.config.block_size, 'train', cfg.use_scores)
    val = load_rankings(cfg.val_data, tok, model.config.block_size, 'val', cfg.use_scores)
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    prepare_out_dir(run, cfg, batches.epoch_steps)
    measure = (lambda: evaluate(model, val, cfg, run)) if val else None
    optimizer, bar, save = begin(run, cfg, model, tok, measure)
    for step in bar:
        measured = update(model, optimizer, [rows[i] for i in batches.at(step)], cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss', 'accuracy'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
