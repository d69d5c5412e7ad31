"""
Random command lines and damaged checkpoints: every one works, or ends with one line and exit code 2 (1 after training
began), never with a traceback. Seeded, so that a failure comes again. test_fuzz_readers.py does the same for records.
"""
import dataclasses
import importlib
import json
import os
import random
import shutil

import pytest
import torch

import sft
from common.checkpoints import load_checkpoint, prepare_out_dir, save_checkpoint
from common.options import parse_config
from common.run import Run
from common.tokens import load_tokenizer
from common.training import make_optimizer
from model import GPT, GPTConfig
from tiny import DEMONSTRATIONS, TOK, Config, records, run

SCRIPTS = ('sft', 'reward', 'dpo', 'kto', 'rrhf', 'ppo', 'reinforce', 'collect', 'evaluate', 'sample', 'bench', 'demo')
VALUES = ['', '0', '1', '-1', '2', '1.5', '1e-5', '1e400', '-1e400', 'nan', 'inf', 'None', 'True', 'false', 'auto',
          '[]', '{}', '()', '"', "'", '\\', '=', '==', ' ', '\n', '\0', 'a,b', 'ü', '漢字', '\ud800', '9' * 30, '9' * 400,
          '0x10', '1_000', '1j', '--', '-', 'config/toy/sft.py', '/', '.', '..', '__import__("os")', '*', 'a=b']

def ended(capsys, work):
    """Return the exit code of work(), None where it returned; a failure has said one line, or training's last one."""
    capsys.readouterr()
    try:
        work()
        return None
    except OSError as error: # common.options.launch makes one line of it
        assert error.filename is not None
        return 2
    except SystemExit as stopped:
        err = capsys.readouterr().err
        assert stopped.code in (0, 1, 2), (stopped.code, err)
        assert stopped.code != 2 or err.startswith('error: ') and err.count('\n') == 1, err
        return stopped.code

@pytest.mark.parametrize('script', SCRIPTS)
def test_random_command_lines(capsys, script):
    rng, cls = random.Random(script), importlib.import_module(script).Config
    names = [field.name for field in dataclasses.fields(cls)]

    def word():
        key, value = rng.choice([*names, 'nonsense', '', 'lr=']), rng.choice(VALUES)
        return rng.choice([f"--{key}={value}", f"--{key}={value}", f"--{key}", value, f"-{key}", f"--{key}={value} "])

    codes = {ended(capsys, lambda: parse_config(cls, [word() for _ in range(rng.randint(1, 4))])) for _ in range(300)}
    assert codes <= {None, 0, 2} and 2 in codes

NUMBERS = [field.name for field in dataclasses.fields(sft.Config) if field.type in (int, float)]

@pytest.mark.parametrize('key', NUMBERS)
def test_extreme_numbers(tmp_path, capsys, key):
    """One option at a time: training works, or ends with one line and no checkpoint that is not finite."""
    data = records(tmp_path / 'data.jsonl', DEMONSTRATIONS)
    options = dict(init_from='scratch', tokenizer='bytes', n_layer=1, n_head=1, n_embd=8, block_size=64, batch_size=2,
                   train_data=data, val_data=data, max_steps=2, warmup_steps=0)
    for n, value in enumerate(('0', '1', '-1', '3', '1e30', '-1e30', '1e-30', '1e308', '1000000')):
        if key in ('batch_size', 'max_steps', 'epochs', 'block_size', 'n_layer', 'n_embd') and value == '1000000':
            continue # legal, and long
        out = str(tmp_path / str(n))
        ended(capsys, lambda: run(sft, out_dir=out, **options | {key: value}))
        if os.path.exists(os.path.join(out, 'model.safetensors')):
            assert all(torch.isfinite(p).all() for p in GPT.from_pretrained(out).parameters())

def damage(rng, folder):
    """Change one file of a checkpoint somehow."""
    path = os.path.join(folder, rng.choice(sorted(set(os.listdir(folder)) - {'.lock', 'log.jsonl'})))
    with open(path, 'rb') as f:
        data = f.read()
    kind = rng.choice(['flip', 'cut', 'empty', 'remove', 'folder', 'grow', 'json'])
    if kind in ('remove', 'folder'):
        os.remove(path)
        return os.makedirs(path) if kind == 'folder' else None
    if kind == 'json' and path.endswith('.json') and isinstance(value := json.loads(data), dict):
        key = rng.choice(sorted(value))
        value[key] = rng.choice([None, -1, 0, 1, 10**9, 10**30, 1.5, 'x', '', [], {}, [1], True, {'a': 1}])
        data = json.dumps(value).encode()
    elif kind == 'empty':
        data = b''
    elif kind == 'cut':
        data = data[:rng.randrange(len(data) + 1)]
    elif kind == 'grow':
        data += bytes(rng.randrange(256) for _ in range(9))
    elif data: # flip
        at = rng.randrange(min(len(data), 4000))
        data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    with open(path, 'wb') as f:
        f.write(data)

def test_damaged_checkpoints(tmp_path, capsys):
    torch.manual_seed(0)
    shape = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)
    cfg, model, codes = Config(out_dir=str(tmp_path / 'whole')), GPT(shape), []
    save_checkpoint(Run('cpu', 'float32'), cfg, model, TOK, 1, dict(policy=make_optimizer(model, cfg)))
    rng = random.Random(0)
    for n in range(200):
        cfg = Config(out_dir=str(tmp_path / str(n)), resume=True)
        shutil.copytree(tmp_path / 'whole', cfg.out_dir)
        damage(rng, cfg.out_dir)

        def resume():
            one, again = Run('cpu', 'float32'), GPT(shape)
            prepare_out_dir(one, cfg)
            load_checkpoint(one, cfg, again, dict(policy=make_optimizer(again, cfg)))
            for p, q in zip(model.parameters(), again.parameters()):
                assert torch.equal(p, q) # never with other weights

        codes += [ended(capsys, lambda: (GPT.from_pretrained(cfg.out_dir), load_tokenizer(cfg.out_dir))),
                  ended(capsys, resume)]
        shutil.rmtree(cfg.out_dir)
    assert codes.count(2) > 100 # most of the damage is found
