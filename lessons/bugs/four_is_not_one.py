"""With grad_accum=4 the run should be that of grad_accum=1, but for rounding. It is another one."""
import sft
from common.batches import collate, split_by_tokens
from common.training import Means, take_step
from sft import distillation_loss, sft_loss

import torch

STAGE = 'sft'
OPTIONS = dict(grad_accum=4)

def update(model, teacher, optimizer, rows, cfg, run, step):
    parts = split_by_tokens(rows, [len(ids) for ids, _ in rows], cfg.grad_accum, run.world_size)
    micro = [collate(run.rows(part)) for part in parts] # (B, T), (B, T-1) each
    n_tokens = run.sum(sum(mask.sum() for _, mask in micro)) # ()
    means = Means()
    for idx, mask in micro:
        idx, mask = idx.to(run.device), mask.to(run.device)
        with run.autocast():
            if teacher:
                with torch.no_grad():
                    wanted = teacher.logits_at(idx, mask) # (N, V), at the counted tokens only
                loss = distillation_loss(model.logits_at(idx, mask), wanted, cfg.temperature, cfg.divergence,
                                         cfg.jsd_beta) # ()
            else:
                loss = sft_loss(model.logp(idx, mask), mask) # ()
        share = 1 / len(micro) # of the mean over the whole batch
        run.backward(loss * share)
        means.add(dict(loss=loss), share)
    seen = dict(tokens=n_tokens.item()) if teacher else {}
    return take_step(run, cfg, step, model, optimizer, means.sum(run) | seen)

PATCHES = [(sft, update)]
