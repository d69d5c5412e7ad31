"""lab/sums.py: the stages, and results by hand. The training itself is measured, see docs/results.md."""
import json
from importlib import import_module

import pytest

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

def test_results_of_another_world(tmp_path, capsys):
    (tmp_path / 'results.json').write_text('{"models": {}}')
    assert stops(capsys, sums, runs=str(tmp_path)) == f"--runs={tmp_path}: wanted the results of demo.py --world=sums"
