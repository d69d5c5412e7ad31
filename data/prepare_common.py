"""Prepare a data set: find files, read and count rows, split, write.

A prepare.py turns a row into an Item (the records it gives) or raises ValueError with the reason why it gives none.
data/formats.py has a function for every format that several data sets share. `counts` says what happened to rows:
{('read', file) or ('left out' or 'cut' or 'malformed', reason) or ('key', name): places}, a place being FILE:LINE and a
key one that nobody looked at. Records are written as KIND_train.jsonl and KIND_val.jsonl, once everything is known to
be good. The same input and seed give the same files.
"""

import ast
import contextlib
import csv
import hashlib
import http.client
import json
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from common.options import fail, require
from common.records import check_record, check_row, parse_json, parse_line, read_lines, write_records
from common.weights import fetch_from_hub

KINDS = ('text', 'demonstrations', 'comparisons', 'rankings', 'unpaired', 'prompts')
ENDINGS = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.csv', '.csv.gz', '.parquet')
NOT_TEXT = ('label', 'labels', 'kto_tag', 'margin', 'preference', 'score_0', 'score_1', 'scores', 'ranks', 'ended',
            'helpfulness', 'better_response_id', 'safer_response_id') # columns of CSV that hold Python or JSON values

@dataclass
class Item:
    """Hold the records that one row of a data set gives."""
    group: object # items of equal group, mostly those with one prompt, are never in different splits
    records: dict # kind -> list of records
    cut: tuple = () # why parts of the row were dropped, one reason a part
    place: str = '' # FILE:LINE, set by `read`
    judged: tuple = () # an answer, how good it is, whether it ended: a prompt's answers make a ranking

@dataclass
class PrepareOptions:
    """Say what is read and how it is split. A prepare.py adds `out_dir` and its own."""
    source: str = '' # a file (.json, .jsonl, .csv, also .gz, .parquet) or a folder of some; empty = from the hub
    val_fraction: float = 0.05 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        require(self, val_fraction=(0 < self.val_fraction < 1, 'between 0 and 1'), seed=(self.seed >= 0, 'at least 0'),
                out_dir=(not self.source or Path(self.out_dir).resolve() != Path(self.source).resolve(),
                         'another folder than the source, or the next run would read its own output'))

# ---- files and rows ---------------------------------------------------------------------------------------------

def fetch(url, text=True):
    """Fetch a text over https, or bytes. A failure ends the program with one line."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read().decode() if text else answer.read()
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = ' '.join(str(getattr(e, 'reason', e)).split())[:200]
        fail(f'{url}: cannot be fetched ({reason}); without a network, get a copy of it and name it by --source=FILE')

def find_files(source, repo, names, folders=('',)):
    """Return a data set's files and its held-out files.

    source: a file, a folder (of which only `folders` are read, at any depth), or '' for the files `names` of `repo` on
    the hub. Beside train*, test* and val* files are held out, and others, which may repeat them, are not read.
    """
    files = [] if source else [Path(fetch_from_hub(repo, name, repo_type='dataset')) for name in names]
    for path in [Path(source) / folder for folder in folders] if source else ():
        here = [path] if path.is_file() else sorted(f for f in path.rglob('*') if f.name.endswith(ENDINGS))
        if not here:
            fail(f'--source={source}: wanted a file ({", ".join(ENDINGS)}) or a folder that holds some, '
                 + (f'found none in {path}' if path.is_dir() else f'{path} is neither'))
        files += here
    for file in files:
        if file.suffix in ('.arrow', '.zip', '.xlsx'):
            fail(f'{file}: wanted JSON or JSON lines ({", ".join(ENDINGS)}); the `datasets` package turns others into '
                 'it: Dataset.to_json')
    train = [f for f in files if f.name.startswith('train')]
    held_out = [f for f in files if f.name.startswith(('test', 'val'))]
    if not (train and held_out):
        return files, []
    others = [str(f) for f in files if f not in train + held_out]
    if others:
        print(f"not read         {', '.join(others)} (neither train* nor test* or val*)")
    return train, held_out

class Row(dict):
    """Remember which keys were looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

def unseen(row):
    """Return the names of keys that nobody looked at; `a.b` is b inside of a."""
    names, todo = set(), [('', row)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, list):
            todo += [(name, part) for part in value]
        elif isinstance(value, dict) and (seen := getattr(value, 'seen', value)): # else a part cut off whole
            names.update(name + key for key in value.keys() - seen if dict.get(value, key) not in (None, '', [], {}))
            todo += [(f'{key}.', part) for key, part in value.items() if key in seen]
    return names

