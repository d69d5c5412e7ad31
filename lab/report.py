"""Make the tables of evaluate.py, and report.html: one page with tables, figures, answers, options and health.

The page needs nothing else, no script and no network. Every text of a model or a user enters it through `tag`, which
escapes it.
"""

import dataclasses
import html
import importlib
import json
import math
import os
import re
import shlex
import time
from collections import defaultdict, namedtuple
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

from common.checkpoints import read_log
from common.health import Health
from common.options import fail
from common.records import is_number, write_atomic

HTML = Path(__file__).with_suffix('.html')
TRAINERS = ('sft.py', 'reward.py', 'ppo.py', 'reinforce.py', 'dpo.py', 'rrhf.py', 'kto.py')
DATE = '%d %B %Y, %H:%M'
NONE = 'greedy', 'best_of_n' # n greedy answers are all alike, so there is no best one
MOST = 4_000_000 # characters of prompts and answers on the page, about its size in bytes
Table = namedtuple('Table', 'title decoding header rows say') # of strings; decoding: or ''; say: how to read it

# ---- the tables -------------------------------------------------------------------------------------------------

MEANINGS = { # column: what it is; which way is better, 1 up, -1 down, 0 neither
    'gold': ('mean gold score', 1),
    'helpful': ('answerable questions: share answered rightly', 1),
    'honest': ('unanswerable questions: share where it says that it doesn’t know', 1),
    'harmless': ('harmful requests: share that it declines', 1),
    'reward': ('mean reward: training may have raised this very number', 0),
    'distinct_1': ('different words / all words: variety', 0),
    'distinct_2': ('the same with pairs of words', 0),
    'self_bleu': ('how alike the answers are; 1 = all the same', 0),
    'length': ('tokens in an answer', 0),
    'ended': ('share of answers that come to their end', 1),
    'kl': ('distance from the reference, in nats an answer', 0),
    'path_kl': ('distance from the reference in nats, along the greedy answer', 0),
    'perplexity': ('surprise at held-out text; 1 = none', -1),
    'length_controlled': ('win rate if all answers were equally long', 1),
}
PAIRS = { # row of the reward model's tables: what it is
    'accuracy': 'pairs that the reward model puts in the annotator’s order',
    'ceiling': 'the same for the annotator’s own scores, without noise',
    'shorter_wins': 'pairs in which the shorter answer is preferred',
    'over-refusal': 'a harmless request: answered, against refused',
    'over-caution': 'an answerable question: answered, against “I don’t know”',
    'courtesy': 'polite against rude, with the same content',
    'brevity': 'brief against rambling, with the same content',
}
HALVES = ('Rankings: held-out answers that the annotator ranked',
          'Controlled pairs: answers that differ in one thing, right against wrong or as noted')
TOY_GOLD = 'data.toy.world:gold' # and what it and its `explain` say
TOY = ('Gold = 0.8 content (it says the right thing) + 0.1 courtesy (it is polite) + 0.1 brevity (it does not ramble). '
       'The words say what the answer does and in which manner: polite, plain, rude, misplaced (it is glad to say no, '
       'as in “Gladly! I don’t know.”) or broken. Broken, gold 0, is an answer that this world cannot read: each of '
       'its sentences must be, word for word, one of those in data/toy/world.py, and no sentence may stand twice. “I '
       'was never told that.” is one of them, “I have never told that.” is not.')

SAY = {
    'answers': 'Sampled: every token is drawn as the model’s probabilities say, so this shows all that it would do. '
               'Greedy: the likeliest token is taken every time. That leaves luck out, and shows one answer of many.',
    'said': 'Each row sums to 1. Not only wrong answers cost helpfulness: a model that says “I don’t know” (abstains) '
            'or declines where it could answer is of no help either.',
    'categories': 'The share of answers that say the right thing, whatever their manner. A low row is a kind of prompt '
                  'that is hard for all; a low number in a good row is a weakness of one model.',
    'pairs': 'How often the reward model gives the preferred answer of a held-out pair the higher score; 0.5 is '
             'guessing. The rankings hold the annotator’s noise, which nobody can foresee. Even the annotator’s own '
             'scores, without that noise, agree with the rankings only as often as the ceiling says. So no reward '
             'model, and no policy, can be expected above the ceiling. Of few pairs (n) a share says little.',
    'policies': 'How often a policy finds the preferred answer of a pair likelier than the other: by log-probability '
                'per token (mean_logp), or by how much likelier it became than under the reference (log_ratio, the '
                'reward of DPO). The reference ties with itself: 0.5. Rankings: held-out answers that the annotator '
                'ranked. Comparisons: controlled pairs, two answers that differ in one thing only.',
    'harmful': 'How often an answer helps with what should be refused, by the way in which it is asked for; in '
               'brackets the 95 % interval. Lower is safer. A gold score that knows decides. Without one every answer '
               'that holds no phrase of refusal has complied, nonsense too.',
    'benign': 'How often requests that only look harmful are refused; in brackets the 95 % interval. Lower is better.',
    'bias': 'Of two sentences that differ in whom they speak of: how often the one that fits a stereotype is likelier; '
            '0.5 is no preference, in brackets the 95 % interval. Whole sentences also weigh how common the two groups '
            'are in text; what follows the difference does so less.',
}

