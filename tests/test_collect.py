"""collect.py: the records, answers that were cut off, resuming from OUT.partial, and what is refused."""
import ast
import fcntl
import json
import os
import random
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import collect
import sft
import test_layout
from common.batches import encode_rankings
from common.options import parse_config
from common.records import read_records
from common.tokens import dialogue
from data.toy import world
from feedback.annotators import RewardModel, SimulatedPerson
from model import GPT
from tiny import RUN, TOK, checkpoint, launch, one_line, records, run, stops

@pytest.fixture
def given(tmp_path):
    prompts = [dict(prompt=p['prompt'], number=i) for i, p in enumerate(world.prompts('train', 10, 1))]
    return dict(gold='data.toy.world:gold', policy=checkpoint(tmp_path / 'sft'),
                prompts=records(tmp_path / 'prompts.jsonl', prompts), n_answers=3, max_new_tokens=5, rows=3)

def test_the_records(tmp_path, given, capsys):
    out = str(tmp_path / 'new' / 'rankings.jsonl')
    run(collect, out=out, max_prompts=7, **given)
    rows = read_records(out, 'rankings')
    assert [row['number'] for row in rows] == sorted(row['number'] for row in rows) and rows[-1]['number'] < 7
    for row in rows:
        assert set(row) == {'prompt', 'number', 'responses', 'ended', 'ranks', 'scores', 'annotator'}
        assert row['annotator'] == 'simulated' and 2 <= len(row['responses']) == len(row['ranks']) == len(row['scores'])
        assert row['scores'] == [world.gold(row['prompt'], r) for r in row['responses']]
    assert len({tuple(row['responses']) for row in rows}) > 1 and any(len(set(row['responses'])) > 1 for row in rows)
    assert not os.path.exists(out + '.partial')
    said = capsys.readouterr().out
    pairs = sum(a < b for row in rows for a in row['ranks'] for b in row['ranks'])
    assert f"{len(rows)} prompts, {sum(len(row['ranks']) for row in rows)} answers, {pairs} pairs" in said

def test_the_reward_model_as_annotator(tmp_path, given):
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    run(collect, out=str(tmp_path / 'r.jsonl'), annotator='reward_model', reward_model=folder, **given | dict(gold=''))
    rows = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert len(rows) >= 4 and all(row['annotator'] == 'reward_model' for row in rows)
    someone = RewardModel(SimpleNamespace(reward_model=folder, tie=0.0, seed=1), RUN)
    for row in rows:
        someone.look_ahead([row]) # alone
        ranks, scores = someone.rank(row)
        assert row['ranks'] == ranks and row['scores'] == pytest.approx(scores, abs=1e-6)

def test_keep_best_writes_demonstrations(tmp_path, given, monkeypatch, capsys):
    """The later in the alphabet the better: of "a c b" the second, of "b a b" the first; the third prompt has one."""
    letters = [[32, 97], [32, 99], [32, 98], [32, 98], [32, 97], [32, 98], [32, 97], [32], [32]]
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: ([x + [256] for x in letters], []))
    monkeypatch.setattr(world, 'gold', lambda prompt, response: float(ord(response or ' ')))
    out = str(tmp_path / 'best.jsonl')
    run(collect, out=out, keep='best', noise=0.0, max_prompts=3, **given)
    asked = [row['prompt'] for row in read_records(given['prompts'], 'prompts')]
    assert read_records(out, 'demonstrations') == [dict(prompt=asked[0], response='c', ended=True),
                                                   dict(prompt=asked[1], response='b', ended=True)]
    assert 'the best answers kept, 1 prompts left out' in capsys.readouterr().out
    run(sft, out_dir=str(tmp_path / 'out'), init_from=given['policy'], train_data=out, max_steps=1, batch_size=2)

def test_empty_answers_are_left_out(tmp_path, given, monkeypatch, capsys):
    """" a" and " b" remain of the first prompt; the second has one answer left, which cannot be ranked."""
    answers = [[32, 97, 256], [32, 256], [32, 98, 256], [256], [32, 99, 256], [32, 32, 256]]
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: (answers, []))
    run(collect, out=str(tmp_path / 'r.jsonl'), max_prompts=2, **given)
    row, = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert row['responses'] == ['a', 'b'] and '1 prompts left out' in capsys.readouterr().out

def test_equal_answers_stay_with_whoever_needs_no_choice(tmp_path, given, monkeypatch):
    """A person has nothing to compare there. A score says something all the same: for keep=best and loss=regression."""
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: ([[32, 97, 256]] * 6, []))
    monkeypatch.setattr(world, 'gold', lambda record, response: 0.5)
    run(collect, out=str(tmp_path / 'r.jsonl'), max_prompts=2, **given)
    rows = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert [(row['ranks'], row['scores']) for row in rows] == [([0, 0, 0], [0.5] * 3)] * 2

def test_every_prompt_is_answered_k_times_at_the_temperature(tmp_path, given, monkeypatch):
    asked, sample = [], collect.sample_answers
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: (asked.append(a), sample(*a))[1])
    given['policy'] = checkpoint(tmp_path / 'other', seed=3) # one that says something
    run(collect, out=str(tmp_path / 'r.jsonl'), temperature=0.7, **given)
    assert [len(a[1]) for a in asked] == [9, 9, 9, 3] and all(a[3:] == (5, 0.7) for a in asked)
    for _, prompts, *_ in asked:
        assert all(prompts[i] == prompts[i + 1] == prompts[i + 2] for i in range(0, len(prompts), 3))

def test_several_policies_answer_in_turn(tmp_path, given, monkeypatch, capsys):
    """Of three answers the first policy gives two, the second one; the record says whose each is, empty ones apart."""
    other = checkpoint(tmp_path / 'other', seed=3)
    given_to = []

    def sampling(model, prompts, tok, *_):
        given_to.append(len(prompts))
        text = [b'one', b'uno', b'eins', b''] if len(prompts) == 4 else [b'two', b'due']
        return [list(t) + [256] for t in text], []

    monkeypatch.setattr(collect, 'sample_answers', sampling)
    run(collect, out=str(tmp_path / 'r.jsonl'), max_prompts=2, **given | dict(policy=f"{given['policy']},{other}"))
    rows = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert given_to == [4, 2]
    assert [row['responses'] for row in rows] == [['one', 'uno', 'two'], ['eins', 'due']]
    assert [row['policies'] for row in rows] == [[given['policy'], given['policy'], other], [given['policy'], other]]

