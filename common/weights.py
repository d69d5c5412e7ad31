"""Read and write the weights of a GPT-2 in the Hugging Face layout.

A checkpoint is a folder or a model on the hub. It is read and written one tensor at a time, so that a model and its
file are never in memory together. Nothing is unpickled that could run code.
"""

import json
import os
import re
import zipfile
from functools import partial

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.options import fail
from common.records import read_json, write_atomic

HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2') # the hub's GPT-2s that have no owner
FRESH = ('value_head.weight', 'value_head.bias', 'score.weight') # may be absent: then they stay as initialised

# ---- files of a folder or of the hub ----------------------------------------------------------------------------

def on_hub(name):
    """Tell whether a name means a model on the hub: one of HUB_NAMES, or OWNER/NAME.

    A folder of that name comes first. out/NAME, and FOLDER/NAME where FOLDER exists, are mistyped paths.
    """
    owner, slash, _ = name.partition('/')
    if os.path.exists(name) or slash and (owner == 'out' or os.path.exists(owner)):
        return False
    return name in HUB_NAMES or re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name, re.ASCII) is not None

def fetch_from_hub(repo_id, filename, repo_type='model', absent_ok=False, named=''):
    """Fetch a file of the hub into its local cache; return the path.

    huggingface_hub's environment variables hold, as HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. repo_type: model
    or dataset. Without a network the cached file is taken. absent_ok: a missing one is None. named: as "--policy=".
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url # here: folders need no hub
    file = dict(repo_id=repo_id, filename=filename, repo_type=repo_type)
    try:
        get_hf_file_metadata(hf_hub_url(**file)) # hf_hub_download alone asks for 25 s where no network is
        return hf_hub_download(**file)
    except errors.RemoteEntryNotFoundError:
        if absent_ok:
            return None
        fail(f"{named}{repo_id}: the {repo_type} on the hub has no file {filename}")
    except errors.GatedRepoError:
        reason = 'it is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN'
    except errors.RepositoryNotFoundError:
        reason = f"no folder of this name here, and no such {repo_type} there; a private one needs HF_TOKEN"
    except Exception as e: # no network, a switch that forbids it, a proxy, a full disk: the hub has no one exception
        reason = ' '.join((str(e) or type(e).__name__).split())[:200]
    try:
        return hf_hub_download(**file, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        if absent_ok:
            return None
    files = 'config.json and model.safetensors' if repo_type == 'model' else filename
    fail(f"{named}{repo_id}: cannot fetch {filename} from the hub ({reason}); without it, put {files} into a folder "
         f"and name that folder instead{' (--source=)' if repo_type == 'dataset' else ''}")

def check_folder(name, option):
    """End the program where a name is no checkpoint; option: the one that gave it."""
    if not on_hub(os.fspath(name)) and not os.path.exists(os.path.join(name, 'config.json')):
        what = 'holds no config.json' if os.path.isdir(name) else 'no such folder'
        fail(f"--{option}={name}: {what}; wanted a checkpoint, which an earlier stage such as sft.py makes, or a model "
             f"on the hub ({', '.join(HUB_NAMES)}, OWNER/NAME)")

def checkpoint_file(name, filename, absent_ok=False, named=''):
    """Return the path of a checkpoint's file; name: a folder or a model on the hub. See fetch_from_hub."""
    name = os.fspath(name)
    if on_hub(name):
        return fetch_from_hub(name, filename, absent_ok=absent_ok, named=named)
    for path in (os.path.join(name, '.saved', filename), os.path.join(name, filename)): # .saved: a kill left it there
        if os.path.exists(path):
            return path
    if absent_ok:
        return None
    fail(f"{path}: No such file or directory; wanted a checkpoint folder, or {', '.join(HUB_NAMES)} or OWNER/NAME")

# ---- reading ----------------------------------------------------------------------------------------------------

