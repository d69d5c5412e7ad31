"""Train a reward model: it scores a prompt and its answer by one number.

The score is read off the last token. Training makes the answer that people preferred score higher: Stiennon et al.
2020, https://arxiv.org/abs/2009.01325, and equation 1 of Ouyang et al. 2022 (InstructGPT),
https://arxiv.org/abs/2203.02155. K ranked answers make all their K(K-1)/2 pairs, in one batch.

    python reward.py config/toy/reward.py
    python reward.py --init_from=out/hh/sft --train_data=data/hh_rlhf/comparisons_train.jsonl
    python reward.py --loss=regression --init_from=out/sft --train_data=out/anna.jsonl,out/ben.jsonl

With --loss=regression it learns numbers that people gave single answers: Wang et al. 2024 (HelpSteer2),
https://arxiv.org/abs/2406.08673. With --lm_coef the model keeps predicting the preferred answers (of rated ones those
above the mean), which preserves its knowledge: text-generation regularisation, Yang et al. 2024 (GRM),
https://arxiv.org/abs/2406.10216, section 3.

docs/differences.md says what differs from the papers.
"""

import math
from collections import Counter
from dataclasses import dataclass

from common.batches import Batches, collate_answers, load_rankings, own_parts, split, to_table
from common.checkpoints import load_checkpoint, load_policy, prepare_out_dir, save_checkpoint
from common.options import DataOptions, fail, launch, require
from common.rollout import beats, pair_agreement, score_packed
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, finish_step, make_optimizer, take_step, training_bar
from feedback.agreement import standardise

import torch
import torch.nn.functional as F

@dataclass
class Config(DataOptions):
    out_dir: str = 'out/reward' # the checkpoint
    init_from: str = 'out/sft' # the SFT model: a folder, or a model on the hub
    dropout: float = 0.0
    train_data: str = '' # rankings, comparisons or ratings; several files are separated by commas
    loss: str = 'pairwise' # or regression, on ratings; rankings with `scores` are such too
    lr: float = 1e-5
    lr_schedule: str = 'cosine'
    lm_coef: float = 0.0 # above 0: weight of the cross-entropy on the preferred answers, see the docstring
    normalise_on: int = 500 # training prompts whose answers are to score mean 0, standard deviation 1 in the end

    def __post_init__(self):
        super().__post_init__()
        require(self, loss=(self.loss in ('pairwise', 'regression'), 'pairwise or regression'))

def bradley_terry_loss(chosen, rejected, margin=None):
    """Return the mean () of -log P(chosen is preferred), by Bradley and Terry 1952.

        P(chosen is preferred) = sigmoid(chosen - rejected)

    chosen, rejected: (B,) scores. margin: (B,) or None, how much better chosen was found. The difference then has to
    exceed it (Touvron et al. 2023, Llama 2, https://arxiv.org/abs/2307.09288, equation 2).
    """
    difference = chosen - rejected # (B,)
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference).mean()

def ranking_loss(scores, ranks):
    """Return the loss () over all pairs of ranked answers (Ouyang et al. 2022, InstructGPT, equation 1).

        L = mean over prompts of  mean over its pairs, w ranked above l, of  -log sigmoid(score_w - score_l)

    scores: (B, K). ranks: (B, K), 0 = best; -1 marks an answer that is not there. Prompts without a pair do not count.
    """
    there = ranks >= 0
    better = ((ranks[:, :, None] < ranks[:, None, :]) & there[:, :, None] & there[:, None, :]).float() # (B, K, K)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) # (B, K, K), [b, w, l]
    n_pairs = better.sum((1, 2)) # (B,)
    per_prompt = (losses * better).sum((1, 2)) / n_pairs.clamp(min=1) # (B,)
    return per_prompt.sum() / (n_pairs > 0).sum().clamp(min=1)

def regression_loss(scores, ratings):
    """Return the mean squared distance () of scores to standardised ratings; both (N,).

        L = mean of (score - z)^2            z = (rating - mean) / std, both over all answers of the file
    """
    return ((scores - ratings) ** 2).mean()

@torch.no_grad()
def normalise_rewards(model, mean, std):
    """Make model.rewards() return (score - mean) / std from now on.

    The gain goes into the reward head. The shift goes into the final layer norm's bias along the head's direction w:
    w·(shift w / w·w) = shift. So the checkpoint needs no extra numbers, and other tools compute the same scores.
    """
    w = model.reward_head.weight[0] # (C,)
    w /= std
    model.ln_f.bias -= (mean / std) * w / w.dot(w)

def ratings_of(rows):
    """Return the standardised ratings (N,) of all answers of rows."""
    return torch.tensor([rating for row in rows for rating in row.record['ratings']])

def preference_loss(scores, rows, margins, loss='pairwise'):
    """Return the loss () of scores (N,), of all answers of rows; margins: as in update."""
    if loss == 'regression':
        return regression_loss(scores, ratings_of(rows).to(scores.device))
    ranks = torch.tensor([rank for row in rows for rank in row.ranks], device=scores.device) # (N,)
    if margins: # of comparisons, a pair each
        margin = torch.tensor([margin_of(row) for row in rows], device=scores.device) # (B,)
        return bradley_terry_loss(scores[ranks == 0], scores[ranks == 1], margin)
    return ranking_loss(to_table(scores, rows, 0.0), to_table(ranks, rows, -1)) # (B, K) each

