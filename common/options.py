"""Read a script's options from its command line, and report errors.

Options are the fields of a script's dataclass `Config`, which inherits those that scripts share from RunOptions or
TrainOptions. Bad input ends the program with one line on stderr and exit code 2.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import signal
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import get_args

def fail(message, code=2):
    """Print the error in one line, and exit. Code 2 is the user's, 1 that of a run that went wrong."""
    escape = lambda found: found[0].encode('unicode_escape').decode() # a text in it may hold line ends or worse
    from tqdm import tqdm # here: most runs do not fail. Its write() clears a progress bar's line first
    tqdm.write('error: ' + re.sub('[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]', escape, message), file=sys.stderr)
    raise SystemExit(code)

def note(text):
    """Print a line for the user, from the first process alone."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)

def leave_closed_terminal():
    """Send the output nowhere where the terminal is closed: to write to it is an error."""
    for file in (1, 2):
        try:
            os.write(file, b'')
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), file)

def require(cfg, **wishes):
    """Raise ValueError where a wish does not hold, as in require(self, lr=(self.lr > 0, 'above 0'))."""
    for key, (holds, wish) in wishes.items():
        if not holds:
            raise ValueError(f"{key} must be {wish}, got {getattr(cfg, key)!r}")

def unread(cfg, read, reader, *keys):
    """Refuse the options `keys` where they are not read; `reader` reads them. A value equal to the default passes.

        unread(self, self.loss == 'dpo', 'loss=dpo', 'label_smoothing')
    """
    for key in keys:
        default = getattr(type(cfg), key)
        require(cfg, **{key: (read or getattr(cfg, key) == default, f"left at {default!r}: only {reader} reads it")})

# ---- options that scripts share ---------------------------------------------------------------------------------

AT_LEAST = dict( # checked in every script that has the option
    max_steps=0, epochs=1, grad_accum=1, warmup_steps=0, lr=0, grad_clip=0, weight_decay=0, beta2=0, eval_every=0,
    eval_batches=0, save_every=0, log_every=1, n_layer=1, n_head=1, n_embd=1, block_size=2, max_new_tokens=1, seed=0,
    minibatches=1, kl_coef=0, kl_target=0, missing_eos_penalty=0, clip=0, value_clip=0, value_coef=0, entropy_coef=0,
    early_stop_kl=0, critic_lr=0, clip_high=0, refill=0, ptx_coef=0, ptx_batch_size=1, lm_coef=0,
    normalise_on=1, rank_coef=0, desirable_weight=0, undesirable_weight=0, simpo_margin=0, lcb_coef=0, length_penalty=0,
    beta=0, dropout=0, lora_rank=0, lora_alpha=0, show=0)
ONE_OF = dict(dtype=('auto', 'float32', 'bfloat16', 'float16'), lora_on=('attn', 'all'),
              lr_schedule=('constant', 'linear', 'cosine'))

@dataclass
class RunOptions:
    """Hold the options of all scripts: device, precision and seed."""
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that

    def __post_init__(self):
        mine = lambda table: ((key, getattr(self, key), wish) for key, wish in table.items() if hasattr(self, key))
        require(self, **{key: (value >= low, f"at least {low}") for key, value, low in mine(AT_LEAST)})
        require(self, **{key: (value in all, f"one of {', '.join(all)}") for key, value, all in mine(ONE_OF)})
        require(self, seed=(self.seed < 2**32, 'below 2^32'), beta2=(getattr(self, 'beta2', 0) < 1, 'below 1'),
                dropout=(getattr(self, 'dropout', 0) < 1, 'below 1'),
                device=(self.device in ('auto', 'cpu', 'cuda', 'mps') or self.device.startswith('cuda:'),
                        'auto, cpu, cuda, cuda:N or mps'))

@dataclass
class TrainOptions(RunOptions):
    """Hold the options of all training scripts: how they compute, save and resume."""
    compile: bool = False # torch.compile: meant for long runs
    checkpointing: bool = False # compute activations again in the backward pass: less memory, more time
    out_dir: str = 'out/run' # the checkpoint
    lora_rank: int = 0 # above 0: freeze the weights and train adapters of this rank (LoRA), which takes less memory
    lora_alpha: float = 0.0 # an adapter weighs lora_alpha / lora_rank; 0 = 2 * lora_rank
    lora_on: str = 'attn' # attn: queries, keys and values; all: every linear layer
    save_every: int = 500 # steps between checkpoints; 0 = only at the end
    log_every: int = 10 # steps between lines of log.jsonl
    tensorboard: bool = False # also write the log to out_dir/tensorboard; needs the package of that name
    resume: bool | str = False # resume from the checkpoint in out_dir; auto: if there is one
    overwrite: bool = False # replace the checkpoint in out_dir
    grad_accum: int = 1 # micro-batches, of rows of like length, that a batch is split into
    weight_decay: float = 0.0
    grad_clip: float = 1.0 # largest gradient norm; 0 = no clipping
    lr_schedule: str = 'linear' # after warmup: constant, linear (to 0), cosine (to a tenth)

    def __post_init__(self):
        super().__post_init__()
        require(self, resume=(self.resume in (True, False, 'auto'), 'True, False or auto'),
                overwrite=(not (self.overwrite and self.resume), 'False with resume'),
                tensorboard=(not self.tensorboard or find_spec('tensorboard'), 'False before pip install tensorboard'),
                batch_size=(getattr(self, 'batch_size', 1) >= 1, 'at least 1'))
        unread(self, self.lora_rank, 'lora_rank', 'lora_alpha', 'lora_on')
        self.lora_alpha = self.lora_alpha or 2.0 * self.lora_rank

@dataclass
class DataOptions(TrainOptions):
    """Hold the options of the scripts that learn from a file: sft, reward, dpo, rrhf, kto."""
    train_data: str = '' # what is learnt
    val_data: str = '' # the same, held out
    max_steps: int = 0 # optimizer steps; 0: as many as `epochs` passes take
    epochs: int = 1 # with max_steps=0
    batch_size: int = 32 # prompts or rows per optimizer step, over all processes and micro-batches
    warmup_steps: int = 20
    beta2: float = 0.99 # AdamW
    eval_every: int = 100 # steps between measurements on val_data; 0 = only at the end

    def __post_init__(self):
        super().__post_init__()
        require(self, train_data=(self.train_data != '', 'a file of records, see --help'))
        held_out = self.val_data or getattr(self, 'val_fraction', 0)
        unread(self, held_out or self.eval_every == 0, 'val_data', 'eval_every')

# ---- the command line -------------------------------------------------------------------------------------------

def parse_config(cls, argv=None):
    """Build the dataclass `cls` from its defaults, config files and flags.

        python dpo.py config/toy/dpo.py --beta=0.2 --resume=True

    Defaults < config files, left to right < --key=value flags; `--key value`, and `--key` for True, are read too. A
    config file is `name = literal` lines and comments. It is parsed, never executed. Fields are str, int, float or
    bool. An unknown key, a wrong type or an impossible value (__post_init__) ends the program with exit code 2.
    """
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    values, origin = {}, {}
    kinds = lambda key: get_args(types[key]) or (types[key],) # bool | str has two

    def put(key, value, where):
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f", did you mean {near[0]}?" if near else '; --help lists the options'
            fail(f"{where}: unknown option {key}{hint}")
        if types[key] is float and type(value) is int:
            value = float(value) if abs(value) < 2**63 else math.inf # --lr=1 means 1.0
        if type(value) not in kinds(key): # exact, so True is no int and 1 is no bool
            fail(f"{where}: {key} must be {' or '.join(kind.__name__ for kind in kinds(key))}, got {value!r}")
        if type(value) is float and not math.isfinite(value) or type(value) is int and abs(value) >= 2**63:
            fail(f"{where}: {key} must be {'finite' if type(value) is float else 'below 2^63'}, got {value}")
        values[key], origin[key] = value, where

    args = sys.argv[1:] if argv is None else argv
    if {'-h', '--help'} & {*args}:
        print_help(cls)
        raise SystemExit(0)
    for arg in sorted(joined(args, types), key=lambda arg: arg.startswith('--')): # a flag wins wherever it stands
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=') # split at the first '=' only
            key = key.replace('-', '_')
            if not equals and key in types:
                fail(f"{arg}: expected --key=value")
            try:
                value = text if types.get(key, str) is str else ast.literal_eval(SAID.get(text, text))
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
                (key,), value = (target.id for target in node.targets), ast.literal_eval(node.value)
            except (ValueError, TypeError, AttributeError):
                fail(f"{arg}:{node.lineno}: expected `name = literal`")
            put(key, value, f"{arg}:{node.lineno}")
    try:
        return cls(**values)
    except ValueError as e: # __post_init__ raises it as "key must be ..., got ..."
        where = origin.get(str(e).split()[0])
        fail(f"{where}: {e}" if where else str(e))

SAID = {'true': 'True', 'false': 'False', 'True': 'True', 'False': 'False'} # what people type

def joined(args, types):
    """Join `--key value` to `--key=value`; a bare switch is True."""
    args, out = list(args), []
    while args:
        arg = args.pop(0)
        if arg.startswith('--') and '=' not in arg:
            kind = types.get(arg[2:].replace('-', '_'))
            if bool in (get_args(kind) or [kind]) and (not args or args[0] not in (*SAID, 'auto')):
                arg += '=True'
            elif args and not args[0].startswith('--'):
                arg += '=' + args.pop(0)
        out.append(arg)
    return out

def print_help(cls):
    """Print a script's docstring and its options: its own first, then those that it shares."""
    print((inspect.getmodule(cls).__doc__ or '').strip())
    print('\noptions, as --key=value or as lines of a config file:\n')
    defaults, told = {f.name: f.default for f in dataclasses.fields(cls)}, set()
    for base in (c for c in cls.__mro__ if dataclasses.is_dataclass(c)):
        if told: # what its docstring says that it holds
            print(f"\n{base.__doc__.partition('.')[0].removeprefix('Hold the ')}:\n")
        for line in inspect.getsource(base).splitlines():
            name, colon, rest = line.strip().partition(': ')
            if colon and name in base.__annotations__ and name not in told:
                told.add(name)
                print(f"  --{name}={defaults[name]!r}" + (f"    # {rest.partition(' # ')[2]}" if ' # ' in rest else ''))

