"""
Measure any list of checkpoints on held-out prompts: how good their answers are, how far they have moved from the
reference, and what that cost. Every model answers every prompt twice, sampled at temperature 1 and greedily.

    python evaluate.py config/toy/evaluate.py
    python evaluate.py --models=sft=out/sft,dpo=out/dpo --prompts=prompts.jsonl --reward_model=out/reward
    python evaluate.py --figure_runs="beta 0=out/a,beta 0.1=out/b"

The first prints tables and writes results.json, samples.jsonl (all answers) and figures to out_dir. The last draws one
figure alone: reward-model score and gold score against the KL along PPO runs, from their logs.

What is measured, per model:

    gold, helpful, honest, harmless    the toy world's gold score, and how often the content is right in each kind
    reward                             the reward model's mean score
    win_rate_vs_BASELINE               by gold score, without one by reward; with win_rate_interval, 95 %
    kl                                 KL(model || reference) in nats per answer, exact at every token
    perplexity                         on held-out text, or on the answers of held-out demonstrations
    distinct_1, distinct_2, self_bleu  how varied the answers are
    length, ended                      tokens per answer with its EOS; share of answers that end with EOS
"""

import json
import math
import os
import signal
import time
from collections import Counter, namedtuple
from dataclasses import dataclass
from itertools import combinations

import common
import figures
from common import check_common, fail, launch, require

import torch

from model import load_policy, load_reward_model
from rollout import (check_gold, check_same_vocabulary, frozen_rewards, in_chunks, pack, pair_agreement, sample_answers,
                     score_answers, score_records)
from tokens import (collate, encode_prompts, load_tokenizer, load_training_set, read_preferences, read_records,
                    write_records)

DECODINGS = {'sampled': 1.0, 'greedy': 0.0} # and their temperatures
TOKENS = 2048 # so many tokens' logits (N, V) are in memory at once
Answers = namedtuple('Answers', 'texts rewards parts') # of one model to all prompts; parts: world.explain() of each


@dataclass
class Config:
    out_dir: str = 'out/evaluate' # results.json, samples.jsonl and the figures
    models: str = '' # name=folder,name=folder,… the checkpoints to measure; a folder may also be a model on the hub
    baseline: str = 'sft' # a name among models: win rates are against it
    reference: str = '' # a name among models: the KL is to it; empty = the baseline
    reward_model: str = '' # a reward model, folder or on the hub; empty = none
    best_of: int = 0 # also best_of_n: of so many answers of the baseline the reward model's favourite; 0 = off
    prompts: str = '' # held-out prompt records
    max_prompts: int = 0 # use the first so many; 0 = all
    max_new_tokens: int = 64 # longest answer, EOS included
    text: str = '' # held-out text or demonstrations, for the perplexity; empty = none
    rankings: str = '' # held-out rankings or comparisons, for the reward model; empty = none
    comparisons: str = '' # controlled pairs with a key `category`, for the reward model; empty = none
    gold: str = '' # toy: the gold score of data/toy/world.py; empty = none
    figures: bool = True # draw them (needs matplotlib)
    figure_runs: str = '' # label=folder,… of PPO runs: also draw overoptimisation.png from their logs
    seed: int = 1
    device: str = 'auto' # auto, cpu, cuda, cuda:N, mps
    dtype: str = 'auto' # float32; bfloat16 or float16 (autocast); auto: bfloat16 on CUDA, float16 where it lacks that

    def __post_init__(self):
        check_common(self)
        require(self, models=(self.models != '' or self.figure_runs != '', 'name=folder,name=folder,…'),
                prompts=(self.prompts != '' or self.models == '', 'a file of prompts'),
                gold=(self.gold in ('', 'toy'), 'toy or empty'), max_prompts=(self.max_prompts >= 0, 'at least 0'),
                best_of=(self.best_of == 0 or self.best_of >= 2 and self.reward_model != '',
                         '0, or at least 2 together with a reward_model'))


def named_folders(text, option):
    """'a=out/a,b=out/b' -> {'a': 'out/a', 'b': 'out/b'}. A name may hold '=', a folder may not."""
    folders = {}
    for part in text.split(','):
        name, _, folder = (x.strip() for x in part.rpartition('='))
        if not name or not folder or name in folders:
            fail(f"--{option}={text}: wanted name=folder,name=folder,… with each name once, got {part!r}")
        folders[name] = folder
    return folders

