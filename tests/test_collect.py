"""collect.py: the records, resuming from OUT.partial, and what is refused."""
import json
import os
import random
import signal
from types import SimpleNamespace

import pytest
import torch

import collect
import sft
from common.records import read_records
from data.toy import world
from feedback.annotators import RewardModel
from tiny import RUN, checkpoint, launch, records, run, stops

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
        assert set(row) == {'prompt', 'number', 'responses', 'ranks', 'scores', 'annotator'}
        assert row['annotator'] == 'simulated' and 2 <= len(row['responses']) == len(row['ranks']) == len(row['scores'])
        assert row['scores'] == [world.gold(row['prompt'], r) for r in row['responses']]
    assert len({tuple(row['responses']) for row in rows}) > 1 and any(len(set(row['responses'])) > 1 for row in rows)
    assert not os.path.exists(out + '.partial')
    said = capsys.readouterr().out
    pairs = sum(a < b for row in rows for a in row['ranks'] for b in row['ranks'])
    assert f"{len(rows)} prompts, {sum(len(row['ranks']) for row in rows)} answers, {pairs} pairs" in said

def test_the_reward_model_as_annotator(tmp_path, given):
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    run(collect, out=str(tmp_path / 'r.jsonl'), annotator='reward_model', reward_model=folder, **given)
    rows = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert len(rows) >= 4 and all(row['annotator'] == 'reward_model' for row in rows)
    someone = RewardModel(SimpleNamespace(reward_model=folder, tie=0.0, seed=1), RUN)
    for row in rows:
        someone.look_ahead([row]) # alone
        ranks, scores = someone.rank(row['prompt'], row['responses'])
        assert row['ranks'] == ranks and row['scores'] == pytest.approx(scores, abs=1e-6)

def test_keep_best_writes_demonstrations(tmp_path, given, monkeypatch, capsys):
    """The later in the alphabet the better: of "a c b" the second, of "b a b" the first; the third prompt has one."""
    letters = [[32, 97], [32, 99], [32, 98], [32, 98], [32, 97], [32, 98], [32, 97], [32], [32]]
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: ([x + [256] for x in letters], None))
    monkeypatch.setattr(world, 'gold', lambda prompt, response: float(ord(response or ' ')))
    out = str(tmp_path / 'best.jsonl')
    run(collect, out=out, keep='best', noise=0.0, max_prompts=3, **given)
    asked = [row['prompt'] for row in read_records(given['prompts'], 'prompts')]
    assert read_records(out, 'demonstrations') == [dict(prompt=asked[0], response='c'),
                                                   dict(prompt=asked[1], response='b')]
    assert 'the best answers kept, 1 prompts left out' in capsys.readouterr().out
    run(sft, out_dir=str(tmp_path / 'out'), init_from=given['policy'], train_data=out, max_steps=1, batch_size=2)

def test_empty_answers_are_left_out(tmp_path, given, monkeypatch, capsys):
    """" a" and " b" remain of the first prompt; the second has one answer left, which cannot be ranked."""
    answers = [[32, 97, 256], [32, 256], [32, 98, 256], [256], [32, 99, 256], [32, 32, 256]]
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: (answers, None))
    run(collect, out=str(tmp_path / 'r.jsonl'), max_prompts=2, **given)
    row, = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert row['responses'] == ['a', 'b'] and '1 prompts left out' in capsys.readouterr().out

def test_every_prompt_is_answered_k_times_at_the_temperature(tmp_path, given, monkeypatch):
    asked, sample = [], collect.sample_answers
    monkeypatch.setattr(collect, 'sample_answers', lambda *a: (asked.append(a), sample(*a))[1])
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
        return [list(t) + [256] for t in text], None

    monkeypatch.setattr(collect, 'sample_answers', sampling)
    run(collect, out=str(tmp_path / 'r.jsonl'), max_prompts=2, **given | dict(policy=f"{given['policy']},{other}"))
    rows = read_records(tmp_path / 'r.jsonl', 'rankings')
    assert given_to == [4, 2]
    assert [row['responses'] for row in rows] == [['one', 'uno', 'two'], ['eins', 'due']]
    assert [row['policies'] for row in rows] == [[given['policy'], given['policy'], other], [given['policy'], other]]

def interrupted(monkeypatch, stretch):
    """Send Ctrl-C while the stretch of that number is sampled."""
    sample, calls = collect.sample_answers, []

    def sampling(*args):
        calls.append(1)
        if len(calls) == stretch:
            os.kill(os.getpid(), signal.SIGINT)
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
# what is refused

def test_what_comes_with_prompts_is_not_what_is_ranked(tmp_path, given, monkeypatch):
    """Prompts from a file of answers: neither the old answers nor what was said of them gets into the rankings."""
    said = dict(response='old', label=True, responses=['a', 'b'], ranks=[0, 1], policies=['p', 'q'], scores=[1.0, 2.0])
    old = [dict(said, prompt=row['prompt'], annotator='Anna', number=n)
           for n, row in enumerate(read_records(given['prompts'], 'prompts'))]
    out = str(tmp_path / 'r.jsonl')
    run(collect, out=out, **given | dict(prompts=records(tmp_path / 'old.jsonl', old)))
    rows = read_records(out, 'rankings')
    assert len(rows) > 0 and all(row.keys() == {'prompt', 'number', 'responses', 'ranks', 'scores', 'annotator'}
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
    (dict(annotator='reward_model', reward_model='nowhere'), 'nowhere'),
    (dict(prompts=''), "prompts must be a file of prompts, unless answers is given, got ''"),
    (dict(prompts='nowhere.jsonl'), 'nowhere.jsonl: no such file'),
    (dict(policy='nowhere'), 'nowhere'),
    (dict(max_new_tokens=64), 'wanted block_size above max_new_tokens'),
    (dict(resume=True), '.partial: no such file'),
])
def test_bad_options(tmp_path, given, capsys, options, expected):
    assert expected in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), **given | options)
    assert sorted(os.listdir(tmp_path)) == ['prompts.jsonl', 'sft'] # nothing half-written

def test_other_bad_input(tmp_path, given, capsys):
    out = str(tmp_path / 'r.jsonl')
    head = checkpoint(tmp_path / 'head', reward_head=True)
    assert stops(capsys, collect, out=out, **given | dict(policy=head)) == (
        f"--policy={head}: is a reward model, wanted a language model")
    path = tmp_path / 'bad.jsonl'
    path.write_text('{"prompt": "Where does the fox live?"}\n{"prompt": "Write a poem about rain."}\n')
    assert stops(capsys, collect, out=out, **given | dict(prompts=str(path))) == (
        f"{path}: prompt 2: not a prompt of the toy world: 'Write a poem about rain.'; there is no gold score for it")
    assert stops(capsys, collect, out=str(tmp_path), overwrite=True, **given) == (
        f"--out={tmp_path}: is a folder, wanted a file")
    assert 'max_prompts must be at least 0' in stops(capsys, collect, out=out, max_prompts=-1, **given)
    path.write_text('{"prompt": "Hi"}\n{"prompt": ""}\n')
    assert stops(capsys, collect, out=out, **given | dict(prompts=str(path))).startswith(f"{path}:2: ")
    assert not os.path.exists(out) and not os.path.exists(out + '.partial')
    (tmp_path / 'r.jsonl').write_text('precious\n')
    assert 'exists already' in stops(capsys, collect, out=out, **given)
    assert (tmp_path / 'r.jsonl').read_text() == 'precious\n'
