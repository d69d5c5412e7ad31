"""lab/feedback_worth.py: raters, counts and measures by hand, and each part with faked stages."""
import json
import os
import random
import re
from importlib import import_module
from types import SimpleNamespace

import pytest

import demo
from common.batches import encode_rankings
from common.checkpoints import load_reward_model
from common.options import parse_config
from common.records import read_preferences, read_records
from data.toy import world
from lab import feedback_worth as worth
from tiny import RANKINGS, TOK, by_hand, checkpoint, drawn_axes, flags, records, run, stops

RIGHT, WRONG, BEST = 'It is 2.', 'It is 3.', 'Sure! It is 2.' # gold .9, .1 and 1

def row(*responses, ranks=None, prompt='What is 1 plus 1?'):
    return dict(prompt=prompt, responses=list(responses)) | ({} if ranks is None else dict(ranks=ranks))

# ---------------------------------------------------------------------------------------------------------------------
# who ranks

@pytest.mark.parametrize('ranks, n', [
    ([1, 0], 1), ([0, 0], 1), ([0, 0, 0, 0], 3), # each with the one group there is
    # 1 with 3: 1; 0 with 3, with 1: 2; 2 with the middle of 0 1 3, with 3: 2
    ([3, 1, 0, 2], 5),
    ([0, 1, 1, 1], 3), # 1 with 0; then with the middle of 0 1, which is equal
    (list(range(8))[::-1], 17), # 1 + 2 + 2 + 3 + 3 + 3 + 3, to the front: with a half, a quarter, …
    (list(range(8)), 13), # 1 + 1 + 2 + 2 + 2 + 2 + 3, to the end, whose half is the shorter one
    ([2, 1, 0], 3)]) # 1 with 2; 0 with 2, with 1
def test_comparisons_by_hand(ranks, n):
    assert worth.comparisons(row(*'abcdefgh'[:len(ranks)], ranks=ranks)) == n

def test_equal_texts_are_compared_once():
    assert worth.comparisons(row('a', 'a', 'b', ranks=[1, 1, 0])) == 1

@pytest.mark.parametrize('kind, ranks', [('first', [0, 1, 0, 2]), ('longer', [2, 0, 2, 1])])
def test_biased_raters_by_hand(kind, ranks):
    assert worth.rater(kind, 1)(row('x', 'three', 'x', 'two')) == ranks

@pytest.mark.parametrize('kind, right, tied', [
    # .9 against .1 with logistic noise of scale s: right with sigmoid((.8 - .3) / s), wrong 1 - sigmoid((.8 + .3) / s)
    ('good', 0.993307, 0.006676), ('noisy', 0.731059, 0.169191),
    ('lazy', 0.8 * 0.993307 + 0.1, 0.8 * 0.006676)]) # a fifth is random: half of it right, nothing tied
def test_noise_by_hand(kind, right, tied):
    rank, n = worth.rater(kind, 5), 4000
    seen = [tuple(rank(row(RIGHT, WRONG))) for _ in range(n)]
    assert seen.count((0, 1)) / n == pytest.approx(right, abs=0.025)
    assert seen.count((0, 0)) / n == pytest.approx(tied, abs=0.025)

def test_a_raters_noise_is_its_own():
    """The same seed says the same again, another one does not."""
    rows = [row(RIGHT, WRONG)] * 50
    said = [list(map(worth.rater('noisy', seed), rows)) for seed in ('1 0 noisy', '1 0 noisy', '1 1 noisy')]
    assert said[0] == said[1] != said[2]

def test_labels_by_hand():
    """Two pairs as gold has them; one against it, and 1 over .9, which is not clear; none."""
    found = worth.describe([row(RIGHT, WRONG, BEST, ranks=ranks) for ranks in ([0, 1, 0], [1, 0, 0], [0, 0, 0])])
    assert found == {'with a pair': 2, 'pairs': 4, 'labels right': by_hand(2 / 3)}
    assert worth.describe([row(RIGHT, WRONG, ranks=[0, 0])])['labels right'] == 0

# ---------------------------------------------------------------------------------------------------------------------
# what is done with rankings

