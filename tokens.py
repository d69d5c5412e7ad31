r"""
Text in, token ids out: the tokenizers, the one chat template, the records, and batches of like length.

Tokenizers are tiktoken encodings: GPT-2's, the 256 bytes, or a small byte-pair encoding trained here (`train_bpe`) and
stored in tiktoken's own file format. The template of one turn, and how further turns follow it:

    ### Human: Hello.\n### Assistant: Hi!<|endoftext|>\n### Human: Bye.\n### Assistant: See you.<|endoftext|>
    `---------- prompt ----------´`---- response ----´`------------ prompt -----------´`----- response -----´

Prompt and response are encoded apart, so that the prompt's ids are always a prefix of the whole. Only the response's
end is the real <|endoftext|>; the same characters typed by a user are ordinary text. Masks come from lengths, never
from token ids. Rows are right-padded. Bad input ends the program with one line, "FILE:LINE: what was wanted".

    python tokens.py --peek FILE [--tokenizer=gpt2] [--rows=3]     # show rows as the models get them, masks in colour
"""
import base64
import binascii
import gzip
import json
import math
import os
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

# before torch: it sets how torch's threads wait
from common import HUB_NAMES, checkpoint_file, fail, launch, note, on_hub, require, split, write_atomic

import numpy as np
import regex # comes with tiktoken
import tiktoken
import torch

EOS = '<|endoftext|>'
# how GPT-2 splits text into words before any merge: a word takes the space before it, merges never cross words
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BYTES = {bytes([i]): i for i in range(256)} # where every byte-pair encoding starts

# -----------------------------------------------------------------------------
# tokenizers


class Tokenizer:
    """A tiktoken.Encoding with an end-of-text id. `name` is "gpt2", "bytes" or "tiktoken" (an encoding of our own)."""

    def __init__(self, name, ranks=None):
        self.name, self.ranks = name, ranks
        if name == 'gpt2':
            self.encoding = tiktoken.get_encoding('gpt2')
        else: # <|endoftext|> is the last id
            self.encoding = tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                                              special_tokens={EOS: len(ranks)}, explicit_n_vocab=len(ranks) + 1)
        self.n_vocab = self.encoding.n_vocab
        self.eos = self.encoding.eot_token

    def encode(self, text):
        """Ids of ordinary text: nothing that `text` contains becomes the end-of-text id."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        """
        The bytes behind `ids`; the last character may be incomplete while one is streaming. The end-of-text id is left
        out, and so are the ids above it, which a model with more words than its tokenizer may come up with.
        """
        return self.encoding.decode_bytes([i for i in ids if i < self.eos])

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def save(self, folder):
        """Leave beside a checkpoint's weights what `load_tokenizer(folder)` needs."""
        folder = Path(folder)
        if self.name == 'tiktoken':
            save_bpe(self.ranks, folder / 'tokenizer.tiktoken')
            (folder / 'tokenizer_name').unlink(missing_ok=True)
        else:
            write_atomic(str(folder / 'tokenizer_name'), self.name + '\n')
            (folder / 'tokenizer.tiktoken').unlink(missing_ok=True)


def load_tokenizer(name):
    """
    `name` is "gpt2", "bytes", a FILE.tiktoken, or a checkpoint: a folder or a model on the hub, ours or somebody
    else's with GPT-2's vocabulary. Anything else ends the program.
    """
    name = str(name)
    if not Path(name).is_dir():
        if name == 'bytes' or name in HUB_NAMES:
            return named_tokenizer('bytes' if name == 'bytes' else 'gpt2')
        if name.endswith('.tiktoken'):
            return Tokenizer('tiktoken', load_bpe(name))
        if not on_hub(name):
            fail(f'tokenizer: wanted gpt2, bytes, a .tiktoken file or a checkpoint folder, got {name!r}, which is '
                 'neither a folder here nor a model on the hub (OWNER/NAME, with no folder OWNER here)')
        checkpoint_file(name, 'config.json') # ends here where the hub cannot be asked: the others may well be absent
    if path := checkpoint_file(name, 'tokenizer.tiktoken', absent_ok=True):
        return Tokenizer('tiktoken', load_bpe(path))
    if path := checkpoint_file(name, 'tokenizer_name', absent_ok=True):
        stored = Path(path).read_text(encoding='utf-8', errors='replace').strip()
        if stored not in ('gpt2', 'bytes'):
            fail(f'{path}: wanted gpt2 or bytes, got {stored[:40]!r}')
        return named_tokenizer(stored)
    if not has_gpt2_vocabulary(name):
        fail(f'{name}: wanted a checkpoint with tokenizer.tiktoken or tokenizer_name, or with the vocabulary of GPT-2')
    return named_tokenizer('gpt2')


