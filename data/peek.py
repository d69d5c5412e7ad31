"""Show the first records of a file as the models get them.

    python -m data.peek data/oasst1/demonstrations_val.jsonl
    python -m data.peek rankings.jsonl --tokenizer=out/sft --rows=10
    python data/peek.py rankings.jsonl                                       # the same

In a terminal, tokens that are learnt are bold green, or red in a rejected or bad answer. The rest is dim, and the
end-of-text token is inverse. Elsewhere, or with NO_COLOR set, learnt tokens are between ⟦ and ⟧.
"""

import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from common.options import fail, launch, require
from common.records import QUALITIES, first_row, is_text_file, read_records
from common.tokens import EOS, dialogue, load_tokenizer, prompt_ids, response_ids

@dataclass
class Config:
    file: str = '' # records of any kind; `--file=` may be left out
    tokenizer: str = 'gpt2' # gpt2, bytes, a .tiktoken file or a checkpoint folder
    rows: int = 3 # how many of the first rows to show

    def __post_init__(self):
        require(self, file=(self.file != '', 'a file of records'), rows=(self.rows >= 1, 'at least 1'))

def kind_of(path):
    """Tell the kind of a file by its first record; a broken one passes as "prompts"."""
    if is_text_file(path):
        return 'text'
    row = first_row(path)
    keys = set(row)
    if isinstance(row.get('label'), bool):
        return 'unpaired'
    if 'response' in keys and keys & {*QUALITIES}:
        return 'ratings'
    for kind, own in (('demonstrations', {'messages', 'response'}), ('comparisons', {'chosen', 'rejected'}),
                      ('rankings', {'responses'}), ('prompts', {'prompt'})):
        if keys & own:
            return kind
    if keys:
        fail(f"{path}: wanted records of one kind, got a first row with the keys {', '.join(sorted(keys))}")
    return 'prompts'

def paint(tok, ids, mask, colour):
    """Decode ids to text that shows their mask. colour: of learnt tokens; '' = none."""
    control = {c: f'\\x{c:02x}' for c in (*range(32), *range(127, 160)) if chr(c) not in '\t\n'} # it steers terminals
    eos = f'\x1b[7m{EOS}\x1b[27m' if colour else EOS
    out = ''
    for counted, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        text = ''
        for is_eos, part in groupby((i for i, _ in run), key=lambda i: i == tok.eos):
            text += eos * len(list(part)) if is_eos else tok.decode(list(part)).translate(control)
        if colour:
            out += f"\x1b[{colour if counted else '2'}m{text}\x1b[0m"
        else:
            out += f'⟦{text}⟧' if counted else text
    return out

def parts_of(tok, record, kind):
    """Encode a record to [(name, ids, mask), …], masks as in training. Every answer is a part."""
    if kind == 'text':
        ids = tok.encode(record['text']) + [tok.eos]
        return [('text', ids, [1] * len(ids))]
    if kind == 'demonstrations':
        return [('dialogue', *dialogue(tok, record))]
    prompt, answers = prompt_ids(tok, record['prompt']), []
    if kind == 'comparisons':
        answers = [(name, record[name]) for name in ('chosen', 'rejected')]
    elif kind == 'rankings':
        answers = [(f'rank {rank}', text) for rank, text in zip(record['ranks'], record['responses'])]
    elif kind == 'unpaired':
        answers = [('good' if record['label'] else 'bad', record['response'])]
    elif kind == 'ratings':
        answers = [(', '.join(f'{quality} {record[quality]}' for quality in QUALITIES if quality in record),
                    record['response'])]
    ended = record.get('ended', True)
    ended = ended if isinstance(ended, list) else [ended] * len(answers)
    answers = [(name, response_ids(tok, text, end)) for (name, text), end in zip(answers, ended)]
    return [('prompt', prompt, [0] * len(prompt))] + [(name, ids, [1] * len(ids)) for name, ids in answers]

def main(cfg):
    tok, kind = load_tokenizer(cfg.tokenizer), kind_of(cfg.file)
    records = read_records(cfg.file, kind)
    in_colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    green, red = ('1;32', '1;31') if in_colour else ('', '')
    sys.stdout.reconfigure(errors='backslashreplace') # for a terminal without these characters
    word = tok.encode('learnt')
    print(f'{cfg.file}: {len(records)} {kind}; {paint(tok, word, [1] * len(word), green)} tokens look like this')
    for n, record in enumerate(records[:cfg.rows], 1):
        print(f'\nrow {n}')
        for name, ids, mask in parts_of(tok, record, kind):
            text = paint(tok, ids[:1000], mask[:1000], red if name in ('rejected', 'bad') else green)
            more = f' … and {len(ids) - 1000} more' if len(ids) > 1000 else '' # of a whole book
            print(f'[{name}: {len(ids)} tokens, {sum(mask)} learnt]\n{text}{more}')

def options(args):
    """Turn a plain FILE among the arguments into --file=FILE. Config files are not taken."""
    files = [arg for arg in args if not arg.startswith('-')]
    if len(files) > 1:
        fail(f"wanted one file, got {' '.join(files)}")
    return [arg if arg.startswith('-') else f'--file={arg}' for arg in args]

if __name__ == '__main__':
    sys.argv[1:] = options(sys.argv[1:])
    launch(main, Config)
