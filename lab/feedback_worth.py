"""Measure what feedback is worth: how many answers to rank, who ranks, and what copies of a ranking add.

    python -m lab.feedback_worth --part=rankings
    python -m lab.feedback_worth --part=raters
    python -m lab.feedback_worth --part=augment
    python -m lab.feedback_worth --part=rankings --seeds=1 --budgets=500,1000

On the toy world. Every seed has an SFT model as in demo.py, which answers the training prompts. Simulated raters rank
the answers, models learn from the rankings, and the gold score says what came of it.

rankings    2, 4 or 8 answers to a prompt. A judgement is one comparison of two answers. A person who ranks K answers
            puts them in order one after the other: each is compared with the middle of those in order, then with the
            middle of the half that is left. This binary insertion takes about log2(K!) comparisons, and fewer where
            answers tie; `comparisons` counts them. A budget is a number of judgements.
raters      Three raters, of whom none, one or all are bad (`rater`). Remedies: three raters a prompt, merged; of these
            prompts the half with the most agreement; the rater left out who agrees least on a shared twentieth; label
            smoothing, which dpo.py has. The budget is a number of rankings, the same for every remedy.
augment     Rankings copied for nothing: the answers in another order, or the prompt in other words. A reward model
            scores each answer alone, a judge reads two at once. A budget is a number of rankings by the person.

Columns: `labels right`, the share of the labels' pairs in the order of gold; `right`, the share of held-out pairs that
the model puts in that order; both of pairs whose gold scores are clearly apart. `gold`, the gold score of the best of 4
SFT answers by a reward model or judge; of DPO's policy, the mean of its sampled answers.

It prints each command, reuses finished stages, prints a table in Markdown, and writes PART.json and PART.png. The three
seeds take 7 minutes on two cores for rankings, 12 for raters and 7 for augment.
"""

import contextlib
import io
import json
import os
import random
import sys
from dataclasses import dataclass
from itertools import combinations, cycle
from statistics import fmean
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.batches import collate_answers, encode_rankings
from common.checkpoints import load_policy, load_reward_model
from common.options import fail, launch, require
from common.records import read_preferences, write_atomic, write_records
from common.rollout import beats, pair_agreement, sample_answers, score_packed
from common.run import Run
from common.tokens import load_tokenizer
from data.toy import world
from evaluate import score_rows
from feedback.agreement import differ, kappa, merge
from feedback.annotators import SimulatedPerson, answers_of, distinct, shown, to_ranks
from feedback.judges import GPTJudge, comparison, read_instruction
from lab.figures import COLOURS, panels
from lab.seeds import Seeds, numbers
from lab.sweep import needed
from lab.tables import show, table
from model import last_places
from reward import preference_loss

import torch

BUDGETS = dict(rankings='500,1000,2000,4000', raters='1200', augment='150,400,1200') # the parts, and what they spend
STEPS = dict(rankings=300, raters=200, augment=300)
NOISE, TIE = 0.1, 0.3 # of a good rater, as in config/toy/collect.py
NOISY = 0.5 # of a noisy one: sees a gold difference of 0.8 rightly with sigmoid((0.8 - TIE) / 0.5) = 73 %
RANDOM = 0.2 # share of a lazy rater's rankings that are random
BAD = 'noisy', 'lazy', 'first', 'longer' # each as all three raters, all but noisy as one of three
SHARED = 20 # one prompt for so many rankings is ranked by all three raters, to find the one who disagrees
SMOOTHING = 0.2 # of DPO
FEWEST = 12 # rankings for raters: three merge theirs, and half of those is kept
COPIES = 3 # phrasings that a ranking is copied to
HEADS = dict(rankings=('judgements', 'answers a prompt'), raters=('raters', 'what is done'),
             augment=('rankings', 'who learns', 'from'))
JUDGE = 'config/judge/toy.txt' # what the judge is told
RUN = Run('cpu', 'float32')