def named_tokenizer(name):
    """The tokenizers that need no file of ours: "gpt2" and "bytes"."""
    if name == 'bytes':
        return Tokenizer('bytes', BYTES)
    try:
        return Tokenizer('gpt2')
    except Exception as error: # no network, no cache, a damaged cache: tiktoken has no one exception for it
        fail(f'tokenizer gpt2: cannot load it ({type(error).__name__}); without a network set TIKTOKEN_CACHE_DIR '
             "to a folder that holds tiktoken's two GPT-2 files")


def has_gpt2_vocabulary(name):
    """
    Whether somebody else's checkpoint speaks GPT-2's tokens. Vocabularies of the same size are common, so one of its
    oddest words decides where a vocabulary is there; where none is, the size. Rows above it are padding or extras.
    """
    try:
        for filename in ('vocab.json', 'tokenizer.json'):
            if path := checkpoint_file(name, filename, absent_ok=True):
                vocab = json.loads(Path(path).read_text(encoding='utf-8'))
                vocab = vocab if filename == 'vocab.json' else vocab['model']['vocab']
                return vocab.get('\u0120SolidGoldMagikarp') == 43453 and vocab.get(EOS) == 50256
        path = checkpoint_file(name, 'config.json', absent_ok=True)
        size = json.loads(Path(path).read_text(encoding='utf-8')).get('vocab_size') if path else 0
        return 50257 <= size <= 50304 # the next multiple of 64
    except (OSError, ValueError, KeyError, AttributeError, TypeError): # not a vocabulary
        return False


def merge(parts, ranks):
    """Byte-pair encoding of one word, in place: join the neighbours of lowest rank until no two make a token."""
    while len(parts) > 1:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], math.inf), i) for i in range(len(parts) - 1))
        if rank == math.inf:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def train_bpe(texts, vocab_size, min_count=2):
    """
    Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) over bytes, within GPT-2's words.

    Again and again the most frequent pair of neighbours becomes a token; of equally frequent pairs the one whose bytes
    sort first. As in tiktoken a pair is known by its joined bytes, (ab, c) and (a, bc) alike, so the finished encoding
    splits the training text as training left it. Stops at `vocab_size` tokens, the end-of-text token included,
    or when no pair occurs `min_count` times (which keeps rare names from becoming single tokens).
    Returns ranks {bytes: id}, the 256 bytes first.
    """
    ranks = dict(BYTES)
    counts_of = Counter(word.encode() for text in texts for word in regex.findall(GPT2_SPLIT, text))
    freqs = list(counts_of.values()) # each distinct word is worked on once, with its frequency
    words = [[bytes([b]) for b in word] for word in counts_of]
    counts, places = Counter(), defaultdict(set) # joined pair -> its count; -> the words that hold it

    def tally(w, sign):
        for left, right in zip(words[w], words[w][1:]):
            counts[left + right] += sign * freqs[w]
            places[left + right].add(w)

    for w in range(len(words)):
        tally(w, 1)
    while len(ranks) + 1 < vocab_size and counts:
        top = max(counts.values())
        if top < max(min_count, 1):
            break
        token = min(pair for pair, n in counts.items() if n == top)
        ranks[token] = len(ranks)
        for w in places.pop(token): # only the words that hold the pair change
            tally(w, -1)
            merge(words[w], ranks)
            tally(w, 1)
        counts.pop(token)
        places.pop(token, None)
    return ranks


def save_bpe(ranks, path):
    """tiktoken's file format: one line a token, its bytes in base64, a space, its rank."""
    tokens = sorted(ranks, key=ranks.get)
    write_atomic(str(path), ''.join(f'{base64.b64encode(token).decode()} {ranks[token]}\n' for token in tokens))


def load_bpe(path):
    """The ranks {bytes: id} in a .tiktoken file. A damaged file ends the program with its file and line."""
    ranks = {}
    for n, line in read_lines(path):
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error):
            fail(f'{path}:{n}: wanted a token in base64, a space and its rank')
        if rank != len(ranks) or token in ranks or not token:
            fail(f'{path}:{n}: wanted a new token of rank {len(ranks)}, got {token!r} of rank {rank}')
        ranks[token] = rank
    if not BYTES.keys() <= ranks.keys():
        fail(f'{path}: wanted all 256 single bytes among its {len(ranks)} tokens')
    return ranks

