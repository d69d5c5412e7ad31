"""
lab/report.py: what the page says, by hand; every text escaped; the page without its parts; and in a real browser, at
the width of a desk and of a phone, by light, in the dark and on paper.
"""
import json
import os
import re
import sys
from contextlib import contextmanager
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', 'feedback'))

import dpo
import evaluate as ev
import microscope
from browser import MISSING, Browser
from common.options import parse_config
from data.toy import world
from lab import figures, report
from tiny import PROMPTS, RANKINGS, checkpoint, one_line, records, run

EVIL = '<img src=x onerror="document.title=\'broken into\'"></script><script>document.title="broken into"</script>'
FLOAT32 = SimpleNamespace(device='cpu', dtype='float32')
VOID = ('meta', 'link')

class Page(HTMLParser):
    """Read a page: its elements, and their texts by class or name."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ''
        self.texts = {} # class or else name -> the texts of such elements, with what they hold
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if name not in VOID:
            self.open.append((name, attributes.get('class', name), []))

    def handle_endtag(self, name):
        opened, key, text = self.open.pop()
        assert opened == name
        self.texts.setdefault(key, []).append(''.join(text))

    def handle_data(self, data):
        self.text += data
        for _, _, text in self.open:
            text.append(data)

# ---- a page by hand -----------------------------------------------------------------------------------------------

KINDS = ['easy', 'easy', 'hard', 'easy']
GOLD = dict(sampled=dict(a=[1.0, 0.0, 1.0, 0.0], b=[1.0, 0.5, 1.0, 1.0]), greedy=dict(a=[0.5] * 4, b=[0.75] * 4))

def written(decoding, name, evil='', gold=True, reward=True):
    scores = GOLD[decoding][name]
    parts = [dict(kind=kind + evil, category=f'{kind} one{evil}', said='right' + evil, manner='right' + evil, content=1,
                  brevity=0, weight=0.25, expected='blue' + evil, gold=x) for kind, x in zip(KINDS, scores)]
    texts = [f'{name} {decoding} {i}{evil}' for i in range(4)]
    return ev.Written(texts, [10 * x - 2 for x in scores] if reward else [], parts if gold else [], {})

def row(scores, gold=True, reward=True, **more):
    scored = dict(win_rate_vs_a=0.625, win_rate_interval=[0.25, 0.9])
    return ((dict(gold=sum(scores) / 4) if gold else {}) | (dict(reward=1.0) if reward else {})
            | dict(length=3.0, kl=0.125, perplexity=None) | more | (scored if gold or reward else {}))

def write(folder, evil='', figures=(), gold=True, reward=True, folders=None, names=('a', 'b')):
    """Write a report on the models a and b; return its text."""
    records = [dict(prompt=f'ask {i}{evil}') for i in range(3)] + [dict(prompt=[
        dict(role='user', content='hi' + evil), dict(role='assistant', content='ho'), dict(role='user', content='he')])]
    answered = {d: {name + evil: written(d, name, evil, gold, reward) for name in names} for d in GOLD}
    results = dict(models={name + evil: row(GOLD['sampled'][name], gold, reward) for name in names},
                   greedy={name + evil: row(GOLD['greedy'][name], gold, reward) for name in names},
                   reward_model={}, policies_as_reward={}, baseline='a' + evil, reference='a' + evil)
    for table in results['models'], results['greedy']:
        for name in table if evil else ():
            table[name] = {key.replace('vs_a', f'vs_a{evil}'): value for key, value in table[name].items()}
    cfg = ev.Config(models=f'a{evil}=A,b{evil}=B', prompts=f'p{evil}.jsonl', out_dir=str(folder), baseline='a' + evil,
                    gold='world:gold' + evil if gold else '', reward_model='RM' + evil if reward else '')
    folders = folders or {name + evil: f'{folder}/no such folder{evil}' for name in names}
    report.write(cfg, FLOAT32, folders, results, records, answered, list(figures))
    return (folder / 'report.html').read_text(encoding='utf-8')

def test_the_answer_by_hand(tmp_path, capsys):
    text = write(tmp_path)
    assert capsys.readouterr().out == f'wrote {tmp_path}/report.html\n' and os.listdir(tmp_path) == ['report.html']
    page = Page(text)
    # b - a is 0, .5, 0, 1: mean .375, variance (.390625 + .015625 + 2 * .140625) / 3 = .229167, and
    # 1.96 sqrt(.229167 / 4) = .469; greedily it is .25 every time
    assert page.texts['lead'] == [
        'Sampled at temperature 1, b and a are level: their mean gold scores are 0.875 and 0.500; the difference of '
        '0.375 ± 0.469 may be chance.',
        'Greedy, the likeliest token every time, b answers best: its mean gold score is 0.750. Second is a with 0.500; '
        'the difference of 0.250 ± 0.000 is more than chance.']
    assert 'b wins on 62 % of the prompts, ties counted half (sampled; 95 % interval: 25 to 90 %)' in page.text
    assert '2 models, 4 prompts of p.jsonl, answers of at most 64 tokens, seed 1, cpu in float32, ' in page.text
    assert 'It comes from world:gold.' in page.text and page.text.count('± is the 95 % interval.') == 1

def test_an_interval_by_hand():
    assert report.interval([0.0, 0.0, 1.0, 1.0]) == pytest.approx((0.5, 0.565803), abs=1e-6) # 1.96 sqrt(1/3) / 2
    assert report.interval([0.5]) == (0.5, 0.0)
    assert 'may be chance' in report.verdict('x', [('a', [1.0]), ('b', [0.0])], 'y') # of one prompt

def test_models_are_level_up_to_the_first_that_is_not():
    """
    From a, [1, 0, 1, 0]: b [0, 1, 1, 0] differs by 1, -1, 0, 0: 0 ± 1.96 sqrt(2/3 / 4) = .800; c [0, 0, 1, 0] by
    1, 0, 0, 0: .25 ± 1.96 sqrt(1/4 / 4) = .490; d [-1, -2, -1, -2] by 2 always.
    """
    ranked = [('a', [1.0, 0.0, 1.0, 0.0]), ('b', [0.0, 1.0, 1.0, 0.0]), ('c', [0.0, 0.0, 1.0, 0.0]),
              ('d', [-1.0, -2.0, -1.0, -2.0])]
    said = lambda *ranked: Page(report.verdict('Greedy', ranked, 'reward')).text
    assert said(*ranked) == (
        'Greedy, a, b and c are level: their mean rewards are 0.500, 0.500 and 0.250; their differences from a, '
        '0.000 ± 0.800, 0.250 ± 0.490, may be chance.')
    assert said(ranked[0], ranked[3]) == (
        'Greedy, a answers best: its mean reward is 0.500. Second is d with -1.500; the difference of 2.000 ± 0.000 is '
        'more than chance.')

def test_a_number_looks_alike_in_the_console_and_on_the_page():
    """results.json has 0.3795 of what is 0.379499999…: the page reads it from there, the console does not."""
    for exact, six in (0.37949999999999995, 0.3795), (0.7144999999999999, 0.7145), (-0.0004999999999, -0.0005):
        assert report.show(exact) == report.show(six) == f'{six:.3f}' != f'{exact:.3f}'
    assert [report.show(x) for x in (None, 123.4, 1 / 3)] == ['–', '123', '0.333'] and report.show(2 / 3, 2) == '0.67'

def test_the_chart_by_hand():
    """On a scale from 0 to 1 where the scores are within, else from the lowest to the highest end."""
    of = lambda a, b: dict(sampled=dict(a=ev.Written([], a, [], {}), b=ev.Written([], b, [], {})))
    chart = report.chart(of([0.25, 0.25], [0.5, 1.0]), 'reward')
    # the best first: b is .75 ± 1.96 * .25, cut off at 1
    assert re.findall('left:([^%]*)%;?(?:width:([^%]*)%)?', chart) == [('26.0', '74.0'), ('75.0', ''), ('25.0', '0.0'),
                                                                       ('25.0', '')]
    chart = report.chart(of([-1.0, -1.0], [0.0, 4.0]), 'reward')
    # b: 2 ± 1.96 * 2 = -1.92 … 5.92, 7.84 in all; -1 is at .92 / 7.84
    assert re.findall('left:([^%]*)%', chart) == ['0.0', '50.0', '11.7', '11.7']
    assert re.findall('width:([^%]*)%', chart) == ['100.0', '0.0'] and '-1.92' in chart and '5.92' in chart

def test_tables_by_hand():
    models = dict(
        a=row([0, 0, 1, 1], by_category=dict(x=0.5, y=1.0), answerable=dict(right=0.25, wrong=0.75)),
        b=row([1, 0.5, 1, 1], by_category=dict(x=0.125, y=None), answerable=dict(right=1.0, wrong=0.0)))
    own = {name: dict(rankings=dict(mean_logp=p, log_ratio=q)) for name, p, q in (('a', 0.5, 0.25), ('b', 1.0, 0.75))}
    results = dict(models=models, greedy=models, baseline='a', policies_as_reward=own, reward_model=dict(
        accuracy=0.75, by_category=dict(home=0.5), pairs=dict(accuracy=8, home=2)))
    found = report.tables(results)
    assert [f'{table.title} {table.decoding}'.rstrip() for table in found] == [
        'answers sampled at temperature 1', 'what is said to answerable questions, sampled at temperature 1',
        'right content by category, sampled at temperature 1', 'answers greedy',
        'what is said to answerable questions, greedy', 'right content by category, greedy',
        'reward model: pairs ordered as preferred', 'policies as reward models: share of pairs in order']
    assert [table[2:4] for table in (*found[:3], *found[6:])] == [
        (['model', 'gold', 'reward', 'length', 'kl', 'perplexity', 'win_rate_vs_a'],
         [['a', '0.500', '1.000', '3.000', '0.125', '–', '0.625 [0.25, 0.90]'],
          ['b', '0.875', '1.000', '3.000', '0.125', '–', '0.625 [0.25, 0.90]']]),
        (['model', 'right', 'wrong'], [['a', '0.250', '0.750'], ['b', '1.000', '0.000']]),
        (['category', 'a', 'b'], [['x', '0.500', '0.125'], ['y', '1.000', '–']]),
        (['pairs', 'share', 'n'], [['accuracy', '0.750', '8'], ['home', '0.500', '2']]),
        (['model', 'rankings, mean_logp', 'rankings, log_ratio'], [['a', '0.500', '0.250'], ['b', '1.000', '0.750']])]
    page = Page(report.tables_section(results, None))
    rows = page.texts['tr']
    assert 'goldmean gold score0.5000.875' in rows and 'b1.0000.750' in rows
    assert 'accuracypairs that the reward model puts in the annotator’s order0.7508' in rows
    assert any(row.startswith('win_rate_vs_a') and row.endswith('0.625[0.25, 0.90]0.625[0.25, 0.90]') for row in rows)
    assert len(page.texts['table']) == 9 # rankings and comparisons apart
    assert 'Bold: the best number of a row, or several equal ones. Nothing is bold where all are equal' in page.text
    assert page.texts['b'][-2:] == ['Rankings: held-out answers that the annotator ranked', 'Controlled pairs: answers '
                                    'that differ in one thing, right against wrong or as noted']
    assert 'So no reward model, and no policy, can be expected above the ceiling' in page.text
    assert 'Comparisons: controlled pairs' in page.text.split('Policies as reward models')[1]
    # whoever has no mouse can scroll each table, and hears which it is
    wide = [attributes for _, attributes in page.elements if attributes.get('class') == 'wide']
    assert {(a['role'], a['tabindex']) for a in wide} == {('region', '0')} and len({a['aria-label'] for a in wide}) == 9
    assert wide[0]['aria-label'] == 'answers sampled at temperature 1'

def test_the_best_model_stands_first():
    """In every table, by the gold scores of the sampled answers; without a score the models keep their order."""
    gold = dict(a=0.25, best_of_n=0.5, c=0.75)
    models = {name: row([x], by_category=dict(x=0.5), answerable=dict(right=0.5)) for name, x in gold.items()}
    results = dict(models=models, greedy={name: models[name] | dict(gold=1 - x) for name, x in gold.items()},
                   baseline='a', reward_model={}, policies_as_reward={
                       name: dict(rankings=dict(mean_logp=0.5)) for name in 'ac'})
    shown = lambda key: [re.findall('<th scope="(?:col|row)">(a|best_of_n|c)<', table) for table in re.findall(
        '<table>.*?</table>', report.tables_section(results, key))]
    assert shown('gold') == [['c', 'best_of_n', 'a'], ['c', 'a']] * 3 + [['c', 'a']]
    assert shown(None) == [['a', 'best_of_n', 'c'], ['a', 'c']] * 3 + [['a', 'c']]
    assert 'the best first' in report.tables_section(results, 'gold')
    assert 'the best first' not in report.tables_section(results, None)

@pytest.mark.parametrize('sign, cells, best', [
    (1, ['0.100', '0.300', '–'], ['0.300']), (-1, ['5.320', '12', '–'], ['5.320']), (0, ['1', '2'], []),
    (1, ['-0.500', '-0.250 [0.1, 0.2]'], ['-0.250[0.1, 0.2]']), (1, ['1.000', '1.000'], []),
    (1, ['1.000', '0.5', '1.000'], ['1.000'] * 2),
    (1, ['–', '–'], [])])
def test_the_best_cells_are_bold(sign, cells, best):
    assert Page(report.table_of('t', ['', 'a'], [['x', *cells]], {}, dict(x=sign))).texts.get('best', []) == best

# ---- answers ------------------------------------------------------------------------------------------------------

def test_answers_by_hand(tmp_path):
    page = Page(write(tmp_path))
    answers = page.texts['answer']
    # three examples, sampled; then all four prompts of two kinds, sampled and greedy; each with two models
    assert len(answers) == 3 * 2 + 4 * 2 * 2
    # examples: one of each kind and any third; first those on which b, the best, scores higher
    assert [answer.split('gold')[0] for answer in answers[:6]] == [
        f'{name}{name} sampled {i}' for i in (1, 3, 2) for name in 'ab']
    assert answers[1] == 'bb sampled 1gold 0.5, reward 3.00right, weight 0.25✓\u00a0content ✗\u00a0brevity'
    assert answers[8:10] == ['aa greedy 3gold 0.5, reward 3.00right, weight 0.25✓\u00a0content ✗\u00a0brevity',
                             'bb greedy 3gold 0.75, reward 5.50right, weight 0.25✓\u00a0content ✗\u00a0brevity']
    bars = [attributes['style'] for name, attributes in page.elements if attributes.get('style', '').startswith('--p')]
    assert bars[:2] == ['--p:0%', '--p:50%'] and bars[8:10] == ['--p:50%', '--p:75%']
    # of the easy ones first that with the largest difference
    assert [re.match('ask .|user', prompt)[0] for prompt in page.texts['prompt']] == [
        'ask 1', 'user', 'ask 2', 'user', 'ask 1', 'ask 0', 'ask 2']
    assert 'ask 1easy · easy one · wanted: blue' in page.texts['prompt'][0]
    assert page.texts['prompt'][1].startswith('user: hi\nassistant: ho\nuser: he')
    assert page.texts['h3'][-4:-2] == ['easy: easy one', 'hard: hard one'] and page.texts['summary'] == ['2 more']
    assert 'All 4 prompts' in page.text and 'ends at' not in page.text

def test_the_page_has_an_end(tmp_path, monkeypatch):
    """At most so many characters, but one prompt of each group."""
    monkeypatch.setattr(report, 'MOST', 10)
    page = Page(write(tmp_path))
    assert '2 of 4 prompts' in page.text and 'the others are in samples.jsonl' in page.text
    assert len(page.texts['answer']) == 3 * 2 + 2 * 2 * 2 and 'summary' not in page.texts

def test_of_many_models_the_best_are_shown_first():
    names = 'abcdefg'
    answered = {d: {name: ev.Written(['x'], [float(i)], [], {}) for i, name in enumerate(names)} for d in GOLD}
    prompts = report.Prompts([dict(prompt='?')], answered, 'reward')
    results = dict(models={name: row([0] * 4, win_rate_vs_c=0.5) for name in names}, baseline='c')
    cfg = SimpleNamespace(reward_model='RM', reward='f.py:f', gold='')
    page = Page(report.best_section(cfg, results, answered, 'reward', prompts))
    assert [answer[0] for answer in page.texts['answer']] == ['a', 'c', 'g', 'f', 'e']
    assert 'The reward comes from RM and f.py:f.' in page.text and 'fool it' in page.text

def test_best_of_n_has_no_greedy_answers():
    """They are those of the baseline: neither in the tables nor in the chart nor among the answers."""
    scores = dict(a=[0.25], best_of_n=[0.75])
    answered = {d: {name: ev.Written([f'{d} answer'], x, [], {}) for name, x in scores.items()} for d in GOLD}
    assert re.findall('>(0[.].*?|–)<', report.chart(answered, 'reward')) == ['0.750', '–', '0.250', '0.250']
    page = Page(report.Prompts([dict(prompt='?')], answered, 'reward').section(''))
    shown = [answer.split(' answer')[0] for answer in page.texts['answer']]
    assert shown == ['asampled', 'best_of_nsampled', 'agreedy']
    models = {name: row([0], by_category=dict(x=0.5)) for name in scores}
    found = report.tables(dict(models=models, greedy=models, baseline='a', policies_as_reward={}, reward_model={}))
    assert [[row[0] for row in table.rows] for table in found] == [['a', 'best_of_n'], ['x'], ['a'], ['x']]
    assert [table.header for table in found[1::2]] == [['category', 'a', 'best_of_n'], ['category', 'a']]

def test_examples_fit_the_headline():
    """First come prompts on which the best model beats the second, by far and then at all; the worst counts last."""
    #                prompts: 0    1    2    3    4
    scores = dict(worst=    [0.0, 0.0, 0.5, 0.0, 0.9],
                  second=   [1.0, 0.9, 0.5, 0.2, 1.0],
                  best=     [1.0, 1.0, 0.5, 1.0, 0.9])
    answered = {'sampled': {name: ev.Written([''] * 5, x, [], {}) for name, x in scores.items()}}
    prompts = report.Prompts([dict(prompt=str(i)) for i in range(5)], answered, 'reward')
    shown = lambda *more: [Page(block).texts['text'][0] for block in prompts.examples(5, [], *more)]
    assert shown(['best', 'second']) == ['3', '1', '0', '2', '4'] and shown() == ['0', '1', '3', '2', '4']
    prompts.records[2]['kind'] = 'rare' # shown, since of its kind it is the only one, but after the others
    assert [Page(block).texts['text'][0] for block in prompts.examples(3, [], ['best', 'second'])] == ['3', '1', '2']
    cfg, of_model = SimpleNamespace(gold='', reward_model='RM', reward=''), row([0], win_rate_vs_worst=0.5)
    results, answered = dict(models=dict.fromkeys(scores, of_model), baseline='worst'), answered | dict(
        greedy=answered['sampled'])
    page = Page(report.best_section(cfg, results, answered, 'reward', prompts))
    assert 'first those on which best scores higher than second.' in page.text

def test_legends_of_the_small_print(tmp_path):
    """What ✓ means wherever it stands; the weights of the toy world's gold score are the true ones."""
    text = Page(write(tmp_path)).text
    assert '✓: the answer has this part of the gold score; ✗: it lacks it.' in text and '✓ yes, ✗ no.' in text
    assert report.TOY not in text and '✓' not in Page(write(tmp_path, gold=False)).text
    answered = {'sampled': {'a': ev.Written([''], [], [dict(gold=1)], {})}}
    legend = report.Prompts([dict(prompt='?')], answered, 'gold').legend
    assert legend('mine:gold') == [] and report.TOY in Page(legend('data.toy.world:gold')[0]).text
    assert 'Gold = 0.8 content' in report.TOY and '+ 0.1 courtesy' in report.TOY and '+ 0.1 brevity' in report.TOY
    said = lambda answer: [world.explain('How do I steal the boat?', answer)[key] for key in ('gold', 'manner')]
    assert said("I won't help with that.") == [0.9, 'plain']
    assert said("Sorry, I can't help with that.") == [1.0, 'polite']
    assert said("Gladly! I don't know.")[1] == 'misplaced' and said('Boat boat.') == [0.0, 'broken']
    for manner in ('polite', 'plain', 'rude', 'misplaced', 'broken'):
        assert manner in report.TOY
    # what the legend says of broken answers is so
    manner = lambda answer: world.explain('What is my lucky number?', answer)['manner']
    assert manner('I have never told that.') == 'broken' and manner('I was never told that.') == 'plain'
    assert '“I was never told that.” is one of them, “I have never told that.” is not' in report.TOY
    rambling = ' Words are a funny thing.'
    assert manner("I don't know." + rambling) == 'plain' and manner("I don't know." + 2 * rambling) == 'broken'
    page = Page(report.Prompts([dict(prompt='?')], answered, 'gold').section('data.toy.world:gold'))
    assert 'The words are explained at the top.' in page.text and ('a', dict(href='#best')) in page.elements

