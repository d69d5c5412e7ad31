"""
Direct preference optimisation and its relatives: learn from preferences with a classification loss, without a reward
model and without sampling. Each --loss is one function below, with its equation:

    dpo      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with label smoothing (conservative DPO): Mitchell
             2023, https://ericmitchell.ai/cdpo.pdf
    ipo      Azar et al. 2023, https://arxiv.org/abs/2310.12036
    hinge    SLiC-HF, Zhao et al. 2023, https://arxiv.org/abs/2305.10425, on log-ratios to the reference
    simpo    Meng et al. 2024, https://arxiv.org/abs/2405.14734, no reference
    orpo     Hong et al. 2024, https://arxiv.org/abs/2403.07691, no reference

    python dpo.py config/toy/dpo.py
    python dpo.py config/toy/simpo.py --simpo_margin=1.0

Differs from the papers: a ranking of K answers makes all its pairs, and each answer passes through the model once,
however many pairs it is in. The reference is the model that training starts from, its log-probabilities are computed
once, and not at all for the losses without one. AdamW instead of RMSprop.
"""

from dataclasses import dataclass

import common
import memory
from common import check_common, launch, require

import torch
import torch.nn.functional as F

from model import load_policy
from tokens import Batches, by_length, collate_answers, encode_rankings, load_tokenizer, read_ranked


LOSSES = ('dpo', 'ipo', 'hinge', 'simpo', 'orpo')
PER_TOKEN = ('ipo', 'simpo', 'orpo') # take the mean log-probability per token of an answer, the others the sum
REFERENCE_FREE = ('simpo', 'orpo')


@dataclass
class Config:
    out_dir: str = 'out/dpo' # the checkpoint
    init_from: str = 'out/sft' # the SFT model, a folder or a model on the hub; also the reference where there is one
    pad_vocab: bool = False # vocabulary rows up to a multiple of 64 while training: GPUs like that; saved without them
    train_data: str = '' # comparisons or rankings; several files are separated by commas
    val_data: str = '' # the same, held out
    loss: str = 'dpo' # dpo, ipo, hinge, simpo or orpo
    beta: float = 0.1 # pull towards the reference; simpo: scale of the margin, 2 to 10; orpo: weight of the odds ratio
    label_smoothing: float = 0.0 # dpo: share of the preferences assumed to be the wrong way round
    simpo_margin: float = 0.5 # simpo: gamma, the margin that is asked for
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
        require(self, train_data=(self.train_data != '', 'a file of comparisons or rankings'),
                loss=(self.loss in LOSSES, f"one of {', '.join(LOSSES)}"), beta=(self.beta > 0, 'above 0'),
                label_smoothing=(0 <= self.label_smoothing < 0.5, 'at least 0 and below 0.5'),
                simpo_margin=(self.simpo_margin >= 0, 'at least 0'))


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """
    Rafailov et al. 2023, equation 7, with w = chosen and l = rejected:

        h = beta * [(pi_w - ref_w) - (pi_l - ref_l)]         L = -log sigmoid(h)

    and with label smoothing e (Mitchell 2023, equation 3):  L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    All four are (B,): log-probabilities log pi(y|x) SUMMED over the answer's tokens, EOS included.
    Returns the loss () and the implicit rewards beta * (pi - ref) of chosen and rejected, (B,) each, detached.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    h = chosen_rewards - rejected_rewards # (B,)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """
    Azar et al. 2023, equation 17 (their tau is beta):

        h = (pi_w - ref_w) - (pi_l - ref_l)                  L = (h - 1 / (2 beta))^2

    All four are (B,): here the MEAN log-probability per token of the answer, as the authors' own implementation has it,
    so that the target 1 / (2 beta) does not depend on the answers' lengths. Returns as dpo_loss.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    h = (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected) # (B,)
    return ((h - 1 / (2 * beta)) ** 2).mean(), chosen_rewards.detach(), rejected_rewards.detach()


