r"""Encode text to token ids and decode them; hold the one chat template.

Tokenizers are tiktoken encodings: GPT-2's, the 256 bytes, or a small byte-pair encoding (data/bpe.py trains it) in
tiktoken's own file format. The template of one turn, and how further turns follow it:

    ### Human: Hello.\n### Assistant: Hi!<|endoftext|>\n### Human: Bye.\n### Assistant: See you.<|endoftext|>
    `---------- prompt ----------´`---- response ----´`------------ prompt -----------´`----- response -----´

Prompt and response are encoded apart, so that the prompt's ids are always a prefix of the whole. Only the response's
end is the real <|endoftext|>; the same characters typed by a user are ordinary text.
"""

import base64
import json
import math
from functools import cache
from pathlib import Path

import tiktoken

from common.options import fail
from common.records import read_json, read_lines, write_atomic
from common.weights import HUB_NAMES, check_folder, checkpoint_file, on_hub

EOS = '<|endoftext|>'
# how GPT-2 splits text into words before any merge: a word takes the space before it, merges never cross words
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BYTES = {bytes([i]): i for i in range(256)} # where every byte-pair encoding starts
PAD = b'\xff' # no UTF-8 text holds this byte, so other tools can pad with its token

class Tokenizer:
    """Wrap a tiktoken.Encoding and its end-of-text id; name: "gpt2", "bytes" or "tiktoken" (one of our own)."""

    def __init__(self, name, ranks=None):
        self.name, self.ranks = name, BYTES if name == 'bytes' else ranks
        if name == 'gpt2':
            try:
                self.encoding = tiktoken.get_encoding('gpt2')
            except Exception as error: # no network, no cache, a damaged cache: tiktoken has no one exception for it
                fail(f'tokenizer gpt2: cannot load it ({type(error).__name__}); without a network set '
                     "TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's two GPT-2 files")
        else: # <|endoftext|> is the last id
            n = len(self.ranks)
            self.encoding = tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=self.ranks,
                                              special_tokens={EOS: n}, explicit_n_vocab=n + 1)
        self.n_vocab, self.eos = self.encoding.n_vocab, self.encoding.eot_token
        self.pad = self.encoding.encode_single_token(PAD)

    def encode(self, text):
        """Return the ids of ordinary text: nothing in `text` becomes the end-of-text id."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        """Return the bytes behind `ids`, without end of text; in a stream the last character may be incomplete."""
        return self.encoding.decode_bytes([i for i in ids if i < self.eos]) # above it are tokens of the model alone

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def save(self, folder, padding_side='left'):
        """Write our file and two for transformers; it pads left to generate, right to score: positions count pads."""
        folder = Path(folder)
        write_atomic(str(folder / 'tokenizer.json'), tokenizer_json(self))
        write_atomic(str(folder / 'tokenizer_config.json'), json.dumps(dict(
            tokenizer_class='PreTrainedTokenizerFast', # takes tokenizer.json as it is
            model_input_names=['input_ids', 'attention_mask'], clean_up_tokenization_spaces=False, # for 4.x
            eos_token=EOS, pad_token=PAD_NAME, padding_side=padding_side, chat_template=CHAT_TEMPLATE), indent=2))
        if self.name == 'tiktoken':
            save_bpe(self.ranks, folder / 'tokenizer.tiktoken')
            (folder / 'tokenizer_name').unlink(missing_ok=True)
        else:
            write_atomic(str(folder / 'tokenizer_name'), self.name + '\n')
            (folder / 'tokenizer.tiktoken').unlink(missing_ok=True)

def load_tokenizer(name, option='tokenizer'):
    """Load a tokenizer; name: a checkpoint with ours or GPT-2's, for --tokenizer also "bytes" or a FILE.tiktoken."""
    name = str(name)
    if option != 'tokenizer':
        check_folder(name, option)
    if not Path(name).is_dir():
        if name in HUB_NAMES:
            return Tokenizer('gpt2')
        if option == 'tokenizer' and name == 'bytes':
            return Tokenizer('bytes')
        if option == 'tokenizer' and name.endswith('.tiktoken'):
            return Tokenizer('tiktoken', load_bpe(name))
        if not on_hub(name) and option == 'tokenizer':
            fail(f'tokenizer: wanted gpt2, bytes, a .tiktoken file or a checkpoint folder, got {name!r}, which is '
                 'neither a folder here nor a model on the hub (OWNER/NAME, with no folder OWNER here)')
        checkpoint_file(name, 'config.json', named=f'--{option}=' * (option != 'tokenizer')) # or it fails here
    config = checkpoint_file(name, 'config.json', absent_ok=True)
    size = read_json(config).get('vocab_size') if config else None
    tok = stored_tokenizer(name, option, size)
    if type(size) is int and tok.n_vocab > size:
        fail(f'{config}: vocab_size is {size}, the tokenizer beside it has {tok.n_vocab} tokens; wanted one that fits')
    return tok

