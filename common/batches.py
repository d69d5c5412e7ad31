"""Encode records to rows, stack rows to batches, choose each step's rows."""

import bisect
import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.options import fail, note
from common.records import is_text_file, read_ranked, read_records
from common.tokens import as_messages, dialogue, prompt_ids, response_ids

# ---- records to rows of ids; what was cut or left out is reported in one line --------------------

class Row(NamedTuple):
    """Hold a prompt and its answers as ids, and the record that they come from."""
    prompt: list # ids (P,)
    answers: list # K lists of ids, each with its EOS unless it was cut off
    record: dict

    @property
    def ranks(self):
        return self.record['ranks'] # (K,), 0 = best

    @property
    def length(self):
        return len(self.prompt) + sum(map(len, self.answers))

def truncate(prompt, n_response, block_size):
    """Return the end of `prompt` that fits before an uncut response; None where not one token does."""
    room = block_size - n_response
    return prompt[-room:] if room > 0 else None

def report(name, rows, cut, left_out, block_size, open_ended=0): # open_ended: answers that were cut off, without EOS
    """Print how many records were kept, cut and left out; return the rows. Without any the program ends."""
    note(f'{name}: {len(rows)} rows, {cut} prompts cut, {left_out} left out'
         + (f' (a response alone fills {block_size} tokens)' if left_out else '')
         + (f', {open_ended} answers without an end' if open_ended else ''))
    if not rows:
        fail(f'{name}: no row is left: every response alone fills block_size={block_size} tokens')
    return rows

def encode_demonstrations(tok, records, block_size, loss_on='response', name='demonstrations'):
    """Encode to a list of (ids (T,), mask (T,)); loss_on="all" learns every token. A cut takes the oldest turns."""
    rows, cut, open_ended = [], 0, 0
    for record in records:
        ids, mask = dialogue(tok, record)
        start = len(mask) - mask[::-1].index(0) # where the last response begins; a prompt token always precedes it
        open_ended += not record.get('ended', True)
        if prompt := truncate(ids[:start], len(ids) - start, block_size):
            cut += len(prompt) < start
            ids, mask = prompt + ids[start:], mask[start - len(prompt):]
            rows.append((ids, [1] * len(ids) if loss_on == 'all' else mask))
    return report(name, rows, cut, len(records) - len(rows), block_size, open_ended)

def encode_rankings(tok, records, block_size, name='rankings'):
    """Encode records with `prompt` and `responses` as Rows; a prompt is cut to fit its longest response."""
    rows, cut, open_ended = [], 0, 0
    for record in records:
        whole, ended = prompt_ids(tok, record['prompt']), record.get('ended') or [True] * len(record['responses'])
        answers = [response_ids(tok, *answer) for answer in zip(record['responses'], ended)]
        open_ended += ended.count(False)
        if prompt := truncate(whole, max(map(len, answers)), block_size):
            cut += len(prompt) < len(whole)
            rows.append(Row(prompt, answers, record))
    return report(name, rows, cut, len(records) - len(rows), block_size, open_ended)

def load_rankings(path, tok, block_size, name, use_scores=False, ties=False):
    """Load rankings, comparisons or ratings as rows, without too long answers; see read_ranked."""
    return encode_rankings(tok, read_ranked(path, use_scores, name, ties), block_size, name) if path else None

def encode_prompts(tok, records, room, name='prompts'):
    """Encode prompts to lists of ids, cut to `room` = block_size - max_new_tokens."""
    if room < 1:
        fail(f'{name}: wanted block_size above max_new_tokens, got room for {room} tokens of prompt')
    whole = [prompt_ids(tok, r['prompt']) for r in records]
    return report(name, [p[-room:] for p in whole], sum(len(p) > room for p in whole), 0, room)

# ---- rows to tensors --------------------------------------------------------------------------------------------

def pad(rows, fill=0):
    """Stack lists of numbers as (B, T) long, right-padded. Nothing reads the padding."""
    return pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=fill)

def collate(examples):
    """Stack (ids, mask) as idx (B, T) and mask (B, T-1), which is shifted here."""
    return pad([ids for ids, _ in examples]), pad([mask for _, mask in examples])[:, 1:].float()

