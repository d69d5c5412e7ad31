"""Learn by KTO from answers that somebody called good or bad, one at a time.

There are no pairs, no reward model and no sampling. Ethayarajh et al. 2024, KTO: Model alignment as prospect theoretic
optimization, https://arxiv.org/abs/2402.01306.

    python kto.py config/toy/kto.py
    python kto.py config/toy/kto.py --undesirable_weight=0.5

Records: `prompt`, `response`, `label` (true = good). Rankings and comparisons are taken apart, see read_unpaired.

docs/differences.md says what differs from the papers.
"""

import random
from dataclasses import dataclass

from common.batches import Batches, Row, collate, encode_rankings, split_by_tokens, truncate
from common.checkpoints import load_checkpoint, load_policy, prepare_out_dir, save_checkpoint
from common.options import DataOptions, fail, launch, note, require
from common.records import read_unpaired
from common.rollout import frozen_logp
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, finish_step, make_optimizer, take_step, training_bar

import torch

@dataclass
class Config(DataOptions):
    out_dir: str = 'out/kto' # the checkpoint
    init_from: str = 'out/sft' # the SFT model; also the reference
    train_data: str = '' # answers with labels, or comparisons or rankings
    beta: float = 0.1 # strength of the pull towards the reference
    desirable_weight: float = 1.0 # lambda_D, of a good answer
    undesirable_weight: float = 1.0 # lambda_U, of a bad one; the paper keeps lambda_D n_D within 1 to 4/3 lambda_U n_U
    lr: float = 5e-6

    def __post_init__(self):
        super().__post_init__()
        require(self, beta=(self.beta > 0, 'above 0'), batch_size=(self.batch_size >= 2, 'at least 2'))