def test_merging_agreement_and_the_odd_one(tmp_path):
    """Two like the first answer; who likes the longer one is outvoted, and is found out by the second row alone."""
    rows = [row('long', 'b', prompt='p'), row('b', 'long', prompt='q')]
    said = {'0': worth.rater('first', 0), '1': worth.rater('first', 0), '2': worth.rater('longer', 0)}
    merged = worth.merged(rows, said, str(tmp_path / 'm.jsonl'))
    assert [r['ranks'] for r in merged] == [[0, 1], [0, 1]]
    assert [worth.agreement(r) for r in merged] == by_hand([1, 1 / 3]) # one of three pairs of raters
    assert worth.odd_one_out(merged) == '2'

def test_paraphrases_by_hand():
    rng = random.Random(1)
    found = worth.paraphrases('Hey. Where does the fox live?', rng)
    assert sorted(found) == ['Hey. Tell me where the fox lives.', 'Hey. What is the home of the fox?',
                             'Hey. Where can I find the fox?'] # the other two are for val and test
    talk = [dict(role='user', content='Hi'), dict(role='assistant', content='Yo'),
            dict(role='user', content='Will it rain tonight?')]
    for other in worth.paraphrases(talk, rng):
        assert other[:2] == talk[:2] and 'it' in other[2]['content'] and other[2]['role'] == 'user'
    assert talk[2]['content'] == 'Will it rain tonight?'

def test_paraphrases_ask_the_same():
    rng, n = random.Random(2), 0
    for record in world.prompts('train', 400, 3):
        others = worth.paraphrases(record['prompt'], rng)
        n += len(others)
        for other in others:
            assert world.read(other) == world.read(record['prompt']) and other != record['prompt']
    assert n > 1100

def test_swapped_and_verdicts_by_hand():
    ranked = row('a', 'b', 'c', ranks=[1, 0, 0]) | dict(ended=[True, False, True])
    other = worth.swapped(ranked)
    assert (other['responses'], other['ranks'], other['ended']) == (['c', 'b', 'a'], [0, 0, 1], [True, False, True])
    told = worth.verdicts([ranked]) # a and b, a and c; b and c tie
    assert [d['response'] for d in told] == ['B. b', 'B. c']
    assert told[0]['prompt'] == 'Which is better?\nHuman: What is 1 plus 1?\nA: a\nB: b…'
    assert [d['response'] for d in worth.verdicts([other])] == ['A. c', 'A. b']

# ---------------------------------------------------------------------------------------------------------------------
# what is measured

def held_out(*rows):
    return [SimpleNamespace(record=r) for r in rows]

def test_scores_by_hand():
    """.9 and 1 are too near to count. Of the four clear pairs three are in order; the favourites have 1 and .1."""
    one, two = held_out(row(RIGHT, WRONG, BEST), row(WRONG, RIGHT, WRONG))
    found = worth.of_scores([(one, [0.5, -1.0, 2.0]), (two, [3.0, 2.0, 1.0])])
    assert found == dict(right=by_hand(0.75), gold=by_hand(0.55))

def test_a_judge_by_hand(monkeypatch):
    """It prefers the answer shown first, but BEST to all others, and all others to "It is 4."."""
    class Fake:
        def __init__(self, cfg, run):
            assert (cfg.judge, cfg.judge_instruction) == ('out/j', 'config/judge/toy.txt')

        look_ahead = lambda self, rows: None
        verdict = lambda self, question: question
        rank = lambda self, row: (None, [1.0, 2.0, 0.0, 0.5])

        def questions(self, prompt, answers):
            texts = [text for text, _ in answers]
            second = lambda a, b: b == BEST or a == 'It is 4.'
            return {(i, j): 0.4 if second(texts[i], texts[j]) else 0.9 for i in range(4) for j in range(4) if i != j}

    monkeypatch.setattr(worth, 'GPTJudge', Fake)
    found = worth.of_judge('out/j', held_out(row(RIGHT, WRONG, BEST, 'It is 4.')))
    # of four clear pairs RIGHT over WRONG is right in one order of two, the others in both, and both orders say so
    assert found == dict(right=by_hand(7 / 8), alike=by_hand(3 / 4), gold=by_hand(0.1))

