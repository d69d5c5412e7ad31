"""Read and write records: JSON lines, one kind a file.

Every record is checked; bad input ends the program with "FILE:LINE: wanted …". docs/data.md lists the kinds and keys.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter
from statistics import fmean

from common.options import fail, note

def write_atomic(path, text):
    """Write a text file whole or not at all, even when killed."""
    try:
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno()) # or a power cut could leave the new name on an empty file
        os.replace(path + '.tmp', path)
    except OSError: # make room on a full disk
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise

LOCKS = {} # {path: the open file that holds its lock}

def lock(path):
    """Hold a lock file until this process ends, however it does; fail where another process holds it."""
    path = os.path.realpath(path)
    with contextlib.suppress(KeyError, OSError): # somebody may have removed the folder, and another run made it anew
        if os.path.samestat(os.stat(path), os.fstat(LOCKS[path].fileno())):
            return
    try:
        import fcntl # not on Windows
        LOCKS[path] = open(path, 'w')
        fcntl.flock(LOCKS[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        LOCKS.pop(path).close()
        fail(f"{os.path.dirname(path)}: another process is writing here ({os.path.basename(path)} is locked); wanted "
             "another place, or that one ended")
    except (ImportError, OSError):
        pass # Windows and some network disks have no locks; where nothing can be written, whoever writes says so

def read_json(path, wanted='a JSON object'):
    """Return the JSON object in a file as a dict; a failure ends the program, naming `wanted`."""
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except OSError as e:
        fail(f"{path}: {e.strerror}; wanted {wanted}")
    except (ValueError, RecursionError) as e: # the latter of brackets nested too deeply
        fail(f"{path}: not JSON ({e})")
    if not isinstance(value, dict):
        fail(f"{path}: not {wanted}")
    return value

def read_lines(path):
    """Yield (line number, line as bytes) of a file or a .gz; a failure ends the program."""
    n = 0
    try:
        with open(path, 'rb') as raw:
            begin = raw.peek(40)
            if begin.startswith(b'version https://git-lfs'):
                fail(f'{path}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it')
            if begin.startswith((b'\xff\xfe', b'\xfe\xff')):
                fail(f'{path}: wanted UTF-8 text, got UTF-16')
            for n, line in enumerate(gzip.open(raw) if str(path).endswith('.gz') else raw, 1):
                yield n, line
    except FileNotFoundError:
        fail(f'{path}: no such file')
    except (OSError, EOFError, zlib.error) as error:
        fail(f'{path}:{n + 1}: cannot be read: {error}')

def parse_json(data, wanted, hook=None):
    """Parse bytes to a JSON value; ValueError names `wanted`. hook: makes something else of each object."""
    def no_constant(name):
        raise ValueError(f'wanted a finite number, got {name}')
    try:
        return json.loads(data.decode('utf-8-sig'), parse_constant=no_constant, object_hook=hook)
    except UnicodeDecodeError:
        raise ValueError('wanted UTF-8 text')
    except json.JSONDecodeError as error:
        line = f'line {error.lineno}, ' if error.lineno > 1 else ''
        raise ValueError(f'wanted {wanted}: {error.msg} at {line}column {error.colno}')
    except RecursionError:
        raise ValueError(f'wanted {wanted}, got one nested too deeply')

def check_row(row):
    """Check that a JSON value is an object of whole characters; else raise ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f'wanted a JSON object, got {type(row).__name__}')
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode() # an escape like \ud83d alone is half a character
    except UnicodeEncodeError:
        raise ValueError('wanted whole characters, got half of a surrogate pair')
    except ValueError:
        raise ValueError('wanted finite numbers, got one like 1e999')
    return row

def parse_line(line, hook=None):
    """Parse a line of bytes to its JSON object, or raise ValueError."""
    return check_row(parse_json(line.rstrip(), 'one JSON object a line', hook))

def check(wanted, ok):
    """Raise ValueError, naming `wanted`, unless ok."""
    if not ok:
        raise ValueError(f'wanted {wanted}')

def is_text(x):
    return isinstance(x, str) and x.strip() != ''

def is_number(x):
    return type(x) in (int, float) and abs(x) < 1e38 # a bool is no number, and float32 holds no larger one

def truth(label):
    """Return True or False for a label that says so; others as they are."""
    words = {'true': True, '1': True, 'false': False, '0': False}
    return words.get(str(label).strip().lower().removesuffix('.0'), label)

def check_messages(key, messages, last):
    check(f'`{key}` to be a list of messages, at least one', isinstance(messages, list) and len(messages) > 0)
    for m in messages:
        check(f'every message of `{key}` to have `role` (user, assistant or system) and `content`',
              isinstance(m, dict) and m.get('role') in ('user', 'assistant', 'system'))
        check(f'every `content` of `{key}` to be text that is not empty', is_text(m.get('content')))
        check(f'no `weight` of 0 in `{key}`, every answer is learnt; data/trl/prepare.py leaves such answers out',
              last == 'user' or m.get('weight') != 0)
    check(f'`{key}` to end in the turn of the {last}', messages[-1]['role'] == last)