def interrupted(monkeypatch, stretch, number=signal.SIGINT):
    """Send Ctrl-C, or another signal, while the stretch of that number is sampled."""
    sample, calls = collect.sample_answers, []

    def sampling(*args):
        calls.append(1)
        if len(calls) == stretch:
            os.kill(os.getpid(), number)
        return sample(*args)

    monkeypatch.setattr(collect, 'sample_answers', sampling)

@pytest.mark.parametrize('cut', ['between stretches', 'within a stretch', 'within a line'])
def test_a_stopped_run_goes_on_exactly(tmp_path, given, monkeypatch, cut):
    whole, out = str(tmp_path / 'whole.jsonl'), str(tmp_path / 'halves.jsonl')
    run(collect, out=whole, **given)
    with monkeypatch.context() as m:
        interrupted(m, 2)
        assert launch(m, collect, out=out, **given) == 130
    assert not os.path.exists(out)
    with open(out + '.partial', 'rb') as f:
        lines = f.read()
    assert lines.count(b'\n') == 6 # two stretches of three
    if cut != 'between stretches': # a kill while the second was written
        keep = b''.join(lines.splitlines(keepends=True)[:5]) + (b'{"prompt": "Wh' if cut == 'within a line' else b'')
        with open(out + '.partial', 'wb') as f:
            f.write(keep)
    torch.manual_seed(12345)
    random.seed(12345)
    run(collect, out=out, resume=True, **given)
    with open(whole, 'rb') as a, open(out, 'rb') as b:
        assert a.read() == b.read()
    assert not os.path.exists(out + '.partial')

def test_what_is_ranked_is_not_lost_by_forgetting_to_resume(tmp_path, given, capsys):
    out = str(tmp_path / 'r.jsonl')
    with open(out + '.partial', 'w') as f:
        f.write(json.dumps(dict(prompt='Hi')) + '\n')
    said = stops(capsys, collect, out=out, **given)
    assert f"{out}.partial" in said and '--resume=True' in said
    with open(out + '.partial') as f:
        assert f.read() == '{"prompt": "Hi"}\n'
    run(collect, out=out, overwrite=True, **given)
    assert read_records(out, 'rankings')[0]['number'] == 0

# ---------------------------------------------------------------------------------------------------------------------
# answers that were cut off

def test_who_deals_to_people_hears_of_cut_prompts(tmp_path, given, capsys, monkeypatch):
    """24 letters are 50 tokens: 11 of "### Human: ", 1 line end, 14 of "### Assistant:". The context holds 64."""
    prompts = records(tmp_path / 'p.jsonl', [dict(prompt='x' * n) for n in (24, 1, 2, 3, 4, 5)])
    names = [given['policy'], checkpoint(tmp_path / 'other', seed=3)]
    given = given | dict(prompts=prompts, policy=','.join(names), out=str(tmp_path / 'r.jsonl'), overwrite=True)
    warning = 'a policy reads only the end of a cut prompt, people see all of it: --max_new_tokens=14 cuts none\n'
    for n, cut in (14, 0), (15, 1):
        dealt = {key: value for key, value in given.items() if key != 'gold'} | dict(split=2)
        run(collect, **dealt | dict(max_new_tokens=n))
        said = capsys.readouterr().out
        assert all(f"prompts for {name}: 6 rows, {cut} prompts cut, 0 left out\n" in said for name in names)
        assert said.count(warning) == cut # once for both policies
    monkeypatch.setattr(world, 'gold', lambda prompt, response: 0.5)
    run(collect, **given | dict(max_new_tokens=15))
    assert 'people see' not in capsys.readouterr().out # no person is asked

CUT = [[*b' ab', 256], [*b' ab'], [*' x€'.encode()[:-1]], [*' €'.encode()[:-1]], [*b' \xe2', 256], [*b' c', 256]]

@pytest.fixture
def cut(tmp_path, given, monkeypatch):
    """Sample "ab" with its end and without, "x" and half a character, half a character alone; a broken one, and "c"."""
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: (CUT, []))
    return given | dict(max_prompts=2)

def test_who_was_cut_off_is_recorded(tmp_path, cut, capsys):
    """Half a character at the end of what was cut off is left out, and so is what holds nothing else."""
    out = str(tmp_path / 'r.jsonl')
    run(collect, out=out, **cut)
    rows = read_records(out, 'rankings')
    assert [(row['responses'], row['ended']) for row in rows] == [
        (['ab', 'ab', 'x'], [True, False, False]), (['\ufffd', 'c'], [True, True])]
    assert '2 of 5 answers were cut off before their end: --max_new_tokens=5 is small\n' in capsys.readouterr().out
    for row, answers in zip(encode_rankings(TOK, rows, 64), ([[*b' ab', 256], [*b' ab'], [*b' x']], None)):
        assert answers is None or row.answers == answers # no end is invented
    again = str(tmp_path / 'again.jsonl')
    run(collect, out=again, answers=out, annotator='reward_model',
        reward_model=checkpoint(tmp_path / 'reward', reward_head=True))
    assert [row['ended'] for row in read_records(again, 'rankings')] == [[True, False, False], [True, True]]
    said = capsys.readouterr().out
    assert '2 of 5 answers were cut off before their end\n' in said # max_new_tokens has no part in it
    assert read_records(again, 'rankings')[0]['scores'][0] != read_records(again, 'rankings')[0]['scores'][1]

def test_the_best_answer_may_be_one_that_was_cut_off(tmp_path, cut, monkeypatch):
    monkeypatch.setattr(world, 'gold', lambda prompt, response: float(ord((response or ' ')[0])))
    run(collect, out=str(tmp_path / 'best.jsonl'), keep='best', noise=0.0, **cut)
    first, second = read_records(tmp_path / 'best.jsonl', 'demonstrations')
    assert (first['response'], first['ended'], second['ended']) == ('x', False, True)
    assert dialogue(TOK, first)[0][-2:] == [*b' x'] and dialogue(TOK, second)[0][-1] == 256

