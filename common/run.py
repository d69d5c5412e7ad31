"""Choose a script's device and precision, and join the processes of torchrun.

Several processes hold the same weights, share every batch and sum their gradients: they train as one process would.
"""

import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.options import fail, leave_closed_terminal

@dataclass
class Run:
    """Hold the device, the autocast type, and the place among the processes."""
    device: str
    dtype: str
    rank: int = 0
    world_size: int = 1
    inputs: dict = field(default_factory=dict) # {option: digest} of the models and data that the run reads
    interrupted: int = 0 # the first signal to end, as Ctrl-C; read by `stop_requested` between two steps
    tensorboard: object = None # a SummaryWriter, where that is asked for

    def __post_init__(self):
        # float16 ends at 6e-8: the loss is scaled up so that small gradients survive (Micikevicius et al. 2018,
        # https://arxiv.org/abs/1710.03740, section 3.2). With any other dtype the scaler does nothing
        self.scaler = torch.amp.GradScaler(self.device.split(':')[0], enabled=self.dtype == 'float16')

    @property
    def is_master(self):
        return self.rank == 0

    def autocast(self):
        """Do matrix products in 16 bits where dtype asks for it; weights, losses and log-softmax stay in float32."""
        if self.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(':')[0], dtype=getattr(torch, self.dtype))

    def freeze(self, model):
        """Store a never-trained model's linear weights in autocast's 16 bits; return it. No result changes by a bit."""
        for module in model.requires_grad_(False).modules():
            if self.dtype != 'float32' and isinstance(module, torch.nn.Linear):
                module.to(getattr(torch, self.dtype))
        return model

    def backward(self, loss):
        """Add the gradients of this process's loss (), scaled in float16 (see optimizer_step)."""
        self.scaler.scale(loss).backward()

    def sum(self, x):
        """Return the sum of a number or tensor over all processes."""
        x = torch.as_tensor(x, dtype=torch.float32, device=self.device).clone() # all_reduce writes into it
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x):
        """Return the x of every process, as a list by rank."""
        if self.world_size == 1:
            return [x]
        everybody = [None] * self.world_size
        dist.all_gather_object(everybody, x)
        return everybody

    def first(self, work):
        """Return what work() returns in the first process; where it ends the program, every process ends."""
        value = code = None
        if self.is_master:
            try:
                value = work()
            except SystemExit as ended:
                code = ended.code
        value, code = self.gather((value, code))[0]
        if code is not None:
            raise SystemExit(code)
        return value

    def merge(self, mine):
        """Return the entries of every process's dict, in one dict."""
        return {k: v for part in self.gather(mine) for k, v in part.items()}

    def rows(self, batch):
        """Return this process's share of the rows of a batch."""
        return batch[self.rank::self.world_size]

    def prepare(self, model, cfg):
        """Share the weights and set the model up, before making the optimizer; add adapters where lora_rank asks."""
        if cfg.lora_rank:
            self.freeze(model.h)
            model.adapt(cfg.lora_rank, cfg.lora_alpha, cfg.lora_on)
        model.checkpointing = cfg.checkpointing
        if self.world_size > 1:
            for p in model.parameters():
                dist.broadcast(p.data, 0)
        if cfg.compile:
            for method in model.PASSES:
                setattr(model, method.__name__, torch.compile(getattr(model, method.__name__)))
            model.compile_decoding()

    @torch.no_grad()
    def sum_gradients(self, model):
        """Sum the gradients over all processes, before an optimizer step."""
        if self.world_size > 1:
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    dist.all_reduce(p.grad)

    def stop_requested(self):
        """Return the signal that told any process to end, or 0."""
        return max(self.gather(self.interrupted))

def keep_freed_memory():
    """Make glibc keep freed blocks; faulting their pages in again takes a tenth of a small model's step."""
    with contextlib.suppress(OSError, AttributeError): # another C library
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-3, 32 * 2**20) # M_MMAP_THRESHOLD, at its limit
        libc.mallopt(-1, 2**30) # M_TRIM_THRESHOLD

def place_among_processes():
    """Return this process's rank and their number, as torchrun says."""
    told = [os.environ.get(name) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')]
    if told[0] is None and told[1] in (None, '1'):
        return 0, 1
    if None in told or not told[0].isdecimal() or not told[1].isdecimal() or int(told[0]) >= int(told[1]):
        fail(f"RANK={told[0]}, WORLD_SIZE={told[1]} in the environment: not what torchrun sets for several processes; "
             "wanted neither, or this started by torchrun --nproc_per_node=N")
    return int(told[0]), int(told[1])

# Slurm and Docker end a job by SIGTERM, a closed terminal does by SIGHUP, which Windows lacks and nohup ignores
SIGNALS = [number for number in signal.Signals if number.name in ('SIGINT', 'SIGTERM', 'SIGHUP')
           and signal.getsignal(number) is not signal.SIG_IGN]

def default_signals():
    """Let Ctrl-C, SIGTERM and SIGHUP end the program at once: there is nothing to save."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

def start(cfg):
    """Choose the device, join the other processes, seed the generators; return the Run."""
    keep_freed_memory()
    device, dtype = cfg.device, cfg.dtype
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    for kind, backend, what in ('cuda', torch.cuda, 'CUDA device'), ('mps', torch.backends.mps, 'Apple GPU'):
        if device.startswith(kind) and not backend.is_available():
            fail(f"--device={cfg.device}: torch sees no {what}; use --device=cpu or auto")
    if dtype == 'auto':
        dtype = 'float32'
        if device.startswith('cuda'): # GPUs before Ampere only emulate bfloat16, slowly
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    run = Run(device, dtype, *place_among_processes())
    for option in ('grad_accum', 'n_answers'):
        pieces = run.world_size * getattr(cfg, option, 1)
        if getattr(cfg, 'batch_size', pieces) % pieces:
            fail(f"--batch_size={cfg.batch_size}: must be a multiple of {pieces}, processes x {option}")
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
    torch.manual_seed(cfg.seed + run.rank) # each process samples its own answers; Run.prepare shares the weights
    def on_signal(number, frame):
        if run.interrupted: # Ctrl-C again does not wait for the end of the step; a closed terminal often hangs up twice
            if number == signal.SIGINT:
                raise KeyboardInterrupt(number)
            return
        run.interrupted = number
        leave_closed_terminal() # SIGHUP: its saving must not end in an error
        if run.is_master:
            print("\nstopping after this step (at once after another Ctrl-C)", file=sys.stderr)
    for number in SIGNALS:
        signal.signal(number, on_signal)
    return run

def stop(run):
    """Leave the other processes, and give Ctrl-C its usual meaning back."""
    default_signals()
    if run.world_size > 1:
        dist.barrier() # a process that leaves early can abort another one that is still at work
        dist.destroy_process_group()

class Lines:
    """Write the states of a progress bar as lines, where the output is no terminal."""
    flush = staticmethod(lambda: sys.stderr.flush())

    def write(self, text):
        if text.strip():
            sys.stderr.write(f'{text.strip()}\n') # in one piece: stages side by side may share the file

def progress(iterable=None, **kwargs):
    """Return a tqdm bar; in a file or a pipe it prints a line every five seconds."""
    how = dict(mininterval=0.2) if sys.stderr.isatty() else dict(mininterval=5, file=Lines(), ascii=True, position=0)
    return tqdm(iterable, dynamic_ncols=True, **how, **kwargs)
