"""Plan on paper: what GPT-2 124M to 1.5B on HH-RLHF and a labelling campaign would take.

    python -m lab.plan
    python -m lab.plan --tflops=312 --hbm=2.04 --link=300
    python -m lab.plan --labels=20000 --seconds=90 --overlap=0.2 --ranked=4

It prints the tables of docs/scaling.md in Markdown, worked out from the formulas of lab/scaling.py and lab/memory.py,
the config files, and the options below. The defaults for the GPU are an H100 SXM's data sheet and guesses of how much
of it is reached: nothing was run on one. The defaults for raters are guesses too.
"""

import math
import os
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT) # as with `python lab/NAME.py`

import dpo
import ppo
import reward
import sft
from common.options import launch, parse_config, require
from data.hh_rlhf.prepare import KNOWN
from lab import memory
from lab.scaling import SAMPLED, Batch, Rates, all_flop, optimizer_bytes, sampling_seconds, update_seconds
from lab.tables import markdown

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo, rloo=ppo) # rloo: the settings of ppo, but for epochs and K
FOLDERS = {'124M': 'gpt2_hh', '355M': 'gpt2_hh', '774M': 'gpt2xl_hh', '1.5B': 'gpt2xl_hh'} # of config/
NAMES = dict(sft='sft', reward='reward', dpo='dpo, rrhf', ppo='ppo', rloo='reinforce') # in memory.stages
TWO_CARDS = 80, 24 # GB

@dataclass
class Config:
    # a GPU, and what of it is reached
    tflops: float = 989.0 # bfloat16 products, dense, 10^12 operations a second
    hbm: float = 3.35 # bandwidth of its memory, TB/s
    link: float = 450.0 # what it sends to others, GB/s
    mfu: float = 0.4 # share of the products
    reach: float = 0.6 # share of both bandwidths
    overhead: float = 100.0 # microseconds in which a layer's kernels are launched
    gpus: int = 8

    pairs: int = sum(n for name, n in KNOWN.items() if 'train' in name) # of HH-RLHF
    prompt: int = 125 # tokens: mean of 1958 pairs of its harmless-base part
    answer: int = 47 # the same; ppo and rloo are given max_new_tokens

    labels: int = 100_000 # pairs that are to be labelled
    seconds: float = 60.0 # for a pair; set it to the median `seconds` of a pilot's records
    overlap: float = 0.1 # share of the pairs that a second rater sees too
    agreement: float = 0.73 # share of the pairs on which two raters agree; InstructGPT: 72.6 % and 77.3 %
    chance: float = 0.5 # what they would agree on by chance: two outcomes
    weeks: float = 8.0
    hours: float = 20.0 # of a rater, in a week
    training: float = 10.0 # hours of training for each rater
    ranked: int = 4 # K: answers to a prompt, where they are ranked instead

    def __post_init__(self):
        above = 'tflops', 'hbm', 'link', 'overhead', 'seconds', 'weeks', 'hours'
        require(self, **{key: (0 < getattr(self, key) < math.inf, 'above 0') for key in above},
                **{key: (0 < getattr(self, key) <= 1, 'above 0 and at most 1') for key in ('mfu', 'reach', 'overlap')},
                **{key: (getattr(self, key) >= 1, 'at least 1') for key in ('pairs', 'prompt', 'answer', 'labels')},
                gpus=(self.gpus in (2, 4, 8, 16), '2, 4, 8 or 16'), # each gets whole prompts of a batch
                agreement=(self.chance < self.agreement < 1, 'above chance and below 1'),
                chance=(0 <= self.chance < 1, 'at least 0 and below 1'), ranked=(self.ranked >= 2, 'at least 2'),
                training=(0 <= self.training < self.weeks * self.hours, 'at least 0 and below weeks x hours'))
        require(self, overlap=(self.overlap * self.labels >= 1, 'at least one of the pairs'))