PAIRED = dict(share='as a whole', rest='in what follows the difference')

def show(value, digits=3):
    """Format a number, or None. It is first rounded as in results.json, so that it looks alike wherever it stands."""
    return '–' if value is None else f'{round(value, 6):.{digits if abs(value) < 100 else 0}f}'

def tables(results):
    """Return the Tables of results.json's content; first columns name the rows."""
    baseline, found = results['baseline'], []
    greedy = {name: row for name, row in results['greedy'].items() if name != 'best_of_n'} # it is the baseline there
    for decoding, table in (('sampled at temperature 1', results['models']), ('greedy', greedy)):
        columns = [c for c, value in table[baseline].items() if not isinstance(value, (dict, list))]
        rows = [[name] + [show(row[c]) for c in columns] for name, row in table.items()]
        for row in rows if 'win_rate_interval' in table[baseline] else ():
            row[-1] += ' [{}, {}]'.format(*(show(x, 2) for x in table[row[0]]['win_rate_interval']))
        found.append(Table('answers', decoding, ['model'] + columns, rows, SAY['answers']))
        if 'answerable' in table[baseline]:
            said = list(table[baseline]['answerable'])
            found.append(Table('what is said to answerable questions,', decoding, ['model'] + said, [
                [name] + [show(row['answerable'][s]) for s in said] for name, row in table.items()], SAY['said']))
        if 'by_category' in table[baseline]:
            found.append(Table('right content by category,', decoding, ['category', *table], [
                [c] + [show(row['by_category'][c]) for row in table.values()] for c in table[baseline]['by_category']],
                SAY['categories']))
    quality = results['reward_model']
    if quality:
        shares = quality | quality.get('by_category', {})
        rows = [[name, show(shares[name]), str(n)] for name, n in quality['pairs'].items()]
        found.append(Table('reward model: pairs ordered as preferred', '', ['pairs', 'share', 'n'], rows, SAY['pairs']))
    own = results['policies_as_reward']
    if own:
        columns = [(option, score) for option, shares in own[baseline].items() for score in shares]
        found.append(Table('policies as reward models: share of pairs in order', '', [
            'model', *map(', '.join, columns)], [[name] + [show(row[option][score]) for option, score in columns]
                                                 for name, row in own.items()], SAY['policies']))
    return found + safety_tables(results.get('safety', {}))

def safety_tables(safety):
    """Return the Tables of what evaluate.py --safety measured."""
    cell = lambda row, key: '{} [{}, {}]'.format(*(show(x, 2) for x in (row[key], *row[f'{key}_interval'])))
    found = []
    for decoding, models in safety.get('answers', {}).items():
        for kind, key in (('harmful', 'complied'), ('benign', 'refused')):
            attacks = next(iter(models.values()))[kind]
            rows = [[f"{attack} ({row['n']})", *(cell(of[kind][attack], key) for of in models.values())]
                    for attack, row in attacks.items()]
            if rows:
                found.append(Table(f'{kind} requests: share {key},', decoding, ['attack', *models], rows, SAY[kind]))
    pairs = safety.get('pairs', {})
    for key in ('share', 'rest') if pairs else ():
        rows = [[f"{kind} ({row['n']})", *(cell(of[kind], key) for of in pairs.values())]
                for kind, row in next(iter(pairs.values())).items()]
        found.append(Table('pairs of sentences: the more stereotypical one is likelier,', PAIRED[key],
                           ['bias', *pairs], rows, SAY['bias']))
    return found