def test_swapping_changes_no_loss_of_scores(tmp_path):
    rows = encode_rankings(TOK, RANKINGS, 64)
    folder = checkpoint(tmp_path / 'r', reward_head=True)
    gaps = worth.swap_gap(load_reward_model(folder).requires_grad_(True), rows)
    assert len(gaps) == 2 and max(gaps) < 1e-12

def test_swapping_answers_without_their_ranks_is_seen(tmp_path, monkeypatch):
    turned = worth.swapped
    monkeypatch.setattr(worth, 'swapped', lambda row: turned(row) | dict(ranks=row['ranks']))
    gaps = worth.swap_gap(load_reward_model(checkpoint(tmp_path / 'r', reward_head=True)).requires_grad_(True),
                          encode_rankings(TOK, RANKINGS, 64))
    assert min(gaps) > 1e-3

def test_models_are_measured(tmp_path):
    """A tiny policy babbles, which is worth nothing; a tiny reward model chooses among answers of known worth."""
    rows = encode_rankings(TOK, [row(BEST, BEST, RIGHT, ranks=[0, 0, 1]), row(RIGHT, WRONG, ranks=[0, 1])], 128)
    assert worth.of_model('dpo.py', checkpoint(tmp_path / 'p', block_size=128), rows, TOK) == dict(gold=0)
    found = worth.of_model('reward.py', checkpoint(tmp_path / 'r', block_size=128, reward_head=True), rows, TOK)
    # one clear pair; of the first prompt 1 or .9, of the second .9 or .1
    best_of_two = {1.0: (0.9, 0.95), 0.0: (0.5, 0.55)}[found['right']]
    assert found['alike'] == 1 and min(abs(found['gold'] - x) for x in best_of_two) < 1e-6

# ---------------------------------------------------------------------------------------------------------------------
# a run of each part

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What worth.main runs: {seed: {stage's name: its command's options}}, and the jobs' measures made up."""
    seen = {}

    def run_stages(todo, at):
        done, mine = set(), seen.setdefault(at.seed, {})
        for stage in todo:
            name, script, config, options, product, needs = stage
            assert done >= {*needs}, name
            done.add(name)
            words = flags(demo.command_of(stage, at))
            if config:
                parse_config(import_module(script[:-3]).Config, [config, *(f'--{k}={v}' for k, v in words.items())])
            if config and 'labels' in words.get('train_data', ''):
                assert os.path.exists(words['train_data']), name
            mine[name] = words
        os.makedirs(at.out_dir, exist_ok=True)
        checkpoint(f'{at.out_dir}/sft', block_size=128)
        records(f'{at.out_dir}/rankings_test.jsonl', [row(RIGHT, WRONG, BEST, 'no', ranks=[0, 1, 0, 1])] * 2)
        said = (BEST, WRONG, RIGHT, 'no', 'Ugh. It is 2.', 'A', 'It is 4.', 'B')
        for K in (2, 4, 8):
            if f'answers {K}' in mine:
                n = int(mine[f'answers {K}']['max_prompts'])
                records(f'{at.out_dir}/answers{K}.jsonl', [
                    row(*said[:K], ranks=[0] * K, prompt=f'{world.LEADS[i % 9]}What is {1 + i % 2} plus 1?')
                    for i in range(n)])

    def of_model(script, folder, rows, tok):
        assert len(rows) == 2
        value = len(os.path.basename(folder)) / 100
        return dict(gold=value) if script == 'dpo.py' else dict(right=value, gold=value / 2, alike=0.5)

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    monkeypatch.setattr(worth, 'of_model', of_model)
    monkeypatch.setattr(worth, 'swap_gap', lambda model, rows: [1e-16, 2e-15])
    monkeypatch.setattr(worth, 'load_reward_model', lambda folder: SimpleNamespace(requires_grad_=lambda on: None))
    return seen

def results(folder, part):
    with open(folder / f'{part}.json') as f:
        return json.load(f)

