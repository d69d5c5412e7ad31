"""Compare methods at equal KL: gold and proxy against the KL to SFT, of PPO, RLOO, DPO, RRHF, ORPO, best of n.

    python -m lab.frontier
    python -m lab.frontier --methods=ppo,dpo --betas="ppo=0,0.06 dpo=0.5,2,8" --seeds=1

On the toy world, on the test prompts. The proxy is the reward model's score, which methods may learn from; gold is what
it stands for. PPO and DPO are trained with each price of the KL in --betas, the others as in config/toy. evaluate.py
measures each policy's KL exactly at every token of an answer sampled to each prompt.

Best of n takes 64 answers of SFT to each prompt, n = 1, 2, 4, …, 64. Their means are unbiased (`chances`). Their KL is
estimated from the same answers (`best_of_kl`): too low rather than too high, since answers rarer than 1 in 64 are
missing. This favours best of n at equal KL. The table also has the KL from half of the answers, which hints at how much
is missing, and its upper bound log n - (n-1)/n.

Gao, Schulman and Hilton 2022 (https://arxiv.org/abs/2210.10760) describe what is gained over SFT by two curves:

    best of n    d (α - β d)              d = √KL
    RL           d (α - β log d)

Both are fitted by least squares to each method with three points or more. Intervals of 95 % are of 1000 bootstraps over
seeds and prompts, which leave the KL as measured; few seeds make them too narrow. A curve holds if its residuals are no
larger than the spread between seeds. At equal KL the points of each seed are joined by lines, over √KL; ~ marks what
lies below a method's smallest KL, on the line to SFT.

It prints each command, reuses finished stages, prints tables in Markdown, and writes results.json and frontier.png.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import cycle
from math import comb

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

import demo
from common.options import fail, launch, require
from common.records import read_json, read_records, write_atomic
from data.toy.world import gold
from lab.figures import COLOURS, panels
from lab.seeds import Seeds, numbers
from lab.sweep import needed, read_space
from lab.tables import show, table

PRICES = {'ppo.py': 'kl_coef', 'reinforce.py': 'kl_coef', 'dpo.py': 'beta', 'kto.py': 'beta'} # options for --betas
NO_PRICE = 'simpo', 'orpo' # whose beta is no pull to a reference
BEST = 'best_of_n'
SCORES = ('gold', 'reward')
FORMS = {'d (α − β d)': lambda d: d, 'd (α − β log d)': lambda d: np.log(np.maximum(d, 1e-9))} # what β multiplies
PROMPTS = 'data/toy/prompts_test.jsonl'

@dataclass
class Config(Seeds):
    """Hold the options of gold against KL."""
    KNOWN = demo.METHODS # {method: (its script, …)}

    out_dir: str = 'out/frontier' # seed N in a folder N
    methods: str = f'ppo,rloo,dpo,rrhf,orpo,{BEST}' # of demo.py, and best_of_n
    betas: str = 'ppo=0,0.03,0.06,0.12,0.18,0.36 dpo=0.25,0.5,1,2,4,8' # kl_coef of ppo and its kin, beta of dpo's
    answers: int = 64 # of SFT to each prompt, for best of n
    max_prompts: int = 0 # use the first so many; 0 = all
    at: str = '0.5,1,1.5,2,3' # compare at these KLs, and at those of methods with one point alone
    axis: str = 'kl' # of the figure: kl or sqrt

    def __post_init__(self):
        super().__post_init__()
        names, priced = self.methods.split(','), read_space(self.betas, 'betas')
        known = [*self.KNOWN, BEST]
        require(self, methods=(set(names) <= {*known} and len(set(names)) == len(names),
                               f"names among {','.join(known)}, each once"),
                betas=(all(name in self.KNOWN and self.KNOWN[name][0] in PRICES and name not in NO_PRICE
                           and all(is_price(beta, PRICES[self.KNOWN[name][0]] == 'beta') for beta in betas)
                           for name, betas in priced.items()),
                       'method=number,number,… of methods with a price on the KL; a beta above 0'),
                at=(all(map(is_price, self.at.split(','))), 'KLs, separated by commas'),
                answers=(self.answers >= 4, 'at least 4'), max_prompts=(self.max_prompts >= 0, 'at least 0'),
                axis=(self.axis in ('kl', 'sqrt'), 'kl or sqrt'))

def is_price(text, above=False):
    """Say whether a text is a number, at least 0, or above it."""
    number = float(text) if re.fullmatch(r'([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?', text) else -1
    return 0 < number < math.inf or number == 0 and not above

# ---- running ----------------------------------------------------------------------------------------------------

def settings_of(cfg):
    """Return {method: {name of a policy: its options}} of all methods that are trained."""
    betas, found = read_space(cfg.betas, 'betas'), {}
    for method in cfg.methods.split(','):
        if method in betas:
            option = PRICES[cfg.KNOWN[method][0]]
            found[method] = {f'{method}_{beta}': {option: beta} for beta in betas[method]}
        elif method != BEST:
            found[method] = {method: {}}
    return found

def stages(cfg, at):
    """Return the stages of one seed, as demo.stages does. at: its demo.Config."""
    out, settings, folders = at.out_dir, settings_of(cfg), dict(sft=f'{at.out_dir}/sft')
    made, trained = demo.stages(at), []
    for method, policies in settings.items():
        script, needs = demo.METHODS[method]
        for name, options in policies.items():
            folders[name] = f'{out}/{name}'
            trained.append((name, script, f'config/toy/{method}.py', options | dict(out_dir=folders[name]),
                            f'{folders[name]}/model.safetensors', needs))
    todo = needed(made, ['reward', *(need for stage in trained for need in stage[5])])
    todo = [stage for stage in todo if stage[0] not in folders or stage[0] == 'sft'] + trained
    answers = f'{out}/answers.jsonl'
    todo.append(('answers', 'collect.py', 'config/toy/collect_best.py', dict(
        keep='all', n_answers=cfg.answers, prompts=PROMPTS, max_prompts=cfg.max_prompts, out=answers), answers,
        ['reward']))
    models = ','.join(f'{name}={folder}' for name, folder in folders.items())
    options = dict(models=models, prompts=PROMPTS, max_prompts=cfg.max_prompts, reward_model=f'{out}/reward', best_of=0,
                   text='', rankings='', comparisons='', figures=False, out_dir=f'{out}/policies')
    return [*todo, ('policies', 'evaluate.py', 'config/toy/evaluate.py', options, f'{out}/policies/results.json',
                    ['reward', *(stage[0] for stage in trained)])]

# ---- best of n --------------------------------------------------------------------------------------------------

def chances(m, n):
    """Return how likely each of m answers is the best of n, (m,).

        C(k-1, n-1) / C(m, n)        k = 1 … m, from the lowest: the n-1 others are among the k-1 below it

    The mean with these weights is unbiased (Nakano et al. 2021, https://arxiv.org/abs/2112.09332).
    """
    return np.array([comb(k, n - 1) / comb(m, n) for k in range(m)])

def best_of_kl(p, n):
    """Return KL(best of n || policy) in nats; p (R,): how likely each reward is, from the lowest.

        sum over r of q(r) log(q(r) / p(r)),        q(r) = F(r)^n - F(r-)^n

    F(r) and F(r-): the chance of a reward up to r, and below it. Among answers of the same reward the best of n chooses
    as the policy does, so the ratio of the answers' probabilities is q(r) / p(r), and this is exact. It is at most
    log n - (n-1)/n (Beirami et al. 2024, https://arxiv.org/abs/2401.01879). With shares among sampled answers for p it
    is an estimate.
    """
    F = np.cumsum(p)
    q = F ** n - np.concatenate([[0.0], F[:-1]]) ** n
    return max(0.0, float(np.sum(q[q > 0] * np.log(q[q > 0] / p[q > 0]))))

def shares(rewards):
    """Return how often each different reward occurs, from the lowest."""
    return np.unique(rewards, return_counts=True)[1] / len(rewards)

def bound(n):
    return math.log(n) - (n - 1) / n

def best_of(rewards, golds, n):
    """Return a prompt's best of n: {gold, reward, kl, kl_half}; rewards, golds: lists of its m answers.

    kl_half: the KL from the first half of the answers. A prompt with fewer than n answers, since empty ones are left
    out, gives the best of all of them.
    """
    order, m = np.argsort(rewards, kind='stable'), len(rewards)
    w = chances(m, min(n, m))
    return dict(gold=w @ np.array(golds)[order], reward=w @ np.array(rewards)[order],
                kl=best_of_kl(shares(rewards), n), kl_half=best_of_kl(shares(rewards[:(m + 1) // 2]), n))

# ---- points -----------------------------------------------------------------------------------------------------

def read_seed(cfg, out, gold=gold):
    """Read a seed's points, {method: {setting: {kl, gold (P,), reward (P,)}}}, and SFT's.

    out: the seed's folder; P prompts. The KL is a mean over prompts. SFT's scores are means over its many answers.
    """
    rows = read_records(f'{out}/answers.jsonl', 'rankings')
    samples = read_records(f'{out}/policies/samples.jsonl', 'prompts')
    asked = [sample['prompt'] for sample in samples if sample['model'] == 'sft']
    golds = [[gold(row, response) for response in row['responses']] for row in rows]
    everything = [[best_of(row['scores'], of_row, n) for row, of_row in zip(rows, golds)] for n in sizes(cfg)]
    if [row['prompt'] for row in rows] != asked:
        fail(f"{out}/answers.jsonl: has {len(rows)} of {len(asked)} prompts; wanted all of them, each with two answers "
             "that are not empty")
    best = {str(n): {key: np.array([row[key] for row in of_n]) for key in of_n[0]}
            for n, of_n in zip(sizes(cfg), everything)}
    for point in best.values():
        point |= dict(kl=point['kl'].mean(), kl_half=point['kl_half'].mean())
    models, points = read_json(f'{out}/policies/results.json')['models'], {}
    for method, policies in settings_of(cfg).items():
        points[method] = {}
        for name in policies:
            mine = [sample for sample in samples if sample['model'] == name]
            points[method][name] = dict(kl=models[name]['kl'], **{
                key: np.array([sample[f'sampled_{key}'] for sample in mine]) for key in SCORES})
    if BEST in cfg.methods.split(','):
        points[BEST] = best
    return points, best['1']

def sizes(cfg):
    """Return the n of best of n: 1, 2, 4, … up to the number of answers."""
    return [2 ** k for k in range(cfg.answers.bit_length())]

# ---- curves -----------------------------------------------------------------------------------------------------

def fit(d, y, form):
    """Fit α and β of y = d (α - β f(d)) by least squares; d, y: (N,). f: FORMS[form]."""
    X = np.stack([d, -d * FORMS[form](d)], 1) # (N, 2)
    return np.linalg.lstsq(X, y, rcond=None)[0]

def curve(d, alpha, beta, form):
    return d * (alpha - beta * FORMS[form](d))

def fit_method(kl, gain, form, rng, draws=1000):
    """Fit a form to a method; return α, β, their 95 % intervals and what is left over.

    kl: (S, J), S seeds and J settings; gain: (S, J, P), each prompt's score less SFT's. `residuals` (J) are those of
    the means over seeds, `rms` is of all points, and `spread` the standard deviation between seeds.
    """
    S, _, P = gain.shape
    d, y = np.sqrt(np.maximum(kl, 0)), gain.mean(2) # (S, J) each
    alpha, beta = fit(d.ravel(), y.ravel(), form)
    weights = rng.multinomial(P, np.full(P, 1 / P), size=draws) / P # (draws, P): the same prompts in all seeds
    resampled = np.moveaxis(gain @ weights.T, 2, 0) # (draws, S, J)
    seeds = rng.integers(S, size=(draws, S))
    fitted = [fit(d[chosen].ravel(), of_draw[chosen].ravel(), form) for chosen, of_draw in zip(seeds, resampled)]
    low, high = np.percentile(fitted, [2.5, 97.5], axis=0)
    left = y - curve(d, alpha, beta, form)
    return dict(alpha=alpha, beta=beta, alpha_interval=[low[0], high[0]], beta_interval=[low[1], high[1]],
                rms=np.sqrt((left ** 2).mean()), residuals=left.mean(0).tolist(),
                spread=np.sqrt(y.var(0, ddof=1).mean()) if S > 1 else None)

def at_kl(kl, y, start, where):
    """Interpolate scores at a KL, linearly in √KL; None beyond the last point.

    kl, y: (J,), a method's points; start: SFT's score, at KL 0; where: the KL.
    """
    order = np.argsort(kl)
    x = np.sqrt(np.maximum(np.array(kl)[order], 0))
    if not 0 <= math.sqrt(where) <= x[-1]:
        return None
    return float(np.interp(math.sqrt(where), [0.0, *x], [start, *np.array(y)[order]]))

# ---- what came out ----------------------------------------------------------------------------------------------

def arrays(seeds, method):
    """Return a method's KL (S, J) and {score: (S, J, P)}. seeds: [(points, SFT)] of `read_seed`."""
    points = [list(of_seed[method].values()) for of_seed, _ in seeds]
    return (np.array([[point['kl'] for point in row] for row in points]),
            {key: np.array([[point[key] for point in row] for row in points]) for key in SCORES})

def print_points(seeds):
    """Print a table of all points, and one of best of n. Return {method: {setting: {key: [of each seed]}}}."""
    results, rows = {}, []
    for method in seeds[0][0]:
        results[method] = {}
        for name in seeds[0][0][method]:
            points = [of_seed[method][name] for of_seed, _ in seeds]
            mean = lambda key: [float(np.mean(point[key])) for point in points]
            results[method][name] = {key: mean(key) for key in points[0]}
            if method != BEST:
                rows.append([name.replace('_', ' '), *(show(mean(key), 3) for key in ('kl', *SCORES))])
    start = {key: [float(sft[key].mean()) for _, sft in seeds] for key in SCORES}
    table(['policy', 'KL', 'gold', 'proxy'],
          [['sft', '0.000', *(show(start[key], 3) for key in SCORES)], *rows])
    if BEST in results:
        table(['best of n', 'KL', 'KL, half the answers', 'its bound', 'gold', 'proxy'],
              [[n, *(show(row[key], 3) for key in ('kl', 'kl_half')), f'{bound(int(n)):.3f}',
                *(show(row[key], 3) for key in SCORES)] for n, row in results[BEST].items()])
    return results | dict(sft=dict(sft=dict(kl=[0.0] * len(seeds)) | start))

def print_fits(seeds):
    """Fit both forms to methods of three points or more; return {method: {score: {form: fit}}}.

    Best of 1 is SFT itself, where both forms are 0: it is no point of the fit.
    """
    found, rows = {}, []
    interval = lambda fitted, key: f"{fitted[key]:.3f} ({', '.join(f'{x:.3f}' for x in fitted[key + '_interval'])})"
    for method in seeds[0][0]:
        kl, scores = arrays(seeds, method)
        own = slice(method == BEST, None)
        kl = kl[:, own]
        if kl.shape[1] < 3:
            continue
        found[method] = {}
        for key in SCORES:
            gain = scores[key][:, own] - np.array([sft[key] for _, sft in seeds])[:, None] # (S, J, P)
            fits = found[method][key] = {form: fit_method(kl, gain, form, np.random.default_rng(1)) for form in FORMS}
            for form, fitted in fits.items():
                worst = max(range(kl.shape[1]), key=lambda j: abs(fitted['residuals'][j]))
                rows.append([f"{method}, {'proxy' if key == 'reward' else key}", form, interval(fitted, 'alpha'),
                             interval(fitted, 'beta'), f"{fitted['rms']:.3f}",
                             f"{fitted['residuals'][worst]:+.3f} at KL {kl[:, worst].mean():.2f}",
                             '–' if fitted['spread'] is None else f"{fitted['spread']:.3f}"])
    if rows:
        table(['gain over SFT', 'form', 'α (95 %)', 'β (95 %)', 'residual, RMS', 'the largest of a mean',
               'spread between seeds'], rows)
    return found

def print_equal_kl(seeds, at):
    """Print gold at equal KL, and the first method's lead. Return {label: {column: [of each seed]}}.

    ~ marks what lies below a method's smallest KL in some seed: there the line leads to SFT, and nothing was measured.
    """
    by_method = {method: arrays(seeds, method) for method in seeds[0][0]}
    curves = [method for method, (kl, _) in by_method.items() if kl.shape[1] > 1]
    places = {f'{kl:g}': [kl] * len(seeds) for kl in at}
    for method, (kl, _) in by_method.items():
        if kl.shape[1] == 1:
            places[f"{method}'s, {show(kl[:, 0].tolist())}"] = kl[:, 0].tolist()
    found = {}
    for label, where in places.items():
        row = found[label] = {}
        for method, (kl, scores) in by_method.items():
            y = scores['gold'].mean(2) # (S, J)
            if method in curves:
                row[method] = [at_kl(kl[s], y[s], sft['gold'].mean(), where[s]) for s, (_, sft) in enumerate(seeds)]
            else:
                row[method] = y[:, 0].tolist() if label.startswith(f"{method}'s") else [None] * len(seeds)
        first, *others = by_method
        for other in others:
            pairs = list(zip(row[first], row[other]))
            row[f'{first} − {other}'] = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    least = {method: [min(of_seed[of_seed > 0], default=0) for of_seed in kl] for method, (kl, _) in by_method.items()}
    below = lambda c, where: any(where[s] < least[m][s] for m in c.split(' − ') for s in range(len(seeds)))
    columns, rows = list(next(iter(found.values()))), []
    for label, row in found.items():
        where = places[label]
        cells = {c: show(row[c], 3) for c in columns}
        rows.append([label, *(f'~{cell}' if cell != '–' and below(c, where) else cell for c, cell in cells.items())])
    table(['gold at KL', *columns], rows)
    return found

def draw(seeds, fits, axis, path):
    """Draw gold and proxy against the KL: points, their means, and the fitted form that has the smaller residuals."""
    x_of = np.sqrt if axis == 'sqrt' else np.asarray
    with panels(path, len(SCORES), 4.8, 4) as axes:
        for ax, key in zip(axes, SCORES):
            start = np.mean([sft[key].mean() for _, sft in seeds])
            ax.plot(0, start, 's', color='black', ms=5, label='SFT')
            for method, colour in zip(seeds[0][0], cycle(COLOURS)):
                kl, scores = arrays(seeds, method)
                kl, y = np.maximum(kl, 0), scores[key].mean(2) # (S, J) each
                ax.plot(x_of(kl), y, '.', color=colour, alpha=0.4, ms=4)
                forms = fits.get(method, {}).get(key, {})
                form = min(forms, key=lambda form: forms[form]['rms'], default='')
                ax.plot(x_of(kl.mean(0)), y.mean(0), 'o', color=colour, ms=6,
                        label=f'{method}: {form}' if form else method)
                if form:
                    d = np.linspace(0, np.sqrt(kl.max()), 200)
                    ax.plot(x_of(d ** 2), start + curve(d, forms[form]['alpha'], forms[form]['beta'], form),
                            color=colour, lw=1.3)
                if method == BEST:
                    n = np.array([bound(int(n)) for n in seeds[0][0][BEST]])
                    ax.plot(x_of(n), y.mean(0), 'o', mfc='none', color=colour, ms=6, label='at log n − (n−1)/n')
            ax.set(xlabel='√KL to SFT [√nats per answer]' if axis == 'sqrt' else 'KL to SFT [nats per answer]',
                   ylabel=f'mean {key}', title='optimised: reward model' if key == 'reward' else 'wanted: gold')
            ax.legend(fontsize=7)

def main(cfg):
    seeds = [] # (points, SFT) of each
    for at in cfg.each(methods='rejection,distill'): # which stand on others; no method runs unless it is needed
        demo.run_stages(stages(cfg, at), at)
        seeds.append(read_seed(cfg, at.out_dir))
    results = dict(seeds=numbers(cfg.seeds), points=print_points(seeds), fits=print_fits(seeds),
                   at_equal_kl=print_equal_kl(seeds, list(map(float, cfg.at.split(',')))))
    write_atomic(f'{cfg.out_dir}/results.json', json.dumps(results, indent=1) + '\n')
    draw(seeds, results['fits'], cfg.axis, f'{cfg.out_dir}/frontier.png')

if __name__ == '__main__':
    launch(main, Config)