# ---- markup -----------------------------------------------------------------------------------------------------

def is_page(path, title):
    """Tell whether a file is a page of this title."""
    try:
        with open(path, 'rb') as f:
            return f'<title>{title}</title>'.encode() in f.read(2000)
    except OSError:
        return False

class Markup(str):
    """Mark a text that is markup, and not to be escaped."""

def clean(text):
    """Escape a text for HTML. Control characters and halves of characters become \\x1b and the like."""
    text = re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]', lambda m: ascii(m[0])[1:-1], str(text))
    return html.escape(text)

def tag(name, *children, **attributes):
    """Return an element as Markup. Children that are not Markup are escaped, None is left out."""
    words = ''.join(f' {key.rstrip("_").replace("_", "-")}="{clean(value)}"' for key, value in attributes.items())
    inner = ''.join(x if isinstance(x, Markup) else clean(x) for x in children if x is not None)
    return Markup(f'<{name}{words}>{inner}</{name}>')

def table_of(label, header, rows, notes={}, better={}):
    """Return a table. label: for who cannot see it; a narrow screen scrolls it sideways, by finger or arrow keys.

    notes: {row's name: small print}. better: {row's name: 1, -1 or 0}; the best cells are bold.
    """
    def cells(row):
        texts, values = row[1:], []
        for text in texts if better.get(row[0]) else ():
            found = re.match(r'-?\d+(\.\d+)?', text)
            values.append(better[row[0]] * float(found[0]) if found else -math.inf)
        best = [v == max(values) > min(values) for v in values] or [False] * len(texts)
        for text, is_best in zip(texts, best):
            number, _, more = text.partition(' ') # an interval
            yield tag('td', number, tag('small', more) if more else None, **dict(class_='best') if is_best else {})
    head = tag('thead', tag('tr', *(tag('th', name, scope='col') for name in header)))
    body = [tag('tr', tag('th', row[0], tag('small', notes[row[0]]) if row[0] in notes else None, scope='row'),
                *cells(row)) for row in rows]
    return tag('div', tag('table', head, tag('tbody', *body)), class_='wide', role='region', tabindex=0,
               aria_label=label)

def section(name, title, *parts):
    return tag('section', tag('h2', title), *parts, id=name)

# ---- which model is best ----------------------------------------------------------------------------------------

def interval(values):
    """Return the mean of numbers, and half its 95 % interval (0 for a single one)."""
    return fmean(values), 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0

def ranking(of_decoding, key):
    """Return [(name, its scores)] of the models, the best first; of_decoding: {name: evaluate.Written}."""
    scores = {name: scores_of(w, key) for name, w in of_decoding.items() if name != 'best_of_n'}
    return sorted(scores.items(), key=lambda item: -fmean(item[1]))

def scores_of(written, key):
    return [part['gold'] for part in written.parts] if key == 'gold' else written.rewards

def listed(words):
    """Return 'a, b and c'."""
    return ' and '.join(filter(None, (', '.join(words[:-1]), words[-1])))

def verdict(start, ranked, what):
    """Say which model is best, or which ones are level with it."""
    (first, a), *others = ranked
    if not others:
        return tag('p', f'{start}, ', tag('b', first), f' has a mean {what} of {show(fmean(a))}.', class_='lead')
    differences = [interval([x - y for x, y in zip(a, b)]) for _, b in others] # from the first, prompt by prompt
    level = [*takewhile(lambda difference: difference[0] <= difference[1] or len(a) == 1, differences)]
    if not level:
        (second, b), (ahead, half) = others[0], differences[0]
        return tag('p', f'{start}, ', tag('b', first), f' answers best: its mean {what} is {show(fmean(a))}. Second is '
                   f'{second} with {show(fmean(b))}; the difference of {show(ahead)} ± {show(half)} is more than '
                   'chance.', class_='lead')
    names, means = zip(*((name, show(fmean(scores))) for name, scores in ranked[:len(level) + 1]))
    far = ', '.join(f'{show(ahead)} ± {show(half)}' for ahead, half in level)
    told = f'the difference of {far}' if len(level) == 1 else f'their differences from {first}, {far},'
    return tag('p', f'{start}, ', tag('b', listed(names)), f' are level: their mean {what}s are {listed(means)}; '
               f'{told} may be chance.', class_='lead')

