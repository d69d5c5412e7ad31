"""data/formats.py: a row of each format, and the records that it gives; what is not read is said."""
import json

import pytest

import data.alpaca.prepare as alpaca
import data.hh_rlhf.prepare as hh_rlhf
import data.sharegpt.prepare as sharegpt
import data.trl.prepare as trl
from common.records import read_records
from data.formats import ALIASES, FORMATS, parse_row
from data.prepare_common import Row, unseen
from tiny import assistant, run, stops, user

def system(text):
    return {'role': 'system', 'content': text}

def says(who, value):
    return {'from': who, 'value': value}

def pair(prompt, chosen, rejected, **more):
    """The records of a comparison."""
    return {'comparisons': [dict(prompt=prompt, chosen=chosen, rejected=rejected) | more],
            'demonstrations': [dict(prompt=prompt, response=chosen)], 'prompts': [dict(prompt=prompt)]}

def answered(prompt, *responses):
    return {'demonstrations': [dict(prompt=prompt, response=r) for r in responses], 'prompts': [dict(prompt=prompt)]}

def cut_off(prompt, response):
    return {'demonstrations': [dict(prompt=prompt, response=response, ended=False)], 'prompts': [dict(prompt=prompt)]}

PARIS = dict(chosen='The capital is Paris', rejected='The capital is Rome')
TOLD = dict(system='Be kind.', history=[['a', 'b']])
BEFORE = [system('Be kind.'), user('a'), assistant('b'), user('q')]
RATED = dict(prompt='q', responses=['x', 'y', 'z'])
CASES = [
    # the question is the prompt, and not what both answers begin with
    (dict(question='q') | PARIS, pair('q', *PARIS.values())),
    (dict(query='q', margin=2) | PARIS, pair('q', *PARIS.values(), margin=2)),
    (dict(instruction='q', input='this') | PARIS, pair('q\n\nthis', *PARIS.values())),
    (dict(system='s', question='q') | PARIS, pair([system('s'), user('q')], *PARIS.values())),
    # system and history come first
    (TOLD | dict(prompt='q', chosen='x', rejected='y'), pair(BEFORE, 'x', 'y')),
    (TOLD | dict(instruction='q', input='', output='x'), answered(BEFORE, 'x')),
    (TOLD | dict(messages=[user('q'), assistant('x')]),
     {'demonstrations': [dict(messages=BEFORE + [assistant('x')])], 'prompts': [dict(prompt=BEFORE)]}),
    (dict(history=[user('a'), assistant('b')], query='q', response='x'), answered(BEFORE[1:], 'x')),
    (dict(system='', history=[], question='q', answer='x'), answered('q', 'x')),
    # what was rejected, under another name
    (dict(query='q', response='x', rejected_response='y'), pair('q', 'x', 'y')),
    (dict(messages=[user('q'), assistant('x')], rejected_response='y'), pair('q', 'x', 'y')),
    # ShareGPT, its turns by either pair of names, and its preferences
    (dict(conversations=[user('q'), assistant('x')]), answered('q', 'x')),
    (dict(conversations=[says('human', 'q'), says('gpt', 'x')], system='s'),
     {'demonstrations': [dict(messages=[system('s'), user('q'), assistant('x')])],
      'prompts': [dict(prompt=[system('s'), user('q')])]}),
    (dict(conversations=[says('human', 'q')], chosen=says('gpt', 'x'), rejected=says('gpt', 'y')), pair('q', 'x', 'y')),
    (dict(conversations=[says('system', 's'), says('human', 'q')], chosen='x', rejected='y'),
     pair([system('s'), user('q')], 'x', 'y')),
    (dict(prompt='q', chosen=[says('human', 'q'), says('gpt', 'x')], rejected=[says('human', 'q'), says('gpt', 'y')]),
     pair('q', 'x', 'y')),
    # a disliked answer is no demonstration
    (dict(messages=[user('q'), assistant('x')], label=True),
     answered('q', 'x') | {'unpaired': [dict(prompt='q', response='x', label=True)]}),
    (dict(messages=[user('q'), assistant('x')], label=False),
     answered('q') | {'unpaired': [dict(prompt='q', response='x', label=False)]}),
    (dict(conversations=[says('human', 'q'), says('gpt', 'x')], label=False),
     answered('q') | {'unpaired': [dict(prompt='q', response='x', label=False)]}),
    (dict(instruction='q', output='x', kto_tag=False),
     answered('q') | {'unpaired': [dict(prompt='q', response='x', label=False)]}),
    (dict(messages=[user('q'), assistant('x')], label='greeting'), answered('q', 'x')), # a category
    *[(row | {key: word}, (answered('q', 'x') if good else answered('q')) | {
        'unpaired': [dict(prompt='q', response='x', label=good)]})
      for row in (dict(messages=[user('q'), assistant('x')]), dict(prompt='q', completion='x'))
      for key in ('label', 'kto_tag')
      for word, good in (('false', False), ('FALSE', False), ('0', False), ('true', True), ('1', True))],
    (dict(messages=[user('q'), assistant('x')], label='greeting', kto_tag=False),
     answered('q') | {'unpaired': [dict(prompt='q', response='x', label=False)]}),
    # answers that were cut off stay so; a weight of 0 or a later turn does not move this to another answer
    (RATED | dict(ranks=[2, 1, 0], ended=[True, True, False]), {
        'rankings': [RATED | dict(ended=[True, True, False], ranks=[2, 1, 0])],
        'demonstrations': [dict(prompt='q', response='z', ended=False)], 'prompts': [dict(prompt='q')]}),
    (dict(prompt='q', response='x', ended=False), cut_off('q', 'x')),
    (dict(prompt='q', response='x', helpfulness=4, ended=False), cut_off('q', 'x')),
    (dict(messages=[user('q'), assistant('x')], ended=False), cut_off('q', 'x')),
    (dict(messages=BEFORE + [assistant('x')], ended=False), {
        'demonstrations': [dict(messages=BEFORE + [assistant('x')], ended=False)], 'prompts': [dict(prompt=BEFORE)]}),
    (dict(messages=[user('q'), assistant('x'), user('r'), assistant('y') | dict(weight=0)], ended=False),
     answered('q', 'x') | {'prompts': [dict(prompt=[user('q'), assistant('x'), user('r')])]}),
    (dict(messages=[user('q'), assistant('x'), user('r')], ended=False), answered('q', 'x')),
    (dict(prompt='q', response='x', label=True, ended=False), cut_off('q', 'x') | {
        'unpaired': [dict(prompt='q', response='x', ended=False, label=True)]}),
    (dict(prompt='q', chosen='x', rejected='y', ended=[False, True]),
     pair('q', 'x', 'y', ended=[False, True]) | {'demonstrations': cut_off('q', 'x')['demonstrations']}),
    (dict(prompt='q', chosen='x', rejected='x', ended=[True, False]),
     pair('q', 'x', 'x', ended=[True, False]) | {'demonstrations': [dict(prompt='q', response='x', ended=True)]}),
    (dict(prompt='q', response='x', rejected_response='y', ended=[False, True]),
     pair('q', 'x', 'y', ended=[False, True]) | {'demonstrations': cut_off('q', 'x')['demonstrations']}),
    # an answer of weight 0 is not learnt
    (dict(messages=[user('a'), assistant('b') | dict(weight=0), user('q'), assistant('x') | dict(weight=1)]),
     answered([user('a'), assistant('b'), user('q')], 'x')),
    (dict(prompt='q', completion=[assistant('x') | dict(weight=0), user('r'), assistant('y')]),
     {'demonstrations': [dict(prompt=[user('q'), assistant('x'), user('r')], response='y')],
      'prompts': [dict(prompt='q')]}),
    # RRHF, with and without Alpaca's frame; rankings as this project writes them
    (dict(query='q', responses=['x', ' y', 'z'], scores=[.5, 2, .5]), answered('q', 'y') | {
        'rankings': [RATED | dict(ranks=[1, 0, 1], scores=[.5, 2, .5])]}),
    (dict(query='Below is …\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:', response='x'),
     answered('do\n\nit', 'x')),
    (RATED | dict(ranks=[2, 1, 0]), answered('q', 'z') | {'rankings': [RATED | dict(ranks=[2, 1, 0])]}),
    # MT-bench: the second question needs an answer to the first
    (dict(question_id=81, category='writing', turns=['q', 'r']), {'prompts': [dict(prompt='q')]}),
    # HelpSteer: 3 of 4 is good enough to learn from
    (dict(prompt='q', response='x', helpfulness=3, correctness=0), answered('q', 'x')),
    (dict(prompt='q', response='x', helpfulness=2, correctness=4), answered('q')),
    # PKU-SafeRLHF, SHP, WebGPT
    (dict(prompt='q', response_0='x', response_1='y', better_response_id=1, safer_response_id=1), pair('q', 'y', 'x')),
    (dict(prompt='q', response_0='x', response_1='y', better_response_id=0), pair('q', 'x', 'y')),
    (dict(history='q', human_ref_A='x', human_ref_B='y', labels=1, score_ratio=2.0), pair('q', 'x', 'y')),
    (dict(history='q', human_ref_A='x', human_ref_B='y', labels=0), pair('q', 'y', 'x')),
    (dict(question=dict(id='1', full_text='q'), answer_0='x', answer_1='y', score_0=-1, score_1=.5),
     pair('q', 'y', 'x')),
]

