r"""
Real human preferences: Anthropic's HH-RLHF (Bai et al. 2022, https://arxiv.org/abs/2204.05862, MIT licence).

Each row of the .jsonl.gz files of https://huggingface.co/datasets/Anthropic/hh-rlhf is {"chosen", "rejected"}, two
whole transcripts "\n\nHuman: …\n\nAssistant: …" that should differ in the last answer alone. What comes before that
answer is the prompt. A row that is otherwise is left out, counted under its reason, and the first few are named by file
and line.

    $ python data/hh_rlhf/prepare.py --source=hh-rlhf/harmless-base
    $ python data/hh_rlhf/prepare.py --source=hh-rlhf-harmless-base-2000.jsonl.gz --out_dir=/tmp/hh

writes demonstrations (the chosen answers), comparisons and prompts (each different one once), each as _train.jsonl and
_val.jsonl. Where a folder holds train*.jsonl.gz and test*.jsonl.gz, the test files are val; otherwise a share of the
prompts is. One prompt's rows never stand in both splits.

The counts one should see for hh-rlhf-harmless-base-2000.jsonl.gz, 2000 rows of harmless-base's test file:

    left out 30 with a role tag inside an answer, 4 with an empty answer, 4 whose turns do not alternate, 4 whose
    prompts differ; kept 1958
    split   comparisons   demonstrations   prompts   user turns (mean, max)   shorter wins
    train          1761             1761      1760                2.49,  18          55.7%
    val             197              197       196                2.56,  11          48.7%
"""
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import fail, launch, require
from tokens import parse_line, read_lines, write_records


@dataclass
class Config:
    source: str = '' # a .jsonl.gz (or .jsonl) file of HH-RLHF, or a folder that holds some, at any depth
    out_dir: str = 'data/hh_rlhf' # where the records go
    val_fraction: float = 0.1 # share of the different prompts that makes val, where there are no test files
    seed: int = 1337 # which prompts these are

    def __post_init__(self):
        require(self, source=(self.source != '', 'a .jsonl.gz file of HH-RLHF or a folder that holds some'),
                val_fraction=(0 < self.val_fraction < 1, 'between 0 and 1'))


def parse_prompt(text):
    r"""'\n\nHuman: a\n\nAssistant: b\n\nHuman: c' -> messages; None unless turns alternate, user first and last."""
    before, *turns = re.split(r'\n\n(Human|Assistant):', text) # "", "Human", " a", "Assistant", " b", "Human", " c"
    roles, contents = turns[::2], [content.strip() for content in turns[1::2]]
    if before.strip() or len(roles) % 2 == 0 or not all(contents):
        return None
    if any(role != ('Human', 'Assistant')[i % 2] for i, role in enumerate(roles)):
        return None
    return [{'role': 'user' if role == 'Human' else 'assistant', 'content': content}
            for role, content in zip(roles, contents)]


def parse_row(row):
    """A row of HH-RLHF -> a comparison record; ValueError says why there is none."""
    if not all(isinstance(row.get(key), str) for key in ('chosen', 'rejected')):
        raise ValueError('malformed row')
    prompt, tag, chosen = row['chosen'].rpartition('\n\nAssistant:') # the answer follows the last tag
    other_prompt, other_tag, rejected = row['rejected'].rpartition('\n\nAssistant:')
    if not tag or not other_tag:
        raise ValueError('malformed row')
    if prompt != other_prompt:
        raise ValueError('prompts of chosen and rejected differ')
    chosen, rejected = chosen.strip(), rejected.strip()
    if not chosen or not rejected:
        raise ValueError('chosen or rejected is empty')
    if re.search(r'\b(Human|Assistant):', chosen + '\n' + rejected):
        raise ValueError('role tag inside an answer')
    if chosen == rejected:
        raise ValueError('chosen equals rejected')
    messages = parse_prompt(prompt)
    if messages is None:
        raise ValueError('turns do not alternate, or one is empty')
    prompt = messages if len(messages) > 1 else messages[0]['content'] # one user turn is a plain string
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def find_files(source):
    """A file or folder -> (files, test files); without both train and test files all are of the first kind."""
    if source.is_file():
        return [source], []
    if not source.is_dir():
        fail(f'--source={source}: wanted a .jsonl.gz file of HH-RLHF or a folder that holds some')
    files = sorted(f for f in source.rglob('*') if f.name.endswith(('.jsonl.gz', '.jsonl')))
    train, test = ([f for f in files if f.name.startswith(name)] for name in ('train', 'test'))
    if train and test:
        return train, test
    if not files:
        fail(f'--source={source}: wanted a folder with .jsonl.gz files, found none')
    return files, []