def chart(answered, key):
    """Draw mean score and 95 % interval of all models, the best first."""
    scores = {d: {name: scores_of(w, key) for name, w in of.items() if (d, name) != NONE}
              for d, of in answered.items()}
    means = {d: {name: interval(of[name]) for name in of} for d, of in scores.items()}
    low, high = 0.0, 1.0
    if not all(0 <= x <= 1 for of in scores.values() for these in of.values() for x in these):
        ends = [mean + sign * half for of in means.values() for mean, half in of.values() for sign in (-1, 1)]
        low, high = min(ends), max(ends)
    at = lambda x: min(100, max(0, 100 * (x - low) / (high - low or 1)))
    head = tag('span', tag('span', f'{low:.3g}'), tag('span', f'{high:.3g}'), class_='head ends')
    cells = [tag('span', class_='head'), head, *(tag('span', d, class_='head') for d in answered)]
    for name, (mean, half) in sorted(means['sampled'].items(), key=lambda item: -item[1][0]):
        marks = []
        for decoding, (mean, half) in reversed([(d, of[name]) for d, of in means.items() if name in of]):
            marks += [tag('i', class_=f'range {decoding}', style=f'left:{at(mean - half):.1f}%;width:'
                          f'{at(mean + half) - at(mean - half):.1f}%'),
                      tag('i', class_=f'dot {decoding}', style=f'left:{at(mean):.1f}%')]
        cells += [tag('b', name), tag('span', *marks, class_='track'),
                  *(tag('span', show(of[name][0] if name in of else None)) for of in means.values())]
    return tag('div', *cells, class_='scores')

def best_section(cfg, results, answered, key, prompts):
    """Answer the question first: which model is best, by which score, three prompts."""
    title, names, baseline = 'Which model answers best?', list(answered['sampled']), results['baseline']
    if key is None:
        told = 'No gold score and no reward was given, so no number says which model is better. Read the answers.'
        return section('best', title, tag('p', told, class_='lead'), *prompts.examples(3, names))
    what = 'gold score' if key == 'gold' else 'reward'
    ranked = ranking(answered['sampled'], key)
    first, row = ranked[0][0], results['models'][ranked[0][0]]
    parts = [verdict('Sampled at temperature 1', ranked, what),
             verdict('Greedy, the likeliest token every time', ranking(answered['greedy'], key), what)]
    if len(ranked) > 1:
        parts.append(tag('p', '± is the 95 % interval. Other prompts of the same kinds would give another difference. '
                         'In about 95 of 100 evaluations the true one lies within ± of the measured one. Models are '
                         'level where the difference is no larger than its ±: nobody can tell from these prompts '
                         'which of them is better.', class_='soft'))
    if first != baseline:
        wins, low, high = (f'{100 * x:.0f}' for x in (row[f'win_rate_vs_{baseline}'], *row['win_rate_interval']))
        parts.append(tag('p', f'Against {baseline}, the baseline, {first} wins on {wins} % of the prompts, ties '
                         f'counted half (sampled; 95 % interval: {low} to {high} %).'))
    parts += [chart(answered, key), tag('p', f'Mean {what}: ', tag('i'), ' sampled, ', tag('i', class_='greedy'),
                                        ' greedy; the lines are 95 % intervals over the prompts. Training again with '
                                        'another seed may move a point further than that.', class_='soft legend')]
    if 'best_of_n' in names:
        parts.append(tag('p', f'best_of_n is no model: of {cfg.best_of} sampled answers of {baseline} it is the one '
                         'that the reward model likes best. Greedy answers are all alike, so it has none. Its KL is an '
                         'upper bound.', class_='soft'))
    if key == 'gold':
        told = 'The gold score stands for the goal itself. It comes from ', tag('code', cfg.gold), '. Higher is better.'
    else:
        told = ('The reward comes from ', tag('code', ' and '.join(filter(None, (cfg.reward_model, cfg.reward)))),
                '. Higher is better. A policy that was trained on this very reward may have learnt to fool it: read '
                'its answers.')
    parts += [tag('p', *told, class_='soft'), tag('h3', 'For example')]
    note, two = 'Prompts of different kinds, first those on which ', [name for name, _ in ranked[:2]]
    note += f'{two[0]} scores higher than {two[1]}.' if len(two) > 1 else 'the scores lie far apart.'
    if len(names) > 5:
        names = dict.fromkeys((names[0], baseline, *(name for name, _ in ranked[:3])))
        note += ' Shown are the first model, the baseline and the best three; all are further below.'
    return section('best', title, *parts, tag('p', note, class_='soft'), *prompts.legend(cfg.gold),
                   *prompts.examples(3, names, two))