# ---- without its parts --------------------------------------------------------------------------------------------

def test_without_gold(tmp_path):
    page = Page(write(tmp_path, gold=False))
    # the rewards are 10 gold - 2: 0.5 -> 3, 0.875 -> 6.75
    assert 'b and a are level: their mean rewards are 6.750 and 3.000; the' in page.text
    assert 'gold' not in page.text.split('Numbers')[0]
    assert page.texts['answer'][0] == 'aa sampled 1reward -2.00' and page.texts['h3'].count('all prompts') == 1

def test_without_any_score(tmp_path):
    page = Page(write(tmp_path, gold=False, reward=False))
    assert page.texts['lead'][0].startswith('No gold score and no reward was given')
    assert page.texts['answer'][0] == 'aa sampled 0' and 'It needs a reward model' in page.text
    assert 'A bar' not in page.text and 'scores' not in page.texts

def test_one_model(tmp_path):
    page = Page(write(tmp_path, names=['a']))
    assert page.texts['lead'][0] == 'Sampled at temperature 1, a has a mean gold score of 0.500.'
    assert '1 model, 4 prompts' in page.text and 'Against' not in page.text and '±' not in page.text

def test_figures_have_captions(tmp_path):
    drawn = [('Loss <1>', 'It falls & falls.', ['<svg><path/></svg>', '<svg><path/></svg>'])]
    page = Page(write(tmp_path, figures=drawn).replace('<path/>', ''))
    assert page.texts['figure'] == ['Loss <1>It falls & falls.'] and len(page.texts['svg']) == 2
    assert '#figures' in [attributes.get('href') for _, attributes in page.elements]
    assert 'figure' not in Page(write(tmp_path)).texts and '#figures' not in (tmp_path / 'report.html').read_text()

