"""Learn by KTO from answers that somebody called good or bad, one at a time.

There are no pairs, no reward model and no sampling. Ethayarajh et al. 2024, KTO: Model alignment as prospect theoretic
optimization, https://arxiv.org/abs/2402.01306.

    python kto.py config/toy/kto.py
    python kto.py config/toy/kto.py --desirable_weight=1

Records: `prompt`, `response`, `label` (true = good). Rankings and comparisons are taken apart, see read_unpaired.

docs/differences.md says what differs from the papers.
"""

import random
from dataclasses import dataclass

from common.batches import Batches, Row, encode_rankings, own_parts, truncate
from common.checkpoints import load_policy, prepare_out_dir
from common.options import DataOptions, fail, launch, note, require
from common.records import read_unpaired
from common.rollout import answer_logp, packed
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, begin, finish_step, take_step

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

def mismatched(rows, block_size):
    """Pair each prompt with the next answer to another, in a circle; a prompt is cut to fit.

    A batch may hold several answers to a prompt, and a row twice. Where all prompts are equal it is the next answer.
    """
    circle = rows + rows
    others = (next((other for other in circle[i:i + len(rows)] if other.prompt != row.prompt), circle[i]).answers
              for i, row in enumerate(rows, 1))
    return [Row(truncate(row.prompt, len(other[0]), block_size), other, {}) for row, other in zip(rows, others)]

def labels_of(rows):
    """Return the labels (B,) of rows, 1 = good, 0 = bad."""
    return torch.tensor([float(row.record['label']) for row in rows])

def estimate_kl(model, reference, rows, cfg, run):
    """Return z0 () of all rows, mismatched, on the CPU."""
    others = mismatched(rows, model.config.block_size)
    return kl_estimate(*(torch.cat(answer_logp(m, others, cfg, run)) for m in (model, reference)))

def load_data(path, tok, block_size, name):
    """Load rows of one answer each in random order; a file keeps a prompt's answers together."""
    records = read_unpaired(path, name)
    if not records:
        fail(f"{path}: all answers of every prompt tie; wanted some that are ranked above others")
    records = [dict(prompt=r['prompt'], responses=[r['response']], ended=[r.get('ended', True)], label=r['label'])
               for r in records]
    rows = encode_rankings(tok, records, block_size, name)
    good = sum(row.record['label'] for row in rows)
    note(f"{name}: {good} good answers, {len(rows) - good} bad ones")
    random.Random(0).shuffle(rows)
    return rows

def describe(rewards, labels):
    """Return means of implicit rewards, by their labels; what there is no answer for is left out, not 0."""
    good, bad = ([reward for reward, label in zip(rewards, labels) if label == kind] for kind in (1.0, 0.0))
    means = {name: sum(x) / len(x) for name, x in (('desirable_reward', good), ('undesirable_reward', bad)) if x}
    return means | (dict(margin=means['desirable_reward'] - means['undesirable_reward']) if good and bad else {})

def evaluate(model, reference, rows, cfg, run):
    """Measure the loss and its metrics on held-out rows; one z0 for all of them."""
    model.eval()
    z0 = estimate_kl(model, reference, rows, cfg, run) # ()
    pi, ref = (torch.cat(answer_logp(m, rows, cfg, run)) for m in (model, reference)) # (N,)
    model.train()
    label = labels_of(rows) # (N,)
    loss, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
    means = dict(loss=loss.item(), kl=z0.item()) | describe(reward.tolist(), label.tolist())
    return {'val_' + name: value for name, value in means.items()}

def update(model, reference, optimizer, rows, cfg, run, step):
    """Take one optimizer step on rows; return its metrics. Every answer weighs the same."""
    z0 = estimate_kl(model, reference, rows, cfg, run).to(run.device) # (), of the whole batch
    all_ref = answer_logp(reference, rows, cfg, run) # a (1,) per row
    means, rewards, labels = Means(), [], []
    for part in own_parts(range(len(rows)), [row.length for row in rows], cfg, run):
        some, ref = [rows[i] for i in part], torch.cat([all_ref[i] for i in part]).to(run.device) # (B,)
        _, pi = packed(model, some, run) # (B,)
        label = labels_of(some).to(run.device) # (B,)
        loss, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
        share = len(part) / len(rows) # of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
        rewards, labels = rewards + reward.tolist(), labels + label.tolist()
    rewards, labels = (sum(run.gather(x), []) for x in (rewards, labels)) # of all processes
    return take_step(run, cfg, step, model, optimizer, means.sum(run) | dict(kl=z0.item()) | describe(rewards, labels))

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.init_from, 'init_from')
    model = load_policy(cfg.init_from, 'init_from')
    reference = run.freeze(load_policy(cfg.init_from, 'init_from').eval()).to(run.device)
    if cfg.lora_rank: # one trunk for both, as in load_actors
        model.load_state_dict(reference.state_dict(keep_vars=True), assign=True)
    model = model.to(run.device)
    rows = load_data(cfg.train_data, tok, model.config.block_size, 'train')
    val = load_data(cfg.val_data, tok, model.config.block_size, 'val') if cfg.val_data else None
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    prepare_out_dir(run, cfg, batches.epoch_steps)
    measure = (lambda: evaluate(model, reference, val, cfg, run)) if val else None
    optimizer, bar, save = begin(run, cfg, model, tok, measure)
    for step in bar:
        measured = update(model, reference, optimizer, [rows[i] for i in batches.at(step)], cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss', 'margin'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