# -----------------------------------------------------------------------------
# records: JSON lines, one kind a file


def read_lines(path):
    """Yield (line number, line as bytes) of a file or a .gz; what cannot be read ends the program."""
    n = 0
    try:
        with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as file:
            for n, line in enumerate(file, 1):
                yield n, line
    except FileNotFoundError:
        fail(f'{path}: no such file')
    except (OSError, EOFError, zlib.error) as error:
        fail(f'{path}:{n + 1}: cannot be read: {error}')


def parse_json(data, wanted):
    """Bytes -> the JSON value that they hold; ValueError says what was `wanted`."""
    def no_constant(name):
        raise ValueError(f'wanted a finite number, got {name}')
    try:
        return json.loads(data.decode('utf-8-sig'), parse_constant=no_constant)
    except UnicodeDecodeError:
        raise ValueError('wanted UTF-8 text')
    except json.JSONDecodeError as error:
        line = f'line {error.lineno}, ' if error.lineno > 1 else ''
        raise ValueError(f'wanted {wanted}: {error.msg} at {line}column {error.colno}')
    except RecursionError:
        raise ValueError(f'wanted {wanted}, got one nested too deeply')


def check_row(row):
    """A parsed JSON value is an object of whole characters; otherwise ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f'wanted a JSON object, got {type(row).__name__}')
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode() # an escape like \ud83d alone is half a character
    except UnicodeEncodeError:
        raise ValueError('wanted whole characters, got half of a surrogate pair')
    except ValueError:
        raise ValueError('wanted finite numbers, got one like 1e999')
    return row


def parse_line(line):
    """A line of bytes to its JSON object; ValueError says what was wanted."""
    return check_row(parse_json(line.rstrip(), 'one JSON object a line'))


def check(wanted, ok):
    if not ok:
        raise ValueError(f'wanted {wanted}')


def is_text(x):
    return isinstance(x, str) and x.strip() != ''


def is_number(x):
    return type(x) in (int, float) and math.isfinite(x) # a bool is no number


def check_messages(key, messages, last):
    check(f'`{key}` to be a list of messages, at least one', isinstance(messages, list) and len(messages) > 0)
    for m in messages:
        check(f'every message of `{key}` to have `role` (user, assistant or system) and `content`',
              isinstance(m, dict) and m.get('role') in ('user', 'assistant', 'system'))
        check(f'every `content` of `{key}` to be text that is not empty', is_text(m.get('content')))
    check(f'`{key}` to end in the turn of the {last}', messages[-1]['role'] == last)


def check_record(row, kind):
    """ValueError says what a row of this kind lacks (see the table of records in README.md); extra keys are welcome."""
    needs = {'text': ['text'], 'demonstrations': ['prompt', 'response'], 'prompts': ['prompt'],
             'comparisons': ['prompt', 'chosen', 'rejected'], 'rankings': ['prompt', 'responses', 'ranks'],
             'unpaired': ['prompt', 'response', 'label']}[kind]
    if kind == 'demonstrations' and 'messages' in row:
        return check_messages('messages', row['messages'], last='assistant')
    for key in needs:
        check(f'a row of kind {kind} to have `{key}`', key in row)
    for key in ('text', 'response', 'chosen', 'rejected'):
        if key in needs:
            check(f'`{key}` to be text that is not empty', is_text(row[key]))
    if isinstance(row.get('prompt'), list):
        check_messages('prompt', row['prompt'], last='user')
    elif 'prompt' in needs:
        check('`prompt` to be text that is not empty, or a list of messages', is_text(row['prompt']))
    if kind == 'unpaired':
        check('`label` to be true (a good answer) or false', isinstance(row['label'], bool))
    if kind == 'comparisons' and 'margin' in row:
        check('`margin` to be a number', is_number(row['margin']))
    if kind == 'comparisons' and 'scores' in row:
        check('`scores` to be two numbers, of chosen and rejected', isinstance(row['scores'], list)
              and len(row['scores']) == 2 and all(map(is_number, row['scores'])))
    if kind == 'rankings':
        responses, ranks, scores = row['responses'], row['ranks'], row.get('scores')
        check('`responses` to be a list of two texts or more, none empty',
              isinstance(responses, list) and len(responses) > 1 and all(map(is_text, responses)))
        check(f'`ranks` to be {len(responses)} integers, one a response, 0 = best', isinstance(ranks, list)
              and len(ranks) == len(responses) and all(type(r) is int and r >= 0 for r in ranks))
        check(f'`scores` to be {len(responses)} numbers, one a response', scores is None or isinstance(scores, list)
              and len(scores) == len(responses) and all(map(is_number, scores)))


def read_records(path, kind):
    """
    The rows of a .jsonl or .jsonl.gz file as dicts, each checked to be a record of its kind: "text", "demonstrations",
    "comparisons", "rankings", "unpaired" or "prompts". A .txt file is one text. The first bad row ends the program with
    its line.
    """
    if str(path).endswith(('.txt', '.txt.gz')):
        if kind != 'text':
            fail(f'{path}: wanted a .jsonl file of {kind}, got plain text')
        text = ''
        for n, line in read_lines(path):
            try:
                text += line.decode('utf-8-sig')
            except UnicodeDecodeError:
                fail(f'{path}:{n}: wanted UTF-8 text')
        if not text.strip():
            fail(f'{path}: wanted text, got an empty file')
        return [{'text': text}]
    rows = []
    for n, line in read_lines(path):
        if not line.strip():
            continue # an empty line, often the last
        try:
            row = parse_line(line)
            check_record(row, kind)
        except ValueError as error:
            fail(f'{path}:{n}: {error}')
        rows.append(row)
    if not rows:
        fail(f'{path}: wanted rows of kind {kind}, got a file without rows')
    return rows


def first_row(path):
    """A file's first row; {} where it cannot be read as one: read_records then says why."""
    line = next((line for _, line in read_lines(path) if line.strip()), b'{}')
    try:
        return parse_line(line)
    except ValueError:
        return {}