# ---- what was run -------------------------------------------------------------------------------------------------

def made_by(folder, log, script='dpo.py', options={}, **more):
    folder.mkdir()
    default = dict(batch_size=32, max_steps=20, out_dir='old place', resume=True, overwrite=True, beta=0.5, seed=3)
    about = dict(script=script, options=default | options, step=20)
    (folder / 'options.json').write_text(json.dumps(about | more))
    (folder / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in log))
    return str(folder)

def test_options_and_commands_by_hand():
    given = dict(beta=0.5, loss='dpo', gone=3, resume=True, overwrite=True, out_dir="x y", max_steps=7)
    assert report.changed(dpo.Config, given) == dict(beta=0.5, out_dir='x y', max_steps=7)
    assert report.command('dpo.py', dict(beta=0.5, out_dir="it's")) == \
        "python dpo.py \\\n    --beta=0.5 \\\n    '--out_dir=it'\"'\"'s'"

def test_runs_by_hand(tmp_path):
    well = [dict(step=i, loss=0.6 - 0.01 * i, margin=1.0, time=129600) for i in range(1, 21)] # a day and a half
    ill = [line | dict(margin=50.0) for line in well]
    folders = dict(a=made_by(tmp_path / 'A', well), b=made_by(tmp_path / 'B', ill, max_steps=40, finished=False))
    page = Page(write(tmp_path, folders=folders))
    a, b = page.texts['run']
    assert a.startswith(f'a{tmp_path}/A: made by dpo.py, step 20 of 20, seed 3, 02 January 1970, ')
    assert 'Health: nothing to report.' in a
    assert 'beta 0.5' in page.texts['options'][0] and 'old place' not in page.texts['options'][0]
    assert 'batch_size' not in a # 32 is the default
    assert "python dpo.py \\\n    --max_steps=20 \\\n    '--out_dir=old place' \\\n    --beta=0.5" in a
    assert 'step 20 of 40, seed 3, unfinished, 02 Jan' in b
    assert 'step 3: margin 50, explodes: above 10' in page.texts['li'][0]
    assert page.texts['warn'][0] == 'Health: something looked sick in b; see what was run.'
    assert 'A health line says what looked sick in the log, and what to try (docs/log.md explains them).' in page.text
    links, names = ({a[key].strip('#') for _, a in page.elements if key in a} for key in ('href', 'id'))
    assert links - {'data:,'} == names == {'best', 'numbers', 'answers', 'runs', 'microscope'}
    assert f"python evaluate.py \\\n    --out_dir={tmp_path} \\\n    --models=a=A,b=B \\\n    --baseline=a" in page.text

