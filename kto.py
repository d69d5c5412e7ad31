"""
KTO: learn from answers that somebody called good or bad, one at a time. No pairs, no reward model, no sampling.

Ethayarajh et al. 2024, KTO: Model alignment as prospect theoretic optimization, https://arxiv.org/abs/2402.01306.

    python kto.py config/toy/kto.py
    python kto.py config/toy/kto.py --undesirable_weight=0.5

Records: `prompt`, `response`, `label` (true = good). Rankings and comparisons are taken apart: an answer that beats
more of the other answers to its prompt than beat it is good, one that is beaten by more is bad, one in the middle is
left out. So chosen is good and rejected is bad.

Differs from the paper: the KL divergence that an answer is compared with is estimated over the whole batch, whatever
micro-batch or process its rows lie in. AdamW instead of RMSprop.
"""

import random
from dataclasses import dataclass

import common
import memory
from common import check_common, fail, launch, note, require

import torch

from model import load_policy
from rollout import frozen_logp
from tokens import Batches, collate, encode_rankings, load_tokenizer, read_unpaired, truncate


@dataclass
class Config:
    out_dir: str = 'out/kto' # the checkpoint
    init_from: str = 'out/sft' # the SFT model; also the reference
    train_data: str = '' # answers with labels, or comparisons or rankings
    val_data: str = '' # the same, held out
    beta: float = 0.1 # strength of the pull towards the reference
    desirable_weight: float = 1.0 # lambda_D, of a good answer
    undesirable_weight: float = 1.0 # lambda_U, of a bad one; the paper keeps lambda_D n_D within 1 to 4/3 lambda_U n_U
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0
    batch_size: int = 32 # answers per optimizer step, at least 2: the KL is estimated on mixed up ones
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
        require(self, train_data=(self.train_data != '', 'a file of answers with labels, comparisons or rankings'),
                beta=(self.beta > 0, 'above 0'), batch_size=(self.batch_size >= 2, 'at least 2'),
                desirable_weight=(self.desirable_weight >= 0, 'at least 0'),
                undesirable_weight=(self.undesirable_weight >= 0, 'at least 0'))


def kto_loss(pi, ref, label, z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """
    Ethayarajh et al. 2024, section 4, L_KTO, with r = log pi(y|x) - log pi_ref(y|x), lambda = the weight of the label:

        v = lambda_D sigmoid(beta * (r - z0))  for a good answer
        v = lambda_U sigmoid(beta * (z0 - r))  for a bad one            L = mean of (lambda - v)

    pi, ref: (B,) log-probabilities SUMMED over the answer's tokens, EOS included. label: (B,), 1 = good, 0 = bad.
    z0: (), from kl_estimate. Returns the loss () and the implicit rewards beta * r, (B,), detached.
    """
    r = pi - ref # (B,)
    sign = 2 * label - 1 # (B,)
    weight = label * desirable_weight + (1 - label) * undesirable_weight # (B,)
    return (weight * (1 - torch.sigmoid(sign * beta * (r - z0)))).mean(), (beta * r).detach()


def kl_estimate(pi, ref):
    """
    z0 (), what KL(policy || reference) is taken to be: the mean log-ratio of answers to other prompts than their own,
    at least 0, and a constant to the gradient (Ethayarajh et al. 2024, section 4). pi, ref: (B,), summed over tokens.
    """
    return (pi - ref).mean().clamp(min=0).detach()


def mismatched(rows):
    """Each prompt with the answer of the next row (the last with the first one's), (prompt, answer) each."""
    return [(prompt, answer) for (prompt, *_), (_, answer, *_) in zip(rows, rows[1:] + rows[:1])]


def tensors(rows, block_size):
    """Rows (prompt, answer, …) as idx (B, T), mask (B, T-1), lengths (B,); a mixed up row may need its prompt cut."""
    rows = [(truncate(prompt, len(answer), block_size), answer) for prompt, answer, *_ in rows]
    idx, mask = collate([(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for prompt, answer in rows])
    return idx, mask, torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])


def log_probs(model, rows, run, at_once):
    """log pi(y|x) of each row, summed over the answer's tokens, no gradient, at_once rows a pass: (B,) on the CPU."""
    if not rows:
        return torch.zeros(0)
    with run.autocast():
        idx, mask, lengths = (x.to(run.device) for x in tensors(rows, model.config.block_size))
        return frozen_logp(model, idx, mask, lengths, at_once).sum(1).cpu()


def estimate_kl(model, reference, rows, run, at_once):
    """z0 () on the CPU, from all rows mixed up; each process works on its share of them."""
    others = run.rows(mismatched(rows))
    pi, ref = (log_probs(m, others, run, at_once) for m in (model, reference)) # (B,)
    return kl_estimate(*(torch.cat(run.gather(x)) for x in (pi, ref)))


