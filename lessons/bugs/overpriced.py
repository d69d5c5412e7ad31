"""Two columns of the log estimate one KL. The further the policy goes, the less they agree."""
import reinforce
from common import rollout

STAGE = 'grpo'

def kl_k3(logp, ref_logp):
    log_ratio = logp - ref_logp
    return log_ratio.exp() - 1 - log_ratio

PATCHES = [(reinforce, kl_k3), (rollout, kl_k3)]
