"""
What the prepare.py of every data set shares: its files, found on disk or fetched from the hub; their rows; a count of
what became of each; the split into train and val; and the records, written only once everything is known to be good.

A prepare.py turns a row into an Item (the records it gives) or raises ValueError with the reason why it gives none.
Nothing is dropped in silence: what is left out and what is cut is counted and printed under its reason, and the first
few are named by file and line. The same input and seed give the same files.
"""
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import fail, fetch_from_hub, require
from tokens import check_record, check_row, parse_json, parse_line, read_lines, write_records

KINDS = ('text', 'demonstrations', 'comparisons', 'rankings', 'unpaired', 'prompts')
ENDINGS = ('.jsonl', '.jsonl.gz', '.json', '.json.gz')


@dataclass
class Item:
    """What one row of a data set gives."""
    group: object # items of equal group, mostly those with one prompt, never stand in different splits
    records: dict # kind -> list of records
    cut: list = field(default_factory=list) # why parts of the row were dropped, one reason a part
    place: str = '' # FILE:LINE, set by `read`


@dataclass
class Counts:
    """How many rows were read, and under which reasons some were left out or cut: {reason: [FILE:LINE, …]}."""
    read: int = 0
    files: Counter = field(default_factory=Counter) # rows by file
    left_out: dict = field(default_factory=dict)
    cut: dict = field(default_factory=dict)

    def leave_out(self, reason, place):
        self.left_out.setdefault(str(reason), []).append(place)

    def cut_off(self, reason, place):
        self.cut.setdefault(reason, []).append(place)


def check_options(cfg):
    """The range checks that all prepare.py share."""
    require(cfg, val_fraction=(0 < cfg.val_fraction < 1, 'between 0 and 1'), seed=(cfg.seed >= 0, 'at least 0'),
            out_dir=(not cfg.source or Path(cfg.out_dir).resolve() != Path(cfg.source).resolve(),
                     'another folder than the source, or what is written would be read the next time'))

# -----------------------------------------------------------------------------
# files and rows


def find_files(source, repo, names, folders=('',)):
    """
    -> (files, held out files). source: a file, a folder (of which only `folders` are read, at any depth), or '' to
    fetch the files `names` of the data set `repo` from the hub. Where there are both train* and test* or val* files,
    the latter are held out, and others, which may repeat them, are named and not read; else all are of the first kind.
    """
    if source == '':
        files = [Path(fetch_from_hub(repo, name, repo_type='dataset')) for name in names]
    elif Path(source).is_file():
        files = [Path(source)]
    else:
        files = []
        for folder in (Path(source) / name for name in folders):
            if not folder.is_dir():
                fail(f'--source={source}: wanted a file ({", ".join(ENDINGS)}) or a folder that holds some, '
                     f'{folder} is neither')
            here = sorted(f for f in folder.rglob('*') if f.name.endswith(ENDINGS))
            if not here:
                fail(f'--source={source}: wanted a folder with {", ".join(ENDINGS)} files, found none in {folder}')
            files += here
    for file in files:
        if not file.name.endswith(ENDINGS) and file.suffix in ('.parquet', '.arrow', '.csv', '.zip'):
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
    """
    Yield (place, row) of a file of JSON lines, or of one that is a JSON array. row is None where there is no JSON
    object of whole characters; an array that is broken as a whole ends the program.
    """
    begin = next((line.strip() for _, line in read_lines(path) if line.strip(b'\xef\xbb\xbf \t\r\n')), b'')
    if begin.removeprefix(b'\xef\xbb\xbf').startswith(b'['):
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


def rows_of(files, counts):
    """Yield the (place, row) of all files; a malformed row is counted as left out."""
    for file in files:
        for place, row in read_rows(file):
            counts.files[str(file)] += 1
            if row is None:
                counts.read += 1
                counts.leave_out('malformed row', place)
            else:
                yield place, row


def read(rows, parse, counts):
    """(place, row), … -> the Items that parse(row) makes of them; what is no valid record is counted as left out."""
    items = []
    for place, row in rows:
        counts.read += 1
        try:
            item = parse(row)
            for kind, records in item.records.items():
                for record in records:
                    check_record(record, kind)
        except ValueError as reason:
            counts.leave_out(reason, place)
            continue
        for reason in item.cut:
            counts.cut_off(reason, place)
        item.place = place
        items.append(item)
    return items

# -----------------------------------------------------------------------------
# conversations


def clean(text):
    """Text without white space around it; only ASCII's, since scripts have their own, with a meaning of its own."""
    if not isinstance(text, str):
        raise ValueError('malformed row')
    return text.strip(' \t\r\n')


def as_prompt(messages):
    """Messages that end in a user's turn -> a record's `prompt`: a lone user turn is a plain string."""
    return messages[0]['content'] if [m['role'] for m in messages] == ['user'] else messages


