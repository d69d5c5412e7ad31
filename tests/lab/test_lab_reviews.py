"""lab/reviews.py, lab/reviews_frontier.py: their stages, tables by hand, and the whole world in two steps."""
import json
import os
import zipfile
from dataclasses import fields
from importlib import import_module

import pytest

import demo
from common.options import parse_config
from lab import reviews, reviews_frontier
from tiny import ROOT, checkpoint, records, run, stops

SMALL = dict(block_size=160, n_layer=1, n_head=2, n_embd=16, max_steps=2, epochs=1, batch_size=4, minibatches=1,
             grad_accum=1, normalise_on=8, eval_every=0, vocab_size=280, max_new_tokens=8, device='cpu',
             dtype='float32', figures=False)

def run_stages(todo, at):
    """Run stages as demo.run_stages does, in this process, small."""
    for stage in todo:
        words = demo.command_of(stage, at)[1:]
        script = import_module(words[0].removesuffix('.py').replace('/', '.'))
        known = {f.name for f in fields(script.Config)} - ({'max_new_tokens'} if words[0] == 'sft.py' else set())
        script.main(parse_config(script.Config, [*words[1:], *(f'--{k}={v}' for k, v in SMALL.items() if k in known)]))
        assert os.path.exists(stage[4]), stage
    return {stage[0]: 1.0 for stage in todo}

@pytest.fixture
def world(tmp_path, monkeypatch):
    """Stand in an empty folder with config/, and return a pros_cons.zip of 240 remarks."""
    monkeypatch.chdir(tmp_path)
    os.symlink(os.path.join(ROOT, 'config'), 'config')
    with zipfile.ZipFile('small.zip', 'w') as file:
        for tag, words in (('Pros', 'good great fast sharp sturdy'), ('Cons', 'bad poor slow blurry flimsy')):
            nouns = 'battery screen zoom sound price case lens menu'.split()
            file.writestr(f'Integrated{tag}.txt', ''.join(
                f'<{tag}>{noun} is {how}{end}</{tag}>\n' for noun in nouns for how in words.split()
                for end in ('', ' indeed', ' mostly')))
    monkeypatch.setattr(demo, 'run_stages', run_stages)
    return 'small.zip'

def test_the_stages_of_the_demo():
    todo = {name: stage for name, *stage in reviews.stages('out/r', [*reviews.METHODS], 'a.zip')}
    assert [*todo] == ['data', 'sft', 'fluency', 'reward', 'collect train', 'ppo', 'dpo', 'rrhf', 'dpo_people',
                       'evaluate']
    assert todo['data'][2] == dict(source='a.zip')
    assert todo['dpo'][2] == dict(train_data='out/r/rankings_train.jsonl', init_from='out/r/sft', out_dir='out/r/dpo')
    assert todo['dpo_people'][2]['train_data'] == 'data/reviews/comparisons_train.jsonl'
    assert todo['dpo_people'][4] == ['sft'] and todo['ppo'][4] == ['reward'] and todo['rrhf'][4] == ['collect train']
    assert todo['fluency'][2]['train_data'] == 'data/reviews/gold_train.jsonl' # of other people
    assert todo['evaluate'][2]['models'] == ','.join(f'{m}=out/r/{m}' for m in ('sft', *reviews.METHODS))
    for script, config, options, *_ in list(todo.values())[1:]: # each is a command that its script understands
        parse_config(import_module(script[:-3]).Config, [config, *(f'--{k}={v}' for k, v in options.items())])
    todo = reviews.stages('out/r', ['ppo'], '') # nothing that is not needed
    assert [stage[0] for stage in todo] == ['data', 'sft', 'fluency', 'reward', 'ppo', 'evaluate'] and todo[0][3] == {}