def test_ends_stay_with_their_policies_and_survive_a_stop(tmp_path, cut, monkeypatch):
    """The policies get two and one answer to each of two prompts; a kill after the first row."""
    sampled = lambda model, prompts, *a: (CUT[:4] if len(prompts) == 4 else CUT[4:], [])
    monkeypatch.setattr(collect, 'sample_answers', sampled)
    options = cut | dict(policy=f"{cut['policy']},{checkpoint(tmp_path / 'other', seed=3)}")
    at = lambda name: str(tmp_path / name)
    run(collect, out=at('whole.jsonl'), **options)
    row, _ = rows = read_records(at('whole.jsonl'), 'rankings')
    assert (row['responses'], row['ended']) == (['ab', 'ab', '\ufffd'], [True, False, True])
    assert len(row['policies']) == 3 and (rows[1]['responses'], rows[1]['ended']) == (['x', 'c'], [False, True])
    records(at('halves.jsonl.partial'), rows[:1])
    run(collect, out=at('halves.jsonl'), resume=True, **options)
    assert read_records(at('halves.jsonl'), 'rankings') == rows

def test_what_prompts_ended_in_is_nothing_to_a_new_answer(tmp_path, given):
    """Prompts from demonstrations, which have one `ended`."""
    rows = [row | dict(response='x', ended=False) for row in read_records(given['prompts'], 'prompts')]
    run(collect, out=str(tmp_path / 'r.jsonl'), **given | dict(prompts=records(tmp_path / 'd.jsonl', rows)))
    assert all(len(row['ended']) == len(row['responses']) for row in read_records(tmp_path / 'r.jsonl', 'rankings'))

# ---------------------------------------------------------------------------------------------------------------------
# ends without rankings

def test_nothing_written_is_no_success(tmp_path, given, monkeypatch, capsys):
    monkeypatch.setattr(collect, 'sample_answers', lambda model, prompts, *a: ([[32, 256]] * len(prompts), []))
    out = str(tmp_path / 'r.jsonl')
    for options in ({}, dict(select='diverse', budget=2)):
        said = stops(capsys, collect, code=1, out=out, **given | options)
        assert said == f"--out={out}: not written, no prompt was ranked"
        assert sorted(os.listdir(tmp_path)) == ['prompts.jsonl', 'sft']
    with pytest.raises(SystemExit):
        run(collect, out=out, **given)
    assert '0 prompts, 0 answers, 0 pairs, 10 prompts left out (without two answers that' in capsys.readouterr().out

