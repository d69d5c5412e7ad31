"""Collect preferences: sample K answers per prompt, have an annotator rank or rate them, write records of it.

    python collect.py config/toy/collect.py --policy=out/toy/sft --prompts=data/toy/prompts_train.jsonl
    python collect.py --annotator=human --page=True --policy=out/sft --prompts=prompts.jsonl --out=out/anna.jsonl
    python collect.py --annotator=human --ask=ratings --policy=out/sft --prompts=prompts.jsonl --out=out/anna.jsonl
    python collect.py --annotator=ai --judge=out/judge --answers=out/anna.jsonl --out=out/ai.jsonl
    python collect.py --split=3 --overlap=0.2 --policy=out/sft --prompts=prompts.jsonl --out=out/tasks.jsonl
    python collect.py --merge=out/anna.jsonl,out/ben.jsonl --out=out/both.jsonl

Pairs follow from the ranks: C > A > B gives three (Ouyang et al. 2022, section 3.4). --keep=best is best of n or
rejection sampling (Llama 2, Touvron et al. 2023, https://arxiv.org/abs/2307.09288, section 3.2.3): a prompt's best
answer becomes a demonstration for sft.py. --ask=ratings asks for numbers, and writes a rating record per answer.
docs/feedback.md describes the annotators.

OUT.partial keeps the ranked tasks, the n-th task in its n-th line. OUT.skipped gets what a person skipped. Each number
of processes (torchrun) samples answers of its own, the same every time. `ended` says of each answer whether the model
wrote its end, or was cut off by max_new_tokens.
"""

import codecs
import contextlib
import itertools
import os
import random
from dataclasses import dataclass

from common.batches import encode_prompts
from common.checkpoints import digest, load_policy
from common.options import RunOptions, fail, launch, note, require, unread
from common.records import (QUALITIES, check, check_record, is_number, is_text, lock, parse_line, read_json, read_lines,
                            read_preferences, read_records, to_lines, write_records)
from common.rollout import sample_answers
from common.run import default_signals, progress, start, stop
from common.tokens import load_tokenizer, prompt_ids
from common.weights import weight_files
from feedback import agreement
from feedback.annotators import (PolicyReward, RewardFunction, RewardModel, SimulatedPerson, Terminal, Undo, answers_of,
                                 check_finite)
from feedback.functions import load_reward_function
from feedback.judges import ApiJudge, GPTJudge, JudgeError, is_url
from feedback.page import Page
from feedback.select_labels import choose, load_ensemble

import torch

OPINIONS = ('ranks', 'scores', 'again', 'raters', 'repeat', 'chosen', 'rejected', 'margin', 'label', 'ratings', 'rater',
            'seconds', 'skipped', 'opinions')
ANNOTATORS = ('simulated', 'human', 'ai', 'reward_model', 'function', 'policy')
ANSWERS = ('response', 'responses', 'ended', 'policies', 'messages', 'text')
FREE = ('out', 'device', 'dtype', 'page', 'port', 'guidelines', 'judge_url', 'judge_requests', 'judge_timeout',
        'judge_tries', 'judge_cache', 'compare', 'merge', 'resume', 'overwrite') # shape no row; a judge may have moved
DEALT = ('out', 'policy', 'prompts', 'answers', 'max_prompts', 'select', 'budget', 'ensemble', 'n_answers', 'rows',
         'max_new_tokens', 'temperature', 'split', 'overlap', 'overwrite') # read by a run that only deals out

