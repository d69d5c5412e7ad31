"""Write the toy world's records and its tokenizer (see world.py).

    python data/toy/prepare.py [--out_dir=data/toy] [--seed=1]

It takes about four seconds. docs/data.md shows the expected output. No prompt is in two splits. The val and test
prompts name creatures, jobs and phrasings of facts that train never shows.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from common.records import write_records
from common.tokens import load_tokenizer, save_bpe
from data.bpe import train_bpe
from data.toy import world

@dataclass
class Config:
    out_dir: str = 'data/toy' # where the files go
    seed: int = 1 # another seed draws other samples; which prompts belong to which split stays the same
    n_text: int = 20000 # documents of the pretraining corpus
    n_text_val: int = 1000
    n_demonstrations: int = 600
    n_demonstrations_val: int = 100
    n_prompts: int = 6000 # for collecting rankings and for RL
    n_prompts_val: int = 600 # for tuning
    n_prompts_test: int = 600 # for reporting
    n_pairs: int = 50 # controlled pairs per category, in val and in test
    two_turns: float = 0.05 # share of prompts that are the second turn of a dialogue
    vocab_size: int = 1000 # tokens of the byte-pair encoding
    min_count: int = 12 # rarer pairs are not merged, so that no invented name becomes one token

    def __post_init__(self):
        at_least_1 = [key for key in vars(self) if key.startswith('n_')] + ['min_count']
        require(self, **{key: (getattr(self, key) >= 1, 'at least 1') for key in at_least_1},
                two_turns=(0 <= self.two_turns <= 1, 'between 0 and 1'),
                vocab_size=(self.vocab_size >= 257, 'at least 257 (the bytes and the end of text)'))

def main(cfg):
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = world.corpus(cfg.n_text, cfg.seed)
    files = {'text_train': [{'text': t} for t in texts],
             'text_val': [{'text': t} for t in world.corpus(cfg.n_text_val, cfg.seed, 'val')],
             'demonstrations_train': world.demonstrations(cfg.n_demonstrations, cfg.seed),
             'demonstrations_val': world.demonstrations(cfg.n_demonstrations_val, cfg.seed, 'val')}
    for split, n in (('train', cfg.n_prompts), ('val', cfg.n_prompts_val), ('test', cfg.n_prompts_test)):
        files[f'prompts_{split}'] = world.prompts(split, n, cfg.seed, cfg.two_turns)
    for split in ('val', 'test'):
        files[f'comparisons_{split}'] = world.controlled_pairs(split, cfg.n_pairs, cfg.seed)
    for name, rows in files.items():
        write_records(out_dir / f'{name}.jsonl', rows)
        print(f'{name:<22} {len(rows):>6}')
    path = str(out_dir / 'toy.tiktoken')
    save_bpe(train_bpe(texts, cfg.vocab_size, cfg.min_count), path)
    tok = load_tokenizer(path)
    n_tokens = sum(len(tok.encode(t)) for t in texts)
    print(f"{'toy.tiktoken':<22} {tok.n_vocab:>6} tokens; the corpus has {n_tokens / len(texts):.1f} a document")

if __name__ == '__main__':
    launch(main, Config)
