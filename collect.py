"""
Collect preferences: sample K answers per prompt from a checkpoint, have an annotator rank them, write ranking records.

    python collect.py config/toy/collect.py --policy=out/toy/sft --prompts=data/toy/prompts_train.jsonl
    python collect.py --annotator=human --page=True --policy=out/sft --prompts=prompts.jsonl --out=out/anna.jsonl
    python collect.py --annotator=ai --judge=out/judge --answers=out/anna.jsonl --out=out/ai.jsonl
    python collect.py --merge=out/anna.jsonl,out/ben.jsonl --out=out/both.jsonl
    python collect.py config/toy/collect_best.py

The annotators are in annotators.py: a simulated person who knows a gold score, a person, an AI judge, a reward model.
Pairs follow from the ranks: C > A > B gives three (Ouyang et al. 2022, section 3.4). Answers are sampled a stretch of
prompts ahead; with --select all of them first, to choose the prompts that are worth ranking (select_labels.py).

With --keep=best only the best answer to each prompt is written, as a demonstration for sft.py: best-of-n distilled into
the policy, also called rejection sampling (Touvron et al. 2023, Llama 2, https://arxiv.org/abs/2307.09288, section
3.2.3; Dong et al. 2023, RAFT, https://arxiv.org/abs/2304.06767).

A run that was stopped goes on where it was with --resume=True: what is ranked is kept in OUT.partial, whose n-th line
is the n-th task; what a person says is on the disk before the next question is asked. Several processes (torchrun)
share the sampling; each number of processes has answers of its own, the same every time.
"""

import os
import random
import signal
import sys
import urllib.parse
from dataclasses import dataclass

import common
from common import check_common, fail, launch, require

import torch

import agreement
from annotators import JudgeError, Undo, make_annotator
from model import load_policy
from rollout import check_gold, sample_answers
from select_labels import choose
from tokens import (encode_prompts, load_tokenizer, parse_line, read_lines, read_preferences, read_records, to_lines,
                    write_records)


