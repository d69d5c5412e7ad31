"""lab/plan.py: seconds, bytes and people by hand, and the tables of docs/scaling.md.

    python tests/lab/test_plan.py      # write the tables anew
"""
import os
import re
import sys

if __name__ == '__main__':
    sys.path[:0] = [os.path.abspath(os.path.join(os.path.dirname(__file__), *up)) for up in (['..'], ['..', '..'])]

import numpy as np
import pytest

from feedback.agreement import kappa
from lab import plan
from lab.plan import Config, campaign, pairs_for, parts_of_step, standard_error
from tiny import ROOT, by_hand, run, stops

PAGE = os.path.join(ROOT, 'docs', 'scaling.md')

# ---------------------------------------------------------------------------------------------------------------------
# GPUs

# SFT of GPT-2 small: 32 rows of 125 + 47 - 1 = 171 tokens, 32 * 47 = 1504 are predicted. All but 9 C^2 of 12 layers'
# 12 C^2 on all 5472 tokens; C^2 = 589824; V C = 38597376; attention 4 * 12 * 32 * 171^2 * 768
PRODUCTS = 2 * (5472 * 135 * 589824 + 1504 * (9 * 589824 + 38597376))
ATTENTION = 4 * 12 * 32 * 171**2 * 768

def test_a_step_of_sft_by_hand():
    passes = (3 * PRODUCTS + 3.5 * ATTENTION) / (0.4 * 989e12)
    adam = 28 * 124439808 / (0.6 * 3.35e12)
    # the kernels of 4 micro-batches through 12 layers, forward and twice that backwards, take longer: 144 times 100 us
    assert parts_of_step(Config(), '124M', 'sft') == by_hand(dict(sampling=0, passes=0.0144, adam=adam, link=0))
    assert passes < 0.0144
    found = parts_of_step(Config(overhead=10), '124M', 'sft')
    assert found == by_hand(dict(sampling=0, passes=passes, adam=adam, link=0))
    # eight GPUs: one micro-batch of 4 rows each, 36 layers; a ring sends 7/8 of 4 bytes a parameter twice
    found = parts_of_step(Config(), '124M', 'sft', 8)
    assert found == by_hand(dict(sampling=0, passes=0.0036, adam=adam, link=1.75 * 4 * 124439808 / (0.6 * 450e9)))

def test_checkpointing_computes_again():
    """Its blocks alone: the config of 1.5B asks for it, that of 124M does not."""
    assert plan.settings('1.5B', 'sft').checkpointing and not plan.settings('124M', 'sft').checkpointing
    c = plan.memory.config_of('1.5B')
    blocks = 2 * (5472 * (12 * 48 - 9) * 1600**2 + 1504 * 9 * 1600**2)
    products, attention = blocks + 2 * 1504 * 50257 * 1600, 4 * 48 * 32 * 171**2 * 1600
    assert c.n_layer == 48 and parts_of_step(Config(), '1.5B', 'sft')['passes'] == by_hand(
        (3 * products + 3.5 * attention + blocks + attention) / (0.4 * 989e12))

def test_sampling_waits_for_kernels_or_memory():
    """128 tokens through 12 layers; or 128 times 2 bytes a parameter, and the cache of 64 rows of 125 + 64 tokens."""
    assert parts_of_step(Config(), '124M', 'ppo')['sampling'] == by_hand(128 * 12 * 1e-4)
    cache = 2 * 12 * 64 * 189 * 768 * 2
    found = parts_of_step(Config(overhead=1), '124M', 'ppo')['sampling']
    assert found > 128 * (2 * 124439808 + cache) / (0.6 * 3.35e12) # and the arithmetic
    assert found == pytest.approx(128 * (2 * 124439808 + cache) / (0.6 * 3.35e12), rel=0.1)

def test_what_ppo_sends():
    """Four epochs of two models, of which the critic has a head of 769 numbers and no other."""
    b = plan.batch(Config(), '124M', 'ppo', 8)
    assert (b.B, b.K, b.A, b.epochs) == (8, 1, 128, 4)
    assert plan.sent_bytes('ppo', b, 8) == by_hand(4 * 1.75 * 4 * (2 * 124439808 + 769))
    assert (plan.batch(Config(), '124M', 'rloo', 8).B, plan.batch(Config(), '124M', 'rloo').K) == (2, 4)

def test_steps():
    """43835 + 22007 + 52421 + 42537 pairs, 32 a step."""
    cfg = Config()
    assert cfg.pairs == 160800
    assert [plan.n_steps(cfg, '124M', stage) for stage in ('sft', 'reward', 'dpo', 'ppo')] == [5025] * 3 + [500]
    header, rows = plan.time_table(cfg)
    assert len(rows) == 4 * 7 and all(len(row) == len(header) for row in rows)
    row = rows[0] # 5025 steps of 14.4 + 1.7 ms
    assert row[:3] == ['124M', 'sft', '5025'] and row[4] == '16' and row[6] == '0.02'
    assert row[3] == f'{5025 * (3 * PRODUCTS + 3.5 * ATTENTION) / 1e15:.0f}' == '16'