def is_text_file(path):
    """Whether a file holds plain text (.txt, or rows with `text`) and not demonstrations."""
    if str(path).endswith(('.txt', '.txt.gz')):
        return True
    return 'text' in first_row(path)


def kind_of(path):
    """The kind of a file's records, told by the keys of its first row; a broken first row passes as "prompts"."""
    if is_text_file(path):
        return 'text'
    row = first_row(path)
    keys = set(row)
    if isinstance(row.get('label'), bool):
        return 'unpaired'
    for kind, own in (('demonstrations', {'messages', 'response'}), ('comparisons', {'chosen'}),
                      ('rankings', {'responses'}), ('prompts', {'prompt'})):
        if keys & own:
            return kind
    if keys:
        fail(f"{path}: wanted records of one kind, got a first row with the keys {', '.join(sorted(keys))}")
    return 'prompts'


def to_lines(rows):
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def write_records(path, rows):
    write_atomic(str(path), to_lines(rows))

# -----------------------------------------------------------------------------
# the chat template

SPEAKER = {'user': '### Human: ', 'system': '### System: '}


def render(tok, messages):
    """Messages -> (ids, mask), both (T,); the mask is 1 on every answer and its EOS. Content None opens an answer."""
    ids, mask, context = [], [], '' # context: the text since the last answer, encoded in one piece
    for m in messages:
        if ids or context:
            context += '\n'
        if m['role'] != 'assistant':
            context += SPEAKER[m['role']] + m['content']
            continue
        before = tok.encode(context + '### Assistant:')
        answer = [] if m['content'] is None else response_ids(tok, m['content'])
        ids += before + answer
        mask += [0] * len(before) + [1] * len(answer)
        context = ''
    return ids, mask