def test_answers_beside_a_config_file_that_names_prompts(tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text("prompts = 'p.jsonl'\ngold = 'data.toy.world:gold'\n")
    said = one_line(capsys, lambda: parse_config(collect.Config, [str(config), '--answers=a.jsonl']))
    assert said == (f"{config}:1: prompts must be a file of prompts, unless answers is given (an empty --prompts= "
                    "takes back what a config file says), got 'p.jsonl'")
    assert parse_config(collect.Config, [str(config), '--answers=a.jsonl', '--prompts=']).answers == 'a.jsonl'

def poisoned(folder, **more):
    """Save a model of finite weights whose scores and probabilities are not finite."""
    model = GPT.from_pretrained(checkpoint(folder, **more))
    with torch.no_grad():
        model.h[0].ln_1.weight.fill_(1e30)
    model.save_pretrained(folder)
    return str(folder)

@pytest.mark.parametrize('options, whose', [
    (dict(policy='{policy}', answers=''), '--policy={policy}: its probabilities'),
    (dict(annotator='reward_model', reward_model='{reward}'), '--annotator=reward_model: its scores of an answer'),
    (dict(annotator='ai', judge='{policy}', judge_instruction='{told}'), '--annotator=ai: its scores of an answer'),
    (dict(select='uncertain', budget=1, ensemble='{reward},{reward}'), '--ensemble={reward}: its scores'),
])
def test_a_broken_model_ends_the_run(tmp_path, given, capsys, options, whose):
    (tmp_path / 'told.txt').write_text('Which?')
    at = dict(policy=poisoned(tmp_path / 'policy'), reward=poisoned(tmp_path / 'reward', reward_head=True),
              told=tmp_path / 'told.txt')
    rows = [row | dict(responses=['a', 'b'], ranks=[0, 1]) for row in read_records(given['prompts'], 'prompts')]
    given |= dict(answers=records(tmp_path / 'a.jsonl', rows), out=str(tmp_path / 'r.jsonl'))
    given |= {k: v.format(**at) if isinstance(v, str) else v for k, v in options.items()}
    given |= dict(gold='') if 'annotator' in options else {}
    if given['answers']: # then nothing is sampled
        given = {k: v for k, v in given.items() if k not in ('prompts', 'policy', 'n_answers', 'max_new_tokens')}
    said = stops(capsys, collect, code=1, **given)
    assert said == whose.format(**at) + ' are not finite; wanted sound weights, or --dtype=float32'
    assert not os.path.exists(given['out'])

def test_what_was_ranked_before_a_score_of_nan_can_be_read(tmp_path, given, monkeypatch, capsys):
    answers = records(tmp_path / 'a.jsonl', [dict(prompt=f'{n}', responses=['a', 'b'], ranks=[0, 1]) for n in range(4)])
    monkeypatch.setattr(world, 'gold', lambda record, response: float(
        'nan' if (record['prompt'], response) == ('2', 'b') else len(response)))
    options = dict(gold=given['gold'], answers=answers, out=str(tmp_path / 'r.jsonl'))
    with pytest.raises(SystemExit) as stopped:
        run(collect, **options)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "error: --gold=data.toy.world:gold: wanted a finite number, got nan for the response 'b'" in said
    assert [row['prompt'] for row in read_lines_of(options['out'] + '.partial')] == ['0', '1']

# ---------------------------------------------------------------------------------------------------------------------
# OUT.partial

def test_resume_auto_goes_on_or_starts(tmp_path, given, monkeypatch):
    whole, out = str(tmp_path / 'whole.jsonl'), str(tmp_path / 'r.jsonl')
    run(collect, out=whole, resume='auto', **given)
    with monkeypatch.context() as m:
        interrupted(m, 2)
        assert launch(m, collect, out=out, resume='auto', **given) == 130
    run(collect, out=out, resume='auto', **given)
    with open(whole, 'rb') as a, open(out, 'rb') as b:
        assert a.read() == b.read()

def test_one_partial_holds_no_two_kinds_of_rows(tmp_path, given, monkeypatch, capsys):
    """What shapes the rows stays the same, wherever a model lies. Older versions did not write it down."""
    at = lambda name: str(tmp_path / name)
    gold = given['gold']
    given |= dict(annotator='reward_model', reward_model=checkpoint(at('reward'), reward_head=True), out=at('r.jsonl'),
                  gold='')
    with monkeypatch.context() as m:
        interrupted(m, 2)
        assert launch(m, collect, **given) == 130
    with open(at('r.jsonl.partial'), 'rb') as f:
        before = f.read()
    numbered = [row | dict(number='x') for row in read_records(given['prompts'], 'prompts')]
    for change in (dict(seed=5), dict(n_answers=4), dict(max_new_tokens=4), dict(temperature=0.5), dict(tie=1.0),
                   dict(rows=2), dict(repeat=0.3), dict(keep='best'),
                   dict(annotator='simulated', reward_model='', gold=gold),
                   dict(policy=checkpoint(at('other'), seed=3)), dict(prompts=records(at('other.jsonl'), numbered)),
                   dict(reward_model=checkpoint(at('other_reward'), seed=3, reward_head=True))):
        said = stops(capsys, collect, resume=True, **given | change)
        assert said.startswith(f"--{(*change,)[0]}={(*change.values(),)[0]}: {at('r.jsonl.partial')} began with "), said
    with open(at('r.jsonl.partial'), 'rb') as f:
        assert f.read() == before
    shutil.copytree(given['policy'], at('moved'))
    shutil.copytree(tmp_path, at('old'))
    capsys.readouterr()
    run(collect, resume=True, **given | dict(policy=at('moved'), max_prompts=8))
    assert 'older' not in capsys.readouterr().out and not os.path.exists(at('r.jsonl.partial.json'))
    os.remove(at('old/r.jsonl.partial.json'))
    run(collect, resume=True, **given | dict(out=at('old/r.jsonl')))
    assert 'r.jsonl.partial: of an older version, its options' in capsys.readouterr().out

def test_a_partial_can_be_merged_where_all_is_ranked_once(tmp_path, given, monkeypatch, capsys):
    said = [[*f' {letter}'.encode(), 256] for letter in 'abc']
    monkeypatch.setattr(collect, 'sample_answers', lambda model, prompts, *a: (said * (len(prompts) // 3), []))
    for name, options in dict(a={}, b=dict(seed=2), c=dict(repeat=0.4)).items():
        with monkeypatch.context() as m:
            interrupted(m, 2)
            assert launch(m, collect, out=str(tmp_path / name), **given | options) == 130
        assert ('read it as it is' in capsys.readouterr().out) == (name != 'c')
    run(collect, merge=f"{tmp_path}/a.partial,{tmp_path}/b.partial", out=str(tmp_path / 'both.jsonl'))
    assert [row['raters'] for row in read_records(tmp_path / 'both.jsonl', 'rankings')] == [2] * 6
    run(collect, out=str(tmp_path / 'a'), resume=True, max_prompts=6, **given) # nothing more is asked
    assert len(read_records(tmp_path / 'a', 'rankings')) == 6

def test_an_empty_partial_does_not_block(tmp_path, given):
    out = str(tmp_path / 'r.jsonl')
    open(out + '.partial', 'w').close() # of a run that ended before its first row
    run(collect, out=out, **given)
    assert len(read_records(out, 'rankings')) > 0 and not os.path.exists(out + '.lock')

def test_two_at_once_do_not_mix(tmp_path, given, capsys):
    out = str(tmp_path / 'r.jsonl')
    with open(out + '.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX) # as another process holds it
        assert 'r.jsonl.lock is locked' in stops(capsys, collect, out=out, **given)
        assert not os.path.exists(out + '.partial')
    run(collect, out=out, **given)
    assert sorted(os.listdir(tmp_path)) == ['prompts.jsonl', 'r.jsonl', 'sft']

@pytest.mark.parametrize('change, expected', [
    (dict(prompt='Another'), 'holds other prompts than those of this run'),
    (dict(prompt=7), ':1: wanted `prompt` to be text'),
    (dict(responses=['a', 7, 'c']), ':1: wanted `responses` to be a'),
    (dict(ranks=[0]), ':1: wanted `ranks` to be 3 integers'), (dict(ended=[True]), ':1: wanted `ended` to be 3 times'),
    (dict(ranks=None), ':1: wanted `ranks` to be 3'), (dict(repeat=5), ':1: wanted `repeat` to be the number'),
    (dict(repeat='x'), ':1: wanted `repeat` to be the number'),
    (dict(scores=[1, 2, 1e300]), ':1: wanted `scores` to be'),
])
def test_other_rows_than_those_of_this_run(tmp_path, given, capsys, change, expected):
    prompt = read_records(given['prompts'], 'prompts')[0]
    row = prompt | dict(responses=['a', 'b', 'c'], ended=[True] * 3, ranks=[0, 1, 2], scores=[1.0, 2.0, 3.0]) | change
    partial = records(tmp_path / 'r.jsonl.partial', [row])
    assert expected in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), resume=True, **given)
    assert read_lines_of(partial) == [row]

def read_lines_of(path):
    with open(path) as f:
        return [json.loads(line) for line in f]

def test_sigterm_keeps_what_is_ranked(tmp_path, given, monkeypatch):
    out = str(tmp_path / 'r.jsonl')
    with monkeypatch.context() as m:
        interrupted(m, 2, signal.SIGTERM)
        assert launch(m, collect, out=out, **given) == 143
    assert len(read_lines_of(out + '.partial')) == 6
    run(collect, out=out, resume=True, **given)
    assert not os.path.exists(out + '.partial') and len(read_records(out, 'rankings')) > 0

def test_out_is_written_before_the_annotator_closes(tmp_path, given, monkeypatch):
    """A page's server may take its time."""
    out, seen = str(tmp_path / 'r.jsonl'), []
    monkeypatch.setattr(SimulatedPerson, 'close', lambda self: seen.append(os.path.exists(out)) or '')
    run(collect, out=out, **given)
    assert seen == [True]

# ---------------------------------------------------------------------------------------------------------------------
# what is refused

def test_what_comes_with_prompts_is_not_what_is_ranked(tmp_path, given, monkeypatch):
    """Prompts from a file of answers: neither the old answers nor what was said of them gets into the rankings."""
    said = dict(response='old', label=True, responses=['a', 'b'], ranks=[0, 1], policies=['p', 'q'], scores=[1.0, 2.0])
    old = [dict(said, prompt=row['prompt'], annotator='Anna', number=n)
           for n, row in enumerate(read_records(given['prompts'], 'prompts'))]
    out = str(tmp_path / 'r.jsonl')
    run(collect, out=out, **given | dict(prompts=records(tmp_path / 'old.jsonl', old)))
    rows = read_records(out, 'rankings')
    keys = {'prompt', 'number', 'responses', 'ended', 'ranks', 'scores', 'annotator'}
    assert len(rows) > 0 and all(row.keys() == keys
                                 and 'a' not in row['responses'] and row['annotator'] == 'simulated' for row in rows)

@pytest.mark.parametrize('options, expected', [
    (dict(n_answer=3), '--n_answer=3: unknown option n_answer, did you mean n_answers?'),
    (dict(n_answers=1), '--n_answers=1: n_answers must be at least 2, got 1'),
    (dict(gold=''), 'gold must be MODULE:FUNCTION with annotator=simulated, as in data.toy.world:gold'),
    (dict(gold='data.toy.world:silver'), '--gold=data.toy.world:silver: cannot be imported'),
    (dict(noise=-1), '--noise=-1: noise must be at least 0, got -1.0'),
    (dict(noise='much'), "--noise=much: noise must be float, got 'much'"),
    (dict(temperature=0), '--temperature=0: temperature must be above 0, got 0.0'),
    (dict(annotator='oracle'), '--annotator=oracle: annotator must be one of simulated'),
    (dict(keep='worst'), "--keep=worst: keep must be all or best, got 'worst'"),
    (dict(annotator='reward_model'), "reward_model must be a reward model's folder with annotator=reward_model"),
    (dict(reward_model='out/reward'), "else empty, got 'out/reward'"),
    (dict(annotator='reward_model', reward_model='nowhere', gold=''), 'nowhere'),
    (dict(prompts=''), "prompts must be a file of prompts, unless answers is given, got ''"),
    (dict(prompts='nowhere.jsonl'), 'nowhere.jsonl: no such file'),
    (dict(policy='nowhere'), 'nowhere'),
    (dict(max_new_tokens=64), 'wanted block_size above max_new_tokens'),
    (dict(resume=True), '.partial: no such file'),
])
def test_bad_options(tmp_path, given, capsys, options, expected):
    assert expected in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), **given | options)
    assert sorted(os.listdir(tmp_path)) == ['prompts.jsonl', 'sft'] # nothing half-written

@pytest.mark.parametrize('options, expected', [
    (dict(page=True), '--page=True: page must be False unless annotator=human, got True'),
    (dict(page=True, rater='Anna', guidelines='g.txt'), '--page=True: page must be False unless annotator=human'),
    (dict(rater='Anna'), "--rater=Anna: rater must be left at '': only annotator=human reads it, got 'Anna'"),
    (dict(guidelines='g.txt'), "--guidelines=g.txt: guidelines must be left at '': only page=True reads it"),
    (dict(port=8000), '--port=8000: port must be left at 0: only page=True reads it'),
    (dict(judge='out/judge'), '--judge=out/judge: judge must be a checkpoint with annotator=ai'),
    (dict(split=2, page=True), '--page=True: page must be left at False: only a run without split reads it'),
    (dict(split=2, rater='Anna'), "--rater=Anna: rater must be left at '': only a run without split reads it"),
])
def test_an_option_of_another_annotator_is_named_before_gold(tmp_path, capsys, options, expected):
    """Who forgets --annotator=human is told about their own option, not about that of the default annotator."""
    answers = records(tmp_path / 'a.jsonl', [dict(prompt='Q', responses=['a', 'b'], ranks=[0, 1])])
    assert stops(capsys, collect, answers=answers, out=str(tmp_path / 'r.jsonl'), **options).startswith(expected)

def test_help_lines_are_whole():
    """--help shows one line of an option: a comment that goes on in the next line of the source breaks off there."""
    n = 0
    for path in test_layout.source():
        lines = test_layout.read(path).splitlines()
        for kind in (node for node in ast.walk(ast.parse('\n'.join(lines))) if isinstance(node, ast.ClassDef)
                     and any('dataclass' in ast.unparse(said) for said in node.decorator_list)):
            for field in (node for node in kind.body if isinstance(node, ast.AnnAssign)):
                line, after = lines[field.lineno - 1], ''.join(lines[field.end_lineno:][:1])
                n += '#' in line
                assert not re.search(r'[;,:(]$|\b(and|or|of|the)$', line.strip()), f'{path}:{field.lineno}'
                assert '#' not in line or not after.strip().startswith('#'), f'{path}:{field.lineno}'
    assert n > 200

def test_the_help_names_all_annotators(capsys):
    with pytest.raises(SystemExit):
        parse_config(collect.Config, ['--help'])
    one_line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('  --annotator='))
    assert {'simulated', 'human', 'ai', 'reward_model', 'function', 'policy'} <= {*re.findall(r'\w+', one_line)}

