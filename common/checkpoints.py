"""Save and load checkpoints that survive a kill, and write the log.

A checkpoint is a folder: config.json and model.safetensors (Hugging Face layout), tokenizer, log.jsonl, samples.jsonl,
state.pt to resume from, and options.json: every option, whether the run has finished, digests of its inputs and files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from common import weights
from common.options import fail, note
from common.records import files_of, lock, read_json, write_atomic
from model import GPT

MODELS = ('init_from', 'policy', 'reward_model', 'reward_policy', 'reward_reference', 'teacher') # that a run reads
DATA = ('train_data', 'val_data', 'prompts', 'ptx_data')
# files of an older checkpoint that a newer one may not have
OPTIONAL = ('tokenizer.tiktoken', 'tokenizer_name', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json',
            'samples.jsonl', 'adapter/adapter_config.json', 'adapter/adapter_model.safetensors')

def digest(*paths):
    """Return the sha256 of files, one after the other, in hex."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, 'rb') as f:
            total.update(hashlib.file_digest(f, 'sha256').digest())
    return total.hexdigest()

def inputs_of(cfg):
    """Return {option: digest} of the models and data that a run reads."""
    given = lambda names: {name: getattr(cfg, name) for name in names if getattr(cfg, name, '') not in ('', 'scratch')}
    own = lambda folder: filter(None, [weights.checkpoint_file(folder, 'tokenizer.tiktoken', absent_ok=True)])
    files = lambda folders: [path for f in files_of(folders) for path in (*weights.weight_files(f), *own(f))]
    return ({name: digest(*files(folders)) for name, folders in given(MODELS).items()}
            | {name: digest(*files_of(path)) for name, path in given(DATA).items()}
            | {name: digest(said) if os.path.isfile(said) else said for name, said in given(['tokenizer']).items()})

def prepare_out_dir(run, cfg, epoch_steps=0):
    """Check and make the checkpoint's folder, after all input was read.

    An old checkpoint in it is replaced only with --overwrite=True, and stays whole until the new run's first save.
    Until then its log is log.new.jsonl. --resume=auto becomes True or False, max_steps=0 becomes epochs * epoch_steps.
    """
    cfg.max_steps = cfg.max_steps or cfg.epochs * epoch_steps
    cfg.resume, run.inputs = run.first(lambda: check_out_dir(cfg)), inputs_of(cfg)
    mine = dataclasses.asdict(cfg) | run.inputs
    for rank, theirs in enumerate(run.gather(mine)):
        for key in (key for key in mine if theirs[key] != mine[key]): # else they would wait for one another in vain
            fail(f"--{key}: process {rank} has another one than process {run.rank}; wanted the same in all")

def check_out_dir(cfg):
    """Prepare out_dir in the first process; return whether to resume."""
    mine = [os.path.realpath(os.path.join(cfg.out_dir, name)) for name in ('', 'adapter')]
    for key, folder in ((key, folder) for key in MODELS for folder in files_of(getattr(cfg, key, ''))):
        if folder not in ('', 'scratch') and os.path.realpath(folder) in mine:
            fail(f"--out_dir={cfg.out_dir}: it, or its `adapter`, is --{key} too; wanted another folder: a run needs "
                 "what it began from")
    try:
        # finish_save below removes an empty `adapter`; a file of that name is an error now, not at the first save
        os.makedirs(os.path.join(cfg.out_dir, 'adapter' if cfg.lora_rank else ''), exist_ok=True)
        if not os.access(cfg.out_dir, os.W_OK):
            fail(f"--out_dir={cfg.out_dir}: no permission; wanted a folder that can be written to")
        lock(os.path.join(cfg.out_dir, '.lock'))
        finish_save(cfg.out_dir)
        state, here = (os.path.exists(os.path.join(cfg.out_dir, name)) for name in ('state.pt', 'config.json'))
        resume = state if cfg.resume == 'auto' else cfg.resume
        if resume and not state:
            fail(f"--resume=True: {cfg.out_dir}/state.pt is missing, there is no checkpoint to resume from")
        if here and not resume and not cfg.overwrite:
            fail(f"--out_dir={cfg.out_dir}: holds a checkpoint; continue it by --resume=True, replace it by "
                 "--overwrite=True, or choose another folder")
        log, new, kept = (os.path.join(cfg.out_dir, f'log{end}.jsonl') for end in ('', '.new', '.unsaved'))
        for unsaved in (new, *([] if here else [log])): # of a run that ended before its first save
            if os.path.exists(unsaved):
                os.replace(unsaved, kept) if read_log(unsaved) else os.remove(unsaved)
        if not resume:
            open(new if here else log, 'w').close()
    except OSError as e:
        fail(f"--out_dir={cfg.out_dir}: {e.strerror}; wanted a folder that can be written to")
    return resume

def log_of(out_dir):
    """Return the path of the log of the run at work."""
    new = os.path.join(out_dir, 'log.new.jsonl')
    return new if os.path.exists(new) else os.path.join(out_dir, 'log.jsonl')