def shown(keys):
    """Join names for one line of a terminal."""
    return ', '.join(key if key.isprintable() else repr(key) for key in keys)[:80]

def cells(path):
    """Yield (place, {column: cell}) of a CSV file. Empty cells are left out."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(line.decode('utf-8-sig') for _, line in read_lines(path))
    try:
        for row in rows:
            yield f'{path}:{rows.line_num}', {key: cell for key, cell in row.items() if cell}
    except (UnicodeDecodeError, csv.Error) as error:
        fail(f'{path}:{rows.line_num + isinstance(error, UnicodeDecodeError)}: wanted CSV in UTF-8: {error}')

def parse_cells(row):
    """Turn a CSV row into values: numbers and labels are told by their column, messages by their bracket."""
    if None in row:
        raise ValueError('wanted as many cells as the header has')
    for key in [key for key, cell in row.items() if key in NOT_TEXT or cell.startswith('[{')]:
        for parse in (json.loads, ast.literal_eval): # Python's True, and lists as pandas writes them
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                row[key] = parse(row[key])
                break
        else:
            if key not in NOT_TEXT:
                raise ValueError(f'wanted a list of messages in `{key}`')
    return parse_line(json.dumps(row, default=str).encode(), Row)

def parquet_lines(path):
    """Yield (place, row as a line of JSON) of a parquet file."""
    try:
        from pyarrow import parquet
    except ImportError:
        fail(f'{path}: wanted JSON or JSON lines ({", ".join(ENDINGS)}), or the package pyarrow, which reads parquet')
    n = 0
    next(read_lines(path), None) # is it there, and itself?
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for n, row in enumerate(batch.to_pylist(), n + 1):
                row = {key: value for key, value in row.items() if value == value} # pandas writes NaN for nothing
                yield f'{path}[{n - 1}]', json.dumps(row, default=str).encode()
    except (OSError, ValueError) as error:
        fail(f"{path}: wanted JSON or JSON lines, or parquet: {' '.join(str(error).split())[:200]}")

def read_rows(path, reasons=None):
    """Yield (place, row) of a file. A malformed row is None, and `reasons` gets {place: why}."""
    name, parse = str(path).removesuffix('.gz'), lambda line: parse_line(line, Row)
    if name.endswith('.csv'):
        places, parse = cells(path), parse_cells
    elif name.endswith('.parquet'):
        places = parquet_lines(path)
    elif next(filter(None, (line.strip(b'\xef\xbb\xbf \t\r\n') for _, line in read_lines(path))), b'')[:1] == b'[':
        try:
            rows = parse_json(b''.join(line for _, line in read_lines(path)), 'a JSON array of objects', Row)
        except ValueError as error:
            fail(f'{path}: {error}')
        places, parse = ((f'{path}[{i}]', row) for i, row in enumerate(rows)), check_row # counted from 0, as in JSON
    else:
        places = ((f'{path}:{n}', line) for n, line in read_lines(path) if line.strip())
    for place, row in places:
        try:
            row = parse(row)
        except (ValueError, RecursionError) as error:
            if reasons is not None:
                reasons[place] = error
            row = None
        yield place, row

def malformed(wanted):
    return ValueError(f'malformed row: wanted {wanted}')

def read(files, parse, join, counts):
    """Turn the rows of files into Items by join and parse. Those that give no valid record are left out."""
    reasons = {}

    def rows():
        for file in files:
            for place, row in read_rows(file, reasons):
                counts['read', str(file)].append(place)
                yield place, row

    items = []
    for place, row in join(rows()):
        try:
            if row is None:
                raise ValueError(f'malformed row: {reasons.pop(place)}')
            item = parse(row)
            for kind, records in item.records.items():
                for record in records:
                    check_record(record, kind)
        except ValueError as reason:
            word, _, why = str(reason).partition(': ')
            if word == 'malformed row' and why:
                counts['malformed', why].append(place)
                reason = word
            counts['left out', str(reason)].append(place)
            continue
        for reason in item.cut:
            counts['cut', reason].append(place)
        for key in sorted(unseen(row)):
            counts['key', key].append(place)
        item.place = place
        items.append(item)
    return items

# ---- prompts and answers ----------------------------------------------------------------------------------------

def clean(text):
    """Strip ASCII's white space around a text. Other scripts have their own, with a meaning."""
    if not isinstance(text, str):
        raise malformed(f"text, got {'nothing' if text is None else type(text).__name__}")
    return text.strip(' \t\r\n')

