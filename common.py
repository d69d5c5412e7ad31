"""
What every stage script needs and no paper is about: options, devices and processes, the learning rate, checkpoints
that survive a kill at any moment, and the log. No algorithm maths lives here.

Import this module before torch: it sets how torch's CPU threads wait (see below).
"""

import ast
import bisect
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings

# Two OpenMP threads that spin while they wait starve each other as soon as any other process is busy.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

# glibc gives every large block back to the kernel as soon as it is freed, and the next step's tensors fault the pages
# in again: a tenth of the time of a small model's step. Keep blocks of up to 32 MB, its largest allowed threshold.
with contextlib.suppress(OSError, AttributeError): # another C library
    libc = ctypes.CDLL('libc.so.6')
    libc.mallopt(-3, 32 * 2**20) # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**30) # M_TRIM_THRESHOLD

import torch
import torch.distributed as dist
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# options and errors

def fail(message):
    """The user's input is wrong: say so in one line and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(cls, argv=None):
    """
    Build the dataclass `cls`:  its defaults  <  config files, left to right  <  --key=value flags

        python dpo.py config/toy/dpo.py --beta=0.2 --resume=True

    A config file is `name = literal` lines and comments. It is parsed, never executed. Fields are str, int, float or
    bool. An unknown key, a wrong type or (through the dataclass's own __post_init__) an impossible value stops the
    program with one line and exit code 2.
    """
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    values, origin = {}, {}

    def put(key, value, where):
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; the options are {', '.join(types)}"
            fail(f"{where}: unknown option {key}{hint}")
        if types[key] is float and type(value) is int:
            value = float(value) # --lr=1 means 1.0
        if type(value) is not types[key]: # exact, so True is no int and 1 is no bool
            fail(f"{where}: {key} must be {types[key].__name__}, got {value!r}")
        values[key], origin[key] = value, where

    args = sys.argv[1:] if argv is None else argv
    for arg in sorted(args, key=lambda arg: arg.startswith('--')): # files first: a flag wins wherever it stands
        if arg in ('-h', '--help'):
            print_help(cls)
            raise SystemExit(0)
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=') # split at the first '=' only
            if not equals:
                fail(f"{arg}: expected --key=value")
            try:
                value = text if types.get(key, str) is str else ast.literal_eval(text)
            except (ValueError, SyntaxError, TypeError):
                value = text # reported by put as a value of the wrong type
            put(key, value, arg)
            continue
        try:
            with open(arg, encoding='utf-8') as f:
                nodes = ast.parse(f.read(), arg).body
        except (OSError, ValueError) as e:
            fail(f"{arg}: no such config file ({getattr(e, 'strerror', None) or e}); options are written --key=value")
        except SyntaxError as e:
            fail(f"{arg}:{e.lineno}: expected a file of `name = literal` lines")
        for node in nodes:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue # a docstring
            try:
                (target,), value = node.targets, ast.literal_eval(node.value)
                key = target.id
            except (ValueError, TypeError, AttributeError):
                fail(f"{arg}:{node.lineno}: expected `name = literal`")
            put(key, value, f"{arg}:{node.lineno}")
    try:
        return cls(**values)
    except ValueError as e: # __post_init__ raises it as "key must be ..., got ..."
        where = origin.get(str(e).split()[0])
        fail(f"{where}: {e}" if where else str(e))


def print_help(cls):
    """The options of a script are the lines of its Config, comments included: show those."""
    import inspect
    module = inspect.getmodule(cls)
    print((module.__doc__ or '').strip() + '\n\noptions, as --key=value or as lines of a config file:\n')
    for line in inspect.getsource(cls).splitlines():
        if ': ' in line and '=' in line and line.startswith('    ') and not line.startswith('     '):
            print(line)


def require(cfg, **wishes):
    """require(cfg, lr=(cfg.lr > 0, 'above 0')): used in __post_init__, names the key, the value and the wish."""
    for key, (holds, wish) in wishes.items():
        if not holds:
            raise ValueError(f"{key} must be {wish}, got {getattr(cfg, key)!r}")


def check_common(cfg):
    """The range checks of the options that all stages share; a script's __post_init__ adds its own with require."""
    at_least = dict(max_steps=0, epochs=1, batch_size=1, grad_accum=1, warmup_steps=0, lr=0, grad_clip=0,
                    weight_decay=0, eval_every=0, eval_batches=0, save_every=0, log_every=1, n_layer=1, n_head=1,
                    n_embd=1, block_size=2, max_new_tokens=1, seed=0)
    for key, low in at_least.items():
        if hasattr(cfg, key):
            require(cfg, **{key: (getattr(cfg, key) >= low, f"at least {low}")})
    if hasattr(cfg, 'seed'):
        require(cfg, seed=(cfg.seed < 2**32, 'below 2^32'))
    one_of = dict(device=('auto', 'cpu', 'cuda', 'mps'), dtype=('auto', 'float32', 'bfloat16', 'float16'),
                  lr_schedule=('constant', 'linear', 'cosine'))
    for key, choices in one_of.items():
        if hasattr(cfg, key):
            name = getattr(cfg, key)
            holds = name in choices or (key == 'device' and name.startswith('cuda:'))
            require(cfg, **{key: (holds, f"one of {', '.join(choices)}")})
    if getattr(cfg, 'fsdp', False):
        require(cfg, compile=(not cfg.compile, 'False with fsdp=True'))


def launch(main, Config):
    """
    What a script's guard calls: parse the options, run. Ctrl-C is exit code 130, a full disk 1, a file that cannot be
    opened or made 2, each with one line.
    """
    try:
        main(parse_config(Config))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    except BrokenPipeError: # of `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # what is still to be flushed goes nowhere
        raise SystemExit(141)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: {e.strerror}: a file could not be written; what was saved before is intact",
                  file=sys.stderr)
            raise SystemExit(1)
        if e.filename is None:
            raise
        fail(f"{e.filename}: {e.strerror}")

