"""lab/ensembles.py with faked stages: what each ensemble climbs, and what is written."""
import json

import pytest

import demo
from lab import ensembles
from tiny import by_hand, run

def test_what_is_trained_and_written(tmp_path, monkeypatch, capsys):
    """The gold score rises and falls; the peak is a mean of five iterations, of both seeds."""
    pytest.importorskip('matplotlib')
    seen = {}
    monkeypatch.setattr(demo, 'run_stages', lambda todo, at: seen.update({at.seed: {s[0]: s[3] for s in todo}}))
    log = [dict(kl=0.1 * i, reward=1.0 * i, gold=float(10 - abs(i - 10))) for i in range(21)]
    monkeypatch.setattr(ensembles.figures, 'read_runs', lambda folders: {kind: log for kind in folders})
    run(ensembles, out_dir=str(tmp_path), seeds='1,2')
    out = f'{tmp_path}/2'
    models = ','.join(f'{out}/{name}' for name in ('reward', 'reward2', 'reward3'))
    assert {kind: (seen[2][kind]['reward_model'], seen[2][kind]['ensemble']) for kind in ensembles.KINDS} == dict(
        alone=(f'{out}/reward', 'mean'), mean=(models, 'mean'), min=(models, 'min'), lcb=(models, 'lcb'))
    with open(tmp_path / 'results.json') as f:
        found = json.load(f)
    assert found['min']['peak'] == by_hand([8.8, 8.8]) # (8 + 9 + 10 + 9 + 8) / 5
    assert found['min']['peak at'] == [13, 13]
    assert {path.name for path in tmp_path.iterdir()} == {'1', '2', 'results.json', 'ensembles.png'}
