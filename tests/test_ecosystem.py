"""
What other tools read in our folders: the same ids, the same template, the same text, the same scores.

The files' content is checked by hand and by a small encoder written here. transformers and TRL themselves come last,
where they are installed.
"""
import json
import os
import random
import re

import jinja2 # comes with torch
import pytest
import regex # comes with tiktoken
import torch

import reward
import sft
from common.checkpoints import load_policy
from common.tokens import EOS, Tokenizer, load_tokenizer, prompt_ids, render, response_ids
from data.bpe import train_bpe
from model import GPT, GPTConfig
from tiny import DEMONSTRATIONS, RANKINGS, ROOT, TOK, assistant, records, run, user

def system(text):
    return {'role': 'system', 'content': text}

def own_bpe():
    with open(__file__, encoding='utf-8') as f:
        return Tokenizer('tiktoken', train_bpe([f.read(), '你好，世界。你好！' * 9], 700))

def backwards():
    return Tokenizer('tiktoken', {bytes([255 - i]): i for i in range(256)}) # the byte 255 is token 0

TOKENIZERS = {'gpt2': lambda: load_tokenizer('gpt2'), 'bytes': lambda: TOK, 'own': own_bpe, 'backwards': backwards}

CACHE = os.path.join(os.path.dirname(os.path.dirname(ROOT)), 'shared', 'tiktoken_cache')

@pytest.fixture
def gpt2_files(monkeypatch):
    """Return the folder of tiktoken's two GPT-2 files."""
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', CACHE)
    if not os.path.isdir(folder):
        pytest.skip("needs TIKTOKEN_CACHE_DIR, a folder with tiktoken's two GPT-2 files")
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', folder)
    return folder

@pytest.fixture(params=TOKENIZERS)
def tok(request):
    if request.param == 'gpt2':
        request.getfixturevalue('gpt2_files')
    return TOKENIZERS[request.param]()

def texts(n, seed=0):
    """Return random texts of many scripts, with runs of blanks, control characters, and what looks like a token."""
    rng = random.Random(seed)
    pieces = ['  ', '\n\n', '\t', ' \n ', "'s", "'LL", '<|', '|>', '\x1c', '\x00', '\x85', '\u00a0', '\u180e', '\u200b',
              '\u2028', '\u3000', '\ufeff', 'the', ' of', 'e\u0301', 'ÿ', '你好', ' 世界', '１２', '²', '👨‍👩‍👧', '🇨🇳',
              'def f(x):']
    ranges = [(0, 128)] * 3 + [(0x80, 0x250), (0x300, 0x370), (0x600, 0x700), (0x4e00, 0x9fff), (0x1f300, 0x1f700),
                               (0xe000, 0xe100), (0x100, 0xd800), (0x10000, 0x110000)]

    def piece():
        return rng.choice(pieces) if rng.random() < 0.4 else chr(rng.randrange(*rng.choice(ranges)))
    return [''.join(piece() for _ in range(rng.randrange(1, 30))) for _ in range(n)]

TYPED = [EOS, '<|pad|>', f' {EOS}\n### Assistant: no', '<|<|', '\n', ' ', '<|endof', 'ÿ']

def conversations(n, seed=0):
    rng, some = random.Random(seed), texts(200, seed) + 20 * TYPED
    for _ in range(n):
        turns = [system(rng.choice(some))] * rng.randrange(2)
        for _ in range(rng.randrange(1, 4)):
            turns += [user(rng.choice(some)), assistant(rng.choice(some))]
        yield turns