# ----------------------------------------------------------------------------------------------------------------
# device, precision, processes

@dataclasses.dataclass
class Run:
    """Where and how a script runs: device, autocast type, and its place among the processes started by torchrun."""
    device: str
    dtype: str
    rank: int = 0
    world_size: int = 1
    interrupted: bool = False # set by the first Ctrl-C, read by `stop_requested` between two steps

    def __post_init__(self):
        # float16 ends at 6e-8: the loss is scaled up so that small gradients survive (Micikevicius et al. 2018,
        # https://arxiv.org/abs/1710.03740, section 3.2). With any other dtype the scaler does nothing
        self.scaler = torch.amp.GradScaler(self.device.split(':')[0], enabled=self.dtype == 'float16')

    @property
    def is_master(self):
        return self.rank == 0

    def autocast(self):
        """Matrix products in 16 bits where dtype asks for it; weights, losses and log-softmax stay in float32."""
        if self.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(':')[0], dtype=getattr(torch, self.dtype))

    def freeze(self, model):
        """
        Hold a model that is never trained, and works under autocast alone, in less memory: the linear layers' weights
        in the 16 bits that autocast would round them to at every pass. No result changes by a bit.
        """
        for module in model.requires_grad_(False).modules():
            if self.dtype != 'float32' and isinstance(module, torch.nn.Linear):
                module.to(getattr(torch, self.dtype))
        return model

    def backward(self, loss):
        """Add the gradients of this process's share of the loss (); scaled in float16, see optimizer_step."""
        self.scaler.scale(loss * self.world_size).backward() # DistributedDataParallel averages gradients: undo that

    def sum(self, x):
        """Sum of a number or tensor over all processes."""
        x = torch.as_tensor(x, dtype=torch.float32, device=self.device)
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def gather(self, x):
        """What every process passes as x, as a list by rank."""
        if self.world_size == 1:
            return [x]
        everybody = [None] * self.world_size
        dist.all_gather_object(everybody, x)
        return everybody

    def merge(self, mine):
        """The entries of every process's dict, in one dict."""
        return {k: v for part in self.gather(mine) for k, v in part.items()}

    def mean(self, totals, n):
        """{name: total / n} over all processes, of numbers; one that had no rows passes {} and 0."""
        found = self.gather((totals, n))
        return {k: sum(t.get(k, 0.0) for t, _ in found) / sum(n for _, n in found) for k in found[0][0]}

    def rows(self, batch):
        """This process's share of the rows of a batch."""
        return batch[self.rank::self.world_size]

    def parallel(self, model, compile=False, fsdp=False, checkpointing=False, unused=False):
        """
        A callable `net('method', *args)` for the model's methods, with gradients averaged over the processes.
        DistributedDataParallel sees only what passes through its forward, so every method goes through it.

        fsdp: each process keeps a part of every weight, and later of its gradient and its optimizer's state. A block's
        weights are gathered while it works (fully_shard: Zhao et al. 2023, https://arxiv.org/abs/2304.11277). To be
        called before the optimizer is made: the parameters are replaced. unused: a backward pass may leave some out.
        """
        net = Methods(model)
        model.checkpointing = checkpointing
        if compile:
            net.compile()
            model.compile_decoding()
        if fsdp:
            from torch.distributed.device_mesh import init_device_mesh # slow to import
            from torch.distributed.fsdp import fully_shard
            for p in model.parameters():
                dist.broadcast(p.data, 0) # as DistributedDataParallel does: fresh weights are the first process's
            # "returned a view tensor": nothing here changes an output in place
            warnings.filterwarnings('ignore', message='FSDP2-wrapped module')
            mesh = init_device_mesh(self.device.split(':')[0], (self.world_size,))
            for part in (*model.h, net): # the rest, embeddings and heads, goes with the root
                fully_shard(part, mesh=mesh)
        elif self.world_size > 1:
            ids = [int(self.device.split(':')[1])] if self.device.startswith('cuda') else None
            net = torch.nn.parallel.DistributedDataParallel(
                net, device_ids=ids, find_unused_parameters=unused)
        return net

    @torch.no_grad()
    def whole(self, model):
        """
        The model itself or, where fsdp has spread its weights over the processes, a copy that has them all: for
        sampling, measuring and saving, in which the processes go separate ways. All of them have to call this.
        """
        if not any(is_spread(p) for p in model.parameters()):
            return model
        with torch.device('meta'): # draws no random numbers
            copy = type(model)(model.config)
        copy.to_empty(device=self.device).train(model.training)
        for p, q in zip(copy.parameters(), model.parameters(), strict=True):
            p.copy_(q.full_tensor())
        return copy

    def stop_requested(self):
        """True on every process once any of them was sent Ctrl-C."""
        return bool(self.sum(float(self.interrupted)) > 0) if self.world_size > 1 else self.interrupted


