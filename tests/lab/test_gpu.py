"""
lab/gpu.py: its parts on a CPU, with numbers by hand. On which device every stage makes its tensors. And what a CUDA
device is to show: tests with `cuda` in their names, which `lab/gpu.sh measure` runs; on a CPU some of them skip.
"""
import json
import os
import signal
import subprocess
import zipfile
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import reinforce
import sft
from common import training
from common.options import parse_config
from common.records import read_records, write_records
from common.run import Run
from common.training import make_optimizer
from lab import gpu
from model import GPT, GPTConfig
from stages import stages as all_stages
from tiny import COMPARISONS, PROMPTS, ROOT, losses, one_line, records, run as run_script

# ---- the device of every tensor ---------------------------------------------------------------------------------
# A pretended GPU: its tensors say that they are on the device `meta`, and hold their numbers in a tensor on the CPU.

class OnGPU(torch.Tensor):
    """Hold a tensor on the pretended GPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device='meta')

    def __init__(self, held):
        self.held = held.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Run an operation. It fails where it also reads a tensor of the CPU that has a dimension or more."""
        name, given = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, given)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, cls) for x in tensors)
        device = given.get('device') or torch.device('meta' if on_gpu else 'cpu') # of what comes out
        if 'device' in given:
            given['device'] = torch.device('cpu')
        if on_gpu and name not in ('copy_', '_to_copy') and any(not isinstance(x, cls) and x.dim() for x in tensors):
            shapes = [(*x.shape, 'on the ' + ('GPU' if isinstance(x, cls) else 'CPU')) for x in tensors]
            raise RuntimeError(f'{func}: tensors on two devices: {shapes}')
        held = lambda x: x.held if isinstance(x, cls) else x
        out = func(*tree_map(held, args), **tree_map(held, given))
        if func._schema.is_mutable:
            return args[0] if isinstance(args[0], torch.Tensor) else None # in place, or a list of tensors
        if device.type == 'cpu':
            return out
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, out)

class Factories(TorchDispatchMode):
    """Make tensors on the pretended GPU where they are asked for on `meta`, also inside of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return OnGPU.__torch_dispatch__(func, types, args, kwargs)

class PretendedGPU(TorchFunctionMode):
    """Do what torch does below __torch_dispatch__: move to the GPU, copy Python's numbers there and back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        on_cpu = lambda x: 'cpu' if str(x) == 'meta' else x
        if name == 'tolist' and isinstance(args[0], OnGPU):
            return args[0].held.tolist()
        if name == 'new_tensor' and isinstance(args[0], OnGPU):
            return OnGPU(args[0].held.new_tensor(*args[1:], **kwargs))
        if name == '__getitem__' and isinstance(args[0], OnGPU): # a list of numbers goes where the tensor is
            there = lambda i: OnGPU(torch.tensor(i)) if isinstance(i, list) else i
            args = args[0], tuple(map(there, args[1])) if isinstance(args[1], tuple) else there(args[1])
        if name in ('to', 'tensor', 'as_tensor') and not isinstance(args[0], OnGPU) and 'meta' in map(
                str, (*args[1:], kwargs.get('device'))):
            return OnGPU(func(*map(on_cpu, args), **{k: on_cpu(x) for k, x in kwargs.items()}).detach().clone())
        return func(*args, **kwargs)

MORE = dict( # beside tests/stages.py: stage, and other options
    distil=('sft', dict(teacher='sft_model', divergence='jsd')),
    ratings=('reward', dict(loss='regression', train_data='ratings.jsonl', val_data='ratings.jsonl')),
    margins=('reward', dict(train_data='comparisons.jsonl')), orpo=('dpo', dict(loss='orpo', grad_accum=2)),
    function=('rloo', dict(reward='told.py:count')),
    grpo=('rloo', dict(kind='grpo', average='answer', ratio='sequence', refill=1)),
    turns=('ppo', dict(user='told.py:user', max_turns=2, turn_rewards=True)))
STAGES = ('sft', 'reward', 'dpo', 'dpo_lora', 'rrhf', 'kto', 'ppo', 'ppo_shared', 'ppo_lora', 'reinforce')