def test_options_of_the_demo(capsys):
    cfg = parse_config(demo.Config, ['--world=reviews', '--source=a.zip'])
    assert (cfg.out_dir, cfg.methods, cfg.source) == ('out/reviews', 'ppo,dpo', 'a.zip')
    assert parse_config(demo.Config, ['--world=reviews', '--methods=all']).methods == 'ppo,dpo,rrhf,dpo_people'
    with pytest.raises(SystemExit):
        parse_config(demo.Config, ['--source=a.zip'])
    assert 'source must be left at' in capsys.readouterr().err

def test_fluency_by_hand(tmp_path):
    """A model of zero weights finds each of 257 tokens equally likely."""
    from model import GPT
    folder = checkpoint(tmp_path / 'm')
    model = GPT.from_pretrained(folder)
    for p in model.parameters():
        p.data.zero_()
    model.save_pretrained(folder)
    rows = [dict(prompt='a', response='bc'), dict(prompt='b', response='')]
    assert reviews.fluency(folder, rows) == pytest.approx(257)

def test_the_end_counts_where_an_answer_has_ended(tmp_path, monkeypatch):
    """" ab" and its end are 4 tokens; of 3 at most, it was cut off."""
    seen = []
    monkeypatch.setattr(reviews, 'perplexity', lambda model, batches, device: seen.append(sum(
        sum(mask) for batch in batches for _, mask in batch)))
    folder = checkpoint(tmp_path / 'm')
    for longest in (4, 3):
        reviews.fluency(folder, [dict(prompt='a', response='ab')], longest)
    assert seen == [4, 3]

def test_different_by_hand():
    rows = [dict(prompt=p, response=r) for p, r in (('a', 'b'), ('a', 'b'), ('c', 'b'), ('a', 'd'))]
    assert reviews.different(rows) == 0.5 # b and d

def test_distinct_2_by_hand():
    """Three pairs of each: ab, bc and ab again are 2 of 3; what b says after its third pair does not count."""
    rows = lambda *answers: [dict(response=answer) for answer in answers]
    written = dict(a=rows('a b c', 'a b'), b=rows('a b c d', 'a b a b a b'), c=rows('a', 'b c d a'))
    assert reviews.distinct_2(written) == dict(a=2 / 3, b=1.0, c=1.0)
    assert reviews.distinct_2(dict(a=rows('a'), b=rows('a b'))) == dict(a=0.0, b=0.0)