@dataclass
class Config:
    out: str = 'out/rankings.jsonl' # the records
    keep: str = 'all' # all: every answer, as rankings; best: the best answer to each prompt, as demonstrations
    policy: str = 'out/sft' # who answers: folders, or models on the hub; several, separated by commas, in turn
    prompts: str = '' # prompt records
    answers: str = '' # instead of policy and prompts: rankings or comparisons, whose answers are ranked anew
    max_prompts: int = 0 # use the first so many; 0 = all
    select: str = '' # rank only `budget` of them, best first: random, uncertain, diverse (select_labels.py)
    budget: int = 0 # prompts to select
    ensemble: str = '' # for select=uncertain: reward models, separated by commas
    n_answers: int = 4 # K, answers per prompt
    max_new_tokens: int = 64
    temperature: float = 1.0 # of sampling
    annotator: str = 'simulated' # simulated: a person who knows the gold score; human: you; ai: a judge; reward_model
    reward_model: str = '' # for annotator=reward_model: the one whose scores rank
    gold: str = 'toy' # whose gold score: toy (data/toy/world.py)
    noise: float = 0.15 # of the simulated person: a gold difference of `noise` is seen with sigmoid(1) = 73 %; 0 = none
    tie: float = 0.0 # neighbours that seem at most this far apart (in units of its score) get the same rank
    page: bool = False # human: in a browser on this machine, not in the terminal
    port: int = 0 # of the page; 0 = any that is free
    repeat: float = 0.0 # this share of each stretch is asked a second time: the rater's agreement with themself
    judge: str = '' # ai: a checkpoint that answers comparisons (see config/toy/judge.py)
    judge_url: str = '' # ai: or a server of the OpenAI chat API, as in https://HOST/v1; key in JUDGE_API_KEY
    judge_model: str = '' # the model's name there
    judge_instruction: str = 'config/judge/helpful_honest_harmless.txt' # what the judge is told
    judge_requests: int = 8 # under way at once
    judge_tokens: int = 512 # longest reply
    judge_timeout: float = 60.0 # seconds without a byte before a request is tried again
    judge_tries: int = 6 # per request, later and later
    judge_cache: str = 'out/judge_cache.jsonl' # replies, so that a rerun asks nothing twice; empty = none
    compare: str = '' # rankings or comparisons of the same answers: print how far OUT agrees
    merge: str = '' # nothing of the above: merge these raters' files, separated by commas, into OUT
    rows: int = 0 # prompts answered ahead, a stretch; 0 = 16 for a person, who waits for them, 256 for others
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that
    resume: bool = False # go on with OUT.partial
    overwrite: bool = False # replace OUT

    def __post_init__(self):
        check_common(self)
        if self.merge:
            return require(self, merge=(',' in self.merge, 'two files or more, separated by commas'))
        ai, n = self.annotator == 'ai', len(self.policy.split(','))
        require(self, prompts=(bool(self.prompts) != bool(self.answers), 'a file of prompts, unless answers is given'),
                n_answers=(self.n_answers >= max(2, n), f'at least {max(2, n)}'),
                temperature=(self.temperature > 0, 'above 0'),
                annotator=(self.annotator in ('simulated', 'human', 'ai', 'reward_model'),
                           'one of simulated, human, ai, reward_model'),
                select=(self.select in ('', 'random', 'uncertain', 'diverse'), 'random, uncertain, diverse or empty'),
                budget=(self.budget >= 0 and (self.budget > 0) == (self.select != ''),
                        'at least 1 with select, else 0'),
                ensemble=((',' in self.ensemble) if self.select == 'uncertain' else self.ensemble == '',
                          'two reward models or more with select=uncertain, else empty'),
                keep=(self.keep in ('all', 'best'), 'all or best'),
                reward_model=((self.reward_model != '') == (self.annotator == 'reward_model'),
                              "a reward model's folder with annotator=reward_model, else empty"),
                gold=(self.gold == 'toy', 'toy'), noise=(self.noise >= 0, 'at least 0'),
                tie=(self.tie >= 0, 'at least 0'), rows=(self.rows >= 0, 'at least 0'),
                repeat=(0 <= self.repeat <= 0.5, 'between 0 and 0.5'), port=(0 <= self.port < 65536, '0 to 65535'),
                page=(not self.page or self.annotator == 'human', 'False unless annotator=human'),
                max_prompts=(self.max_prompts >= 0, 'at least 0'),
                judge=(bool(self.judge) != bool(self.judge_url) if ai else not self.judge,
                       'a checkpoint with annotator=ai, unless judge_url is given; else empty'),
                judge_url=(not self.judge_url or ai and is_url(self.judge_url),
                           'http://HOST… or https://HOST… with annotator=ai, else empty'),
                judge_model=(not (ai and self.judge_url) or self.judge_model != '', "the model's name at judge_url"),
                judge_requests=(self.judge_requests >= 1, 'at least 1'),
                judge_tokens=(self.judge_tokens >= 1, 'at least 1'), judge_tries=(self.judge_tries >= 1, 'at least 1'),
                judge_timeout=(0 < self.judge_timeout <= 3600, 'above 0 and at most 3600'))
        self.rows = self.rows or (16 if self.annotator == 'human' else 256)


def is_url(text):
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ('http', 'https') and bool(parts.hostname) and (parts.port or 0) >= 0
    except ValueError: # a port that is no number, half an IPv6 address
        return False


OPINIONS = ('ranks', 'scores', 'again', 'raters', 'repeat', 'chosen', 'rejected', 'margin', 'label')
ANSWERS = ('response', 'responses', 'policies', 'messages', 'text')


def task(record, without=OPINIONS):
    """A record without anybody's opinion of its answers."""
    return {k: v for k, v in record.items() if k not in without}


def load_writer(name, cfg, run, records):
    """One who answers: (name, model, tokenizer, the prompts' ids)."""
    tok = load_tokenizer(name)
    model = load_policy(name).to(run.device)
    return name, model, tok, encode_prompts(tok, records, model.config.block_size - cfg.max_new_tokens)


