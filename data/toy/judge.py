"""
Write demonstrations of verdicts, from which sft.py makes a judge for the toy world (see annotators.py).

    python data/toy/judge.py [--out_dir=data/toy] [--seed=1]

A row's prompt is what collect.py --annotator=ai asks a judge: the instruction, a train prompt and two answers. The
response is A or B, the one of more gold, and a right answer: the judge's verdict is its first token, the rest teaches
it the facts (as lm_coef does in reward.py). One of the two has the right content and the other has not: with pairs that
differ in courtesy or brevity alone among them the judge learns these, which are easier, and the facts hardly at all.
The answers are made by the speakers of the world and not by a policy; one in eight was given to another question of its
category, one in eight lost a word.
Takes about ten seconds. What one should see: verdicts_train 24000, verdicts_val 1000, half of them A.
"""
import os
import random
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))) # the repository root

from annotators import comparison, read_instruction
from common import launch, require
from data.toy import world
from tokens import write_records


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
        require(self, n_prompts=(self.n_prompts >= 1, 'at least 1'), n_pairs=(self.n_pairs >= 1, 'at least 1'),
                n_prompts_val=(self.n_prompts_val >= 1, 'at least 1'),
                two_turns=(0 <= self.two_turns <= 1, 'between 0 and 1'))


def some_answer(text, category, split, rng):
    """An answer of any quality to a user's turn of that category."""
    mix = rng.choice((world.CORPUS_MIX, world.DEMONSTRATION_MIX))
    kind = rng.randrange(8)
    answer = world.behave(world.question(category, split, rng) if kind == 0 else text, mix, rng)
    if kind == 1: # broken text, as a small model writes it
        words = answer.split(' ')
        words.pop(rng.randrange(len(words)))
        answer = ' '.join(words) or answer
    return answer


def verdicts(split, n_prompts, n_pairs, instruction, seed, two_turns):
    """Demonstration records: prompt, the comparison; response, A or B."""
    rng = random.Random(f'verdicts {split} {seed}')
    rows = []
    for record in world.prompts(split, n_prompts, seed, two_turns):
        prompt, n = record['prompt'], 0
        while n < n_pairs:
            a, b = (some_answer(world.last_turn(prompt), record['category'], split, rng) for _ in range(2))
            better = world.explain(prompt, a)['content'] - world.explain(prompt, b)['content']
            if better:
                because = world.content_sentence(world.last_turn(prompt), rng)
                rows.append(dict(prompt=comparison(instruction, prompt, a, b),
                                 response=f"{'A' if better > 0 else 'B'}. {because}"))
                n += 1
    return rows


def main(cfg):
    instruction = read_instruction(cfg.instruction, 'instruction')
    os.makedirs(cfg.out_dir, exist_ok=True)
    for split, n in (('train', cfg.n_prompts), ('val', cfg.n_prompts_val)):
        rows = verdicts(split, n, cfg.n_pairs, instruction, cfg.seed, cfg.two_turns)
        write_records(os.path.join(cfg.out_dir, f'verdicts_{split}.jsonl'), rows)
        print(f"verdicts_{split:<13} {len(rows):>6}, {sum(r['response'][0] == 'A' for r in rows)} of them A")


if __name__ == '__main__':
    launch(main, Config)