@dataclass
class Config(Seeds):
    out_dir: str = 'out/feedback_worth' # seed N in a folder N
    part: str = 'rankings' # rankings, raters or augment
    budgets: str = '' # see above, fewest first; raters has one; empty = 500 to 4000, 1200, 150 to 1200
    prompts: int = 4400 # train prompts with 2 answers; a third of them also get 4, a seventh 8
    steps: int = 0 # of every reward model and judge, DPO takes a third; 0 = 300, for raters 200

    def __post_init__(self):
        super().__post_init__()
        require(self, part=(self.part in BUDGETS, f"one of {', '.join(BUDGETS)}"))
        self.budgets, self.steps = self.budgets or BUDGETS[self.part], self.steps or STEPS[self.part]
        budgets = numbers(self.budgets)
        rising = [] != budgets == sorted({*budgets} - {0}) and (self.part != 'raters' or len(budgets) == 1)
        require(self, budgets=(rising, 'rising numbers above 0, separated by commas; one for raters'))
        require(self, budgets=(self.part != 'raters' or budgets[0] >= FEWEST,
                               f'at least {FEWEST} for raters, some of whose remedies keep a sixth'),
                prompts=(7 <= self.prompts <= 6000, 'from 7 to 6000'), steps=(self.steps >= 3, 'at least 3, or 0'))

# ---- who ranks --------------------------------------------------------------------------------------------------

def golds(row):
    return [world.gold(row, response) for response in row['responses']] # (K,)

def rater(kind, seed):
    """Return a function that ranks a row: row -> ranks (K,), 0 = best.

    good     the simulated person of feedback/annotators.py         first    always the answer that is shown first
    noisy    the same, with NOISY                                   longer   always the longer answer
    lazy     a good one, but a share of RANDOM rankings is random

    Equal texts share their rank.
    """
    rng = random.Random(seed)
    person = SimulatedPerson(SimpleNamespace(seed=seed, noise=NOISY if kind == 'noisy' else NOISE, tie=TIE), world.gold)

    def rank(row):
        once = distinct(answers_of(row))
        if kind == 'first':
            liking = [-i for i in range(len(once))]
        elif kind == 'longer':
            liking = [len(text) for text, _ in once]
        elif kind == 'lazy' and rng.random() < RANDOM:
            liking = [rng.random() for _ in once]
        else:
            return person.rank(row)[0]
        return to_ranks([liking[once.index(answer)] for answer in answers_of(row)])

    return rank

def comparisons(row):
    """Count the comparisons that ranking a row by binary insertion takes.

    An answer that is found equal to one in order needs no more of them. Equal texts are shown once.
    """
    order, n = [], 0 # the different ranks so far, best first
    for rank in dict(zip(answers_of(row), row['ranks'])).values():
        low, high = 0, len(order)
        while low < high:
            middle, n = (low + high) // 2, n + 1
            if order[middle] == rank:
                break
            low, high = (middle + 1, high) if order[middle] < rank else (low, middle)
        else:
            order.insert(low, rank)
    return n

def describe(rows):
    """Measure labels: rows with a pair, pairs, and the share of clear ones in the order of gold."""
    n, clear = [], [] # pairs of each row; of each pair whose gold scores are clearly apart, if gold says so too
    for row in rows:
        pairs = [(i, j) for i, a in enumerate(row['ranks']) for j, b in enumerate(row['ranks']) if a < b]
        gold = to_ranks(golds(row), TIE)
        n.append(len(pairs))
        clear += [gold[i] < gold[j] for i, j in pairs if gold[i] != gold[j]]
    return {'with a pair': sum(map(bool, n)), 'pairs': sum(n), 'labels right': sum(clear) / max(len(clear), 1)}

# ---- the three parts: what is learnt from what ------------------------------------------------------------------
# Each writes files of rankings below `folder`, and returns {label of a model: (script, its options, what is known of
# its labels)}. A label has a word for each of HEADS. pool: K -> rows of K answers, of which two differ at least.

