"""Measure speed on a GPU, and train GPT-2 124M from scratch there; lab/gpu.sh is the same, typed shorter.

    lab/gpu.sh measure                                   # needs a CUDA device, and no network
    lab/gpu.sh train --shared=../shared                  # texts of the folder that data/ and tiktoken_cache/ lie in
    lab/gpu.sh table                                     # print what was measured, in Markdown
    lab/gpu.sh measure --device=cpu --preset=tiny        # the same without a GPU: whether it runs, not how fast
    python lab/gpu.py --do="sft compiled"                # one measurement

`measure` runs a list of measurements, the most important first, each in a process of its own with a limit of time, and
writes results.json after each. What failed, and what did not fit into --minutes, is left for the next call with the
same --out_dir. out_dir/logs has what each said. A measurement is named by its words:

    chip                         the best product of two square matrices in each type, and the bandwidth of copying
    sft padded lora              sft.update, 32 rows of 1024 tokens; a vocabulary of 50304 rows; adapters of rank 8
    generate compiled graphs     model.generate, 64 rows of 64 tokens, 128 new; graphs: CUDA graphs of the step
    generate transformers static transformers' generate, with its usual cache or the static one
    ppo                          ppo.roll_out and ppo.update: 256 answers of 64 + 64 tokens, 4 epochs of 4 minibatches
    bench gpt2-medium dpo        bench.py --workload=dpo, 24 layers of 1024 channels
    tests                        those of tests/lab with `cuda` in their names

`compiled` stands for torch.compile. The share of an SFT step is that of the best product of the same type in the same
process, as bench.py has it: the model FLOPs utilisation (MFU). That of sampling is the bandwidth bound's. Each step
reads all weights and the cache once:

    tokens per second <= rows * bandwidth / (bytes of the weights + bytes of the cache, half of the new tokens in it)

`train` goes through pretraining, SFT, reward model, DPO, PPO and evaluation. Each stage gets a share of --minutes. When
it is used up, SIGTERM makes the stage save, and the next one goes on from there.
"""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import bench
import ppo
import sft
from common.checkpoints import read_log
from common.options import RunOptions, fail, launch, require
from common.records import read_json, read_records, write_atomic, write_records
from common.rewards import Reward
from common.run import start, stop
from common.tokens import SPEAKER, as_messages
from common.training import make_optimizer
from lab import memory
from lab.tables import table
from model import GPT, GPTConfig

import numpy as np
import torch

WORKLOADS = 'sft', 'ppo', 'dpo', 'generate', 'rm', 'rloo', 'lm'
PLAIN, LORA, COMPILED = (SimpleNamespace(checkpointing=False, **how) for how in ( # options of Run.prepare
    dict(lora_rank=0, compile=False), dict(lora_rank=8, lora_alpha=16.0, lora_on='attn', compile=False),
    dict(lora_rank=0, compile=True)))

@dataclass
class Config(RunOptions):
    do: str = 'measure' # measure, train, table, or the words of one measurement
    preset: str = 'gpt2' # gpt2; tiny, with few rows, shows whether all runs
    minutes: float = 10.0 # of a call
    out_dir: str = 'out/gpu' # results.json, logs, checkpoints
    shared: str = '../shared' # train: the folder of data and tiktoken_cache

    def __post_init__(self):
        super().__post_init__()
        require(self, do=(is_known(self.do.split()), 'measure, train, table or the words of a measurement '
                                                     f"({', '.join(WORDS)}, bench) in --help"),
                preset=(self.preset in ('gpt2', 'tiny'), 'gpt2 or tiny'), minutes=(self.minutes > 0, 'above 0'))
        self.tiny, self.shape = self.preset == 'tiny', bench.PRESETS[self.preset] # n_layer, n_head, n_embd, V

# ---- measurements: each yields lines of results, in a process of its own ----------------------------------------

def make_model(cfg, run, block_size, V=0, **heads):
    """Make random weights of the preset's shape; V: another size of the vocabulary."""
    n_layer, n_head, n_embd, usual = cfg.shape
    return GPT(GPTConfig(block_size, V or usual, n_layer, n_head, n_embd, **heads)).to(run.device)

def random_ids(cfg, rows, T):
    return np.random.default_rng(cfg.seed).integers(cfg.shape[3], size=(rows, T)).tolist()

