"""Read and write records: JSON lines, one kind a file.

Bad input ends the program with one line, "FILE:LINE: wanted …". Every record is checked. Files are written whole or not
at all. docs/data.md lists the kinds and their keys.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter

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
    """Hold a lock file for as long as this process lives; fail where another process holds it.

    The kernel lets go of it, however the process ends. Windows and some network disks have no such locks.
    """
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
        pass # open() fails where nothing can be written: whoever writes says so

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

def check_record(row, kind):
    """Raise ValueError where a record breaks its kind (docs/data.md); extra keys are welcome."""
    needs = {'text': ['text'], 'demonstrations': ['prompt', 'response'], 'prompts': ['prompt'],
             'comparisons': ['prompt', 'chosen', 'rejected'], 'rankings': ['prompt', 'responses', 'ranks'],
             'unpaired': ['prompt', 'response', 'label']}[kind]
    for key in ('label', 'kto_tag') if kind == 'demonstrations' else ():
        check(f'demonstrations, got a bad answer (`{key}` is {json.dumps(row.get(key))}); kto.py learns from those, '
              'data/trl/prepare.py makes its records', truth(row.get(key)) is not False)
    if 'ended' in row and kind in ('demonstrations', 'unpaired'):
        check('`ended` to be true or false', isinstance(row['ended'], bool))
    if kind == 'demonstrations' and 'messages' in row:
        return check_messages('messages', row['messages'], last='assistant')
    for key in needs:
        check(f'a row of kind {kind} to have `{key}` (data/trl/prepare.py reads other formats)', key in row)
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
        check('`margin` to be a number below 1e38', is_number(row['margin']))
    if kind == 'comparisons' and 'scores' in row:
        check('`scores` to be two numbers, of chosen and rejected', isinstance(row['scores'], list)
              and len(row['scores']) == 2 and all(map(is_number, row['scores'])))
    if 'ended' in row and kind in ('comparisons', 'rankings'):
        n = 2 if kind == 'comparisons' else len(row['responses']) if isinstance(row['responses'], list) else 0
        check(f'`ended` to be {n} times true or false, one an answer', isinstance(row['ended'], list)
              and len(row['ended']) == n and all(isinstance(ended, bool) for ended in row['ended']))
    if kind == 'rankings':
        responses, ranks, scores = row['responses'], row['ranks'], row.get('scores')
        check('`responses` to be a list of two texts or more, none empty',
              isinstance(responses, list) and len(responses) > 1 and all(map(is_text, responses)))
        check(f'`ranks` to be {len(responses)} integers, one a response, 0 = best, below 2^31', isinstance(ranks, list)
              and len(ranks) == len(responses) and all(type(r) is int and 0 <= r < 2**31 for r in ranks))
        check(f'`scores` to be {len(responses)} numbers, one a response', scores is None or isinstance(scores, list)
              and len(scores) == len(responses) and all(map(is_number, scores)))

TELLING = ('system', 'history', 'weight', 'rejected_response', 'margin') # keys that say what is to be learnt

def read_records(path, kind):
    """Read and check the records of a .jsonl or .jsonl.gz file.

    kind: "text", "demonstrations", "comparisons", "rankings", "unpaired" or "prompts". A .txt file is one text. The
    first bad record ends the program with its line.
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
        unread.update(key for key in TELLING if row.get(key) not in (None, '', []))
    if not rows:
        fail(f'{path}: wanted rows of kind {kind}, got a file without rows')
    unread.pop('margin' if kind == 'comparisons' else '', 0) # it is read there
    for key, n in unread.items():
        note(f'{path}: `{key}` is not read in {kind} ({n} of {len(rows)} rows); data/trl/prepare.py may read it')
    return rows

def first_row(path):
    """Return a file's first record, {} where it is broken: read_records then reports it."""
    line = next((line for _, line in read_lines(path) if line.strip()), b'{}')
    try:
        return parse_line(line)
    except ValueError:
        return {}

def is_text_file(path):
    """Tell whether a file holds plain text (.txt, or records with `text`) and not demonstrations."""
    if str(path).endswith(('.txt', '.txt.gz')):
        return True
    return 'text' in first_row(path)

def kind_of(path):
    """Tell the kind of a file by its first record; a broken one passes as "prompts"."""
    if is_text_file(path):
        return 'text'
    row = first_row(path)
    keys = set(row)
    if isinstance(row.get('label'), bool):
        return 'unpaired'
    for kind, own in (('demonstrations', {'messages', 'response'}), ('comparisons', {'chosen', 'rejected'}),
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

def read_preferences(path):
    """Read rankings or comparisons as rankings: a comparison ranks two answers; its margin stays.

    Comparisons of a text with itself are left out: they teach nothing.
    """
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

def goodness(record, use_scores=False):
    """Return how good a ranking's answers are, (K,), larger = better: -rank, or the scores if any."""
    return record['scores'] if use_scores and record.get('scores') else [-rank for rank in record['ranks']]

def files_of(paths):
    """Return the files that an option names, separated by commas; one whose own name holds a comma is one."""
    return [paths] if os.path.exists(paths) else str(paths).split(',')

def read_ranked(path, use_scores=False, name=''):
    """Read preferences without the records whose answers all tie: they teach nothing.

    path: one file, or several of one kind, separated by commas. use_scores: see goodness. name: what to call them.
    """
    records = [r for file in files_of(path) for r in read_preferences(file)]
    if len({'chosen' in r for r in records}) > 1:
        fail(f'{path}: wanted files of one kind, rankings or comparisons')
    ranked = [r for r in records if len(set(goodness(r, use_scores))) > 1]
    if not ranked:
        fail(f'{path}: all answers of every prompt tie; wanted some that are ranked above others')
    if len(ranked) < len(records):
        note(f'{name or path}: {len(records) - len(ranked)} of {len(records)} prompts left out, all their answers tie')
    return ranked

def read_unpaired(path, name=''):
    """Read unpaired records, or take rankings or comparisons apart. name: what to call them.

    An answer that beats more of the prompt's other answers than beat it is good. One that is beaten by more is bad. One
    in the middle is left out.
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
