"""Save and load checkpoints that survive a kill, and write the log.

A checkpoint is a folder: config.json and model.safetensors in the Hugging Face layout, the tokenizer, log.jsonl, and
state.pt to resume from. state.pt is loaded as plain tensors and values only.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time

import torch
import torch.distributed as dist

from common import weights
from common.options import fail, note
from common.records import write_atomic
from common.run import is_spread, spread_like
from model import GPT

def prepare_out_dir(run, cfg):
    """Check and make the checkpoint's folder, after all input was read.

    So bad input costs no old checkpoint. One that is in the folder is replaced only with --overwrite=True. Starts an
    empty log unless the run is resumed.
    """
    for key in ('init_from', 'policy', 'reward_model', 'teacher'):
        folder = getattr(cfg, key, '')
        if folder not in ('', 'scratch') and os.path.realpath(folder) == os.path.realpath(cfg.out_dir):
            fail(f"--out_dir={cfg.out_dir}: is --{key} too; wanted another folder: a run needs what it began from")
    if run.is_master:
        try:
            os.makedirs(cfg.out_dir, exist_ok=True)
            finish_save(cfg.out_dir)
            if cfg.resume and not os.path.exists(os.path.join(cfg.out_dir, 'state.pt')):
                fail(f"--resume=True: {cfg.out_dir}/state.pt is missing, there is no checkpoint to resume from")
            here = os.path.exists(os.path.join(cfg.out_dir, 'config.json'))
            if here and not cfg.resume and not cfg.overwrite:
                fail(f"--out_dir={cfg.out_dir}: holds a checkpoint; continue it by --resume=True, replace it by "
                     "--overwrite=True, or choose another folder")
            if not os.access(cfg.out_dir, os.W_OK):
                fail(f"--out_dir={cfg.out_dir}: no permission; wanted a folder that can be written to")
            if not cfg.resume:
                for name in ('state.pt', 'config.json', 'model.safetensors', 'tokenizer.tiktoken', 'tokenizer_name'):
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(cfg.out_dir, name))
                open(os.path.join(cfg.out_dir, 'log.jsonl'), 'w').close()
        except OSError as e:
            fail(f"--out_dir={cfg.out_dir}: {e.strerror}; wanted a folder that can be written to")
    if run.world_size > 1:
        dist.barrier()

def save_checkpoint(run, cfg, model, tokenizer, step, optimizers, **more):
    """Write a checkpoint folder: weights, tokenizer, and state.pt to resume from.

    step: the number of finished steps. optimizers: {name: optimizer}. more: further state, tensors and plain values.
    All files are first written to out_dir/.saving. The rename to .saved makes the new checkpoint count. If a kill
    interrupts the rest, `finish_save` completes it at the next start. The first process writes, but all have to call
    this: each has its own random generator and, with fsdp, a part of everything.
    """
    def whole(x): # every process takes part, the first one keeps it
        if is_spread(x):
            x = x.full_tensor()
        return x.cpu() if run.is_master else None

    rng = {'cpu': torch.get_rng_state()}
    if run.device.startswith('cuda'):
        rng['cuda'] = torch.cuda.get_rng_state(run.device)
    rng, model = run.gather(rng), run.whole(model)
    states = {}
    for name, optimizer in optimizers.items():
        states[name] = state = optimizer.state_dict()
        state['state'] = {i: {k: whole(v) for k, v in slot.items()} for i, slot in state['state'].items()}
    if not run.is_master:
        return
    new = os.path.join(cfg.out_dir, '.saving')
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        model.save_pretrained(new, tokenizer.eos)
        tokenizer.save(new)
        log_lines = len(read_log(os.path.join(cfg.out_dir, 'log.jsonl'))) # a resumed run drops later lines
        state = dict(step=step, script=script_of(cfg), options=dataclasses.asdict(cfg), log_lines=log_lines, rng=rng,
                     scaler=run.scaler.state_dict(), optimizers=states, **more)
        torch.save(state, os.path.join(new, 'state.pt'))
        os.rename(new, os.path.join(cfg.out_dir, '.saved'))
        finish_save(cfg.out_dir)
    except (OSError, RuntimeError) as e: # torch.save reports a full disk as RuntimeError
        shutil.rmtree(new, ignore_errors=True)
        print(f"error: {cfg.out_dir}: the checkpoint of step {step} could not be written ({e}); "
              "the last one is intact", file=sys.stderr)
        raise SystemExit(1)

def save_if_due(run, cfg, step, save):
    """Call save(step) if due, at the end, and on Ctrl-C. Ctrl-C then ends the program; step: finished steps."""
    stopping = run.stop_requested()
    if stopping or step == cfg.max_steps or (cfg.save_every and step % cfg.save_every == 0):
        save(step)
    if stopping:
        if run.is_master:
            print(f"saved {cfg.out_dir} at step {step}; --resume=True continues from there", file=sys.stderr)
        raise KeyboardInterrupt

def finish_save(out_dir):
    """Move the files of a completely written checkpoint into place; a start after a kill calls it too."""
    done = os.path.join(out_dir, '.saved')
    if os.path.isdir(done):
        for name in sorted(os.listdir(done)):
            os.replace(os.path.join(done, name), os.path.join(out_dir, name))
        os.rmdir(done)

def script_of(cfg):
    """Return the name of the script whose Config this is."""
    return os.path.basename(sys.modules[type(cfg).__module__].__file__)

def load_weights(model, tensors):
    """Fill named parameters of a model, fsdp or not, from whole tensors."""
    params = dict(model.named_parameters())
    model.load_state_dict({k: spread_like(params[k], v) for k, v in tensors.items()}, strict=False)

def load_checkpoint(run, cfg, model, optimizers):
    """Restore weights, optimizers and random generators from the checkpoint in cfg.out_dir.

    Returns its state (with 'step'), or None when the run is not resumed. Call it just before the loop, when everything
    else is built. The number of processes may differ from the saving run, and so may fsdp.
    """
    if not cfg.resume:
        return None
    path = os.path.join(cfg.out_dir, 'state.pt')
    if not os.path.exists(path):
        fail(f"--resume=True: {path} is missing, there is no checkpoint to resume from")
    fields, *tensors = weights.open_pretrained(cfg.out_dir)
    for name, old in fields.items():
        new = getattr(model.config, name)
        if old != new:
            fail(f"--resume=True: {name} is {old} in {cfg.out_dir} and {new} in this run; wanted the same model")
    if any(map(is_spread, model.parameters())): # they cannot be filled in place
        whole = GPT(model.config)
        weights.load_tensors(whole, *tensors)
        load_weights(model, whole.state_dict())
    else:
        weights.load_tensors(model, *tensors)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        made_by = state.get('script', 'an older version')
        if made_by != script_of(cfg):
            fail(f"--resume=True: the checkpoint in {cfg.out_dir} is one of {made_by}; wanted one of {script_of(cfg)}")
        for name, optimizer in optimizers.items():
            new = state['optimizers'][name]
            for saved, group in zip(new['param_groups'], optimizer.param_groups): # options may have changed
                saved.update({k: v for k, v in group.items() if k != 'params'})
            params = [p for group in optimizer.param_groups for p in group['params']]
            new['state'] = {i: {k: spread_like(params[i], v) if v.dim() else v for k, v in slot.items()}
                            for i, slot in new['state'].items()}
            optimizer.load_state_dict(new)
        if run.rank < len(state['rng']): # each process's own
            torch.set_rng_state(state['rng'][run.rank]['cpu'])
            if run.device.startswith('cuda') and 'cuda' in state['rng'][run.rank]:
                torch.cuda.set_rng_state(state['rng'][run.rank]['cuda'], run.device)
        else: # there were fewer processes
            torch.manual_seed(cfg.seed + run.rank + 1000 * state['step'])
        if state.get('scaler'): # that of a run in float16
            run.scaler.load_state_dict(state['scaler'])
    except Exception as e: # a damaged file makes torch.load raise nearly anything, some of it without a message
        fail(f"{path}: not a state to resume from ({type(e).__name__}: {' '.join(str(e).split())[:200]})")
    if run.is_master:
        log = os.path.join(cfg.out_dir, 'log.jsonl') # drop the lines logged after the checkpoint
        write_atomic(log, ''.join(json.dumps(line) + '\n' for line in read_log(log)[:state['log_lines']]))
        note(f"resumed from {cfg.out_dir} at step {state['step']}")
    return state

def log(run, cfg, step, **metrics):
    """Append a line to out_dir/log.jsonl; step counts finished optimizer steps (iterations in the RL scripts)."""
    if run.is_master:
        line = dict(step=step, **{k: float(f"{float(v):.8g}") for k, v in metrics.items()}, time=round(time.time(), 2))
        with open(os.path.join(cfg.out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
            f.write(json.dumps(line) + '\n')

def read_log(path):
    """Return the lines of a log.jsonl; a last one that a kill cut short is dropped."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            for text in f:
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
    return lines

def load_policy(folder, option='policy', **overrides):
    """Load a language model; a reward model is refused, naming the option that gave it."""
    model = GPT.from_pretrained(folder, **dict(value_head=False) | overrides) # a PPO checkpoint may hold its critic
    if model.was_reward_model:
        fail(f"--{option}={folder}: is a reward model, wanted a language model")
    return model

def load_reward_model(folder, option='reward_model', **overrides):
    """Load a reward model; a language model is refused, naming the option that gave it."""
    model = GPT.from_pretrained(folder, **overrides)
    if not model.was_reward_model:
        fail(f"--{option}={folder}: is a language model, wanted a reward model (made by reward.py)")
    return model
