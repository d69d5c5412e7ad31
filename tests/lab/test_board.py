"""lab/board.py and lab/wins.py: strengths by hand, eight policies and a simulated rater, ratings, errors."""
import json
import math
import os
import random
import re
import subprocess
import sys
from xml.dom.minidom import parseString

import pytest
import torch

from common.options import parse_config
from lab import board, wins
from feedback.agreement import merge
from tiny import ROOT, by_hand, exits, records

def elo(*rows):
    return wins.strengths(torch.tensor(rows, dtype=torch.float64)).tolist()

def ranking(prompt, ranks, texts=None, **more):
    """Return a ranking; ranks: {policy: rank}. Each policy's answer is its name, if not in texts."""
    return dict(prompt=prompt, responses=texts or list(ranks), ranks=list(ranks.values()), policies=list(ranks)) | more

def measured(tmp_path, rows, **options):
    """Return board.json; rows: records, or several lists of them, a file each."""
    files = [records(tmp_path / f'{i}.jsonl', each) for i, each in enumerate(rows if type(rows[0]) is list else [rows])]
    board.main(board.Config(out_dir=str(tmp_path / 'out'), **dict(bootstrap=100) | options), files)
    return json.loads((tmp_path / 'out' / 'board.json').read_text())

# ---- strengths --------------------------------------------------------------------------------------------------

def test_strengths_by_hand():
    """Two policies, 3 wins to 1: 400 log10 3 = 190.848502 apart. So many games that the added ones do not count."""
    assert elo([0, 3e9], [1e9, 0]) == pytest.approx([1095.424251, 904.575749], abs=1e-4)
    assert elo([0, 5], [5, 0]) == by_hand([1000, 1000])

def test_the_added_games_by_hand():
    """
    The winner of n games has theta, the loser -theta. Both slopes vanish where, with x = e^theta,

        n (1 - sigmoid(2 theta)) + 1/2 - sigmoid(theta) = n / (1 + x^2) + 1/2 - x / (1 + x) = 0

    n = 2.5 gives x = 3: 2.5 / 10 + 1/2 - 3/4 = 0. The two are 2 * 400 log10 3 apart.
    """
    assert elo([0, 2.5], [0, 0]) == by_hand([1000 + 190.848502, 1000 - 190.848502])
    assert all(map(math.isfinite, elo([0, 1e6, 1e6], [0, 0, 1e6], [0, 0, 0])))

def test_strengths_are_recovered_from_expected_counts():
    """Odds of strength 6 : 3 : 1. A beats B in 6/9, A beats C in 6/7, B beats C in 3/4 of their games.

    log10 of 6, 3, 1: 0.778151, 0.477121, 0; their mean is 0.418424.
    """
    n = 1e9 # of some pairs there are more
    wins_of = [[0, 6 / 9 * n, 6 / 7 * n], [3 / 9 * n, 0, 3 / 4 * 5 * n], [1 / 7 * n, 1 / 4 * 5 * n, 0]]
    expected = [1000 + 400 * (x - 0.418424) for x in (0.778151, 0.477121, 0)]
    assert elo(*wins_of) == pytest.approx(expected, abs=1e-3)
    first, second = elo(wins_of, [[0] * 3] * 3) # two tables at once; one without games
    assert first == pytest.approx(expected, abs=1e-3) and second == [1000] * 3

def test_what_was_said_of_a_prompt_is_drawn_together():
    drawn = wins.resample(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), 500, 1)
    assert drawn.shape == (500, 2) and torch.equal(drawn[:, 1], 10 * drawn[:, 0])
    # sums of three draws; the mean of one draw is 7/3, its variance (1 + 4 + 16)/3 - 49/9 = 14/9
    assert drawn[:, 0].mean().item() == pytest.approx(7, abs=0.4)
    assert drawn[:, 0].var().item() == pytest.approx(14 / 3, rel=0.3)
    assert torch.equal(drawn, wins.resample(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), 500, 1))
    assert wins.interval(torch.tensor([*range(41), float('nan')])) == by_hand([1, 39]) # of 0 to 40