def is_spread(x):
    """Whether fsdp has spread a tensor over the processes (torch calls it a DTensor)."""
    return hasattr(x, 'full_tensor')


def spread_like(p, x):
    """A whole tensor x, the same in every process, laid out as the parameter p is."""
    if not is_spread(p):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) # no sending: everybody has it


class Methods(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, method, *args):
        return getattr(self.model, method)(*args)


def start(cfg):
    """Choose the device, join the other processes, seed the generators; returns the Run."""
    device = cfg.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device.startswith('cuda') and not torch.cuda.is_available():
        fail(f"--device={cfg.device}: torch sees no CUDA device; use --device=cpu or auto")
    if device == 'mps' and not torch.backends.mps.is_available():
        fail("--device=mps: torch sees no Apple GPU; use --device=cpu or auto")
    dtype = cfg.dtype
    if dtype == 'auto':
        dtype = 'float32'
        if device.startswith('cuda'): # GPUs before Ampere could only imitate bfloat16, slowly
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    run = Run(device, dtype, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1)))
    pieces = run.world_size * getattr(cfg, 'grad_accum', 1)
    if getattr(cfg, 'batch_size', pieces) % pieces:
        fail(f"--batch_size={cfg.batch_size}: must be a multiple of {pieces}, processes x grad_accum")
    if getattr(cfg, 'fsdp', False) and run.world_size == 1:
        fail("--fsdp=True: this is one process; wanted several, as in torchrun --nproc_per_node=2")
    if getattr(cfg, 'fsdp', False) and dtype == 'float16':
        fail("--fsdp=True: the scale of float16 is not shared by the processes; wanted --dtype=bfloat16 or float32")
    if run.world_size > 1:
        if device not in ('cuda', 'cpu'):
            fail(f"--device={cfg.device}: several processes take --device=cuda, one GPU for each, or --device=cpu")
        if device == 'cuda':
            local, here = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
            if local >= here:
                fail(f"process {local} finds no GPU of its own; wanted --nproc_per_node of at most {here}")
            run.device = f"cuda:{local}"
            torch.cuda.set_device(run.device)
        dist.init_process_group('nccl' if device.startswith('cuda') else 'gloo')
    if device.startswith('cuda'):
        torch.set_float32_matmul_precision('high') # TF32 where a product stays in float32
    torch.manual_seed(cfg.seed + run.rank) # each process samples its own answers; weights are shared by DDP

    def on_interrupt(signum, frame):
        if run.interrupted:
            raise KeyboardInterrupt # the second Ctrl-C does not wait for the end of the step
        run.interrupted = True
        if run.is_master:
            print("\nstopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, on_interrupt)
    return run


def stop(run):
    """The counterpart of start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if run.world_size > 1:
        dist.destroy_process_group()


def progress(iterable=None, **kwargs):
    """A tqdm bar; where the output goes to a file, a line every ten seconds and not ten a second."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 10, dynamic_ncols=True, **kwargs)


def training_bar(run, cfg, first):
    """The bar over the steps first, first + 1, … of a training run."""
    return progress(range(first, cfg.max_steps), initial=first, total=cfg.max_steps, desc=cfg.out_dir,
                    disable=not run.is_master)


def note(text):
    """A line for the user, from the first process alone."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


def say(run, bar, text):
    """One line above the bar, from one process."""
    if run.is_master:
        bar.write(text)

# ----------------------------------------------------------------------------------------------------------------
# optimisation

def lr_at(step, cfg, peak=None):
    """Learning rate of step 0, 1, …: warmup to peak (cfg.lr), then constant, linear to 0, or cosine to a tenth."""
    peak = cfg.lr if peak is None else peak
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps) # 0 … 1
    if cfg.lr_schedule == 'linear':
        return peak * (1 - done)
    if cfg.lr_schedule == 'cosine':
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    return peak


def make_optimizer(model, cfg, betas=(0.9, 0.999), eps=1e-8):
    """AdamW; weight decay on matrices only, as in GPT-2's descendants (gains, biases and heads' vectors are left)."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    fused = params[0].device.type in ('cpu', 'cuda') # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=eps, fused=fused)