def read(files, left_out):
    """Files -> comparison records; left_out {reason: [FILE:LINE, …]} grows by what is not one."""
    rows = []
    for file in files:
        for n, line in read_lines(file):
            if not line.strip():
                continue
            try:
                try:
                    row = parse_line(line)
                except ValueError as error:
                    raise ValueError('malformed row') from error
                rows.append(parse_row(row))
            except ValueError as reason:
                left_out.setdefault(str(reason), []).append(f'{file}:{n}')
    return rows


def shorter_wins(rows):
    """What a reward model has to beat: how often a judge that only counts characters is right (equal lengths: half)."""
    gaps = [len(row['rejected']) - len(row['chosen']) for row in rows]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)


def main(cfg):
    files, test_files = find_files(Path(cfg.source))
    left_out = {}
    rows, val = read(files, left_out), read(test_files, left_out)

    def key(row): # prompts in a fixed random order; equal prompts have equal keys
        return hashlib.sha256(f"{cfg.seed} {row['prompt']}".encode()).digest()

    if test_files:
        val_keys = {key(row) for row in val}
        train = [row for row in rows if key(row) not in val_keys]
    else:
        keys = sorted({key(row) for row in rows})
        val_keys = set(keys[:max(1, round(cfg.val_fraction * len(keys)))])
        train = [row for row in rows if key(row) not in val_keys]
        val = [row for row in rows if key(row) in val_keys]

    doubles = len(rows) - len(train) if test_files else 0
    if doubles:
        print(f'left out {doubles:6d}  prompt is in the test files too')
    for reason, places in sorted(left_out.items(), key=lambda x: -len(x[1])):
        more = ', …' if len(places) > 3 else ''
        print(f"left out {len(places):6d}  {reason}\n{'':17s}{', '.join(places[:3])}{more}")
    n_kept = len(train) + len(val)
    n_read = n_kept + doubles + sum(map(len, left_out.values()))
    print(f'kept     {n_kept:6d}  of {n_read} rows in {len(files) + len(test_files)} file(s)')
    if not train or not val:
        fail(f'--source={cfg.source}: wanted rows for both splits, got {len(train)} for train and {len(val)} for val')

    out_dir = Path(cfg.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'--out_dir={out_dir}: cannot be made: {error.strerror}')
    print('split   comparisons   demonstrations   prompts   user turns (mean, max)   shorter wins')
    for split, pairs in (('train', train), ('val', val)):
        demonstrations = [{'prompt': row['prompt'], 'response': row['chosen']} for row in pairs]
        prompts = list({key(row): {'prompt': row['prompt']} for row in pairs}.values())
        write_records(out_dir / f'comparisons_{split}.jsonl', pairs)
        write_records(out_dir / f'demonstrations_{split}.jsonl', demonstrations)
        write_records(out_dir / f'prompts_{split}.jsonl', prompts)
        turns = [1 if isinstance(row['prompt'], str) else (len(row['prompt']) + 1) // 2 for row in pairs] # by the user
        print(f'{split:5s}   {len(pairs):11d}   {len(demonstrations):14d}   {len(prompts):7d}'
              f'   {sum(turns) / len(turns):17.2f}, {max(turns):3d}   {shorter_wins(pairs):12.1%}')
    print(f'shorter answer wins in {shorter_wins(train + val):.1%} of all; written to {out_dir}')


if __name__ == '__main__':
    launch(main, Config)
