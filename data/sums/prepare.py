"""Write the records of the world of sums and its tokenizer (see world.py).

    python data/sums/prepare.py [--out_dir=data/sums] [--seed=1]

No problem is in two splits. STYLE is `scratch` or `direct`, with and without the scratch line:

    practice_STYLE_train.jsonl         many answers, most of them by hasty writers: for the base model
    demonstrations_STYLE_train.jsonl   a few, a quarter of them by careful writers
    prompts_SPLIT.jsonl                problems with their right `answer`; in prompts_others of 2, 4, 5 and 6 digits
    sums.tiktoken                      the chat template's words are tokens, and every digit is one
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from common.records import write_records
from common.tokens import save_bpe
from data.bpe import train_bpe
from data.sums import world

@dataclass
class Config:
    out_dir: str = 'data/sums' # where the files go
    seed: int = 1 # another seed draws other problems; which split a problem belongs to stays the same
    n_practice: int = 60000 # per style
    n_demonstrations: int = 300
    n_val: int = 500 # of practice and demonstrations
    n_prompts: int = 6000 # for RL
    n_prompts_val: int = 600 # for tuning
    n_prompts_test: int = 600 # for reporting
    n_others: int = 200 # per number of digits

    def __post_init__(self):
        require(self, **{key: (getattr(self, key) >= 1, 'at least 1') for key in vars(self) if key.startswith('n_')})

def main(cfg):
    out_dir = Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {}
    for style in ('scratch', 'direct'):
        for kind, n in (('practice', cfg.n_practice), ('demonstrations', cfg.n_demonstrations)):
            for split, n in (('train', n), ('val', cfg.n_val)):
                files[f'{kind}_{style}_{split}'] = world.answers(kind, split, n, cfg.seed, style == 'scratch')
    for split, n in (('train', cfg.n_prompts), ('val', cfg.n_prompts_val), ('test', cfg.n_prompts_test)):
        files[f'prompts_{split}'] = world.prompts(split, n, cfg.seed)
    files['prompts_others'] = [row for n in world.OTHERS for row in world.prompts('test', cfg.n_others, cfg.seed, (n,))]
    for name, rows in files.items():
        write_records(out_dir / f'{name}.jsonl', rows)
        print(f'{name:<28} {len(rows):>6}')
    words = ['### Human: \n### Assistant: \n####'] # no digits: none become one token with another
    save_bpe(train_bpe(words, vocab_size=300, min_count=1), str(out_dir / 'sums.tiktoken'))

if __name__ == '__main__':
    launch(main, Config)