@pytest.mark.parametrize('row, expected', CASES)
def test_formats(row, expected):
    assert parse_row(row).records == expected

def test_every_format_has_a_case():
    """Those of TRL are in test_prepare.py."""
    told = lambda row: next(read for words, read in FORMATS.items() if all(
        any(key in row for key in ALIASES.get(word, [word])) for word in words.split()))
    others = {FORMATS[words] for words in ('chosen rejected', 'prompt', 'text')}
    assert {told(row) for row, _ in CASES} | others == {*FORMATS.values()}

@pytest.mark.parametrize('row, reason', [
    (dict(context='Where is it?') | PARIS,
     'no prompt; wanted one of prompt, question, instruction, query, got context'),
    (dict(prompt='\n\nHuman: q\n\nAssistant:', chosen=' x', rejected=' y'), 'data/hh_rlhf/prepare.py reads those'),
    (dict(chosen='\n\nHuman: q\n\nAssistant: x', rejected='\n\nHuman: q\n\nAssistant: y'), 'tags of HH-RLHF'),
    (dict(prompt='q', completion='x\n\nHuman: r\n\nAssistant: y'), 'tags of HH-RLHF'),
    (dict(instruction='q', output='x\n\nHuman: r'), 'tags of HH-RLHF'),
    (dict(prompt='q', response_0='x', response_1='y', better_response_id=0, safer_response_id=1), 'not the safer one'),
    (dict(prompt='q', response_0='x', response_1='y', better_response_id=2), 'wanted 0 or 1 for the better one of'),
    (dict(prompt='q', response_0='x', response_1='x', better_response_id=1), 'chosen equals rejected'),
    (dict(history='q', human_ref_A='x', human_ref_B='y', labels=2), 'wanted 0 or 1 for the better one of human_ref_B'),
    (dict(question='q', answer_0='x', answer_1='y', score_0=0, score_1=0), 'both answers are scored alike'),
    (dict(question='q', answer_0='x', answer_1='y', score_0=0, score_1='1'), 'scored alike, or not at all'),
    (dict(query='q', responses=['x', 'y'], scores=[1, 1]), 'all answers tie'),
    (dict(query='q', responses=['x', 'y'], scores=[1, float('nan')]), 'wanted `scores` to be'),
    (dict(query='q', responses=['x', 'y'], scores=[1]), 'wanted `scores` to be'),
    (dict(query='q', responses=['x', 'y']), 'wanted `ranks` to be 2 integers'),
    (dict(query='q', responses=['x', ' '], scores=[1, 2]), '`responses` to be a list of two texts or more, none empty'),
    (dict(query='q', responses='xy', scores=[1, 2]), 'wanted `responses`'),
    (dict(prompt='q', response='x', helpfulness='3'), 'wanted `helpfulness` to be a number'),
    (dict(prompt='q', response='x', history='a'), 'wanted `history` to be a list'),
    (dict(prompt='q', response='x', history=[['a']]), 'wanted a text or messages'),
    (dict(turns=[]), 'wanted `turns`'),
    (dict(messages=[user('q')], label=False), 'a label, and no answer that it judges'),
    (dict(messages=[user('q'), assistant('x')], label=0), 'label is not true or false'),
    (dict(prompt='q', completion='x', label=0), 'label is not true or false'),
    (dict(prompt='q', label=False), 'keys of no format'),
    (dict(prompt='q', chosen='x', rejected='y', ended=True), 'wanted `ended` to be 2 times true or false'),
    (dict(prompt='q', responses=['x', 'y'], ranks=[0, 1], ended=[True]), 'wanted `ended` to be 2 times true or false'),
])
def test_rows_that_give_nothing(row, reason):
    with pytest.raises(ValueError) as said:
        parse_row(row)
    assert reason in str(said.value)