def as_messages(prompt):
    """A record's prompt, a user's turn (str) or messages that end in one -> messages."""
    return [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt


def prompt_ids(tok, prompt):
    """A user's turn (str), or messages that end in one -> ids (P,) up to and with "### Assistant:"."""
    return render(tok, as_messages(prompt) + [{'role': 'assistant', 'content': None}])[0]


def response_ids(tok, response):
    """An answer's text -> ids (R,): a space, the text, the real end-of-text id."""
    return tok.encode(' ' + response) + [tok.eos]


def dialogue(tok, record):
    """
    A demonstration -> (ids, mask), both (T,), mask[i] = 1 where token i is to be learnt: of `prompt` and `response` the
    response, of `messages` every assistant turn; each with its EOS.
    """
    if 'messages' in record:
        return render(tok, record['messages'])
    prompt, response = prompt_ids(tok, record['prompt']), response_ids(tok, record['response'])
    return prompt + response, [0] * len(prompt) + [1] * len(response)

# -----------------------------------------------------------------------------
# records to rows of ids; each of these prints one line that says what was cut or left out


def truncate(prompt, n_response, block_size):
    """
    The end of `prompt` that fits into block_size before a response of n_response tokens: the oldest text goes first,
    the response is never touched. None when not one token of the prompt fits (the response's first token needs one).
    """
    room = block_size - n_response
    return prompt[-room:] if room > 0 else None


def report(name, rows, cut, left_out, block_size):
    note(f'{name}: {len(rows)} rows, {cut} prompts cut, {left_out} left out'
         + (f' (a response alone fills {block_size} tokens)' if left_out else ''))
    if not rows:
        fail(f'{name}: no row is left: every response alone fills block_size={block_size} tokens')
    return rows


def encode_text(tok, records):
    """Texts -> one flat array of ids (N,) int32, each text followed by EOS."""
    return np.concatenate([np.array(tok.encode(r['text']) + [tok.eos], dtype=np.int32) for r in records])


def encode_demonstrations(tok, records, block_size, loss_on='response', name='demonstrations'):
    """-> list of (ids (T,), mask (T,)). loss_on "all" learns every token; a cut takes the oldest turns first."""
    rows, cut, left_out = [], 0, 0
    for record in records:
        ids, mask = dialogue(tok, record)
        start = len(mask) - mask[::-1].index(0) # where the last response begins; a prompt token always precedes it
        prompt = truncate(ids[:start], len(ids) - start, block_size)
        if prompt is None:
            left_out += 1
            continue
        cut += len(prompt) < start
        ids, mask = prompt + ids[start:], mask[start - len(prompt):]
        rows.append((ids, [1] * len(ids) if loss_on == 'all' else mask))
    return report(name, rows, cut, left_out, block_size)


def encode_rankings(tok, records, block_size, name='rankings'):
    """-> list of (prompt ids (P,), [K responses' ids], ranks (K,)); the prompt is cut to fit the longest response."""
    rows, cut, left_out = [], 0, 0
    for r in records:
        whole, responses = prompt_ids(tok, r['prompt']), [response_ids(tok, x) for x in r['responses']]
        prompt = truncate(whole, max(map(len, responses)), block_size)
        if prompt is None:
            left_out += 1
            continue
        cut += len(prompt) < len(whole)
        rows.append((prompt, responses, r['ranks']))
    return report(name, rows, cut, left_out, block_size)


def read_preferences(path):
    """A file of rankings or of comparisons, as ranking records: a comparison is a ranking of two; its margin stays."""
    if 'chosen' in first_row(path):
        return [r | {'responses': [r['chosen'], r['rejected']], 'ranks': [0, 1]}
                for r in read_records(path, 'comparisons')]
    return read_records(path, 'rankings')


def read_ranked(path, use_scores=False):
    """
    As read_preferences, less the records whose answers all tie: they teach nothing. path: one file, or several of one
    kind, separated by commas. use_scores: in records that have `scores`, these take the place of the ranks, as `ranks`
    of -score.
    """
    files = str(path).split(',')
    records = [r for file in files for r in read_preferences(file)]
    if len({'chosen' in r for r in records}) > 1:
        fail(f'{path}: wanted files of one kind, rankings or comparisons')
    if use_scores:
        records = [r | {'ranks': [-score for score in r['scores']]} if r.get('scores') else r for r in records]
    records = [r for r in records if len(set(r['ranks'])) > 1]
    if not records:
        fail(f'{path}: all answers of every prompt tie; wanted some that are ranked above others')
    return records


def read_unpaired(path):
    """
    A file of unpaired records; or one of rankings or comparisons, taken apart: an answer that beats more of the other
    answers to its prompt than beat it is good, one that is beaten by more is bad, and one in the middle is left out.
    """
    if 'label' in first_row(path):
        return read_records(path, 'unpaired')
    rows = []
    for r in read_preferences(path):
        for response, rank in zip(r['responses'], r['ranks']):
            lead = sum((rank < other) - (rank > other) for other in r['ranks']) # beaten ones less those it is beaten by
            if lead:
                rows.append({'prompt': r['prompt'], 'response': response, 'label': lead > 0})
    return rows


def encode_comparisons(tok, records, block_size, name='comparisons'):
    """-> list of (prompt ids, chosen ids, rejected ids, margin); both answers follow the same prompt, cut alike."""
    as_rankings = [{'prompt': r['prompt'], 'responses': [r['chosen'], r['rejected']], 'ranks': r.get('margin', 0.0)}
                   for r in records]
    return [(prompt, *responses, float(margin))
            for prompt, responses, margin in encode_rankings(tok, as_rankings, block_size, name)]


def encode_prompts(tok, records, room, name='prompts'):
    """-> list of prompt ids, each at most `room` = block_size - max_new_tokens long."""
    if room < 1:
        fail(f'{name}: wanted block_size above max_new_tokens, got room for {room} tokens of prompt')
    whole = [prompt_ids(tok, r['prompt']) for r in records]
    return report(name, [p[-room:] for p in whole], sum(len(p) > room for p in whole), 0, room)

# -----------------------------------------------------------------------------
# batches


def pad(rows, fill=0):
    """Lists of numbers -> (B, T) long, right-padded. What the padding holds is never read: causal models and masks."""
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long) # (B, T)
    for b, row in enumerate(rows):
        out[b, :len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out


def collate(examples):
    """
    A list of (ids, mask) -> idx (B, T) long, mask (B, T-1) float. Here, once, the mask takes its shift: position t of
    it speaks of token t+1.
    """
    return pad([ids for ids, _ in examples]), pad([mask for _, mask in examples])[:, 1:].float()


@dataclass
class Answers:
    """
    B prompts, each followed by all its answers in one row of T tokens, so that the prompt is worked on once. The model
    gives every token the position it has behind the prompt alone and hides the other answers from it: each answer
    comes out as if it stood alone. N answers in all, M answer tokens in all, answer after answer.
    """
    idx: torch.Tensor # (B, T) prompt, answer 1, …, answer K, padding
    positions: torch.Tensor # (B, T) every answer starts where the prompt ends
    parts: torch.Tensor # (B, T) 0 = prompt, 1 … K = answers
    sources: torch.Tensor # (M,) places in the flattened (B * T) of the token before each answer token
    targets: torch.Tensor # (M,) the answer tokens, EOS included
    owners: torch.Tensor # (M,) which of the N answers each belongs to
    last: torch.Tensor # (N,) places of the answers' last tokens
    sizes: torch.Tensor # (N,) tokens per answer
    pairs: torch.Tensor # (P, 2) better and worse answer of every pair of different rank of one prompt

    def to(self, device):
        return Answers(*(x.to(device) for x in vars(self).values()))

    def learnt(self, which):
        """The same batch, but the answer tokens are those of some answers alone; which: (N,) bool."""
        keep = which[self.owners] # (M,)
        return replace(self, sources=self.sources[keep], targets=self.targets[keep], owners=self.owners[keep])


def collate_answers(rows):
    """Rows (prompt ids, [answers' ids], ranks), one per prompt, as Answers."""
    ids, positions, parts, sources, targets, owners, last, sizes, pairs = ([] for _ in range(9))
    T = max(len(prompt) + sum(map(len, answers)) for prompt, answers, _ in rows)
    for b, (prompt, answers, ranks) in enumerate(rows):
        P, first = len(prompt), len(sizes)
        row, at, part = list(prompt), list(range(P)), [0] * P
        for k, answer in enumerate(answers, 1):
            here = b * T + len(row) # where this answer starts in the flattened batch
            sources += [b * T + P - 1] + list(range(here, here + len(answer) - 1))
            targets += answer
            owners += [len(sizes)] * len(answer)
            last.append(here + len(answer) - 1)
            sizes.append(len(answer))
            row += answer
            at += range(P, P + len(answer))
            part += [k] * len(answer)
        pairs += [(first + i, first + j) for i, a in enumerate(ranks) for j, c in enumerate(ranks) if a < c]
        ids.append(row), positions.append(at), parts.append(part)
    flat = (torch.tensor(x, dtype=torch.long) for x in (sources, targets, owners, last, sizes))
    return Answers(pad(ids), pad(positions), pad(parts), *flat, torch.tensor(pairs, dtype=torch.long).view(-1, 2))


def to_table(values, rows, fill):
    """One value per answer, (N,) in the order of collate_answers, as (B, K) with `fill` where a prompt has fewer."""
    sizes = torch.tensor([len(answers) for _, answers, _ in rows], device=values.device) # (B,)
    there = torch.arange(int(sizes.max()), device=values.device) < sizes[:, None] # (B, K)
    return torch.full(there.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(there, values)


def by_length(rows, batch_size):
    """Indices of rows (prompt, [answers], ranks) in parts of about batch_size prompts of like length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + sum(map(len, rows[i][1])))
    return split(order, math.ceil(len(order) / batch_size))


class Batches:
    """
    Which rows make up the batch of an optimizer step: `.at(step)`, a list of batch_size row indices, a pure function of
    (seed, step), so that a resumed run needs no stored position.

    An epoch is `.epoch_steps` steps. It shuffles the rows, sorts each stretch of 50 batches by length, cuts it into
    batches and shuffles these. Every row comes once an epoch; where batch_size does not divide their number, the
    epoch's first few rows come once more to fill the last batch.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.epoch_steps = math.ceil(len(lengths) / batch_size)
        self.epoch, self.batches = None, None # the epoch drawn last

    def at(self, step):
        epoch, i = divmod(step, self.epoch_steps)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.lengths)) # (N,)
            order = np.resize(order, self.epoch_steps * self.batch_size) # begins again to fill the last batch
            stretches = np.split(order, range(50 * self.batch_size, len(order), 50 * self.batch_size))
            order = np.concatenate([s[np.argsort(self.lengths[s], kind='stable')] for s in stretches])
            batches = order.reshape(self.epoch_steps, self.batch_size)
            self.epoch, self.batches = epoch, batches[rng.permutation(self.epoch_steps)]
        return self.batches[i].tolist()


