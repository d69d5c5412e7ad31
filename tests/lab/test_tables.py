"""lab/tables.py: two runs by hand."""
import json

import pytest

from lab import tables
from tiny import run, stops

def row(gold, **more):
    return dict(gold=gold, helpful=0.5, honest=None, harmless=1.0, win_rate_vs_sft=0.5, kl=2.0,
                by_category=dict(home=gold / 2, sum=1.0),
                answerable=dict(right=gold, abstains=0.25, wrong=0.5, declines=0.0)) | more

def write(folder, results):
    (folder / 'evaluate').mkdir(parents=True)
    (folder / 'evaluate/results.json').write_text(json.dumps(results))
    return str(folder)

def results(gold, seconds):
    quality = dict(accuracy=0.9 + gold / 100, ceiling=0.98, shorter_wins=0.5, by_category=dict(home=1.0, courtesy=gold))
    models = dict(sft=row(0.4), ppo=row(gold, kl=gold))
    greedy = {name: row | dict(path_kl=row['kl']) for name, row in models.items()}
    own = dict(sft=dict(rankings=dict(mean_logp=gold, log_ratio=0.5)), # ppo's are missing, as best_of_n's
               other=dict(rankings=dict(mean_logp=0.1, log_ratio=0.1)))
    return dict(models=models, greedy=greedy, reward_model=quality, policies_as_reward=own, seconds=dict(ppo=seconds),
                rounds=[gold, gold + 0.1])

def test_by_hand(tmp_path, capsys):
    second = results(0.8, 9.6)
    second['models']['ipo'] = row(0.1) # the first run has none
    runs = [write(tmp_path / 'a', results(0.6, 30.2)), write(tmp_path / 'b', second)]
    run(tables, runs=','.join(runs))
    assert capsys.readouterr().out.strip().split('\n\n') == [
        '| sampled | gold | helpful | honest | harmless | wins against SFT | KL | seconds | models in memory |\n'
        '| -- | -- | -- | -- | -- | -- | -- | -- | -- |\n'
        '| sft | 0.40 | 0.50 | – | 1.00 | 0.50 | 2.00 |  | policy |\n'
        '| ppo | 0.70 (0.60–0.80) | 0.50 | – | 1.00 | 0.50 | 0.70 (0.60–0.80) | 10 |'
        ' policy, critic, reward model, reference |',
        '| greedy | gold | helpful | honest | harmless | wins against SFT | path KL |\n'
        '| -- | -- | -- | -- | -- | -- | -- |\n'
        '| sft | 0.40 | 0.50 | – | 1.00 | 0.50 | 2.00 |\n'
        '| ppo | 0.70 (0.60–0.80) | 0.50 | – | 1.00 | 0.50 | 0.70 (0.60–0.80) |',
        '| content right | home | sum |\n| -- | -- | -- |\n| sft, sampled | 0.20 | 1.00 |\n'
        '| ppo, sampled | 0.35 | 1.00 |\n| sft, greedy | 0.20 | 1.00 |\n| ppo, greedy | 0.35 | 1.00 |',
        '| answerable questions, sampled | right | abstains | wrong | declines |\n| -- | -- | -- | -- | -- |\n'
        '| sft | 0.40 | 0.25 | 0.50 | 0.00 |\n| ppo | 0.70 (0.60–0.80) | 0.25 | 0.50 | 0.00 |',
        '| answerable questions, greedy | right | abstains | wrong | declines |\n| -- | -- | -- | -- | -- |\n'
        '| sft | 0.40 | 0.25 | 0.50 | 0.00 |\n| ppo | 0.70 (0.60–0.80) | 0.25 | 0.50 | 0.00 |',
        '| reward model | accuracy | ceiling | shorter_wins |\n| -- | -- | -- | -- |\n'
        '| pairs in order | 0.907 (0.906–0.908) | 0.980 | 0.500 |',
        '| policy as reward model | mean log π | log π / π_ref |\n| -- | -- | -- |\n'
        '| sft | 0.700 (0.600–0.800) | 0.500 |',
        '| controlled pairs | home | courtesy |\n| -- | -- | -- |\n| in order | 1.00 | 0.70 (0.60–0.80) |',
        '| round | 1 | 2 |\n| -- | -- | -- |\n| gold | 0.70 (0.60–0.80) | 0.80 (0.70–0.90) |']

def test_what_is_no_run(tmp_path, capsys):
    assert f'{tmp_path}/evaluate/results.json: No such file' in stops(capsys, tables, runs=str(tmp_path))
    assert 'none/evaluate/results.json: No such file' in stops(capsys, tables, runs=f'{tmp_path}/none,')
    folder = write(tmp_path / 'a', dict(models={'base': {}}, greedy={}, reward_model={}))
    assert 'wanted the results of demo.py' in stops(capsys, tables, runs=folder)

@pytest.mark.parametrize('lost', [('greedy', 'ppo', 'path_kl'), ('reward_model', 'ceiling'),
                                  ('models', 'sft', 'by_category'), ('models', 'sft', 'answerable'),
                                  ('policies_as_reward',)])
def test_results_of_another_version(tmp_path, capsys, lost):
    found = results(0.8, 9.6)
    *way, last = lost
    part = found
    for key in way:
        part = part[key]
    del part[last]
    line = stops(capsys, tables, runs=write(tmp_path / 'a', found))
    assert line.endswith(f"wanted the results of this version's demo.py; one of them lacks '{last}'")