def lines(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path

def records(folder, kind):
    return sorted((r for split in ('train', 'val') if (folder / f'{kind}_{split}.jsonl').exists()
                   for r in read_records(folder / f'{kind}_{split}.jsonl', kind)), key=str)

def test_ratings_of_one_prompt_are_a_ranking(tmp_path):
    """HelpSteer 2 has two rows a prompt. Equal helpfulness orders nothing."""
    rows = [dict(prompt=p, response=r, helpfulness=h) for p, r, h in (
        ('a', 'x', 1), ('a', 'y', 4), ('b', 'x', 3), ('b', 'y', 3), ('c', 'z', 0))]
    run(trl, source=lines(tmp_path / 'h.jsonl', rows), out_dir=tmp_path / 'out', val_fraction=0.4)
    assert records(tmp_path / 'out', 'rankings') == [dict(prompt='a', responses=['x', 'y'], ranks=[1, 0])]
    assert records(tmp_path / 'out', 'demonstrations') == [
        dict(prompt=p, response=r) for p, r in (('a', 'y'), ('b', 'x'), ('b', 'y'))]

def test_judged_answers_that_were_cut_off(tmp_path):
    """In CSV too, where labels and ends are told by their column."""
    (tmp_path / 'k.csv').write_text('prompt,completion,label,ended\na,x,true,False\na,y,FALSE,\nb,z,True,true\n')
    run(trl, source=tmp_path / 'k.csv', out_dir=tmp_path / 'out', val_fraction=0.4)
    cut = dict(prompt='a', response='x', ended=False)
    assert records(tmp_path / 'out', 'demonstrations') == [cut, dict(prompt='b', response='z', ended=True)]
    assert records(tmp_path / 'out', 'unpaired')[0] == cut | dict(label=True)
    assert records(tmp_path / 'out', 'rankings') == [
        dict(prompt='a', responses=['x', 'y'], ranks=[0, 1], ended=[False, True])]

@pytest.mark.parametrize('script, row', [
    (trl, dict(messages=[user('Q'), assistant('x')])),
    (sharegpt, dict(conversations=[says('human', 'Q'), says('gpt', 'x')])),
    (alpaca, dict(instruction='Q', output='x')),
], ids=['trl', 'sharegpt', 'alpaca'])
def test_disliked_answers_are_no_demonstrations(tmp_path, capsys, script, row):
    rows = [json.loads(json.dumps(row | dict(label=i % 3 == 0)).replace('Q', f'q{i}')) for i in range(9)]
    run(script, source=lines(tmp_path / 'k.jsonl', rows), out_dir=tmp_path / 'out', val_fraction=0.3)
    assert [r['prompt'] for r in records(tmp_path / 'out', 'demonstrations')] == ['q0', 'q3', 'q6']
    assert [r['label'] for r in records(tmp_path / 'out', 'unpaired')] == [i % 3 == 0 for i in range(9)]

def test_preferences_in_the_formats_of_alpaca_and_sharegpt(tmp_path):
    run(alpaca, source=lines(tmp_path / 'a.jsonl', [dict(instruction=f'q{i}', input='') | PARIS for i in range(4)]),
        out_dir=tmp_path / 'a')
    rows = [dict(conversations=[says('human', f'q{i}')], chosen=says('gpt', PARIS['chosen']),
                 rejected=says('gpt', PARIS['rejected'])) for i in range(4)]
    run(sharegpt, source=lines(tmp_path / 's.jsonl', rows), out_dir=tmp_path / 's')
    assert records(tmp_path / 'a', 'comparisons') == records(tmp_path / 's', 'comparisons') == [
        dict(prompt=f'q{i}') | PARIS for i in range(4)]

def test_strings_of_hh_rlhf(tmp_path, capsys):
    """data/trl would double the template. The reader that it names takes them, with the prompt apart too."""
    tagged = lambda i, x: f'\n\nHuman: q{i}\n\nAssistant:{x}'
    whole = lines(tmp_path / 'w.jsonl', [dict(chosen=tagged(i, ' x'), rejected=tagged(i, ' y')) for i in range(4)])
    apart = lines(tmp_path / 'a.jsonl', [dict(prompt=tagged(i, ''), chosen=' x', rejected=' y') for i in range(4)])
    for source in (whole, apart):
        assert stops(capsys, trl, source=source, out_dir=tmp_path / 'no').endswith(
            'got 0 for train and 0 for val; 4 left out: tags of HH-RLHF ("\\n\\nHuman:") in a text; '
            'data/hh_rlhf/prepare.py reads those')
        run(hh_rlhf, source=source, out_dir=tmp_path / source.stem)
        assert records(tmp_path / source.stem, 'comparisons') == [
            dict(prompt=f'q{i}', chosen='x', rejected='y') for i in range(4)]

# ---------------------------------------------------------------------------------------------------------------------
# keys that nobody looked at

def test_unseen():
    """By name, in objects and lists too; not what is empty, and not inside of what was not looked at."""
    turns = [Row(dict(role='user', content='q', weight=0, name='')), Row(assistant('x') | dict(meta=Row(dict(a=2))))]
    row = Row(dict(messages=turns, id=1, meta=Row(dict(b=2)), none=None, nothing=[]))
    assert unseen(row) == set() # nobody looked at any of it: a part that was cut off whole
    row.get('id')
    assert unseen(row) == {'messages', 'meta'}
    parse_row(row)
    assert unseen(row) == {'meta', 'messages.meta'}
    row.get('meta')['b']
    assert unseen(row) == {'messages.meta'}

def test_keys_that_are_not_read_are_said(tmp_path, capsys):
    rows = [dict(prompt=f'q{i}', completion='x', rejected='' if i else 'y', source='web', **{f'k{i}': 1})
            for i in range(30)]
    run(trl, source=lines(tmp_path / 'k.jsonl', rows), out_dir=tmp_path / 'out')
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('keys not read: source (30), k0 (1), rejected (1), k1 (1), ')
    assert last.endswith(' and 12 more')
    run(trl, source=lines(tmp_path / 'k.jsonl', [dict(prompt=r['prompt']) for r in rows]), out_dir=tmp_path / 'out')
    assert capsys.readouterr().out.splitlines()[-1] == 'keys not read: none'
    escape = dict(prompt='q', completion='x') | {'\x1b[2J': 1}
    run(trl, source=lines(tmp_path / 'k.jsonl', [escape, escape | dict(prompt='r')]), out_dir=tmp_path / 'out')
    assert capsys.readouterr().out.splitlines()[-1] == r"keys not read: '\x1b[2J' (2)"