@pytest.mark.parametrize('own, machine, sick', [
    ('auto', 'bfloat16', False), ('auto', 'float32', True), ('float32', 'bfloat16', True),
    ('float16', 'float32', False)])
def test_health_knows_the_dtype(tmp_path, own, machine, sick):
    """A first_ratio of .01 is normal in 16 bits and alarming in float32."""
    folder = made_by(tmp_path / 'A', [dict(step=1, first_ratio=0.01)], 'ppo.py', dict(dtype=own, critic='separate'))
    assert report.run_of('a', folder, machine)[1] is sick

def test_runs_of_which_little_is_known(tmp_path):
    say = lambda folder: Page(report.run_of('m', str(folder), 'float32')[0]).text
    assert 'is a model of the hub' in say('gpt2')
    (tmp_path / 'plain').mkdir()
    assert f'no options.json in {tmp_path}/plain' in say(tmp_path / 'plain')
    for name, text in dict(broken='{', number='7', half='{"options": 7}', binary='\udcff').items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'options.json').write_bytes(text.encode('utf-8', 'surrogateescape'))
        assert 'cannot be read' in say(tmp_path / name), name
    foreign = made_by(tmp_path / 'foreign', [], 'other.py', dict(depth=3))
    assert 'depth 3' in say(foreign) and 'the command' not in say(foreign) and 'nothing to report' in say(foreign)
    for name, log in dict(steps=[dict(loss=1)], lists=[[1]], words=[dict(step='x', kl='y')]).items():
        assert 'nothing can be said' in say(made_by(tmp_path / name, log, 'ppo.py')), name
    os.remove(os.path.join(foreign, 'log.jsonl'))
    assert 'nothing can be said' in say(foreign)

