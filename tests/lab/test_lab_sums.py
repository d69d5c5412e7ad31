"""lab/sums.py: the stages, and results by hand. The training itself is measured, see docs/results.md."""
import json
from importlib import import_module

import pytest

from common.health import Health
from common.options import parse_config
from lab import sums
from tiny import records, run, stops

def test_stages():
    todo = sums.stages('out/s', ['grpo', 'ppo'])
    chain = ['pretrain', 'sft', 'grpo', 'ppo', 'evaluate', 'others']
    assert [name for name, *_ in todo] == ['data', *chain, *(f'{name}_direct' for name in chain)]
    stages = {name: stage for name, *stage in todo}
    assert stages['pretrain'][-1] == ['data'] and stages['sft_direct'][-1] == ['pretrain_direct']
    assert stages['others_direct'][-1] == ['grpo_direct', 'ppo_direct']
    assert stages['grpo_direct'][:4] == ['reinforce.py', 'config/sums/grpo.py', dict(
        policy='out/s/sft_direct', max_steps=250, out_dir='out/s/grpo_direct'), 'out/s/grpo_direct/model.safetensors']
    assert stages['grpo'][2] == dict(policy='out/s/sft', out_dir='out/s/grpo') # the config file's own max_steps
    assert stages['others_direct'][2]['models'] == (
        'base=out/s/base_direct,sft=out/s/sft_direct,grpo=out/s/grpo_direct,ppo=out/s/ppo_direct')
    for script, config, options, *_ in list(stages.values())[1:]: # each is a command that its script understands
        parse_config(import_module(script[:-3]).Config, [config, *(f'--{k}={v}' for k, v in options.items())])

def write(folder, right):
    """Write what the stages of a run leave; right: {model: greedy scores of two problems, of 2 and of 4 digits}."""
    for end in sums.STYLES.values():
        rows = {'evaluate': [], 'others': []}
        for name, scores in right.items():
            for part, digits, score in zip(rows, (2, 4), scores):
                rows[part].append(dict(prompt='1+1', category=f'{digits} digits', model=name, greedy_gold=score))
        for part, samples in rows.items():
            (folder / f'{part}{end}').mkdir(parents=True)
            records(folder / f'{part}{end}/samples.jsonl', samples)
            (folder / f'{part}{end}/results.json').write_text(json.dumps(dict(
                greedy={name: dict(gold=scores[0]) for name, scores in right.items()},
                models={name: dict(gold=scores[0] / 2) for name, scores in right.items()})))
        (folder / f'grpo{end}').mkdir()
        (folder / f'grpo{end}/log.jsonl').write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.7}\n')
    return str(folder)

