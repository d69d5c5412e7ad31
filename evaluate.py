"""Measure any list of checkpoints on held-out prompts, and draw the figures.

    python evaluate.py config/toy/evaluate.py
    python evaluate.py --models=sft=out/sft,dpo=out/dpo --prompts=prompts.jsonl --reward_model=out/reward
    python evaluate.py --models=sft=out/sft --prompts=prompts.jsonl --safety=data/safety/xstest_prompts.jsonl
    python evaluate.py --figure_runs="beta 0=out/a,beta 0.1=out/b"

Every model answers every prompt twice, sampled at temperature 1 and greedily. The first two print tables and write to
out_dir results.json (docs/log.md lists its keys), samples.jsonl (all answers), figures, and report.html, a page with
all of it. Results that are there already are replaced with --overwrite=True alone. The last draws one figure alone:
reward-model score and gold score against the KL along PPO runs, from their logs.
"""

import json
import math
import os
import sys
import time
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from itertools import chain, permutations, repeat

from common.batches import by_length, collate, encode_prompts, encode_rankings, load_training_set
from common.checkpoints import load_policy, load_reward_model
from common.options import RunOptions, fail, launch, require, unread
from common.records import files_of, lock, read_preferences, read_records, write_atomic, write_records
from common.rollout import (beats, check_same_vocabulary, frozen_rewards, in_chunks, pack, packed, sample_answers,
                            score_packed)
from common.run import default_signals, place_among_processes, progress, start, stop
from common.tokens import load_tokenizer
from feedback.annotators import check_finite, visible
from feedback.functions import guarded, load_reward_function, module_of
from feedback.safety import encode_pairs, likelier, rates, read_safety, verdicts
from feedback.scores import score_answers
from lab.wins import length_controlled, wilson
from lab import figures, report
from lab.tables import align

import torch

DECODINGS = {'sampled': 1.0, 'greedy': 0.0} # and their temperatures
# The KL at each token, summed along an answer: a mean over sampled answers estimates the KL between the distributions
# of answers; along the greedy answer it is that of one path
KL = {'sampled': 'kl', 'greedy': 'path_kl'}
# What is said to an answerable question. All else is wrong, broken text too
SAID = {'right': 'right', "doesn't know": 'abstains', 'declines': 'declines'}
TOKENS = 2048 # so many tokens' logits (N, V) are in memory at once
# One model's answers to all prompts, their rewards, and the row of results. parts: a dict for each answer, with `gold`
# and, if the gold score's module has a function `explain`, whatever that returns (kind, category, content, …)
Written = namedtuple('Written', 'texts rewards parts row')

@dataclass
class Config(RunOptions):
    out_dir: str = 'out/evaluate' # results.json, samples.jsonl, the figures and report.html
    models: str = '' # name=folder,name=folder,… the checkpoints to measure; a folder may also be a model on the hub
    baseline: str = 'sft' # a name among models: win rates are against it
    reference: str = '' # a name among models: the KL is to it; empty = the baseline
    reward_model: str = '' # a reward model, folder or on the hub; empty = none
    best_of: int = 0 # also best_of_n: of so many answers of the baseline the reward model's favourite; 0 = off
    prompts: str = '' # held-out prompt records
    max_prompts: int = 0 # use the first so many; 0 = all
    max_new_tokens: int = 64 # longest answer, EOS included
    text: str = '' # held-out text or demonstrations, for the perplexity; empty = none
    rankings: str = '' # held-out rankings or comparisons, for the reward model and the policies as one; empty = none
    comparisons: str = '' # the same, controlled pairs with a key `category`; empty = none
    safety: str = '' # harmful and benign prompts, or pairs of sentences (data/safety/prepare.py); several with commas
    reward: str = '' # a reward function, named like gold; its value is the reward, or is added to the reward model's
    reward_weight: float = 1.0 # of it
    gold: str = '' # a gold score, MODULE:FUNCTION or FILE.py:FUNCTION, as in data.toy.world:gold; empty = none
    overwrite: bool = False # replace the results in out_dir
    figures: bool = True # draw them (needs matplotlib)
    figure_runs: str = '' # label=folder,… of PPO runs: also draw overoptimisation.png from their logs

    def __post_init__(self):
        super().__post_init__()
        written = os.path.realpath(f'{self.out_dir}/safety.jsonl')
        require(self, models=(self.models != '' or self.figure_runs != '', 'name=folder,name=folder,…'),
                prompts=(self.prompts != '' or self.models == '', 'a file of prompts'),
                gold=(self.gold == '' or ':' in self.gold, 'MODULE:FUNCTION or empty'),
                max_prompts=(self.max_prompts >= 0, 'at least 0'),
                safety=(written not in map(os.path.realpath, files_of(self.safety)), 'not the file that this writes'),
                best_of=(self.best_of == 0 or self.best_of >= 2 and self.reward_model != '',
                         '0, or at least 2 together with a reward_model'))
        unread(self, self.reward, 'reward', 'reward_weight')
        unread(self, self.models, 'models', *(key for key in Config.__annotations__
                                              if key not in ('out_dir', 'models', 'overwrite', 'figure_runs')))