def test_two_policies_that_wrote_the_same_texts(tmp_path):
    """A wrote x and B wrote y, then the other way round; x wins both times, for each once. A repeated row is none."""
    rows = [dict(prompt='p', responses=['x', 'y'], ranks=[0, 1], policies=policies)
            for policies in (['A', 'B'], ['B', 'A'], ['A', 'B'])]
    rows.append(dict(prompt='p', responses=['y', 'x'], ranks=[1, 0], policies=['B', 'A'])) # the first, turned round
    table = measured(tmp_path, rows, baseline='A')['tables']['all']
    assert [(row['comparisons'], row['win_rate']) for row in (table['A'], table['B'])] == [(2, 0.5)] * 2

# ---- votes ------------------------------------------------------------------------------------------------------

def test_votes_and_what_is_left_out():
    """A and B wrote the same text, and A wrote twice: of six pairs four are votes."""
    row = dict(prompt='p', responses=['xx', 'y', 'xx', 'zzz'], ranks=[0, 1, 0, 1], policies=['A', 'A', 'B', 'C'])
    votes, left_out = wins.votes_of([row], 'f')
    told = {(v.policy, v.other, v.win, v.length, v.other_length) for v in votes}
    assert told == {('A', 'C', 1, 2, 3), ('C', 'A', 0, 3, 2), ('A', 'C', 0.5, 1, 3), ('C', 'A', 0.5, 3, 1),
                    ('A', 'B', 0, 1, 2), ('B', 'A', 1, 2, 1), ('B', 'C', 1, 2, 3), ('C', 'B', 0, 3, 2)}
    assert len(votes) == 8 and left_out == {'by one policy': 1, 'of equal answers': 1}

def test_the_same_text_cut_off_is_another_answer():
    votes, left_out = wins.votes_of([ranking('p', dict(A=0, B=1), ['x', 'x'], ended=[True, False])], 'f')
    assert len(votes) == 2 and not left_out

def test_the_table_by_hand(tmp_path, capsys):
    """Two prompts: sft beats base and ties with ppo, ppo beats base; then ppo beats sft alone."""
    found = measured(tmp_path, [ranking('p', dict(ppo=0, sft=0, base=1), ['pp', 'sfts', 'b']),
                                ranking('q', dict(ppo=0, sft=1), ['pppp', 's'])])
    table = found['tables']['all']
    assert list(table) == ['ppo', 'sft', 'base'] and found['remarks'][0] == 'baseline: sft'
    numbers = {name: [row[key] for key in ('comparisons', 'win_rate', 'wins_vs_baseline', 'characters')]
               for name, row in table.items()}
    assert numbers == dict(ppo=[3, by_hand(2.5 / 3), 0.75, by_hand(8 / 3)], sft=[3, 0.5, None, 3.0], base=[2, 0, 0, 1])
    assert table['base']['at_equal_length'] == 0 and table['sft']['at_equal_length'] is None
    # Wilson's interval of p = 0 and the one prompt: 0 and z^2 / (1 + z^2) = 3.841459 / 4.841459
    assert table['base']['win_rate_interval'] == by_hand([0, 0.793450])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index('all')
    header = 'policy comparisons win rate elo wins vs baseline at equal length characters'
    assert lines[at + 1].split() == header.split()
    assert re.match(r'ppo  +3  0\.83 \(0\.\d\d–\d\.\d\d\)  +1\d\d\d \(\d+–\d+\)  +0\.75  +', lines[at + 2])
    assert re.search(r'–  +–  +3$', lines[at + 3]) and len({len(line) for line in lines[at + 1:at + 5]}) == 1
    assert ('Every policy is given half a win and half a loss more, against an average one, so that no Elo is infinite'
            '; their mean is 1000') in lines
    assert 'base lost everything: only that half keeps its Elo finite' in lines

def drawn(table):
    """Return the figure's texts, its circles' x, and its paths, [(d, stroke-dasharray or '')]."""
    figure = parseString(board.draw(table))
    return ([node.firstChild.data for node in figure.getElementsByTagName('text')],
            [float(node.getAttribute('cx')) for node in figure.getElementsByTagName('circle')],
            [(node.getAttribute('d'), node.getAttribute('stroke-dasharray'))
             for node in figure.getElementsByTagName('path')])