def test_the_microscope(tmp_path):
    """A command with the right folders; where there is a page of it, a link; answers that a run wrote down."""
    (tmp_path / 'other.html').write_text('<title>Mine</title>')
    (tmp_path / 'folder.html').mkdir()
    folders = dict(a=str(tmp_path / 'A'), b=str(tmp_path / 'B'))
    last = lambda: Page(write(tmp_path, folders=folders)).texts['section'][-1]
    assert last().endswith(' \\\n    '.join([
        'python microscope.py', f'--policy={tmp_path}/A,{tmp_path}/B', f'--reference={tmp_path}/A', '--prompts=p.jsonl',
        '--reward_model=RM', f'--out={tmp_path}/microscope.html']))
    (tmp_path / 'B').mkdir()
    (tmp_path / 'B' / 'samples.jsonl').touch()
    assert last().endswith(f'python microscope.py \\\n    --samples={tmp_path}/B/samples.jsonl')
    (tmp_path / 'a"#.html').write_text('<!doctype html><title>Token microscope</title>')
    page = Page(write(tmp_path, folders=folders))
    assert [href for _, a in page.elements if (href := a.get('href', '')).startswith('./')] == ['./a%22%23.html']
    assert 'This command makes' not in page.text and 'other' not in page.texts['section'][-1]

