"""
Write the toy world's records and its tokenizer (see world.py).

    python data/toy/prepare.py [--out_dir=data/toy] [--seed=1]

Takes about four seconds. What one should see:

    text            20000 train   1000 val      (28 tokens a document)
    demonstrations    600 train    100 val
    prompts          6000 train    600 val    600 test
    comparisons                    700 val    700 test
    toy.tiktoken     1000 tokens

No prompt is in two splits. The val and test prompts name creatures, jobs and phrasings of facts that train never shows.
"""
import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))) # the repository root

from common import launch
from data.toy import world
from tokens import load_tokenizer, save_bpe, train_bpe, write_records


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
        for key in ('n_text', 'n_text_val', 'n_demonstrations', 'n_demonstrations_val', 'n_prompts', 'n_prompts_val',
                    'n_prompts_test', 'n_pairs', 'min_count'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key} must be at least 1, got {getattr(self, key)}')
        if not 0 <= self.two_turns <= 1:
            raise ValueError(f'two_turns must be between 0 and 1, got {self.two_turns}')
        if self.vocab_size < 257:
            raise ValueError(f'vocab_size must be at least 257 (the bytes and the end of text), got {self.vocab_size}')


def main(cfg):
    os.makedirs(cfg.out_dir, exist_ok=True)
    seed, files = cfg.seed, {}
    texts = world.corpus(cfg.n_text, seed)
    files['text_train'] = [{'text': t} for t in texts]
    files['text_val'] = [{'text': t} for t in world.corpus(cfg.n_text_val, seed, 'val')]
    files['demonstrations_train'] = world.demonstrations(cfg.n_demonstrations, seed)
    files['demonstrations_val'] = world.demonstrations(cfg.n_demonstrations_val, seed, 'val')
    for split, n in (('train', cfg.n_prompts), ('val', cfg.n_prompts_val), ('test', cfg.n_prompts_test)):
        files[f'prompts_{split}'] = world.prompts(split, n, seed, cfg.two_turns)
    for split in ('val', 'test'):
        files[f'comparisons_{split}'] = world.controlled_pairs(split, cfg.n_pairs, seed)
    for name, rows in files.items():
        write_records(os.path.join(cfg.out_dir, f'{name}.jsonl'), rows)
        print(f'{name:<22} {len(rows):>6}')

    path = os.path.join(cfg.out_dir, 'toy.tiktoken')
    save_bpe(train_bpe(texts, cfg.vocab_size, cfg.min_count), path)
    tok = load_tokenizer(path)
    n_tokens = sum(len(tok.encode(t)) for t in texts)
    print(f"{'toy.tiktoken':<22} {tok.n_vocab:>6} tokens; the corpus has {n_tokens / len(texts):.1f} a document")


if __name__ == '__main__':
    launch(main, Config)