def optimizer_step(optimizer, model, lr, grad_clip, scaler=None, last=True):
    """
    Clip (after backward, 0 = no clipping), step, clear; returns the gradient norm before clipping.

    scaler: that of Run.backward. In float16 a gradient that the scale drove to infinity is thrown away, the step left
    out, the scale halved, and 0 returned; with a scale below 1 it is the gradient's own fault, and the norm tells.
    last: this is the last of the optimizers that step after one backward pass, so the scale may change.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    norm = (norm.full_tensor() if is_spread(norm) else norm).item()
    left_out = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() >= 1
    if last:
        scaler.update()
    return 0.0 if left_out else norm


def split(rows, parts):
    """A list in `parts` parts of like size, in order."""
    size = math.ceil(len(rows) / parts)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def split_by_tokens(rows, lengths, parts, least=1):
    """
    The micro-batches of a batch: a list in `parts` parts of about the same number of tokens, short rows first, and at
    least `least` rows in each, so that every process gets one. lengths: the rows' tokens.
    """
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    before = [0, *itertools.accumulate(lengths[i] for i in order)] # tokens in front of each row, and all of them
    cuts = [0]
    for part in range(1, parts): # later parts have fewer rows, since theirs are longer: it is these that may lack some
        wish = bisect.bisect_left(before, before[-1] * part / parts)
        cuts.append(min(wish, len(rows) - least * (parts - part)))
    return [[rows[i] for i in order[a:b]] for a, b in itertools.pairwise(cuts + [len(rows)])]


def check_finite(name, value, step, out_dir):
    """A loss that is not a number never becomes one again: stop, and leave the last checkpoint as it is."""
    if not math.isfinite(value):
        print(f"error: {name} is {value} at step {step}; nothing was saved since the last checkpoint in {out_dir}; "
              "a lower --lr usually helps", file=sys.stderr)
        raise SystemExit(1)

# ----------------------------------------------------------------------------------------------------------------
# checkpoints from elsewhere

HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2') # the hub's GPT-2s that have no owner


def on_hub(name):
    """
    Whether a checkpoint's name means a model on the hub: one of HUB_NAMES, or OWNER/NAME. What is a folder here is the
    folder; out/NAME and FOLDER/NAME with a folder that is here are mistyped paths, and nobody goes looking for them.
    """
    owner, slash, _ = name.partition('/')
    if os.path.exists(name) or slash and (owner == 'out' or os.path.exists(owner)):
        return False
    return name in HUB_NAMES or re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name, re.ASCII) is not None


def fetch_from_hub(repo_id, filename, repo_type='model', absent_ok=False):
    """
    The local path of a file of the hub, fetched into huggingface_hub's cache; its environment variables hold, HF_HOME,
    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE among them. repo_type: model or dataset. What cannot be asked for is taken
    from the cache. With absent_ok a file that is not there is None; all else ends the program with one line.
    """
    import huggingface_hub as hub # here and nowhere else: whoever stays with folders needs no hub
    from huggingface_hub import errors
    file = dict(repo_id=repo_id, filename=filename, repo_type=repo_type)
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(**file)) # hf_hub_download alone asks for 25 s where no network is
        return hub.hf_hub_download(**file)
    except errors.RemoteEntryNotFoundError:
        if absent_ok:
            return None
        fail(f"{repo_id}: the {repo_type} on the hub has no file {filename}")
    except errors.GatedRepoError:
        reason = 'it is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN'
    except errors.RepositoryNotFoundError:
        reason = f"no folder of this name here, and no such {repo_type} there; a private one needs HF_TOKEN"
    except Exception as e: # no network, a switch that forbids it, a proxy, a full disk: the hub has no one exception
        reason = ' '.join((str(e) or type(e).__name__).split())[:200]
    try:
        return hub.hf_hub_download(**file, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        if absent_ok:
            return None
    files = 'config.json and model.safetensors' if repo_type == 'model' else filename
    fail(f"{repo_id}: cannot fetch {filename} from the hub ({reason}); without it, put {files} into a folder and name "
         f"that folder instead{' (--source=)' if repo_type == 'dataset' else ''}")


def checkpoint_file(name, filename, absent_ok=False):
    """The path of a checkpoint's file; name: a folder, or a model on the hub. absent_ok as in fetch_from_hub."""
    name = os.fspath(name)
    if on_hub(name):
        return fetch_from_hub(name, filename, absent_ok=absent_ok)
    path = os.path.join(name, filename)
    if os.path.exists(path):
        return path
    if absent_ok:
        return None
    fail(f"{path}: No such file or directory; wanted a checkpoint folder with config.json and model.safetensors, or a "
         f"model on the hub: {', '.join(HUB_NAMES)} or OWNER/NAME (with no folder OWNER here)")