def named_folders(text, option):
    """Parse 'a=out/a,b=out/b' to {'a': 'out/a', 'b': 'out/b'}. A name may hold '=', a folder may not."""
    folders = {}
    for part in text.split(','):
        name, _, folder = (x.strip() for x in part.rpartition('='))
        if not name or not folder or name in folders:
            fail(f"--{option}={text}: wanted name=folder,name=folder,… with each name once, got {part!r}")
        folders[name] = folder
    return folders

# ---- statistics of texts and of comparisons ---------------------------------------------------------------------

def mean(values):
    """Return the mean, or None where there is nothing to average."""
    values = list(values)
    return sum(values) / len(values) if values else None

def ngrams(words, n):
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

def distinct(texts, n):
    """Divide distinct n-grams by all n-grams. Li et al. 2016, https://arxiv.org/abs/1510.03055."""
    counts = sum((ngrams(text.split(), n) for text in texts), Counter())
    return len(counts) / counts.total() if counts else 0.0

def self_bleu(texts, at_most=200):
    """Return the mean BLEU-4 of each text against all the others.

    1 = all alike. Zhu et al. 2018, Texygen, https://arxiv.org/abs/1802.01886. Only the first `at_most` texts count.
    BLEU (Papineni et al. 2002) of a text of c words, which are split at white space:

        min(1, e^(1 - r/c)) * (p_1 p_2 p_3 p_4)^(1/4),   r = the closest length of a reference

    p_n is the share of n-grams found in a reference, each at most as often as in the reference that has it most often.
    None found counts as 0.1 (Chen and Cherry 2014, method 1). A text shorter than 4 words uses the p_n that it has.
    """
    rows = [text.split() for text in texts[:at_most] if text.split()]
    if len(rows) < 2:
        return 0.0
    grams = [sum((ngrams(words, n) for n in range(1, 5)), Counter()) for words in rows] # of all four lengths
    top = {} # n-gram -> the second highest and the highest count in a text
    for gram, count in chain.from_iterable(counts.items() for counts in grams):
        top[gram] = sorted((*top.get(gram, (0, 0)), count))[1:]
    total, lengths = 0.0, Counter(map(len, rows))
    for counts, c in zip(grams, map(len, rows)):
        found = Counter() # n -> n-grams found in the other texts
        for gram, count in counts.items():
            second, first = top[gram]
            found[len(gram)] += second if count == first else count
        log_p = [math.log((found[n] or 0.1) / (c - n + 1)) for n in range(1, min(4, c) + 1)]
        r = min(lengths - Counter([c]), key=lambda length: (abs(length - c), length))
        total += math.exp(min(0.0, 1 - r / c) + sum(log_p) / len(log_p))
    return total / len(rows)

def win_rate(scores, baseline_scores):
    """Return how often scores (N,) beat baseline_scores (N,). A tie is half a win."""
    return mean(map(beats, scores, baseline_scores))

