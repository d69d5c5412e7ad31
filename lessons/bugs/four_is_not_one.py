"""With grad_accum=4 the run should be that of grad_accum=1, but for rounding. It is another one."""
import sft
from common.batches import collate, own_parts
from common.training import Means, take_step
from sft import distillation_loss, sft_loss

import torch

STAGE = 'sft'
OPTIONS = dict(grad_accum=4)

def update(model, teacher, optimizer, rows, cfg, run, step):
    n_tokens = sum(sum(mask[1:]) for _, mask in rows) # nothing predicts a row's first token
    means = Means()
    for part in own_parts(rows, [len(ids) for ids, _ in rows], cfg, run):
        idx, mask = (x.to(run.device) for x in collate(part)) # (B, T), (B, T-1)
        with run.autocast():
            if teacher:
                with torch.no_grad():
                    wanted = teacher.logits_at(idx, mask) # (N, V), at the counted tokens only
                loss = distillation_loss(model.logits_at(idx, mask), wanted, cfg.temperature, cfg.divergence,
                                         cfg.jsd_beta) # ()
            else:
                loss = sft_loss(model.logp(idx, mask), mask) # ()
        share = 1 / cfg.grad_accum # of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
    seen = dict(tokens=n_tokens) if teacher else {}
    return take_step(run, cfg, step, model, optimizer, means.sum(run) | seen)

PATCHES = [(sft, update)]