def write_answers(cfg, run, writers, records, stretch):
    """
    Rows to be ranked: the records numbered `stretch` with K sampled `responses` each, less those that are empty, which
    cannot be shown to anybody. Several writers answer in turn, and `policies` then says who wrote what.
    """
    mine = run.rows(stretch) # each process writes its share
    answers = {i: [] for i in mine} # per prompt: (name, text)
    for w, (name, model, tok, prompts) in enumerate(writers):
        K = len(range(w, cfg.n_answers, len(writers))) # answers of this one
        with run.autocast():
            sampled, _ = sample_answers(model, [prompts[i] for i in mine for _ in range(K)], tok,
                                        cfg.max_new_tokens, cfg.temperature) # K per prompt, in a row
        texts = [tok.decode(ids).removeprefix(' ') for ids in sampled]
        for n, text in enumerate(texts):
            answers[mine[n // K]] += [(name, text)] if text.strip() else []
    answers = run.merge(answers)
    return [records[i] | dict(responses=[text for _, text in these])
            | (dict(policies=[name for name, _ in these]) if len(writers) > 1 else {})
            for i, these in ((i, answers[i]) for i in stretch)]


def stretch_of(cfg, run, records, start):
    """Numbers of the records that are answered together, and their seed: a resumed run samples what it would have."""
    seed = cfg.seed * 1_000_003 + start # of this stretch alone
    torch.manual_seed(seed + run.rank)
    return range(start, min(start + cfg.rows, len(records))), seed


def main(cfg):
    run = None if cfg.merge else common.start(cfg)
    if (cfg.merge or run.is_master) and os.path.exists(cfg.out) and not cfg.overwrite:
        fail(f"--out={cfg.out}: exists already; replace it by --overwrite=True, or choose another name")
    if os.path.isdir(cfg.out):
        fail(f"--out={cfg.out}: is a folder, wanted a file")
    if cfg.merge:
        return agreement.merge(cfg.merge.split(','), cfg.out)
    if cfg.annotator == 'human':
        if run.world_size > 1:
            fail(f"--annotator=human: wanted one process, got {run.world_size}")
        signal.signal(signal.SIGINT, signal.default_int_handler) # everything said is saved: the first Ctrl-C ends
    partial = cfg.out + '.partial'
    if run.is_master and os.path.exists(partial) and not cfg.resume and not cfg.overwrite:
        fail(f"--out={cfg.out}: {partial} holds what is ranked already; go on with it by --resume=True, or drop it by "
             "--overwrite=True")
    others = read_preferences(cfg.compare) if cfg.compare else []
    records = read_preferences(cfg.answers) if cfg.answers else read_records(cfg.prompts, 'prompts')
    without = OPINIONS if cfg.answers else OPINIONS + ANSWERS # prompts may come with answers that are not asked about
    records = [task(record, without) for record in records[:cfg.max_prompts or None]]
    if cfg.annotator == 'simulated':
        check_gold(records, cfg.answers or cfg.prompts)
    writers = [] if cfg.answers else [load_writer(name, cfg, run, records) for name in cfg.policy.split(',')]
    if cfg.select:
        starts = range(0, len(records), cfg.rows)
        rows = records if cfg.answers else [row for start in starts for row in write_answers(
            cfg, run, writers, records, stretch_of(cfg, run, records, start)[0])]
        records, writers = choose(rows, cfg, run), [] # they have their answers
    annotator = make_annotator(cfg, run) if run.is_master else None # the first process ranks and writes
    by_row = cfg.annotator != 'simulated' # whose noise is drawn in a row for a stretch: it is ranked as a whole
    size = lambda prompts: prompts + round(cfg.repeat * prompts) # tasks of a stretch of so many prompts
    kept = []
    if run.is_master:
        try: # once all input is read
            os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
            lines = [line for _, line in read_lines(partial)] if cfg.resume else []
            kept = [parse_line(line) for line in lines if line.endswith(b'\n')] # a kill may have cut the last one
            if any(row.get('repeat') is True for row in kept):
                fail(f"{partial}: was written by an older version, which did not say whose second ranks these are; "
                     "wanted it finished by that version, or --overwrite=True")
            kept = kept if by_row else kept[:len(kept) // size(cfg.rows) * size(cfg.rows)]
            write_records(partial, kept)
        except (OSError, ValueError) as e:
            fail(f"--out={cfg.out}: {e}")
    n_kept = run.gather(len(kept))[0]
    starts = range(0, len(records), cfg.rows)
    total = sum(size(len(records[start:start + cfg.rows])) for start in starts)
    bar = common.progress(total=total, initial=len(kept), desc=cfg.out, unit='prompts',
                          disable=cfg.annotator == 'human' or not run.is_master)

    def keep(row):
        kept.append(row)
        with open(partial, 'a', encoding='utf-8') as f:
            f.write(to_lines([row]))
            f.flush()
            if cfg.annotator == 'human':
                os.fsync(f.fileno())
        bar.update()

    try:
        for n in range(n_kept // size(cfg.rows), len(starts)):
            stretch, seed = stretch_of(cfg, run, records, starts[n])
            if cfg.annotator == 'human' and writers:
                common.note(f"{cfg.policy}: writing answers to the next {len(stretch)} prompts …")
            rows = write_answers(cfg, run, writers, records, stretch) if writers else [records[i] for i in stretch]
            done = kept[n * size(cfg.rows):] # of this stretch; what was shown counts, should sampling not be repeatable
            rows[:len(done)] = [task(row) for row in done if 'repeat' not in row]
            rows = [row | dict(annotator=cfg.annotator) for row in rows]
            again = random.Random(seed).sample(range((len(rows) + 1) // 2), size(len(rows)) - len(rows)) # some time ago
            again = [rows[i] | dict(repeat=starts[n] + i) for i in again] # the number of the prompt
            todo = (rows + again)[len(done):][::-1] # the next one last
            if run.is_master:
                annotator.rng.seed(seed)
                annotator.look_ahead(todo)
            else:
                todo = []
            while todo and not (by_row and run.interrupted):
                row, annotator.progress = todo.pop(), (len(kept), total)
                try:
                    ranks = scores = None
                    if len(row['responses']) >= 2:
                        ranks, scores = annotator.rank(row['prompt'], row['responses'])
                    keep(row | (dict(ranks=ranks) if ranks else {}) | (dict(scores=scores) if scores else {}))
                except Undo:
                    todo.append(row)
                    while kept and (todo[-1] is row or len(set(todo[-1]['responses'])) < 2): # to one that was shown
                        todo.append({k: v for k, v in kept.pop().items() if k not in ('ranks', 'scores')})
                    os.truncate(partial, len(to_lines(kept).encode()))
            if run.stop_requested():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if run.is_master:
            print(f"kept {partial}; --resume=True goes on from there")
        raise
    except JudgeError as e:
        bar.close()
        message, code = e.args
        print(f"error: --judge_url={cfg.judge_url}: {message}; kept {partial}, --resume=True goes on", file=sys.stderr)
        raise SystemExit(code)
    finally:
        bar.close()
        if run.is_master:
            annotator.progress = len(kept), total
            said = annotator.close()

    common.stop(run)
    if not run.is_master:
        return
    firsts = [row for row in kept if 'repeat' not in row]
    for row in kept:
        if 'repeat' in row and 'ranks' in row:
            first = firsts[row['repeat']]
            first['again' if 'ranks' in first else 'ranks'] = row['ranks'] # it may have been skipped the first time
    ranked = [row for row in firsts if 'ranks' in row]
    best = [dict(prompt=row['prompt'], response=row['responses'][row['ranks'].index(0)]) for row in ranked]
    write_records(cfg.out, best if cfg.keep == 'best' else ranked)
    os.remove(partial)
    pairs = sum(a < b for row in ranked for a in row['ranks'] for b in row['ranks'])
    print(f"{cfg.out}: {len(ranked)} prompts, {sum(len(row['ranks']) for row in ranked)} answers, {pairs} pairs, "
          f"{'the best answers kept, ' if cfg.keep == 'best' else ''}"
          f"{len(firsts) - len(ranked)} prompts left out"
          + (" (skipped, without two answers that are not empty, or with one that could not be judged)"
             if len(ranked) < len(firsts) else ''))
    if said:
        print(said)
    if cfg.repeat:
        print(f"with themself: {agreement.with_oneself(ranked)}")
    if others:
        print(f"with {cfg.compare}: {agreement.compare(ranked, others)}")


if __name__ == '__main__':
    launch(main, Config)