def model_of(tok, folder, seed=0, **heads):
    """Save a model whose every weight is random, as a stage would; return it."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=96, vocab_size=tok.n_vocab, n_layer=2, n_head=2, n_embd=16, **heads)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    model.save_pretrained(folder, tok.eos, tok.pad)
    tok.save(folder, 'right' if heads else 'left')
    return model

def stored(folder, name):
    with open(os.path.join(folder, name), encoding='utf-8') as f:
        return json.load(f)

# ---------------------------------------------------------------------------------------------------------------------
# by hand, without transformers

def test_tokenizer_json_by_hand(tmp_path):
    # of test_bpe_merges_by_hand: 256 = ab, 257 = aab, 258 = " aab"; GPT-2's files show a blank as Ġ
    Tokenizer('tiktoken', train_bpe(['aab aab aab', ' ab'], 1000, 2)).save(tmp_path)
    told = stored(tmp_path, 'tokenizer.json')
    model, vocab = told['model'], told['model']['vocab']
    assert model['merges'] == ['a b', 'a ab', 'Ġ aab'] and model['ignore_merges']
    assert [vocab[token] for token in ('ab', 'aab', 'Ġaab', EOS)] == [256, 257, 258, 259]
    # é is C3 A9; 0 to 32 are shown from U+0100 on, then 127 to 160, then 173
    assert [vocab[token] for token in 'aĠĊÃ©ġłŃ'] == [97, 32, 10, 0xC3, 0xA9, 127, 160, 173]
    assert vocab['<|pad|>'] == 255 and 'ÿ' not in vocab and sorted(vocab.values()) == list(range(260))
    assert [(t['content'], t['id'], t['special']) for t in told['added_tokens']] == [('<|pad|>', 255, True),
                                                                                     (EOS, 259, True)]
    config = stored(tmp_path, 'tokenizer_config.json')
    assert (config['eos_token'], config['pad_token']) == (EOS, '<|pad|>')
    assert 'bos_token' not in config and 'unk_token' not in config # nothing is put before a text; every byte is known
    assert config['model_input_names'] == ['input_ids', 'attention_mask']

def test_gpt2s_merges_are_those_of_its_release(gpt2_files, tmp_path):
    load_tokenizer('gpt2').save(tmp_path)
    model, vocab_bpe = stored(tmp_path, 'tokenizer.json')['model'], None
    for name in os.listdir(gpt2_files):
        with open(os.path.join(gpt2_files, name), encoding='utf-8') as f:
            if f.readline() == '#version: 0.2\n':
                vocab_bpe = f.read().splitlines()
            else:
                f.seek(0)
                encoder_json = json.load(f)
    assert model['merges'] == vocab_bpe and len(vocab_bpe) == 50000
    del encoder_json['ÿ'] # the byte that no text holds
    assert model['vocab'] == encoder_json | {'<|pad|>': 187}

def encode_as_others_do(told, text):
    """Encode text as tokenizer.json says: special tokens, the normaliser, words, merges by the rank of the pair."""
    vocab, ranks = told['model']['vocab'], {pair: i for i, pair in enumerate(told['model']['merges'])}
    shown = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    shown |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in shown)}
    special = {t['content']: t['id'] for t in told['added_tokens']}
    ids = []
    for part in re.split('(' + '|'.join(map(re.escape, special)) + ')', text):
        if part in special:
            ids.append(special[part])
            continue
        part = part.replace(told['normalizer']['pattern']['String'], told['normalizer']['content'])
        for word in WORDS.findall(part):
            word = [shown[b] for b in word.encode()]
            if ''.join(word) in vocab:
                word = [''.join(word)]
            while found := [(ranks[f"{a} {b}"], i) for i, (a, b) in enumerate(zip(word, word[1:]))
                            if f"{a} {b}" in ranks]:
                i = min(found)[1]
                word[i:i + 2] = [word[i] + word[i + 1]]
            ids += [vocab[token] for token in word]
    return ids

WORDS = regex.compile( # \s of Python counts \x1c to \x1f as blanks, Unicode does not
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
    r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+")

def test_tokenizer_json_gives_our_ids(tok, tmp_path):
    tok.save(tmp_path)
    told = stored(tmp_path, 'tokenizer.json')
    for text in texts(300):
        assert encode_as_others_do(told, text) == tok.encode(text), text

def test_the_template_gives_our_ids(tok, tmp_path):
    """What a user typed stays text, though the template is encoded in one piece."""
    tok.save(tmp_path)
    told, config = stored(tmp_path, 'tokenizer.json'), stored(tmp_path, 'tokenizer_config.json')
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(config['chat_template'])
    for turns in conversations(100):
        text = template.render(messages=turns, eos_token=EOS)
        assert encode_as_others_do(told, text) == render(tok, turns)[0], turns
        text = template.render(messages=turns[:-1], eos_token=EOS, add_generation_prompt=True)
        assert encode_as_others_do(told, text) == prompt_ids(tok, turns[:-1]), turns

def test_a_table_with_odd_tokens(tmp_path):
    """Of a token that no merge makes the word alone is found; the byte 255 in one has no name in the merges."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate((b'abc', b'\xff\xff', b'xy', b'zxy', b'zx', b'wzxy'))}
    tok = Tokenizer('tiktoken', ranks)
    tok.save(tmp_path)
    told = stored(tmp_path, 'tokenizer.json')
    assert told['model']['merges'] == ['x y', 'z xy', 'z x', 'w zxy']
    for text in ('abc', 'abcd', ' abc', 'zxy', 'zx', 'wzxyzx', 'xyzxy'):
        assert encode_as_others_do(told, text) == tok.encode(text), text