def score_rows(model, rows, run):
    """Score all answers of rows, a flat list in their order; each process scores its share of the rows."""
    parts = split(rows, max(1, len(rows) // 32))
    model.eval()
    scores = run.merge({i: score_packed(model, parts[i], run).tolist() for i in run.rows(range(len(parts)))})
    model.train()
    return [score for i in range(len(parts)) for score in scores[i]]

def evaluate(model, rows, run, margins=False, loss='pairwise'):
    """Measure the loss and the share of held-out pairs ordered as preferred.

    val_loss: as in update, without the part of lm_coef. val_correlation: of scores and ratings. val_accuracy: by the
    model. val_ceiling: by the annotator's own noise-free scores, where the records have them. val_shorter_wins: by
    length, the shorter one first. val_pairs: their number. margins: as in update.
    """
    scores = torch.tensor(score_rows(model, rows, run)) # (N,)
    measured, right, pairs = dict(val_loss=preference_loss(scores, rows, margins, loss).item()), Counter(), Counter()
    if loss == 'regression':
        measured['val_correlation'] = torch.stack([scores, ratings_of(rows)]).corrcoef()[0, 1].item()
    for row, own in zip(rows, scores.split([len(row.answers) for row in rows])):
        guesses = dict(val_accuracy=own.tolist(), val_ceiling=row.record.get('scores'),
                       val_shorter_wins=[-len(text) for text in row.record['responses']])
        for name, guess in guesses.items():
            if guess is not None:
                points, n = pair_agreement(guess, row.ranks)
                right[name], pairs[name] = right[name] + points, pairs[name] + n
    shares = {name: right[name] / n for name, n in pairs.items() if n} # ratings need not make a pair
    return measured | shares | dict(val_pairs=pairs['val_accuracy'])

def margin_of(row):
    """Return how much better chosen was found than rejected, 0 for rankings."""
    return float(row.record.get('margin', 0.0)) if 'chosen' in row.record else 0.0

def update(model, optimizer, rows, cfg, run, step, margins=False):
    """Take one optimizer step on rows of ranked answers; return its metrics.

    Every prompt of the whole batch weighs the same, and with lm_coef every token of the best answers, n in all:

        L = ranking_loss - lm_coef / n * sum of log pi of these tokens

    With loss=regression it is regression_loss, and every answer weighs the same; the best ones are those rated above
    the mean. margins: the training set has some, and the loss is bradley_terry_loss.
    """
    regression = cfg.loss == 'regression'
    best = lambda row: ([rating > 0 for rating in row.record['ratings']] if regression
                        else [rank == min(row.ranks) for rank in row.ranks])
    weight = lambda rows: sum(len(row.answers) for row in rows) if regression else len(rows)
    n_best = sum(len(answer) for row in rows for answer, is_best in zip(row.answers, best(row)) if is_best) # tokens
    means, right, n_pairs = Means(), 0.0, 0
    for part in own_parts(rows, [row.length for row in rows], cfg, run):
        answers = collate_answers(part).to(run.device) # N answers
        learnt = answers.mask.new_tensor([is_best and cfg.lm_coef > 0 for row in part for is_best in best(row)]) # (N,)
        mask = answers.mask * learnt[:, None] # (N, T-1), of the best answers alone
        with run.autocast():
            logp, scores = model.logp_rewards(answers.idx, mask, answers.lengths, answers.groups) # (N, T-1), (N,)
        better, worse = scores[answers.pairs].unbind(1) # one entry per pair
        loss = preference_loss(scores, part, margins, cfg.loss) * weight(part) / weight(rows)
        if cfg.lm_coef:
            loss = loss - cfg.lm_coef * logp.sum() / max(n_best, 1)
        run.backward(loss)
        means.add(dict(loss=loss), 1.0)
        right, n_pairs = right + beats(better, worse).sum(), n_pairs + len(better)
    measured = means.sum(run)
    if n_pairs := run.sum(n_pairs): # ratings need not make one
        measured['accuracy'] = (run.sum(right) / n_pairs).item()
    return take_step(run, cfg, step, model, optimizer, measured)

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.init_from, 'init_from')
    model = load_policy(cfg.init_from, 'init_from', reward_head=True, dropout=cfg.dropout).to(run.device)
    rows, val = (load_rankings(path, tok, model.config.block_size, name, ties=cfg.loss == 'regression')
                 for path, name in ((cfg.train_data, 'train'), (cfg.val_data, 'val')))
    if cfg.loss == 'regression':
        rows, val = standardise(rows, cfg.train_data), val and standardise(val, cfg.val_data)
    margins = any(map(margin_of, rows))
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    prepare_out_dir(run, cfg, batches.epoch_steps)
    run.prepare(model, cfg)
    optimizer = make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = load_checkpoint(run, cfg, model, dict(policy=optimizer))
    if state: # its weights are normalised
        model.load_state_dict(state['before_normalising'], strict=False)
    measure = (lambda: evaluate(model, val, run, margins, cfg.loss)) if val else None

    def save(step):
        before = {k: model.state_dict()[k].clone() for k in ('reward_head.weight', 'ln_f.bias')}
        scores = torch.tensor(score_rows(model, rows[:cfg.normalise_on], run))
        if 1e-6 < scores.std() < math.inf:
            normalise_rewards(model, scores.mean(), scores.std())
        elif step == cfg.max_steps: # only one text, or a model that scores all alike
            fail("the scores of the training answers do not differ, they cannot be normalised; nothing was saved "
                 f"since the last checkpoint in {cfg.out_dir}", code=1)
        save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer), before_normalising=before)
        model.load_state_dict(before, strict=False) # training goes on with these
    bar = training_bar(run, cfg, state, measure)
    for step in bar:
        measured = update(model, optimizer, [rows[i] for i in batches.at(step)], cfg, run, step, margins)
        finish_step(run, cfg, bar, step + 1, measured, ['loss', 'accuracy'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