def test_memory_is_what_the_config_files_say():
    """Their comments give the GiB of micro-batches of 8 or 4 rows, the latter with checkpointing."""
    header, rows = plan.memory_table(Config())
    found = {(row[0], row[1]): row for row in rows}
    for size, folder, column in (('124M', 'gpt2_hh', 'as it is'), ('1.5B', 'gpt2xl_hh', 'checkpointing')):
        for stage in ('sft', 'reward', 'dpo', 'ppo'):
            with open(os.path.join(ROOT, 'config', folder, f'{stage}.py')) as f:
                said = re.search(r'about ([\d.]+) GiB', f.read())[1]
            assert found[size, stage][header.index(column)] == said, (size, stage)
    assert found['1.5B', 'ppo'][7:] == ['checkpointing', 'sharded'] # 66.1 of 72 GiB; LoRA 28.8 of 21.6
    assert plan.sharded_bytes(dict(weights=80, optimizer=160, gradients=80, activations=7, kv_cache=16), 8) == 49

# ---------------------------------------------------------------------------------------------------------------------
# people

def test_the_campaign_by_hand():
    """110000 verdicts of a minute; 13 raters of 160 - 10 hours; each is one of two in 20000 / 13 pairs."""
    found = campaign(Config())
    assert found == by_hand(dict(twice=10000, verdicts=110000, hours=110000 / 60, raters=13, training=130,
                                 person_hours=110000 / 60 + 130, each=20000 / 13))
    assert campaign(Config(labels=10, seconds=1))['raters'] == 2 # or nobody could see a pair for the second time

def test_standard_errors_by_hand():
    assert standard_error(0.8, 100) == by_hand(0.04) and standard_error(0.8, 100, 0.5) == by_hand(0.08)
    assert pairs_for(0.5, 0.1) == 97 # 0.25 * 19.6^2 = 96.04
    assert pairs_for(0.8, 0.0784) == 100 # 1.96 * 0.04

def test_the_error_of_kappa_is_that_of_raters():
    """300 pairs, raters who agree on 73 %, two outcomes: kappa of feedback/agreement.py in 300 campaigns."""
    rng, found = np.random.default_rng(1), []
    for _ in range(300):
        same = rng.random(300) < 0.73
        found.append(kappa([[0, 1]] * 300, [[0, 1] if x else [1, 0] for x in same])[0])
    assert np.mean(found) == pytest.approx(0.46, abs=0.01)
    assert np.std(found) == pytest.approx(standard_error(0.73, 300, 0.5), rel=0.1)

def test_a_ranking_of_four_by_hand():
    """6 pairs from 5 comparisons, since 2^4 < 4! = 24 <= 2^5. 100 pairs: 17 prompts, 85 minutes."""
    header, rows = plan.ranking_table(Config(labels=100, ranked=3))
    assert [row[0] for row in rows] == ['2', '3', '4', '6', '9']
    assert rows[2] == ['4', '6', '5', '1.20', '17', '85', '1', '51']
    assert rows[1][:4] == ['3', '3', '3', '1.00'] and rows[4][:3] == ['9', '36', '19'] # 2^18 < 9! = 362880 <= 2^19

def test_overlap_by_hand():
    """.73 * .27 * (1.96 / .1)^2 = 75.7; of each of 13 raters 76 pairs, each of which is of two."""
    header, rows = plan.overlap_table(Config())
    assert rows[3] == ['± 0.1', '± 0.2', '76 (0.1%)', '1', '494 (0.5%)', '8']

# ---------------------------------------------------------------------------------------------------------------------
# the page

def with_tables(page):
    """Return the page with the tables of today's formulas behind their marks."""
    for name, table in plan.TABLES.items():
        mark = f'<!-- {name} -->\n'
        assert page.count(mark) == 1, name
        before, after = page.split(mark)
        page = before + mark + plan.markdown(*table(Config())) + '\n' + re.sub(r'\A(?:\|.*\n)*', '', after)
    return page

def test_the_page_has_the_tables():
    with open(PAGE, encoding='utf-8') as f:
        page = f.read()
    assert with_tables(page) == page, 'run python tests/lab/test_plan.py'

def test_what_is_printed(capsys):
    run(plan)
    said = capsys.readouterr().out
    assert all(f'<!-- {name} -->\n| ' in said for name in plan.TABLES)

@pytest.mark.parametrize('options, line', [
    (dict(mfu=0), 'mfu must be above 0 and at most 1, got 0.0'), (dict(overlap=1.5), 'overlap must be above 0'),
    (dict(gpus=3), 'gpus must be 2, 4, 8 or 16, got 3'), (dict(agreement=0.5), 'agreement must be above chance'),
    (dict(chance=1.0), 'above chance'), (dict(seconds=0), 'seconds must be above 0'), (dict(labels=0), 'at least 1'),
    (dict(ranked=1), 'ranked must be at least 2'), (dict(training=-1), 'training must be at least 0')])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, plan, **options)

if __name__ == '__main__':
    with open(PAGE, encoding='utf-8') as f:
        page = f.read()
    with open(PAGE, 'w', encoding='utf-8') as f:
        f.write(with_tables(page))
