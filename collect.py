"""
Collect preferences: sample K answers per prompt from a checkpoint, have an annotator rank them, write ranking records.

The annotator here is a simulated person, who compares answers by a gold score with noise. Pairs follow from the ranks:
C > A > B gives three (Ouyang et al. 2022, section 3.4).

    python collect.py config/toy/collect.py --policy=out/toy/sft --prompts=data/toy/prompts_train.jsonl

A run that was stopped goes on where it was with --resume=True: what is ranked is kept in OUT.partial.
"""

import math
import os
import random
from dataclasses import dataclass

import common
from common import check_common, fail, launch, require

import torch

from model import load_policy
from rollout import sample_answers
from tokens import encode_prompts, load_tokenizer, parse_line, read_lines, read_records, to_lines, write_records


@dataclass
class Config:
    out: str = 'out/rankings.jsonl' # the ranking records
    policy: str = 'out/sft' # who answers
    prompts: str = '' # prompt records
    max_prompts: int = 0 # use the first so many; 0 = all
    n_answers: int = 4 # K, answers per prompt
    max_new_tokens: int = 64
    temperature: float = 1.0 # of sampling
    annotator: str = 'simulated' # simulated: a person who knows the gold score
    gold: str = 'toy' # whose gold score: toy (data/toy/world.py)
    noise: float = 0.15 # of the simulated person: a gold difference of `noise` is seen with sigmoid(1) = 73 %; 0 = none
    tie: float = 0.0 # neighbours that seem at most this far apart (in gold units) get the same rank
    rows: int = 256 # prompts answered between two saves
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that
    resume: bool = False # go on with OUT.partial
    overwrite: bool = False # replace OUT

    def __post_init__(self):
        check_common(self)
        require(self, prompts=(self.prompts != '', 'a file of prompts'),
                n_answers=(self.n_answers >= 2, 'at least 2'), temperature=(self.temperature > 0, 'above 0'),
                annotator=(self.annotator in ANNOTATORS, f"one of {', '.join(ANNOTATORS)}"),
                gold=(self.gold == 'toy', 'toy'), noise=(self.noise >= 0, 'at least 0'),
                tie=(self.tie >= 0, 'at least 0'), rows=(self.rows >= 1, 'at least 1'))


# ----------------------------------------------------------------------------------------------------------------
# annotators: made from (cfg, seed), with rank(prompt, responses) -> (ranks (K,), 0 = best, scores (K,) or None)

class SimulatedPerson:
    """
    Sees each answer's gold score through Gumbel noise and sorts. Two answers then come in the order of their gold
    scores with probability sigmoid((gold_i - gold_j) / noise): the Bradley-Terry model (Luce 1959; Yellott 1977).
    Equally good answers tie, and neighbours that seem at most `tie` apart.
    """

    def __init__(self, cfg, seed):
        from data.toy import world
        self.gold, self.noise, self.tie = world.gold, cfg.noise, cfg.tie
        self.rng = random.Random(seed)

    def rank(self, prompt, responses):
        scores = [self.gold(prompt, r) for r in responses] # (K,)
        seems = {} # gold score -> how good it seems
        for score in scores:
            gumbel = -math.log(-math.log(self.rng.random() or 1e-300))
            seems.setdefault(score, score + self.noise * gumbel)
        return to_ranks([seems[score] for score in scores], self.tie), scores


ANNOTATORS = {'simulated': SimulatedPerson}


def to_ranks(values, tie=0.0):
    """Ranks (K,), 0 = best, of values (K,), larger = better; a value at most `tie` below its better neighbour ties."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    ranks, rank = [0] * len(values), 0
    for before, i in zip(order, order[1:]):
        rank += values[before] - values[i] > tie
        ranks[i] = rank
    return ranks

# ----------------------------------------------------------------------------------------------------------------

def main(cfg):
    run = common.start(cfg)
    partial = cfg.out + '.partial'
    if os.path.exists(cfg.out) and not cfg.overwrite:
        fail(f"--out={cfg.out}: exists already; replace it by --overwrite=True, or choose another name")
    if os.path.exists(partial) and not cfg.resume and not cfg.overwrite:
        fail(f"--out={cfg.out}: {partial} holds what is ranked already; go on with it by --resume=True, or drop it by "
             "--overwrite=True")
    tok = load_tokenizer(cfg.policy)
    model = load_policy(cfg.policy).to(run.device)
    records = read_records(cfg.prompts, 'prompts')[:cfg.max_prompts or None]
    prompts = encode_prompts(tok, records, model.config.block_size - cfg.max_new_tokens)
    try: # once all input is read
        os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
        lines = [line for _, line in read_lines(partial)] if cfg.resume else []
        done = [parse_line(line) for line in lines if line.endswith(b'\n')] # a kill may have cut the last one
        done = done[:len(done) // cfg.rows * cfg.rows] # a stretch is sampled as a whole
        write_records(partial, done)
    except (OSError, ValueError) as e:
        fail(f"--out={cfg.out}: {e}")

    bar = common.progress(total=len(records), initial=len(done), desc=cfg.out, unit='prompts')
    for start in range(len(done), len(records), cfg.rows):
        seed = cfg.seed * 1_000_003 + start # of this stretch alone: a resumed run samples what it would have sampled
        torch.manual_seed(seed)
        annotator = ANNOTATORS[cfg.annotator](cfg, seed)
        K, stretch = cfg.n_answers, range(start, min(start + cfg.rows, len(records)))
        with run.autocast():
            answers, _ = sample_answers(model, [prompts[i] for i in stretch for _ in range(K)], tok,
                                        cfg.max_new_tokens, cfg.temperature) # K per prompt, in a row
        rows = []
        for n, i in enumerate(stretch):
            texts = [tok.decode(a).removeprefix(' ') for a in answers[n * K:(n + 1) * K]]
            texts = [t for t in texts if t.strip()] # an empty answer cannot be shown to anybody
            row = records[i] | dict(responses=texts, annotator=cfg.annotator)
            if len(texts) >= 2:
                ranks, scores = annotator.rank(row['prompt'], texts)
                row |= dict(ranks=ranks) | (dict(scores=scores) if scores else {})
            rows.append(row)
        with open(partial, 'a', encoding='utf-8') as f:
            f.write(to_lines(rows))
        bar.update(len(rows))
        if run.interrupted:
            bar.close()
            print(f"kept {partial}; --resume=True goes on from there")
            raise KeyboardInterrupt
    bar.close()

    rows = [parse_line(line) for _, line in read_lines(partial)]
    ranked = [row for row in rows if 'ranks' in row]
    write_records(cfg.out, ranked)
    os.remove(partial)
    pairs = sum(a < b for row in ranked for a in row['ranks'] for b in row['ranks'])
    print(f"{cfg.out}: {len(ranked)} prompts, {sum(len(row['ranks']) for row in ranked)} answers, {pairs} pairs, "
          f"{len(rows) - len(ranked)} prompts left out (fewer than two answers that are not empty)")
    common.stop(run)


if __name__ == '__main__':
    launch(main, Config)
