"""Learn from preferences by direct preference optimisation (DPO) and its relatives.

The loss classifies pairs, without reward model or sampling. Each --loss is one function below, with its equation:

    dpo      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with label smoothing (conservative DPO): Mitchell
             2023, https://ericmitchell.ai/cdpo.pdf
    ipo      Azar et al. 2023, https://arxiv.org/abs/2310.12036
    hinge    SLiC-HF, Zhao et al. 2023, https://arxiv.org/abs/2305.10425, on log-ratios to the reference
    simpo    Meng et al. 2024, https://arxiv.org/abs/2405.14734, no reference
    orpo     Hong et al. 2024, https://arxiv.org/abs/2403.07691, no reference

In these functions pi and ref are log-probabilities of whole answers, log pi(y|x) and log pi_ref(y|x).

    python dpo.py config/toy/dpo.py
    python dpo.py config/toy/simpo.py --simpo_margin=1.0

docs/differences.md says what differs from the papers.
"""

from dataclasses import dataclass

from common.batches import Batches, by_length, load_rankings, own_parts
from common.checkpoints import load_policy, prepare_out_dir
from common.options import DataOptions, launch, require, unread
from common.rollout import answer_logp, beats, packed
from common.run import start, stop
from common.tokens import load_tokenizer
from common.training import Means, begin, finish_step, take_step

import torch
import torch.nn.functional as F

BETAS = dict(dpo=0.1, ipo=0.1, hinge=0.1, simpo=2.0, orpo=0.1) # the losses, and beta where it is not given
PER_TOKEN = ('ipo', 'simpo', 'orpo') # these take an answer's mean log-probability per token, the others the sum
REFERENCE_FREE = ('simpo', 'orpo')

@dataclass
class Config(DataOptions):
    out_dir: str = 'out/dpo' # the checkpoint
    init_from: str = 'out/sft' # the SFT model, a folder or a model on the hub; also the reference where there is one
    train_data: str = '' # comparisons or rankings; several files are separated by commas
    loss: str = 'dpo' # dpo, ipo, hinge, simpo or orpo
    beta: float = 0.0 # pull to the reference; simpo: scale of the reward; orpo: weight of the odds; 0 = 0.1, simpo 2.0
    label_smoothing: float = 0.0 # dpo: share of the preferences assumed to be the wrong way round
    simpo_margin: float = 0.5 # simpo: gamma, the margin that is asked for
    lr: float = 5e-6

    def __post_init__(self):
        super().__post_init__()
        require(self, loss=(self.loss in BETAS, f"one of {', '.join(BETAS)}"),
                label_smoothing=(0 <= self.label_smoothing < 0.5, 'at least 0 and below 0.5'))
        unread(self, self.loss == 'dpo', 'loss=dpo', 'label_smoothing')
        unread(self, self.loss == 'simpo', 'loss=simpo', 'simpo_margin')
        self.beta = self.beta or BETAS[self.loss]

def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Return the DPO loss (Rafailov et al. 2023, equation 7), w = chosen and l = rejected.

        h = beta * [(pi_w - ref_w) - (pi_l - ref_l)]         L = -log sigmoid(h)

    and with label smoothing e (Mitchell 2023, equation 3):  L = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    All four are (B,): log-probabilities log pi(y|x) SUMMED over the answer's tokens, EOS included. Returns the loss ()
    and the implicit rewards beta * (pi - ref) of chosen and rejected, (B,) each, detached.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    h = chosen_rewards - rejected_rewards # (B,)
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()