def open_pretrained(name):
    """Open a GPT-2, a folder or a model on the hub; another architecture ends the program.

    Returns the fields of its GPTConfig as a dict, the path of its weights, and {tensor's name: function that reads it}.
    """
    path = checkpoint_file(name, 'config.json')
    hf = dict(n_positions=1024, bias=True) | read_json(path, "a checkpoint's configuration")
    missing = [k for k in ('vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd')
               if type(hf.get(k)) is not int or hf[k] < 1]
    if hf.get('model_type') != 'gpt2' or missing:
        fail(f"{path}: not a GPT-2 checkpoint (model_type {hf.get('model_type')!r}"
             + (f", without {', '.join(missing)})" if missing else ')'))
    if type(hf['bias']) is not bool:
        fail(f"{path}: bias must be true or false, got {hf['bias']!r}")
    if hf.get('quantization_config'):
        fail(f"{path}: quantised weights (quantization_config); wanted those it was made from, in floating point")
    ours = dict(activation_function=('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'), layer_norm_epsilon=(1e-5,),
                scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,),
                n_inner=(None, 4 * hf['n_embd']))
    for key, values in ours.items():
        if hf.get(key, values[0]) not in values:
            fail(f"{path}: a variant of GPT-2, {key} must be {' or '.join(map(repr, values))}, got {hf[key]!r}")
    config, (path, tensors) = path, open_weights(name)
    if 'wte.weight' not in tensors and 'lm_head.weight' in tensors: # the same tensor: some tools keep this name
        tensors['wte.weight'] = tensors.pop('lm_head.weight')
    # a size that is wrong may be huge: look before a model of that size is made
    for key, rows in ('wte.weight', hf['vocab_size']), ('wpe.weight', hf['n_positions']):
        read_tensor(path, tensors, key, (rows, hf['n_embd']))
    if hf['n_layer'] != (layers := len({key.split('.')[1] for key in tensors if key.startswith('h.')})):
        fail(f"{config}: n_layer is {hf['n_layer']}, {path} holds {layers} layers")
    fields = {key: hf[key] for key in ('vocab_size', 'n_layer', 'n_head', 'n_embd', 'bias')}
    heads = dict(value_head='value_head.weight' in tensors, reward_head='score.weight' in tensors)
    return fields | heads | dict(block_size=hf['n_positions']), path, tensors

def weight_files(name):
    """Return the paths of a checkpoint's weights: one file, or an index and its shards; safetensors come first."""
    wanted = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
    found = filter(None, (checkpoint_file(name, filename, absent_ok=True) for filename in wanted))
    path = next(found, None) or checkpoint_file(name, wanted[0]) # which says what is missing
    if not path.endswith('.index.json'):
        return [path]
    files = read_json(path, "a checkpoint's index").get('weight_map') # tensor's name: file
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        fail(f"{path}: wanted `weight_map`, the file of every tensor")
    if away := [file for file in files.values() if file != os.path.basename(file)]:
        fail(f"{path}: wanted files beside this one, got {away[0]!r}")
    return [path] + [checkpoint_file(name, file) for file in sorted(set(files.values()))]

def open_weights(name):
    """Return the path of a checkpoint's weights and {tensor's name, less 'transformer.': function that reads it}."""
    path, *shards = weight_files(name)
    tensors = {}
    for file in shards or [path]:
        try:
            if file.endswith('.bin'):
                weights = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
                found = {k: partial(weights.get, k) for k, t in weights.items() if isinstance(t, torch.Tensor)}
            else:
                weights = safe_open(file, 'pt', backend='pread') # mapped, the file would stay in memory as it is read
                found = {k: partial(weights.get_tensor, k) for k in weights.keys()}
        except Exception as e: # a damaged file, or one that would run code, makes torch.load raise nearly anything
            fail(f"{file}: not a readable file of plain tensors ({type(e).__name__}: {' '.join(str(e).split())[:200]})")
        tensors.update((k.removeprefix('transformer.'), read) for k, read in found.items())
    return path, tensors

def named_parameters(model):
    """Yield (name in the Hugging Face layout, the parameter's data, transposed there) of every parameter."""
    for name, p in model.named_parameters():
        # GPT-2 was released with linear weights as (in, out), torch keeps them as (out, in)
        transposed = name.startswith('h.') and name.endswith('weight') and p.dim() == 2
        if transposed and hasattr(layer := model.get_submodule(name.removesuffix('.weight')), 'lora'):
            A, B = (part.weight for part in layer.lora) # the matrix that acts is W + alpha / rank B A
            p = (p + layer.scale * B @ A).cpu() # all are made before they are written
        if '.lora.' not in name:
            yield name.replace('reward_head', 'score'), p.detach(), transposed

def read_tensor(path, tensors, name, shape, transposed=False):
    """Read the floating-point tensor of that name and shape; another ends the program with one line."""
    if name not in tensors:
        fail(f"{path}: tensor {name} is missing, not the weights of this config.json")
    t = tensors[name]()
    t = t.t() if transposed and t.dim() == 2 else t
    if t.shape != shape:
        fail(f"{path}: tensor {name} is {tuple(t.shape)}, config.json says {tuple(shape)}")
    dtype = str(t.dtype).removeprefix('torch.')
    if dtype not in ('float16', 'bfloat16', 'float32', 'float64'): # others need scales beside them
        fail(f"{path}: tensor {name} is {dtype}, wanted floating point of 16 bits or more")
    return t