def stored_tokenizer(name, option, size):
    """Load the tokenizer of a checkpoint: our own file, or GPT-2's where the vocabulary is GPT-2's."""
    if path := checkpoint_file(name, 'tokenizer.tiktoken', absent_ok=True):
        return Tokenizer('tiktoken', load_bpe(path))
    if path := checkpoint_file(name, 'tokenizer_name', absent_ok=True):
        stored = Path(path).read_text(encoding='utf-8', errors='replace').strip()
        if stored not in ('gpt2', 'bytes'):
            fail(f'{path}: wanted gpt2 or bytes, got {stored[:40]!r}')
        return Tokenizer(stored)
    if not has_gpt2_vocabulary(name, size):
        where = name if option == 'tokenizer' else f'--{option}={name}'
        fail(f'{where}: wanted a checkpoint with tokenizer.tiktoken or tokenizer_name, or with the vocabulary of GPT-2')
    return Tokenizer('gpt2')

def has_gpt2_vocabulary(name, size):
    """Tell whether somebody else's checkpoint has GPT-2's tokens.

    Many vocabularies have its size. So one of its oddest tokens decides, and the size where no vocabulary is stored.
    """
    try:
        for filename in ('vocab.json', 'tokenizer.json'):
            if path := checkpoint_file(name, filename, absent_ok=True):
                vocab = json.loads(Path(path).read_text(encoding='utf-8'))
                vocab = vocab if filename == 'vocab.json' else vocab['model']['vocab']
                return vocab.get('\u0120SolidGoldMagikarp') == 43453 and vocab.get(EOS) == 50256
        return 50257 <= size <= 50304 # the next multiple of 64: padding or extras
    except (OSError, ValueError, KeyError, AttributeError, TypeError): # not a vocabulary
        return False

def merge(parts, ranks, until=1):
    """Encode one word in place: join the neighbours of lowest rank until no two make a token, or `until` are left."""
    while len(parts) > until:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]

def save_bpe(ranks, path):
    """Write tiktoken's file format: one line a token, its bytes in base64, a space, its rank."""
    tokens = sorted(ranks, key=ranks.get)
    write_atomic(str(path), ''.join(f'{base64.b64encode(token).decode()} {ranks[token]}\n' for token in tokens))

def load_bpe(path):
    """Read the ranks {bytes: id} of a .tiktoken file; a damaged one ends the program with its file and line."""
    ranks = {}
    for n, line in read_lines(path):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except ValueError: # binascii.Error is one
            fail(f'{path}:{n}: wanted a token in base64, a space and its rank')
        if rank != len(ranks) or token in ranks or not token:
            fail(f'{path}:{n}: wanted a new token of rank {len(ranks)}, got {token!r} of rank {rank}')
        ranks[token] = rank
    if not BYTES.keys() <= ranks.keys():
        fail(f'{path}: wanted all 256 single bytes among its {len(ranks)} tokens')
    return ranks

# ---- the chat template ------------------------------------------------------------------------------------------

SPEAKER = {'user': '### Human: ', 'system': '### System: '}