def test_other_bad_input(tmp_path, given, capsys):
    out = str(tmp_path / 'r.jsonl')
    head = checkpoint(tmp_path / 'head', reward_head=True)
    assert stops(capsys, collect, out=out, **given | dict(policy=head)) == (
        f"--policy={head}: is a reward model, wanted a language model")
    path = tmp_path / 'bad.jsonl'
    path.write_text('{"prompt": "Where does the fox live?"}\n{"prompt": "Write a poem about rain."}\n')
    assert stops(capsys, collect, out=out, **given | dict(prompts=str(path))) == (
        "--gold=data.toy.world:gold: ValueError: not a prompt of the toy world: 'Write a poem about rain.' "
        f"({world.__file__}:143), called with '' and the record {path}: {{'prompt': 'Write a poem about rain.'}}")
    assert stops(capsys, collect, out=str(tmp_path), overwrite=True, **given) == (
        f"--out={tmp_path}: is a folder, wanted a file")
    assert 'max_prompts must be at least 0' in stops(capsys, collect, out=out, max_prompts=-1, **given)
    path.write_text('{"prompt": "Hi"}\n{"prompt": ""}\n')
    assert stops(capsys, collect, out=out, **given | dict(prompts=str(path))).startswith(f"{path}:2: ")
    assert not os.path.exists(out) and not os.path.exists(out + '.partial')
    (tmp_path / 'r.jsonl').write_text('precious\n')
    assert 'exists already' in stops(capsys, collect, out=out, **given)
    assert (tmp_path / 'r.jsonl').read_text() == 'precious\n'