class Rows:
    """Demonstrations as (ids, mask), in batches of like length."""

    def __init__(self, rows, batch_size, seed):
        self.rows, self.batch_size = rows, batch_size
        self.T, self.words = max(len(ids) for ids, _ in rows), max(sum(mask) for _, mask in rows) # most in a row
        self.batches = Batches([len(ids) for ids, _ in rows], batch_size, seed)
        self.epoch_steps = self.batches.epoch_steps

    def at(self, step):
        """The (ids, mask) of an optimizer step."""
        return [self.rows[i] for i in self.batches.at(step)]

    def in_order(self, n_batches, parts=1):
        """The first n_batches batches (0 = all), every row once, in micro-batches (`parts` a batch): for measuring."""
        rows, size = self.rows[:n_batches * self.batch_size or None], self.batch_size // parts
        rows = sorted(rows, key=lambda row: len(row[0]))
        return [rows[i:i + size] for i in range(0, len(rows), size)]


class Stream:
    """Plain text as one stream of tokens; a row is a window of block_size + 1 of them, at a random place."""

    def __init__(self, stream, block_size, batch_size, seed):
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.T = self.words = min(block_size, len(stream) - 1) # a window holds T inputs and T targets
        self.epoch_steps = math.ceil((len(stream) - 1) / (self.T * batch_size))

    def window(self, i):
        ids = self.stream[i:i + self.T + 1]
        return ids, [1] * len(ids)

    def at(self, step):
        rng = np.random.default_rng([self.seed, step]) # a pure function of the step: resuming needs no cursor
        return [self.window(i) for i in rng.integers(len(self.stream) - self.T, size=self.batch_size)]

    def in_order(self, n_batches, parts=1):
        """The first n_batches batches of neighbouring windows (0 = all), every token predicted once: as in Rows."""
        rows, size = [self.window(i) for i in range(0, len(self.stream) - 1, self.T)], self.batch_size // parts
        rows = rows[:n_batches * self.batch_size or None]
        return [rows[i:i + size] for i in range(0, len(rows), size)]


