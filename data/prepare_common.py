"""Prepare a data set: find files, read and count rows, split, write.

A prepare.py turns a row into an Item (the records it gives) or raises ValueError with the reason why it gives none.
`counts` says what happened to rows: {('read', file) or ('left out', reason) or ('cut', reason): places}, a place being
FILE:LINE. Records are written as KIND_train.jsonl and KIND_val.jsonl, once everything is known to be good. The same
input and seed give the same files.
"""

import hashlib
import http.client
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from common.options import fail, require
from common.records import check_record, check_row, parse_json, parse_line, read_lines, write_records
from common.weights import fetch_from_hub

KINDS = ('text', 'demonstrations', 'comparisons', 'rankings', 'unpaired', 'prompts')
ENDINGS = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')

@dataclass
class Item:
    """Hold the records that one row of a data set gives."""
    group: object # items of equal group, mostly those with one prompt, are never in different splits
    records: dict # kind -> list of records
    cut: tuple = () # why parts of the row were dropped, one reason a part
    place: str = '' # FILE:LINE, set by `read`

@dataclass
class PrepareOptions:
    """Say what is read and how it is split. A prepare.py adds `out_dir` and its own."""
    source: str = '' # a file (.json, .jsonl, also .gz) or a folder that holds some; empty = from the hub
    val_fraction: float = 0.05 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        require(self, val_fraction=(0 < self.val_fraction < 1, 'between 0 and 1'), seed=(self.seed >= 0, 'at least 0'),
                out_dir=(not self.source or Path(self.out_dir).resolve() != Path(self.source).resolve(),
                         'another folder than the source, or the next run would read its own output'))

# ---- files and rows ---------------------------------------------------------------------------------------------

def fetch(url):
    """Fetch a text over https. A failure ends the program with one line."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read().decode()
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
        if file.suffix in ('.parquet', '.arrow', '.csv', '.zip'):
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

def read_rows(path):
    """Yield (place, row) of a file, JSON lines or an array. A malformed row is None."""
    begin = next(filter(None, (line.strip(b'\xef\xbb\xbf \t\r\n') for _, line in read_lines(path))), b'') # no BOM
    if begin.startswith(b'['):
        try:
            rows = parse_json(b''.join(line for _, line in read_lines(path)), 'a JSON array of objects')
        except ValueError as error:
            fail(f'{path}: {error}')
        places, parse = ((f'{path}[{i}]', row) for i, row in enumerate(rows)), check_row # counted from 0, as in JSON
    else:
        places, parse = ((f'{path}:{n}', line) for n, line in read_lines(path) if line.strip()), parse_line
    for place, row in places:
        try:
            row = parse(row)
        except ValueError:
            row = None
        yield place, row

def read(files, parse, join, counts):
    """Turn the rows of files into Items by join and parse. Those that give no valid record are left out."""
    def rows():
        for file in files:
            for place, row in read_rows(file):
                counts['read', str(file)].append(place)
                yield place, row

    items = []
    for place, row in join(rows()):
        try:
            if row is None:
                raise ValueError('malformed row')
            item = parse(row)
            for kind, records in item.records.items():
                for record in records:
                    check_record(record, kind)
        except ValueError as reason:
            counts['left out', str(reason)].append(place)
            continue
        for reason in item.cut:
            counts['cut', reason].append(place)
        item.place = place
        items.append(item)
    return items

# ---- prompts and answers ----------------------------------------------------------------------------------------

def clean(text):
    """Strip ASCII's white space around a text. Other scripts have their own, with a meaning."""
    if not isinstance(text, str):
        raise ValueError('malformed row')
    return text.strip(' \t\r\n')

def as_prompt(messages):
    """Turn messages into a record's `prompt`. A user turn alone becomes a string."""
    return messages[0]['content'] if [m['role'] for m in messages] == ['user'] else messages

def preference(messages, chosen, rejected, **more):
    """Turn messages and two answers into an Item: comparison, demonstration, prompt."""
    prompt = as_prompt(messages)
    return Item(prompt, {'comparisons': [{'prompt': prompt, 'chosen': chosen, 'rejected': rejected} | more],
                         'demonstrations': [{'prompt': prompt, 'response': chosen}], 'prompts': [{'prompt': prompt}]})

def conversation(messages):
    """Turn messages into an Item of one demonstration and one prompt.

    Every answer is learnt. Answers before the first question and turns after the last answer are cut off. The rest has
    to alternate.
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
    prompt = as_prompt(system + turns[:-1])
    demonstration = {'messages': system + turns}
    if isinstance(prompt, str):
        demonstration = {'prompt': prompt, 'response': turns[-1]['content']}
    return Item(turns[0]['content'], {'demonstrations': [demonstration], 'prompts': [{'prompt': prompt}]}, cut)

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

def report(counts, n_kept, unit, known):
    """Print the counts."""
    of = lambda what: {reason: places for (word, reason), places in counts.items() if word == what and places}
    for file, places in of('read').items():
        wanted = next((f'; expected: {n}' for name, n in known.items() if file.endswith(name)), '')
        print(f'read     {len(places):6d}  rows of {file}{wanted}')
    for what in ('left out', 'cut'):
        for reason, places in sorted(of(what).items(), key=lambda x: -len(x[1])):
            more = ', …' if len(places) > 3 else ''
            print(f"{what:8s} {len(places):6d}  {reason}\n{'':17s}{', '.join(places[:3])}{more}")
    n_read = n_kept + sum(map(len, of('left out').values()))
    print(f"kept     {n_kept:6d}  of {n_read} {unit} in {len(of('read'))} file(s)")

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

def prepare(cfg, parse, repo, names, folders=('',), unit='rows', known={}, join=iter, finish=list):
    """Find, read, split and write a data set. Return {split: {kind: records}}.

    repo, names, folders: see find_files. known: {end of a file's path: its rows}. join: turns (place, row), … into
    what is parsed, each a `unit`. finish: changes the Items of train or val. Each different prompt is written once.
    """
    counts = defaultdict(list)
    items, held_out = (finish(read(files, parse, join, counts))
                       for files in find_files(cfg.source, repo, names, folders))
    splits = split(items, held_out, cfg, counts)
    report(counts, sum(map(len, splits.values())), unit, known)
    if not all(splits.values()):
        sizes = ' and '.join(f'{len(part)} for {name}' for name, part in splits.items())
        fail(f'--source={cfg.source}: wanted {unit} for both splits, got {sizes}')
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
    return files