def launch(main, Config):
    """Run a script; errors become one line and an exit code.

    Ctrl-C is exit code 130, SIGTERM 143, a full disk or too little memory 1, a file that cannot be opened or made 2.
    """
    code = 0
    try:
        run_guarded(main, Config)
    except SystemExit as ended:
        code = ended.code
    if os.environ.get('WORLD_SIZE', '1') != '1':
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code) # at a usual exit a thread of torch.distributed now and then aborts the process
    if code:
        raise SystemExit(code)

def run_guarded(main, Config):
    """Call main with its options; errors end with one line."""
    try:
        main(parse_config(Config))
    except KeyboardInterrupt as e: # its argument: the signal's number (common/run.py)
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + (e.args or (signal.SIGINT,))[0])
    except BrokenPipeError: # of `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # the rest of the output is dropped
        raise SystemExit(141)
    except RuntimeError as e: # torch.OutOfMemoryError is one of these; for CPUs and Apple's GPUs torch has none
        if type(e).__name__ != 'OutOfMemoryError' and not re.search(
                "out of memory|not enough memory|can't allocate memory", str(e)):
            raise
        fail("out of memory; wanted less at once: a larger --grad_accum, a smaller --batch_size, --checkpointing=True, "
             "shorter rows or a smaller model (bench.py --workload=memory says what a stage needs); what was saved "
             "before is intact", code=1)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fail(f"{e.strerror}: a file could not be written; what was saved before is intact", code=1)
        if e.filename is None:
            raise
        fail(f"{e.filename}: {e.strerror}")