def calibration(pairs, bins=10):
    """Compare sigmoid(score_a - score_b) with the share of pairs that prefer a.

    pairs: list of (score_a - score_b, 1.0 if a is preferred else 0.0). A pair is turned so that a has the higher score.
    Returns [mean prediction, share preferred, pairs] of each bin that is not empty, and the mean distance of the two
    over all pairs (expected calibration error, Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3).
    """
    groups = {}
    for difference, preferred in pairs:
        preferred = {1.0: preferred, 0.5: 0.5, 0.0: 1 - preferred}[beats(difference, 0.0)]
        p = 1 / (1 + math.exp(-abs(difference)))
        groups.setdefault(min(bins - 1, int((p - 0.5) * 2 * bins)), []).append((p, preferred))
    table = [[mean(p for p, _ in g), mean(x for _, x in g), len(g)] for _, g in sorted(groups.items())]
    return table, sum(abs(p - share) * n for p, share, n in table) / max(1, len(pairs))

def token_kl(model, reference, idx, mask):
    """Return KL(model || reference) in nats at each counted token, 0 elsewhere: (B, T-1).

        sum_v p(v) log(p(v) / q(v))    over the whole vocabulary, in float32
    """
    logp, logq = (m.logits_at(idx, mask).log_softmax(-1) for m in (model, reference)) # (N, V), N counted tokens
    return torch.zeros_like(mask).masked_scatter(mask > 0, (logp.exp() * (logp - logq)).sum(-1))

@torch.no_grad()
def answer_kl(model, reference, r, rows):
    """Return the same, summed over each answer of the rollouts r: (B,)."""
    kl = lambda c, T, _: token_kl(model, reference, r.idx[c, :T], r.mask[c, :T - 1]).sum(1)
    return in_chunks(kl, r.lengths, rows, torch.zeros(len(r.idx), device=r.idx.device))

@torch.no_grad()
def perplexity(model, batches, device):
    """Return exp of the mean loss per counted token. batches: lists of (ids, mask)."""
    total = counted = 0.0
    for batch in batches:
        idx, mask = (x.to(device) for x in collate(batch)) # (B, T), (B, T-1)
        total, counted = total + (model.logp(idx, mask) * mask).sum().item(), counted + mask.sum().item()
    loss = -total / counted
    return math.exp(loss) if loss < 700 else math.inf # also of NaN

# ---- scores of held-out pairs -----------------------------------------------------------------------------------

