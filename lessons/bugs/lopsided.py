"""The policy loss jumps. In one iteration nearly all answers are pushed up, in the next one down."""
import ppo
from common.rollout import masked_mean

STAGE = 'ppo'

def whiten(x, mask, run=None):
    mean = masked_mean(x, mask, run)
    variance = masked_mean((x - mean) ** 2, mask, run)
    return x * mask

PATCHES = [(ppo, whiten)]
