"""
Models whose numbers are known from elsewhere, for the tests of model.py and of its weights.

Two are made for hand computation: `rotor` always answers with the token after the last one, and `signs` has hidden
states that can be written down. A third is given by a formula, and transformers once computed its numbers.
"""
import json
import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import GPT, GPTConfig

close = dict(rtol=0, atol=1e-5) # for float32 forwards
V, T, C, LAYERS = 7, 10, 8, 2 # of the model given by a formula

def random_model(seed=0, **more):
    """Return a tiny GPT whose every parameter is random and large enough to matter, biases and gains included."""
    torch.manual_seed(seed)
    config = GPTConfig(**dict(dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8), **more))
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape))
    return model.eval()

def signs(**heads):
    """
    Return a model of three tokens whose layers and positions do nothing.

    A token's hidden state is its embedding: layer norm finds mean 0 and variance 1; its 1e-5 in the root makes it
    0.999995 of that.
    """
    model = GPT(GPTConfig(block_size=6, vocab_size=3, n_layer=1, n_head=1, n_embd=4, **heads))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'c_proj' in name or name == 'wpe.weight':
                p.zero_()
        model.wte.weight.copy_(torch.tensor([[1., 1., -1., -1.], [1., -1., 1., -1.], [1., -1., -1., 1.]]))
    return model

def three_tokens():
    """Return a model that gives its three tokens 1/2, 1/4, 1/4 everywhere: the hidden state is (1, 0)."""
    model = GPT(GPTConfig(block_size=6, vocab_size=3, n_layer=1, n_head=1, n_embd=2))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1., 0.]))
        model.wte.weight.copy_(torch.tensor([[math.log(0.5), 3.], [math.log(0.25), -1.], [math.log(0.25), 2.]]))
    return model

def rotor():
    """
    Return a model of eight tokens on a circle, whose likeliest next token is token + 1 (mod 8), wherever it stands.

    The MLP turns a token's embedding by an eighth; gelu(x) - gelu(-x) = x makes it linear.
    """
    model = GPT(GPTConfig(block_size=16, vocab_size=8, n_layer=1, n_head=1, n_embd=4)).eval()
    a = 2 * math.pi * torch.arange(8) / 8
    turn = torch.zeros(4, 4)
    turn[:2, :2] = turn[2:, 2:] = torch.tensor([[math.cos(a[1]), -math.sin(a[1])], [math.sin(a[1]), math.cos(a[1])]])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'ln' not in name:
                p.zero_()
        model.wte.weight.copy_(torch.stack([a.cos(), a.sin(), -a.cos(), -a.sin()], 1))
        model.h[0].mlp.c_fc.weight[:8] = torch.cat([torch.eye(4), -torch.eye(4)])
        model.h[0].mlp.c_proj.weight[:, :8] = 100 * torch.cat([turn, -turn], 1)
    return model

def full_logp(logits, idx):
    """Return log-probabilities (B, T-1) of idx (B, T) under logits (B, T, V), the plainest way there is."""
    return logits[:, :-1].log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]

def all_values(model, idx):
    """Return V (B, T) after every token of idx (B, T); the token that follows the last one changes nothing."""
    return model.values(F.pad(idx, (0, 1)), torch.ones(idx.shape))

# ---------------------------------------------------------------------------------------------------------------------
# numbers that transformers computed, for weights given by a formula