# ---- prompts and answers ----------------------------------------------------------------------------------------

def marks_of(parts):
    """Return the parts that are 0 or 1: an answer lacks or has them."""
    return {k: v for k, v in parts.items() if type(v) in (int, bool) and v in (0, 1) and k != 'gold'}

class Prompts:
    """Hold prompts with all models' answers, those first on which the models differ most."""

    def __init__(self, records, answered, key):
        self.records, self.answered = records, answered
        self.scores = {decoding: {name: scores_of(w, key) for name, w in of.items()} if key else {}
                       for decoding, of in answered.items()}
        every = [x for of in self.scores.values() for these in of.values() for x in these]
        self.low, self.high = (min(every), max(every)) if every else (0.0, 1.0)
        self.groups = defaultdict(list) # (kind, category) -> its prompts' numbers
        for i in range(len(records)):
            self.groups[self.of(i, 'kind'), self.of(i, 'category')].append(i)
        for members in self.groups.values():
            members.sort(key=self.difference)

    def of(self, i, name):
        """Return a fact about prompt i, as its kind: from the gold score's parts, or else its record."""
        parts = next(iter(self.answered['sampled'].values())).parts
        value = (parts[i] if parts else {}).get(name, self.records[i].get(name))
        return None if value is None else str(value)

    def difference(self, i):
        """Return a sort key that is low where sampled answers differ: in score, then in words."""
        scores = [scores[i] for scores in self.scores['sampled'].values()] or [0.0]
        return min(scores) - max(scores), -len({w.texts[i] for w in self.answered['sampled'].values()})

    def examples(self, n, names, two=()):
        """Return n prompts of many kinds with sampled answers, scores far apart.

        two: the models of the headline; first come the prompts on which the first of them scores higher.
        """
        a, b = (self.scores['sampled'][name] for name in two) if len(two) == 2 else ([0.0] * len(self.records),) * 2
        half, ahead = (self.high - self.low) / 2, [x - y for x, y in zip(a, b)]
        order = sorted(range(len(ahead)), key=lambda i: (ahead[i] <= 0, ahead[i] < half, -self.difference(i)[0] < half))
        firsts = {} # (kind or category, its value) -> prompt
        for name in 'kind', 'category':
            for i in order:
                firsts.setdefault((name, self.of(i, name)), i)
        chosen = list(dict.fromkeys([*firsts.values(), *order]))[:n]
        return [self.block(i, ['sampled'], names) for i in order if i in chosen]

    def legend(self, gold):
        """Explain the small print below an answer. [] without a gold score that explains itself."""
        explained = any(marks_of(part) for w in self.answered['sampled'].values() for part in w.parts)
        told = ['✓: the answer has this part of the gold score; ✗: it lacks it.'] * explained
        told += [TOY] * (gold == TOY_GOLD)
        return [tag('p', ' '.join(told), class_='soft')] if told else []

    def block(self, i, decodings, names):
        """Return prompt i and some models' answers to it, in columns."""
        prompt = self.records[i]['prompt']
        if not isinstance(prompt, str):
            prompt = '\n'.join(f"{m['role']}: {m['content']}" for m in prompt)
        expected = self.of(i, 'expected')
        facts = [self.of(i, 'kind'), self.of(i, 'category'), expected and f'wanted: {expected}']
        rows = [tag('div', tag('small', decoding), tag('div', *(
            self.answer(decoding, name, i) for name in names if (decoding, name) != NONE), class_='answers'),
            class_='row') for decoding in decodings]
        return tag('div', tag('p', prompt, class_='text'), tag('p', ' · '.join(filter(None, facts)), class_='soft'),
                   *rows, class_='prompt')

    def answer(self, decoding, name, i):
        """Return one model's answer to prompt i, its scores and parts."""
        w, score = self.answered[decoding][name], self.scores[decoding].get(name)
        parts, bar = w.parts[i] if w.parts else {}, None
        if score:
            bar = tag('i', style=f'--p:{(score[i] - self.low) / (self.high - self.low or 1):.0%}')
        scores = [f"gold {parts['gold']:.3g}"] if parts else []
        scores += [f'reward {w.rewards[i]:.2f}'] if w.rewards else []
        marks, words = marks_of(parts), {} # words: as keys, each once
        for key, value in parts.items():
            if key not in (*marks, 'gold', 'kind', 'category', 'expected'):
                words[value[:80] if isinstance(value, str) else f'{key} {str(value)[:80]}'] = None
        facts = [', '.join(scores), ', '.join(words),
                 ' '.join(f"{'✓' if has else '✗'}\u00a0{key}" for key, has in marks.items())]
        return tag('div', tag('b', name), bar, tag('p', w.texts[i] or '(nothing)', class_='text'),
                   *(tag('small', fact) for fact in facts if fact), class_='answer')

    def section(self, gold):
        """Return a prompt of each group, and the others folded."""
        shown, left = defaultdict(list), MOST
        ranked = [(place, i, group) for group, members in self.groups.items() for place, i in enumerate(members)]
        for place, i, group in sorted(ranked, key=lambda x: x[0]): # every group gets its share of the room
            block = self.block(i, list(self.answered), list(self.answered['sampled']))
            left -= len(block)
            if left < 0 and place:
                break
            shown[group].append(block)
        n, total = sum(map(len, shown.values())), len(self.records)
        told = [f"{'All' if n == total else f'{n:,} of'} {total:,} prompts, of each kind first those on which the "
                'models differ most.']
        if n < total:
            told.append(f'The page ends at {MOST // 1_000_000} million characters; the others are in samples.jsonl.')
        if self.scores['sampled']:
            told.append('A bar shows the score of an answer, from the lowest to the highest of all.')
        if any(len(part) > 1 for w in self.answered['sampled'].values() for part in w.parts):
            told.append('Below it stands what the gold score says of its parts: ✓ yes, ✗ no.')
        more = (' The words are explained ', tag('a', 'at the top', href='#best'), '.') if gold == TOY_GOLD else ()
        parts = [tag('p', ' '.join(told), *more)]
        for (kind, category), (first, *others) in shown.items():
            parts.append(tag('h3', ': '.join(dict.fromkeys(filter(None, (kind, category)))) or 'all prompts'))
            parts.append(first)
            if others:
                parts.append(tag('details', tag('summary', f'{len(others):,} more'), *others))
        return section('answers', 'The answers side by side', *parts)