def save_checkpoint(run, cfg, model, tokenizer, step, optimizers, samples=(), **more):
    """Write a checkpoint folder: weights, tokenizer, options.json, and state.pt to resume from.

    step: finished steps. optimizers: {name: optimizer}. samples: lines for samples.jsonl. more: further state, tensors
    and plain values. The files go to out_dir/.saving; its rename to .saved makes them count, and after a kill
    `finish_save` completes the rest. The first process writes; all must call this, each has its random generator.
    """
    cuda = {'cuda': torch.cuda.get_rng_state(run.device)} if run.device.startswith('cuda') else {}
    rng = {'cpu': torch.get_rng_state()} | cuda
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    about = dict(script=script_of(cfg), options=dataclasses.asdict(cfg), step=step, max_steps=cfg.max_steps)
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad} if cfg.lora_rank else {}
    more |= dict(rng=run.gather(rng), scaler=run.scaler.state_dict(), optimizers=states, adapter=adapter)
    run.first(lambda: write_checkpoint(cfg, model, tokenizer, about, more, run.inputs, samples))

def write_checkpoint(cfg, model, tokenizer, about, more, inputs, samples):
    """Write the files of a checkpoint; about: for options.json and state.pt, more: for state.pt alone."""
    for name, p in model.named_parameters():
        if not torch.stack(p.aminmax()).isfinite().all(): # of all that is NaN both are NaN
            fail(f"{name} is not finite after step {about['step']}; nothing was saved since the last checkpoint in "
                 f"{cfg.out_dir}; a lower --lr usually helps", code=1)
    new = os.path.join(cfg.out_dir, '.saving')
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        lock(os.path.join(cfg.out_dir, '.lock'))
        model.save_pretrained(new, tokenizer.eos, tokenizer.pad)
        tokenizer.save(new, 'left' if model.reward_head is None else 'right')
        if cfg.lora_rank:
            weights.save_adapter(model, cfg, os.path.join(new, 'adapter'))
        if samples:
            write_atomic(os.path.join(new, 'samples.jsonl'), ''.join(line + '\n' for line in samples))
        more |= dict(log_lines=len(read_log(log_of(cfg.out_dir)))) # a resumed run drops later lines
        torch.save(about | more, os.path.join(new, 'state.pt'))
        files = {name: digest(os.path.join(new, name)) for name in ('model.safetensors', 'state.pt')}
        about |= dict(finished=about['step'] >= cfg.max_steps, inputs=inputs, files=files, torch=torch.__version__)
        write_atomic(os.path.join(new, 'options.json'), json.dumps(about, indent=1))
        for name in files_in(new): # on the disk before the rename is
            with open(os.path.join(new, name), 'rb') as f:
                os.fsync(f.fileno())
        os.rename(new, os.path.join(cfg.out_dir, '.saved'))
        finish_save(cfg.out_dir)
    except (OSError, RuntimeError, SafetensorError) as e: # a full disk is either, by who writes
        shutil.rmtree(new, ignore_errors=True)
        fail(f"{cfg.out_dir}: the checkpoint of step {about['step']} could not be written ({e}); the last one is "
             "intact", code=1)

def save_if_due(run, cfg, step, save):
    """Call save(step) if due, at the end, and on Ctrl-C. Ctrl-C then ends the program; step: finished steps."""
    stopping = run.stop_requested()
    if stopping or step == cfg.max_steps or (cfg.save_every and step % cfg.save_every == 0):
        save(step)
    if stopping:
        if run.is_master:
            tqdm.write(f"saved {cfg.out_dir} at step {step}; --resume=True continues from there", file=sys.stderr)
        raise KeyboardInterrupt(stopping)

def finish_save(out_dir):
    """Move the files of a completely written checkpoint into place; a start after a kill calls it too."""
    done, log = os.path.join(out_dir, '.saved'), os.path.join(out_dir, 'log.new.jsonl')
    names = files_in(done) # none without the folder
    for name in {*OPTIONAL} - {*names} if 'config.json' in names else (): # the first to move: none has moved yet
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, name))
    if names and os.path.exists(log):
        os.replace(log, os.path.join(out_dir, 'log.jsonl'))
    for name in names:
        os.makedirs(os.path.dirname(os.path.join(out_dir, name)), exist_ok=True)
        os.replace(os.path.join(done, name), os.path.join(out_dir, name))
    shutil.rmtree(done, ignore_errors=True)
    with contextlib.suppress(OSError): # where anything is left in it
        os.rmdir(os.path.join(out_dir, 'adapter'))

def files_in(folder):
    """Return the paths of all files in it, relative: its own, then its folders'."""
    return [os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in sorted(files)]

def script_of(cfg):
    """Return the name of the script whose Config this is."""
    return os.path.basename(sys.modules[type(cfg).__module__].__file__)