@torch.no_grad()
def score_rows(score, rows, model, what):
    """Return [(row, its answers' scores)]. score: rows of like length -> (N,), a number for each answer of theirs."""
    out = [None] * len(rows)
    for part in by_length(rows, max(1, TOKENS // max(row.length for row in rows))):
        values = iter(score([rows[i] for i in part]).tolist())
        for i in part:
            out[i] = rows[i], [next(values) for _ in rows[i].answers]
    check_finite([x for _, scores in out for x in scores], f"{model}: its {what}")
    return out

def pairs(scored):
    """Return the scores (better answer, worse answer) of all pairs in [(row, scores)]."""
    return [(a, b) for row, scores in scored for (a, i), (b, j) in permutations(zip(scores, row.ranks), 2) if i < j]

def share(found):
    """Return the share of pairs in which the better answer scores more."""
    return win_rate([a for a, _ in found], [b for _, b in found])

def measure_policy(scored, reference):
    """Measure how often a policy's own likelihoods order pairs as preferred.

        mean_logp    log pi(y|x) / |y|                    RRHF's score, Yuan et al. 2023, equation 1
        log_ratio    beta log(pi(y|x) / pi_ref(y|x))      DPO's reward, Rafailov et al. 2023, equation 5 without Z(x)

    beta > 0 changes no order. scored, reference: [(row, log pi of its answers)] of the policy and of pi_ref.
    """
    means = [(row, [x / len(ids) for x, ids in zip(logp, row.answers)]) for row, logp in scored]
    ratios = [(row, [x - y for x, y in zip(logp, ref_logp)]) for (row, logp), (_, ref_logp) in zip(scored, reference)]
    return dict(mean_logp=share(pairs(means)), log_ratio=share(pairs(ratios)))

def measure_reward_model(model, cfg, preferences, run):
    """Measure how often a reward model orders pairs as preferred.

    preferences: {'rankings' or 'comparisons': rows}. `ceiling` says how often the annotator's own scores without
    noise agree with the ranks, and `shorter_wins` how often the shorter answer is preferred. `pairs` says of how many
    pairs each is a share.
    """
    out, groups = {}, defaultdict(list)
    for option, rows in preferences.items():
        scored = score_rows(lambda some: score_packed(model, some, run), rows, f"--reward_model={cfg.reward_model}",
                            'scores')
        if option == 'rankings':
            found = dict(
                accuracy=pairs(scored),
                ceiling=pairs([(r, r.record['scores']) for r in rows if r.record.get('scores')]),
                shorter_wins=pairs([(r, [-len(text) for text in r.record['responses']]) for r in rows]))
            out |= {name: share(these) for name, these in found.items()}
            out['calibration'], out['calibration_error'] = calibration([(a - b, 1.0) for a, b in found['accuracy']])
        else:
            for row, scores in scored:
                groups[str(row.record.get('category', 'all'))].append((row, scores))
            found = {category: pairs(scored) for category, scored in groups.items()}
            out['by_category'] = {category: share(these) for category, these in found.items()}
        out['pairs'] = out.get('pairs', {}) | {name: len(these) for name, these in found.items()}
    return out

def describe(r, written):
    """Measure answers without their model. r: Rollouts with their tokens."""
    row, parts, texts = {}, written.parts, written.texts
    if parts:
        row['gold'] = mean(p['gold'] for p in parts)
    if parts and {'kind', 'category', 'content'} <= {*parts[0]}:
        right = lambda key, value: mean(p['content'] for p in parts if p[key] == value)
        row |= {kind: right('kind', kind) for kind in ('helpful', 'honest', 'harmless')}
        row['by_category'] = {c: right('category', c) for c in sorted({p['category'] for p in parts})}
    if parts and {'kind', 'said'} <= {*parts[0]}:
        said = [SAID.get(p['said'], 'wrong') for p in parts if p['kind'] == 'helpful']
        row['answerable'] = {what: mean(s == what for s in said) for what in ('right', 'abstains', 'wrong', 'declines')}
    if written.rewards:
        row['reward'] = mean(written.rewards)
    return row | dict(distinct_1=distinct(texts, 1), distinct_2=distinct(texts, 2), self_bleu=self_bleu(texts),
                      length=r.mask.sum(1).mean().item(), ended=r.ended.mean().item())

def print_table(title, header, rows):
    """Print rows, lists of strings. The first column is flush left, the others flush right."""
    print(visible('\n'.join([f"\n{title}", *align(header, rows)])))

def print_results(results, samples):
    """Print the tables of results.json, and three prompts with everybody's answers."""
    names = list(results['models'])
    for title, decoding, header, rows, _ in report.tables(results):
        print_table(f'{title} {decoding}'.rstrip(), header, rows)
    first = {} # one prompt of each kind, or without kinds the first three
    for i in range(0, len(samples), len(names)):
        first.setdefault(str(samples[i].get('kind', i)), i)
    for i in list(first.values())[:3]:
        prompt = samples[i]['prompt']
        print(f"\n{prompt if isinstance(prompt, str) else ' / '.join(m['content'] for m in prompt)!r}")
        for sample in samples[i:i + len(names)]:
            gold = f"  (gold {sample['sampled_gold']:.1f})" if 'sampled_gold' in sample else ''
            print(f"  {sample['model'].ljust(max(map(len, names)))}  {sample['sampled']!r}{gold}")

# ---- the evaluation ---------------------------------------------------------------------------------------------

def load_models(cfg, run):
    """Load and check {name: model}, reward model or None, and tokenizer."""
    folders = named_folders(cfg.models, 'models')
    for option in ('baseline', 'reference'):
        name = getattr(cfg, option) or cfg.baseline
        if name not in folders:
            fail(f"--{option}={name}: wanted one of the names in --models: {', '.join(folders)}")
    if cfg.best_of and 'best_of_n' in folders:
        fail("--models: best_of_n is what --best_of calls its own answers, wanted another name")
    models = {name: run.freeze(load_policy(folder, 'models').eval()) for name, folder in folders.items()}
    reward_model = None
    if cfg.reward_model:
        reward_model = run.freeze(load_reward_model(cfg.reward_model).eval()).to(run.device)
    tok = load_tokenizer(folders[cfg.baseline], 'models')
    for model, folder in zip([*models.values(), reward_model], [*folders.values(), cfg.reward_model]):
        if model:
            check_same_vocabulary(models[cfg.baseline], model, 'models', folder, tok)
    return models, reward_model, tok

def evaluate(cfg, run):
    """Measure all models on all prompts. Return results.json's content, the prompts, {decoding: {name: Written}}."""
    models, reward_model, tok = load_models(cfg, run)
    baseline, reference, K = cfg.baseline, models[cfg.reference or cfg.baseline].to(run.device), cfg.best_of
    block_size = min(model.config.block_size for model in [*models.values(), reward_model] if model)
    records = read_records(cfg.prompts, 'prompts')[:cfg.max_prompts or None]
    gold = load_reward_function(cfg.gold, 'gold', records, cfg.prompts)
    function = load_reward_function(cfg.reward, 'reward', records, cfg.prompts)
    explain_any = getattr(sys.modules.get(module_of(cfg.gold)), 'explain', lambda record, response: {})
    explain, explain_risky = (guarded(explain_any, 'gold', cfg.gold, path, 'a dict from its `explain`',
                                      lambda value: isinstance(value, dict)) for path in (cfg.prompts, cfg.safety))
    explain(records[0], '') # what it returns is known before anything is written
    prompts = encode_prompts(tok, records, block_size - cfg.max_new_tokens)
    held_out = []
    if cfg.text:
        data, _ = load_training_set(cfg.text, tok, block_size, max(1, TOKENS // block_size), cfg.seed, name='text')
        held_out = data.in_order(0) # every token is predicted once
    preferences = {option: encode_rankings(tok, read_preferences(path), block_size, option)
                   for option in ('rankings', 'comparisons') if (path := getattr(cfg, option))}
    risky, sentences = read_safety(cfg.safety) if cfg.safety else ([], [])
    told, bias = {decoding: {} for decoding in DECODINGS}, {} # told: decoding -> name -> answers to the risky prompts
    verdicts(risky, [''] * len(risky), explain_risky) # the gold score has to know them all
    risky_prompts = encode_prompts(tok, risky, block_size - cfg.max_new_tokens, 'safety') if risky else []
    sentences = encode_pairs(tok, sentences, block_size) if sentences else ()
    prepare_out_dir(cfg) # all input was read
    answered = {decoding: dict.fromkeys(models) for decoding in DECODINGS} # decoding -> name -> Written
    scores = lambda w: [p['gold'] for p in w.parts] or w.rewards

    def study(decoding, name, answers, model=None, ppl=None):
        """Measure answers (lists of ids). Those of best_of_n come without a model."""
        r = pack(prompts, answers, [[0.0] * len(a) for a in answers], tok.eos).to(run.device)
        texts = [tok.decode(a).removeprefix(' ') for a in answers]
        rewards = frozen_rewards(reward_model, r.idx, r.lengths).tolist() if reward_model else []
        check_finite(rewards, f"--reward_model={cfg.reward_model}: its scores")
        if function: # alone, or beside the reward model
            values = [cfg.reward_weight * function(*pair) for pair in zip(records, texts)]
            rewards = [a + b for a, b in zip(rewards or repeat(0.0), values)]
        parts = [explain(*pair) | {'gold': gold(*pair)} for pair in zip(records, texts)] if gold else []
        row = {}
        answered[decoding][name] = written = Written(texts, rewards, parts, row)
        row |= describe(r, written)
        if model is None: # an upper bound (Stiennon et al. 2020, appendix G.3), to the model that was sampled from
            row['kl'] = math.log(K) - (K - 1) / K if reference is models[baseline] else None
        else:
            rows = max(1, TOKENS // cfg.max_new_tokens) # answers per forward pass
            kl = 0.0 if model is reference else answer_kl(model, reference, r, rows).mean().item()
            check_finite([kl, ppl or 0.0], f"--models: {name}: its KL and perplexity")
            row[KL[decoding]] = kl
        if held_out:
            row['perplexity'] = ppl
        if scores(written): # the baseline against itself is a half by definition
            theirs = answered[decoding][baseline]
            wins = [0.5] * len(texts) if name == baseline else [*map(beats, scores(written), scores(theirs))]
            row['length_controlled'] = length_controlled(wins, [*map(len, texts)], [*map(len, theirs.texts)])
            row[f'win_rate_vs_{baseline}'] = mean(wins)
            row['win_rate_interval'] = [0.5, 0.5] if name == baseline else wilson(mean(wins), len(texts))
        bar.update()

    def policy_scores(name, model):
        """Return {option: [(row, log pi of its answers)]}."""
        score = lambda some: packed(model, some, run)[1]
        return {option: score_rows(score, rows, f"--models: {name}", 'log-probabilities')
                for option, rows in preferences.items()}

    bar = progress(total=2 * len(models) + (K > 0), desc='evaluate', unit='passes')
    with run.autocast():
        quality = {}
        if reward_model:
            quality = measure_reward_model(reward_model, cfg, preferences, run)
        ref_scores, own = policy_scores(cfg.reference or baseline, reference), dict.fromkeys(models)
        for name, model in sorted(models.items(), key=lambda item: item[0] != baseline): # the baseline first
            model.to(run.device)
            ppl = perplexity(model, held_out, run.device) if held_out else None
            scored = ref_scores if model is reference else policy_scores(name, model)
            own[name] = {option: measure_policy(scored[option], ref_scores[option]) for option in preferences}
            if sentences:
                logps = [score_rows(lambda some: packed(model, some, run)[1], rows, f"--models: {name}",
                                    'log-probabilities') for rows in sentences]
                bias[name] = likelier(*logps, wilson)
            for decoding, temperature in DECODINGS.items():
                # one seed for all, so that no model's answers depend on which others are in the list; another for the
                # baseline, so that the answers compared with its own are independent of them
                torch.manual_seed(3 * cfg.seed + (name != baseline))
                answers, logps = sample_answers(model, prompts, tok, cfg.max_new_tokens, temperature)
                check_finite(chain.from_iterable(logps), f"--models: {name}: its log-probabilities")
                study(decoding, name, answers, model, ppl)
                torch.manual_seed(3 * cfg.seed)
                answers, _ = sample_answers(model, risky_prompts, tok, cfg.max_new_tokens, temperature)
                told[decoding][name] = [tok.decode(a).removeprefix(' ') for a in answers]
            if model is not reference:
                model.to('cpu') # room for the next one
        if K:
            torch.manual_seed(3 * cfg.seed + 2)
            repeated = [p for p in prompts for _ in range(K)]
            answers, _ = sample_answers(models[baseline].to(run.device), repeated, tok, cfg.max_new_tokens)
            scored = score_answers(reward_model, repeated, answers, run.device) # (B K,)
            check_finite(scored.tolist(), f"--reward_model={cfg.reward_model}: its scores")
            best = scored.view(-1, K).argmax(1).tolist() # (B,)
            study('sampled', 'best_of_n', [answers[b * K + k] for b, k in enumerate(best)])
            answered['greedy']['best_of_n'] = answered['greedy'][baseline] # the best of n equal answers
    bar.close()
    safety = dict(pairs={name: bias[name] for name in models}) if sentences else {}
    if risky:
        safety['answers'] = {decoding: {name: rates(risky, verdicts(risky, of[name], explain_risky), wilson)
                                        for name in models} for decoding, of in told.items()}
        write_records(os.path.join(cfg.out_dir, 'safety.jsonl'), [
            record | {'model': name} | {decoding: of[name][i] for decoding, of in told.items()}
            for i, record in enumerate(risky) for name in models])
    sampled, greedy = ({name: w.row for name, w in of_decoding.items()} for of_decoding in answered.values())
    return dict(models=sampled, greedy=greedy, reward_model=quality, policies_as_reward=own if preferences else {},
                seconds={}, seed=cfg.seed, baseline=baseline, reference=cfg.reference or baseline,
                prompts=len(prompts)) | ({'safety': safety} if safety else {}), records, answered

def samples_of(records, answered):
    """Make a record for each prompt and model, with answers and scores."""
    samples = []
    for i, record in enumerate(records):
        for name in answered['sampled']:
            samples.append(record | {'model': name})
            for decoding, of_decoding in answered.items():
                w = of_decoding[name]
                samples[-1][decoding] = w.texts[i]
                samples[-1] |= {decoding + '_gold': w.parts[i]['gold']} if w.parts else {}
                samples[-1] |= {decoding + '_reward': round(w.rewards[i], 6)} if w.rewards else {}
    return samples

def prepare_out_dir(cfg):
    """Make the folder of the results, for this process alone."""
    os.makedirs(cfg.out_dir, exist_ok=True)
    if not os.access(cfg.out_dir, os.W_OK):
        fail(f"--out_dir={cfg.out_dir}: no permission; wanted a folder that can be written to")
    if cfg.models:
        lock(os.path.join(cfg.out_dir, '.lock'))

def main(cfg):
    started, path = time.time(), os.path.join(cfg.out_dir, 'results.json')
    if place_among_processes()[1] > 1:
        fail("evaluate.py measures in one process; wanted it started without torchrun")
    if cfg.models and os.path.exists(path) and not cfg.overwrite:
        fail(f"--out_dir={cfg.out_dir}: holds results; replace them by --overwrite=True, or choose another folder")
    if cfg.models:
        report.check_place(cfg.out_dir)
    runs = figures.read_runs(named_folders(cfg.figure_runs, 'figure_runs')) if cfg.figure_runs else {}
    if cfg.figures or runs:
        figures.load_pyplot() # where it is missing the run ends here, and not after the work
    run = start(cfg)
    default_signals() # there is nothing to save: the first Ctrl-C ends
    drawn = [] # (title, caption, SVGs) of each figure
    if cfg.models:
        results, records, answered = evaluate(cfg, run)
        samples = samples_of(records, answered)
        print_results(results, samples)
        write_records(os.path.join(cfg.out_dir, 'samples.jsonl'), samples)
        results['seconds']['evaluate'] = round(time.time() - started, 2)
        # six digits; NaN and infinity become null: JSON has no word for them
        six = json.loads(json.dumps(results), parse_float=lambda x: round(float(x), 6), parse_constant=lambda x: None)
        write_atomic(path, json.dumps(six, indent=2) + '\n')
        print(f"wrote {path}")
        folders = named_folders(cfg.models, 'models')
        folders |= {'reward model': cfg.reward_model} if cfg.reward_model else {}
        if cfg.figures:
            drawn += figures.reward_kl(results['models'], cfg.out_dir)
            quality = results['reward_model']
            if quality.get('calibration'):
                table, error = quality['calibration'], quality['calibration_error']
                drawn += figures.calibration(table, [wilson(share, n) for _, share, n in table], error, cfg.out_dir)
            drawn += figures.learning_curves(folders, cfg.out_dir)
    if runs:
        prepare_out_dir(cfg)
        drawn += figures.over_optimisation(runs, cfg.out_dir)
    if cfg.models:
        report.write(cfg, run, folders, six, records, answered, drawn)
    stop(run)

if __name__ == '__main__':
    launch(main, Config)