@dataclass
class Config(RunOptions):
    out: str = 'out/rankings.jsonl' # the records
    keep: str = 'all' # all: every answer, as rankings; best: the best answer to each prompt, as demonstrations
    policy: str = 'out/sft' # who answers: folders, or models on the hub; several, separated by commas, in turn
    prompts: str = '' # prompt records
    answers: str = '' # instead of policy and prompts: rankings or comparisons, whose answers are ranked anew
    max_prompts: int = 0 # use the first so many; 0 = all
    select: str = '' # rank only `budget` of them, best first: random, uncertain, diverse (feedback/select_labels.py)
    budget: int = 0 # prompts to select
    ensemble: str = '' # for select=uncertain: reward models, separated by commas
    n_answers: int = 4 # K, answers per prompt
    max_new_tokens: int = 64
    temperature: float = 1.0 # of sampling
    annotator: str = 'simulated' # simulated (knows the gold score), human (you), ai, reward_model, function or policy
    reward_model: str = '' # for annotator=reward_model: the one whose scores rank
    reward: str = '' # function: MODULE:FUNCTION or FILE.py:FUNCTION of (record, response); this runs that file
    reward_policy: str = '' # policy: the one whose mean log pi(y|x) per token ranks, as in RRHF
    reward_reference: str = '' # policy: with it log pi(y|x) - log pi_reference(y|x) does, as in DPO
    ask: str = 'ranks' # of a person, simulated or not: ranks, or ratings, numbers for each answer
    qualities: str = 'score' # of ratings: what gets a number, among helpful,harmless,honest,score
    scale: int = 0 # of ratings: whole numbers from 1 to this; 0 = 5 for score alone, else 10
    gold: str = '' # simulated: MODULE:FUNCTION of (record, response), the gold score, as in data.toy.world:gold
    noise: float = 0.15 # of the simulated person: a gold difference of `noise` is seen with sigmoid(1) = 73 %; 0 = none
    tie: float = 0.0 # neighbours that seem at most this far apart (in units of its score) get the same rank
    page: bool = False # human: in a browser on this machine, not in the terminal
    port: int = 0 # of the page; 0 = any that is free
    guidelines: str = '' # a text file that the page shows
    rater: str = '' # human: whose judgements these are
    repeat: float = 0.0 # this share of each stretch is asked a second time: the rater's agreement with themself
    judge: str = '' # ai: a checkpoint that answers comparisons (see config/toy/judge.py)
    judge_url: str = '' # ai: or a server of the OpenAI chat API, as in https://HOST/v1; key in JUDGE_API_KEY
    judge_model: str = '' # the model's name there
    judge_instruction: str = 'config/judge/helpful_honest_harmless.txt' # what the judge is told
    judge_requests: int = 8 # under way at once
    judge_tokens: int = 512 # longest reply
    judge_timeout: float = 60.0 # seconds without a byte before a request is tried again; ten times that for all of it
    judge_tries: int = 6 # per request, later and later
    judge_cache: str = 'out/judge_cache.jsonl' # replies, so that a rerun asks nothing twice; empty = none
    split: int = 0 # nothing is ranked: deal what is to be ranked to so many raters, into OUT_1, OUT_2, …
    overlap: float = 0.0 # split: this share of the prompts goes to all raters, each other prompt to one
    compare: str = '' # rankings or comparisons of the same answers: print how far OUT agrees
    merge: str = '' # nothing of the above: merge these raters' files, separated by commas, into OUT
    rows: int = 0 # prompts answered ahead, a stretch; 0 = 16 for a person, who waits for them, 256 for others
    resume: bool | str = False # continue with OUT.partial; auto: if it is there
    overwrite: bool = False # replace OUT

    def __post_init__(self):
        super().__post_init__()
        if self.merge:
            files = self.merge.split(',')
            require(self, merge=(len(files) > 1 and len(set(files)) == len(files),
                                 'two files or more, each once, separated by commas'))
            others = [key for key in Config.__annotations__ if key not in ('merge', 'out', 'resume', 'overwrite')]
            return unread(self, False, 'a run without merge', *others)
        if self.split:
            unread(self, False, 'a run without split', *(key for key in Config.__annotations__ if key not in DEALT))
        at_least = dict(noise=0, tie=0, rows=0, max_prompts=0, judge_requests=1, judge_tokens=1, judge_tries=1,
                        n_answers=max(2 - (self.ask == 'ratings' and not self.select), len(self.policy.split(','))))
        require(self, **{key: (getattr(self, key) >= low, f"at least {low}") for key, low in at_least.items()})
        ai, uncertain, qualities = self.annotator == 'ai', self.select == 'uncertain', self.qualities.split(',')
        require(self, resume=(self.resume in (True, False, 'auto'), 'True, False or auto'),
                prompts=(bool(self.prompts) != bool(self.answers), 'a file of prompts, unless answers is given'
                               + ' (an empty --prompts= takes back what a config file says)' * bool(self.answers)),
                temperature=(self.temperature > 0, 'above 0'), keep=(self.keep in ('all', 'best'), 'all or best'),
                annotator=(self.annotator in ANNOTATORS, f"one of {', '.join(ANNOTATORS)}"),
                select=(self.select in ('', 'random', 'uncertain', 'diverse'), 'random, uncertain, diverse or empty'),
                budget=(self.budget > 0 if self.select else self.budget == 0, 'at least 1 with select, else 0'),
                ensemble=(',' in self.ensemble if uncertain else not self.ensemble,
                          'two reward models or more with select=uncertain, else empty'),
                reward_model=(bool(self.reward_model) == (self.annotator == 'reward_model'),
                              "a reward model's folder with annotator=reward_model, else empty"),
                reward=(bool(self.reward) == (self.annotator == 'function'),
                        'MODULE:FUNCTION or FILE.py:FUNCTION with annotator=function, else empty'),
                reward_policy=(bool(self.reward_policy) == (self.annotator == 'policy'),
                               "a language model's folder with annotator=policy, else empty"),
                reward_reference=(not self.reward_reference or self.annotator == 'policy',
                                  'empty unless annotator=policy'),
                ask=(self.ask == 'ranks' or self.ask == 'ratings' and self.annotator in ('simulated', 'human'),
                     'ranks, or with annotator=simulated or human ratings'),
                qualities=({*qualities} <= {*QUALITIES} and len({*qualities}) == len(qualities),
                           f"some of {','.join(QUALITIES)}, each once"),
                scale=(self.scale == 0 or 2 <= self.scale <= 10, 'from 2 to 10, or 0'),
                repeat=(0 <= self.repeat <= 0.5, 'between 0 and 0.5'), port=(0 <= self.port < 65536, '0 to 65535'),
                page=(not self.page or self.annotator == 'human', 'False unless annotator=human'),
                rater=(self.rater.isprintable() and self.rater == self.rater.strip(), "a person's name"),
                split=(self.split == 0 or 2 <= self.split <= 100, 'from 2 to 100, or 0'),
                overlap=(0 <= self.overlap <= 1, 'between 0 and 1'),
                judge=(bool(self.judge) != bool(self.judge_url) if ai else not self.judge,
                       'a checkpoint with annotator=ai, unless judge_url is given; else empty'),
                judge_url=(not self.judge_url or ai and is_url(self.judge_url),
                           'http://HOST… or https://HOST… with annotator=ai, else empty'),
                judge_model=(self.judge_model or not self.judge_url, "the model's name at judge_url"),
                judge_timeout=(0 < self.judge_timeout <= 3600, 'above 0 and at most 3600'))
        rated = self.ask == 'ratings'
        unread(self, rated, 'ask=ratings', 'qualities', 'scale')
        unread(self, not rated, 'ask=ranks', 'keep', 'repeat', 'compare', 'tie')
        unread(self, not self.answers, 'a run without answers', 'policy', 'n_answers', 'max_new_tokens', 'temperature')
        unread(self, self.annotator == 'simulated', 'annotator=simulated', 'gold', 'noise')
        unread(self, self.annotator != 'human', 'any annotator but human', 'tie')
        unread(self, self.annotator == 'human', 'annotator=human', 'rater')
        unread(self, self.page, 'page=True', 'port', 'guidelines')
        unread(self, self.split, 'split', 'overlap')
        unread(self, ai, 'annotator=ai', 'judge_instruction')
        unread(self, self.judge_url, 'judge_url', 'judge_model', 'judge_requests', 'judge_tokens', 'judge_timeout',
               'judge_tries', 'judge_cache')
        require(self, gold=(self.gold or self.annotator != 'simulated' or self.split, # last: it is asked of the default
                            'MODULE:FUNCTION with annotator=simulated, as in data.toy.world:gold'))
        self.scale = self.scale or (5 if self.qualities == 'score' else 10)
        self.rows = self.rows or (16 if self.annotator == 'human' else 256)

