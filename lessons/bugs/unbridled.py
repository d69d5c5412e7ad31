"""grad_clip is 1, and one bad batch still throws the weights far away."""
import math

from common import training
from common.training import check_finite

import torch

STAGE = 'dpo'

def optimizer_step(run, cfg, step, model, optimizer, lr, last=True):
    for group in optimizer.param_groups:
        group['lr'] = lr
    run.sum_gradients(model)
    run.scaler.unscale_(optimizer)
    run.scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item() # 0 = no clipping
    left_out = run.scaler.is_enabled() and not math.isfinite(norm) and run.scaler.get_scale() >= 1
    if last:
        run.scaler.update()
    norm = 0.0 if left_out else norm
    check_finite(cfg, step, 'the gradient norm', norm)
    return norm

PATCHES = [(training, optimizer_step)]