@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    """Return {name: (script, options)}."""
    folder = tmp_path_factory.mktemp('stages')
    found = all_stages(str(folder))
    records(folder / 'comparisons.jsonl', COMPARISONS)
    records(folder / 'ratings.jsonl', [dict(prompt=p, response=r, helpful=x) for p, r, x in (
        ('Hi', 'Yo', 1), ('Hi', 'hm', 3), ('Who?', 'me', 2), ('Who?', 'It is me.', 5))])
    (folder / 'told.py').write_text("""def count(record, text):
    return len(text)

def user(record, messages):
    return 'Go on'
""")
    for name, (stage, options) in MORE.items():
        script, given = found[stage]
        files = {k: f'{folder}/{v}' for k, v in options.items() if '.' in str(v) or k == 'teacher'}
        found[name] = script, given | options | files
    return found

@pytest.mark.parametrize('name', [*STAGES, *MORE])
def test_a_run_on_another_device(tmp_path, monkeypatch, stages, name):
    """Every stage finds its tensors on one device, and logs what it logs on the CPU."""
    script, options = import_module(stages[name][0]), stages[name][1] | dict(max_steps=1)
    for module in (script, training): # a pretended tensor cannot be written to a file
        monkeypatch.setattr(module, 'save_checkpoint', lambda *args, **more: None, raising=False)
    expected = run_script(script, out_dir=str(tmp_path / 'cpu'), **options)

    def start(cfg):
        torch.manual_seed(cfg.seed)
        return Run('meta', 'float32')

    monkeypatch.setattr(script, 'start', start)
    with PretendedGPU(), Factories():
        found = run_script(script, out_dir=str(tmp_path / 'gpu'), **options)
    for a, b in zip(losses(expected), losses(found), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-4)

def test_the_pretended_gpu():
    """It refuses what CUDA refuses, and takes what CUDA takes; 1 + 1 to 3 + 1 by hand."""
    with PretendedGPU(), Factories():
        x = torch.tensor([1.0, 2.0, 3.0], device='meta')
        y = torch.ones(3)
        for mixed in (lambda: x + y, lambda: torch.where(x > 0, x, y), lambda: x @ y, lambda: x.add_(y)):
            with pytest.raises(RuntimeError, match='tensors on two devices'):
                mixed()
        assert (x + torch.tensor(1.0)).tolist() == [2, 3, 4] and (x.cpu() + torch.ones(3)).tolist() == [2, 3, 4]
        assert (x + torch.ones(3).to('meta')).device.type == 'meta' and x.cpu().device.type == 'cpu'

# ---- on a CUDA device where there is one ------------------------------------------------------------------------

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
EXAMPLES = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([5, 6, 7], [0, 1, 1]), ([7, 8, 9, 1], [0, 1, 1, 1])]

def make(run):
    torch.manual_seed(1)
    return GPT(GPTConfig(32, 40, 2, 2, 16)).to(run.device)

def sft_steps(run, model, n):
    """Return what n steps told; the optimizer is made once, so that a first step that overflows does not matter."""
    cfg = sft.Config(train_data='x', batch_size=3, max_steps=n, lr=1e-3, lr_schedule='constant', warmup_steps=0)
    optimizer = make_optimizer(model, cfg)
    return [sft.update(model, None, optimizer, EXAMPLES, cfg, run, step) for step in range(n)]

@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_16_bits_on_cuda(dtype):
    """The loss is float32's within the type's rounding, and the steps are made: float16's gradients do not vanish."""
    runs = Run(DEVICE, 'float32'), Run(DEVICE, dtype)
    expected, found = (sft_steps(run, make(run), 10) for run in runs)
    assert found[0]['loss'] == pytest.approx(expected[0]['loss'], rel=0.01)
    assert found[-1]['loss'] == pytest.approx(expected[-1]['loss'], rel=0.05)
    assert found[-1]['grad_norm'] == pytest.approx(expected[-1]['grad_norm'], rel=0.1)