def ipo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """Return the IPO loss (Azar et al. 2023, equation 17; their tau is beta).

        h = (pi_w - ref_w) - (pi_l - ref_l)                  L = (h - 1 / (2 beta))^2

    All four are (B,): the MEAN log-probability per token of the answer, as in the authors' own code. So the target does
    not depend on the answers' lengths. Returns as dpo_loss.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    h = (pi_chosen - ref_chosen) - (pi_rejected - ref_rejected) # (B,)
    return ((h - 1 / (2 * beta)) ** 2).mean(), chosen_rewards.detach(), rejected_rewards.detach()

def hinge_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """Return SLiC-HF's hinge loss, on log-ratios to the reference.

        Zhao et al. 2023, equation 1:   L = max(0, delta - pi_w + pi_l)
        here, with delta = 1:           h = beta * [(pi_w - ref_w) - (pi_l - ref_l)]         L = max(0, 1 - h)

    The second is "hinge-norm" of Liu et al. 2023, https://arxiv.org/abs/2309.06657; the reference replaces SLiC's
    cross-entropy. All four are (B,), SUMMED over the answer's tokens. Returns as dpo_loss.
    """
    chosen_rewards = beta * (pi_chosen - ref_chosen) # (B,)
    rejected_rewards = beta * (pi_rejected - ref_rejected) # (B,)
    losses = F.relu(1 - (chosen_rewards - rejected_rewards)) # (B,)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()

def simpo_loss(pi_chosen, pi_rejected, beta, gamma):
    """Return the SimPO loss (Meng et al. 2024, equation 6).

        h = beta * (pi_w - pi_l) - gamma                     L = -log sigmoid(h)

    Both are (B,): the MEAN log-probability per token of the answer, its own reward. gamma: the target reward margin.
    Returns the loss () and the rewards beta * pi of chosen and rejected, (B,) each, detached.
    """
    chosen_rewards, rejected_rewards = beta * pi_chosen, beta * pi_rejected # (B,)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - gamma) # (B,)
    return losses.mean(), chosen_rewards.detach(), rejected_rewards.detach()

def orpo_loss(pi_chosen, pi_rejected, beta):
    """Return the ORPO loss (Hong et al. 2024, equations 6 and 7; their lambda is beta).

    The log odds ratio joins the cross-entropy on the chosen answer. P = exp(pi), the tokens' geometric mean:

        odds = P / (1 - P)            L = -pi_w - beta * log sigmoid( log odds_w - log odds_l )

    Both are (B,): the MEAN log-probability per token of the answer. Returns the loss () and, as rewards, the log odds
    of chosen and rejected, (B,) each, detached.
    """
    def log_odds(pi):
        pi = pi.clamp(max=-1e-6) # at a probability of 1 the odds are infinite, and the gradient is no number
        return pi - torch.log(-torch.expm1(pi))

    chosen_odds, rejected_odds = log_odds(pi_chosen), log_odds(pi_rejected) # (B,)
    losses = -pi_chosen - beta * F.logsigmoid(chosen_odds - rejected_odds) # (B,)
    return losses.mean(), chosen_odds.detach(), rejected_odds.detach()

def pair_loss(logp, ref_logp, answers, cfg):
    """Return the loss () over the pairs of Answers, and its metrics; logp, ref_logp: (N,), summed over tokens."""
    pi, ref = (x / answers.sizes if cfg.loss in PER_TOKEN else x for x in (logp, ref_logp)) # (N,), sums or means
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
    return loss, dict(
        accuracy=beats(chosen_rewards, rejected_rewards).mean(), margin=(chosen_rewards - rejected_rewards).mean(),
        chosen_reward=chosen_rewards.mean(), rejected_reward=rejected_rewards.mean(),
        chosen_logp=logp.detach()[w].mean(), rejected_logp=logp.detach()[l].mean())

def reference_logp(model, rows, cfg, run, name):
    """Return the reference's summed log-probabilities, a (K,) per row; zeros for a loss without a reference."""
    if cfg.loss in REFERENCE_FREE:
        return [torch.zeros(len(row.answers)) for row in rows]
    return answer_logp(model, rows, cfg, run, f"reference, {name}")

@torch.no_grad()
def evaluate(model, rows, ref, cfg, run):
    """Measure the loss and its metrics on held-out rows, averaged over pairs."""
    means, model = Means(), model.eval()
    for part in run.rows(by_length(rows, cfg.batch_size // cfg.grad_accum)):
        answers, logp = packed(model, [rows[i] for i in part], run) # N answers, (N,)
        loss, metrics = pair_loss(logp, torch.cat([ref[i] for i in part]).to(run.device), answers, cfg)
        means.add(metrics | dict(loss=loss), len(answers.pairs))
    model.train()
    return {'val_' + name: value for name, value in means.mean(run).items()}

def update(model, optimizer, rows, ref, cfg, run, step):
    """Take one optimizer step; return metrics. Every pair weighs the same; ref: the reference's (K,) per row."""
    n_pairs = sum(a < b for row in rows for a in row.ranks for b in row.ranks)
    means = Means()
    for part in own_parts(range(len(rows)), [row.length for row in rows], cfg, run):
        answers, logp = packed(model, [rows[i] for i in part], run) # N answers, (N,)
        loss, metrics = pair_loss(logp, torch.cat([ref[i] for i in part]).to(run.device), answers, cfg)
        share = len(answers.pairs) / n_pairs # of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss) | metrics, share)
    return take_step(run, cfg, step, model, optimizer, means.sum(run))

def main(cfg):
    run = start(cfg)
    tok = load_tokenizer(cfg.init_from, 'init_from')
    model = load_policy(cfg.init_from, 'init_from').to(run.device)
    rows = load_rankings(cfg.train_data, tok, model.config.block_size, 'train')
    val = load_rankings(cfg.val_data, tok, model.config.block_size, 'val')
    batches = Batches([row.length for row in rows], cfg.batch_size, cfg.seed)
    prepare_out_dir(run, cfg, batches.epoch_steps)
    used = sorted({i for step in range(min(cfg.max_steps, batches.epoch_steps)) for i in batches.at(step)})
    ref = dict(zip(used, reference_logp(model, [rows[i] for i in used], cfg, run, 'train'))) # not yet trained
    val_ref = reference_logp(model, val, cfg, run, 'val') if val else None

    measure = (lambda: evaluate(model, val, val_ref, cfg, run)) if val else None
    optimizer, bar, save = begin(run, cfg, model, tok, measure)
    for step in bar:
        chosen = batches.at(step)
        measured = update(model, optimizer, [rows[i] for i in chosen], [ref[i] for i in chosen], cfg, run, step)
        finish_step(run, cfg, bar, step + 1, measured, ['loss', 'accuracy'], save, measure)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
