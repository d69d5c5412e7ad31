"""
model.py against an independent GPT-2 (transformers, or numbers it once computed), and against values by hand.

Two models are made for hand computation: `rotor` always answers with the word after the last one, and `signs` has
hidden states that can be written down.
"""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from model import GPT, GPTConfig, load_policy, load_reward_model, sample_token, token_logp
from tokens import collate_answers

close = dict(rtol=0, atol=1e-5) # for float32 forwards
V, T, C, LAYERS = 7, 10, 8, 2 # of the model given by a formula


def random_model(seed=0, **more):
    """A tiny GPT whose every parameter is random and large enough to matter, biases and layer norms included."""
    torch.manual_seed(seed)
    config = GPTConfig(**dict(dict(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8), **more))
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.4 * torch.randn(p.shape))
    return model.eval()


def signs(**heads):
    """
    Three words, no layers' work, no positions: a word's hidden state is its embedding (layer norm finds mean 0 and
    variance 1; its 1e-5 in the root makes it 0.999995 of that).
    """
    model = GPT(GPTConfig(block_size=6, vocab_size=3, n_layer=1, n_head=1, n_embd=4, **heads))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'c_proj' in name or name == 'wpe.weight':
                p.zero_()
        model.wte.weight.copy_(torch.tensor([[1., 1., -1., -1.], [1., -1., 1., -1.], [1., -1., -1., 1.]]))
    return model


def three_words():
    """A model that gives its three words the probabilities 1/2, 1/4, 1/4 everywhere: the hidden state is (1, 0)."""
    model = GPT(GPTConfig(block_size=6, vocab_size=3, n_layer=1, n_head=1, n_embd=2))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1., 0.]))
        model.wte.weight.copy_(torch.tensor([[math.log(0.5), 3.], [math.log(0.25), -1.], [math.log(0.25), 2.]]))
    return model