def render(tok, messages, ended=True):
    """Encode messages to (ids, mask), both (T,); 1 = an answer or its EOS, which the last one lacks if not ended."""
    ids, mask, context = [], [], '' # context: the text since the last answer, encoded in one piece
    for n, m in enumerate(messages, 1):
        if ids or context:
            context += '\n'
        if m['role'] != 'assistant':
            context += SPEAKER[m['role']] + m['content']
            continue
        before = tok.encode(context + '### Assistant:')
        answer = [] if m['content'] is None else response_ids(tok, m['content'], ended or n < len(messages)) # to come
        ids += before + answer
        mask += [0] * len(before) + [1] * len(answer)
        context = ''
    return ids, mask

def as_messages(prompt):
    """Return a record's prompt as messages; a text is one user's turn."""
    return [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt

def prompt_ids(tok, prompt):
    """Encode a prompt (a user's turn, or messages that end in one) to ids (P,), up to "### Assistant:"."""
    return render(tok, as_messages(prompt) + [{'role': 'assistant', 'content': None}])[0]

def response_ids(tok, response, ended=True):
    """Encode an answer's text to ids (R,): a space, the text, and, if it ended, the real end-of-text id."""
    return tok.encode(' ' + response) + [tok.eos] * ended

def user_ids(tok, text):
    """Encode a user's turn after an answer to ids, up to "### Assistant:"."""
    return tok.encode(f"\n{SPEAKER['user']}{text}\n### Assistant:")

def dialogue(tok, record):
    """Encode a demonstration to (ids, mask), both (T,), mask 1 = learnt.

    Learnt are the `response`, or every assistant turn of `messages`, each with its EOS; the last may not have `ended`.
    """
    if 'messages' in record:
        return render(tok, record['messages'], record.get('ended', True))
    prompt = prompt_ids(tok, record['prompt'])
    response = response_ids(tok, record['response'], record.get('ended', True))
    return prompt + response, [0] * len(prompt) + [1] * len(response)

# ---- the same for transformers ----------------------------------------------------------------------------------

# It encodes a dialogue in one piece, which is the same: GPT-2's words never cross a response's beginning. But there a
# typed <|endoftext|> would be the token. So the template parts every '<|', and the normaliser joins it once tokens are
# found. Outside of the template transformers' split_special_tokens=True keeps it text.
PARTED = '<\ue000|'
PAD_NAME = '<|pad|>'
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\\n' }}"
    "{% set text = m.content | replace('<|', '" + PARTED + "') %}"
    "{{ '### Assistant: ' + text + eos_token if m.role == 'assistant' else " + repr(SPEAKER) + "[m.role] + text }}"
    "{% endfor %}{{ '\\n### Assistant:' if add_generation_prompt }}")
UNPRINTABLE = {b: 256 + n for n, b in enumerate([*range(33), *range(127, 161), 173])}

def printable(token):
    """Write bytes as GPT-2's files do, a character each: those that do not print are U+0100 and on, in order."""
    return token.decode('latin-1').translate(UNPRINTABLE)

@cache # GPT-2's takes half a second
def tokenizer_json(tok):
    """Return the text of tokenizer.json, which gives the same ids in transformers."""
    ranks = {tok.encoding.decode_single_token_bytes(i): i for i in range(tok.eos)}
    merges = []
    for token in ranks: # `merge` joins the same two parts last, wherever it makes the token
        parts = [bytes([b]) for b in token]
        merge(parts, ranks, until=2)
        if len(parts) == 2 and PAD not in token:
            merges.append(' '.join(map(printable, parts)))
    special = {PAD_NAME: tok.pad, EOS: tok.eos}
    vocab = {printable(token): i for token, i in ranks.items() if token != PAD} | special
    byte_level = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True) # GPT-2's split
    return json.dumps(dict(
        version='1.0', truncation=None, padding=None,
        added_tokens=[dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False,
                           special=True) for name, i in special.items()],
        normalizer=dict(type='Replace', pattern=dict(String=PARTED), content='<|'),
        pre_tokenizer=byte_level, post_processor=None, decoder=byte_level,
        model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='',
                   fuse_unk=False, byte_fallback=False, ignore_merges=True, # a word that is a token is that token
                   vocab=vocab, merges=merges)), ensure_ascii=False)