def test_results_table_and_figure(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    runs = []
    for name, last in (('a', [1.0, 0.0]), ('b', [0.9, 0.2])):
        runs.append(write(tmp_path / name, dict(base=[0.2, 0.0], sft=[0.4, 0.0], grpo=last)))
        found = sums.results(runs[-1], ['grpo'])
        assert found['accuracy'] == dict(base=0.2, sft=0.4, grpo=last[0], base_direct=0.2, sft_direct=0.4,
                                         grpo_direct=last[0])
        assert found['sampled']['sft_direct'] == 0.2
        assert found['by_digits']['grpo'] == {'2 digits': last[0], '4 digits': last[1]}
        (tmp_path / name / 'results.json').write_text(json.dumps(found | dict(seconds=100.4)))
    run(sums, runs=','.join(runs))
    out = capsys.readouterr().out
    assert '| right answers | sampled | greedy | 2 digits, greedy | 4 digits, greedy |' in out
    assert '| grpo_direct | 0.47 (0.45–0.50) | 0.95 (0.90–1.00) | 0.95 (0.90–1.00) | 0.10 (0.00–0.20) |' in out
    assert 'seconds: 100, 100' in out and (tmp_path / 'a/sums.png').read_bytes().startswith(b'\x89PNG')

def test_the_end_of_the_demo(tmp_path, monkeypatch):
    """Sampled sft is right more often than greedy sft: the likeliest answer is the hasty one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'evaluate'
    folder.mkdir()
    records(folder / 'samples.jsonl', [
        dict(prompt=prompt, answer='2', category='3 digits', model=name, sampled=f'12\\n#### {name}', greedy='#### 2',
             sampled_gold=float(name == 'grpo'), greedy_gold=float(name != 'sft' or prompt == '4-3'))
        for prompt in ('1+1', '2+1', '4-3') for name in ('base', 'sft', 'grpo')])
    found = dict(accuracy=dict(base=0.325, sft=0.335, grpo=0.996, base_direct=0.3, sft_direct=0.3, grpo_direct=0.95),
                 sampled=dict(base=0.5, sft=0.498, grpo=0.985, base_direct=0.4, sft_direct=0.4, grpo_direct=0.9),
                 by_digits={name: {'2 digits': 0.0, '3 digits': 0.5} for name in (
                     'base', 'sft', 'grpo', 'base_direct', 'sft_direct', 'grpo_direct')})
    lines = sums.ending('.', ['grpo'], found, ' '.join).split('\n')
    assert ' '.join(lines[:2]).endswith('show what carries over to others: next to nothing.')
    assert lines[3:7] == ['             sampled  greedy  2 digits  3 digits',
                          'base            0.50    0.33      0.00      0.50',
                          'sft             0.50    0.34      0.00      0.50',
                          'grpo            0.98    1.00      0.00      0.50']
    assert 'Why is greedy sft right less often (0.34) than sampled sft (0.50)?' in ' '.join(lines)
    assert [line for line in lines if line.startswith('"')] == [
        '"1+1" (right: 2)', '"4-3" (right: 2)'] # a sum and a difference
    assert max(map(len, lines)) <= 100 and lines[-2:] == [
        '  python sample.py --policy=./base,./sft,./grpo', '  python -m lab.sums --runs=.']
    assert 'the report' not in ' '.join(lines) # there is none
    found['sampled']['sft'], found['by_digits']['grpo']['2 digits'] = 0.3, 0.2
    told = sums.ending('.', ['grpo'], found, ' '.join)
    assert 'Why' not in told and 'next to nothing' not in told

def alarmed(tmp_path, reward, name='data.checker:exact_match'):
    """Return what the health monitor says of a run whose answers to a problem are all alike at its end."""
    records(tmp_path / 'log.jsonl', [dict(step=i, reward=reward if i > 3 else 0.4, entropy=0.5 if i < 4 else 0.001,
                                          group_std=0.4 if i < 4 else 0.01) for i in range(1, 9)])
    said = []
    Health(dict(batch_size=8, max_steps=8, kind='grpo', reward=name), 'float32').tell(
        tmp_path / 'log.jsonl', said.append, False)
    return [line.split()[3] for line in said]

def test_a_run_that_has_solved_its_problems_is_not_sick(tmp_path):
    assert alarmed(tmp_path, 0.94) == alarmed(tmp_path, 1.0) == []
    for reward, name in ((0.8, 'mine.py:score'), (0.0, 'mine.py:score'), (2.0, 'mine.py:score'), (1.0, '')):
        assert sorted(alarmed(tmp_path, reward, name)) == ['entropy', 'group_std'] # the last: by a reward model

def test_results_of_another_world(tmp_path, capsys):
    (tmp_path / 'results.json').write_text('{"models": {}}')
    assert stops(capsys, sums, runs=str(tmp_path)) == f"--runs={tmp_path}: wanted the results of demo.py --world=sums"

@pytest.mark.parametrize('lost', ['accuracy', 'sampled', 'seconds'])
def test_results_of_another_version(tmp_path, capsys, lost):
    found = dict(accuracy=dict(sft=0.5), sampled=dict(sft=0.5), by_digits=dict(sft={'3 digits': 0.5}), seconds=1)
    del found[lost]
    (tmp_path / 'results.json').write_text(json.dumps(found))
    assert stops(capsys, sums, runs=str(tmp_path)) == (
        f"--runs={tmp_path}: wanted the results of this version's demo.py --world=sums; one of them lacks '{lost}'")