def conversation(messages):
    """
    Messages -> an Item: a demonstration of every answer, and as prompt all that comes before the last one. Answers
    before the first question and turns after the last answer are cut off; ValueError where the rest does not alternate.
    """
    n_system = next((i for i, m in enumerate(messages) if m['role'] != 'system'), len(messages))
    system, turns, cut = messages[:n_system], messages[n_system:], []
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
    messages = system + turns
    prompt = as_prompt(messages[:-1])
    if isinstance(prompt, str):
        demonstration = {'prompt': prompt, 'response': messages[-1]['content']}
    else:
        demonstration = {'messages': messages}
    return Item(turns[0]['content'], {'demonstrations': [demonstration], 'prompts': [{'prompt': prompt}]}, cut)


def n_user_turns(record):
    turns = record.get('messages', record.get('prompt'))
    return 1 if isinstance(turns, str) else sum(m['role'] == 'user' for m in turns)

# -----------------------------------------------------------------------------
# splits and output


def split(items, held_out, cfg, counts):
    """
    -> (train, val). Without held out items a share val_fraction of the different groups is val, chosen by a hash
    of the seed and the group; a group that alone holds more than this share of the items stays in train. With held
    out items, those of train that share a group with one of them are left out.
    """
    def key(item): # groups in a fixed random order; equal groups have equal keys
        return hashlib.sha256(f'{cfg.seed} {item.group}'.encode()).digest()

    if held_out:
        val_keys = {key(item) for item in held_out}
        for item in items:
            if key(item) in val_keys:
                counts.leave_out('prompt is in the test files too', item.place)
        return [item for item in items if key(item) not in val_keys], held_out
    sizes = Counter(map(key, items))
    largest = max(cfg.val_fraction * len(items), min(sizes.values(), default=0))
    val_keys = [k for k in sorted(sizes) if sizes[k] <= largest][:max(1, round(cfg.val_fraction * len(sizes)))]
    val_keys = set(val_keys)
    return [i for i in items if key(i) not in val_keys], [i for i in items if key(i) in val_keys]


def report(counts, n_kept, unit, known):
    """Print what was read, left out, cut and kept. known: {end of a file's path: the rows that one should see}."""
    for file, n in counts.files.items():
        wanted = next((f'; one should see {n_known}' for name, n_known in known.items() if file.endswith(name)), '')
        print(f'read     {n:6d}  rows of {file}{wanted}')
    for word, reasons in (('left out', counts.left_out), ('cut     ', counts.cut)):
        for reason, places in sorted(reasons.items(), key=lambda x: -len(x[1])):
            more = ', …' if len(places) > 3 else ''
            print(f"{word} {len(places):6d}  {reason}\n{'':17s}{', '.join(places[:3])}{more}")
    print(f'kept     {n_kept:6d}  of {counts.read} {unit} in {len(counts.files)} file(s)')


def write_splits(items, held_out, cfg, counts, unit='rows', known={}):
    """
    The last step of every prepare.py: split the items, print the counts, write KIND_SPLIT.jsonl for the kinds there
    are. Each different prompt is written once. Returns {split: {kind: records}}.
    """
    splits = dict(zip(('train', 'val'), split(items, held_out, cfg, counts)))
    report(counts, sum(map(len, splits.values())), unit, known)
    if not all(splits.values()):
        sizes = ' and '.join(f'{len(part)} for {name}' for name, part in splits.items())
        fail(f'--source={cfg.source}: wanted {unit} for both splits, got {sizes}')
    files = {name: {kind: [] for kind in KINDS} for name in splits}
    for name, part in splits.items():
        for item in part:
            for kind, records in item.records.items():
                files[name][kind] += records
        files[name]['prompts'] = list({str(r['prompt']): r for r in files[name]['prompts']}.values())
    kinds = [kind for kind in KINDS if any(files[name][kind] for name in files)]

    out_dir, main_kind = Path(cfg.out_dir), kinds[0]
    print('split   ' + '   '.join(kinds) + f'   user turns in {main_kind} (mean, max)' * (main_kind != 'text'))
    for name, records in files.items():
        line = f'{name:5s}   ' + '   '.join(f'{len(records[kind]):{len(kind)}d}' for kind in kinds)
        turns = [n_user_turns(r) for r in records[main_kind]] if main_kind != 'text' else []
        print(line + (f'   {sum(turns) / len(turns):.2f}, {max(turns)}' if turns else ''))
    written = []
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in files:
            for kind in kinds:
                if files[name][kind]:
                    write_records(out_dir / f'{kind}_{name}.jsonl', files[name][kind])
                    written.append(f'{kind}_{name}.jsonl')
    except OSError as error:
        fail(f'--out_dir={out_dir}: cannot be written: {error.strerror}')
    old = sorted(f'{kind}_{name}.jsonl' for kind in KINDS for name in files
                 if f'{kind}_{name}.jsonl' not in written and (out_dir / f'{kind}_{name}.jsonl').exists())
    print(f'written to {out_dir}' + (f"; there from an earlier run: {', '.join(old)}" if old else ''))
    return files