QUALITIES = 'helpful', 'harmless', 'honest', 'score' # what a rating may give a number for

KINDS = { # the keys that a record of each kind needs, and those that are checked where it has them
    'text': ('text', ''), 'prompts': ('prompt', ''), 'unpaired': ('prompt response label', 'ended'),
    'demonstrations': ('prompt response', 'ended'), 'ratings': ('prompt response', 'ended'),
    'rankings': ('prompt responses ranks', 'scores ended'),
    'comparisons': ('prompt chosen rejected', 'margin scores ended')}

def check_record(row, kind):
    """Raise ValueError where a record breaks its kind (docs/data.md); extra keys are welcome."""
    needs, optional = map(str.split, KINDS[kind])
    for key in ('label', 'kto_tag') if kind == 'demonstrations' else ():
        check(f'demonstrations, got a bad answer (`{key}` is {json.dumps(row.get(key))}); kto.py learns from those, '
              'data/trl/prepare.py makes its records', truth(row.get(key)) is not False)
    if kind == 'demonstrations' and 'messages' in row:
        needs = []
        check_messages('messages', row['messages'], last='assistant')
    for key in needs:
        check(f'a row of kind {kind} to have `{key}` (data/trl/prepare.py reads other formats)', key in row)
    n = dict(comparisons=2, rankings=len(row['responses']) if type(row.get('responses')) is list else 0).get(kind, 0)
    is_bool, is_rank = lambda x: type(x) is bool, lambda x: type(x) is int and 0 <= x < 2**31
    each = lambda good, x: isinstance(x, list) and len(x) == n and all(map(good, x))
    wishes = dict( # key: (what it has to be, a function that tells)
        dict.fromkeys(('text', 'response', 'chosen', 'rejected'), ('text that is not empty', is_text)),
        prompt=('text that is not empty, or a list of messages', lambda x: isinstance(x, list) or is_text(x)),
        responses=('a list of two texts or more, none empty', lambda x: n > 1 and each(is_text, x)),
        ranks=(f'{n} integers, one a response, 0 = best, below 2^31', lambda x: each(is_rank, x)),
        scores=(f"{'two' if kind == 'comparisons' else n} numbers, one an answer",
                lambda x: x is None and kind == 'rankings' or each(is_number, x)),
        label=('true (a good answer) or false', is_bool), margin=('a number below 1e38', is_number),
        ended=(f'{n} times true or false', lambda x: each(is_bool, x)) if n else ('true or false', is_bool))
    for key in (key for key in needs + optional if key in row):
        wish, holds = wishes[key]
        check(f'`{key}` to be {wish}', holds(row[key]))
    if 'prompt' in needs and isinstance(row['prompt'], list):
        check_messages('prompt', row['prompt'], last='user')
    if kind == 'ratings':
        numbers = [row[quality] for quality in QUALITIES if quality in row]
        check(f"numbers below 1e38 for one or more of {', '.join(QUALITIES)}", numbers and all(map(is_number, numbers)))

TELLING = ('system', 'history', 'weight', 'rejected_response', 'margin') # keys that say what is to be learnt

def read_records(path, kind):
    """Read and check the records of a .jsonl or .jsonl.gz file; a .txt file is one text. kind: see KINDS."""
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
    rows, unread = [], Counter()
    for n, line in read_lines(path):
        if not line.strip():
            continue # an empty line, often the last
        try:
            row = parse_line(line)
            check_record(row, kind)
        except ValueError as error:
            fail(f'{path}:{n}: {error}' + '; data/trl/prepare.py reads arrays, CSV and parquet' * (
                not rows and (line.lstrip().startswith(b'[') or str(path).endswith(('.csv', '.parquet')))))
        rows.append(row)
        unread.update(key for key in TELLING if key not in KINDS[kind][1] and row.get(key) not in (None, '', []))
    if not rows:
        fail(f'{path}: wanted rows of kind {kind}, got a file without rows')
    for key, n in unread.items():
        note(f'{path}: `{key}` is not read in {kind} ({n} of {len(rows)} rows); data/trl/prepare.py may read it')
    return rows

def first_row(path):
    """Return a file's first record, {} where it is broken: read_records then reports it."""
    line = next((line for _, line in read_lines(path) if line.strip()), b'{}')
    with contextlib.suppress(ValueError):
        return parse_line(line)
    return {}

def is_text_file(path):
    """Tell whether a file holds plain text (.txt, or records with `text`) and not demonstrations."""
    return str(path).endswith(('.txt', '.txt.gz')) or 'text' in first_row(path)