def hinge_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """
    SLiC-HF, Zhao et al. 2023, equation 1, asks for a margin delta between log-probabilities:

        L = max(0, delta - pi_w + pi_l)

    Here the margin lies between the log-ratios to the reference, times beta, and delta = 1: "hinge-norm" of Liu et al.
    2023, https://arxiv.org/abs/2309.06657, the support-vector counterpart of DPO:

        h = beta * [(pi_w - ref_w) - (pi_l - ref_l)]         L = max(0, 1 - h)

    The reference stands in for SLiC's second term, a cross-entropy that keeps the policy near the SFT model.
    All four are (B,), SUMMED over the answer's tokens. Returns as dpo_loss.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    losses = F.relu(1 - (chosen_rewards - rejected_rewards)) # (B,)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()


def simpo_loss(pi_chosen, pi_rejected, beta, gamma):
    """
    SimPO, Meng et al. 2024, equation 6: the reward is the answer's own mean log-probability, no reference.

        h = beta * (pi_w - pi_l) - gamma                     L = -log sigmoid(h)

    Both are (B,): the MEAN log-probability per token of the answer. gamma: the target reward margin.
    Returns the loss () and the rewards beta * pi of chosen and rejected, (B,) each, detached.
    """
    chosen_rewards, rejected_rewards = beta * pi_chosen, beta * pi_rejected # (B,)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma) # (B,)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(pi_chosen, pi_rejected, beta):
    """
    ORPO, Hong et al. 2024, equations 6 and 7 (their lambda is beta): cross-entropy on the chosen answer, and the
    log of the odds ratio of the two; with P = exp(pi), the geometric mean of the token probabilities,

        odds = P / (1 - P)            L = -pi_w - beta * log sigmoid( log odds_w - log odds_l )

    Both are (B,): the MEAN log-probability per token of the answer.
    Returns the loss () and in the place of rewards the log odds of chosen and rejected, (B,) each, detached.
    """
    def log_odds(pi):
        pi = pi.clamp(max=-1e-6) # at a probability of 1 the odds are infinite, and the gradient is no number
        return pi - torch.log(-torch.expm1(pi))

    chosen_odds, rejected_odds = log_odds(pi_chosen), log_odds(pi_rejected) # (B,)
    losses = -pi_chosen - beta * F.logsigmoid(chosen_odds - rejected_odds) # (B,)
    return losses.mean(), chosen_odds.detach(), rejected_odds.detach()


def sum_or_mean(logp, sizes, loss):
    """Summed log-probabilities of answers (N,) as the loss wants them: sums, or means per token; sizes (N,)."""
    return logp / sizes if loss in PER_TOKEN else logp


def pair_loss(logp, ref_logp, answers, cfg):
    """The loss () over the pairs of tokens.Answers, given summed log-probabilities (N,) each, and what is logged."""
    pi, ref = (sum_or_mean(x, answers.sizes, cfg.loss) for x in (logp, ref_logp)) # (N,)
    w, l = answers.pairs.unbind(1) # one entry per pair: the better and the worse answer
    if cfg.loss == 'dpo':
        out = dpo_loss(pi[w], pi[l], ref[w], ref[l], cfg.beta, cfg.label_smoothing)
    elif cfg.loss == 'ipo':
        out = ipo_loss(pi[w], pi[l], ref[w], ref[l], cfg.beta)
    elif cfg.loss == 'hinge':
        out = hinge_loss(pi[w], pi[l], ref[w], ref[l], cfg.beta)
    elif cfg.loss == 'simpo':
        out = simpo_loss(pi[w], pi[l], cfg.beta, cfg.simpo_margin)
    else:
        out = orpo_loss(pi[w], pi[l], cfg.beta)
    loss, chosen_rewards, rejected_rewards = out
    metrics = dict(accuracy=(chosen_rewards > rejected_rewards).float().mean(),
                   margin=(chosen_rewards - rejected_rewards).mean(), chosen_reward=chosen_rewards.mean(),
                   rejected_reward=rejected_rewards.mean(), chosen_logp=logp.detach()[w].mean(),
                   rejected_logp=logp.detach()[l].mean())
    return loss, metrics


@torch.no_grad()
def reference_logp(model, rows, cfg, run, name):
    """
    The reference's summed log-probability of every answer, computed once: a list of (K,) tensors, one per prompt.
    Zeros that nothing reads for a loss without a reference.
    """
    if cfg.loss in REFERENCE_FREE:
        return [torch.zeros(len(answers)) for _, answers, _ in rows]
    mine = {} # each process takes its share of the rows
    parts = run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum))
    for part in common.progress(parts, desc=f"reference, {name}", disable=not run.is_master):
        with run.autocast():
            logp = model.answer_logp(collate_answers([rows[i] for i in part]).to(run.device)).cpu() # (N,)
        mine |= zip(part, logp.split([len(rows[i][1]) for i in part]))
    everybody = run.merge(mine)
    return [everybody[i] for i in range(len(rows))]


def load_data(path, tok, block_size, name):
    """Encoded rows (prompt, [answers], ranks)."""
    return encode_rankings(tok, read_ranked(path), block_size, name)


@torch.no_grad()
def evaluate(model, rows, ref, cfg, run):
    """The loss and the logged metrics, mean over the pairs of held-out rows."""
    totals, n = {}, 0
    model = run.whole(model).eval()
    for part in run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum)):
        answers = collate_answers([rows[i] for i in part]).to(run.device)
        with run.autocast():
            logp = model.answer_logp(answers) # (N,)
        loss, metrics = pair_loss(logp, torch.cat([ref[i] for i in part]).to(run.device), answers, cfg)
        for k, v in (metrics | dict(loss=loss)).items():
            totals[k] = totals.get(k, 0.0) + v.item() * len(answers.pairs)
        n += len(answers.pairs)
    model.train()
    return {'val_' + k: v for k, v in run.mean(totals, n).items()}


def main(cfg):
    run = common.start(cfg)
    tok = load_tokenizer(cfg.init_from)
    model = load_policy(cfg.init_from, 'init_from', pad_vocab=cfg.pad_vocab).to(run.device)

    rows = load_data(cfg.train_data, tok, model.config.block_size, 'train')
    val = load_data(cfg.val_data, tok, model.config.block_size, 'val') if cfg.val_data else None
    batches = Batches([len(p) + sum(map(len, answers)) for p, answers, _ in rows], cfg.batch_size, cfg.seed)
    cfg.max_steps = cfg.max_steps or cfg.epochs * batches.epoch_steps
    words = max(sum(map(len, answers)) for _, answers, _ in rows) # of the answers to one prompt
    memory.check(run, cfg, [model], int(batches.lengths.max()), words, words, sharing=True)
    common.prepare_out_dir(run, cfg) # once all input is read: what is wrong with it costs no old checkpoint
    ref = reference_logp(model, rows, cfg, run, 'train') # before the first update the model is the reference
    val_ref = reference_logp(model, val, cfg, run, 'val') if val else None

    net = run.parallel(model, cfg.compile, cfg.fsdp, cfg.checkpointing)
    optimizer = common.make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = common.load_checkpoint(run, cfg, model, dict(policy=optimizer))
    first = state['step'] if state else 0

    def save(step):
        common.save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer))

    bar = common.training_bar(run, cfg, first)
    for step in bar:
        if val and cfg.eval_every and step % cfg.eval_every == 0:
            common.log(run, cfg, step, **evaluate(model, val, val_ref, cfg, run))

        # every pair of the whole batch weighs the same, whatever micro-batch or process it lies in
        batch = batches.at(step)
        parts = common.split_by_tokens(batch, batches.lengths[batch], cfg.grad_accum, run.world_size)
        micro = [run.rows(part) for part in parts]
        micro = [(collate_answers([rows[i] for i in part]), torch.cat([ref[i] for i in part])) for part in micro]
        n_pairs = run.sum(sum(len(answers.pairs) for answers, _ in micro)) # ()
        loss, metrics = 0.0, {}
        for answers, ref_logp in micro: # N answers, (N,)
            answers, ref_logp = answers.to(run.device), ref_logp.to(run.device)
            with run.autocast():
                logp = net('answer_logp', answers) # (N,)
            part, measured = pair_loss(logp, ref_logp, answers, cfg)
            share = len(answers.pairs) / n_pairs # ()
            run.backward(part * share)
            loss += part.detach() * share
            metrics = {k: metrics.get(k, 0.0) + v * share for k, v in measured.items()}
        loss, lr = run.sum(loss).item(), common.lr_at(step, cfg)
        common.check_finite('the loss', loss, step + 1, cfg.out_dir)
        grad_norm = common.optimizer_step(optimizer, model, lr, cfg.grad_clip, run.scaler)
        common.check_finite('the gradient norm', grad_norm, step + 1, cfg.out_dir)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.max_steps:
            metrics = {k: run.sum(v).item() for k, v in metrics.items()}
            common.log(run, cfg, done, loss=loss, **metrics, lr=lr, grad_norm=grad_norm)
            bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{metrics['accuracy']:.3f}")
        if done == cfg.max_steps and val:
            measured = evaluate(model, val, val_ref, cfg, run)
            common.log(run, cfg, done, **measured)
            common.say(run, bar, "held-out: " + ", ".join(f"{k[4:]} {v:.3f}" for k, v in measured.items()))
        common.save_if_due(run, cfg, done, save)
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