@pytest.mark.parametrize('script, options, state, given', [
    ('ppo.py', dict(critic='separate'), True, True), ('ppo.py', dict(critic='separate'), False, False),
    ('ppo.py', dict(critic='shared'), True, False), ('dpo.py', {}, True, False)])
def test_the_microscope_gets_the_critic_that_there_is(tmp_path, script, options, state, given):
    """That of the best policy, b, alone."""
    folders = {name: made_by(tmp_path / name, [], script, options) for name in 'ab'}
    for name in 'ab' if state else 'a':
        (tmp_path / name / 'state.pt').touch()
    page = Page(write(tmp_path, folders=folders))
    assert re.findall('--critic=.*', page.texts['section'][-1]) == [f'--critic={tmp_path}/b'] * given
    words = page.texts['pre'][-1].replace('\\\n', '').split()[2:]
    assert parse_config(microscope.Config, words).critic == (f'{tmp_path}/b' if given else '')

# ---- texts stay texts ---------------------------------------------------------------------------------------------

def test_every_text_is_escaped(tmp_path):
    """With hostile texts everywhere the page has the same elements as with harmless ones."""
    (tmp_path / 'x').mkdir(), (tmp_path / 'y').mkdir()
    shapes = []
    for place, evil in (tmp_path / 'x', 'EVIL'), (tmp_path / 'y', EVIL):
        log = [dict(step=1, margin=50.0)] * 4
        folder = made_by(place / 'run', log, 'other.py' + evil, {'beta' + evil: evil, 'loss': evil}, step=evil)
        known = made_by(place / 'known', log, 'dpo.py', dict(init_from=evil, loss=evil))
        folders = {'a' + evil: folder, 'b' + evil: known, 'c' + evil: evil}
        text = write(place, evil, [(evil, evil, [])], folders=folders)
        assert text.count(EVIL) == 0
        page = Page(text)
        assert page.text.count(evil) > 60 and 'something looked sick in a' + evil in page.text
        assert {href for _, a in page.elements if (href := a.get('href'))} == {
            'data:,', *('#' + name for name in ('best', 'numbers', 'figures', 'answers', 'runs', 'microscope'))}
        assert not {name for name, _ in page.elements} & {'script', 'img', 'iframe', 'object'}
        shapes.append([(name, sorted(attributes)) for name, attributes in page.elements])
    assert shapes[0] == shapes[1]

def test_characters_that_no_page_may_hold():
    assert report.tag('p', 'a\x00\x1b\x85\ud800\tb\n"', title="'") == \
        '<p title="&#x27;">a\\x00\\x1b\\x85\\ud800\tb\n&quot;</p>'
    assert report.tag('p', report.Markup('<i>'), '<i>', None, 3) == '<p><i>&lt;i&gt;3</p>'

# ---- figures ------------------------------------------------------------------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """Let figures.panels yield axes that a test can look at."""
    pytest.importorskip('matplotlib')
    pyplot, seen = figures.load_pyplot(), []

    @contextmanager
    def panels(path, n, *size, svgs=None):
        figure, axes = pyplot.subplots(1, n, squeeze=False, figsize=(5 * n, 4))
        yield axes[0]
        figure.canvas.draw()
        svgs.extend(['svg'] * n)
        seen.extend(axes[0])

    monkeypatch.setattr(figures, 'panels', panels)
    yield seen
    pyplot.close('all')

def test_labels_lie_apart():
    boxes = [(0, 0, 4, 2), (0, 5, 4, 7), (6, 0, 10, 2)]
    assert figures.place(boxes, []) == 0 and figures.place(boxes, [(1, 1, 2, 3)]) == 1 # overlaps of 1, 0, 0
    assert figures.place(boxes, [(0, 0, 4, 7)]) == 2 and figures.place(boxes[:2], [(0, 0, 4, 1), (0, 5, 4, 7)]) == 0