def test_the_figure(tmp_path):
    """A bar and a point for each policy, the strongest on top; a name is text, not markup."""
    found = measured(tmp_path, [ranking('p', {'a<b>&': 0, 'sft': 1}), ranking('q', {'a<b>&': 0, 'sft': 1})])
    texts, points, paths = drawn(found['tables']['all'])
    assert texts[-4] == 'a<b>&' and texts[-2] == 'sft' and int(texts[-3]) + int(texts[-1]) == 2000
    bars = [re.fullmatch(r'M([\d.]+) (\d+)H([\d.]+)', d) for d, _ in paths[-2:]]
    assert points[0] > points[1] and float(bars[0][1]) <= points[0] <= float(bars[0][3]) and bars[0][2] < bars[1][2]
    assert (tmp_path / 'out' / 'board.svg').read_text() == board.draw(found['tables']['all'])

def test_the_axis_by_hand():
    """From 940 to 1110 are 170: steps of 50, as 20 would be more than six. 400 pixels from 900 to 1150: 1.6 each."""
    texts, points, paths = drawn(dict(abcd=dict(elo=1080, elo_interval=[1050, 1110]),
                                      b=dict(elo=950, elo_interval=[940, 960])))
    assert texts[:7] == ['Elo, with 95 % intervals; dashed: 1000, the mean of all',
                         '900', '950', '1000', '1050', '1100', '1150']
    left = 30 + 8 * 4
    assert points == [left + 1.6 * 180, left + 1.6 * 50]
    assert [d for d, dashes in paths if dashes] == [f'M{left + 160.0} 30V96']
    # all equal: an axis all the same; far apart: the line at 1000 stays
    for low, high, ticks in (1000, 1000, ['1000', '1010']), (1000 - 9000, 1000 + 100, ['-9000', '-7000']):
        texts, _, paths = drawn(dict(a=dict(elo=high, elo_interval=[low, high])))
        assert texts[1:3] == ticks and '1000' in texts and sum(dashes != '' for _, dashes in paths) == 1

def test_categories(tmp_path):
    """A wins the helpful ones, B the others. One has no kind, and one a kind that would colour the terminal."""
    rows = [ranking(f'p{i}', dict(A=0, B=1) if i < 3 else dict(B=0, A=1)) for i in range(5)]
    for row, kind in zip(rows, ['helpful', 'helpful', 'helpful', '\x1b[31m']):
        row['kind'] = kind
    tables = measured(tmp_path, rows, by='kind')['tables']
    rates = {title: {name: row['win_rate'] for name, row in table.items()} for title, table in tables.items()}
    assert rates == {'all': dict(A=0.6, B=0.4), 'kind: helpful': dict(A=1, B=0), 'kind: \ufffd[31m': dict(B=1, A=0),
                     'kind: –': dict(B=1, A=0)}

def test_merged_files_count_each_raters_opinion(tmp_path, capsys):
    """Anna and Ben differ on one of two prompts; the merged file gives the same table as their two files."""
    anna = [ranking('p', dict(A=0, B=1), rater='anna'), ranking('q', dict(A=0, B=1), rater='anna')]
    ben = [ranking('p', dict(B=1, A=0), rater='ben'), ranking('q', dict(B=0, A=1), rater='ben')]
    apart = measured(tmp_path, [anna, ben])
    merge([str(tmp_path / '0.jsonl'), str(tmp_path / '1.jsonl')], str(tmp_path / 'both.jsonl'))
    capsys.readouterr()
    board.main(board.Config(), [str(tmp_path / 'both.jsonl')])
    out = capsys.readouterr().out
    assert apart['tables']['all']['A']['win_rate'] == 0.75 and re.search(r'^A +4  0\.75', out, re.MULTILINE)
    # p_o = 1/2 and p_e = 1/2 without ties: kappa 0
    told = 'anna and ben: 2 prompts in common; the same on 0.500 of 2 pairs of answers, kappa 0.000'
    assert told in out and any(told in line for line in apart['remarks'])

# ---- a simulated rater ------------------------------------------------------------------------------------------