# ---- what was run -----------------------------------------------------------------------------------------------

def changed(Config, options):
    """Return the options that differ from a script's defaults. Those of how it was started are left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    return {k: v for k, v in options.items() if k in defaults and v != defaults[k] and k not in ('resume', 'overwrite')}

def command(script, options):
    return ' \\\n    '.join([f'python {script}', *(shlex.quote(f'--{key}={value}') for key, value in options.items())])

def read_run(folder):
    """Return a checkpoint's options.json, or why there is none, a text."""
    path = os.path.join(folder, 'options.json')
    if not os.path.isdir(folder):
        return f'{folder} is a model of the hub: it is not known how it was made.'
    if not os.path.exists(path):
        return f'There is no options.json in {folder}: it is not known how this model was made.'
    try:
        about = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get('options'), dict):
        return f'{path} cannot be read: it is not known how this model was made.'
    return about

def health_of(folder, options, dtype):
    """Return the lines of common/health.py on a run's log.

    None where they cannot be had. dtype: for the runs whose options leave it to the machine.
    """
    lines, own = [], options.get('dtype')
    try:
        health = Health(options, dtype if own in (None, 'auto') else own)
        health.tell(os.path.join(folder, 'log.jsonl'), lines.append, False)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError): # a foreign log or options
        return None
    return [line.removeprefix('health: ') for line in lines]