def load_training_set(path, tok, block_size, batch_size, seed, loss_on='response', packed=True, name='train',
                      val_fraction=0.0):
    """
    A file of demonstrations or of text, ready for cross-entropy: Rows or, for packed text, a Stream; and with
    val_fraction its last part as a second one (else None).
    """
    if is_text_file(path) and not packed: # a text a row, its beginning where it is too long
        data = [(ids[:block_size], [1] * min(len(ids), block_size))
                for ids in (tok.encode(r['text']) + [tok.eos] for r in read_records(path, 'text'))]
        cut = sum(ids[-1] != tok.eos for ids, _ in data)
        note(f'{name}: {len(data)} texts, {cut} cut to {block_size} tokens')
        wrap = lambda part: Rows(part, batch_size, seed)
    elif is_text_file(path):
        data = encode_text(tok, read_records(path, 'text')) # (N,)
        note(f'{name}: {len(data)} tokens of text')
        wrap = lambda part: Stream(part, block_size, batch_size, seed)
    else:
        data = encode_demonstrations(tok, read_records(path, 'demonstrations'), block_size, loss_on, name)
        wrap = lambda part: Rows(part, batch_size, seed)
    cut = math.ceil(len(data) * (1 - val_fraction))
    least = 2 if isinstance(data, np.ndarray) else 1 # a stream of one token predicts nothing
    if cut < least or val_fraction and len(data) - cut < least:
        fail(f'{path}: {len(data)} rows or tokens are too few with val_fraction={val_fraction}')
    return wrap(data[:cut]), wrap(data[cut:]) if cut < len(data) else None