def task(record, without=OPINIONS):
    """Return a record without anybody's opinion of its answers."""
    return {k: v for k, v in record.items() if k not in without}

def n_tasks(cfg, n_prompts):
    """Return how many tasks a stretch of so many prompts has: some are asked a second time."""
    return n_prompts + round(cfg.repeat * n_prompts)

def make_annotator(cfg, run, reward):
    """Make the annotator that cfg asks for; reward: what a simulated person or annotator=function goes by."""
    if cfg.annotator in ('simulated', 'function'):
        return (SimulatedPerson if cfg.annotator == 'simulated' else RewardFunction)(cfg, reward)
    if cfg.annotator == 'human':
        return Page(cfg) if cfg.page else Terminal(cfg)
    if cfg.annotator == 'reward_model':
        return RewardModel(cfg, run)
    if cfg.annotator == 'policy':
        return PolicyReward(cfg, run)
    return ApiJudge(cfg, run) if cfg.judge_url else GPTJudge(cfg, run)

def load_writer(name, cfg, run, records):
    """Load one policy that answers: (name, model, tokenizer, the prompts' ids)."""
    tok = load_tokenizer(name, 'policy')
    model = load_policy(name).to(run.device)
    room = model.config.block_size - cfg.max_new_tokens
    return name, model, tok, encode_prompts(tok, records, room, f"prompts for {name}")