def simulated(n, gold, likes_length=0.0, seed=1):
    """Return n rankings of one answer a policy. Gumbel noise on the gold score makes every pair Bradley–Terry.

    An answer has 20 to 119 letters, and `padded` adds up to 149 more. The rater adds likes_length for each letter.
    """
    rng, rows = random.Random(seed), []
    for i in range(n):
        policies = rng.sample(list(gold), len(gold))
        texts = [p[0] * (rng.randrange(20, 120) + rng.randrange(150) * (p == 'padded')) for p in policies]
        values = [gold[p] + likes_length * len(text) - math.log(rng.expovariate(1)) for p, text in zip(policies, texts)]
        ranks = [sum(other > value for other in values) for value in values]
        rows.append(ranking(f'p{i}', dict(zip(policies, ranks)), texts))
    return rows

EIGHT = dict(base=-1.2, padded=-0.4, sft=0.0, rrhf=0.4, kto=0.8, dpo=1.2, ppo=1.6, grpo=2.0)

def test_the_order_of_gold_is_recovered(tmp_path):
    """One unit of gold is 400 / ln 10 = 173.7178 Elo. The rater does not heed the length."""
    table = measured(tmp_path, simulated(400, EIGHT))['tables']['all']
    assert list(table) == list(EIGHT)[::-1]
    mean = sum(EIGHT.values()) / 8
    assert {name: row['elo'] for name, row in table.items()} == pytest.approx(
        {name: 1000 + 173.7178 * (gold - mean) for name, gold in EIGHT.items()}, abs=35)

def test_padding_loses_its_lead_at_equal_length(tmp_path):
    """It is worse than sft by gold, and beats it by its length alone."""
    table = measured(tmp_path, simulated(800, EIGHT, likes_length=0.015))['tables']['all']
    row = table['padded']
    assert row['characters'] > table['sft']['characters'] + 60 and row['elo'] > table['sft']['elo'] + 50
    assert row['wins_vs_baseline'] > 0.55 and row['at_equal_length'] < 0.5
    for name in ('rrhf', 'kto', 'dpo', 'ppo', 'grpo'): # the lead of the better ones stays
        assert table[name]['at_equal_length'] > 0.5

def test_the_intervals_cover():
    """Of 60 simulations the 95 % interval holds the true Elo difference in 57 or so: at least 52."""
    gold, covered = dict(a=0.0, b=0.5, c=1.0), 0
    for seed in range(60):
        votes, _ = wins.votes_of(simulated(80, gold, seed=seed), 'f')
        low, high = wins.measure(votes, 'a', 200, seed)['c']['elo_interval']
        covered += low <= 1000 + 173.7178 * 0.5 <= high
    assert 52 <= covered < 60

# ---- ratings ----------------------------------------------------------------------------------------------------

def rating(prompt, policy, helpful, harmless, **more):
    return dict(prompt=prompt, response=f'{policy} {prompt}', policy=policy, helpful=helpful, harmless=harmless) | more

RATINGS = [rating('p', 'base', 1, 4), rating('q', 'base', 4, 5), rating('p', 'rlhf', 8, 9), rating('q', 'rlhf', 8, 10)]

def test_ratings_by_hand(tmp_path, capsys):
    """
    Helpful: base (1 + 4 + 3) / 3, since Ben rates one answer too; rlhf 8 always. That answer's two numbers are 2 apart
    in helpful. The interval is that of the prompts' means: p gives 1 and 3, q gives 4: from 2 (p twice) to 4.
    """
    ben = [rating('p', 'base', 3, 4, rater='ben')]
    found = measured(tmp_path, [RATINGS, ben])
    table = found['tables']['all']
    assert list(table) == ['base', 'rlhf']
    assert table['base'] == {'ratings': 3, 'helpful': by_hand(8 / 3), 'helpful_interval': [2, 4],
                             'harmless': by_hand(13 / 3), 'harmless_interval': [4, 5]}
    assert table['rlhf'] == {'ratings': 2, 'helpful': 8, 'helpful_interval': [8, 8], 'harmless': 9.5,
                             'harmless_interval': [9, 10]}
    assert found['remarks'][0].startswith('helpful: 5 ratings of 4 answers, 1 of them rated several times: 2.00 apart')
    out = capsys.readouterr().out
    assert 'base          3  2.67 (2.00–4.00)   4.33 (4.00–5.00)' in out
    assert not os.path.exists(tmp_path / 'out' / 'board.svg')