def seconds_of(lap, run):
    """Return the median seconds of three laps, and of results the memory.

    A lap before them warms up. On a CPU one lap counts, and the memory is left out.
    """
    def timed():
        lap()
        return () # no counts

    on_gpu = run.device != 'cpu'
    bench.timed(timed, run.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = median(bench.timed(timed, run.device)[0] for _ in range(3 if on_gpu else 1))
    return seconds, dict(peak_gpu_mb=round(torch.cuda.max_memory_allocated() / 2**20)) if on_gpu else {}

def bandwidth(run):
    """Return the bytes per second that a copy reads and writes."""
    x = torch.empty(2**26 if run.device == 'cpu' else 2**30, dtype=torch.uint8, device=run.device)
    y = torch.empty_like(x)
    seconds, _ = seconds_of(lambda: [y.copy_(x) for _ in range(10)], run)
    return 20 * x.nbytes / seconds

def best_product(run, dtype):
    return 1e9 * bench.best_product(run.device, dtype, time.perf_counter) # operations per second

def result(value, unit, share=0.0, **more):
    """Make a line of results."""
    return dict(value=float(f'{value:.5g}'), unit=unit, share=round(share, 3)) | more

def chip(cfg, run, words):
    name = 'CPU' if run.device == 'cpu' else torch.cuda.get_device_name()
    yield result(best_product(run, 'bfloat16') / 1e12, 'TFLOP/s', chip=name, torch=torch.__version__,
                 float32=round(best_product(run, 'float32') / 1e12, 3))
    yield result(bandwidth(run) / 1e9, 'GB/s')

def sft_step(cfg, run, words):
    rows, T, steps = (4, 64, 1) if cfg.tiny else (32, 1024, 4)
    V, lora = -(-cfg.shape[3] // 128) * 128 if 'padded' in words else 0, 'lora' in words
    model = make_model(cfg, run, T, V)
    run.prepare(model, LORA if lora else PLAIN)
    options = sft.Config(train_data='rows', batch_size=rows, **bench.STEPS)
    optimizer, examples = make_optimizer(model, options), [(ids, [1] * (T + 1)) for ids in random_ids(cfg, rows, T + 1)]
    lap = lambda: [sft.update(model, None, optimizer, examples, options, run, 0) for _ in range(steps)]
    operations = bench.count_operations(lap) # of the same products as compiled
    if 'compiled' in words:
        run.prepare(model, COMPILED)
    (seconds, peak), best = seconds_of(lap, run), best_product(run, run.dtype)
    need = memory.needs([model.config], [], rows, T, T, T, run.dtype, several=False, lora=(8 * lora, 'attn'), trunks=1)
    yield result(steps * rows * T / seconds, 'tokens/s', operations / seconds / best, **peak,
                 tflops=round(operations / seconds / 1e12, 3), formula_mb=round(need['total'] / 2**20))

def generate(cfg, run, words):
    rows, prompt, new = (4, 8, 8) if cfg.tiny else (64, 64, 128)
    prompts, (n_layer, n_head, n_embd, V) = random_ids(cfg, rows, prompt), cfg.shape
    if 'transformers' in words:
        from transformers import GPT2Config, GPT2LMHeadModel
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=256, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                                        bos_token_id=0, eos_token_id=0))
        hf, ids = hf.to(run.device, getattr(torch, run.dtype)).eval(), torch.tensor(prompts, device=run.device)
        options = dict(cache_implementation='static') if 'static' in words else {}
        lap = lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                                  max_new_tokens=new, min_new_tokens=new, **options)
    else:
        model = make_model(cfg, run, 256)
        if 'compiled' in words:
            model.compile_decoding(**(dict(mode='reduce-overhead') if 'graphs' in words else {}))

        def lap():
            with run.autocast():
                model.generate(prompts, new)

    (seconds, peak), c = seconds_of(lap, run), GPTConfig(256, V, n_layer, n_head, n_embd)
    weights = memory.n_parameters(c) * (4 if run.dtype == 'float32' else 2)
    bound = rows * bandwidth(run) / (weights + memory.kv_cache(c, rows, prompt + new // 2, run.dtype))
    yield result(rows * new / seconds, 'tokens/s', rows * new / seconds / bound, bound=round(bound), **peak)

def ppo_iteration(cfg, run, words):
    answers, n = (8, 8) if cfg.tiny else (256, 64) # n tokens of prompt, n of answer
    options = ppo.Config(prompts='rows', max_new_tokens=n, batch_size=answers // 4, minibatches=4, epochs=4)
    make = lambda **heads: make_model(cfg, run, 2 * n, **heads)
    models = ppo.Models(make(), make(value_head=True), Reward([run.freeze(make(reward_head=True))]), run.freeze(make()))
    trained = dict(policy=models.policy, critic=models.critic)
    for model in trained.values():
        run.prepare(model, COMPILED if 'compiled' in words else PLAIN)
    optimizers, part = {name: make_optimizer(model, options, eps=1e-5) for name, model in trained.items()}, {}
    prompts = random_ids(cfg, answers, n)

    def lap():
        def roll_out():
            return ppo.roll_out(models, prompts, [{}] * answers, bench.UNENDING, options, 0.05, run)[:2]

        *rolled, part['roll_out'], _ = bench.timed(roll_out, run.device)
        ppo.update(models, optimizers, *rolled, options, run, 0)

    seconds, peak = seconds_of(lap, run)
    yield result(seconds, 's', roll_out=round(part['roll_out'], 3), **peak)

def run_bench(cfg, run, words):
    """Let bench.py print its lines; they are all."""
    preset, workload, *how = words
    few = dict(repeats=1) | ({} if workload in bench.NO_STEPS else dict(steps=1)) if cfg.tiny else {}
    rows = 4 if cfg.tiny else 64 if workload == 'generate' else 0
    bench.main(bench.Config(workload=workload, preset=preset, batch_size=rows, compile='compiled' in how, seed=cfg.seed,
                            device=run.device, dtype=run.dtype, **few))
    return ()

WORDS = dict(chip='', sft='padded lora compiled', generate='compiled graphs transformers static', ppo='compiled')

def is_known(words):
    """Tell whether the words of --do name something to do."""
    what, more = words[0] if words else '', words[1:]
    if what == 'bench':
        return len(more) >= 2 and more[0] in bench.PRESETS and more[1] in WORKLOADS and {*more[2:]} <= {'compiled'}
    return (what in WORDS and {*more} <= {*WORDS[what].split()}) or words in (['measure'], ['train'], ['table'])

MEASURES = dict(chip=chip, sft=sft_step, generate=generate, ppo=ppo_iteration, bench=run_bench)
TITLES = dict(chip='best product, bfloat16', sft='SFT', generate='sampling', ppo='PPO iteration')
AIMS = {'sft compiled': '45 % or more', 'generate compiled': '60 % or more', 'ppo': 'below 6 s'}

def measurements(cfg):
    """Return the words of all measurements, the most important first."""
    presets = ('tiny',) if cfg.tiny else ('gpt2', 'gpt2-medium')
    benches = [f'bench {preset} {workload}' for preset in presets for workload in WORKLOADS]
    return ['chip', 'sft compiled', 'generate', 'ppo', 'tests', 'sft', 'generate transformers', 'sft padded',
            'sft lora', *benches, 'generate compiled', 'generate compiled graphs', 'ppo compiled',
            'generate transformers static', 'sft padded compiled', 'sft lora compiled',
            *(f'{name} compiled' for name in benches)]

# ---- running them -----------------------------------------------------------------------------------------------

def command(cfg, script, **options):
    """Return a script's command, with this run's device, precision and seed."""
    options |= dict(device=cfg.device, dtype=cfg.dtype, seed=cfg.seed)
    return ['python', script, *(f'--{key}={value}' for key, value in options.items())]

def run_for(words, seconds, log, number=signal.SIGKILL):
    """Run a command; when its time is up, send it a signal.

    A minute later it is killed. Returns its exit code, what it printed and the last line of `log`, where its errors go.
    """
    print('$', shlex.join(words), flush=True)
    os.makedirs(os.path.dirname(log), exist_ok=True)

    def kill(): # what the command started too, as torch.compile does
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    with open(log, 'w+', encoding='utf-8', errors='replace') as errors:
        process = subprocess.Popen([sys.executable, *words[1:]], stdout=subprocess.PIPE, stderr=errors, text=True,
                                   start_new_session=True)
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            kill() # else they would hold the pipe open
            out, _ = process.communicate()
        finally: # also after Ctrl-C
            kill()
        errors.seek(0)
        return process.returncode, out, last_line(errors.read())

def last_line(text):
    return (text.strip().splitlines() or [''])[-1].strip()

def measure(cfg, results, save):
    """Measure what results lack, as far as the minutes go; save() after each."""
    end = time.monotonic() + 60 * cfg.minutes
    tests = ['python', '-m', 'pytest', '-k', 'cuda', 'tests/lab/test_gpu.py', 'tests/lab/test_memory.py']
    for name in measurements(cfg):
        begun = time.monotonic()
        if name in results and 'error' not in results[name] or end - begun < 5:
            continue
        words = tests if name == 'tests' else command(cfg, 'lab/gpu.py', do=name, preset=cfg.preset)
        limit = min(end - begun, 150 if {'tests', 'compiled', 'static'} & {*name.split()} else 60)
        code, out, error = run_for(words, limit, f"{cfg.out_dir}/logs/{name.replace(' ', '_')}.txt")
        results[name] = dict(lines=[json.loads(line) for line in out.splitlines() if line.startswith('{')],
                             said=last_line(out), seconds=round(time.monotonic() - begun, 1))
        if code:
            results[name]['error'] = 'out of time' if code == -signal.SIGKILL else error or f'exit code {code}'
        save()

# ---- training ---------------------------------------------------------------------------------------------------

def write_texts(cfg):
    """Write data/text.jsonl: reviews, Shakespeare, and the transcripts of HH-RLHF's training rows."""
    data, texts = Path(cfg.shared, 'data'), []
    for name in ('movie_reviews', 'sentence_polarity', 'pros_cons'):
        with zipfile.ZipFile(data / f'{name}.zip') as files:
            for path in files.namelist():
                if not path.endswith(('/', 'README', 'README.txt')):
                    text = re.sub(' *</?(Pros|Cons)>', '', files.read(path).decode('utf-8', 'replace'))
                    texts.append(text.strip())
    texts.append((data / 'tinyshakespeare.txt').read_text(encoding='utf-8'))
    for record in read_records(f'{cfg.out_dir}/data/demonstrations_train.jsonl', 'demonstrations'):
        said = [*as_messages(record['prompt']), dict(role='assistant', content=record['response'])]
        texts.append('\n'.join(SPEAKER.get(m['role'], '### Assistant: ') + m['content'] for m in said))
    random.Random(cfg.seed).shuffle(texts) # val_fraction takes the end
    write_records(f'{cfg.out_dir}/data/text.jsonl', [dict(text=text) for text in texts])

def stages(cfg):
    """Return {stage: (share of the minutes, its command)}; steps that do not fit into the share are left out."""
    out, (n_layer, n_head, n_embd, _) = cfg.out_dir, cfg.shape
    size = lambda full, few: few if cfg.tiny else full
    hh = lambda kind: dict(train_data=f'{out}/data/{kind}_train.jsonl', val_data=f'{out}/data/{kind}_val.jsonl')
    often, new = dict(batch_size=size(32, 4), log_every=1, warmup_steps=size(20, 1)), size(64, 8)
    after_sft = often | dict(init_from=f'{out}/sft', max_steps=size(120, 4), eval_every=size(30, 0))
    options = dict(
        pretrain=often | dict(train_data=f'{out}/data/text.jsonl', val_fraction=0.02, tokenizer=size('gpt2', 'bytes'),
                              n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=size(1024, 256), lr=6e-4,
                              weight_decay=0.1, max_steps=size(1500, 4), eval_every=size(100, 0), eval_batches=2),
        sft=after_sft | hh('demonstrations') | dict(init_from=f'{out}/pretrain', lr=5e-5),
        reward=after_sft | hh('comparisons') | dict(lr=2e-5),
        dpo=after_sft | hh('comparisons') | dict(lr=5e-6),
        ppo=dict(policy=f'{out}/sft', reward_model=f'{out}/reward', prompts=f'{out}/data/prompts_train.jsonl',
                 max_new_tokens=new, max_steps=size(40, 2), batch_size=size(64, 4), minibatches=4, lr=1e-5,
                 critic_lr=2e-5, log_every=1),
        evaluate=dict(models=','.join(f'{name}={out}/{name}' for name in ('pretrain', 'sft', 'dpo', 'ppo')),
                      reward_model=f'{out}/reward', prompts=f'{out}/data/prompts_val.jsonl', max_new_tokens=new,
                      max_prompts=size(150, 4), figures=False))
    shares = dict(pretrain=0.35, sft=0.1, reward=0.08, dpo=0.1, ppo=0.22, evaluate=0.07)
    return {name: (share, command(cfg, f"{dict(pretrain='sft').get(name, name)}.py", out_dir=f'{out}/{name}',
                                  **options[name])) for name, share in shares.items()}

def train(cfg, results, save):
    """Go through all stages. results get the steps and seconds of each, and first and last values of its log."""
    rows = f'{cfg.shared}/data/hh-rlhf-harmless-base-2000.jsonl.gz'
    if not os.path.exists(rows):
        fail(f"--shared={cfg.shared}: wanted a folder of data and tiktoken_cache, there is no {rows}")
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', os.path.abspath(f'{cfg.shared}/tiktoken_cache')) # no network
    todo, out = stages(cfg), cfg.out_dir
    prepare = ['python', 'data/hh_rlhf/prepare.py', f'--source={rows}', f'--out_dir={out}/data']
    plot = ['python', 'lab/plot.py', '--keys=loss,val_loss,accuracy,val_accuracy,reward,kl', f'--out={out}/curves.png',
            *(f'{out}/{name}' for name in todo if name != 'evaluate')]
    for name, (share, words) in dict(data=(1, prepare), **todo, curves=(1, plot)).items():
        begun, log = time.monotonic(), f'{out}/{name}/log.jsonl'
        code, _, error = run_for(words, 60 * cfg.minutes * share, f'{out}/logs/{name}.txt', signal.SIGTERM)
        if code not in (0, 128 + signal.SIGTERM): # SIGTERM: it saved what it had
            fail(f'{name} ended with exit code {code}: {error}', code=1)
        if name == 'data':
            write_texts(cfg)
        results[f'train {name}'] = entry = dict(seconds=round(time.monotonic() - begun, 1))
        if name == 'evaluate':
            models = read_json(f'{out}/evaluate/results.json')['models']
            entry['told'] = {f'reward of {model}': [row['reward']] for model, row in models.items()}
        elif name in todo:
            lines = read_log(log)
            found = {key: [line[key] for line in lines if key in line] for key in TOLD}
            entry |= dict(steps=lines[-1]['step'], told={key: [v[0], v[-1]] for key, v in found.items() if v})
        save()

TOLD = 'loss', 'val_loss', 'val_accuracy', 'val_shorter_wins', 'reward', 'kl', 'ended' # in the table, first and last

# ---- tables -----------------------------------------------------------------------------------------------------

def shown(entry, at=0):
    """Return a measurement's number, share and GiB as strings; at: which of its lines."""
    if len(entry.get('lines', [])) <= at:
        return [f"failed: {entry['error'][:60]}" if 'error' in entry else 'not measured', '', '']
    line = entry['lines'][at]
    share, gib = line.get('share', line.get('share_of_best')), line.get('peak_gpu_mb')
    number = f"{line['value']:g} {line['unit']}" if 'unit' in line else f"{line['tokens_per_s']:.0f}"
    return [number, f'{share:.0%}' if share else '', f'{gib / 1024:.1f}' if gib else '']

def print_tables(cfg, results):
    """Print three tables in Markdown; what results lack is 'not measured'."""
    of = lambda name, at=0: shown(results.get(name, {}), at)
    own = [name.split() for name in measurements(cfg) if name.split()[0] in TITLES]
    rows = [[', '.join([TITLES[words[0]], *words[1:]]), *of(' '.join(words)), AIMS.get(' '.join(words), '')]
            for words in sorted(own, key=lambda words: [*TITLES].index(words[0]))]
    rows[1:1] = [['copying', *of('chip', 1), '']]
    rows += [['tests', results.get('tests', {}).get('said', 'not measured'), '', '', '']]
    table(['measurement', 'result', 'share of the bound', 'GiB', 'aim on an H100'], rows)
    benches = [name for name in measurements(cfg) if name.startswith('bench') and not name.endswith('compiled')]
    table(['bench.py', 'tokens/s', 'share', 'GiB', 'compiled', 'share', 'GiB'],
          [[name.removeprefix('bench '), *of(name), *of(f'{name} compiled')] for name in benches])
    rows = []
    for name in stages(cfg):
        entry = results.get(f'train {name}', {})
        told = [f"{key} {' → '.join(f'{x:.4g}' for x in values)}" for key, values in entry.get('told', {}).items()]
        rows.append([name, *(str(entry.get(key, '')) for key in ('steps', 'seconds')),
                     ', '.join(told) or 'not measured'])
    table(['from scratch', 'steps', 'seconds', 'first → last step'], rows)

def main(cfg):
    what, *words = cfg.do.split()
    if what != 'table' and cfg.device != 'cpu' and not torch.cuda.is_available():
        fail(f"--device={cfg.device}: torch sees no CUDA device; to test this, --device=cpu --preset=tiny")
    if what in MEASURES:
        run = start(cfg)
        stop(run) # nothing to save: Ctrl-C ends the program at once
        for line in MEASURES[what](cfg, run, words):
            print(json.dumps(line), flush=True)
        return
    path, made_with = f'{cfg.out_dir}/results.json', dict(device=cfg.device, dtype=cfg.dtype, preset=cfg.preset)
    results = read_json(path) if os.path.exists(path) else {}
    if what != 'table':
        if results.setdefault('made with', made_with) != made_with:
            fail(f"--out_dir={cfg.out_dir}: its results were made with {results['made with']}, wanted another folder")
        save = lambda: write_atomic(path, json.dumps(results, indent=1) + '\n')
        dict(measure=measure, train=train)[what](cfg, results, save)
    print_tables(cfg, results)

if __name__ == '__main__':
    launch(main, Config)