def warn_of_cuts(cfg, writers, records):
    """Say where people will see prompts whole that a writer does not."""
    spare = min(model.config.block_size - len(prompt_ids(tok, record['prompt']))
                for _, model, tok, _ in writers for record in records) # beside the longest prompt
    if spare < cfg.max_new_tokens:
        note("a policy reads only the end of a cut prompt, people see all of it: "
             + (f"--max_new_tokens={spare} cuts none" if spare > 0 else "a smaller --max_new_tokens cuts less"))

def write_answers(cfg, run, writers, records, stretch):
    """Sample K `responses` to each of the records numbered `stretch`; empty ones are left out.

    `ended` says which have their end. Several writers answer in turn, and `policies` then says who wrote what.
    """
    mine = run.rows(stretch) # each process writes its share
    answers = {i: [] for i in mine} # per prompt: (name, text, ended)
    for w, (name, model, tok, prompts) in enumerate(writers):
        K = len(range(w, cfg.n_answers, len(writers))) # answers of this one
        with run.autocast():
            sampled, logps = sample_answers(model, [prompts[i] for i in mine for _ in range(K)], tok,
                                            cfg.max_new_tokens, cfg.temperature) # K per prompt, in a row
        check_finite(run.gather(sum(map(sum, logps))), f"--policy={name}: its probabilities")
        for n, ids in enumerate(sampled):
            ended = ids[-1] == tok.eos
            text, _ = codecs.utf_8_decode(tok.decode_bytes(ids), 'replace', ended) # cut off: less half a character
            if text.strip():
                answers[mine[n // K]].append((name, text.removeprefix(' '), ended))
    answers, rows = run.merge(answers), []
    for i in stretch:
        names, texts, ended = zip(*answers[i]) if answers[i] else ((), (), ())
        rows.append(records[i] | dict(responses=list(texts), ended=list(ended)))
        if len(writers) > 1:
            rows[-1]['policies'] = list(names)
    return rows

def stretches(cfg, run, writers, records, skip=0):
    """Yield (number of its first record, seed, rows with their answers) of each stretch but the first `skip`.

    The prompts of a stretch are answered together, and its answers do not depend on the stretches before.
    """
    for first in range(skip * cfg.rows, len(records), cfg.rows):
        rows = records[first:first + cfg.rows]
        seed = cfg.seed * 1_000_003 + first # of this stretch alone
        torch.manual_seed(seed + run.rank)
        if (cfg.annotator == 'human' or cfg.split) and writers and not cfg.select:
            note(f"{cfg.policy}: writing answers to the next {len(rows)} prompts …")
        if writers:
            rows = write_answers(cfg, run, writers, records, range(first, first + len(rows)))
        yield first, seed, rows

def parts(cfg):
    """Return the files into which --split deals: OUT with _1, _2, … before its ending."""
    stem, end = os.path.splitext(cfg.out)
    return [f"{stem}_{k}{end}" for k in range(1, cfg.split + 1)]

def deal(cfg, rows):
    """Write what each of --split raters is to rank; rows: prompts with their answers.

    The seed draws the shared prompts, and who gets each other one. All files keep the prompts' order. Their `ranks` are
    0: nobody has said anything yet.
    """
    rankable = [row | dict(ranks=[0] * len(row['responses'])) for row in rows if len({*answers_of(row)}) > 1]
    if len(rankable) < cfg.split:
        fail(f"--split={cfg.split}: {len(rankable)} prompts have two different answers; wanted one for each "
             "rater at least")
    order, n = random.Random(cfg.seed).sample(range(len(rankable)), len(rankable)), round(cfg.overlap * len(rankable))
    os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
    for k, path in enumerate(parts(cfg)):
        mine = sorted(order[:n] + order[n + k::cfg.split])
        write_records(path, [rankable[i] for i in mine])
        print(f"{path}: {len(mine)} prompts, {n} of them for all raters")
    print(f"{len(rows) - len(rankable)} prompts left out (fewer than two different answers that are not empty)")
    stem, end = os.path.splitext(cfg.out)
    later = (f"{stem}_{k}{end}" for k in itertools.count(cfg.split + 1))
    if old := [*itertools.takewhile(os.path.exists, later)]: # their prompts are dealt to others now
        print(f"of an earlier deal, not to be ranked any more: {', '.join(old)}")

def check_out(cfg):
    """End the program where it would overwrite a file unasked."""
    for path in parts(cfg) or (cfg.out, cfg.out + '.skipped'):
        if os.path.exists(path) and not cfg.overwrite:
            fail(f"--out={cfg.out}: {path} exists already; replace it by --overwrite=True, or choose another name")
    if os.path.isdir(cfg.out):
        fail(f"--out={cfg.out}: is a folder, wanted a file")
    partial = cfg.out + '.partial'
    if os.path.exists(partial) and os.path.getsize(partial) and not (cfg.merge or cfg.resume or cfg.overwrite):
        fail(f"--out={cfg.out}: {partial} holds what is ranked already; continue it by --resume=True, or drop it by "
             "--overwrite=True")

def check_kept(row, firsts):
    """Raise ValueError where a row of OUT.partial is none; firsts: the prompts before it, each once."""
    if row.get('repeat') is True:
        raise ValueError('was written by an older version, which did not say whose second ranks these are; wanted it '
                         'finished by that version, or --overwrite=True')
    check_record(row, 'rankings' if 'ranks' in row else 'prompts')
    texts, number, rated = row.get('responses'), row.get('repeat', 0), row.get('ratings')
    check('`responses` to be a list of texts', isinstance(texts, list) and all(map(is_text, texts)))
    check('`ratings` to be an object of numbers for each response', rated is None or isinstance(rated, list) and len(
        rated) == len(texts) and all(isinstance(said, dict) and all(map(is_number, said.values())) for said in rated))
    check('`repeat` to be the number of a prompt before it', type(number) is int and 0 <= number < max(len(firsts), 1))

def shape_of(cfg):
    """Return {option: its value, or the sha256 of its files} of what shapes the rows."""
    shape = {k: v for k, v in vars(cfg).items() if k not in FREE}
    if not (cfg.repeat or cfg.select):
        del shape['max_prompts'] # more prompts do not change the first ones
    folders = dict(policy=[] if cfg.answers else cfg.policy.split(','), ensemble=cfg.ensemble.split(','),
                   **{k: [getattr(cfg, k)] for k in ('reward_model', 'reward_policy', 'reward_reference', 'judge')})
    files = {key: [path for name in names if name for path in weight_files(name)] for key, names in folders.items()}
    files |= dict(prompts=[cfg.prompts], answers=[cfg.answers],
                  judge_instruction=[cfg.judge_instruction] * (cfg.annotator == 'ai'))
    return shape | {key: 'sha256 ' + digest(*filter(None, paths)) for key, paths in files.items()}

def check_shape(cfg, shape):
    """End the program where OUT.partial began with other options or inputs."""
    partial = cfg.out + '.partial'
    if not os.path.exists(partial + '.json'): # no reason to lose hours of a person's work
        return note(f"{partial}: of an older version, its options are not known; wanted the same as before")
    before = read_json(partial + '.json')
    for key, value in shape.items():
        if before.get(key, value) != value:
            fail(f"--{key}={getattr(cfg, key)}: {partial} began with {before[key]}; wanted the same, or "
                 "--overwrite=True")

def read_partial(cfg, records):
    """Return the rows of `records` that are ranked already, with --resume=True. OUT.partial begins with them."""
    partial, size, kept, firsts = cfg.out + '.partial', n_tasks(cfg, cfg.rows), [], []
    for n, line in read_lines(partial) if cfg.resume is True or cfg.resume and os.path.exists(partial) else ():
        if line.endswith(b'\n'): # a kill may have cut the last one
            try:
                kept.append(parse_line(line))
                check_kept(kept[-1], firsts)
            except ValueError as e:
                fail(f"{partial}:{n}: {e}")
            firsts += [kept[-1]['prompt']] * ('repeat' not in kept[-1])
    if firsts != [record['prompt'] for record in records[:len(firsts)]]:
        fail(f"{partial}: holds other prompts than those of this run; wanted the options that it began with, or "
             "--overwrite=True")
    shape = shape_of(cfg)
    if kept:
        check_shape(cfg, shape)
    os.makedirs(os.path.dirname(cfg.out) or '.', exist_ok=True)
    lock(cfg.out + '.lock') # until here nothing was touched
    check_out(cfg) # another process may have been at work
    if cfg.annotator == 'simulated': # whose noise is drawn in a row for a stretch: it is ranked as a whole
        kept = kept[:len(kept) // size * size]
    write_records(partial, kept)
    write_records(partial + '.json', [shape]) # after it: rows that are dropped never stand beside another's options
    return kept

def left_to_rank(cfg, rows, done, first, seed):
    """Return a stretch's tasks that are not `done`, the next one last. Some rows come a second time."""
    rows = [task(row) for row in done if 'repeat' not in row] + rows[len(done):] # should sampling not be repeatable
    rows = [row | dict(annotator=cfg.annotator) | ({'rater': cfg.rater} if cfg.rater else {}) for row in rows]
    again = random.Random(seed).sample(range((len(rows) + 1) // 2), n_tasks(cfg, len(rows)) - len(rows)) # some time ago
    again = [rows[i] | dict(repeat=first + i) for i in again] # the number of the prompt
    return (rows + again)[len(done):][::-1]

def keep(cfg, kept, row, **said):
    """Add a row, with what was said of it, to OUT.partial."""
    kept.append(row | {k: v for k, v in said.items() if v is not None})
    with open(cfg.out + '.partial', 'a', encoding='utf-8') as f:
        f.write(to_lines(kept[-1:]))
        f.flush()
        if cfg.annotator == 'human':
            os.fsync(f.fileno())

def take_back(cfg, kept, todo):
    """Move the row shown last, and all after it, back to `todo`."""
    while kept:
        todo.append(task(kept.pop(), without=('ranks', 'ratings', 'seconds', 'skipped')))
        if len(set(answers_of(todo[-1]))) > (cfg.ask == 'ranks'):
            break # this one was shown
    else:
        note("nothing to undo: this is the first prompt")
    os.truncate(cfg.out + '.partial', len(to_lines(kept).encode()))

def tidy(cfg, skipped):
    """Write what was skipped, and remove what stands beside OUT meanwhile."""
    if skipped:
        write_records(cfg.out + '.skipped', skipped)
        print(f"{cfg.out}.skipped: {len(skipped)} prompts skipped, with the reasons")
    for end in ('.partial', '.partial.json', '.lock') + ('.skipped',) * (not skipped):
        with contextlib.suppress(FileNotFoundError):
            os.remove(cfg.out + end)

def write_ratings(cfg, kept):
    """Write OUT in place of OUT.partial: a rating of each distinct answer. Return them."""
    ratings, lost = [], sum('ratings' not in row for row in kept)
    for row in kept:
        rated = dict(zip(answers_of(row), row.get('ratings', [])))
        writers = {} # {answer: the policies that wrote it, separated by commas}
        for answer, name in zip(answers_of(row), row.get('policies', [])):
            writers[answer] = ','.join(dict.fromkeys([*writers.get(answer, name).split(','), name]))
        for answer, said in rated.items():
            ratings.append(task(row, OPINIONS + ANSWERS + QUALITIES) | dict(response=answer[0], ended=answer[1]) | said
                           | {k: row[k] for k in ('rater', 'seconds') if k in row})
            if writers:
                ratings[-1]['policy'] = writers[answer]
    if ratings:
        write_records(cfg.out, ratings)
    tidy(cfg, [row for row in kept if 'skipped' in row])
    print(f"{cfg.out}: {len(kept) - lost} prompts, {len(ratings)} answers rated from 1 to {cfg.scale}, {lost} prompts "
          "left out" + " (skipped, or all answers empty)" * (lost > 0))
    return ratings

def write_rankings(cfg, kept):
    """Write OUT in place of OUT.partial, and return the ranked rows; without any there is nothing to write."""
    firsts = [row for row in kept if 'repeat' not in row]
    for row in kept:
        if 'repeat' in row and 'ranks' in row:
            first = firsts[row['repeat']] # it may have been skipped the first time
            first |= dict(again=row['ranks']) if 'ranks' in first else task(row, without=('repeat',))
    ranked = [task(row, without=('skipped',)) for row in firsts if 'ranks' in row]
    best = []
    for row in ranked:
        response, ended = answers_of(row)[row['ranks'].index(0)]
        best.append(dict(prompt=row['prompt'], response=response, ended=ended))
    if ranked:
        write_records(cfg.out, best if cfg.keep == 'best' else ranked)
    tidy(cfg, [row for row in firsts if 'skipped' in row and 'ranks' not in row])
    pairs, lost = sum(a < b for row in ranked for a in row['ranks'] for b in row['ranks']), len(firsts) - len(ranked)
    why = ('skipped, or without two different answers' if cfg.annotator == 'human' else
           'without two answers that are not empty, or with one that could not be judged')
    print(f"{cfg.out}: {len(ranked)} prompts, {sum(len(row['ranks']) for row in ranked)} answers, {pairs} pairs, "
          + 'the best answers kept, ' * (cfg.keep == 'best') + f"{lost} prompts left out"
          + f" ({why})" * (lost > 0))
    ends = [ended for row in ranked for _, ended in answers_of(row)]
    if cut := ends.count(False):
        print(f"{cut} of {len(ends)} answers were cut off before their end"
              + f": --max_new_tokens={cfg.max_new_tokens} is small" * (cut > len(ends) / 10 and not cfg.answers))
    return ranked

def main(cfg):
    if cfg.merge:
        check_out(cfg)
        return agreement.merge(cfg.merge.split(','), cfg.out)
    run = start(cfg)
    if cfg.annotator == 'human':
        if run.world_size > 1:
            fail(f"--annotator=human: wanted one process, got {run.world_size}")
    if cfg.annotator == 'human' or cfg.split:
        default_signals() # everything said is saved: the first Ctrl-C ends
    run.first(lambda: check_out(cfg))
    others = read_preferences(cfg.compare) if cfg.compare else []
    records = read_preferences(cfg.answers) if cfg.answers else read_records(cfg.prompts, 'prompts')
    without = OPINIONS if cfg.answers else OPINIONS + ANSWERS # prompts may come with answers that are not asked about
    records = [task(record, without) for record in records[:cfg.max_prompts or None]]
    option = dict(simulated='gold', function='reward').get(cfg.annotator)
    reward = option and load_reward_function(getattr(cfg, option), option, records, cfg.answers or cfg.prompts)
    writers = [] if cfg.answers else [load_writer(name, cfg, run, records) for name in cfg.policy.split(',')]
    if writers and (cfg.annotator == 'human' or cfg.split):
        warn_of_cuts(cfg, writers, records)
    ensemble = load_ensemble(cfg, run, writers)
    if cfg.select:
        rows = [row for _, _, rows in stretches(cfg, run, writers, records) for row in rows]
        records, writers = choose(rows, cfg, run, ensemble), [] # they have their answers
    if cfg.split:
        rows = [row for _, _, rows in stretches(cfg, run, writers, records) for row in rows]
        run.first(lambda: deal(cfg, rows))
        return stop(run)
    annotator = make_annotator(cfg, run, reward) if run.is_master else None # the first process ranks and writes
    kept = run.first(lambda: read_partial(cfg, records)) # once all input is read
    size, (whole, rest) = n_tasks(cfg, cfg.rows), divmod(len(records), cfg.rows)
    total = whole * size + n_tasks(cfg, rest)
    skip = len(kept) // size # stretches that are ranked as a whole
    try:
        with progress(total=total, initial=len(kept), desc=cfg.out, unit='prompts',
                      disable=cfg.annotator == 'human' or not run.is_master) as bar:
            for first, seed, rows in stretches(cfg, run, writers, records, skip):
                todo = []
                if run.is_master:
                    todo = left_to_rank(cfg, rows, kept[first // cfg.rows * size:], first, seed)
                    annotator.rng.seed(seed)
                    annotator.look_ahead(todo)
                while todo and (cfg.annotator == 'simulated' or not run.interrupted):
                    row, annotator.progress, annotator.about = todo.pop(), (len(kept), total), {}
                    ranks = scores = ratings = None
                    try:
                        if cfg.ask == 'ratings' and row['responses']:
                            ratings = annotator.rate(row)
                        elif cfg.ask == 'ranks' and len(row['responses']) >= 2:
                            ranks, scores = annotator.rank(row)
                            check_finite(scores or (), f"--annotator={cfg.annotator}: its scores of an answer")
                        keep(cfg, kept, row, ranks=ranks, scores=scores, ratings=ratings, **annotator.about)
                        bar.update()
                    except Undo:
                        todo.append(row)
                        take_back(cfg, kept, todo)
                    except KeyboardInterrupt:
                        if not run.interrupted: # a person quits
                            raise
                        break # all processes stop together
                if number := run.stop_requested():
                    raise KeyboardInterrupt(number)
        write = write_ratings if cfg.ask == 'ratings' else write_rankings
        ranked = write(cfg, kept) if run.is_master else [] # before the page's server closes
    except KeyboardInterrupt:
        ready = kept and all('ranks' in row and 'repeat' not in row for row in kept)
        note(f"kept {cfg.out}.partial, {len(kept)} of {total} prompts; --resume=True continues"
             + "; --merge and reward.py, dpo.py, rrhf.py, kto.py read it as it is" * bool(ready))
        raise
    except JudgeError as e:
        message, code = e.args
        fail(f"--judge_url={cfg.judge_url}: {message}; kept {cfg.out}.partial, --resume=True continues", code)
    finally:
        if run.is_master:
            annotator.progress = len(kept), total
            said = annotator.close()
    stop(run)
    if not run.is_master:
        return
    if said:
        print(said)
    if not ranked:
        fail(f"--out={cfg.out}: not written, no prompt was {'rated' if cfg.ask == 'ratings' else 'ranked'}", code=1)
    if cfg.repeat:
        print(f"agreement with oneself: {agreement.with_oneself(ranked)}")
    if others:
        print(f"agreement with {cfg.compare}: {agreement.compare(ranked, others)}")

if __name__ == '__main__':
    launch(main, Config)