def test_rankings(ran, tmp_path, monkeypatch, capsys):
    axes = drawn_axes(monkeypatch, worth)
    run(worth, out_dir=str(tmp_path), seeds='1,3', budgets='10,30', prompts=70, steps=20)
    stages, at = ran[3], str(tmp_path / '3')
    assert (stages['answers 8']['n_answers'], stages['answers 8']['max_prompts']) == ('8', '10') # 70 // 7
    assert stages['answers 2']['noise'] == stages['answers 2']['tie'] == '0.0'
    for K, batch in ((2, '32'), (4, '16'), (8, '8')):
        words = stages[f'rankings 30, {K}']
        assert words['batch_size'] == batch and words['max_steps'] == '20' and words['val_data'] == ''
        assert words['init_from'] == f'{at}/sft' and words['seed'] == '3'
        few, many = (read_preferences(f'{at}/labels/ranked_{K}_{n}.jsonl') for n in (10, 30))
        assert many[:len(few)] == few # a smaller budget is the beginning of a larger one
        assert sum(map(worth.comparisons, few)) <= 10 and sum(map(worth.comparisons, many)) <= 30
    found = results(tmp_path, 'rankings')['models']
    # two answers: one judgement each
    assert found['10, 2']['rankings'] == found['10, 2']['judgements'] == [10, 10]
    assert found['30, 2']['answers'] == [60, 60] and found['10, 2']['right'] == [0.04, 0.04] # the folder is 10_2
    out = capsys.readouterr().out
    assert '| judgements | answers a prompt | rankings | answers | with a pair | pairs | labels right |' in out
    assert re.search(r'\| 10 \| 2 \| 10 \| 20 \| .* \| 0.040 \| 0.020 \|\n', out)
    # .9 .1 1 0: their mean is .5
    assert "gold score of SFT's answers 0.500, of the best of 4 by gold itself 1.000" in out
    assert len(axes) == 3 and axes[0].get_xlabel().startswith('judgements') and len(axes[0].texts) == 0
    said = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert said == ['2 answers a prompt', '4 answers a prompt', '8 answers a prompt']
    assert list(axes[1].lines[2].get_xdata()) == [20, 60] # answers read, after the points of each seed
    assert (tmp_path / 'rankings.png').read_bytes().startswith(b'\x89PNG')