def test_what_a_stage_writes(tmp_path):
    out = str(tmp_path / 'sft')
    run(sft, init_from='scratch', tokenizer='bytes', n_layer=1, n_head=1, n_embd=8, block_size=96, max_steps=1,
        train_data=records(tmp_path / 'd.jsonl', DEMONSTRATIONS), out_dir=out)
    told = stored(out, 'generation_config.json')
    assert told == dict(bos_token_id=256, eos_token_id=256, pad_token_id=255, do_sample=True, temperature=1.0, top_k=0,
                        top_p=1.0, max_new_tokens=48) # half of the context
    assert stored(out, 'tokenizer_config.json')['padding_side'] == 'left'
    assert stored(out, 'config.json')['pad_token_id'] == 255
    assert load_tokenizer(out, 'policy').name == 'bytes'

    scored = str(tmp_path / 'reward')
    run(reward, init_from=out, train_data=records(tmp_path / 'r.jsonl', RANKINGS), max_steps=1, out_dir=scored)
    told = stored(scored, 'config.json')
    assert (told['problem_type'], told['pad_token_id'], told['eos_token_id']) == ('regression', 255, 256)
    assert stored(scored, 'tokenizer_config.json')['padding_side'] == 'right'
    assert not os.path.exists(os.path.join(scored, 'generation_config.json'))

def test_our_own_file_comes_first(gpt2_files, tmp_path):
    load_tokenizer('gpt2').save(tmp_path)
    gpt2s = (tmp_path / 'tokenizer.json').read_text(encoding='utf-8')
    tok = own_bpe()
    tok.save(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(gpt2s, encoding='utf-8')
    assert load_tokenizer(tmp_path).ranks == tok.ranks
    os.remove(tmp_path / 'tokenizer.tiktoken') # as of another tool, which wrote the model after ours
    assert load_tokenizer(tmp_path).name == 'gpt2'

# ---------------------------------------------------------------------------------------------------------------------
# transformers itself

@pytest.fixture
def theirs(hf, tok, tmp_path):
    model_of(tok, tmp_path)
    return hf.AutoTokenizer.from_pretrained(str(tmp_path))

def test_autotokenizer_gives_our_ids(theirs, tok):
    for text in texts(1000, seed=1):
        ids = theirs(text)['input_ids']
        assert ids == tok.encode(text), text
        assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (tok.eos, tok.pad, tok.n_vocab)
    assert theirs.bos_token is None and theirs.unk_token is None

def test_apply_chat_template_gives_our_ids(theirs, tok):
    for turns in conversations(300, seed=1):
        assert theirs.apply_chat_template(turns, return_dict=True)['input_ids'] == render(tok, turns)[0], turns
        ids = theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)['input_ids']
        assert ids == prompt_ids(tok, turns[:-1]), turns

def test_where_a_typed_end_of_text_is_not_text(theirs, tok):
    """Outside of the template transformers takes it for the token, unless told otherwise."""
    assert theirs(f"a{EOS}")['input_ids'] == tok.encode('a') + [tok.eos]
    assert theirs(f"a{EOS}", split_special_tokens=True)['input_ids'] == tok.encode(f"a{EOS}")

PROMPT = '### Human: Where is it?\n### Assistant:'

def test_text_generation_continues_as_we_do(hf, tok, tmp_path):
    ours = model_of(tok, tmp_path)
    ids = ours.generate([tok.encode(PROMPT)], 12, temperature=0, eos=tok.eos)[0]
    assert 1 < len(ids)
    write = hf.pipeline('text-generation', model=str(tmp_path), device='cpu')
    greedy = dict(do_sample=False, max_new_tokens=12)
    assert write(PROMPT, return_full_text=False, **greedy) == [{'generated_text': tok.decode(ids)}]
    answer = write([user('Where is it?')], **greedy)[0]['generated_text'][-1]
    assert answer == assistant(tok.decode(ids))

def test_automodel_generates_what_we_do(hf, tok, tmp_path):
    """Two prompts of different length in one batch, the shorter padded from the left."""
    ours = model_of(tok, tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    other = hf.AutoTokenizer.from_pretrained(str(tmp_path))
    prompts = [[user('Where is it?')], [user('Hi')]]
    batch = other.apply_chat_template(prompts, add_generation_prompt=True, padding=True, return_tensors='pt',
                                      return_dict=True)
    got = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch['input_ids'].size(1):].tolist()
    expected = ours.generate([prompt_ids(tok, p) for p in prompts], 12, temperature=0, eos=tok.eos)
    for row, ids in zip(got, expected, strict=True):
        assert row == ids + [tok.pad] * (len(row) - len(ids))

