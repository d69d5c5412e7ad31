"""Write demonstrations of verdicts, from which sft.py makes a judge (see feedback/judges.py).

    python data/toy/judge.py [--out_dir=data/toy] [--seed=1]

A prompt is the question that collect.py --annotator=ai puts to a judge: the instruction, a train prompt of the toy
world and two answers. The response is A or B, the one of more gold, and a right answer, which teaches the judge the
facts. One of the two has the right content, the other one not: pairs that differ in courtesy or brevity alone teach
hardly any facts. It takes about ten seconds and makes 24000 train and 1000 val records, half of them A.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import launch, require
from common.records import write_records
from data.toy import world
from feedback.judges import comparison, read_instruction

@dataclass
class Config:
    out_dir: str = 'data/toy' # where the files go
    instruction: str = 'config/judge/toy.txt' # what the judge is told
    seed: int = 1
    n_prompts: int = 6000 # train prompts
    n_prompts_val: int = 250
    n_pairs: int = 4 # pairs of answers to each
    two_turns: float = 0.05 # share of prompts that are the second turn of a dialogue

    def __post_init__(self):
        require(self, two_turns=(0 <= self.two_turns <= 1, 'between 0 and 1'), **{
            key: (getattr(self, key) >= 1, 'at least 1') for key in ('n_prompts', 'n_prompts_val', 'n_pairs')})

def some_answer(text, category, split, rng):
    """Answer a turn of that category as a random speaker does.

    One answer in eight was given to another question of its category, one in eight lost a word.
    """
    mix = rng.choice((world.CORPUS_MIX, world.DEMONSTRATION_MIX))
    kind = rng.randrange(8)
    answer = world.behave(world.question(category, split, rng) if kind == 0 else text, mix, rng)
    if kind == 1: # broken text, as a small model writes it
        words = answer.split(' ')
        words.pop(rng.randrange(len(words)))
        answer = ' '.join(words) or answer
    return answer

def verdicts(split, n_prompts, n_pairs, instruction, seed, two_turns):
    """Make demonstrations that answer a comparison with A or B."""
    rng = random.Random(f'verdicts {split} {seed}')
    rows = []
    for i, record in enumerate(world.prompts(split, n_prompts, seed, two_turns), 1):
        prompt, turn = record['prompt'], world.last_turn(record['prompt'])
        while len(rows) < i * n_pairs:
            a, b = (some_answer(turn, record['category'], split, rng) for _ in range(2))
            better = world.explain(prompt, a)['content'] - world.explain(prompt, b)['content']
            if better:
                because = world.content_sentence(turn, rng)
                rows.append(dict(prompt=comparison(instruction, prompt, a, b),
                                 response=f"{'A' if better > 0 else 'B'}. {because}"))
    return rows

def main(cfg):
    instruction, out_dir = read_instruction(cfg.instruction, 'instruction'), Path(cfg.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for split, n in (('train', cfg.n_prompts), ('val', cfg.n_prompts_val)):
        rows = verdicts(split, n, cfg.n_pairs, instruction, cfg.seed, cfg.two_turns)
        write_records(out_dir / f'verdicts_{split}.jsonl', rows)
        print(f"verdicts_{split:<13} {len(rows):>6}, {sum(r['response'][0] == 'A' for r in rows)} of them A")

if __name__ == '__main__':
    launch(main, Config)