def test_raters(ran, tmp_path, monkeypatch, capsys):
    axes = drawn_axes(monkeypatch, worth)
    run(worth, part='raters', out_dir=str(tmp_path), seeds='1', budgets='60', prompts=300, steps=20)
    found = results(tmp_path, 'raters')['models']
    teams = ['three good', *(f'one of three {bad}' for bad in ('lazy', 'first', 'longer')),
             *(f'all {bad}' for bad in ('noisy', 'lazy', 'first', 'longer'))]
    assert list(dict.fromkeys(name.split(', ')[0] for name in found)) == teams
    labels = lambda team, what: read_preferences(f'{tmp_path}/1/labels/{team}_{what}.jsonl')
    # 60 rankings: 60 prompts once; 20 three times; 3 three times and 51 once, of which a third is dropped
    single, three = labels('one_of_three_first', 'one_rater_a_prompt'), labels('one_of_three_first', 'three_merged')
    rest = labels('one_of_three_first', 'odd_one_dropped')
    assert len(single) == 60 and [r['ranks'] == [0, 1, 2, 3] for r in single] == [i % 3 == 2 for i in range(60)]
    assert len({r['prompt'] for r in three}) == len(three) <= 20 and all(r['raters'] == 3 for r in three)
    assert not any(r['ranks'] == [0, 1, 2, 3] for r in rest) and len(rest) == 3 + 34
    assert found['one of three first, odd one dropped']['dropped'] == [1.0]
    assert 'dropped' not in found['three good, odd one dropped'] and 'all good, odd one dropped' not in found
    assert len(labels('all_first', 'three_merged')) and 'all first, agreed half' not in found
    half, whole = (labels('all_noisy', what) for what in ('agreed_half', 'three_merged'))
    whole = [worth.agreement(r) for r in whole if len({*r['ranks']}) > 1]
    assert [worth.agreement(r) for r in half] == sorted(whole)[::-1][:len(whole) // 2] and whole[0] != whole[-1]
    words = ran[1]['raters one of three first, DPO, smoothing 0.2']
    assert words['label_smoothing'] == '0.2' and words['max_steps'] == '6'
    assert words['train_data'].endswith('one_of_three_first_DPO_smoothing_0.2.jsonl')
    assert read_records(words['train_data'], 'rankings') == single
    out = capsys.readouterr().out
    assert '| raters | what is done | rankings | with a pair | pairs | labels right | right | gold | dropped |' in out
    assert re.search(r'\| all lazy \| DPO \| 60 \| .* \| – \| 0.120 \| – \|\n', out) # the folder is all_lazy_DPO
    assert len(axes) == 3 and [t.get_text() for t in axes[0].get_yticklabels()] == teams[::-1]
    said = lambda ax: [text.get_text() for text in ax.get_legend().get_texts()]
    assert said(axes[2]) == ['DPO', 'DPO, smoothing 0.2']
    assert said(axes[0]) == ['one rater a prompt', 'three merged', 'agreed half', 'odd one dropped']

def test_augment(ran, tmp_path, monkeypatch, capsys):
    axes = drawn_axes(monkeypatch, worth)
    run(worth, part='augment', out_dir=str(tmp_path), seeds='1,2', budgets='5,20', prompts=75, steps=20)
    read = lambda name, kind='rankings': read_records(f'{tmp_path}/2/labels/{name}.jsonl', kind)
    mine, other, more = (read(f'reward_{what}_20') for what in ('as_ranked', 'answers_swapped', 'paraphrased'))
    assert len(mine) == len(other) == 20 and [worth.swapped(r) for r in other] == mine
    assert more[:20] == mine and len(more) == 80 # four phrasings of each sum
    assert all(r['ranks'] == mine[i // 3]['ranks'] for i, r in enumerate(more[20:]))
    once, both = (read(f'judge_{what}_20', 'demonstrations') for what in ('as_ranked', 'both_orders'))
    assert both[:len(once)] == once and len(both) == 2 * len(once)
    assert {d['response'][0] for d in once} == {'A', 'B'}
    assert sum(d['response'][0] == 'A' for d in both) == len(once)
    stage = ran[2]['augment 20, judge, both orders']
    assert stage['init_from'] == f'{tmp_path}/2/base' and stage['max_steps'] == '20'
    assert 'augment 5, reward model, answers swapped' not in ran[2]
    found = results(tmp_path, 'augment')
    assert found['swap_gaps'] == [[1e-16, 2e-15]] * 2
    assert found['models']['20, reward model, paraphrased']['rows'] == [80, 80]
    out = capsys.readouterr().out
    assert '| rankings | who learns | from | rows | with a pair | pairs | labels right | right | gold | alike |' in out
    assert 'the gradient changes by 2.0e-15 of its size' in out and 'the loss changes by 1.0e-16' in out
    assert len(axes) == 3 and len(axes[0].get_legend().get_texts()) == 5

@pytest.mark.parametrize('options, line', [
    (dict(part='noise'), "part must be one of rankings, raters, augment, got 'noise'"),
    (dict(budgets='30,10'), "budgets must be rising numbers above 0, separated by commas; one for raters, got '30,10'"),
    (dict(part='raters', budgets='10,20'), 'one for raters'),
    (dict(part='raters', budgets='11'), "--budgets=11: budgets must be at least 12 for raters, some of whose remedies "
                                        "keep a sixth, got '11'"), (dict(budgets='0'), 'rising numbers'),
    (dict(prompts=6001), 'prompts must be from 7 to 6000, got 6001'), (dict(steps=2), 'steps must be at least 3'),
    (dict(seeds='1,1'), 'each once')])
def test_bad_options(tmp_path, capsys, options, line):
    assert line in stops(capsys, worth, out_dir=str(tmp_path / 'out'), **options)
    assert not (tmp_path / 'out').exists()

@pytest.mark.parametrize('part, budgets, line', [
    ('rankings', '1000', '--budgets=1000: ranking 2 answers to all 21 prompts takes 21 judgements; wanted fewer'),
    ('raters', '12', '--budgets=12: only 7 prompts have 4 answers of which two differ; wanted at most so many'),
    ('rankings', '1', '--budgets=1: the first ranking of 4 answers takes '), # there may be ties
    ('augment', '2,8', '--budgets=8: only 7 prompts')])
def test_too_few_prompts(ran, tmp_path, capsys, part, budgets, line):
    options = dict(part=part, budgets=budgets, out_dir=str(tmp_path), seeds='1', prompts=21, steps=9)
    assert line in stops(capsys, worth, **options)
