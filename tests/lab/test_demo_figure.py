"""python -m lab.demo_figure: the picture of README.md, from the files that demo.py leaves."""
import json
import os
import subprocess
import sys

import pytest

from lab import demo_figure
from tiny import ROOT, stops

def run_of_demo(folder, ppo):
    for stage, lines in dict(base=[dict(step=1, loss=3.0), dict(step=2, loss=2.0)],
                             reward=[dict(step=1, accuracy=0.5), dict(step=2, accuracy=0.9)], ppo=ppo).items():
        (folder / stage).mkdir(parents=True)
        (folder / stage / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'evaluate').mkdir()
    gold = {name: dict(gold=score) for name, score in (('base', 0.2), ('sft', 0.4), ('ppo', 0.8))} # no dpo
    (folder / 'evaluate' / 'results.json').write_text(json.dumps(dict(models=gold, greedy=gold)))
    return str(folder)

def test_draws_a_run(tmp_path):
    pytest.importorskip('matplotlib')
    run = run_of_demo(tmp_path / 'run', [dict(step=1, reward=0.0, gold=0.4), dict(step=2, reward=0.5, gold=0.6)])
    demo_figure.main(demo_figure.Config(run=run))
    assert (tmp_path / 'run' / 'evaluate' / 'demo.png').read_bytes().startswith(b'\x89PNG')

def test_says_what_is_missing(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    run = run_of_demo(tmp_path / 'run', [dict(step=1, reward=0.0)])
    line = stops(capsys, demo_figure, run=run)
    assert 'ppo/log.jsonl' in line and '`gold`' in line
    assert not (tmp_path / 'run' / 'evaluate' / 'demo.png').exists()
    assert 'results.json' in stops(capsys, demo_figure, run=str(tmp_path / 'none'))
    (tmp_path / 'run' / 'evaluate' / 'results.json').write_text(json.dumps(dict(models={'sft': {}})))
    assert "wanted the results of demo.py, got none with 'gold'" in stops(capsys, demo_figure, run=run)

@pytest.mark.parametrize('name', ['abstain', 'demo_figure', 'fewer_labels', 'tables'])
def test_a_path_works_as_well_as_a_module(name, tmp_path):
    """python lab/NAME.py, from any folder."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'lab', f'{name}.py'), '--help'], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0 and f'python -m lab.{name}' in done.stdout, done.stderr