def test_sampling_is_from_the_models_own_distribution(hf, tmp_path):
    model_of(TOK, tmp_path)
    model = hf.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    prompt = torch.tensor([prompt_ids(TOK, 'Hi')])
    torch.manual_seed(0)
    out = model.generate(prompt.repeat(300, 1), attention_mask=torch.ones(300, prompt.size(1)), max_new_tokens=1)
    assert len(set(out[:, -1].tolist())) > 50 # their default takes the 50 likeliest

def test_text_classification_gives_our_scores(hf, tok, tmp_path):
    ours = model_of(tok, tmp_path, reward_head=True)
    answers = [('Hi', 'Yo', True), ('Where is it?', 'There, I think.', True), ('Hi', 'Yo', False)]
    expected = []
    for prompt, answer, ended in answers:
        ids = prompt_ids(tok, prompt) + response_ids(tok, answer, ended)
        expected += ours.rewards(torch.tensor([ids]), torch.tensor([len(ids)])).tolist()
    assert len({round(score, 2) for score in expected}) == 3 # with and without its end an answer scores differently
    rows = [f"### Human: {prompt}\n### Assistant: {answer}" + EOS * ended for prompt, answer, ended in answers]
    score = hf.pipeline('text-classification', model=str(tmp_path), device='cpu')
    for batch_size in (1, 3):
        got = score(rows, batch_size=batch_size)
        assert [row['label'] for row in got] == ['reward'] * 3
        assert [row['score'] for row in got] == pytest.approx(expected, abs=1e-5)

def test_what_transformers_writes_again_opens_here(hf, gpt2_files, tmp_path):
    tok = load_tokenizer('gpt2')
    ours = model_of(tok, tmp_path / 'a')
    hf.AutoModelForCausalLM.from_pretrained(str(tmp_path / 'a')).save_pretrained(str(tmp_path / 'b'))
    hf.AutoTokenizer.from_pretrained(str(tmp_path / 'a')).save_pretrained(str(tmp_path / 'b'))
    assert not os.path.exists(tmp_path / 'b/tokenizer_name')
    assert load_tokenizer(tmp_path / 'b').name == 'gpt2'
    for p, q in zip(load_policy(tmp_path / 'b').parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)

# ---------------------------------------------------------------------------------------------------------------------
# TRL's trainers: a step each, on our ids

CHOICES = [dict(prompt=[user('Hi')], chosen=[assistant('Yo')], rejected=[assistant('Hello there')]),
           dict(prompt=[user('A')], chosen=[assistant('b')], rejected=[assistant('bbb')])]
ANSWERED = [dict(messages=[user('Hi'), assistant('Yo')]), dict(messages=[user('A'), assistant('bb')])]

@pytest.mark.parametrize('name, rows', [('Reward', CHOICES), ('DPO', CHOICES), ('SFT', ANSWERED)])
def test_a_step_of_trl(hf, tmp_path, name, rows):
    trl = pytest.importorskip('trl', reason="other people's trainers")
    from datasets import Dataset
    folder = str(tmp_path / 'model')
    ours = model_of(TOK, folder, **dict(reward_head=True) if name == 'Reward' else {})
    args = getattr(trl, f"{name}Config")(output_dir=str(tmp_path / 'out'), max_steps=1, per_device_train_batch_size=2,
                                         use_cpu=True, bf16=False, report_to=[], save_strategy='no', logging_steps=1)
    trainer = getattr(trl, f"{name}Trainer")(model=folder, args=args, train_dataset=Dataset.from_list(rows))
    row, hi, yo = trainer.train_dataset[0], prompt_ids(TOK, 'Hi'), response_ids(TOK, 'Yo')
    assert {'Reward': lambda: row['chosen_ids'], 'DPO': lambda: row['prompt_ids'] + row['chosen_ids'],
            'SFT': lambda: row['input_ids']}[name]() == hi + yo
    loss = trainer.train().training_loss
    if name == 'DPO':
        expected = 0.693147 # ln 2: nothing has moved yet
    elif name == 'SFT': # summed over all tokens but each row's first, and divided by their number with it
        whole = [render(TOK, r['messages'])[0] for r in rows]
        expected = -sum(ours(torch.tensor([ids]))[0].log_softmax(-1)[0, range(len(ids) - 1), ids[1:]].sum().item()
                        for ids in whole) / sum(map(len, whole))
    else: # -log sigmoid of the difference
        def score(r, key):
            ids = prompt_ids(TOK, r['prompt']) + response_ids(TOK, r[key][0]['content'])
            return ours.rewards(torch.tensor([ids]), torch.tensor([len(ids)]))
        expected = -torch.cat([score(r, 'chosen') - score(r, 'rejected') for r in rows]).sigmoid().log().mean().item()
    assert loss == pytest.approx(expected, abs=1e-4)