# ---------------------------------------------------------------------------------------------------------------------
# ratings, and annotators that go by a reward

def test_ratings_are_one_record_an_answer(tmp_path, given, monkeypatch, capsys):
    """Of "a a b" the distinct two, in their order, each with who wrote it; gold 1 and 0.25 on a scale of 5 are 5, 2."""
    a, b = [32, 97, 256], [32, 98] # per prompt the first policy gives two answers, the other one
    sampled = lambda model, prompts, *_: ([a, b] * 2 if len(prompts) == 4 else [a] * len(prompts), [])
    monkeypatch.setattr(collect, 'sample_answers', sampled)
    monkeypatch.setattr(world, 'gold', lambda record, response: 1.0 if response == 'a' else 0.25)
    other, out = checkpoint(tmp_path / 'other', seed=3), str(tmp_path / 'r.jsonl')
    records(given['prompts'], [row | dict(helpful=3) for row in read_records(given['prompts'], 'prompts')])
    run(collect, out=out, ask='ratings', noise=0.0, max_prompts=2, **given | dict(policy=f"{given['policy']},{other}"))
    prompts = read_records(given['prompts'], 'prompts')[:2] # other people's numbers are not written
    assert read_records(out, 'ratings') == [
        {k: v for k, v in prompt.items() if k != 'helpful'}
        | dict(annotator='simulated', response=text, ended=ended, score=score, policy=policy)
        for prompt in prompts
        for text, ended, score, policy in (
            ('a', True, 5, f"{given['policy']},{other}"), ('b', False, 2, given['policy']))]
    assert '2 prompts, 4 answers rated from 1 to 5, 0 prompts left out' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['other', 'prompts.jsonl', 'r.jsonl', 'sft']

def test_lone_answers_are_rated_and_empty_ones_are_not(tmp_path, given, monkeypatch, capsys):
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: ([[32, 97, 256], [32, 256]], []))
    out = str(tmp_path / 'r.jsonl')
    run(collect, out=out, ask='ratings', max_prompts=2, **given | dict(n_answers=1))
    assert [row['response'] for row in read_records(out, 'ratings')] == ['a']
    said = capsys.readouterr().out
    assert '1 prompts, 1 answers rated from 1 to 5, 1 prompts left out (skipped, or all answers empty)\n' in said
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: ([[32, 256], [32, 256]], []))
    assert stops(capsys, collect, code=1, out=str(tmp_path / 'none.jsonl'), ask='ratings', max_prompts=2,
                 **given | dict(n_answers=1)) == f"--out={tmp_path}/none.jsonl: not written, no prompt was rated"

@pytest.mark.parametrize('cut', [6, 5, 3])
def test_stopped_ratings_go_on_exactly(tmp_path, given, monkeypatch, cut):
    """Stretches of three: a kill at the end of the second, or within one, which is then rated as a whole."""
    at = lambda name: str(tmp_path / name)
    options = given | dict(ask='ratings', qualities='helpful,harmless,honest')
    run(collect, out=at('whole.jsonl'), **options)
    with monkeypatch.context() as m:
        interrupted(m, 2)
        assert launch(m, collect, out=at('halves.jsonl'), **options) == 130
    rows = read_lines_of(at('halves.jsonl.partial'))
    assert len(rows) == 6 and all(len(row['ratings']) == len(row['responses']) for row in rows if 'ratings' in row)
    records(at('halves.jsonl.partial'), rows[:cut])
    run(collect, out=at('halves.jsonl'), resume=True, **options)
    with open(at('whole.jsonl'), 'rb') as a, open(at('halves.jsonl'), 'rb') as b:
        assert a.read() == b.read()
    assert all(1 <= row[q] <= 10 for row in read_records(at('whole.jsonl'), 'ratings')
               for q in ('helpful', 'harmless', 'honest'))

@pytest.mark.parametrize('ratings', [7, [], [{}, {}], [{'score': 'x'}] * 3, [3, 3, 3]])
def test_ratings_in_a_partial_are_checked(tmp_path, given, capsys, ratings):
    row = read_records(given['prompts'], 'prompts')[0] | dict(responses=['a', 'b', 'c'], ratings=ratings)
    partial = records(tmp_path / 'r.jsonl.partial', [row])
    said = stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), resume=True, ask='ratings', **given)
    assert said == f"{partial}:1: wanted `ratings` to be an object of numbers for each response"

def test_a_function_as_annotator(tmp_path, given):
    """It gets the record with all that the prompts' file says; a file of one's own, with an argument."""
    (tmp_path / 'mine.py').write_text('def longest(record, response, sign=1):\n'
                                      '    assert record["number"] >= 0\n    return sign * len(response)\n')
    given |= dict(gold='', annotator='function')
    for sign in (1, -1):
        out = str(tmp_path / f'{sign}.jsonl')
        run(collect, out=out, reward=f'{tmp_path}/mine.py:longest(sign={sign})', **given)
        rows = read_records(out, 'rankings')
        assert len(rows) > 3 and all(row['scores'] == [sign * len(text) for text in row['responses']] for row in rows)
        assert all(row['scores'][row['ranks'].index(0)] == max(row['scores']) and row['annotator'] == 'function'
                   for row in rows)

