"""Prepare short remarks on products, and whether their writers put them under Pros or under Cons.

    python data/reviews/prepare.py                            # from NLTK's data collection
    python data/reviews/prepare.py --source=pros_cons.zip     # a copy of it, or its folder

By Bing Liu, licence CC BY 4.0; see Ganapathibhotla and Liu 2008, https://doi.org/10.3115/1599081.1599112. A prompt is
the first word of a remark, or the first two, and the response is what follows, in lower case. A hash of the remark
chooses its part. So policy, reward model and gold classifier never share a label, and none has seen a prompt's remark:

    demonstrations, comparisons   the words of people, and of two remarks that begin alike the Pro above the Con
    gold                          with the label as `pros`, for the classifier in gold.py and a model of fluency
    prompts                       the beginnings of other remarks, each once and in one split
"""

import hashlib
import html
import io
import random
import re
import sys
import zipfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch, require
from common.records import write_records
from common.tokens import save_bpe
from data.bpe import train_bpe
from data.prepare_common import fetch

URL = 'https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/pros_cons.zip'
PARTS = dict(people=0.65, gold=0.25, prompts=0.1)
SPLITS = dict(people=dict(train=0.9, val=0.1), gold=dict(train=0.8, test=0.2),
              prompts=dict(train=0.6, val=0.15, test=0.25))
REUSE = 3 # a remark of which fewer people began alike is in at most so many comparisons

@dataclass
class Config:
    source: str = '' # the zip, or a folder that holds its two files; empty = fetch it
    out_dir: str = 'data/reviews' # where the files go
    seed: int = 1 # of parts and splits
    vocab_size: int = 2048 # tokens of the byte-pair encoding

    def __post_init__(self):
        require(self, vocab_size=(self.vocab_size >= 257, 'at least 257 (the bytes and the end of text)'))

def read_texts(source):
    """Return the texts of the two files, Pros and Cons."""
    names = ['IntegratedPros.txt', 'IntegratedCons.txt']
    try:
        if source and Path(source).is_dir():
            texts = {path.name: path.read_text('utf-8') for path in sorted(Path(source).rglob('Integrated*.txt'))}
        else:
            with zipfile.ZipFile(source or io.BytesIO(fetch(URL, text=False))) as file:
                texts = {Path(name).name: file.read(name).decode() for name in file.namelist()
                         if Path(name).name in names and '__MACOSX' not in name}
        return [texts[name] for name in names]
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as e: # RuntimeError: encrypted
        fail(f"--source={source}: wanted a zip or a folder with {' and '.join(names)} in UTF-8: {e}")

def read_remarks(source, counts):
    """Return [(remark, whether it is a Pro)], each remark once; counts gets what was read and left out."""
    found = defaultdict(list) # a remark less its signs -> those that read so
    for tag, text in zip(('Pros', 'Cons'), read_texts(source)):
        for line in filter(str.strip, text.splitlines()):
            counts[f'read, {tag}'] += 1
            match = re.fullmatch(f'<{tag}>(.*)</{tag}>', line.strip())
            words = html.unescape(html.unescape(match[1])).lower().split() if match else [] # it was escaped twice
            if len(words) > 1:
                found[' '.join(re.findall(r'\w+', ' '.join(words)))].append((' '.join(words), tag == 'Pros'))
            else:
                counts['left out, one word' if match else f'left out, no <{tag}>'] += 1
    for key, alike in found.items():
        doubtful = len({label for _, label in alike}) > 1
        counts['left out, under Pros and under Cons'] += len(alike) * doubtful
        counts['left out, said before'] += (len(alike) - 1) * (not doubtful)
        found[key] = [] if doubtful else alike[:1]
    return sum(found.values(), [])

def choose(shares, *what):
    """Choose a name with its share as the chance, by a hash: the same every time."""
    x = int(hashlib.sha256(' '.join(map(str, what)).encode()).hexdigest()[:12], 16) / 16 ** 12
    return next(name for name, end in zip(shares, accumulate(shares.values())) if x < end + 1e-9)

def compare(remarks):
    """Pair remarks (remark, label, …) that begin with the same word or two: comparisons, Pros above Cons."""
    groups, records = defaultdict(lambda: ([], [])), [] # first words -> (Cons, Pros)
    for remark, label, *_ in remarks:
        words = remark.split()
        for n in range(1, min(3, len(words))):
            groups[' '.join(words[:n])][label].append(' '.join(words[n:]))
    for prompt, (cons, pros) in groups.items():
        few, many = sorted([len(cons), len(pros)])
        records += [dict(prompt=prompt, chosen=pros[i % len(pros)], rejected=cons[i % len(cons)])
                    for i in range(min(many, REUSE * few))]
    return records

def main(cfg):
    counts, out_dir = Counter(), Path(cfg.out_dir)
    rows = {(part, split): [] for part, splits in SPLITS.items() for split in splits}
    remarks = read_remarks(cfg.source, counts)
    random.Random(cfg.seed).shuffle(remarks) # in the files all Pros come first
    for remark, label in remarks:
        words, part = remark.split(), choose(PARTS, 'part', cfg.seed, remark)
        n = min(len(words) - 1, choose({1: 0.5, 2: 0.5}, 'words', cfg.seed, remark)) # of the prompt
        prompt, response = ' '.join(words[:n]), ' '.join(words[n:])
        split = choose(SPLITS[part], 'split', cfg.seed, prompt if part == 'prompts' else remark)
        rows[part, split].append((remark, label, dict(prompt=prompt, response=response)))
    files = {}
    for (part, split), of_part in rows.items():
        if part == 'people':
            files[f'demonstrations_{split}'] = [record for *_, record in of_part]
            files[f'comparisons_{split}'] = compare(of_part)
        elif part == 'gold':
            files[f'gold_{split}'] = [record | dict(pros=label) for _, label, record in of_part]
        else:
            files[f'prompts_{split}'] = [dict(prompt=p) for p in dict.fromkeys(r['prompt'] for *_, r in of_part)]
    if empty := [name for name, records in files.items() if not records]:
        fail(f"--source={cfg.source}: too few remarks, there are none for {', '.join(empty)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        write_records(out_dir / f'{name}.jsonl', records)
    texts = [f"### Human: {r['prompt']}\n### Assistant: {r['response']}" for r in files['demonstrations_train']]
    ranks = train_bpe(texts, cfg.vocab_size) # the chat template's words become tokens too
    save_bpe(ranks, str(out_dir / 'reviews.tiktoken'))
    for what, n in [*sorted(counts.items(), reverse=True), *((name, len(records)) for name, records in files.items()),
                    ('tokens in reviews.tiktoken', len(ranks) + 1)]:
        print(f'{what:<40} {n:>6}')

if __name__ == '__main__':
    launch(main, Config)