# ----------------------------------------------------------------------------------------------------------------
# checkpoints and log

def write_atomic(path, text):
    """Write a text file so that a reader, or a kill, finds the old content or the new one, never half of it."""
    try:
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
        os.replace(path + '.tmp', path)
    except OSError: # a full disk needs the room
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise


def read_json(path, wanted='a JSON object'):
    """The JSON object in a file, as a dict; what cannot be read as one ends the program, naming what was `wanted`."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except OSError as e:
        fail(f"{path}: {e.strerror}; wanted {wanted}")
    except ValueError as e:
        fail(f"{path}: not JSON ({e})")
    if not isinstance(value, dict):
        fail(f"{path}: not {wanted}")
    return value


def prepare_out_dir(run, cfg):
    """
    Called before any work is done: the folder must be writable, and a checkpoint in it is only ever replaced when the
    user said so. Returns nothing; starts an empty log unless the run is resumed.
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
                fail(f"--resume=True: {cfg.out_dir}/state.pt is missing, there is no checkpoint to go on from")
            here = os.path.exists(os.path.join(cfg.out_dir, 'config.json'))
            if here and not cfg.resume and not cfg.overwrite:
                fail(f"--out_dir={cfg.out_dir}: holds a checkpoint; go on with it by --resume=True, replace it by "
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
    """
    Write a checkpoint folder: weights in the Hugging Face layout, the tokenizer, and state.pt to go on from.

    step: the number of finished steps. optimizers: {name: optimizer}. more: further state, tensors and plain values.
    All files are first written to out_dir/.saving; the rename to .saved is the moment at which the new checkpoint
    counts, and what a kill interrupts after it is finished by `finish_save` at the next start. The first process
    writes, but all have to call this: each has a random generator of its own, and with fsdp a part of everything.
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
        log_lines = len(read_log(os.path.join(cfg.out_dir, 'log.jsonl'))) # a resumed run forgets what comes after
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
    """
    At the end of every step: call save(step) when it is due, at the end, and on Ctrl-C, which then ends the program.
    step: the number of finished steps.
    """
    stopping = run.stop_requested()
    if stopping or step == cfg.max_steps or (cfg.save_every and step % cfg.save_every == 0):
        save(step)
    if stopping:
        if run.is_master:
            print(f"saved {cfg.out_dir} at step {step}; --resume=True goes on from there", file=sys.stderr)
        raise KeyboardInterrupt


def finish_save(out_dir):
    """Move the files of a completely written checkpoint into place; also what is left to do after a kill."""
    done = os.path.join(out_dir, '.saved')
    if os.path.isdir(done):
        for name in sorted(os.listdir(done)):
            os.replace(os.path.join(done, name), os.path.join(out_dir, name))
        os.rmdir(done)


def script_of(cfg):
    """The name of the script whose Config this is."""
    return os.path.basename(sys.modules[type(cfg).__module__].__file__)


def load_weights(model, tensors):
    """Fill the named parameters of a model, fsdp or not, from whole tensors."""
    params = dict(model.named_parameters())
    model.load_state_dict({k: spread_like(params[k], v) for k, v in tensors.items()}, strict=False)


def load_checkpoint(run, cfg, model, optimizers):
    """
    Put the weights, optimizers and random generators of cfg.out_dir's checkpoint back; returns its state (with
    'step'), or None when the run is not resumed. Called once everything else is built, just before the loop. The number
    of processes, and whether they use fsdp, may differ from those that saved.
    """
    if not cfg.resume:
        return None
    path = os.path.join(cfg.out_dir, 'state.pt')
    if not os.path.exists(path):
        fail(f"--resume=True: {path} is missing, there is no checkpoint to go on from")
    config, *weights = model.open_pretrained(cfg.out_dir)
    for f in dataclasses.fields(model.config):
        old, new = getattr(config, f.name), getattr(model.config, f.name)
        if f.name not in ('dropout', 'pad_vocab') and old != new: # these two are not in the checkpoint
            fail(f"--resume=True: {f.name} is {old} in {cfg.out_dir} and {new} in this run; wanted the same model")
    if any(map(is_spread, model.parameters())): # they cannot be filled in place
        whole = type(model)(model.config)
        whole.load_tensors(*weights)
        load_weights(model, whole.state_dict())
    else:
        model.load_tensors(*weights)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        made_by = state.get('script', 'an older version')
        if made_by != script_of(cfg):
            fail(f"--resume=True: the checkpoint in {cfg.out_dir} is one of {made_by}; wanted one of {script_of(cfg)}")
        old, new = state['options'].get('pad_vocab', False), model.config.pad_vocab
        if old != new: # the weights would fit, the optimizer's rows would not
            fail(f"--resume=True: pad_vocab is {old} in {cfg.out_dir} and {new} in this run; wanted the same model")
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
        fail(f"{path}: not a state to go on from ({type(e).__name__}: {' '.join(str(e).split())[:200]})")
    if run.is_master:
        log = os.path.join(cfg.out_dir, 'log.jsonl') # forget what was logged after the checkpoint
        write_atomic(log, ''.join(json.dumps(line) + '\n' for line in read_log(log)[:state['log_lines']]))
        note(f"resumed from {cfg.out_dir} at step {state['step']}")
    return state


def log(run, cfg, step, **metrics):
    """Append one line to out_dir/log.jsonl; step counts finished optimizer steps (iterations in the RL scripts)."""
    if run.is_master:
        line = dict(step=step, **{k: float(f"{float(v):.8g}") for k, v in metrics.items()}, time=round(time.time(), 2))
        with open(os.path.join(cfg.out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
            f.write(json.dumps(line) + '\n')


def read_log(path):
    """The lines of a log.jsonl; a last line that a kill cut short is left out."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            for text in f:
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
    return lines
