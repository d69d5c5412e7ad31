"""The margin is there at once, and the loss swings far above where it began."""
import dpo
from common.rollout import beats
from dpo import dpo_loss, hinge_loss, ipo_loss, orpo_loss, simpo_loss

STAGE = 'ipo'

def pair_loss(logp, ref_logp, answers, cfg):
    pi, ref = logp, ref_logp # (N,)
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

PATCHES = [(dpo, pair_loss)]