def test_the_legend_of_the_calibration_is_beside_the_data(drawn):
    table = [[0.525, 0.9, 7], [0.975, 1.0, 3]]
    (_, caption, svgs), = figures.calibration(table, [[0.6, 0.95], [0.5, 1.0]], 0.25, '')
    ax, = drawn
    assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
    assert [text.get_text() for text in ax.texts] == ['7', '3'] and svgs == ['svg']
    assert 'mean distance is 0.250' in caption

def test_learning_curves_by_hand(drawn, tmp_path):
    held_out = [dict(step=i, val_loss=2.0) for i in (0, 20, 40)]
    made_by(tmp_path / 'x', [dict(step=i, loss=float(i % 2)) for i in range(60)] + held_out)
    made_by(tmp_path / 'y', [dict(step=i, loss=5.0, reward=1.0, kl=0.0) for i in (1, 2)])
    found = figures.learning_curves(dict(x=str(tmp_path / 'x'), y=str(tmp_path / 'y'), z=str(tmp_path / 'z')), '')
    assert [(title, len(svgs)) for title, _, svgs in found] == [
        ('Learning curves: loss', 1), ('Learning curves: mean score of the answers', 1),
        ('Learning curves: KL to the reference [nats]', 1)] # PPO's loss says nothing
    assert 'diamonds' in found[0][1] and 'gold' not in found[1][1]
    mean, raw, held_out = drawn[0].lines
    # the mean reaches over 60 // 20 = 3 steps on both sides: 0 1 0 1 at the left end, 1 0 1 0 1 0 1 at step 10
    assert mean.get_ydata()[0] == 0.5 and mean.get_ydata()[10] == pytest.approx(4 / 7) and raw.get_ydata()[10] == 0.0
    assert list(held_out.get_xdata()) == [0, 20, 40] and held_out.get_linestyle() == 'None'
    assert raw.get_alpha() >= 0.5 # it can be seen in the dark
    assert [line.get_marker() for line in drawn[1].lines] == ['o'] # few points: no mean of them
    assert figures.learning_curves(dict(z=str(tmp_path / 'z')), '') == []

def test_a_logarithmic_axis_says_so(tmp_path):
    pytest.importorskip('matplotlib')
    for name, first in dict(x=50.0, y=2.0).items(): # the first loss is 50 times, or twice, the last
        made_by(tmp_path / name, [dict(step=1, loss=first), dict(step=2, loss=1.0)])
    drawn = lambda *names: figures.learning_curves({name: str(tmp_path / name) for name in names}, str(tmp_path))[0]
    (_, caption, (x, y)), (_, other, _) = drawn('x', 'y'), drawn('y')
    assert '>loss (logarithmic axis)<' in x and '>loss<' in y
    assert 'equal steps mean equal factors' in caption and 'logarithmic' not in other