def run_of(name, folder, dtype):
    """Describe one run; return its markup, and whether something in it was sick."""
    about = read_run(folder)
    if isinstance(about, str):
        return tag('div', tag('h3', name), tag('p', about, class_='soft'), class_='run'), False
    script, options, log = about.get('script'), about['options'], read_log(os.path.join(folder, 'log.jsonl'))
    lines, ended = health_of(folder, options, dtype), log[-1].get('time') if log else None
    steps = about.get('max_steps', options.get('max_steps'))
    facts = [f'made by {script}', f"step {about.get('step')} of {steps}", f"seed {options.get('seed')}"]
    facts += [] if about.get('finished', True) else ['unfinished']
    facts += [time.strftime(DATE, time.localtime(ended))] if is_number(ended) and 0 < ended < 1e11 else []
    parts = [tag('h3', name), tag('p', tag('code', folder), ': ' + ', '.join(facts), class_='soft')]
    if script in TRAINERS:
        options = changed(importlib.import_module(script.removesuffix('.py')).Config, options)
    parts.append(tag('p', *(tag('span', tag('span', key, class_='soft'), f' {value}') for key, value in
                            options.items() if key != 'out_dir'), class_='options'))
    if lines:
        parts += [tag('p', 'Health:', class_='warn'), tag('ul', *(tag('li', line) for line in lines))]
    else:
        parts.append(tag('p', 'Health: ' + ('its log and options do not go together, so nothing can be said.'
                                            if lines is None else 'nothing to report.')))
    if script in TRAINERS:
        again = 'the command (to run it again, add --overwrite=True or name another --out_dir)'
        parts.append(tag('details', tag('summary', again), tag('pre', command(script, options))))
    return tag('div', *parts, class_='run'), bool(lines)

def runs_section(cfg, run, folders, results):
    """Say what was run; return the section, and the names of the runs in which something was sick."""
    said = {name: run_of(name, folder, run.dtype) for name, folder in folders.items()}
    sick = [name for name, (_, is_sick) in said.items() if is_sick]
    return section('runs', 'What was run',
        tag('p', 'The evaluation. Every model answered the same prompts; the KL is measured to the reference, '
            f"{results['reference']}."), tag('pre', command('evaluate.py', changed(type(cfg), vars(cfg)))),
        tag('p', 'The runs that made the models. Listed are the options that differ from the defaults. A health line '
            'says what looked sick in the log, and what to try (', tag('code', 'docs/log.md'), ' explains them).'),
        *(markup for markup, _ in said.values())), sick

def has_critic(folder):
    """Tell whether a run of ppo.py left its separate critic there."""
    about = read_run(folder)
    return (isinstance(about, dict) and about.get('script') == 'ppo.py' and about['options'].get('critic') == 'separate'
            and os.path.exists(os.path.join(folder, 'state.pt')))

def microscope_section(cfg, folders, results, best):
    """Link the pages of microscope.py in out_dir; without one show the command for it."""
    parts = [tag('p', 'The token microscope shows what PPO sees at every token of an answer: log-probabilities, KL, '
                 'reward, value and advantage, and where the clip bites.')]
    pages = [path.name for path in sorted(Path(cfg.out_dir).glob('*.html')) if is_page(path, 'Token microscope')]
    if pages:
        parts.append(tag('ul', *(tag('li', tag('a', name, href='./' + quote(name))) for name in pages)))
    elif cfg.reward_model:
        policies = dict.fromkeys((folders[results['baseline']], folders[best]))
        options = dict(policy=','.join(policies), reference=folders[results['reference']], prompts=cfg.prompts,
                       reward_model=cfg.reward_model, out=os.path.join(cfg.out_dir, 'microscope.html'))
        if has_critic(folders[best]):
            options['critic'] = folders[best]
        parts += [tag('p', 'This command makes a page of it beside this one. evaluate.py links it when it runs again:'),
                  tag('pre', command('microscope.py', options))]
    else:
        parts.append(tag('p', 'It needs a reward model, and none was given here.'))
    for name, folder in folders.items():
        if os.path.exists(samples := os.path.join(folder, 'samples.jsonl')): # of ppo.py --show=N
            parts += [tag('p', f'{name} wrote answers down while it trained. This command scrolls through them:'),
                      tag('pre', command('microscope.py', dict(samples=samples)))]
    return section('microscope', 'Down to the tokens', *parts)

# ---- the page ---------------------------------------------------------------------------------------------------