# ----------------------------------------------------------------------------------------------------------------
# statistics of texts

def mean(values):
    """The mean, or None where there is nothing to average."""
    values = list(values)
    return sum(values) / len(values) if values else None


def ngrams(words, n):
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def distinct(texts, n):
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016, https://arxiv.org/abs/1510.03055)."""
    counts = sum((ngrams(text.split(), n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else 0.0


def self_bleu(texts, at_most=200):
    """
    Mean BLEU-4 of each text with all the others as its references (Zhu et al. 2018, Texygen,
    https://arxiv.org/abs/1802.01886): 1 = all alike. Over the first `at_most` texts; words are split at white space.

    BLEU (Papineni et al. 2002) = min(1, e^(1 - r/c)) * (p_1 p_2 p_3 p_4)^(1/4), c the text's length, r the closest
    length of a reference. p_n is the share of n-grams found in a reference, each at most as often as in the reference
    that has it most often. Where none is found, 0.1 counts as found (Chen and Cherry 2014, method 1); a text shorter
    than 4 words uses the p_n that it has.
    """
    rows = [text.split() for text in texts[:at_most] if text.split()]
    if len(rows) < 2:
        return 0.0
    grams = [{n: ngrams(words, n) for n in range(1, 5)} for words in rows]
    # n-gram -> [highest count, whose, highest count among the others]: who is left out as a reference is looked up
    top = {}
    for i, by_n in enumerate(grams):
        for n in by_n:
            for gram, count in by_n[n].items():
                best = top.setdefault(gram, [0, None, 0])
                if count > best[0]:
                    best[:] = count, i, best[0]
                elif count > best[2]:
                    best[2] = count
    total, lengths = 0.0, Counter(map(len, rows))
    for i, words in enumerate(rows):
        log_p, c = [], len(words)
        for n in range(1, min(4, c) + 1):
            found = sum(min(count, top[gram][2] if top[gram][1] == i else top[gram][0])
                        for gram, count in grams[i][n].items())
            log_p.append(math.log((found or 0.1) / (c - n + 1)))
        r = min(lengths - Counter([c]), key=lambda length: (abs(length - c), length))
        total += math.exp(min(0.0, 1 - r / c) + sum(log_p) / len(log_p))
    return total / len(rows)

# ----------------------------------------------------------------------------------------------------------------
# comparisons

def win_rate(scores, baseline_scores):
    """Share of prompts on which scores (N,) beat baseline_scores (N,); a tie is half a win."""
    return mean(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(scores, baseline_scores))


def wilson(p, n, z=1.959964):
    """
    95 % interval of a share p seen in n trials (Wilson 1927). It stays within [0, 1] and keeps a width at p = 0 and 1.
    With ties as half a win the wins vary less than a coin of the same p, so the interval errs on the wide side.
    """
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def calibration(pairs, bins=10):
    """
    Is sigmoid(score_a - score_b) the share of pairs in which a is preferred? A pair is turned so that a has the higher
    score: the prediction lies in [0.5, 1]. pairs: list of (score_a - score_b, 1.0 if a is preferred else 0.0).
    Returns [mean prediction, share preferred, pairs] of each bin that is not empty, and the mean distance of the two
    over all pairs (expected calibration error, Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3).
    """
    groups = {}
    for difference, preferred in pairs:
        preferred = 0.5 if difference == 0 else preferred if difference > 0 else 1 - preferred
        p = 1 / (1 + math.exp(-abs(difference)))
        groups.setdefault(min(bins - 1, int((p - 0.5) * 2 * bins)), []).append((p, preferred))
    table = [[mean(p for p, _ in g), mean(x for _, x in g), len(g)] for _, g in sorted(groups.items())]
    return table, sum(abs(p - share) * n for p, share, n in table) / max(1, len(pairs))

# ----------------------------------------------------------------------------------------------------------------
# models on data

def token_kl(model, reference, idx, mask):
    """
    KL(model || reference) in nats at each token counted by mask (B, T-1), 0 elsewhere: sum_v p(v) log(p(v) / q(v)) over
    the whole vocabulary, in float32. idx: (B, T). Returns (B, T-1).
    """
    logp = model.masked_logits(idx, mask).log_softmax(-1) # (N, V), N counted tokens
    logq = reference.masked_logits(idx, mask).log_softmax(-1) # (N, V)
    return torch.zeros_like(mask).masked_scatter(mask > 0, (logp.exp() * (logp - logq)).sum(-1))


@torch.no_grad()
def answer_kl(model, reference, r, rows):
    """The same, summed over each answer of the rollouts r: (B,)."""
    return in_chunks(lambda c, T: token_kl(model, reference, r.idx[c, :T], r.mask[c, :T - 1]).sum(1), r.lengths, rows,
                     torch.zeros(len(r.idx), device=r.idx.device))


@torch.no_grad()
def perplexity(model, batches, device):
    """exp of the mean negative log-likelihood per counted token of batches of (ids, mask) rows."""
    total = counted = 0.0
    for batch in batches:
        idx, mask = (x.to(device) for x in collate(batch)) # (B, T), (B, T-1)
        total, counted = total + (model.logp(idx, mask) * mask).sum().item(), counted + mask.sum().item()
    return math.exp(-total / counted)


def measure_reward_model(model, tok, cfg, block_size, device):
    """
    Accuracy on held-out rankings, beside two references: `ceiling`, how often the annotator's own scores without noise
    agree with the ranks, and `shorter_wins`, which prefers the shorter answer. By category on controlled pairs.
    """
    def score(path, name):
        """-> [(record, scores of its answers)] of the records that fit the context."""
        records = read_preferences(path)
        return [(records[i], scores) for i, scores in score_records(model, tok, records, block_size, name, device)]

    def share(guesses):
        """guesses: [(record, what orders its answers)]; the share of pairs in the order of the ranks."""
        points = [pair_agreement(guess, record['ranks']) for record, guess in guesses]
        pairs = sum(n for _, n in points)
        return sum(right for right, _ in points) / pairs if pairs else None

    out = {}
    if cfg.rankings:
        scored = score(cfg.rankings, 'rankings')
        out['accuracy'] = share(scored)
        out['ceiling'] = share([(r, r['scores']) for r, _ in scored if r.get('scores')])
        out['shorter_wins'] = share([(r, [-len(text) for text in r['responses']]) for r, _ in scored])
        out['calibration'], out['calibration_error'] = calibration([
            (s - t, float(i < j)) for record, scores in scored
            for (s, i), (t, j) in combinations(zip(scores, record['ranks']), 2) if i != j])
    if cfg.comparisons:
        groups = {}
        for record, scores in score(cfg.comparisons, 'comparisons'):
            groups.setdefault(record.get('category', 'all'), []).append((record, scores))
        out['by_category'] = {category: share(scored) for category, scored in groups.items()}
    return out


def describe(r, answers):
    """What can be said of answers, with their tokens in the rollouts r, without the model that gave them."""
    row, parts, texts = {}, answers.parts, answers.texts
    if parts:
        row['gold'] = mean(p['gold'] for p in parts)
        for kind in ('helpful', 'honest', 'harmless'):
            row[kind] = mean(p['content'] for p in parts if p['kind'] == kind)
        row['by_category'] = {c: mean(p['content'] for p in parts if p['category'] == c)
                              for c in sorted({p['category'] for p in parts})}
    if answers.rewards:
        row['reward'] = mean(answers.rewards)
    return row | dict(distinct_1=distinct(texts, 1), distinct_2=distinct(texts, 2), self_bleu=self_bleu(texts),
                      length=r.mask.sum(1).mean().item(), ended=r.ended.mean().item())

# ----------------------------------------------------------------------------------------------------------------
# tables

def show(value):
    return '–' if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def print_table(title, header, rows):
    """rows: lists of strings; the first column is flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        print('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))


def print_results(results, samples, baseline):
    win, names = f'win_rate_vs_{baseline}', list(results['models'])
    for title, table in (('sampled at temperature 1', results['models']), ('greedy', results['greedy'])):
        columns = [c for c in table[baseline] if c not in ('by_category', 'win_rate_interval')]
        print_table(f"answers {title}", ['model'] + columns, [[name] + [
            show(row[c]) + (' [{:.2f}, {:.2f}]'.format(*row['win_rate_interval']) if c == win else '') for c in columns]
            for name, row in table.items()])
        if 'by_category' in table[baseline]:
            print_table(f"right content by category, {title}", ['category'] + names, [
                [c] + [show(table[name]['by_category'][c]) for name in names] for c in table[baseline]['by_category']])
    judge = results['reward_model']
    if judge:
        shares = {k: judge[k] for k in ('accuracy', 'ceiling', 'shorter_wins') if k in judge}
        print_table("reward model: pairs ordered as preferred", ['pairs', 'share'],
                    [[k, show(v)] for k, v in (shares | judge.get('by_category', {})).items()])
    first = {} # one prompt of each kind, or without kinds the first three
    for i in range(0, len(samples), len(names)):
        first.setdefault(samples[i].get('kind', i), i)
    for i in list(first.values())[:3]:
        prompt = samples[i]['prompt']
        print('\n' + (prompt if isinstance(prompt, str) else ' / '.join(m['content'] for m in prompt)))
        for sample in samples[i:i + len(names)]:
            gold = f"  (gold {sample['sampled_gold']:.1f})" if 'sampled_gold' in sample else ''
            print(f"  {sample['model'].ljust(max(map(len, names)))}  {sample['sampled']!r}{gold}")

# ----------------------------------------------------------------------------------------------------------------

def load_models(cfg):
    """-> ({name: model}, reward model or None, tokenizer), checked against one another before any work is done."""
    folders = named_folders(cfg.models, 'models')
    for option in ('baseline', 'reference'):
        name = getattr(cfg, option) or cfg.baseline
        if name not in folders:
            fail(f"--{option}={name}: wanted one of the names in --models: {', '.join(folders)}")
    if cfg.best_of and 'best_of_n' in folders:
        fail("--models: best_of_n is what --best_of calls its own answers, wanted another name")
    first = folders[cfg.baseline]
    models = {name: load_policy(folder, 'models').eval() for name, folder in folders.items()}
    judge = load_reward_model(cfg.reward_model).eval() if cfg.reward_model else None
    tok = load_tokenizer(first)
    for name, folder in [*folders.items()] + ([('reward_model', cfg.reward_model)] if judge else []):
        check_same_vocabulary(models[cfg.baseline], models.get(name, judge), 'models', folder, tok)
    return models, judge, tok


def main(cfg):
    started = time.time()
    run = common.start(cfg)
    signal.signal(signal.SIGINT, signal.default_int_handler) # there is nothing to save: the first Ctrl-C ends
    os.makedirs(cfg.out_dir, exist_ok=True)
    if not os.access(cfg.out_dir, os.W_OK):
        fail(f"--out_dir={cfg.out_dir}: no permission; wanted a folder that can be written to")
    if cfg.models:
        results, samples = evaluate(cfg, run)
        print_results(results, samples, cfg.baseline)
        write_records(os.path.join(cfg.out_dir, 'samples.jsonl'), samples)
        results['seconds']['evaluate'] = round(time.time() - started, 2)
        path = os.path.join(cfg.out_dir, 'results.json')
        common.write_atomic(path, json.dumps(rounded(results), indent=2) + '\n')
        print(f"wrote {path}")
        if cfg.figures:
            judge = {'reward model': cfg.reward_model} if cfg.reward_model else {}
            figures.learning_curves(named_folders(cfg.models, 'models') | judge, cfg.out_dir)
            quality = results['reward_model']
            if quality.get('calibration'):
                intervals = [wilson(share, n) for _, share, n in quality['calibration']]
                figures.calibration(quality['calibration'], intervals, quality['calibration_error'], cfg.out_dir)
            figures.reward_kl(results['models'], cfg.out_dir)
    if cfg.figure_runs:
        figures.over_optimisation(named_folders(cfg.figure_runs, 'figure_runs'), cfg.out_dir)
    common.stop(run)


def evaluate(cfg, run):
    """All models on all prompts; returns the content of results.json and the rows of samples.jsonl."""
    models, judge, tok = load_models(cfg)
    for model in filter(None, [*models.values(), judge]):
        run.freeze(model)
    baseline, reference, K = cfg.baseline, models[cfg.reference or cfg.baseline].to(run.device), cfg.best_of
    block_size = min(model.config.block_size for model in [*models.values(), judge] if model)
    records = read_records(cfg.prompts, 'prompts')[:cfg.max_prompts or None]
    if cfg.gold:
        check_gold(records, cfg.prompts)
    prompts = encode_prompts(tok, records, block_size - cfg.max_new_tokens)
    held_out, quality = [], {}
    if cfg.text:
        data, _ = load_training_set(cfg.text, tok, block_size, max(1, TOKENS // block_size), cfg.seed, name='text')
        held_out = data.in_order(0) # every token is predicted once
    table = {decoding: {} for decoding in DECODINGS} # decoding -> name -> its row of results
    answered = {} # (decoding, name) -> Answers

    def study(decoding, name, model, answers):
        """Fill the row of `name` from its answers (lists of ids). model None: best_of_n, which has no probabilities."""
        r = pack(prompts, answers, [[0.0] * len(a) for a in answers], tok.eos).to(run.device)
        texts = [tok.decode(a).removeprefix(' ') for a in answers]
        rewards = frozen_rewards(judge, r.idx, r.lengths).tolist() if judge else []
        answered[decoding, name] = Answers(texts, rewards, explain(records, texts) if cfg.gold else [])
        row = table[decoding][name] = describe(r, answered[decoding, name])
        if model is None: # an upper bound (Stiennon et al. 2020, appendix G.3), to the model that was sampled from
            row['kl'] = math.log(K) - (K - 1) / K if reference is models[baseline] else None
        else:
            rows = max(1, TOKENS // cfg.max_new_tokens) # answers per forward pass
            row['kl'] = 0.0 if model is reference else answer_kl(model, reference, r, rows).mean().item()
        if held_out:
            row['perplexity'] = ppl if model else None
        bar.update()

    bar = common.progress(total=2 * len(models) + (K > 0), desc='evaluate', unit='passes')
    with run.autocast():
        if judge:
            quality = measure_reward_model(judge.to(run.device), tok, cfg, block_size, run.device)
        for name, model in models.items():
            model.to(run.device)
            ppl = perplexity(model, held_out, run.device) if held_out else None
            for decoding, temperature in DECODINGS.items():
                # one seed for all, so that no model's answers depend on which others are in the list; another for the
                # baseline, so that the answers compared with its own are independent of them
                torch.manual_seed(3 * cfg.seed + (name != baseline))
                study(decoding, name, model, sample_answers(model, prompts, tok, cfg.max_new_tokens, temperature)[0])
            if name == baseline and K:
                torch.manual_seed(3 * cfg.seed + 2)
                repeated = [p for p in prompts for _ in range(K)]
                answers = sample_answers(model, repeated, tok, cfg.max_new_tokens)[0]
                scores = score_answers(judge, repeated, answers, run.device).view(-1, K) # (B, K)
                best = scores.argmax(1).tolist() # (B,)
                study('sampled', 'best_of_n', None, [answers[b * K + k] for b, k in enumerate(best)])
            if model is not reference:
                model.to('cpu') # room for the next one
    bar.close()

    for (decoding, name), answers in answered.items():
        theirs, row = answered[decoding, baseline], table[decoding][name]
        if answers.parts or answers.rewards: # the baseline against itself is a half by definition
            share = 0.5 if name == baseline else win_rate(*(
                [p['gold'] for p in a.parts] if cfg.gold else a.rewards for a in (answers, theirs)))
            row[f'win_rate_vs_{baseline}'] = share
            row['win_rate_interval'] = [0.5, 0.5] if name == baseline else wilson(share, len(prompts))
    if K: # the best of n equal answers is the greedy answer; the last row of both tables
        table['sampled']['best_of_n'] = table['sampled'].pop('best_of_n')
        table['greedy']['best_of_n'] = table['greedy'][baseline]
        answered['greedy', 'best_of_n'] = answered['greedy', baseline]
    samples = []
    for i, record in enumerate(records):
        for name in table['sampled']:
            samples.append(record | {'model': name})
            for decoding in DECODINGS:
                a = answered[decoding, name]
                samples[-1][decoding] = a.texts[i]
                samples[-1] |= {decoding + '_gold': a.parts[i]['gold']} if a.parts else {}
                samples[-1] |= {decoding + '_reward': round(a.rewards[i], 6)} if a.rewards else {}
    return dict(models=table['sampled'], greedy=table['greedy'], reward_model=quality, seconds={}, seed=cfg.seed,
                baseline=baseline, reference=cfg.reference or baseline, prompts=len(prompts)), samples


def explain(records, texts):
    """The toy world's verdict on each answer, part by part."""
    from data.toy import world
    return [world.explain(record['prompt'], text) for record, text in zip(records, texts)]


def rounded(x):
    """The same structure with floats at six digits; what is not a number becomes null, as JSON has no word for it."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return x if not isinstance(x, float) else round(x, 6) if math.isfinite(x) else None


if __name__ == '__main__':
    launch(main, Config)