# ---- GPUs -------------------------------------------------------------------------------------------------------

def settings(size, stage):
    """Return a stage's options, from its config file."""
    name = 'ppo' if stage == 'rloo' else stage
    return parse_config(SCRIPTS[stage].Config, [os.path.join(ROOT, 'config', FOLDERS[size], f'{name}.py')])

def batch(cfg, size, stage, gpus=1):
    """Return the Batch of one GPU in a step: an equal share of the prompts."""
    options, K = settings(size, stage), dict(sft=1, ppo=1, rloo=4).get(stage, 2)
    answer, prompts = cfg.answer, options.batch_size // gpus
    if stage in SAMPLED:
        answer, prompts = options.max_new_tokens, prompts // K
    return Batch(memory.config_of(size), prompts, cfg.prompt, answer, K, options.epochs if stage == 'ppo' else 1)

def sent_bytes(stage, b, gpus):
    """Return the bytes that each GPU sends in a step: a ring's 2 (n - 1) / n times the float32 gradients."""
    return 2 * (gpus - 1) / gpus * optimizer_bytes(stage, b) / 7 # AdamW moves 7 numbers for each gradient

def parts_of_step(cfg, size, stage, gpus=1):
    """Return the seconds of a step: sampling, passes, AdamW and gradients on the link."""
    options, b = settings(size, stage), batch(cfg, size, stage, gpus)
    rates = Rates(1e12 * cfg.tflops, 1e12 * cfg.hbm * cfg.reach, cfg.mfu, 1.0, 1e-6 * cfg.overhead, ahead=True)
    adam = optimizer_bytes(stage, b) / rates.copy
    both = update_seconds(stage, b, rates, max(1, options.grad_accum // gpus), options.checkpointing)
    return dict(sampling=sampling_seconds(b, rates, 'bfloat16') if stage in SAMPLED else 0.0, passes=both - adam,
                adam=adam, link=sent_bytes(stage, b, gpus) / (1e9 * cfg.link * cfg.reach))

def n_steps(cfg, size, stage):
    options = settings(size, stage)
    return options.max_steps or options.epochs * math.ceil(cfg.pairs / options.batch_size)

def time_table(cfg):
    """Return the time table's header and rows: of each size and stage on one GPU and on several."""
    rows = []
    for size in FOLDERS:
        hours = {}
        for stage in SCRIPTS:
            steps, b = n_steps(cfg, size, stage), batch(cfg, size, stage)
            work = all_flop(stage, b, settings(size, stage).checkpointing)
            one, many = (sum(parts_of_step(cfg, size, stage, n).values()) for n in (1, cfg.gpus))
            hours[stage] = [steps * seconds / 3600 for seconds in (one, many)]
            rows.append([size, stage, f'{steps}', f'{work * steps / 1e15:.0f}', f'{1e3 * one:.0f}', f'{1e3 * many:.0f}',
                         *(f'{h:.2f}' for h in hours[stage]), f'{cfg.gpus * hours[stage][1]:.2f}',
                         f'{one / many:.1f}'])
        for path in (('sft', 'reward', 'ppo'), ('sft', 'dpo')):
            one, many = (sum(hours[stage][i] for stage in path) for i in (0, 1))
            rows.append([size, '**' + ' + '.join(path) + '**', '', '', '', '', f'{one:.2f}', f'{many:.2f}',
                         f'{cfg.gpus * many:.2f}', f'{one / many:.1f}'])
    n = cfg.gpus
    return ['model', 'stage', 'steps', '10^15 FLOP', 'ms a step, 1 GPU', f'ms a step, {n} GPUs', 'hours, 1 GPU',
            f'hours, {n} GPUs', f'GPU-hours, {n} GPUs', 'times as fast'], rows

def step_table(cfg):
    """Return header and rows: where the milliseconds of a step go."""
    rows = []
    for size in FOLDERS:
        for stage in ('sft', 'ppo'):
            for gpus in (1, cfg.gpus):
                sent = sent_bytes(stage, batch(cfg, size, stage, gpus), gpus)
                parts = parts_of_step(cfg, size, stage, gpus).values()
                rows.append([size, stage, str(gpus), *(f'{1e3 * x:.0f}' for x in parts), f'{sent / 1e9:.1f}'])
    return ['model', 'stage', 'GPUs', 'sampling, ms', 'passes, ms', 'AdamW, ms', 'link, ms', 'GB sent'], rows

def memory_table(cfg):
    """Return header and rows: the GiB of a stage in four ways, and what each card asks for."""
    rows = []
    for size in FOLDERS:
        for stage, name in NAMES.items():
            options = settings(size, stage)
            micro = options.batch_size // options.grad_accum
            fixed = memory.stages(memory.config_of(size), 1024)[name] | dict(rows=micro, T=1024, dtype='bfloat16')
            plain = memory.needs(**fixed)
            ways = {'as it is': plain, 'checkpointing': memory.needs(**fixed, checkpointing=True)}
            sharded = ways['checkpointing'] | dict(total=sharded_bytes(ways['checkpointing'], cfg.gpus))
            ways |= {'LoRA': memory.needs(**fixed, checkpointing=True, lora=(8, 'all')), 'sharded': sharded}
            totals = {way: need['total'] / memory.GiB for way, need in ways.items()}
            fits = lambda card: next((way for way, GiB in totals.items() if GiB <= 0.9 * card), '–')
            rows.append([size, stage, str(micro), *(f'{GiB:.1f}' for GiB in totals.values()), *map(fits, TWO_CARDS)])
    return ['model', 'stage', 'rows', 'as it is', 'checkpointing', 'LoRA', f'sharded over {cfg.gpus}',
            *(f'{card} GB wants' for card in TWO_CARDS)], rows

def sharded_bytes(need, gpus):
    """Return the bytes of one of several GPUs.

    Weights, gradients, AdamW's averages and the cache are spread over all.
    """
    state = need['weights'] + need['optimizer'] + need['gradients']
    return state / gpus + need['activations'] + need['kv_cache'] / gpus

RULES = dict(sft=('6 N', lambda e: 6), reward=('6 N', lambda e: 6), dpo=('2 N + 6 N', lambda e: 8),
             ppo=('2 N + 3 · 2 N + 2 e · 6 N', lambda e: 8 + 12 * e), rloo=('2 N + 2 · 2 N + 6 N', lambda e: 12))

def flop_table(cfg):
    """Return header and rows: the rule of thumb, and what is really computed, a token."""
    rows = []
    for stage, (text, of_epochs) in RULES.items():
        row = [stage, text]
        for size in ('124M', '1.5B'):
            b = batch(cfg, size, stage)
            rule = of_epochs(b.epochs) * memory.n_parameters(b.c)
            counted = all_flop(stage, b) / b.tokens
            row += [f'{rule / 1e9:.1f}', f'{counted / 1e9:.1f}', f'{counted / rule:.2f}']
        rows.append(row)
    return ['GFLOP a token', 'rule', *(f'{size}, {what}' for size in ('124M', '1.5B')
                                       for what in ('rule', 'counted', 'ratio'))], rows

# ---- people -----------------------------------------------------------------------------------------------------

def standard_error(agreement, n, chance=0.0):
    """Return the standard error of a share of agreement; with `chance`, of kappa.

        SE(p) = sqrt(p (1 - p) / n)        SE(kappa) = SE(p) / (1 - p_e)

    n: pairs that two raters saw, taken as independent. p_e is taken as known (Cohen 1960).
    """
    return math.sqrt(agreement * (1 - agreement) / n) / (1 - chance)

def pairs_for(agreement, width):
    """Return how many pairs two raters must see; width: half of the 95 % interval of agreement."""
    return math.ceil(agreement * (1 - agreement) * (1.96 / width) ** 2 - 1e-9)

def campaign(cfg):
    """Return {quantity: number} of the campaign."""
    twice = round(cfg.labels * cfg.overlap)
    hours = (cfg.labels + twice) * cfg.seconds / 3600
    raters = max(2, math.ceil(hours / (cfg.weeks * cfg.hours - cfg.training)))
    return dict(twice=twice, verdicts=cfg.labels + twice, hours=hours, raters=raters,
                training=raters * cfg.training, person_hours=hours + raters * cfg.training,
                each=2 * twice / raters) # each pair seen twice belongs to two raters

def campaign_table(cfg):
    plan = campaign(cfg)
    kappa = (cfg.agreement - cfg.chance) / (1 - cfg.chance)
    half = lambda n, chance=0.0: f'± {1.96 * standard_error(cfg.agreement, n, chance):.3f}'
    return ['of the campaign', 'number'], [
        ['pairs', f'{cfg.labels}'], ['of them seen by two raters', f"{plan['twice']} ({cfg.overlap:.0%})"],
        ['verdicts', f"{plan['verdicts']}"], [f'hours, at {cfg.seconds:g} s a pair', f"{plan['hours']:.0f}"],
        [f'raters, in {cfg.weeks:g} weeks of {cfg.hours:g} hours', f"{plan['raters']}"],
        [f'hours of training, {cfg.training:g} each', f"{plan['training']:.0f}"],
        ['**person-hours in all**', f"**{plan['person_hours']:.0f}**"],
        [f'agreement, if it is {cfg.agreement:g}: 95 % interval', half(plan['twice'])],
        [f'kappa, then {kappa:.2f}: 95 % interval', half(plan['twice'], cfg.chance)],
        ["one rater's agreement with the others: 95 % interval",
         f"{half(plan['each'])}, from {plan['each']:.0f} pairs"]]

def overlap_table(cfg):
    """Return header and rows: pairs to be seen twice for an interval, of all raters or of each."""
    raters, rows = campaign(cfg)['raters'], []
    for width in (0.01, 0.02, 0.05, 0.1):
        n = pairs_for(cfg.agreement, width)
        each = math.ceil(n * raters / 2)
        hours = lambda pairs: f'{pairs * cfg.seconds / 3600:.0f}'
        share = lambda pairs: f'{pairs} ({pairs / cfg.labels:.1%})'
        rows.append([f'± {width:g}', f'± {width / (1 - cfg.chance):g}', share(n), hours(n), share(each), hours(each)])
    return ['agreement', 'kappa', 'pairs seen twice', 'hours', f'for each of {raters} raters', 'hours'], rows

def ranking_table(cfg):
    """Return header and rows: how many pairs a ranking of K gives, and how many comparisons it takes."""
    rows = []
    for K in sorted({2, 4, 6, 9, cfg.ranked}):
        pairs, least = K * (K - 1) // 2, math.ceil(math.log2(math.factorial(K)) - 1e-9)
        prompts = math.ceil(cfg.labels / pairs)
        rows.append([str(K), str(pairs), str(least), f'{pairs / least:.2f}', str(prompts), str(prompts * least),
                     f'{prompts * least * cfg.seconds / 3600:.0f}', str(prompts * (K - 1))])
    return ['K', 'pairs, K (K − 1) / 2', 'comparisons, log2 K!', 'pairs for one', f'prompts for {cfg.labels} pairs',
            'comparisons', 'hours', 'independent pairs, K − 1 each'], rows

TABLES = dict(flop=flop_table, time=time_table, step=step_table, memory=memory_table, campaign=campaign_table,
              overlap=overlap_table, ranking=ranking_table)

def main(cfg):
    for name, table in TABLES.items():
        print(f'\n<!-- {name} -->\n{markdown(*table(cfg))}')

if __name__ == '__main__':
    launch(main, Config)