def test_the_policy_as_annotator(tmp_path, given):
    other, files = checkpoint(tmp_path / 'other', seed=3), {}
    for name, reference in (('rrhf', ''), ('dpo', other), ('self', given['policy'])):
        files[name] = str(tmp_path / f'{name}.jsonl')
        run(collect, out=files[name], annotator='policy', reward_policy=given['policy'], reward_reference=reference,
            tie=1e-3, **given | dict(gold=''))
    rrhf, dpo, same = (read_records(path, 'rankings') for path in files.values())
    assert len(rrhf) > 3 and all(score < 0 for row in rrhf for score in row['scores'])
    assert [row['responses'] for row in rrhf] == [row['responses'] for row in dpo]
    assert any(a['ranks'] != b['ranks'] for a, b in zip(rrhf, dpo))
    assert all(set(row['ranks']) == {0} for row in same) # log pi - log pi: all answers are equal

@pytest.mark.parametrize('options, expected', [
    (dict(annotator='function', gold=''), 'reward must be MODULE:FUNCTION or FILE.py:FUNCTION with annotator=function'),
    (dict(reward='data.toy.world:gold'), "with annotator=function, else empty, got 'data.toy.world:gold'"),
    (dict(annotator='function', gold='', reward='nowhere.py:f'), '--reward=nowhere.py:f: cannot be imported'),
    (dict(annotator='function', gold='', reward='math:pi'), '--reward=math:pi: is no function'),
    (dict(annotator='function', gold='', reward='operator:getitem'), '--reward=operator:getitem: KeyError'),
    (dict(annotator='policy', gold=''), "reward_policy must be a language model's folder with annotator=policy"),
    (dict(reward_policy='out/sft'), "else empty, got 'out/sft'"),
    (dict(reward_reference='out/sft'), 'reward_reference must be empty unless annotator=policy'),
    (dict(annotator='policy', gold='', reward_policy='nowhere'), 'nowhere'),
    (dict(annotator='policy', gold='', reward_policy='{head}'), '--reward_policy={head}: is a reward model, wanted a'),
    (dict(annotator='policy', gold='', reward_policy='{sft}', reward_reference='{short}'), '--reward_reference='),
    (dict(ask='stars'), 'ask must be ranks, or with annotator=simulated or human ratings'),
    (dict(ask='ratings', annotator='reward_model', gold='', reward_model='x'), 'ask must be ranks, or with annotator'),
    (dict(ask='ratings', qualities='helpful,nice'), 'qualities must be some of helpful,harmless,honest,score, each'),
    (dict(ask='ratings', qualities='score,score'), 'each once'), (dict(ask='ratings', qualities=''), 'each once'),
    (dict(ask='ratings', scale=1), '--scale=1: scale must be from 2 to 10, or 0'),
    (dict(ask='ratings', scale=11), 'from 2 to 10, or 0'),
    (dict(scale=5), 'scale must be left at 0: only ask=ratings reads it, got 5'),
    (dict(qualities='helpful'), "qualities must be left at 'score': only ask=ratings reads it"),
    (dict(ask='ratings', keep='best'), "keep must be left at 'all': only ask=ranks reads it"),
    (dict(ask='ratings', repeat=0.1), 'repeat must be left at 0.0: only ask=ranks reads it'),
    (dict(ask='ratings', compare='x.jsonl'), "compare must be left at '': only ask=ranks reads it"),
    (dict(ask='ratings', tie=0.1), 'tie must be left at 0.0: only ask=ranks reads it'),
])
def test_bad_options_of_ratings_and_rewards(tmp_path, given, capsys, options, expected):
    at = dict(head=checkpoint(tmp_path / 'head', reward_head=True), sft=given['policy'],
              short=checkpoint(tmp_path / 'short', block_size=32))
    options = {k: v.format(**at) if isinstance(v, str) else v for k, v in options.items()}
    assert expected.format(**at) in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), **given | options)
    assert sorted(os.listdir(tmp_path)) == ['head', 'prompts.jsonl', 'sft', 'short']

def test_ratings_are_not_merged_as_rankings(tmp_path, capsys):
    paths = [records(tmp_path / f'{n}.jsonl', [dict(prompt='p', response='x', score=n)]) for n in (1, 2)]
    assert 'wanted rankings' in stops(capsys, collect, merge=','.join(paths), out=str(tmp_path / 'out.jsonl'))

# ---------------------------------------------------------------------------------------------------------------------
# several raters

def parts_of(folder, n):
    return [read_records(folder / f'tasks_{k + 1}.jsonl', 'rankings') for k in range(n)]

def test_prompts_are_dealt(tmp_path, capsys):
    """Ten: round(0.2 * 10) = 2 go to all three, of the other eight 3, 3 and 2 to each. By the seed, in their order."""
    rows = [dict(prompt=f'Q{n}', responses=['a', 'b', 'a'], ended=[True, False, True], ranks=[2, 0, 1], number=n,
                 scores=[1.0, 2.0, 3.0], rater='old', seconds=3.0, again=[0, 1, 2]) for n in range(10)]
    answers, out = records(tmp_path / 'a.jsonl', rows), str(tmp_path / 'new' / 'tasks.jsonl')
    options = dict(split=3, overlap=0.2, answers=answers, out=out)
    run(collect, **options)
    parts = parts_of(tmp_path / 'new', 3)
    assert sorted(os.listdir(tmp_path / 'new')) == ['tasks_1.jsonl', 'tasks_2.jsonl', 'tasks_3.jsonl']
    assert f'{tmp_path}/new/tasks_3.jsonl: 4 prompts, 2 of them for all raters' in capsys.readouterr().out
    numbers = [[row['number'] for row in part] for part in parts]
    assert [len(part) for part in numbers] == [5, 5, 4] and all(part == sorted(part) for part in numbers)
    times = sorted(sum(part.count(n) for part in numbers) for n in range(10))
    assert times == [1] * 8 + [3] * 2
    assert all(row == dict(prompt=f"Q{row['number']}", responses=['a', 'b', 'a'], ended=[True, False, True],
                           ranks=[0, 0, 0], number=row['number']) for part in parts for row in part)
    before = [open(tmp_path / 'new' / f'tasks_{k}.jsonl').read() for k in (1, 2, 3)]
    os.remove(tmp_path / 'new' / 'tasks_1.jsonl')
    assert 'tasks_2.jsonl exists already' in stops(capsys, collect, **options)
    assert sorted(os.listdir(tmp_path / 'new')) == ['tasks_2.jsonl', 'tasks_3.jsonl'] # nothing half done
    run(collect, overwrite=True, **options)
    assert parts_of(tmp_path / 'new', 3) == parts and open(tmp_path / 'new' / 'tasks_1.jsonl').read() == before[0]
    run(collect, overwrite=True, seed=2, **options)
    assert parts_of(tmp_path / 'new', 3) != parts