def load_data(path, tok, block_size, name):
    """Encoded rows (prompt, answer, label 1.0 or 0.0), in random order: the answers to a prompt stood together."""
    records = read_unpaired(path)
    if not records:
        fail(f"{path}: all answers of every prompt tie; wanted some that are ranked above others")
    rows = encode_rankings(tok, [{'prompt': r['prompt'], 'responses': [r['response']], 'ranks': float(r['label'])}
                                 for r in records], block_size, name)
    rows = [(prompt, answer, label) for prompt, (answer,), label in rows]
    good = sum(label for *_, label in rows)
    note(f"{name}: {good:.0f} good answers, {len(rows) - good:.0f} bad ones")
    random.Random(0).shuffle(rows)
    return rows


def describe(rewards, labels, run):
    """What is logged of the implicit rewards and labels, two lists, of this process's rows: means over all of them."""
    everything = [pair for part in run.gather(list(zip(rewards, labels))) for pair in part]
    good, bad = ([reward for reward, label in everything if label == kind] for kind in (1.0, 0.0))
    good, bad = (sum(x) / max(1, len(x)) for x in (good, bad))
    return dict(desirable_reward=good, undesirable_reward=bad, margin=good - bad)


def evaluate(model, reference, rows, cfg, run):
    """The loss and the logged metrics, mean over held-out rows; one z0 for all of them."""
    model, at_once = run.whole(model).eval(), cfg.batch_size // cfg.grad_accum
    z0, total, rewards, labels = estimate_kl(model, reference, rows, run, at_once), 0.0, [], []
    for part in run.rows([rows[i:i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)]):
        pi, ref = (log_probs(m, part, run, at_once) for m in (model, reference)) # (B,)
        label = torch.tensor([label for *_, label in part]) # (B,)
        loss, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
        total += loss.item() * len(part)
        rewards, labels = rewards + reward.tolist(), labels + label.tolist()
    model.train()
    means = dict(loss=run.sum(total).item() / len(rows), kl=z0.item()) | describe(rewards, labels, run)
    return {'val_' + k: v for k, v in means.items()}


def main(cfg):
    run = common.start(cfg)
    tok = load_tokenizer(cfg.init_from)
    model = load_policy(cfg.init_from, 'init_from').to(run.device)
    reference = run.freeze(load_policy(cfg.init_from, 'init_from').to(run.device).eval())

    rows = load_data(cfg.train_data, tok, model.config.block_size, 'train')
    val = load_data(cfg.val_data, tok, model.config.block_size, 'val') if cfg.val_data else None
    batches = Batches([len(prompt) + len(answer) for prompt, answer, _ in rows], cfg.batch_size, cfg.seed)
    cfg.max_steps = cfg.max_steps or cfg.epochs * batches.epoch_steps
    at_once = cfg.batch_size // cfg.grad_accum # rows in a pass
    words = max(len(answer) for _, answer, _ in rows)
    memory.check(run, cfg, [model], int(batches.lengths.max()), words, words, [reference])
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
            common.log(run, cfg, step, **evaluate(model, reference, val, cfg, run))

        batch = [rows[i] for i in batches.at(step)]
        z0 = estimate_kl(run.whole(model), reference, batch, run, at_once).to(run.device) # (), of the whole batch

        loss, rewards, labels = 0.0, [], []
        lengths = [len(prompt) + len(answer) for prompt, answer, _ in batch]
        for part in common.split_by_tokens(batch, lengths, cfg.grad_accum, run.world_size):
            part = run.rows(part)
            idx, mask, _ = (x.to(run.device) for x in tensors(part, model.config.block_size)) # (B, T), (B, T-1)
            label = torch.tensor([label for *_, label in part], device=run.device) # (B,)
            ref = log_probs(reference, part, run, at_once).to(run.device) # (B,)
            with run.autocast():
                pi = net('logp', idx, mask).sum(1) # (B,)
            out, reward = kto_loss(pi, ref, label, z0, cfg.beta, cfg.desirable_weight, cfg.undesirable_weight)
            share = len(part) / cfg.batch_size # of the mean over the batch
            run.backward(out * share)
            loss += out.detach() * share
            rewards, labels = rewards + reward.tolist(), labels + label.tolist()
        loss, lr = run.sum(loss).item(), common.lr_at(step, cfg)
        common.check_finite('the loss', loss, step + 1, cfg.out_dir)
        grad_norm = common.optimizer_step(optimizer, model, lr, cfg.grad_clip, run.scaler)
        common.check_finite('the gradient norm', grad_norm, step + 1, cfg.out_dir)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            metrics = describe(rewards, labels, run)
            common.log(run, cfg, done, loss=loss, kl=z0, **metrics, lr=lr, grad_norm=grad_norm)
            bar.set_postfix(loss=f"{loss:.4f}", margin=f"{metrics['margin']:.3f}")
        if done == cfg.max_steps and val:
            measured = evaluate(model, reference, val, cfg, run)
            common.log(run, cfg, done, **measured)
            common.say(run, bar, "held-out: " + ", ".join(f"{k[4:]} {v:.3f}" for k, v in measured.items()))
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