def test_a_text_of_several_policies_counts_for_each(tmp_path):
    both = [rating('p', 'base,rlhf', 2, 4), rating('p', 'rlhf', 8, 6)]
    table = measured(tmp_path, [both])['tables']['all']
    assert (table['base']['helpful'], table['rlhf']['helpful']) == (2, 5) # 2, and (2 + 8) / 2

def test_ratings_by_category(tmp_path):
    rows = [row | dict(kind='easy' if row['prompt'] == 'p' else 'hard') for row in RATINGS]
    tables = measured(tmp_path, rows, by='kind')['tables']
    assert {title: table['base']['helpful'] for title, table in tables.items()} == {
        'all': 2.5, 'kind: easy': 1, 'kind: hard': 4}

# ---- the command line -------------------------------------------------------------------------------------------

AB = [ranking('p', dict(A=0, B=1))]

def without(row, key):
    return {k: v for k, v in row.items() if k != key}

@pytest.mark.parametrize('rows, options, wanted', [
    ([dict(prompt='p', responses=['a', 'b'], ranks=[0, 1])], {}, "0.jsonl: prompt \"p\": wanted `policies`"),
    ([AB[0] | dict(policies=['A'])], {}, 'got ["A"]'),
    ([AB[0] | dict(policies=['A', 7])], {}, 'wanted `policies`'),
    ([AB[0] | dict(policies=['A', 'A'])], {},
     '0.jsonl: wanted different answers of two policies to one prompt, found none; there are answers of A'),
    ([ranking('p', dict(A=0, B=0))], {}, 'all 1 pairs of two policies tie'),
    (AB, dict(baseline='C'), '--baseline=C: wanted one of A, B'),
    (AB, dict(by='kind'), '--by=kind: no record has this key; they have policies, prompt, ranks, responses'),
    ([AB, RATINGS], {}, '1.jsonl: wanted rankings alone or ratings alone, got both'),
    (RATINGS, dict(baseline='base'), '--baseline=base: wanted none with ratings'),
    ([without(RATINGS[0], 'policy')], {}, '0.jsonl: wanted `policy` and helpful, harmless in every rating'),
    ([RATINGS[0], without(RATINGS[1], 'harmless')], {}, 'got one with prompt, response, policy, helpful'),
])
def test_bad_input(tmp_path, capsys, rows, options, wanted):
    exits(capsys, wanted, lambda: measured(tmp_path, rows, **options))
    assert not os.path.exists(tmp_path / 'out')

def test_the_baseline_is_sft_or_else_the_first(tmp_path):
    rows = [ranking('p', {'out/ppo': 0, 'out/sft': 1}), ranking('q', {'out/ppo': 0, 'out/base': 1})]
    assert measured(tmp_path, rows)['tables']['all']['out/base']['wins_vs_baseline'] is None # it never met sft
    found = measured(tmp_path, rows[1:])
    assert found['remarks'][0] == 'baseline: out/ppo' and found['tables']['all']['out/base']['wins_vs_baseline'] == 0
    table = measured(tmp_path, rows, baseline='out/base')['tables']['all']
    assert table['out/sft']['wins_vs_baseline'] is None and table['out/ppo']['wins_vs_baseline'] == 1

def test_from_the_command_line(tmp_path):
    """Files may stand behind options. Without out_dir nothing is written."""
    path = records(tmp_path / 'a.jsonl', AB)
    done = subprocess.run([sys.executable, '-m', 'lab.board', '--bootstrap', '100', path, '--baseline=B'],
                          cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and 'baseline: B' in done.stdout and done.stderr == ''
    assert os.listdir(tmp_path) == ['a.jsonl']

def test_bad_options(capsys):
    exits(capsys, '--bootstrap=9: bootstrap must be at least 100, got 9', parse_config, board.Config, ['--bootstrap=9'])
    exits(capsys, '--seed=-1: seed must be at least 0', parse_config, board.Config, ['--seed=-1'])

def test_files_are_needed(capsys):
    exits(capsys, 'wanted files of verdicts, as in python -m lab.board', board.main, board.Config(), [])
    exits(capsys, 'none.jsonl: no such file', board.main, board.Config(), ['none.jsonl'])
