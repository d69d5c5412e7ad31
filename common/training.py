"""Provide the common parts of training: learning rate, optimizer, running means, log and save."""

import math

import torch

from common.checkpoints import load_checkpoint, log, log_of, save_checkpoint, save_if_due, script_of
from common.health import Health
from common.options import fail, note
from common.run import progress

def lr_at(step, cfg, peak):
    """Return the learning rate of step 0, 1, …: warmup to peak, then constant, to 0, or by cosine to a tenth."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps) # 0 … 1
    if cfg.lr_schedule == 'linear':
        return peak * (1 - done)
    if cfg.lr_schedule == 'cosine':
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    return peak

def make_optimizer(model, cfg, betas=(0.9, 0.999), eps=1e-8):
    """Make AdamW; matrices decay, embeddings and heads (1, C) too; gains and biases do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    fused = params[0].device.type in ('cpu', 'cuda') # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=eps, fused=fused)

def optimizer_step(run, cfg, step, model, optimizer, lr, last=True):
    """Sum the gradients over the processes, clip them, step, clear; return their norm before clipping.

    In float16 the scale may drive a gradient to infinity: the step is left out, the scale halved, and 0 returned. With
    a scale below 1 the gradient is at fault. last: the scale may change, no other optimizer steps after this backward.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr
    run.sum_gradients(model)
    run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf).item() # 0 = no clipping
    run.scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    left_out = run.scaler.is_enabled() and not math.isfinite(norm) and run.scaler.get_scale() >= 1
    if last:
        run.scaler.update()
    norm = 0.0 if left_out else norm
    check_finite(cfg, step, 'the gradient norm', norm)
    return norm

def take_step(run, cfg, step, model, optimizer, measured):
    """Check the loss and step; return measured with lr and grad_norm."""
    check_finite(cfg, step, 'the loss', measured['loss'])
    lr = lr_at(step, cfg, cfg.lr)
    return measured | dict(lr=lr, grad_norm=optimizer_step(run, cfg, step, model, optimizer, lr))

def check_finite(cfg, step, name, value):
    """End the program where a loss or a norm is no number: it never becomes one again."""
    if not math.isfinite(value):
        fail(f"{name} is {value} at step {step + 1}; nothing was saved since the last checkpoint in {cfg.out_dir}; a "
             "lower --lr usually helps", code=1)

class Means:
    """Average metrics over micro-batches, each weighted by its share of the batch."""

    def __init__(self):
        self.totals, self.shares = {}, 0.0

    def add(self, measured, share):
        """Add {name: mean over a micro-batch, ()}, weighted by share."""
        for name, value in measured.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.detach() * share
        self.shares += share

    def sum(self, run):
        """Return {name: number}, the sums over all processes: means over the batch where the shares sum to 1."""
        return {name: run.sum(total).item() for name, total in self.totals.items()}

    def mean(self, run):
        """Return {name: number}, means over all processes, weighted by the shares; a process may have no rows."""
        found = run.gather(({name: total.item() for name, total in self.totals.items()}, self.shares))
        names = next(totals for totals, _ in found if totals)
        return {name: sum(totals.get(name, 0.0) for totals, _ in found) / sum(n for _, n in found) for name in names}

def training_bar(run, cfg, state, evaluate=None):
    """Return the bar over the steps of a run; state: of the checkpoint that it resumes from, or None.

    evaluate: as for finish_step, measured here before the first step.
    """
    first = state['step'] if state else 0
    if first >= cfg.max_steps and run.is_master:
        note(f"{cfg.out_dir}: all {cfg.max_steps} steps are done; a larger --max_steps trains on")
    elif cfg.warmup_steps >= cfg.max_steps and run.is_master:
        note(f"--warmup_steps={cfg.warmup_steps}: the run of {cfg.max_steps} steps ends before --lr is reached")
    bar = progress(range(first, cfg.max_steps), initial=first, total=cfg.max_steps, desc=cfg.out_dir,
                   disable=not run.is_master)
    bar.health = Health(vars(cfg), run.dtype, first)
    if cfg.tensorboard and run.is_master:
        from torch.utils.tensorboard import SummaryWriter # purge_step hides what an older or a killed run wrote
        run.tensorboard = SummaryWriter(f"{cfg.out_dir}/tensorboard", purge_step=first + 1 if state else 0)
    if evaluate and first == 0 and cfg.eval_every:
        log(run, cfg, 0, **evaluate())
    return bar

def begin(run, cfg, model, tok, evaluate=None):
    """Share the weights, make the optimizer, resume; return it, the bar over the steps, and save(step).

    Of a policy that learns from a file; evaluate: as for training_bar.
    """
    run.prepare(model, cfg)
    optimizer = make_optimizer(model, cfg, betas=(0.9, cfg.beta2))
    state = load_checkpoint(run, cfg, model, dict(policy=optimizer))
    save = lambda step: save_checkpoint(run, cfg, model, tok, step, dict(policy=optimizer))
    return optimizer, training_bar(run, cfg, state, evaluate), save

def next_of(cfg):
    """Say what one runs after this stage."""
    start = getattr(cfg, 'policy', '') or cfg.init_from
    return {'sft.py': f"python sample.py --policy={cfg.out_dir} (collect.py, reward.py and dpo.py go on from it)",
            'reward.py': f"python ppo.py --policy={start} --reward_model={cfg.out_dir} --prompts=FILE",
            }.get(script_of(cfg), f"python sample.py --policy={start},{cfg.out_dir} (evaluate.py measures them)")

def finish_step(run, cfg, bar, done, measured, show, save, evaluate=None):
    """End a training step: write the log, the bar, what is sick and the checkpoint when due.

    done: the number of finished steps. measured: {key of log.jsonl: number}. show: keys for the bar. save(done) writes
    a checkpoint. evaluate() measures held-out data, {'val_…': number}, every eval_every steps and after the last one.
    """
    if done % cfg.log_every == 0 or done == cfg.max_steps:
        log(run, cfg, done, **measured)
        bar.set_postfix({key: f"{measured[key]:.3f}" for key in show if key in measured}, refresh=False)
    if evaluate and (done == cfg.max_steps or cfg.eval_every and done % cfg.eval_every == 0):
        held_out = evaluate()
        log(run, cfg, done, **held_out)
        if run.is_master and done == cfg.max_steps:
            bar.write('held-out: ' + ', '.join(f"{key.removeprefix('val_')} {v:{'.4f' if isinstance(v, float) else ''}}"
                                               for key, v in held_out.items()))
    if run.is_master and (done % cfg.log_every == 0 or done == cfg.max_steps):
        bar.health.tell(log_of(cfg.out_dir), bar.write, done == cfg.max_steps)
    save_if_due(run, cfg, done, save)
    if done == cfg.max_steps and run.is_master:
        bar.n = done
        bar.close() # what to run next is the last line
        bar.write(f"saved {cfg.out_dir}; next: {next_of(cfg)}")