def formula_tensors():
    """Return a GPT-2 of 2 layers, tensors in the order of the Hugging Face layout, element j of the i-th by a sine."""
    shapes = {'wte.weight': (V, C), 'wpe.weight': (T, C)}
    for layer in range(LAYERS):
        for name, shape in [('ln_1.weight', (C,)), ('ln_1.bias', (C,)), ('attn.c_attn.weight', (C, 3 * C)),
                            ('attn.c_attn.bias', (3 * C,)), ('attn.c_proj.weight', (C, C)), ('attn.c_proj.bias', (C,)),
                            ('ln_2.weight', (C,)), ('ln_2.bias', (C,)), ('mlp.c_fc.weight', (C, 4 * C)),
                            ('mlp.c_fc.bias', (4 * C,)), ('mlp.c_proj.weight', (4 * C, C)), ('mlp.c_proj.bias', (C,))]:
            shapes[f'h.{layer}.{name}'] = shape
    shapes.update({'ln_f.weight': (C,), 'ln_f.bias': (C,), 'score.weight': (1, C)})
    out = {}
    for i, (name, shape) in enumerate(shapes.items()):
        j = torch.arange(math.prod(shape), dtype=torch.float64)
        w = 0.5 * torch.sin((i + 1) * 1.3 + j * j * 0.37 + j)
        out[name] = (w + 1 if 'ln' in name and name.endswith('weight') else w).float().view(shape)
    return out

def write_folder(folder, tensors, **more):
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    config = dict(model_type='gpt2', vocab_size=V, n_positions=T, n_embd=C, n_layer=LAYERS, n_head=2,
                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump({**config, **more}, f)
    return str(folder)

def formula_folder(folder, reward=False):
    tensors = {('' if k.startswith('score') else 'transformer.') + k: v for k, v in formula_tensors().items()}
    if reward:
        return write_folder(folder, tensors, architectures=['GPT2ForSequenceClassification'], pad_token_id=None,
                            id2label={'0': 'reward'}, label2id={'reward': 0})
    del tensors['score.weight']
    return write_folder(folder, tensors, architectures=['GPT2LMHeadModel'])

# transformers 5.23.0 computed these in float64 for the folder above
IDX = [1, 5, 2, 6, 0, 3]
LOGITS = [[-2.415587, -1.095196, 0.766120, 1.832492, -2.269930, -1.912630, 1.414986],
          [-0.731393, 0.189407, 0.431831, 1.498820, -1.497778, -1.038571, 1.266166],
          [-0.339488, 1.256591, -0.684019, 1.030383, -1.025810, -0.285496, 0.164886],
          [-0.288636, 0.327584, 0.135877, 0.977649, -0.942063, -0.434770, 0.705350],
          [-0.109814, 0.404520, 0.045313, 0.755943, -0.725750, -0.309275, 0.685566],
          [-1.154209, 0.462224, -0.184038, 1.281198, -1.462350, -0.796460, 0.547171]]
GREEDY = [([1], [3, 3, 1, 3, 3]), ([4, 4], [6, 3, 3, 3, 3]), ([6, 0, 3], [3, 3, 3, 3, 3]),
          ([2, 2, 5, 0], [6, 3, 3, 3, 3])]
SCORES = [([1, 5, 2, 6, 0, 3], 0.350220), ([4, 4], 0.858456), ([6, 0, 3], 0.574317)]

def ragged(rows, fill=0):
    """Return right-padded idx (B, T) and lengths (B,), written here so that nothing but model.py is tested."""
    longest = max(map(len, rows))
    return torch.tensor([r + [fill] * (longest - len(r)) for r in rows]), torch.tensor([len(r) for r in rows])

# ---------------------------------------------------------------------------------------------------------------------
# models of transformers itself; hf: the fixture of conftest.py

def hf_model(hf, kind, seed=0):
    torch.manual_seed(seed)
    config = hf.GPT2Config(vocab_size=13, n_positions=16, n_embd=12, n_layer=3, n_head=3, bos_token_id=0,
                           eos_token_id=0, num_labels=1)
    model = getattr(hf, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model

def hf_greedy(model, prompt, n):
    with torch.no_grad():
        x = torch.tensor([prompt])
        return model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, do_sample=False, pad_token_id=0,
                              eos_token_id=None)[0, len(prompt):].tolist()

def hf_score(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits.item()

ROWS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [12, 0, 0], [3], [7, 7, 1, 0, 0, 5]]