@torch.no_grad()
def load_tensors(model, path, tensors):
    """Fill a model's parameters from {name: function that reads it}, one by one; path: for error messages."""
    for name, p, transposed in named_parameters(model):
        if name not in tensors and (name in FRESH or name == 'ln_f.bias' and not model.config.bias):
            continue
        t = read_tensor(path, tensors, name, p.shape, transposed).to(p.dtype)
        if not torch.stack(t.aminmax()).isfinite().all(): # of all that is NaN both are NaN
            fail(f"{path}: tensor {name} holds a number that is not finite; wanted the weights of a run that went well")
        p.copy_(t)
    head = tensors.get('lm_head.weight') # most files leave it out
    if head and not torch.equal(head().to(model.wte.weight), model.wte.weight):
        fail(f"{path}: tensor lm_head.weight differs from wte.weight; wanted the output projection tied to it")

# ---- writing ----------------------------------------------------------------------------------------------------

def save_pretrained(model, folder, eos=None, pad=None):
    """Write config.json, model.safetensors and a language model's generation_config.json into a folder.

    eos: the end-of-text id that config.json names; None: the vocabulary's last. pad: the id that other tools pad with.
    They read a reward off the last token that is no pad: it must not be eos; None: they score one row at a time.
    """
    os.makedirs(folder, exist_ok=True)
    c, tensors = model.config, {}
    for name, p, transposed in named_parameters(model):
        prefix = '' if name.startswith(('score', 'value_head')) else 'transformer.'
        tensors[prefix + name] = p.t() if transposed else p
        if not c.bias and name.startswith(('h.', 'ln_f')) and name.endswith('weight'):
            # the layout has biases everywhere: zeros have the same effect (a final bias of ours comes after its weight)
            tensors[prefix + name.removesuffix('weight') + 'bias'] = torch.zeros(p.size(0))
    write_safetensors(os.path.join(folder, 'model.safetensors'), tensors)
    eos = c.vocab_size - 1 if eos is None else eos
    hf = dict(
        architectures=['GPT2ForSequenceClassification' if c.reward_head else 'GPT2LMHeadModel'], model_type='gpt2',
        vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, activation_function='gelu_new', layer_norm_epsilon=1e-5, resid_pdrop=c.dropout,
        embd_pdrop=c.dropout, attn_pdrop=c.dropout, tie_word_embeddings=True, bias=c.bias,
        bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
    files = {'config.json': hf}
    if c.reward_head: # of a regression the score is shown as it is, else its sigmoid
        hf.update(id2label={'0': 'reward'}, label2id={'reward': 0}, problem_type='regression')
    else: # sampling from the model's own distribution, as here; transformers would take the 50 likeliest tokens
        files['generation_config.json'] = dict(
            bos_token_id=eos, eos_token_id=eos, pad_token_id=eos if pad is None else pad, do_sample=True,
            temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=min(64, max(1, c.block_size // 2)))
    for filename, content in files.items():
        write_atomic(os.path.join(folder, filename), json.dumps(content, indent=2))

def write_safetensors(path, tensors):
    """Write {name: tensor} in the safetensors format, one by one; the library wants all contiguous at once."""
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, t in tensors.items():
        header[name] = dict(dtype='F32', shape=list(t.shape), data_offsets=[end, end := end + 4 * t.numel()])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8) # tensors begin at a multiple of 8 bytes
    with open(path, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text) # the header, then the tensors in its order
        for t in tensors.values():
            f.write(t.float().cpu().contiguous().numpy())

def save_adapter(model, cfg, folder):
    """Write the adapter alone to a new folder, in PEFT's layout."""
    scored = model.reward_head is not None
    os.makedirs(folder)
    tensors = {f'transformer.{name}.lora_{k}.weight': part.weight for name, layer in model.named_modules()
               if hasattr(layer, 'lora') for k, part in zip('AB', layer.lora)}
    tensors |= {'score.weight': model.reward_head.weight} if scored else {}
    write_atomic(os.path.join(folder, 'adapter_config.json'), json.dumps(dict(
        peft_type='LORA', task_type='SEQ_CLS' if scored else 'CAUSAL_LM', r=cfg.lora_rank, lora_alpha=cfg.lora_alpha,
        base_model_name_or_path=getattr(cfg, 'policy', '') or cfg.init_from, lora_dropout=0.0, bias='none',
        target_modules=['c_attn', 'c_proj', 'c_fc'] if cfg.lora_on == 'all' else ['c_attn'], fan_in_fan_out=True,
        modules_to_save=['score'] if scored else None, inference_mode=True), indent=2))
    tensors = {f'base_model.model.{name}': p.detach().cpu() for name, p in tensors.items()}
    save_file(tensors, os.path.join(folder, 'adapter_model.safetensors'), {'format': 'pt'})
