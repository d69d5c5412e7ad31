"""Recognise a sick run by its log: the limits lie far outside of what healthy runs show, so that alarms are true."""

import json
import math
from collections import defaultdict, namedtuple
from statistics import fmean, median

last = lambda v, n=3, after=0: median(v[-n:]) if len(v) >= n + after else math.nan # no number is above or below nan
growth = lambda v: last(v, after=3) / (median(v[:3]) or math.nan)
peak = lambda v: max(v[:1] + [median(v[i:i + 3]) for i in range(len(v) - 2)])
noise = lambda v: median([abs(b - a) for a, b in zip(v, v[1:])] or [0.0]) # the usual step from line to line
solved = lambda h: bool(h.options.get('reward')) and 0.9 < last(h.values['reward']) <= 1 # a checker, say
Rule = namedtuple('Rule', 'key see reason remedy sick') # sick(h, v): of a Health and the key's values
RULES = [*map(Rule._make, ( # the table of docs/log.md; python tests/common/test_health.py writes it
    ('first_ratio', 'above 1e-3 in float32, .3 in 16 bits', 'sampling and scoring disagree: temperature, top-k, dropout'
     ' or precision', 'score with what you sampled with; dropout off', lambda h, v: v[-1] > (1e-3 if h.exact else 0.3)),
    ('kl', 'below -3 sqrt(2 `kl_k3` / n), n answers an iteration, again and again', 'the answers were not sampled '
     'from the policy at temperature 1', 'sample at temperature 1 without top-k and top-p', lambda h, v:
     last(v, after=2) < min(-0.02 if h.exact else -0.1, -3 * math.sqrt(2 * max(0, last(h.values['kl_k3'])) / h.n))),
    ('kl', 'above 100 nats an answer, or 3 a token', 'the policy has left the reference', 'lower `lr`, raise `kl_coef`',
     lambda h, v: v[-1] > min(100, 3 * h.line.get('length', 100))),
    ('clipfrac', 'above .4', 'the steps are too large', 'lower `lr`, fewer `epochs`', lambda h, v: v[-1] > 0.4),
    ('approx_kl', 'above .5', 'the steps are too large', 'lower `lr`, or `early_stop_kl`', lambda h, v: v[-1] > 0.5),
    ('ended', 'below .5, so few answers end', '`max_new_tokens` is too small, the SFT model never learnt the end of '
     'text, or `kl` is large', 'raise it; see the SFT masks with `python -m data.peek`', lambda h, v: last(v) < 0.5),
    ('length', 'drifts to twice or half its start', 'the reward model likes long answers, or short ones', 'compare '
     '`val_shorter_wins`, raise `kl_coef`', lambda h, v: growth(v) > 2 or growth(v) < 0.5),
    ('explained_variance', 'at most 0 after ten iterations, thirty if shared', 'the critic predicts nothing', 'raise '
     '`critic_lr` or `value_coef`', lambda h, v: last(v, 5, after=30 if h.options['critic'] == 'shared' else 10) <= 0),
    ('entropy', 'collapses to a twentieth of its start', 'the policy gives nearly always the same answer',
     'lower `lr`, raise `kl_coef` or `entropy_coef`', lambda h, v: growth(v) < 0.05 and not solved(h)),
    ('group_std', 'near 0 (RLOO, GRPO)', 'all answers to a prompt score alike; nothing is left to compare', 'raise '
     '`n_answers`, or stop here', lambda h, v: last(v) < 0.05 and h.options['kind'] != 'reinforce' and not solved(h)),
    ('gold', 'falls while `reward` is up', 'over-optimisation', 'raise `kl_coef`, stop earlier, label these answers',
     lambda h, v: peak(v) - last(v) > max(7 * noise(v), 0.1 * peak(v)) and h.line['reward'] > h.values['reward'][0]),
    ('grad_norm', 'grows tenfold, or is always 0', 'training diverges; 0: no gradient arrives', 'lower `lr`, longer '
     '`warmup_steps`', lambda h, v: last(v, 5, after=10) > 10 * median([x for x in v[:100][:-5] if x] or [-1])),
    ('loss', 'stays at 0.693 (DPO, reward model)', 'the learning rate is too small, or chosen and rejected are alike',
     'raise `lr`; look at the data', lambda h, v: h.late and h.pairs and abs(last(v, 5) - math.log(2)) < 0.01),
    ('loss', 'above its start (DPO, IPO, hinge)', 'the policy is sure of itself where it is wrong',
     'lower `lr`', lambda h, v: last(v) > 1.1 * h.start),
    ('margin', 'explodes: above 10, DPO and hinge 100 `beta`', 'the policy goes too far', 'lower `lr`, raise `beta`',
     lambda h, v: last(v) > (100 * h.options['beta'] if h.options.get('loss') in ('dpo', 'hinge') else 10)),
    ('accuracy', 'near one half late in the run', 'nothing is learnt from the pairs', 'raise `lr`; look at the data',
     lambda h, v: h.late and (n := h.n * len(w := v[len(v) // 2:])) >= 200 and fmean(w) < 0.5 + 0.5 / math.sqrt(n)),
    ('val_accuracy', 'not above `val_shorter_wins`, or 1 less it', 'it knows length at best', 'more data, `lm_coef`',
     lambda h, v: h.late and h.line.get('val_pairs', 0) > 99 and v[-1] - 0.5 <= abs(h.line['val_shorter_wins'] - 0.5)),
    ('val_loss', 'rises, a twentieth above its least', 'overfitting', 'fewer `epochs`, more data',
     lambda h, v: len(v) > 2 and v[-1] > 1.05 * min(v))))]

class Health:
    """Remember a run's log and judge its lines; options: {name: value}; began: the step that it resumes from."""

    def __init__(self, options, dtype, began=0):
        self.options, self.exact, self.began, self.read = options, dtype == 'float32', began, 0 # read: bytes of the log
        self.n, self.values, self.said = options['batch_size'] * options.get('minibatches', 1), defaultdict(list), {}
        loss, start = options.get('loss'), dict(dpo=math.log(2), hinge=1.0, ipo=0.25 / options.get('beta', 1.0) ** 2)
        self.start, self.pairs = start.get(loss, math.nan), options.get('lm_coef', loss) in (0, 'dpo') # starts at ln 2

    def tell(self, path, write, done):
        """Write what is newly sick in the log, a line each; when the run is done, all of it."""
        with open(path, encoding='utf-8') as f:
            f.seek(self.read)
            lines, self.read = f.readlines(), f.tell()
        for self.line in map(json.loads, lines):
            self.late = 2 * self.line['step'] >= self.options['max_steps']
            for key, value in self.line.items():
                self.values[key].append(value)
            for rule in RULES:
                if rule.key in self.line and rule not in self.said and rule.sick(self, self.values[rule.key]):
                    self.said[rule] = f"step {self.line['step']}: {rule.key} {self.line[rule.key]:.4g}, {rule.see}"
                    if self.line['step'] > self.began: # else an earlier process has said so
                        write(f"health: {self.said[rule]}: {rule.reason}; try: {rule.remedy}".replace('`', ''))
        if done and self.said:
            write(f"health: see docs/log.md; {'; '.join(self.said.values())}".replace('`', ''))