def test_fused_adamw_on_cuda():
    """The first step is lr against the gradient's sign; the matrix has decayed by lr * 0.5 before."""
    model = torch.nn.Linear(1, 1, device=DEVICE)
    torch.nn.init.ones_(model.weight), torch.nn.init.ones_(model.bias)
    optimizer = make_optimizer(model, SimpleNamespace(lr=0.1, weight_decay=0.5))
    assert optimizer.defaults['fused']
    model(torch.full((1, 1), 2.0, device=DEVICE)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(0.85, abs=1e-6) and model.bias.item() == pytest.approx(0.9, abs=1e-6)

@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA device: compiling for a CPU takes minutes')
def test_compile_on_cuda():
    """Compiled updates and the compiled decoding step give the same numbers."""
    run, prompts = Run(DEVICE, 'float32'), [[1, 2], [3, 4, 5]]
    plain, compiled = make(run), make(run)
    run.prepare(compiled, SimpleNamespace(compile=True, checkpointing=False, lora_rank=0))
    assert compiled.generate(prompts, 8, temperature=0) == plain.generate(prompts, 8, temperature=0)
    for a, b in zip(sft_steps(run, plain, 2), sft_steps(run, compiled, 2)):
        assert b == pytest.approx(a, rel=1e-3)

def test_resume_on_cuda(tmp_path, sft_model):
    """Two iterations of RLOO and two more sample the same answers as four: the device's generator is restored."""
    judge = tmp_path / 'judge.py'
    judge.write_text('def count(record, text):\n    return len(text)\n')
    given = dict(policy=sft_model, prompts=records(tmp_path / 'prompts.jsonl', PROMPTS), reward=f'{judge}:count',
                 kl_coef=0.1, n_answers=2, batch_size=8, max_new_tokens=6, device=DEVICE, missing_eos_penalty=1.0)
    expected = run_script(reinforce, out_dir=str(tmp_path / 'whole'), max_steps=4, **given)
    for steps, resume in (2, False), (4, True):
        torch.manual_seed(12345) # a new process has another generator
        found = run_script(reinforce, out_dir=str(tmp_path / 'halves'), max_steps=steps, resume=resume, **given)
    for a, b in zip(expected, found, strict=True):
        assert {k: v for k, v in b.items() if k != 'time'} == pytest.approx(
            {k: v for k, v in a.items() if k != 'time'}, rel=1e-3, abs=1e-4)

# ---- lab/gpu.py -------------------------------------------------------------------------------------------------

@pytest.fixture
def cfg(tmp_path):
    return gpu.Config(device='cpu', preset='tiny', out_dir=str(tmp_path / 'out'), shared=str(tmp_path / 'shared'))

def measured(monkeypatch, cfg, words):
    """Return a measurement's line, where a lap takes 2 s, 50 GFLOP/s are the best product, 1 GB/s the bandwidth."""
    def seconds_of(lap, run):
        lap()
        return 2.0, dict(peak_gpu_mb=3)
    monkeypatch.setattr(gpu, 'seconds_of', seconds_of)
    monkeypatch.setattr(gpu, 'best_product', lambda run, dtype: 50e9)
    monkeypatch.setattr(gpu, 'bandwidth', lambda run: 1e9)
    what, *words = words.split()
    line, = gpu.MEASURES[what](cfg, Run('cpu', 'float32'), words)
    return line

def test_sft_by_hand(monkeypatch, cfg):
    """Four rows of 64 tokens; 4 layers, 128 wide, 512 tokens: 6 operations for each number of a matrix and each token.

    Attention has two products of T C forward and, with the one that is done again, five backward, 2 T C each.
    """
    line = measured(monkeypatch, cfg, 'sft')
    linear, attention = 6 * 256 * (4 * 12 * 128**2 + 512 * 128), 4 * 256 * (2 + 5) * 2 * 64 * 128
    assert (line['value'], line['unit']) == (128, 'tokens/s')
    assert line['share'] == pytest.approx((linear + attention) / 2 / 50e9, abs=1e-3)
    assert measured(monkeypatch, cfg, 'sft padded lora')['tflops'] < line['tflops'] # no gradients of weights

def test_generation_by_hand(monkeypatch, cfg):
    """Weights: 512 + 256 vectors of 128, four blocks, the last norm. Cache: 8 + 4 tokens of 4 rows on average."""
    line = measured(monkeypatch, cfg, 'generate')
    numbers = 768 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128 + 2 * 4 * 4 * 12 * 128
    assert line['value'] == 4 * 8 / 2 and line['bound'] == round(4 * 1e9 / (4 * numbers))

def test_an_iteration_of_ppo(monkeypatch, cfg):
    line = measured(monkeypatch, cfg, 'ppo')
    assert (line['value'], line['unit']) == (2, 's') and 0 < line['roll_out'] < 2

def test_bench_lines(cfg, capsys):
    gpu.run_bench(cfg, Run('cpu', 'float32'), ['tiny', 'dpo'])
    line = json.loads(capsys.readouterr().out)
    assert (line['workload'], line['batch_size'], line['steps']) == ('dpo', 4, 1)

def test_a_command_out_of_time(tmp_path):
    """What it printed before counts, its own child does not hold it up; SIGTERM leaves it its exit code."""
    say = ('import signal, subprocess, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print(7, flush=True); '
           'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]); time.sleep(60)')
    for number, code in (signal.SIGKILL, -9), (signal.SIGTERM, 143):
        assert gpu.run_for(['python', '-c', say], 1.0, str(tmp_path / 'log'), number) == (code, '7\n', '')
    assert gpu.run_for(['python', '-c', 'raise OSError("gone")'], 20, str(tmp_path / 'log')) == (1, '', 'OSError: gone')

def test_the_most_important_first_and_the_rest_later(monkeypatch, cfg):
    """What is there is not measured again, what failed is; nothing begins once the minutes are over."""
    now, begun = [0.0], []
    monkeypatch.setattr(gpu.time, 'monotonic', lambda: now[0])

    def run_for(words, seconds, log):
        begun.append((next((w[5:] for w in words if w.startswith('--do=')), 'tests'), seconds))
        now[0] += 100
        code = {'generate': -9, 'ppo': 1}.get(begun[-1][0], 0)
        return code, 'told\n{"value": 1.5, "unit": "s"}\n', 'some error'

    monkeypatch.setattr(gpu, 'run_for', run_for)
    results, saved = dict(chip=dict(lines=[]), sft=dict(error='x')), []
    gpu.measure(cfg, results, lambda: saved.append(len(results)))
    assert begun == [('sft compiled', 150), ('generate', 60), ('ppo', 60), ('tests', 150), ('sft', 60),
                     ('generate transformers', 60)]
    assert saved == [3, 4, 5, 6, 6, 7] and results['sft'] == dict(
        lines=[dict(value=1.5, unit='s')], said='{"value": 1.5, "unit": "s"}', seconds=100)
    assert results['generate']['error'] == 'out of time' and results['ppo']['error'] == 'some error'

@pytest.mark.parametrize('preset', ['gpt2', 'tiny'])
def test_the_stages_commands_are_valid(preset, tmp_path):
    cfg = gpu.Config(device='cpu', preset=preset, out_dir=str(tmp_path))
    stages = gpu.stages(cfg)
    assert list(stages) == ['pretrain', 'sft', 'reward', 'dpo', 'ppo', 'evaluate']
    assert sum(share for share, _ in stages.values()) < 0.95 # the rest is for what is no stage
    for _, (python, script, *options) in stages.values():
        parse_config(import_module(script.removesuffix('.py')).Config, options)

def test_the_texts(cfg):
    """Reviews without their tags, Shakespeare, and the training rows alone; no README."""
    data = os.path.join(cfg.shared, 'data')
    os.makedirs(data), os.makedirs(f'{cfg.out_dir}/data')
    reviews = dict(movie_reviews='good film .\n', sentence_polarity='a\nb\n', pros_cons=' <Pros>Cheap</Pros>\n')
    for name, text in reviews.items():
        with zipfile.ZipFile(f'{data}/{name}.zip', 'w') as files:
            files.writestr(f'{name}/x.txt', text)
            files.writestr(f'{name}/README.txt', 'licence')
    with open(f'{data}/tinyshakespeare.txt', 'w') as f:
        f.write('To be')
    write_records(f'{cfg.out_dir}/data/demonstrations_train.jsonl', [dict(prompt='Hi', response='Yo')])
    gpu.write_texts(cfg)
    assert {r['text'] for r in read_records(f'{cfg.out_dir}/data/text.jsonl', 'text')} == {
        'good film .', 'a\nb', 'Cheap', 'To be', '### Human: Hi\n### Assistant: Yo'}

def test_the_tables(cfg, capsys):
    cfg = gpu.Config(do='table', out_dir=cfg.out_dir)
    gpu.print_tables(cfg, {
        'sft compiled': dict(lines=[dict(value=1234.5, unit='tokens/s', share=0.456, peak_gpu_mb=2048)]),
        'ppo': dict(lines=[], error='out of time'),
        'bench gpt2 dpo': dict(lines=[dict(tokens_per_s=99.6, share_of_best=0.5)]),
        'train sft': dict(steps=3, seconds=1.5, told=dict(loss=[2.0, 1.0]))})
    printed = capsys.readouterr().out
    for row in ('| SFT, compiled | 1234.5 tokens/s | 46% | 2.0 | 45 % or more |',
                '| PPO iteration | failed: out of time |', '| gpt2 dpo | 100 | 50% |  | not measured |  |  |',
                '| sft | 3 | 1.5 | loss 2 → 1 |', '| gpt2-medium lm |'):
        assert row in printed

def test_the_page_has_every_row(capsys):
    """docs/speed.md, in the order of `lab/gpu.sh table`."""
    gpu.print_tables(gpu.Config(do='table'), {})
    with open(os.path.join(ROOT, 'docs', 'speed.md'), encoding='utf-8') as f:
        page = f.read().partition('## On a GPU')[2].partition('\n## ')[0]
    first = lambda text: [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('|')]
    assert first(capsys.readouterr().out) == first(page)

def test_the_command(tmp_path):
    """lab/gpu.sh runs lab/gpu.py in the repository, from any folder."""
    run = lambda *args: subprocess.run(['bash', f'{ROOT}/lab/gpu.sh', *args], cwd=tmp_path, text=True,
                                       capture_output=True, env=os.environ | dict(PYTHON='echo'))
    assert run('train', '--minutes=3').stdout == 'lab/gpu.py --do=train --minutes=3\n'
    assert run().stdout == 'lab/gpu.py --do=\n' # which refuses it
    assert run('--help').stdout == 'lab/gpu.py --help\n'

@pytest.mark.parametrize('option, message', [
    *[(f'--do={words}', f'--do={words}: do must be measure, train, table or the words of a measurement (chip, sft')
      for words in ('sing', '', 'sft compild', 'measure twice', 'bench gpt2', 'bench gpt2 sft fast', 'tests')],
    ('--preset=gpt3', '--preset=gpt3: preset must be gpt2 or tiny'), ('--minutes=0', 'minutes must be above 0')])
def test_wrong_options(capsys, option, message):
    assert message in one_line(capsys, lambda: parse_config(gpu.Config, ['--device=cpu', option]))

def test_what_it_refuses(capsys, cfg):
    if DEVICE == 'cpu':
        assert '--device=auto: torch sees no CUDA device' in one_line(capsys, lambda: gpu.main(gpu.Config()))
    cfg.do = 'train'
    assert f'--shared={cfg.shared}: wanted a folder of data' in one_line(capsys, lambda: gpu.main(cfg))
    assert not os.path.exists(cfg.out_dir)
    os.makedirs(cfg.out_dir)
    with open(f'{cfg.out_dir}/results.json', 'w') as f:
        json.dump({'made with': dict(device='cuda')}, f)
    assert "its results were made with {'device': 'cuda'}" in one_line(capsys, lambda: gpu.main(cfg))