def kto_loss(pi, ref, label, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """Return the KTO loss () and implicit rewards (B,) (Ethayarajh et al. 2024, section 4, L_KTO).

    With r = log pi(y|x) - log pi_ref(y|x) and lambda = the weight of the label:

        v = lambda_D sigmoid(beta * (r - z0))  for a good answer
        v = lambda_U sigmoid(beta * (z0 - r))  for a bad one            L = mean of (lambda - v)

    pi, ref: (B,) log-probabilities SUMMED over the answer's tokens, EOS included. z0: (), from kl_estimate. label:
    (B,), 1 = good, 0 = bad. The rewards are beta * r, detached.
    """
    r = pi - ref # (B,)
    sign = 2 * label - 1 # (B,)
    weight = label * desirable_weight + (1 - label) * undesirable_weight # (B,)
    return (weight * (1 - torch.sigmoid(sign * beta * (r - z0)))).mean(), (beta * r).detach()

def kl_estimate(pi, ref):
    """Estimate z0 (), KL(policy || reference), from mismatched answers (Ethayarajh et al. 2024, section 4).

        z0 = max(0, mean of (log pi(y'|x) - log pi_ref(y'|x))), y' = the answer to another prompt

    z0 is a constant to the gradient. pi, ref: (B,), summed over tokens.
    """
    return (pi - ref).mean().clamp(min=0).detach()

def mismatched(rows):
    """Pair each prompt with the next answer to another, in a circle.

    A batch may hold several answers to a prompt, and a row twice. Where all prompts are equal it is the next answer.
    """
    circle = rows + rows
    others = (next((other for other in circle[i:i + len(rows)] if other.prompt != row.prompt), circle[i])
              for i, row in enumerate(rows, 1))
    return [Row(row.prompt, other.answers, {}) for row, other in zip(rows, others)]

def tensors(rows, block_size):
    """Stack rows of one answer as idx (B, T), mask (B, T-1), lengths (B,); a mismatched prompt may be cut."""
    pairs = [(truncate(prompt, len(answer), block_size), answer) for prompt, (answer,), _ in rows]
    idx, mask = collate([(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for prompt, answer in pairs])
    return idx, mask, torch.tensor([len(prompt) + len(answer) for prompt, answer in pairs])

def labels_of(rows):
    """Return the labels (B,) of rows, 1 = good, 0 = bad."""
    return torch.tensor([float(row.record['label']) for row in rows])

def log_probs(model, rows, run, at_once):
    """Return log pi(y|x) (B,) of each row, on the CPU, without a gradient."""
    if not rows:
        return torch.zeros(0)
    with run.autocast():
        idx, mask, lengths = (x.to(run.device) for x in tensors(rows, model.config.block_size))
        return frozen_logp(model, idx, mask, lengths, at_once).sum(1).cpu()

def estimate_kl(model, reference, rows, run, at_once):
    """Return z0 () of all rows, mismatched, on the CPU; each process works on its share of them."""
    others = run.rows(mismatched(rows))
    pi, ref = (log_probs(m, others, run, at_once) for m in (model, reference)) # (B,)
    return kl_estimate(*(torch.cat(run.gather(x)) for x in (pi, ref)))

def load_data(path, tok, block_size, name):
    """Load rows of one answer each in random order; a file keeps a prompt's answers together."""
    records = read_unpaired(path, name)
    if not records:
        fail(f"{path}: all answers of every prompt tie; wanted some that are ranked above others")
    rows = encode_rankings(tok, [r | {'responses': [r['response']], 'ended': [r.get('ended', True)]} for r in records],
                           block_size, name)
    good = sum(row.record['label'] for row in rows)
    note(f"{name}: {good} good answers, {len(rows) - good} bad ones")
    random.Random(0).shuffle(rows)
    return rows

def describe(rewards, labels, run):
    """Return metrics of this process's implicit rewards and labels: means over all processes.

    What there is no answer for is left out: a mean of nothing is not 0.
    """
    everything = [pair for part in run.gather(list(zip(rewards, labels))) for pair in part]
    good, bad = ([reward for reward, label in everything if label == kind] for kind in (1.0, 0.0))
    means = {name: sum(x) / len(x) for name, x in (('desirable_reward', good), ('undesirable_reward', bad)) if x}
    return means | (dict(margin=means['desirable_reward'] - means['undesirable_reward']) if good and bad else {})

def evaluate(model, reference, rows, cfg, run):
    """Measure the loss and its metrics on held-out rows; one z0 for all of them."""
    at_once = cfg.batch_size // cfg.grad_accum
    model.eval()
    z0, mine = estimate_kl(model, reference, rows, run, at_once), run.rows(rows) # (), the share of this process
    pi, ref = (log_probs(m, mine, run, at_once) for m in (model, reference)) # (B,)
    label = labels_of(mine) # (B,)
    loss, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
    model.train()
    total = run.sum(loss * len(mine) if mine else 0.0).item()
    means = dict(loss=total / len(rows), kl=z0.item()) | describe(reward.tolist(), label.tolist(), run)
    return {'val_' + name: value for name, value in means.items()}

def update(model, reference, optimizer, rows, cfg, run, step):
    """Take one optimizer step on rows; return its metrics. Every answer weighs the same."""
    at_once = cfg.batch_size // cfg.grad_accum # rows in a pass
    z0 = estimate_kl(model, reference, rows, run, at_once).to(run.device) # (), of the whole batch
    means, rewards, labels = Means(), [], []
    for part in split_by_tokens(rows, [row.length for row in rows], cfg.grad_accum, run.world_size):
        part = run.rows(part)
        idx, mask, _ = (x.to(run.device) for x in tensors(part, model.config.block_size)) # (B, T), (B, T-1)
        label = labels_of(part).to(run.device) # (B,)
        ref = log_probs(reference, part, run, at_once).to(run.device) # (B,)
        with run.autocast():
            pi = model.logp(idx, mask).sum(1) # (B,)
        loss, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
        share = len(part) / len(rows) # of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
        rewards, labels = rewards + reward.tolist(), labels + label.tolist()
    measured = means.sum(run) | dict(kl=z0.item()) | describe(rewards, labels, run)
    return take_step(run, cfg, step, model, optimizer, measured)

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.init_from, 'init_from')
    model = load_policy(cfg.init_from, 'init_from').to(run.device)
    reference = run.freeze(load_policy(cfg.init_from, 'init_from').to(run.device).eval())
    rows = load_data(cfg.train_data, tok, model.config.block_size, 'train')
    val = load_data(cfg.val_data, tok, model.config.block_size, 'val') if cfg.val_data else None
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    prepare_out_dir(run, cfg, batches.epoch_steps)
    run.prepare(model, cfg)
    optimizer = make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = load_checkpoint(run, cfg, model, dict(policy=optimizer))

    measure = (lambda: evaluate(model, reference, val, cfg, run)) if val else None
    save = lambda step: save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer))
    bar = training_bar(run, cfg, state, measure)
    for step in bar:
        measured = update(model, reference, optimizer, [rows[i] for i in batches.at(step)], cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss', 'margin'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