def as_prompt(messages):
    """Turn messages into a record's `prompt`. A user turn alone becomes a string."""
    messages = [{'role': m['role'], 'content': m['content']} for m in messages] # less weights
    return messages[0]['content'] if [m['role'] for m in messages] == ['user'] else messages

def preference(messages, chosen, rejected, **more):
    """Turn messages and two answers into an Item: comparison, demonstration, prompt."""
    prompt = as_prompt(messages)
    pair = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected} | more
    best = {'prompt': prompt, 'response': chosen}
    if 'ended' in more:
        check_record(pair, 'comparisons')
        best['ended'] = more['ended'][0]
    return Item(prompt, {'comparisons': [pair], 'demonstrations': [best], 'prompts': [{'prompt': prompt}]})

def end_of(answer):
    """Return {'ended': …} of a message or a row, {} where it says nothing."""
    return {} if answer.get('ended') is None else {'ended': answer['ended']}

def demonstrations(messages, start=0):
    """Return a demonstration of each answer from `start` on; one of `weight` 0 has none."""
    return [{'prompt': as_prompt(messages[:i]), 'response': m['content']} | end_of(m) for i, m in enumerate(messages)
            if i >= start and m['role'] == 'assistant' and 'weight' not in m]

def conversation(messages):
    """Turn messages into an Item of one demonstration and one prompt.

    Every answer is learnt; one of `weight` 0 is not, and the others are then demonstrations of their own. Answers
    before the first question and turns after the last answer are cut off. The rest has to alternate.
    """
    system = list(takewhile(lambda m: m['role'] == 'system', messages))
    turns, cut = messages[len(system):], []
    while turns and turns[0]['role'] == 'assistant':
        turns = turns[1:]
        cut.append('an answer before the first question')
    while turns and turns[-1]['role'] != 'assistant':
        turns = turns[:-1]
        cut.append('a turn after the last answer')
    if not turns:
        raise ValueError('no question with an answer')
    if any(m['role'] != ('user', 'assistant')[i % 2] for i, m in enumerate(turns)) or not all(
            m['content'].strip() for m in messages):
        raise ValueError('turns do not alternate, or one is empty')
    prompt, silent = as_prompt(system + turns[:-1]), sum(m['role'] == 'assistant' and 'weight' in m for m in turns)
    answers = [{'messages': as_prompt(system + turns)} | end_of(turns[-1])]
    if silent or isinstance(prompt, str):
        answers = demonstrations(system + turns)
    cut += ['an answer of weight 0'] * silent
    return Item(turns[0]['content'], {'demonstrations': answers, 'prompts': [{'prompt': prompt}]}, cut)

def ranks_of(scores):
    """Return ranks from scores, 0 = best, equal scores the same."""
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) for score in scores]

def rank_judged(items):
    """Add a ranking where answers to one prompt were judged differently."""
    groups = defaultdict(list) # prompt -> its items with a judged answer
    for item in items:
        if item.judged:
            groups[str(item.group)].append(item)
    for group in groups.values():
        answers, scores, ended = zip(*(item.judged for item in group))
        if len(set(scores)) > 1:
            group[0].records['rankings'] = [
                {'prompt': group[0].group, 'responses': list(answers), 'ranks': ranks_of(scores)}
                | ({} if all(ended) else {'ended': list(ended)})]
    return items

def n_user_turns(record):
    turns = record.get('messages') or record['prompt']
    return 1 if isinstance(turns, str) else sum(m['role'] == 'user' for m in turns)

# ---- splits and output ------------------------------------------------------------------------------------------

def split(items, held_out, cfg, counts):
    """Split items into train and val.

    Without held-out items a share val_fraction of the groups is val, chosen by a hash of the seed and the group. A
    group that alone holds more than this share of the items stays in train. With held-out items, their groups do not.
    """
    key = lambda item: hashlib.sha256(f'{cfg.seed} {item.group}'.encode()).digest() # groups in a fixed random order
    sizes = Counter(map(key, items))
    largest = max(cfg.val_fraction * len(items), min(sizes.values(), default=0))
    val_keys = [k for k in sorted(sizes) if sizes[k] <= largest][:max(1, round(cfg.val_fraction * len(sizes)))]
    val_keys = {*map(key, held_out)} or {*val_keys}
    train, val = [i for i in items if key(i) not in val_keys], [i for i in items if key(i) in val_keys]
    if held_out:
        counts['left out', 'prompt is in the test files too'] += [i.place for i in val]
    return {'train': train, 'val': held_out or val}