def read_about(out_dir):
    """Read options.json; fail where the files beside it have changed."""
    about = read_json(os.path.join(out_dir, 'options.json'), 'what save_checkpoint writes')
    if not all(isinstance(about.get(key), dict) for key in ('files', 'inputs', 'options')) or len(about['files']) != 2:
        fail(f"{out_dir}/options.json: wanted `files`, `inputs` and `options` as save_checkpoint writes them")
    for name, expected in about['files'].items():
        path = os.path.join(out_dir, name)
        if digest(path) != expected:
            fail(f"{path}: not a state to resume from (it changed since it was saved: options.json has another sha256)")
    return about

def load_checkpoint(run, cfg, model, optimizers):
    """Restore weights, optimizers and random generators from the checkpoint in cfg.out_dir.

    Returns its state (with 'step'), or None when the run is not resumed. Call it just before the loop, when everything
    else is built. The number of processes may differ from the saving run.
    """
    if not cfg.resume:
        return None
    path = os.path.join(cfg.out_dir, 'state.pt')
    about = run.first(lambda: read_about(cfg.out_dir))
    fields, *tensors = weights.open_pretrained(cfg.out_dir)
    lora = {key: about['options'].get(key, getattr(type(cfg), key)) for key in ('lora_rank', 'lora_on')} # older: none
    for name, old in (fields | lora).items():
        if old != (new := getattr(model.config, name, getattr(cfg, name, None))):
            fail(f"--resume=True: {name} is {old} in {cfg.out_dir} and {new} in this run; wanted the same model")
    for name in {**about['inputs'], **run.inputs}: # one that only one of the two runs has is another too
        if run.inputs.get(name) != about['inputs'].get(name):
            told = f"--{name}={getattr(cfg, name, '')}: is not what the run in {cfg.out_dir} began with"
            note(f"{told}; going on with it") if name in DATA else fail(f"{told}; wanted the same model")
    if not cfg.lora_rank:
        weights.load_tensors(model, *tensors)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if (made_by := state.get('script', 'an older version')) != script_of(cfg):
            fail(f"--resume=True: the checkpoint in {cfg.out_dir} is one of {made_by}; wanted one of {script_of(cfg)}")
        model.load_state_dict(state.get('adapter', {}), strict=False)
        for name, optimizer in optimizers.items():
            new = state['optimizers'][name]
            for saved, group in zip(new['param_groups'], optimizer.param_groups): # options may have changed
                saved.update({k: v for k, v in group.items() if k != 'params'})
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
    for key, old in state['options'].items():
        if getattr(cfg, key, old) != old and key not in ('out_dir', 'resume', 'overwrite', 'tokenizer', *MODELS, *DATA):
            note(f"--{key}: {old!r} before, {getattr(cfg, key)!r} from here on")
    if run.is_master:
        log = os.path.join(cfg.out_dir, 'log.jsonl') # drop the lines logged after the checkpoint
        write_atomic(log, ''.join(json.dumps(line) + '\n' for line in read_log(log)[:state['log_lines']]))
        note(f"resumed from {cfg.out_dir} at step {state['step']}")
    return state

def log(run, cfg, step, **metrics):
    """Append a line to out_dir/log.jsonl; step counts finished optimizer steps (iterations in the RL scripts)."""
    if run.is_master:
        line = dict(step=step, **{k: float(f"{float(v):.8g}") for k, v in metrics.items()}, time=round(time.time(), 2))
        os.makedirs(cfg.out_dir, exist_ok=True) # somebody may have removed it
        lock(os.path.join(cfg.out_dir, '.lock'))
        with open(log_of(cfg.out_dir), 'a', encoding='utf-8') as f:
            f.write(json.dumps(line) + '\n')
        if run.tensorboard:
            for key, value in metrics.items():
                run.tensorboard.add_scalar(key, value, step)
            run.tensorboard.flush()

def read_log(path):
    """Return the lines of a log.jsonl; a last one that a kill cut short is dropped."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8', errors='replace') as f:
        for text in f:
            with contextlib.suppress(ValueError, RecursionError): # the latter of brackets nested too deeply
                lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]

def read_options(folder):
    """Return a checkpoint's options.json, {} where there is none."""
    path = os.path.join(folder, 'options.json')
    return read_json(path) if os.path.exists(path) else {}

def load_model(folder, option, wanted, overrides):
    """Load a checkpoint's model, if it is what is wanted; note that it was saved before its run's end."""
    weights.check_folder(folder, option)
    about = read_options(folder)
    if about.get('finished') is False:
        note(f"--{option}={folder}: unfinished, saved at step {about.get('step')} of {about.get('max_steps')}")
    model = GPT.from_pretrained(folder, **overrides)
    kind = 'a reward model' if model.was_reward_model else 'a language model'
    if not wanted.startswith(kind):
        fail(f"--{option}={folder}: is {kind}, wanted {wanted}")
    return model

def load_policy(folder, option='policy', **overrides):
    """Load a language model; a reward model is refused, naming the option that gave it."""
    return load_model(folder, option, 'a language model', dict(value_head=False) | overrides) # PPO's holds its critic

def load_reward_model(folder, option='reward_model', **overrides):
    """Load a reward model; a language model is refused, naming the option that gave it."""
    return load_model(folder, option, 'a reward model (made by reward.py)', overrides)