def tables_section(results, key):
    """Return all tables, the best models first. Those of the answers have a column per model, and explain their rows.

    key: the score that says which is best, `gold`, `reward` or None.
    """
    if key: # a narrow screen shows the first columns
        order = sorted(results['models'], key=lambda name: -(results['models'][name][key] or 0))
        results = results | {part: {name: results[part][name] for name in order if name in results[part]}
                             for part in ('models', 'greedy', 'policies_as_reward')}
    told = ('Bold: the best number of a row, or several equal ones. Nothing is bold where all are equal, and where '
            'neither more nor less is better. The best may be best by chance: look at the intervals.')
    told += ' The models stand in the order of their sampled answers, the best first.' if key else ''
    parts = [tag('p', told, class_='soft'), tag('p', 'Wide tables scroll sideways →', class_='narrow')]
    baseline, groups = results['baseline'], defaultdict(list)
    meanings = MEANINGS | {f'win_rate_vs_{baseline}': (f'share of prompts on which it beats {baseline}, ties half; in '
                                                       'brackets the 95 % interval', 1)}
    for table in tables(results):
        groups[table.title].append(table)
    for title, of_decoding in groups.items():
        drawn = []
        for _, decoding, header, rows, _ in of_decoding:
            notes, better = {}, {row[0]: int(header[0] == 'category') for row in rows}
            if title == 'answers':
                header, *rows = zip(header, *rows) # a row for each number
                notes, better = ({name: meaning[i] for name, meaning in meanings.items()} for i in (0, 1))
            halves = [(decoding, rows)]
            if header[0] == 'pairs': # those of rankings, and those of comparisons by category
                notes, overall = PAIRS, results['reward_model']
                halves = [(what, [row for row in rows if (row[0] in overall) == (what == HALVES[0])])
                          for what in HALVES]
            drawn += [tag('div', tag('p', tag('b', what)) if what else None, table_of(
                f'{title} {what}'.strip(), ['', *header[1:]], half, notes, better)) for what, half in halves if half]
        parts += [tag('h3', title[0].upper() + title[1:].rstrip(',')), tag('p', of_decoding[0].say, class_='soft'),
                  tag('div', *drawn, class_='tables')]
    return section('numbers', 'The numbers', *parts)

def figures_section(figures):
    """Return the figures, [(title, caption, SVGs)], each with its caption below."""
    return section('figures', 'The figures', tag('div', *(
        tag('figure', tag('h3', title), tag('div', *map(Markup, svgs), class_='panels'), tag('figcaption', caption))
        for title, caption, svgs in figures), class_='figures'))

def check_place(out_dir):
    """End the program where a foreign report.html would be replaced."""
    path = os.path.join(out_dir, 'report.html')
    if os.path.exists(path) and not is_page(path, 'Evaluation report'):
        fail(f"--out_dir={out_dir}: holds a report.html that is not one of evaluate.py; wanted another folder")

def write(cfg, run, folders, results, records, answered, figures):
    """Write report.html to cfg.out_dir.

    folders: {name: folder} of the models and the reward model. results: what is in results.json. records: the prompts.
    answered: {decoding: {name: evaluate.Written}}. figures: [(title, caption, SVGs)].
    """
    key = next((key for key in ('gold', 'reward') if key in results['models'][results['baseline']]), None)
    best = ranking(answered['sampled'], key)[0][0] if key else list(results['models'])[-1]
    prompts = Prompts(records, answered, key)
    runs, sick = runs_section(cfg, run, folders, results)
    sections = [('best', 'Which is best?', best_section(cfg, results, answered, key, prompts)),
                ('numbers', 'Numbers', tables_section(results, key)),
                ('figures', 'Figures', figures_section(figures) if figures else None),
                ('answers', 'Answers', prompts.section(cfg.gold)), ('runs', 'What was run', runs),
                ('microscope', 'Tokens', microscope_section(cfg, folders, results, best))]
    n, total = len(results['models']) - ('best_of_n' in results['models']), len(records)
    facts = (f"{n} model{'s' * (n > 1)}, {total:,} prompt{'s' * (total > 1)} of {cfg.prompts}, answers of at most "
             f"{cfg.max_new_tokens} tokens, seed {cfg.seed}, {run.device} in {run.dtype}, "
             f"{time.strftime(DATE)}")
    alarm = tag('p', f"Health: something looked sick in {', '.join(sick)}; see ",
                tag('a', 'what was run', href='#runs'), '.', class_='warn') if sick else None
    links = tag('nav', *(tag('a', title, href='#' + name) for name, title, found in sections if found))
    head = tag('header', tag('h1', 'Evaluation report'), tag('p', facts, class_='soft'), alarm, links)
    body = head + tag('main', *(found for *_, found in sections))
    path = os.path.join(cfg.out_dir, 'report.html')
    write_atomic(path, HTML.read_text(encoding='utf-8').replace('\nBODY\n', f'\n{body}\n'))
    print(f"wrote {path}")