def rotor():
    """
    Eight words on a circle; the MLP turns a word's embedding by an eighth, so the likeliest next word is word + 1
    (mod 8), wherever it stands. gelu(x) - gelu(-x) = x makes the MLP linear.
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


# ---------------------------------------------------------------------------------------------------------------------
# numbers that transformers computed, for weights given by a formula

def formula_tensors():
    """The tensors of a GPT-2 of 2 layers in the order of the Hugging Face layout, element j of the i-th by a sine."""
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
    """Right-padded idx (B, T) and lengths (B,), written here so that nothing but model.py is tested."""
    longest = max(map(len, rows))
    return torch.tensor([r + [fill] * (longest - len(r)) for r in rows]), torch.tensor([len(r) for r in rows])


def test_logits_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path))
    logits, loss = model(torch.tensor([IDX]))
    torch.testing.assert_close(logits, torch.tensor([LOGITS]), **close)
    assert loss is None


def test_greedy_answers_to_ragged_prompts_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path))
    assert model.generate([p for p, _ in GREEDY], 5, temperature=0) == [answer for _, answer in GREEDY]


def test_reward_scores_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path, reward=True))
    idx, lengths = ragged([row for row, _ in SCORES], fill=4)
    torch.testing.assert_close(model.rewards(idx, lengths), torch.tensor([s for _, s in SCORES]), **close)


@pytest.mark.parametrize('reward', [False, True])
def test_saved_tensors_are_the_ones_read(tmp_path, reward):
    folder = formula_folder(tmp_path / 'a', reward)
    GPT.from_pretrained(folder).save_pretrained(tmp_path / 'b')
    before, after = load_file(os.path.join(folder, 'model.safetensors')), load_file(tmp_path / 'b/model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_hubs_gpt2_loads(tmp_path):
    """Its file has no 'transformer.' prefix, the causal masks as buffers, and in some copies the tied projection."""
    tensors = formula_tensors()
    del tensors['score.weight']
    for layer in range(LAYERS):
        tensors[f'h.{layer}.attn.bias'] = torch.ones(1, 1, T, T).tril()
        tensors[f'h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
    tensors['lm_head.weight'] = tensors['wte.weight'].clone()
    config = json.load(open(os.path.join(formula_folder(tmp_path / 'c'), 'config.json')))
    config = {k: v for k, v in config.items() if k in ('model_type', 'vocab_size', 'n_positions', 'n_embd', 'n_layer',
                                                       'n_head')}
    model = GPT.from_pretrained(write_folder(tmp_path / 'a', tensors))
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)
    (tmp_path / 'a/config.json').write_text(json.dumps({**config, 'n_ctx': T, 'activation_function': 'gelu_new'}))
    model = GPT.from_pretrained(tmp_path / 'a')
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)


def as_shards(folder, save, single, shard):
    """A folder's tensors in two files behind an index, written by `save`."""
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    os.remove(os.path.join(folder, 'model.safetensors'))
    files = {name: shard.format(1 + i % 2) for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save({name: t for name, t in tensors.items() if files[name] == file}, os.path.join(folder, file))
    with open(os.path.join(folder, single + '.index.json'), 'w') as f:
        json.dump({'metadata': {'total_size': 0}, 'weight_map': files}, f)


def as_bin(folder, **options):
    path = os.path.join(folder, 'model.safetensors')
    torch.save(load_file(path), os.path.join(folder, 'pytorch_model.bin'), **options)
    os.remove(path)


@pytest.mark.parametrize('change', [
    lambda d: as_shards(d, save_file, 'model.safetensors', 'model-{}-of-2.safetensors'),
    lambda d: as_shards(d, torch.save, 'pytorch_model.bin', 'pytorch_model-{}-of-2.bin'),
    as_bin, lambda d: as_bin(d, _use_new_zipfile_serialization=False)], ids=['shards', 'bin shards', 'bin', 'old bin'])
@pytest.mark.parametrize('reward', [False, True])
def test_weights_in_other_files(tmp_path, change, reward):
    folder = formula_folder(tmp_path, reward)
    change(folder)
    model = GPT.from_pretrained(folder, value_head=reward)
    torch.testing.assert_close(model(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)
    if reward: # its score is read twice: the critic starts as it
        assert model.values(torch.tensor([IDX]))[0, -1].item() == pytest.approx(SCORES[0][1], abs=1e-5)


def test_safetensors_before_torchs_format(tmp_path):
    folder = formula_folder(tmp_path)
    torch.save({}, tmp_path / 'pytorch_model.bin')
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_of_strangers_is_not_executed(tmp_path, capsys):
    folder, trace = formula_folder(tmp_path / 'model'), str(tmp_path / 'executed')
    os.remove(os.path.join(folder, 'model.safetensors'))
    torch.save({'wte.weight': Malicious(trace)}, os.path.join(folder, 'pytorch_model.bin'))
    line = one_line(capsys, lambda: GPT.from_pretrained(folder))
    assert 'pytorch_model.bin: not a readable file of plain tensors (UnpicklingError' in line
    assert not os.path.exists(trace)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_float32(tmp_path, dtype):
    folder = formula_folder(tmp_path)
    edit_tensors(folder, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    model, expected = GPT.from_pretrained(folder), formula_tensors()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wpe.weight, expected['wpe.weight'].to(dtype).float())
    assert torch.equal(model.h[1].mlp.c_fc.weight, expected['h.1.mlp.c_fc.weight'].to(dtype).float().t())


def test_the_embedding_under_the_projections_name(tmp_path):
    """The two are one tensor, and some tools keep the other name."""
    folder = formula_folder(tmp_path)
    edit_tensors(folder, lambda t: t.update({'lm_head.weight': t.pop('transformer.wte.weight')}))
    torch.testing.assert_close(GPT.from_pretrained(folder)(torch.tensor([IDX]))[0], torch.tensor([LOGITS]), **close)


MEASURE = """
import sys
import common
from model import GPT
def kilobytes(what):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(what))
before = kilobytes('VmRSS')
model = GPT.from_pretrained(sys.argv[1])
loading = kilobytes('VmHWM') - before
open('/proc/self/clear_refs', 'w').write('5') # the peak starts anew
before = kilobytes('VmHWM')
model.save_pretrained(sys.argv[2])
print(loading, kilobytes('VmHWM') - before)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason="Linux tells the peak of memory")
def test_neither_loading_nor_saving_holds_a_second_copy(tmp_path):
    # 256 * 8000 + 64 * 256 + 20 * 12 * 256 * 256 numbers and some biases of 4 bytes: 71 MB, of which 8 in the largest
    GPT(GPTConfig(64, 8000, 20, 4, 256)).save_pretrained(tmp_path / 'a')
    root = os.path.dirname(os.path.abspath(model_module.__file__))
    out = subprocess.run([sys.executable, '-c', MEASURE, tmp_path / 'a', tmp_path / 'b'], cwd=root, text=True,
                         capture_output=True, check=True).stdout
    loading, saving = (int(x) / 1000 for x in out.split()) # MB
    assert 60 < loading < 100 and saving < 20
    assert (tmp_path / 'a/model.safetensors').read_bytes() == (tmp_path / 'b/model.safetensors').read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# a vocabulary that is padded, one that is larger than its tokenizer

def test_a_padded_vocabulary_is_seen_nowhere(tmp_path):
    """11 words in 64 rows, the other 53 absurd: the same figures, gradients, answers and files."""
    heads = dict(value_head=True, reward_head=True)
    random_model(**heads).save_pretrained(tmp_path / 'a')
    plain, padded = (GPT.from_pretrained(tmp_path / 'a', pad_vocab=pad) for pad in (False, True))
    assert padded.wte.weight.shape == (64, 8) and padded.wte.weight[11:].abs().max().item() == 0
    with torch.no_grad():
        padded.wte.weight[11:] = 100 * padded.ln_f.bias # the likeliest words by far
    idx, mask = torch.randint(11, (3, 9)), torch.ones(3, 8)
    batch = collate_answers(PROMPTED)
    for model in (plain, padded):
        logits, loss = model(idx, targets=idx)
        assert logits.shape == (3, 9, 11)
        logp, entropy = model.logp_and_entropy(idx, mask, with_entropy=True)
        both = model.logp_entropy_values(idx, mask)[0]
        (loss + logp.sum() + entropy.sum() + both.sum() + model.answer_logp(batch).sum()).backward()
        torch.manual_seed(4)
        answers = model.generate(RAGGED, 8, top_k=12), model.generate(RAGGED, 8, temperature=0)
        model.seen = logits, loss, logp, entropy, both, torch.tensor(answers[0] + answers[1])
    for a, b in zip(plain.seen, padded.seen):
        torch.testing.assert_close(a, b, **close)
    for (name, p), q in zip(plain.named_parameters(), padded.parameters()):
        if name == 'wte.weight':
            assert q.grad[11:].abs().max().item() == 0
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad[:len(p.grad)], rtol=1e-5, atol=1e-5)
    padded.save_pretrained(tmp_path / 'b')
    for name in ('config.json', 'model.safetensors'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    assert GPT(GPTConfig(vocab_size=128, n_layer=1, n_embd=12, pad_vocab=True)).wte.weight.size(0) == 128


# ---------------------------------------------------------------------------------------------------------------------
# the same with transformers itself, random weights

@pytest.fixture(scope='module')
def hf():
    transformers = pytest.importorskip('transformers', reason="the independent GPT-2; stored numbers stand in for it")
    transformers.logging.set_verbosity_error()
    return transformers


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


def test_stored_numbers_are_those_of_transformers(hf, tmp_path):
    theirs = hf.GPT2LMHeadModel.from_pretrained(formula_folder(tmp_path / 'lm')).eval()
    torch.testing.assert_close(theirs(torch.tensor([IDX])).logits, torch.tensor([LOGITS]), **close)
    assert all(hf_greedy(theirs, prompt, 5) == answer for prompt, answer in GREEDY)
    theirs = hf.GPT2ForSequenceClassification.from_pretrained(formula_folder(tmp_path / 'rm', reward=True)).eval()
    assert all(hf_score(theirs, row) == pytest.approx(score, abs=1e-5) for row, score in SCORES)


def test_a_language_model_of_transformers_opens_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2LMHeadModel')
    theirs.save_pretrained(tmp_path)
    ours = load_policy(tmp_path)
    idx = torch.randint(13, (4, 16))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, **close)
    assert ours.generate(ROWS, 6, temperature=0) == [hf_greedy(theirs, row, 6) for row in ROWS]


def test_a_reward_model_of_transformers_opens_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2ForSequenceClassification')
    theirs.save_pretrained(tmp_path)
    ours = load_reward_model(tmp_path)
    expected = torch.tensor([hf_score(theirs, row) for row in ROWS])
    torch.testing.assert_close(ours.rewards(*ragged(ROWS, fill=11)), expected, **close)


@pytest.mark.parametrize('bias', [True, False])
def test_transformers_opens_our_language_model(hf, tmp_path, bias):
    ours = random_model(bias=bias)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    idx = torch.randint(11, (4, 16))
    torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx)[0], **close)


@pytest.mark.parametrize('bias', [True, False])
def test_transformers_opens_our_normalised_reward_model(hf, tmp_path, bias):
    ours, rows = random_model(bias=bias, reward_head=True), [[1, 2, 3, 4], [10, 0], [0, 0, 0, 7, 7, 7], [10]]
    ours.normalise_rewards(mean=-2.5, std=0.5)
    ours.save_pretrained(tmp_path)
    theirs, info = hf.GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    expected = torch.tensor([hf_score(theirs.eval(), row) for row in rows])
    torch.testing.assert_close(ours.rewards(*ragged(rows, fill=3)), expected, **close)


@pytest.mark.parametrize('kind', ['GPT2LMHeadModel', 'GPT2ForSequenceClassification'])
def test_more_words_than_the_tokenizer_has_go_there_and_back(hf, tmp_path, kind):
    """13 words of which the tokenizer knows 10, whose last is the end of text; through a padded model of 64 rows."""
    theirs = hf_model(hf, kind)
    theirs.save_pretrained(tmp_path / 'a')
    GPT.from_pretrained(tmp_path / 'a', pad_vocab=True).save_pretrained(tmp_path / 'b', eos=9)
    again = getattr(hf, kind).from_pretrained(tmp_path / 'b').eval()
    assert (again.config.vocab_size, again.config.eos_token_id) == (13, 9)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), theirs.parameters(), strict=True))
    for row in ROWS:
        torch.testing.assert_close(again(torch.tensor([row])).logits, theirs(torch.tensor([row])).logits, **close)


def test_shards_of_transformers_open_here(hf, tmp_path):
    theirs = hf_model(hf, 'GPT2LMHeadModel')
    theirs.save_pretrained(tmp_path, max_shard_size='10kB')
    assert (tmp_path / 'model.safetensors.index.json').exists()
    idx = torch.randint(13, (4, 16))
    torch.testing.assert_close(load_policy(tmp_path)(idx)[0], theirs(idx).logits, **close)


# ---------------------------------------------------------------------------------------------------------------------
# generation

RAGGED = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [10, 0], [0, 0, 7, 7, 7, 7]]


def alone(model, prompt, n, eos=None):
    """Greedy words and their log-probabilities, one prompt, the whole forward again for every word."""
    ids, logps = list(prompt), []
    while len(logps) < n and (not logps or ids[-1] != eos):
        logp = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        ids.append(logp.argmax().item())
        logps.append(logp.max().item())
    return ids[len(prompt):], logps


def test_cached_logits_equal_uncached_ones_at_every_step(monkeypatch):
    model, seen, real = random_model(), [], sample_token
    monkeypatch.setattr(model_module, 'sample_token', lambda logits, *a: (seen.append(logits), real(logits, *a))[1])
    torch.manual_seed(1)
    answers = model.generate(RAGGED, 8)
    assert len(seen) == 8 and [len(a) for a in answers] == [8] * 5
    for step, logits in enumerate(seen):
        for row, (prompt, answer) in enumerate(zip(RAGGED, answers)):
            expected = model(torch.tensor([prompt + answer[:step]]))[0][0, -1]
            torch.testing.assert_close(logits[row], expected, **close)


@pytest.mark.parametrize('eos', [None, 4])
def test_recorded_logp_equals_the_full_forwards(eos):
    model = random_model()
    torch.manual_seed(2)
    answers, logps = model.generate_with_logp(RAGGED * 4, 8, eos=eos)
    assert len({len(a) for a in answers}) > 1 or eos is None # rows did end at different times
    for prompt, answer, logp in zip(RAGGED * 4, answers, logps):
        full = token_logp(model(torch.tensor([prompt + answer]))[0], torch.tensor([prompt + answer]))
        torch.testing.assert_close(torch.tensor(logp), full[0, len(prompt) - 1:], **close)


def test_a_ragged_row_equals_the_row_alone_and_ends_of_others_do_not_matter():
    model = random_model(seed=3)
    answers, logps = model.generate_with_logp(RAGGED, 8, temperature=0)
    for prompt, answer, logp in zip(RAGGED, answers, logps):
        expected, expected_logp = alone(model, prompt, 8)
        assert answer == expected and logp == pytest.approx(expected_logp, abs=1e-5)
    for eos in range(11): # each word in turn ends some rows early and others never
        cut = [a[:a.index(eos) + 1] if eos in a else a for a in answers]
        assert model.generate(RAGGED, 8, temperature=0, eos=eos) == cut


def test_rows_that_end_leave_the_batch(monkeypatch):
    model, sizes, embed = rotor(), [], GPT.embed
    monkeypatch.setattr(GPT, 'embed', lambda self, idx, *a, **k: (
        sizes.append(tuple(idx.shape)), embed(self, idx, *a, **k))[1])
    prompts = [[5], [7, 6], [1, 7, 4], [0, 0, 7, 2]] # word 7 is the end; in a prompt it is harmless
    answers = model.generate(prompts, 4, temperature=0, eos=7)
    assert answers == [[6, 7], [7], [5, 6, 7], [3, 4, 5, 6]] # the end is kept; the last row stops at four words
    # whole prompts; then one word a row: 3 rows are left of 4, then 2, then 1
    assert sizes == [(4, 4), (3, 1), (2, 1), (1, 1)]


def test_a_row_that_ended_is_silent_while_it_waits_in_the_batch(monkeypatch):
    sizes, embed = [], GPT.embed
    monkeypatch.setattr(GPT, 'embed', lambda self, idx, *a, **k: (sizes.append(len(idx)), embed(self, idx, *a, **k))[1])
    # one end of six rows does not yet pay for moving the cache: 5 > 0.8 * 6; the second leaves 4 <= 4.8
    answers = rotor().generate([[6], [5, 5], [0], [0, 1], [1], [2, 2, 2]], 4, temperature=0, eos=7)
    assert answers == [[7], [6, 7], [1, 2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert sizes == [6, 6, 4, 4]


def test_a_compiled_step_says_the_same():
    """One shape while answers grow and rows end, so it is compiled once; and once more where more room is needed."""
    model, compiled = random_model(seed=3, block_size=300), []
    few, many = [RAGGED * 2, [[1, 2, 3] * 40, [4]]], [] # room for 128 tokens, and for 256
    for prompts in few:
        many += [model.generate(prompts, n, temperature=0, eos=4) for n in (8, 15)]
    torch.compiler.reset()
    model.compile_decoding(backend=lambda graph, inputs: (compiled.append(graph), graph.forward)[1])
    for prompts in few:
        for n in (8, 15):
            assert model.generate(prompts, n, temperature=0, eos=4) == many.pop(0)
    assert len(compiled) == 3 # 10 rows of 128, 2 rows of 128 and of 256
    for eos in range(11): # each word in turn ends rows, and they stay
        answers = model.generate(RAGGED * 2, 8, temperature=0)
        cut = [a[:a.index(eos) + 1] if eos in a else a for a in answers]
        assert model.generate(RAGGED * 2, 8, temperature=0, eos=eos) == cut
    assert len(compiled) == 3


@pytest.mark.parametrize('n', [1, 2, 5])
def test_max_new_tokens_is_respected(n):
    assert rotor().generate([[1], [2, 3]], n, temperature=0) == [[2, 3, 4, 5, 6][:n], [4, 5, 6, 7, 0][:n]]


def test_an_answer_may_fill_the_context_and_no_more():
    model = random_model()
    prompt = [1] * 12
    assert model.generate([prompt, [2]], 4, temperature=0) == [alone(model, prompt, 4)[0], alone(model, [2], 4)[0]]
    with pytest.raises(ValueError, match='context of 16'):
        model.generate([prompt], 5)
    with pytest.raises(ValueError, match='context of 16'):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match='empty prompt'):
        model.generate([[1], []], 4)


@pytest.mark.parametrize('how', [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)])
def test_narrow_sampling_is_greedy(how):
    model = random_model(seed=3)
    torch.manual_seed(4)
    assert model.generate(RAGGED, 8, **how) == [alone(model, prompt, 8)[0] for prompt in RAGGED]


def test_generation_switches_dropout_off_and_back():
    model = random_model(seed=3, dropout=0.5)
    expected = [alone(model, prompt, 8)[0] for prompt in RAGGED]
    model.train()
    assert model.generate(RAGGED, 8, temperature=0) == expected and model.training
    with pytest.raises(ValueError):
        model.generate([[]], 1)
    assert model.training


def test_stream_yields_the_words_of_generate():
    steps = [(rows.tolist(), tokens.tolist()) for rows, tokens, _ in rotor().stream([[5], [3]], 3, 0, eos=7)]
    assert steps == [([0, 1], [6, 4]), ([0, 1], [7, 5]), ([1], [6])]


# probabilities 1/2, 3/10, 1/5, 0, in another order. 20000 draws; five standard deviations sqrt(20000 p (1-p)) are at
# most 5 * 70.7 = 354. At temperature 2 a probability's root counts: .707107 .547723 .447214, of 1.702044 in all.
@pytest.mark.parametrize('how, p', [
    (dict(), [0.3, 0.0, 0.5, 0.2]),
    (dict(temperature=2.0), [0.321803, 0.0, 0.415446, 0.262751]),
    (dict(top_k=2), [0.375, 0.0, 0.625, 0.0]), # 3/8 and 5/8
    (dict(top_k=9), [0.3, 0.0, 0.5, 0.2]), # more than there are words
    (dict(top_p=0.6), [0.375, 0.0, 0.625, 0.0]), # 1/2 does not reach .6, with 3/10 it does
    (dict(top_p=0.9), [0.3, 0.0, 0.5, 0.2]),
    (dict(top_k=2, top_p=0.55), [0.0, 0.0, 1.0, 0.0]), # of the two that stay, 5/8 alone reaches .55
])
def test_sample_token_draws_by_the_probabilities(how, p):
    torch.manual_seed(5)
    logits = torch.log(torch.tensor([0.3, 0.0, 0.5, 0.2])) + 2.0
    tokens, logp = sample_token(logits.repeat(20000, 1), **how)
    counts = torch.bincount(tokens, minlength=4).tolist()
    for word in range(4):
        assert abs(counts[word] - 20000 * p[word]) <= 5 * math.sqrt(20000 * p[word] * (1 - p[word]))
        assert p[word] > 0 or counts[word] == 0
    assert logp.tolist() == pytest.approx([math.log(p[t]) for t in tokens.tolist()], abs=2e-6)


@pytest.mark.parametrize('u, word', [(0.0, 1), (0.499999, 1), (0.500001, 3), (1 - 2 ** -53, 3)])
def test_words_of_probability_zero_are_never_drawn(monkeypatch, u, word):
    """The smallest and the largest random number that there is, with impossible words first, between and last."""
    monkeypatch.setattr(torch, 'rand', lambda *size, dtype=None, device=None: torch.full(size, u, dtype=dtype))
    tokens, _ = sample_token(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).log())
    assert tokens.tolist() == [word]


class OnApple(torch.Tensor):
    """A tensor as on an Apple GPU: it says mps, and there is no float64."""
    device = property(lambda self: torch.device('mps'))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if (kwargs or {}).get('dtype') is torch.float64:
            raise TypeError('mps has no float64')
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)


def test_apples_gpus_draw_the_same(monkeypatch):
    torch.manual_seed(8)
    logits = torch.randn(5, 40)
    torch.manual_seed(9)
    tokens, logp = sample_token(logits)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, device: self.as_subclass(OnApple)) # from the CPU, and back
    torch.manual_seed(9)
    there = sample_token(logits.as_subclass(OnApple))
    assert [x.device.type for x in there] == ['mps', 'mps']
    assert there[0].tolist() == tokens.tolist() and there[1].tolist() == logp.tolist()


def test_rows_of_a_batch_are_drawn_independently():
    torch.manual_seed(6)
    tokens, _ = sample_token(torch.zeros(2000, 2))
    same = (tokens[:1000] == tokens[1000:]).sum().item()
    assert abs(same - 500) <= 79 # five standard deviations, 5 * sqrt(1000 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities, losses, heads

def test_token_logp_by_hand():
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]]).log() + torch.tensor(4.0)
    # position 0 speaks of token 2: ln .25; position 1 of token 0: ln .1; what position 2 says is not asked
    assert token_logp(logits, torch.tensor([[1, 2, 0]])).tolist() == [pytest.approx([-1.386294, -2.302585], abs=1e-6)]


def test_forwards_loss_by_hand_and_ignored_targets():
    model, idx = three_words(), torch.tensor([[0, 1, 2], [2, 2, 1]])
    logits, loss = model(idx, torch.tensor([[1, 0, -100], [-100, 2, -100]]))
    assert logits.shape == (2, 3, 3)
    assert loss.item() == pytest.approx(1.155245, abs=1e-6) # (ln 4 + ln 2 + ln 4) / 3
    assert model(idx, torch.tensor([[0, 0, 0], [0, 0, -100]]))[1].item() == pytest.approx(0.693147, abs=1e-6) # ln 2


def test_logp_and_entropy_by_hand():
    idx, mask = torch.tensor([[1, 0, 2], [2, 2, 0]]), torch.tensor([[1., 1.], [0., 1.]])
    logp, entropy = three_words().logp_and_entropy(idx, mask, with_entropy=True)
    expected = [[-0.693147, -1.386294], [0.0, -0.693147]] # ln 1/2 for word 0, ln 1/4 for the others, 0 if not counted
    assert logp.flatten().tolist() == pytest.approx(sum(expected, []), abs=1e-6)
    # 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 4 = 1.5 ln 2
    assert entropy.flatten().tolist() == pytest.approx([1.039721, 1.039721, 0.0, 1.039721], abs=1e-6)
    assert three_words().logp_and_entropy(idx, mask)[1] is None


def test_masked_positions_agree_with_the_full_computation_gradients_included():
    model = random_model()
    idx = torch.randint(11, (3, 9))
    mask = torch.tensor([[0., 0., 1., 1., 1., 0., 0., 0.], [0.] * 8, [1., 0., 0., 0., 0., 1., 1., 1.]])
    full = model(idx)[0] # (B, T, V)
    torch.testing.assert_close(model.masked_logits(idx, mask), full[:, :-1][mask > 0], **close)
    expected, logp = token_logp(full, idx) * mask, model.logp(idx, mask)
    torch.testing.assert_close(logp, expected, **close)
    weight = torch.linspace(-1, 2, 24).view(3, 8) # each position with a gradient of its own
    expected_grads = torch.autograd.grad((weight * expected).sum(), model.parameters())
    for grad, expected_grad in zip(torch.autograd.grad((weight * logp).sum(), model.parameters()), expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_nothing_counted_gives_zeros():
    model, idx = random_model(value_head=True), torch.randint(11, (2, 4))
    logp, entropy, values = model.logp_entropy_values(idx, torch.zeros(2, 3), with_entropy=True)
    assert logp.tolist() == entropy.tolist() == values.tolist() == [[0.0] * 3] * 2


def test_values_and_rewards_by_hand():
    model = signs(value_head=True, reward_head=True)
    with torch.no_grad():
        model.value_head.weight.copy_(torch.tensor([[1., 2., 4., 8.]]))
        model.value_head.bias.fill_(0.5)
        model.reward_head.weight.copy_(torch.tensor([[1., 2., 4., 8.]]))
    # the head on words 0, 1, 2: 1+2-4-8 = -9, 1-2+4-8 = -5, 1-2-4+8 = 3
    idx = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0], [2, 2, 2, 1]])
    values = model.values(idx)
    assert values.shape == (3, 4)
    torch.testing.assert_close(values[:2], torch.tensor([[-8.5, -4.5, 3.5, 3.5], [-4.5, 3.5, -8.5, -8.5]]),
                               rtol=0, atol=1e-4) # the layer norm's 0.999995
    rewards = model.rewards(idx, torch.tensor([2, 3, 1])) # last real words: 1, 0, 2
    assert rewards.tolist() == pytest.approx([-5.0, -9.0, 3.0], abs=1e-4)


def test_one_pass_for_policy_and_critic_agrees_with_two():
    model, idx = random_model(value_head=True), torch.randint(11, (3, 6))
    mask = torch.tensor([[0., 1., 1., 0., 0.], [0., 0., 0., 1., 1.], [1., 0., 0., 0., 0.]])
    logp, entropy, values = model.logp_entropy_values(idx, mask, with_entropy=True)
    torch.testing.assert_close(logp, token_logp(model(idx)[0], idx) * mask, **close)
    torch.testing.assert_close(values, model.values(idx)[:, :-1] * mask, **close)
    torch.testing.assert_close(entropy, model.logp_and_entropy(idx, mask, True)[1], **close)


@pytest.mark.parametrize('fill', [10, 0])
def test_padding_with_absurd_words_changes_nothing(fill):
    model = random_model(value_head=True, reward_head=True)
    rows = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 1, 1, 4]]
    idx, lengths = ragged(rows, fill)
    mask = (torch.arange(1, 6) < lengths[:, None]).float()
    logp, values, rewards = model.logp(idx, mask), model.values(idx), model.rewards(idx, lengths)
    for b, row in enumerate(rows):
        one, n = torch.tensor([row]), len(row)
        torch.testing.assert_close(logp[b, :n - 1], token_logp(model(one)[0], one)[0], **close)
        torch.testing.assert_close(values[b, :n], model.values(one)[0], **close)
        torch.testing.assert_close(rewards[b], model.rewards(one, torch.tensor([n]))[0], **close)


def test_a_later_word_never_changes_an_earlier_position():
    model = random_model(value_head=True)
    idx = torch.randint(11, (1, 8))
    other = idx.clone()
    other[0, 5:] = (idx[0, 5:] + 1) % 11
    assert torch.equal(model(idx)[0][0, :5], model(other)[0][0, :5])
    assert not torch.allclose(model(idx)[0][0, 5:], model(other)[0][0, 5:])


@pytest.mark.parametrize('bias', [True, False])
def test_normalised_rewards_survive_the_checkpoint(tmp_path, bias):
    model = signs(reward_head=True, bias=bias)
    with torch.no_grad():
        model.reward_head.weight.copy_(torch.tensor([[1., 2., 4., 8.]]))
    idx, lengths = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.tensor([1, 1, 1])
    model.normalise_rewards(mean=-3.0, std=4.0) # scores -9, -5, 3 before: (s + 3) / 4 = -1.5, -0.5, 1.5
    assert model.rewards(idx, lengths).tolist() == pytest.approx([-1.5, -0.5, 1.5], abs=1e-4)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert torch.equal(loaded.rewards(idx, lengths), model.rewards(idx, lengths))
    assert loaded.config == model.config


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('keep', [True, False])
def test_a_value_head_on_a_reward_model_starts_as_its_score(tmp_path, keep, bias):
    model = random_model(reward_head=True, bias=bias)
    model.normalise_rewards(mean=3.0, std=0.7)
    model.save_pretrained(tmp_path)
    critic = GPT.from_pretrained(tmp_path, value_head=True, **({} if keep else {'reward_head': False}))
    idx, lengths = ragged([[1, 2, 3, 4], [5, 6], [7]])
    at_last = critic.values(idx)[torch.arange(3), lengths - 1]
    torch.testing.assert_close(at_last, model.rewards(idx, lengths), **close)


def test_a_value_head_on_a_language_model_starts_at_zero_and_is_kept(tmp_path):
    random_model().save_pretrained(tmp_path / 'lm')
    model, idx = load_policy(tmp_path / 'lm', value_head=True), torch.randint(11, (2, 5))
    assert model.values(idx).tolist() == [[0.0] * 5] * 2
    with torch.no_grad():
        model.value_head.weight.normal_()
        model.value_head.bias.fill_(2.0)
    model.save_pretrained(tmp_path / 'both')
    for reopened in (GPT.from_pretrained(tmp_path / 'both'), load_policy(tmp_path / 'both', value_head=True)):
        assert torch.equal(reopened.values(idx), model.values(idx))
    assert load_policy(tmp_path / 'both').value_head is None # PPO's critic may have stayed in the folder


@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_checkpointing_changes_no_gradient(monkeypatch, dropout):
    """Every block works twice: its activations are not kept. With dropout the second time draws as the first."""
    calls, forward = [], model_module.Block.forward
    monkeypatch.setattr(model_module.Block, 'forward', lambda self, *a: (calls.append(self), forward(self, *a))[1])
    idx, mask, found = torch.randint(11, (3, 8)), (torch.rand(3, 7) < 0.7).float(), []
    for checkpointing in (False, True):
        model = random_model(dropout=dropout).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        calls.clear()
        model.logp(idx, mask).sum().backward()
        assert len(calls) == len(model.h) * (1 + checkpointing)
        found.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            calls.clear()
            model.logp(idx, mask)
        assert len(calls) == len(model.h)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(g.abs().max().item() for g in found[0]) > 1e-3


def test_dropout():
    model, idx = random_model(dropout=0.0).train(), torch.randint(11, (2, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model = random_model(dropout=0.3).train()
    assert not torch.allclose(model(idx)[0], model(idx)[0])
    model.eval()
    torch.testing.assert_close(model(idx)[0], random_model(dropout=0.0)(idx)[0], rtol=0, atol=0)


def test_a_checkpoints_dropout_is_left_out_unless_asked_for(tmp_path):
    random_model(dropout=0.3).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.dropout == 0.0
    assert GPT.from_pretrained(tmp_path, dropout=0.1).config.dropout == 0.1


@pytest.mark.parametrize('heads', [dict(), dict(reward_head=True), dict(value_head=True)])
def test_a_model_without_biases_comes_back_equal(tmp_path, heads):
    model, idx = random_model(bias=False, **heads), torch.randint(11, (2, 8))
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    names = {k.removeprefix('transformer.') for k in load_file(tmp_path / 'model.safetensors')}
    heads = {'reward_head': {'score.weight'}, 'value_head': {'value_head.weight', 'value_head.bias'}}
    expected = {k for k in formula_tensors() if k != 'score.weight'}
    assert names == expected.union(*(heads[h] for h in heads if getattr(model.config, h))) # the layout, nothing else


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=4, n_embd=64, value_head=True,
                          reward_head=True))
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.005, rel=0.05) # .02 / sqrt(2 * 8)
    assert model.reward_head.weight.std().item() == pytest.approx(0.124, abs=0.05) # 1 / sqrt(65)
    assert model.h[0].attn.c_attn.bias.abs().max().item() == 0 and model.value_head.weight.abs().max().item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# folders that are wrong

def edit_config(folder, **more):
    path = os.path.join(folder, 'config.json')
    config = {**json.load(open(path)), **more}
    with open(path, 'w') as f:
        json.dump({k: v for k, v in config.items() if v is not None}, f)


def edit_tensors(folder, change):
    path = os.path.join(folder, 'model.safetensors')
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncated(folder):
    path = os.path.join(folder, 'model.safetensors')
    with open(path, 'rb+') as f:
        f.truncate(os.path.getsize(path) // 2)


def write(folder, name, content):
    with open(os.path.join(folder, name), 'wb') as f:
        f.write(content)


WRONG = {
    'not JSON': (lambda d: write(d, 'config.json', b'{"model_type": "gpt2",'), 'config.json: not JSON'),
    'binary': (lambda d: write(d, 'config.json', b'\xff\xfe\x00'), 'config.json: not JSON'),
    'a list': (lambda d: write(d, 'config.json', b'[1, 2]'), 'config.json: not a checkpoint'),
    'no config': (lambda d: os.remove(os.path.join(d, 'config.json')), 'config.json: No such file'),
    'another model': (lambda d: edit_config(d, model_type='llama'),
                      "config.json: not a GPT-2 checkpoint (model_type 'llama'"),
    'no n_head': (lambda d: edit_config(d, n_head=None), 'without n_head'),
    'text for a number': (lambda d: edit_config(d, n_layer='2'), 'without n_layer'),
    'text for n_positions': (lambda d: edit_config(d, n_positions='10'), 'n_positions'),
    'relu': (lambda d: edit_config(d, activation_function='relu'), 'config.json: a variant of GPT-2'),
    'another epsilon': (lambda d: edit_config(d, layer_norm_epsilon=0.1), 'config.json: a variant of GPT-2'),
    'unscaled': (lambda d: edit_config(d, scale_attn_weights=False), 'config.json: a variant of GPT-2'),
    'no weights': (lambda d: os.remove(os.path.join(d, 'model.safetensors')), 'model.safetensors: No such file'),
    'truncated': (truncated, 'model.safetensors: not a readable'),
    'an index without files': (lambda d: (write(d, 'model.safetensors.index.json', b'{"weight_map": [1]}'),
                                          os.remove(os.path.join(d, 'model.safetensors'))),
                               'model.safetensors.index.json: wanted `weight_map`'),
    'a shard missing': (lambda d: (as_shards(d, save_file, 'model.safetensors', 'part{}.safetensors'),
                                   os.remove(os.path.join(d, 'part2.safetensors'))),
                        'part2.safetensors: No such file'),
    'a damaged bin': (lambda d: (as_bin(d), write(d, 'pytorch_model.bin', b'PK\x03\x04' * 9)),
                      'pytorch_model.bin: not a readable file'),
    'a bin of something else': (lambda d: (as_bin(d), torch.save({'model': {}}, os.path.join(d, 'pytorch_model.bin'))),
                                'pytorch_model.bin: tensor wte.weight is missing'),
    'a bin without names': (lambda d: (as_bin(d), torch.save([1], os.path.join(d, 'pytorch_model.bin'))),
                            'pytorch_model.bin: not a readable file'),
    'empty': (lambda d: write(d, 'model.safetensors', b''), 'model.safetensors: not a readable'),
    'no safetensors': (lambda d: write(d, 'model.safetensors', b'PK\x03\x04' * 9), 'model.safetensors: not a readable'),
    'a tensor missing': (lambda d: edit_tensors(d, lambda t: t.pop('transformer.h.1.mlp.c_fc.bias')),
                         'model.safetensors: tensor h.1.mlp.c_fc.bias is missing'),
    'another shape': (lambda d: edit_tensors(d, lambda t: t.update({'transformer.wpe.weight': torch.zeros(9, 8)})),
                      'model.safetensors: tensor wpe.weight is (9, 8), config.json says (10, 8)'),
    'another projection': (lambda d: edit_tensors(d, lambda t: t.update({'lm_head.weight': torch.zeros(7, 8)})),
                           'model.safetensors: tensor lm_head.weight'),
}


def one_line(capsys, call):
    """The one line on stderr with which `call` stops the program, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith('error: ') and err.endswith('\n') and err.count('\n') == 1, err
    return err


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_folder_is_told_in_one_line(tmp_path, capsys, case):
    folder = formula_folder(tmp_path / 'model')
    damage, expected = WRONG[case]
    damage(folder)
    line = one_line(capsys, lambda: GPT.from_pretrained(folder))
    assert expected in line and folder in line


def test_a_missing_folder_is_told_in_one_line(tmp_path, capsys):
    line = one_line(capsys, lambda: load_policy(str(tmp_path / 'nowhere')))
    assert str(tmp_path / 'nowhere') in line and 'No such file or directory' in line


def test_the_wrong_kind_of_model_is_told_in_one_line(tmp_path, capsys):
    policy, reward = formula_folder(tmp_path / 'a'), formula_folder(tmp_path / 'b', reward=True)
    line = one_line(capsys, lambda: load_policy(reward, option='init_from'))
    assert line == f"error: --init_from={reward}: is a reward model, wanted a language model\n"
    line = one_line(capsys, lambda: load_reward_model(policy))
    assert f"--reward_model={policy}: is a language model, wanted a reward model" in line


def test_heads_must_divide_the_width(capsys):
    line = one_line(capsys, lambda: GPT(GPTConfig(n_embd=8, n_head=3, n_layer=1, vocab_size=5, block_size=4)))
    assert 'n_embd=8' in line and 'n_head=3' in line


# ---------------------------------------------------------------------------------------------------------------------
# prompts that are shared by their answers

PROMPTED = [([1, 2, 3], [[4, 5], [6], [4, 9, 10, 0]], [1, 0, 2]), ([7], [[8], [9, 10], [8]], [0, 1, 0])]


@pytest.mark.parametrize('fill', [0, 10])
def test_answers_in_one_row_equal_the_same_answers_alone(fill):
    """Log-probabilities, scores and the gradients of both, whatever the padding holds."""
    model = random_model(vocab_size=11, reward_head=True)
    batch = collate_answers(PROMPTED)
    assert batch.idx[1, 5:].tolist() == [0] * 5 # padding
    batch.idx[1, 5:] = fill
    batch.positions[1, 5:] = fill
    logp, scores = model.answer_logp(batch), model.answer_rewards(batch)
    weights = torch.tensor([1., -2., 0.5, 3., -1., 2.])
    ((logp + 2 * scores) * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    alone_logp, alone_scores = [], []
    for prompt, answers, _ in PROMPTED:
        for answer in answers:
            idx = torch.tensor([prompt + answer])
            alone_logp.append(token_logp(model(idx)[0], idx)[0, len(prompt) - 1:].sum())
            alone_scores.append(model.rewards(idx, torch.tensor([idx.size(1)]))[0])
    alone_logp, alone_scores = torch.stack(alone_logp), torch.stack(alone_scores)
    ((alone_logp + 2 * alone_scores) * weights).sum().backward()
    torch.testing.assert_close(logp, alone_logp, **close)
    torch.testing.assert_close(scores, alone_scores, **close)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-4)


def test_a_row_of_answers_may_be_longer_than_the_context():
    """Only prompt and one answer have to fit: positions start anew with every answer."""
    model = random_model(block_size=6)
    batch = collate_answers([([1, 2, 3], [[4, 5, 6], [7, 8, 9], [1, 1, 1]], [0, 1, 2])])
    assert batch.idx.size(1) == 12 and model.answer_logp(batch).shape == (3,)


def test_repeated_prompts_share_one_pass_and_answer_as_alone(monkeypatch):
    model, passes, hidden = random_model(), [], GPT.hidden
    prompts = [[1, 2, 3], [4], [1, 2, 3], [1, 2, 3], [4], [5, 6, 7, 8]]
    alone = [model.generate([p], 6, temperature=0, eos=9)[0] for p in prompts]
    monkeypatch.setattr(GPT, 'hidden', lambda self, idx, *a, **k: (passes.append(idx.shape), hidden(self, idx, *a, **k))[1])
    assert model.generate(prompts, 6, temperature=0, eos=9) == alone
    assert passes == [(3, 4)] # three distinct prompts, the longest of four tokens


def test_answers_to_one_prompt_are_drawn_independently():
    model = random_model()
    torch.manual_seed(0)
    answers, logps = model.generate_with_logp([[1, 2, 3]] * 20 + [[4]] * 20, 6, eos=9)
    assert len({tuple(a) for a in answers[:20]}) > 10 and len({tuple(a) for a in answers[20:]}) > 10
    for prompt, answer, logp in zip([[1, 2, 3]] * 20 + [[4]] * 20, answers, logps, strict=True):
        idx = torch.tensor([prompt + answer])
        expected = token_logp(model(idx)[0], idx)[0, len(prompt) - 1:]
        torch.testing.assert_close(torch.tensor(logp), expected, **close)