# -----------------------------------------------------------------------------
# looking at rows


@dataclass
class Config:
    peek: str = '' # a file of records of any kind
    tokenizer: str = 'gpt2' # gpt2, bytes, a .tiktoken file or a checkpoint folder
    rows: int = 3 # how many of the first rows to show

    def __post_init__(self):
        require(self, peek=(self.peek != '', 'a file of records'), rows=(self.rows >= 1, 'at least 1'))


def paint(tok, ids, mask, colour, learnt='1;32'):
    """
    Ids as text that shows their mask. In colour: what is learnt is bold green (or `learnt`), the rest dim, the
    end-of-text token inverse. Without: what is learnt stands in ⟦ ⟧. Control characters, which could steer a terminal,
    are escaped.
    """
    control = {c: f'\\x{c:02x}' for c in (*range(32), *range(127, 160)) if chr(c) not in '\t\n'}
    out = ''
    for counted, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        text = ''
        for is_eos, part in groupby((i for i, _ in run), key=lambda i: i == tok.eos):
            part = list(part)
            eos = f'\x1b[7m{EOS}\x1b[27m' if colour else EOS
            text += eos * len(part) if is_eos else tok.decode(part).translate(control)
        if colour:
            out += f"\x1b[{learnt if counted else '2'}m{text}\x1b[0m"
        else:
            out += f'⟦{text}⟧' if counted else text
    return out


def parts_of(tok, record, kind):
    """A record -> [(name, ids, mask), …] with the masks of training; every answer to a prompt is a part of its own."""
    if kind == 'text':
        ids = tok.encode(record['text']) + [tok.eos]
        return [('text', ids, [1] * len(ids))]
    if kind == 'demonstrations':
        return [('dialogue', *dialogue(tok, record))]
    prompt, answers = prompt_ids(tok, record['prompt']), []
    if kind == 'comparisons':
        answers = [('chosen', record['chosen']), ('rejected', record['rejected'])]
    if kind == 'rankings':
        answers = [(f'rank {rank}', text) for rank, text in zip(record['ranks'], record['responses'])]
    if kind == 'unpaired':
        answers = [('good' if record['label'] else 'bad', record['response'])]
    answers = [(name, response_ids(tok, text)) for name, text in answers]
    return [('prompt', prompt, [0] * len(prompt))] + [(name, ids, [1] * len(ids)) for name, ids in answers]


def peek(cfg):
    tok, kind = load_tokenizer(cfg.tokenizer), kind_of(cfg.peek)
    records = read_records(cfg.peek, kind)
    colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    sys.stdout.reconfigure(errors='backslashreplace') # for a terminal without these characters
    word = tok.encode('learnt')
    legend = paint(tok, word, [1] * len(word), colour)
    print(f'{cfg.peek}: {len(records)} {kind}; what is {legend} looks like this')
    for n, record in enumerate(records[:cfg.rows], 1):
        print(f'\nrow {n}')
        for name, ids, mask in parts_of(tok, record, kind):
            more = f' … and {len(ids) - 1000} more' if len(ids) > 1000 else '' # of a whole book
            learnt = '1;31' if name in ('rejected', 'bad') else '1;32' # red, green
            print(f'[{name}: {len(ids)} tokens, {sum(mask)} learnt]\n'
                  + paint(tok, ids[:1000], mask[:1000], colour, learnt) + more)


if __name__ == '__main__':
    if '--peek' in sys.argv[:-1]: # `--peek FILE` as well as --peek=FILE
        at = sys.argv.index('--peek')
        sys.argv[at:at + 2] = ['--peek=' + sys.argv[at + 1]]
    launch(peek, Config)