def share_prompts(idx, keep, groups):
    """Lay a group's rows behind one another: what they begin with only once.

    Below a group of two rows (N = 2, T = 6) becomes one (B = 1, S = 8):

        idx     p q r a # -      ids        p q r a # b c #         each sees     p q r a # b c #
                p q r b c #      parts      0 0 0 1 1 2 2 2             p q r     x x x             the causal part
                                 positions  0 1 2 3 4 3 4 5             a #       x x x x x         the same
                                                                        b c #     x x x     x x x   not the other answer

    idx: (N, T). keep: (M,) places in it, as model.pick counts them; what follows a row's last one is left out. groups:
    (B,) numbers of neighbouring rows. Returns ids, positions, the attention mask (B, 1, S, S) and keep's new places.
    """
    N, T = idx.size()
    rows, t = torch.arange(N, device=idx.device), torch.arange(T, device=idx.device)
    group = torch.repeat_interleave(groups, output_size=N) # (N,) the number of each row's group
    first = (groups.cumsum(0) - groups)[group] # (N,) the first row of the same group
    lengths = torch.zeros_like(rows).scatter_reduce(0, keep // T, keep % T + 1, 'amax') # (N,)
    alike = torch.minimum((idx == idx[first]).long().cumprod(1).sum(1), lengths) # (N,) tokens, as the first row's
    alike = torch.full_like(groups, T).scatter_reduce(0, group, alike, 'amin')[group, None] # (N, 1) in the whole group
    new = (t < lengths[:, None]) & ((t >= alike) | (first == rows)[:, None]) # (N, T) what is laid down
    before = new.flatten().cumsum(0).view(N, T) - new.long() # (N, T) how many in front of each
    at = torch.where(t < alike, t, before - before[first, :1]) # (N, T) the place in its row
    S = int(torch.zeros_like(groups).scatter_add(0, group, new.sum(1)).max())
    places = torch.where(new, at + S * group[:, None], S * len(groups)) # (N, T), the rest goes behind the end
    laid = idx.new_zeros(3, S * len(groups) + 1)
    laid[:, places] = torch.stack([idx, t.expand_as(idx), (rows - first + 1)[:, None] * (t >= alike)])
    ids, positions, parts = laid[:, :-1].view(3, -1, S) # (B, S) each
    mask = (parts[:, None] == 0) | (parts[:, None] == parts[:, :, None]) # (B, S, S), [b, who, whom]
    return ids, positions, mask.tril()[:, None], (at + S * group[:, None]).flatten()[keep]

@dataclass
class Answers:
    """Hold the N answers of B rows, right-padded, each behind its prompt, those to one prompt side by side."""
    idx: torch.Tensor # (N, T) prompt, answer, padding
    mask: torch.Tensor # (N, T-1) 1 where token t+1 belongs to the answer, EOS included
    lengths: torch.Tensor # (N,) of prompt and answer
    sizes: torch.Tensor # (N,) of the answer alone
    pairs: torch.Tensor # (P, 2) better and worse answer of every pair of different rank of one prompt
    groups: torch.Tensor # (B,) how many answers each prompt has, see share_prompts

    def to(self, device):
        return Answers(**{name: x.to(device) for name, x in vars(self).items()})

def collate_answers(rows):
    """Stack rows as Answers; `pairs` needs records with `ranks`, and is empty without."""
    examples = [(row.prompt + answer, [0] * len(row.prompt) + [1] * len(answer))
                for row in rows for answer in row.answers]
    groups = [len(row.answers) for row in rows]
    lengths, sizes = torch.tensor([(len(ids), sum(mask)) for ids, mask in examples]).unbind(1) # (N,) each
    pairs = [(first + i, first + j) for first, row in zip(itertools.accumulate([0, *groups]), rows)
             for i, a in enumerate(row.record.get('ranks', [])) for j, b in enumerate(row.ranks) if a < b]
    pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return Answers(*collate(examples), lengths, sizes, pairs, torch.tensor(groups))

def to_table(values, rows, fill):
    """Lay out one value per answer, (N,) as in Answers, as (B, K); `fill` where a prompt has fewer."""
    return pad_sequence(values.split([len(row.answers) for row in rows]), batch_first=True, padding_value=fill)

# ---- which rows make up a batch ---------------------------------------------------------------------------------

def by_length(rows, batch_size):
    """Return row indices in parts of about batch_size, sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    return split(order, math.ceil(len(order) / batch_size))

def split(rows, parts):
    """Cut a list, in order, into `parts` parts of equal size; the last may be shorter."""
    size = math.ceil(len(rows) / parts)
    return [rows[i:i + size] for i in range(0, len(rows), size)]

def split_by_tokens(rows, lengths, parts, least=1):
    """Cut a batch into micro-batches of about equal tokens, short rows first. Each has `least` rows or more."""
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    before = [0, *itertools.accumulate(lengths[i] for i in order)] # tokens in front of each row, and all of them
    cuts = [0]
    for part in range(1, parts): # later parts hold longer and so fewer rows: only they may lack some
        cuts.append(min(bisect.bisect_left(before, before[-1] * part / parts), len(rows) - least * (parts - part)))
    return [[rows[i] for i in order[a:b]] for a, b in itertools.pairwise(cuts + [len(rows)])]

def own_parts(rows, lengths, cfg, run):
    """Cut a batch into cfg.grad_accum micro-batches; return of each the rows of this process."""
    return [run.rows(part) for part in split_by_tokens(rows, lengths, cfg.grad_accum, run.world_size)]

class Batches:
    """Choose the rows of each optimizer step: `.at(step)` is a list of batch_size row indices.

    It is a pure function of (seed, step), so that a resumed run needs no stored position. An epoch, `.epoch_steps`
    steps, shuffles the rows, sorts each stretch of 50 batches by length, cuts it into batches and shuffles these.
    Every row comes once, and the epoch's first rows once more where the last batch lacks some.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.epoch_steps = math.ceil(len(lengths) / batch_size)
        self.epoch, self.batches = None, None # the epoch drawn last

    def at(self, step):
        epoch, i = divmod(step, self.epoch_steps)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = np.resize(rng.permutation(len(self.lengths)), self.epoch_steps * self.batch_size) # begins again
            stretches = np.split(order, range(50 * self.batch_size, len(order), 50 * self.batch_size))
            order = np.concatenate([s[np.argsort(self.lengths[s], kind='stable')] for s in stretches])
            batches = order.reshape(self.epoch_steps, self.batch_size)
            self.epoch, self.batches = epoch, batches[rng.permutation(self.epoch_steps)]
        return self.batches[i].tolist()

class Demonstrations(Batches):
    """Serve demonstrations as (ids, mask), in batches of like length."""

    def __init__(self, rows, batch_size, seed):
        super().__init__([len(ids) for ids, _ in rows], batch_size, seed)
        self.rows = rows

    def at(self, step):
        """Return the (ids, mask) of an optimizer step."""
        return [self.rows[i] for i in super().at(step)]

    def in_order(self, n_batches, parts=1):
        """Return the first n_batches batches (0 = all), every row once, in micro-batches (`parts` a batch)."""
        rows, size = self.rows[:n_batches * self.batch_size or None], self.batch_size // parts
        rows = sorted(rows, key=lambda row: len(row[0]))
        return [rows[i:i + size] for i in range(0, len(rows), size)]

class Windows:
    """Serve one stream of tokens in windows of block_size + 1 at random."""

    def __init__(self, stream, block_size, batch_size, seed):
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.T = min(block_size, len(stream) - 1) # a window holds T inputs and T targets
        self.epoch_steps = math.ceil((len(stream) - 1) / (self.T * batch_size))

    def window(self, i):
        ids = self.stream[i:i + self.T + 1]
        return ids, [1] * len(ids)

    def at(self, step):
        rng = np.random.default_rng([self.seed, step]) # a pure function of the step: resuming needs no cursor
        return [self.window(i) for i in rng.integers(len(self.stream) - self.T, size=self.batch_size)]

    def in_order(self, n_batches, parts=1):
        """Return the first n_batches batches (0 = all) of neighbouring windows, every token predicted once."""
        rows, size = [self.window(i) for i in range(0, len(self.stream) - 1, self.T)], self.batch_size // parts
        rows = rows[:n_batches * self.batch_size or None]
        return [rows[i:i + size] for i in range(0, len(rows), size)]

def hold_out(records, fraction):
    """Split records into two parts; no first question is in both.

    A hash of the first questions, or of plain texts, chooses this fraction of the different ones for the second part.
    """
    text = 'text' in records[0] # as is_text_file has it
    def key(record):
        turns = as_messages(record['text' if text else 'messages' if 'messages' in record else 'prompt'])
        first = next((m['content'] for m in turns if m['role'] == 'user'), str(turns))
        return hashlib.sha256(first.encode()).digest()
    keys = sorted({key(record) for record in records})
    held = {*keys[:round(fraction * len(keys))]}
    return [r for r in records if key(r) not in held], [r for r in records if key(r) in held]

def load_training_set(path, tok, block_size, batch_size, seed, loss_on='response', packed=True, name='train',
                      val_fraction=0.0):
    """Load demonstrations or text for cross-entropy: a training set, and a held-out one or None.

    Each is Demonstrations, or Windows of packed text. Held out are val_fraction of the prompts, of packed text the end.
    """
    text = is_text_file(path)
    records = read_records(path, 'text' if text else 'demonstrations')
    if text and packed:
        stream = np.concatenate([np.array(tok.encode(r['text']) + [tok.eos], dtype=np.int32) for r in records]) # (N,)
        note(f'{name}: {len(stream)} tokens of text')
        cut = math.ceil(len(stream) * (1 - val_fraction))
        parts, least = [stream[:cut], stream[cut:]], 2 # a stream of one token predicts nothing
        wrap = lambda part: Windows(part, block_size, batch_size, seed)
    else:
        parts, least = hold_out(records, val_fraction), 1
        wrap = lambda part: Demonstrations(part, batch_size, seed)
    if len(parts[0]) < least or val_fraction and len(parts[1]) < least:
        fail(f'{path}: {sum(map(len, parts))} rows or tokens are too few with val_fraction={val_fraction}')
    if not text:
        encode = lambda part, name: part and encode_demonstrations(tok, part, block_size, loss_on, name)
        parts = list(map(encode, parts, (name, 'val')))
    elif not packed: # a text a row, its beginning where it is too long
        parts = [[tok.encode(r['text']) + [tok.eos] for r in part] for part in parts]
        cut = sum(len(ids) > block_size for part in parts for ids in part)
        note(f'{name}: {len(records)} texts, {cut} cut to {block_size} tokens')
        parts = [[(ids[:block_size], [1] * min(len(ids), block_size)) for ids in part] for part in parts]
    return wrap(parts[0]), wrap(parts[1]) if len(parts[1]) else None