def rankings(budgets, pool, folder, seed):
    jobs = {}
    for K in (2, 4, 8):
        rank = rater('good', f'{seed} {K}')
        rows = [row | dict(ranks=rank(row)) for row in pool(K)]
        for budget in budgets:
            spent, mine = 0, []
            for row in rows:
                if spent + comparisons(row) > budget:
                    break
                spent += comparisons(row)
                mine.append(row)
            if len(mine) == len(rows):
                fail(f"--budgets={budget}: ranking {K} answers to all {len(rows)} prompts takes {spent} judgements; "
                     "wanted fewer, or more --prompts")
            if not mine:
                fail(f"--budgets={budget}: the first ranking of {K} answers takes {comparisons(rows[0])} judgements; "
                     "wanted at least so many")
            path = f'{folder}/ranked_{K}_{budget}.jsonl'
            write_records(path, mine)
            known = dict(judgements=spent, rankings=len(mine), answers=K * len(mine)) | describe(mine)
            jobs[budget, K] = 'reward.py', dict(train_data=path, batch_size=64 // K), known # answers a step: 64
    return jobs

def enough(rows, budget):
    """Return rows; end the program where there are fewer than a budget wants."""
    if len(rows) < budget:
        fail(f"--budgets={budget}: only {len(rows)} prompts have 4 answers of which two differ; wanted at most so "
             "many, or more --prompts")
    return rows

def merged(rows, raters, path):
    """Merge what raters, {name: function}, say of rows, as collect.py does.

    The rows are written to `path`, those of each rater beside it.
    """
    files = []
    for k, rank in raters.items():
        files.append(f'{path}.{k}')
        write_records(files[-1], [row | dict(ranks=rank(row), rater=k) for row in rows])
    with contextlib.redirect_stdout(io.StringIO()): # who agrees with whom
        merge(files, path)
    return read_preferences(path)

def agreement(row):
    """Return how far the raters of a merged row agree: the mean share of pairs on which two say the same."""
    return fmean(kappa([a['ranks']], [b['ranks']])[1] for a, b in combinations(row['opinions'], 2))

def odd_one_out(rows):
    """Return the rater whose mean kappa with the others is lowest. rows: merged ones of the same raters."""
    said = {k: [next(o['ranks'] for o in row['opinions'] if o['rater'] == k) for row in rows]
            for k in sorted({o['rater'] for row in rows for o in row['opinions']})}
    return min(said, key=lambda k: sum(kappa(said[k], said[other])[0] or 0 for other in said if other != k))

def raters(budgets, pool, folder, seed):
    budget, = budgets
    rows, jobs = enough(pool(4), budget), {}
    teams = {'three good': ['good'] * 3, **{f'one of three {bad}': ['good', 'good', bad] for bad in BAD[1:]},
             **{f'all {bad}': [bad] * 3 for bad in BAD}}
    for team, kinds in teams.items():
        # each remedy asks raters anew, so that no one's noise depends on what others were asked before
        fresh = lambda: {f'{k}': rater(kind, f'{seed} {k} {kind}') for k, kind in enumerate(kinds)}
        start = f"{folder}/{team.replace(' ', '_')}"

        def add(what, mine, script='reward.py', **options):
            known = dict(rankings=budget) | describe(mine) | {k: options.pop(k) for k in ('dropped',) if k in options}
            path = f"{start}_{what.replace(' ', '_').replace(',', '')}.jsonl"
            write_records(path, mine)
            jobs[team, what] = script, dict(train_data=path) | options, known

        who = list(fresh().values())
        single = [row | dict(ranks=who[i % 3](row)) for i, row in enumerate(rows[:budget])]
        add('one rater a prompt', single)
        three = merged(rows[:budget // 3], fresh(), f'{start}.merged')
        add('three merged', three)
        if team not in ('all first', 'all longer'): # who agree always
            decided = sorted((row for row in three if len({*row['ranks']}) > 1), key=agreement, reverse=True)
            add('agreed half', decided[:len(decided) // 2])
        if not team.startswith('all'):
            n, asked = max(1, budget // SHARED), fresh()
            shared = merged(rows[:n], asked, f'{start}.shared')
            bad = odd_one_out(shared)
            rest = [row | dict(ranks=asked[f'{i % 3}'](row)) for i, row in enumerate(rows[n:budget - 2 * n])
                    if f'{i % 3}' != bad]
            others = {k: rank for k, rank in fresh().items() if k != bad} # say of the shared prompts what they said
            mine = [*merged(rows[:n], others, f'{start}.others'), *rest]
            add('odd one dropped', mine, **{} if team == 'three good' else dict(dropped=float(bad == '2')))
        add('DPO', single, 'dpo.py')
        add(f'DPO, smoothing {SMOOTHING}', single, 'dpo.py', label_smoothing=SMOOTHING)
    return jobs

def paraphrases(prompt, rng, split='train'):
    """Return a prompt in up to COPIES other phrasings of its split; a dialogue's last question alone changes."""
    text = world.last_turn(prompt)
    lead = world.LEAD.match(text).group()
    category, match = world.first_match(world.READERS, text[len(lead):])
    slots = match.groupdict()
    fact = slots.get('e') or slots.get('w') or f"{slots.get('a')} {slots.get('b')}" # the subject, if it is one
    templates = world.PHRASINGS[category, fact][split] if (category, fact) in world.PHRASINGS else \
        world.TEMPLATES[category]
    others = [lead + template.format(**slots) for template in templates]
    others = [other for other in others if other != text]
    others = rng.sample(others, min(COPIES, len(others)))
    if isinstance(prompt, str):
        return others
    return [[*prompt[:-1], prompt[-1] | dict(content=other)] for other in others]

def swapped(row):
    """Return a row with its answers the other way round."""
    return row | {key: row[key][::-1] for key in ('responses', 'ranks', 'ended', 'scores') if key in row}

def verdicts(rows):
    """Make demonstrations of verdicts: one of each pair of different rank, for a judge that reads two answers."""
    instruction, made = read_instruction(JUDGE), []
    for row in rows:
        for (a, rank), (b, other) in combinations(zip(answers_of(row), row['ranks']), 2):
            if rank != other:
                letter, better = ('A', a) if rank < other else ('B', b)
                made.append(dict(prompt=comparison(instruction, row['prompt'], shown(*a), shown(*b)),
                                 response=f'{letter}. {better[0]}'))
    return made

def augment(budgets, pool, folder, seed):
    jobs, rank, rng = {}, rater('good', f'{seed} 4'), random.Random(seed)
    rows = [row | dict(ranks=rank(row)) for row in enough(pool(4), budgets[-1])]
    copies = [[row | dict(prompt=prompt) for prompt in paraphrases(row['prompt'], rng)] for row in rows]
    for n in budgets:
        mine, other = rows[:n], list(map(swapped, rows[:n]))
        more = [*mine, *(copy for of_row in copies[:n] for copy in of_row)]
        last = {'answers swapped': other} if n == budgets[-1] else {} # it changes nothing, so one budget is enough
        for who, script, files in (
                ('reward model', 'reward.py', {'as ranked': mine, 'paraphrased': more} | last),
                ('judge', 'sft.py', {'as ranked': verdicts(mine), 'both orders': verdicts(mine + other)})):
            for what, data in files.items():
                path = f"{folder}/{who.split()[0]}_{what.replace(' ', '_')}_{n}.jsonl"
                write_records(path, data)
                jobs[n, who, what] = script, dict(train_data=path), dict(rows=len(data)) | describe(mine)
    return jobs

PARTS = dict(rankings=rankings, raters=raters, augment=augment)

# ---- stages -----------------------------------------------------------------------------------------------------

def collecting(cfg, at):
    """Return the stages of one seed up to the answers; their scores are gold. at: its demo.Config."""
    todo, out = needed(demo.stages(at), ['collect test']), at.out_dir
    for K in (2, 4, 8) if cfg.part == 'rankings' else (4,):
        path = f'{out}/answers{K}.jsonl'
        options = dict(prompts='data/toy/prompts_train.jsonl', n_answers=K, max_prompts=cfg.prompts // (K - 1),
                       noise=0.0, tie=0.0, out=path)
        todo.append((f'answers {K}', 'collect.py', 'config/toy/collect.py', options, path, ['sft']))
    return todo

def folder_of(cfg, at, label):
    return f'{at.out_dir}/{cfg.part}{cfg.budgets if cfg.part == "raters" else ""}/' + '_'.join(
        str(word).replace(',', '').replace(' ', '_') for word in label)

def training(cfg, at, jobs):
    """Return a stage for each model. jobs: as of PARTS."""
    more = {'reward.py': dict(val_data='', max_steps=cfg.steps), 'dpo.py': dict(val_data='', max_steps=cfg.steps // 3),
            'sft.py': dict(val_data='', max_steps=cfg.steps, eval_every=0, eval_batches=50)}
    config, todo, needs = {'reward.py': 'reward', 'dpo.py': 'dpo', 'sft.py': 'judge'}, [], ['sft']
    needs += [name for name, *_ in collecting(cfg, at) if name.startswith('answers')]
    for label, (script, options, _) in jobs.items():
        out = folder_of(cfg, at, label)
        todo.append((f"{cfg.part} {', '.join(map(str, label))}", script, f'config/toy/{config[script]}.py',
                     more[script] | options | dict(out_dir=out), f'{out}/model.safetensors', needs))
    return todo

# ---- what came of it --------------------------------------------------------------------------------------------

def of_scores(scored):
    """Return `right` and `gold` of scores; scored: [(row, scores (K,))]."""
    found = [pair_agreement(scores, to_ranks(golds(row.record), TIE)) for row, scores in scored]
    right, pairs = map(sum, zip(*found))
    return dict(right=right / pairs, gold=fmean(golds(row.record)[max(range(len(scores)), key=scores.__getitem__)]
                                                for row, scores in scored))

@torch.no_grad()
def of_policy(folder, rows, tok, K=2):
    """Return `gold` of a policy, K answers sampled to each prompt."""
    model = load_policy(folder).eval()
    prompts = [row.prompt[32 - model.config.block_size:] for row in rows for _ in range(K)] # with room for an answer
    torch.manual_seed(1)
    answers, _ = sample_answers(model, prompts, tok, 32)
    texts = [tok.decode(answer).removeprefix(' ') for answer in answers]
    return dict(gold=fmean(world.gold(rows[i // K].record, text) for i, text in enumerate(texts)))

def of_judge(folder, rows):
    """Measure a judge. `right` is of verdicts in one order, `alike` the share that both orders agree on."""
    judge = GPTJudge(SimpleNamespace(judge=folder, judge_instruction=JUDGE, seed=1, tie=0.0), RUN)
    right, alike, scored = [], [], []
    judge.look_ahead([row.record for row in rows])
    for row in rows:
        answers = distinct(answers_of(row.record))
        gold = to_ranks([world.gold(row.record, text) for text, _ in answers], TIE)
        p = {ij: judge.verdict(question) for ij, question in judge.questions(row.record['prompt'], answers).items()}
        for i, j in p:
            if gold[i] < gold[j]:
                right += [beats(p[i, j], 0.5), 1 - beats(p[j, i], 0.5)]
                alike.append((p[i, j] > 0.5) == (p[j, i] < 0.5))
        scored.append((row, judge.rank(row.record)[1]))
    return of_scores(scored) | dict(right=fmean(right), alike=fmean(alike))

def of_model(script, folder, rows, tok):
    """Return what is measured of a trained model. rows: held-out ones."""
    if script == 'dpo.py':
        return of_policy(folder, rows, tok)
    if script == 'sft.py':
        return of_judge(folder, rows)
    model = load_reward_model(folder).eval()
    found = of_scores(score_rows(lambda some: score_packed(model, some, RUN), rows, folder, 'scores'))
    return found | dict(alike=1.0) # it scores each answer alone, so it has no order to depend on

def swap_gap(model, rows):
    """Return how much loss and gradient change when answers are swapped.

    The largest change, relative to the largest number, in float64: the sum over pairs of -log sigmoid(s_w - s_l) has
    the same terms in another order.
    """
    model, found = model.double(), []
    turned = [row._replace(answers=row.answers[::-1], record=swapped(row.record)) for row in rows]
    for some in (rows, turned):
        answers = collate_answers(some)
        keep = last_places(answers.lengths, answers.idx.size(1))
        scores = model.reward_head(model.hidden(answers.idx, keep=keep, groups=answers.groups)).squeeze(-1) # (N,)
        loss = preference_loss(scores, some, margins=False)
        weights = [p for p in model.parameters() if p.requires_grad]
        gradients = [g.flatten() for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
        found.append((loss.detach()[None], torch.cat(gradients)))
    return [((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found)]

# ---- tables and figures -----------------------------------------------------------------------------------------

def points(ax, x, seeds, colour, **style):
    """Plot a value of each seed, pale, at x (one or several), and their means. seeds: lists of numbers."""
    for at, values in zip(x, seeds):
        ax.plot([at] * len(values), values, '.', color=colour, alpha=0.4)
    ax.plot(x, list(map(fmean, seeds)), color=colour, **style)

def draw_curves(results, path, lines, views):
    """Draw a panel per view, and in it `lines`: labels without their budget.

    views: (column, that of the x-axis or '' for the budget, the axis's name, title).
    """
    with panels(path, len(views), 4.4, 3.6) as axes:
        for ax, (column, axis, name, title) in zip(axes, views):
            for line, colour in zip(lines, cycle(COLOURS)):
                cells = [(label, row) for label, row in results.items() if label[1:] == line and column in row]
                x = [fmean(row[axis]) if axis else label[0] for label, row in cells]
                if x:
                    points(ax, x, [row[column] for _, row in cells], colour, marker='o', ms=5, lw=1.4,
                           label=', '.join(f'{word} answers a prompt' if type(word) is int else word for word in line))
            ax.set_xscale('log')
            low, high = ax.get_xlim()
            ticks = [n * 10 ** k for k in range(7) for n in (1, 2, 5) if low <= n * 10 ** k <= high] if axis else \
                list(dict.fromkeys(label[0] for label in results))
            ax.set_xticks(ticks, map(str, ticks))
            ax.minorticks_off()
            ax.set(xlabel=f'{name} (logarithmic axis)', ylabel=dict(
                right='clear held-out pairs in order', gold='gold score, best of 4',
                alike='same verdict in both orders')[column], title=title)
        axes[0].legend(fontsize=8)

def draw_raters(results, path):
    """Draw a panel for pairs in order, best of 4, and DPO; teams one below the other."""
    teams = list(dict.fromkeys(team for team, _ in results))[::-1]
    with panels(path, 3, 4.4, 4.2) as axes:
        for ax, column, dpo in zip(axes, ('right', 'gold', 'gold'), (False, False, True)):
            remedies = list(dict.fromkeys(what for _, what in results if what.startswith('DPO') == dpo))
            for n, (what, colour) in enumerate(zip(remedies, COLOURS)):
                rows = [(y + 0.18 * ((len(remedies) - 1) / 2 - n), results[team, what][column])
                        for y, team in enumerate(teams) if (team, what) in results]
                for y, values in rows:
                    ax.plot(values, [y] * len(values), '.', color=colour, alpha=0.4)
                ax.plot([fmean(values) for _, values in rows], [y for y, _ in rows], 'o', color=colour, ms=5,
                        label=what)
            ax.set_yticks(range(len(teams)), teams)
            ax.set(xlabel='clear held-out pairs in order' if column == 'right' else 'gold score',
                   title='reward model' if column == 'right' else 'sampled from DPO' if dpo else 'best of 4')
            ax.legend(fontsize=7, loc='upper center', bbox_to_anchor=(0.5, -0.16))

def draw(part, results, path):
    """Draw the figure of a part; results: {label: {column: [of each seed]}}."""
    if part == 'raters':
        return draw_raters(results, path)
    lines = list(dict.fromkeys(label[1:] for label in results))
    if part == 'rankings':
        views = [('right', '', 'judgements: comparisons', 'equal judgements'),
                 ('right', 'answers', 'answers read', 'equal reading'),
                 ('gold', '', 'judgements: comparisons', 'what it is worth')]
    else:
        views = [(column, '', 'rankings by the person', title) for column, title in (
            ('right', 'held-out pairs'), ('gold', 'what it is worth'), ('alike', 'does the order matter?'))]
    draw_curves(results, path, lines, views)

def print_results(part, results):
    """Print a table of all models."""
    columns = list(dict.fromkeys(column for row in results.values() for column in row if column != 'judgements'))
    whole = ('rankings', 'answers', 'with a pair', 'pairs', 'rows')
    columns = [c for c in columns if not (c == 'alike' and part != 'augment')]
    cell = lambda row, c: show(row[c], 0 if c in whole else 3) if c in row else '–'
    table([*HEADS[part], *columns], [[*map(str, label), *(cell(row, c) for c in columns)]
                                     for label, row in results.items()])

def main(cfg):
    results, ends, gaps = {}, [], []
    for at in cfg.each():
        out, before = at.out_dir, collecting(cfg, at)
        demo.run_stages(before, at)
        os.makedirs(f'{out}/labels', exist_ok=True)
        pool = lambda K: list(filter(differ, read_preferences(f'{out}/answers{K}.jsonl')))
        jobs = PARTS[cfg.part](numbers(cfg.budgets), pool, f'{out}/labels', at.seed)
        demo.run_stages([*before, *training(cfg, at, jobs)], at)
        tok = load_tokenizer(f'{out}/sft')
        room = load_policy(f'{out}/sft').config.block_size
        rows = encode_rankings(tok, read_preferences(f'{out}/rankings_test.jsonl'), room, 'held-out rankings')
        for label, (script, _, known) in jobs.items():
            for key, value in (known | of_model(script, folder_of(cfg, at, label), rows, tok)).items():
                results.setdefault(label, {}).setdefault(key, []).append(value)
        ends.append([fmean(map(fmean, map(golds, (row.record for row in rows)))),
                     fmean(max(golds(row.record)) for row in rows)])
        if cfg.part == 'augment':
            label = next(label for label in reversed(jobs) if label[1:] == ('reward model', 'as ranked'))
            gaps.append(swap_gap(load_reward_model(folder_of(cfg, at, label)).requires_grad_(True), rows[:64]))
    print_results(cfg.part, results)
    low, high = (show(values, 3) for values in zip(*ends))
    print(f"\ngold score of SFT's answers {low}, of the best of 4 by gold itself {high}")
    for name, gap in zip(('loss', 'gradient'), zip(*gaps)):
        print(f"answers swapped, float64: the {name} changes by {max(gap):.1e} of its size at most")
    write_atomic(f'{cfg.out_dir}/{cfg.part}.json', json.dumps(dict(
        seeds=numbers(cfg.seeds), sft_and_best=ends, swap_gaps=gaps,
        models={', '.join(map(str, label)): row for label, row in results.items()}), indent=1) + '\n')
    draw(cfg.part, results, f'{cfg.out_dir}/{cfg.part}.png')

if __name__ == '__main__':
    launch(main, Config)
