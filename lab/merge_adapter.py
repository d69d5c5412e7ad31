"""Merge an adapter (LoRA) in PEFT's layout into its base model: a plain GPT-2 folder, which every script here opens.

    python -m lab.merge_adapter --adapter=FOLDER --out_dir=out/merged
    python -m lab.merge_adapter --adapter=FOLDER --base=gpt2 --out_dir=out/merged

What the scripts here save with --lora_rank is merged already, and lies in out_dir itself.
"""

import math
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.options import fail, launch, require
from common.records import is_number, read_json
from common.tokens import load_tokenizer
from common.weights import check_folder, open_pretrained
from model import GPT

import torch
from safetensors.torch import load_file

PREFIX = 'base_model.model.'

@dataclass
class Config:
    adapter: str = '' # a folder with adapter_config.json and adapter_model.safetensors
    base: str = '' # the model that it was trained on, a folder or a model on the hub; empty: the one that it names
    out_dir: str = '' # the new checkpoint

    def __post_init__(self):
        require(self, adapter=(self.adapter != '', 'a folder'), out_dir=(self.out_dir != '', 'a new folder'))

def read_adapter(folder):
    """Return PEFT's configuration of a LoRA and {tensor's name in GPT-2: tensor}; others end the program."""
    path, file = (os.path.join(folder, name) for name in ('adapter_config.json', 'adapter_model.safetensors'))
    about = read_json(path, "PEFT's configuration of an adapter")
    for key, wanted in dict(peft_type=('LORA',), use_dora=(None, False), rank_pattern=(None, {}), bias=(None, 'none'),
                            alpha_pattern=(None, {}), use_rslora=(None, False, True)).items():
        if about.get(key) not in wanted:
            fail(f"{path}: {key} is {about.get(key)!r}; wanted a plain LoRA")
    if not all(is_number(about.get(key)) and about[key] > 0 for key in ('r', 'lora_alpha')):
        fail(f"{path}: wanted numbers above 0 for `r` and `lora_alpha`, below 1e38")
    try:
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(file).items()}
    except Exception as e: # a file that is missing or damaged
        fail(f"{file}: not a readable file of plain tensors ({' '.join(str(e).split())[:200]})")
    whole = about.get('modules_to_save') or [] # layers; PEFT names these two for every classifier
    for name in whole if isinstance(whole, list) else [whole]:
        if name not in ('classifier', 'score') or name == 'score' and 'score.weight' not in tensors:
            fail(f"{path}: modules_to_save has {name!r}; wanted none, or `score` with a tensor score.weight")
    for name, t in tensors.items():
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64): # others need scales
            fail(f"{file}: {name} is {str(t.dtype).removeprefix('torch.')}; wanted floating point of 16 bits or more")
        tensors[name] = t.float()
        if not tensors[name].isfinite().all():
            fail(f"{file}: {name} holds a number that is not finite; wanted an adapter whose training went well")
        side = next((i for i, k in enumerate('AB') if name.endswith(f'.lora_{k}.weight')), None)
        if side is not None and (t.dim() != 2 or t.size(side) != about['r']): # A: (r, in), B: (out, r)
            fail(f"{file}: {name} is {tuple(t.shape)}; wanted a matrix of rank {about['r']}, the r of {path}")
    if not tensors:
        fail(f"{file}: wanted the tensors of an adapter, found none")
    return about, tensors

@torch.no_grad()
def merge(model, about, tensors):
    """Add alpha / r B A to the weights that the adapter names; return those of its tensors that have no place.

    With use_rslora it is alpha / sqrt(r), Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
    """
    scale = about['lora_alpha'] / (math.sqrt(about['r']) if about.get('use_rslora') else about['r'])
    left = dict(tensors)
    for name, layer in model.named_modules():
        A, B = (left.get(f'transformer.{name}.lora_{k}.weight') for k in 'AB') # (r, in), (out, r)
        fits = isinstance(layer, torch.nn.Linear) and A is not None and B is not None
        if fits and (B.size(0), A.size(1)) == layer.weight.shape:
            layer.weight += scale * B @ A
            del left[f'transformer.{name}.lora_A.weight'], left[f'transformer.{name}.lora_B.weight']
    score = left.pop('score.weight', None)
    if score is not None:
        model.reward_head.weight.copy_(score)
    return sorted(left)

def main(cfg):
    about, tensors = read_adapter(cfg.adapter)
    base = cfg.base or str(about.get('base_model_name_or_path') or '')
    check_folder(base, 'base')
    if os.path.realpath(base) == os.path.dirname(os.path.realpath(cfg.adapter)):
        fail(f"--base={base}: holds the adapter, merged already; wanted the model that it began from")
    if os.path.realpath(cfg.out_dir) == os.path.realpath(cfg.adapter):
        fail(f"--out_dir={cfg.out_dir}: is the adapter's folder; wanted another one")
    if os.path.exists(os.path.join(cfg.out_dir, 'config.json')):
        fail(f"--out_dir={cfg.out_dir}: holds a checkpoint; wanted another folder")
    overrides = dict(reward_head=True) if 'score.weight' in tensors else {}
    fields, *_ = open_pretrained(base)
    if (shape := tensors.get('score.weight', torch.zeros(1, fields['n_embd'])).shape) != (1, fields['n_embd']):
        fail(f"{cfg.adapter}: score.weight is {tuple(shape)}; wanted {(1, fields['n_embd'])}, one score")
    model = GPT.from_pretrained(base, **overrides)
    if left := merge(model, about, tensors):
        fail(f"{cfg.adapter}: {left[0]} has no place in {base}; wanted an adapter of its linear layers")
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(f"{cfg.adapter}: merged, its weights are not finite; wanted a lora_alpha below {about['lora_alpha']}")
    tok = load_tokenizer(base, 'base')
    model.save_pretrained(cfg.out_dir, tok.eos, tok.pad)
    tok.save(cfg.out_dir, 'left' if model.reward_head is None else 'right')
    print(f"{cfg.out_dir}: {base} with {cfg.adapter}, {len(tensors)} tensors of rank {about['r']}")

if __name__ == '__main__':
    launch(main, Config)