def places_of(counts, what):
    """Return {reason, file or key: places}, the most frequent first."""
    found = {name: places for (word, name), places in counts.items() if word == what and places}
    return dict(sorted(found.items(), key=lambda x: -len(x[1])))

def report(counts, n_kept, unit, known):
    """Print the counts."""
    files = {file: places for (word, file), places in counts.items() if word == 'read'} # in their order
    for file, places in files.items():
        wanted = next((f'; expected: {n}' for name, n in known.items() if file.endswith(name)), '')
        print(f'read     {len(places):6d}  rows of {file}{wanted}')
    for what in ('left out', 'cut'):
        for reason, places in places_of(counts, what).items():
            more = ', …' if len(places) > 3 else ''
            print(f"{what:8s} {len(places):6d}  {reason}\n{'':17s}{', '.join(places[:3])}{more}")
            for why, where in list(places_of(counts, 'malformed').items())[:3 * (reason == 'malformed row')]:
                print(f"{'':17s}{len(where)} {why} ({where[0]})")
    n_read = n_kept + sum(map(len, places_of(counts, 'left out').values()))
    print(f"kept     {n_kept:6d}  of {n_read} {unit} in {len(files)} file(s)")

def print_unread(keys):
    """Print the names of keys that nobody looked at, {key: the rows that have it}."""
    said = [f'{shown([key])} ({len(places)})' for key, places in keys.items()]
    print('keys not read: ' + (', '.join(said[:20]) or 'none') + f' and {len(said) - 20} more' * (len(said) > 20))

def write(files, out_dir):
    """Write {split: {kind: records}} as KIND_SPLIT.jsonl. Name those that an earlier run left there."""
    paths = {out_dir / f'{kind}_{name}.jsonl': records for name in files for kind, records in files[name].items()}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, records in paths.items():
            if records:
                write_records(path, records)
    except OSError as error:
        fail(f'--out_dir={out_dir}: cannot be written: {error.strerror}')
    old = sorted(path.name for path, records in paths.items() if not records and path.exists())
    print(f'written to {out_dir}' + (f"; there from an earlier run: {', '.join(old)}" if old else ''))

def prepare(cfg, parse, repo, names, folders=('',), unit='rows', known={}, join=iter):
    """Find, read, split and write a data set. Return {split: {kind: records}}.

    repo, names, folders: see find_files. known: {end of a file's path: its rows}. join: turns (place, row), … into
    what is parsed, each a `unit`. Each different prompt is written once.
    """
    counts = defaultdict(list)
    items, held_out = (rank_judged(read(files, parse, join, counts))
                       for files in find_files(cfg.source, repo, names, folders))
    splits = split(items, held_out, cfg, counts)
    report(counts, sum(map(len, splits.values())), unit, known)
    if not all(splits.values()):
        sizes = ' and '.join(f'{len(part)} for {name}' for name, part in splits.items())
        why = places_of(counts, 'left out') | places_of(counts, 'malformed')
        why = {reason: len(places) for reason, places in why.items() if reason != 'malformed row'}
        fail(f'--source={cfg.source}: wanted {unit} for both splits, got {sizes}'
             + ''.join(f'; {why[reason]} left out: {reason}' for reason in sorted(why, key=why.get)[-1:]))
    files = {}
    for name, part in splits.items():
        files[name] = {kind: [r for item in part for r in item.records.get(kind, [])] for kind in KINDS}
        files[name]['prompts'] = list({str(r['prompt']): r for r in files[name]['prompts']}.values())
    kinds = [kind for kind in KINDS if any(records[kind] for records in files.values())]
    print('split   ' + '   '.join(kinds) + f'   user turns in {kinds[0]} (mean, max)' * (kinds[0] != 'text'))
    for name, records in files.items():
        turns = [n_user_turns(r) for r in records[kinds[0]]] if kinds[0] != 'text' else []
        print(f'{name:5s}   ' + '   '.join(f'{len(records[kind]):{len(kind)}d}' for kind in kinds)
              + (f'   {sum(turns) / len(turns):.2f}, {max(turns)}' if turns else ''))
    write(files, Path(cfg.out_dir))
    print_unread(places_of(counts, 'key'))
    return files