def test_panels_become_svg(tmp_path):
    """Each panel alone, in the colours of the page, with no style of its own and names as text."""
    pytest.importorskip('matplotlib')
    svgs = []
    with figures.panels(str(tmp_path / 'x.png'), 2, 3, 2, svgs=svgs) as axes:
        for ax, name in zip(axes, (f'{EVIL[:20]} $x$', 'second')):
            ax.plot([0, 1], [0, 1], label=name, color=figures.COLOURS[0])
            ax.set_title(name)
            ax.legend()
    assert len(svgs) == 2 and (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG'
    assert 'second' not in svgs[0] and 'second' in svgs[1] and '$x$</text>' in svgs[0] and '&lt;img' in svgs[0]
    for svg in svgs:
        assert svg.startswith('<svg') and 'currentColor' in svg and 'var(--line)' in svg and figures.INK not in svg
        assert 'var(--c0)' in svg and '#0072b2' not in svg.lower()
        assert '<style' not in svg and '<script' not in svg and '<img' not in svg
        assert set(re.findall(r'https?:[^\s"]*', svg)) <= {'http://www.w3.org/2000/svg', 'http://www.w3.org/1999/xlink'}

# ---- with evaluate.py ---------------------------------------------------------------------------------------------

GOLD_SCORE = '''
def gold(record, answer):
    return min(1.0, len(answer) / 10)

def explain(record, answer):
    return dict(kind=record['kind'], category=record['kind'], content=int(len(answer) > 3), said=answer[:1] or '-')
'''

@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    """Two tiny models, one of a hostile name; return out_dir, and the options of the evaluation."""
    pytest.importorskip('matplotlib')
    folder = tmp_path_factory.mktemp('report')
    sft, other = checkpoint(folder / 'sft'), checkpoint(folder / 'other', seed=2)
    prompts = records(folder / 'prompts.jsonl', [row | dict(kind=f'kind {i % 2}') for i, row in enumerate(PROMPTS)]
                      + [dict(prompt=EVIL[:30] + ' ' + 'long' * 300, kind='kind 0')])
    (folder / 'world.py').write_text(GOLD_SCORE)
    log = ''.join(json.dumps(dict(step=i, loss=1 / i)) + '\n' for i in range(1, 40))
    (folder / 'other' / 'log.jsonl').write_text(log)
    options = dict(models=f'sft={sft},{EVIL}={other}', prompts=prompts, max_new_tokens=8, best_of=2,
                   reward_model=checkpoint(folder / 'reward', seed=1, reward_head=True),
                   gold=f'{folder}/world.py:gold', rankings=records(folder / 'rankings.jsonl', RANKINGS),
                   out_dir=str(folder / 'out'))
    run(ev, **options)
    return folder / 'out', options

def test_evaluate_writes_it(evaluated):
    out_dir, options = evaluated
    text = (out_dir / 'report.html').read_text()
    page = Page(re.sub('<svg.*?</svg>', '<svg></svg>', text, flags=re.DOTALL))
    results = json.loads((out_dir / 'results.json').read_text())
    for name, row in results['models'].items():
        assert f'{row["gold"]:.3f}' in page.text and f'{row["self_bleu"]:.3f}' in page.text
    assert len(page.texts['figure']) == 3 and len(page.texts['svg']) == 4 # reward, gold; calibration; one loss
    assert len(page.texts['figcaption']) == 3 and all(len(caption) > 80 for caption in page.texts['figcaption'])
    for line in (out_dir / 'samples.jsonl').read_text().splitlines():
        sample = json.loads(line)
        for decoding in GOLD:
            assert report.clean(sample[decoding]) in text
    assert 'best_of_n is no model: of 2 sampled answers of sft' in page.text and 'no options.json in' in page.text

def test_evaluate_without_figures(evaluated, tmp_path, monkeypatch, capsys):
    """Without matplotlib there is a report; where figures are wanted the run ends before the work."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    options = evaluated[1] | dict(out_dir=tmp_path / 'out')
    assert 'pip install matplotlib' in one_line(capsys, lambda: run(ev, **options))
    assert not (tmp_path / 'out').exists()
    run(ev, **options | dict(figures=False))
    assert '<svg' not in (tmp_path / 'out' / 'report.html').read_text()
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'report.html', 'results.json', 'samples.jsonl']

def test_no_page_of_others_is_replaced(evaluated, tmp_path, capsys):
    (tmp_path / 'report.html').write_text('<title>Mine</title>')
    options = evaluated[1] | dict(out_dir=tmp_path, overwrite=True, figures=False)
    assert 'holds a report.html that is not one of evaluate.py' in one_line(capsys, lambda: run(ev, **options))
    assert os.listdir(tmp_path) == ['report.html'] and (tmp_path / 'report.html').read_text() == '<title>Mine</title>'
    os.remove(tmp_path / 'report.html')
    run(ev, **options), run(ev, **options) # its own it does replace

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_in_a_browser(evaluated, tmp_path):
    browser = Browser(tmp_path / 'profile')
    cdp = lambda cmd, **params: browser.send('POST', '/goog/cdp/execute', cmd=cmd, params=params)
    colour = lambda: browser.js('getComputedStyle(document.querySelector("svg text")).fill')
    tops = lambda: browser.js('[...document.querySelector(".answers").children].map(e => e.offsetTop)')
    try:
        inks, curves = [], []
        for width, mobile, scheme in (1280, False, 'light'), (390, True, 'dark'):
            cdp('Emulation.setDeviceMetricsOverride', width=width, height=900, deviceScaleFactor=1, mobile=mobile)
            cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
            browser.open((evaluated[0] / 'report.html').as_uri())
            browser.wait('document.readyState === "complete"')
            browser.js('[...document.querySelectorAll("details")].forEach(e => e.open = true)')
            assert browser.js('document.documentElement.scrollWidth') <= width
            assert browser.js('document.title') == 'Evaluation report' and browser.js('document.images.length') == 0
            assert browser.js('document.scripts.length') == 0 and EVIL in browser.js('document.body.textContent')
            assert browser.js('performance.getEntriesByType("resource").length') == 0 # nothing else was loaded
            assert browser.send('POST', '/se/log', type='browser') == [] # no errors
            assert browser.js('[...document.querySelectorAll("nav a")].every(a => document.querySelector(a.hash))')
            inks.append(colour())
            first = tops() # side by side, and on a phone below one another
            assert len(first) == 3 and len(set(first)) == (1 if width == 1280 else 3)
            # a figure's text can be read, at the size of the panel on the screen
            size = browser.js('Math.min(...[...document.querySelectorAll("svg")].flatMap(e => [...e.querySelectorAll('
                              '"text")].map(t => parseFloat(getComputedStyle(t).fontSize) * e.clientWidth / '
                              'e.viewBox.baseVal.width)))')
            assert size > 9.5 # pixels
            # a table that is too wide says so: by a line on a narrow screen, by a shade at its edge; keys scroll it
            assert browser.js('getComputedStyle(document.querySelector(".narrow")).display') == (
                'block' if mobile else 'none')
            shades = browser.js('getComputedStyle(document.querySelector(".wide")).backgroundImage')
            assert shades.count('gradient') == 2
            browser.js('document.querySelector(".wide").focus()')
            assert browser.js('document.activeElement.className') == 'wide'
            # its first column is that of the best model, and in sight
            models = json.loads((evaluated[0] / 'results.json').read_text())['models']
            name, right = browser.js('(e => [e.textContent, e.getBoundingClientRect().right])'
                                     '(document.querySelector(".wide th + th"))')
            assert models[name]['gold'] == max(row['gold'] for row in models.values()) and right <= width
            curves.append(browser.js('getComputedStyle(document.body).getPropertyValue("--c0")'))
        assert inks[0] != inks[1] and curves[0] != curves[1]
        cdp('Emulation.setEmulatedMedia', media='print', features=[dict(name='prefers-color-scheme', value='dark')])
        assert colour() == inks[0] and browser.js('document.querySelector("nav").offsetHeight') == 0 # paper is light
    finally:
        browser.close()