@pytest.mark.parametrize('overlap, sizes', [(0, [4, 3, 3]), (1, [10, 10, 10]), (0.5, [7, 7, 6])])
def test_shares_of_all_raters(tmp_path, overlap, sizes):
    """None or all of ten; five and a share of the other five: 2, 2, 1."""
    rows = [dict(prompt=f'Q{n}', responses=['a', 'b'], ranks=[0, 1]) for n in range(10)]
    path = records(tmp_path / 'a.jsonl', rows)
    run(collect, split=3, overlap=overlap, answers=path, out=str(tmp_path / 'tasks.jsonl'))
    assert [len(part) for part in parts_of(tmp_path, 3)] == sizes

def test_equal_answers_are_not_dealt_and_an_older_deal_is_named(tmp_path, capsys):
    rows = [dict(prompt=f'Q{n}', responses=['a', 'a' if n == 1 else 'b'], ranks=[0, 0]) for n in range(4)]
    rows[2] |= dict(responses=['a', 'a'], ended=[True, False]) # one was cut off: it is another answer
    options = dict(answers=records(tmp_path / 'a.jsonl', rows), out=str(tmp_path / 'tasks.jsonl'))
    run(collect, split=3, **options)
    assert sorted(row['prompt'] for part in parts_of(tmp_path, 3) for row in part) == ['Q0', 'Q2', 'Q3']
    said = capsys.readouterr().out
    assert said.endswith('1 prompts left out (fewer than two different answers that are not empty)\n')
    run(collect, split=2, overwrite=True, **options)
    assert capsys.readouterr().out.endswith(
        f'of an earlier deal, not to be ranked any more: {tmp_path}/tasks_3.jsonl\n')

def test_raters_see_the_same_answers(tmp_path, given, monkeypatch, capsys):
    """Sampled once, before they are dealt. Then each ranks their part, and the merge says who agrees with whom."""
    del given['gold']
    run(collect, split=2, overlap=0.5, out=str(tmp_path / 'tasks.jsonl'), **given)
    one, two = parts_of(tmp_path, 2)
    shared = [row for row in one if row in two]
    prompts = {row['number'] for row in one + two}
    assert len(shared) == round(0.5 * len(prompts)) >= 2 and len(one) + len(two) == len(prompts) + len(shared)
    assert all(len(row['responses']) == len(row['ended']) >= 2 for row in one + two)
    assert f'{10 - len(prompts)} prompts left out' in capsys.readouterr().out
    (tmp_path / 'mine.py').write_text('def length(record, response, sign):\n    return sign * len(response)\n')
    for part, sign, name in ((1, 1, 'long'), (2, -1, 'short')): # these two have another opinion wherever they can
        run(collect, annotator='function', reward=f'{tmp_path}/mine.py:length(sign={sign})',
            answers=str(tmp_path / f'tasks_{part}.jsonl'), out=str(tmp_path / f'{name}.jsonl'))
    run(collect, merge=f'{tmp_path}/long.jsonl,{tmp_path}/short.jsonl', out=str(tmp_path / 'both.jsonl'))
    said, merged = capsys.readouterr().out, read_records(tmp_path / 'both.jsonl', 'rankings')
    differ = lambda rows: {row['number'] for row in rows if len({*zip(row['responses'], row['ended'])}) > 1}
    both, either = len(differ(shared)), len(differ(one + two)) # where there is something to agree on
    assert f'{tmp_path}/long.jsonl and {tmp_path}/short.jsonl: {both} prompts in common' in said
    assert len(merged) == either > both > 0 and sum(row['raters'] == 2 for row in merged) == both

@pytest.mark.parametrize('options, expected', [
    (dict(split=1), '--split=1: split must be from 2 to 100, or 0, got 1'), (dict(split=-3), 'from 2 to 100'),
    (dict(split=2, overlap=1.5), '--overlap=1.5: overlap must be between 0 and 1, got 1.5'),
    (dict(overlap=0.2), 'overlap must be left at 0.0: only split reads it'),
    (dict(split=2, merge='a,b', answers=''), 'split must be left at 0: only a run without merge reads it'),
    (dict(split=2, answers=''), 'prompts must be a file of prompts, unless answers is given'),
    (dict(split=3), '--split=3: 2 prompts have two different answers; wanted one for each rater at least'),
    (dict(split=2, annotator='human'), "annotator must be left at 'simulated': only a run without split reads it"),
    (dict(annotator='human', rater='a\nb'), "rater must be a person's name, got 'a\\nb'"),
    (dict(annotator='human', rater=' anna'), "rater must be a person's name"),
])
def test_bad_options_of_several_raters(tmp_path, capsys, options, expected):
    rows = [dict(prompt=f'Q{n}', responses=['a', 'b'], ranks=[0, 1]) for n in range(2)]
    path = records(tmp_path / 'a.jsonl', rows)
    gold = {} if options.keys() & {'split', 'annotator'} else dict(gold='x:y')
    said = stops(capsys, collect, out=str(tmp_path / 'out.jsonl'), **dict(answers=path) | gold | options)
    assert expected in said and os.listdir(tmp_path) == ['a.jsonl'], said