def test_the_table_of_runs(tmp_path, capsys):
    row = dict(gold=0.5, reward=0.1, kl=0.0, fluency=60.0, different=1.0, distinct_2=0.9, length=9.0)
    for name, best in (('a', 0.9), ('b', 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(dict(
            models=dict(sft=row, ppo=row | dict(gold=best, kl=4.0)), people=dict(fluency=70.0, pros=50.04),
            reward_model=0.95, classifier=0.938, seconds=600.4)))
    run(reviews, runs=f'{tmp_path}/a,{tmp_path}/b')
    out = capsys.readouterr().out
    assert '| policy | gold | reward | KL | fluency | different | distinct-2 | tokens |' in out
    assert '| ppo | 0.95 (0.90–1.00) | 0.10 | 4.00 | 60.0 | 1.00 | 0.90 | 9.0 |' in out
    assert 'held-out remarks of people: 70.0, of Pros alone: 50.0' in out and 'seconds: 600, 600' in out
    (tmp_path / 'a/results.json').write_text('{"models": {}}')
    assert stops(capsys, reviews, runs=f'{tmp_path}/a').endswith('wanted the results of demo.py --world=reviews')

@pytest.mark.parametrize('lost', ['models', 'seconds', 'people', 'gold'])
def test_results_of_another_version(tmp_path, capsys, lost):
    row = dict(gold=0.5, reward=0.1, kl=0.0, fluency=60.0, different=1.0, distinct_2=0.9, length=9.0)
    found = dict(models=dict(sft=row), people=dict(fluency=70.0, pros=50.0), reward_model=1, classifier=1, seconds=1)
    del (row if lost == 'gold' else found)[lost]
    (tmp_path / 'results.json').write_text(json.dumps(found))
    assert stops(capsys, reviews, runs=str(tmp_path)) == (
        f"--runs={tmp_path}: wanted the results of this version's demo.py --world=reviews; one of them lacks '{lost}'")

def test_the_whole_world(world, capsys):
    cfg = demo.Config(world='reviews', source=world, methods='ppo,dpo,rrhf,dpo_people')
    os.makedirs(cfg.out_dir)
    with open(f'{cfg.out_dir}/demo.json', 'w') as f: # run_stages of this file writes none
        json.dump({stage[0]: [demo.command_of(stage, cfg), 0.0, 1.0] for stage in demo.stages(cfg)}, f)
    demo.main(cfg)
    with open('out/reviews/results.json') as f:
        results = json.load(f)
    assert [*results['models']] == ['sft', 'ppo', 'dpo', 'rrhf', 'dpo_people', 'best_of_n']
    for row in results['models'].values():
        assert {*row} == {*reviews.COLUMNS} and 0 <= row['gold'] <= 1 and row['fluency'] > 1
    assert results['seed'] == 1 and 0 <= results['classifier'] <= 1
    out = capsys.readouterr().out
    assert 'python sample.py --policy=out/reviews/sft,out/reviews/ppo,out/reviews/dpo,out/reviews/dpo_people' in out
    assert 'python -m lab.reviews_frontier --source=small.zip' in out
    ending = out[out.index('Mean gold score of sampled'):]
    assert max(map(len, ending.split('\n'))) <= 100 and '  dpo_people  0.' in ending

def test_the_whole_frontier(world, capsys, monkeypatch):
    pytest.importorskip('matplotlib')
    run(reviews_frontier, source=world, out_dir='out/f', seeds='1', methods='ppo,dpo,best_of_n', answers=4, at='0.1',
        betas='ppo=0,1 dpo=1', samples=2)
    out = capsys.readouterr().out
    for row in ('| sft | 0.000 | ', '| ppo 0 | ', '| dpo 1 | ', '| best of n 4 | '):
        assert row in out, row
    assert '| policy | fluency: perplexity | different | distinct-2 | words |' in out
    assert '| beginning | sft | ppo 1 | dpo 1 |' in out
    with open('out/f/results.json') as f:
        results = json.load(f)
    assert [*results['points']] == ['ppo', 'dpo', 'best_of_n', 'sft'] and len(results['people']) == 1
    assert [*results['manner']] == ['sft', 'ppo_0', 'ppo_1', 'dpo_1', 'best_of_n_2', 'best_of_n_4']
    for name in ('frontier', 'fluency'):
        with open(f'out/f/{name}.png', 'rb') as f:
            assert f.read(4) == b'\x89PNG'

@pytest.mark.parametrize('options, line', [
    (dict(methods='ppo,kto'), 'methods must be names among ppo,dpo,rrhf,dpo_people,best_of_n, each once'),
    (dict(betas='rrhf=1'), 'of methods with a price on the KL'), (dict(at='x'), 'at must be KLs'),
    (dict(answers=2), 'answers must be at least 4'), (dict(samples=-1), 'samples must be at least 0')])
def test_bad_options_of_the_frontier(tmp_path, capsys, options, line):
    assert line in stops(capsys, reviews_frontier, out_dir=str(tmp_path / 'out'), **options)
    assert not (tmp_path / 'out').exists()

def test_best_of_n_takes_the_best_of_the_first_n(tmp_path):
    (tmp_path / 'policies').mkdir()
    records(tmp_path / 'policies/samples.jsonl', [dict(prompt='a', model='sft', sampled='b')])
    records(tmp_path / 'answers.jsonl', [
        dict(prompt='a', responses=[*'wxyz'], ranks=[0] * 4, scores=[1.0, 3.0, 2.0, 4.0])])
    cfg = reviews_frontier.Config(methods='best_of_n', answers=4, betas='ppo=1')
    found = reviews_frontier.answers_of(cfg, tmp_path)
    said = {name: rows[0]['response'] for name, rows in found.items()}
    assert said == dict(sft='b', best_of_n_2='x', best_of_n_4='z')