def to_lines(rows):
    return ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)

def write_records(path, rows):
    write_atomic(str(path), to_lines(rows))

def read_preferences(path):
    """Read rankings or comparisons as rankings; a comparison of a text with itself teaches nothing and is left out."""
    keys = first_row(path).keys()
    if keys and not {'chosen', 'rejected', 'responses', 'ranks'} & keys:
        fail(f"{path}: wanted rankings (`prompt`, `responses`, `ranks`) or comparisons (`prompt`, `chosen`, "
             f"`rejected`), got a first row with the keys {', '.join(sorted(keys))}")
    if not {'chosen', 'rejected'} & keys:
        return read_records(path, 'rankings')
    rows = read_records(path, 'comparisons')
    kept = [r | {'responses': [r['chosen'], r['rejected']], 'ranks': [0, 1]} for r in rows
            if r['chosen'] != r['rejected'] or len(set(r.get('ended', [True]))) > 1]
    if len(kept) < len(rows):
        note(f'{path}: {len(rows) - len(kept)} of {len(rows)} comparisons left out, their two texts are equal')
    if not kept:
        fail(f'{path}: wanted comparisons of two different texts, found none')
    return kept

def read_ratings(files):
    """Read ratings as rankings: per prompt the answers' `ratings`, and the ranks that these imply.

    An answer's rating is the mean over its raters (`rated`) of the mean over the qualities.
    """
    rows, prompts = [row for file in files for row in read_records(file, 'ratings')], {}
    kinds = {' and '.join(quality for quality in QUALITIES if quality in row) for row in rows}
    if len(kinds) > 1:
        fail(f"{files[0]}: wanted the same qualities in every rating, got {', but '.join(sorted(kinds))}")
    for row in rows: # prompts: {prompt: {(response, ended): [a number per rater]}}
        answer, answers = (row['response'], row.get('ended', True)), prompts.setdefault(json.dumps(row['prompt']), {})
        answers.setdefault(answer, []).append(fmean(row[quality] for quality in QUALITIES if quality in row))
    rankings = []
    for prompt, answers in prompts.items():
        ratings = [round(fmean(said), 6) for said in answers.values()] # equal ones tie
        ranking = dict(ratings=ratings, ranks=[sum(y > x for y in ratings) for x in ratings], rated=[*answers.values()])
        ranking['responses'], ranking['ended'] = map(list, zip(*answers))
        rankings.append(dict(prompt=json.loads(prompt)) | ranking)
    return rankings

def goodness(record, use_scores=False):
    """Return how good a ranking's answers are, (K,), larger = better: -rank, or the scores if any."""
    return record['scores'] if use_scores and record.get('scores') else [-rank for rank in record['ranks']]

def files_of(paths):
    """Return the files that an option names, separated by commas; one whose own name holds a comma is one."""
    return [paths] if os.path.exists(paths) else str(paths).split(',')

def read_ranked(path, use_scores=False, name='', ties=False):
    """Read preferences, or the pairs that ratings imply; without ties no records whose answers all tie.

    path: one file, or several of one kind, separated by commas. use_scores: see goodness. name: what to call them.
    """
    files = files_of(path)
    rated = 'response' in (row := first_row(files[0])) and {*QUALITIES} & row.keys()
    records = read_ratings(files) if rated else [r for file in files for r in read_preferences(file)]
    if len({'chosen' in r for r in records}) > 1:
        fail(f'{path}: wanted files of one kind, rankings or comparisons')
    ranked = [r for r in records if ties or len(set(goodness(r, use_scores))) > 1]
    if not ranked:
        fail(f'{path}: all answers of every prompt tie; wanted some that are ranked above others')
    if len(ranked) < len(records):
        note(f'{name or path}: {len(records) - len(ranked)} of {len(records)} prompts left out, all their answers tie')
    return ranked

def read_unpaired(path, name=''):
    """Read unpaired records, or take rankings or comparisons apart. name: what to call them.

    An answer that beats more of the prompt's others than beat it is good, one that is beaten by more is bad.
    """
    if not {'chosen', 'rejected', 'responses'} & first_row(path).keys():
        return read_records(path, 'unpaired')
    rows, n = [], 0
    for r in read_preferences(path):
        n += len(r['ranks'])
        for response, rank, ended in zip(r['responses'], r['ranks'], r.get('ended') or [True] * len(r['ranks'])):
            lead = sum((rank < other) - (rank > other) for other in r['ranks']) # wins less losses
            if lead:
                rows.append({'prompt': r['prompt'], 'response': response, 'label': lead > 0, 'ended': ended})
    if len(rows) < n:
        note(f'{name or path}: {n - len(rows)} of {n} answers left out, as many others beat them as they beat')
    return rows
