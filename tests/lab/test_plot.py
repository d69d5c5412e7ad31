"""lab/plot.py: logs of three lines, whose table and curves are written out by hand."""
import json
import os
import subprocess
import sys

import pytest

from lab import plot
from tiny import ROOT, drawn_axes

# ppo stopped while it wrote its last line; rloo logged step 2 and not step 3
PPO = '''{"step": 1, "kl": 0.5, "loss": 4.0}
{"step": 2, "kl": 2.5}
{"step": 3, "kl": 1.5, "gold": 0.25}
{"step": 4, "k'''
RLOO = '{"step": 0, "gold": 0.5}\n{"step": 2, "kl": 1e-8, "loss": null, "time": 7.5}\n{"step": 2, "ended": true}\n'

def log(folder, text, name='log.jsonl'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder)

def lines(*rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)

def drawn(tmp_path, runs, **options):
    """Draw; return the lines of the CSV file."""
    plot.main(plot.Config(out=str(tmp_path / 'new' / 'plot.png'), **options), runs)
    return (tmp_path / 'new' / 'plot.csv').read_text().splitlines()

@pytest.fixture
def runs(tmp_path):
    return [log(tmp_path / 'ppo', PPO), log(tmp_path / 'rloo', RLOO)]

@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)

@pytest.fixture
def axes(monkeypatch):
    """Return the list that will hold the axes of the picture."""
    return drawn_axes(monkeypatch, plot)

def curve(line):
    return list(zip(*(list(map(float, values)) for values in line.get_data())))

# ---- numbers ----------------------------------------------------------------------------------------------------

def test_the_table_by_hand(runs, tmp_path, no_matplotlib, capsys):
    assert drawn(tmp_path, runs, keys='kl,gold') == ['step,kl of ppo,kl of rloo,gold of ppo,gold of rloo', '0,,,,0.5',
                                                     '1,0.5,,,', '2,2.5,1e-08,,', '3,1.5,,0.25,']
    assert not (tmp_path / 'new' / 'plot.png').exists()
    assert capsys.readouterr().out == (f"wrote {tmp_path}/new/plot.csv\n"
                                       "no picture: it needs matplotlib (pip install matplotlib)\n")

def test_the_mean_of_the_last_values_by_hand(runs, tmp_path, no_matplotlib):
    """kl of ppo: 0.5, (0.5 + 2.5) / 2, (2.5 + 1.5) / 2. A value of rloo that is alone is its own mean."""
    assert drawn(tmp_path, runs, keys='kl', smooth=2)[1:] == ['1,0.5,', '2,1.5,1e-08', '3,2.0,']
    assert drawn(tmp_path, runs[:1], keys='kl', smooth=3)[1:] == ['1,0.5', '2,1.5', '3,1.5'] # (0.5 + 2.5 + 1.5) / 3

def test_the_curves_are_the_numbers_of_the_table(runs, tmp_path, axes):
    drawn(tmp_path, runs, keys='kl,gold', smooth=2)
    kl, gold = axes
    assert [curve(line) for line in kl.lines[:2]] == [[(1, 0.5), (2, 1.5), (3, 2)], [(2, 1e-8)]]
    assert [curve(line) for line in gold.lines] == [[(3, 0.25)], [(0, 0.5)]]
    assert [ax.get_title() for ax in axes] == ['kl, mean of 2', 'gold, mean of 2']
    assert {ax.get_xlabel() for ax in axes} == {'step'} and kl.get_xlim() == gold.get_xlim()
    assert (tmp_path / 'new' / 'plot.png').read_bytes().startswith(b'\x89PNG')

# ---- which runs, which keys -------------------------------------------------------------------------------------

def test_names_tell_runs_apart(tmp_path, no_matplotlib, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot.names_of(['out/toy/ppo', 'out/toy2/ppo/', 'out/toy/dpo/log.jsonl']) == ['toy/ppo', 'toy2/ppo', 'dpo']
    assert plot.names_of(['a/out/toy/ppo', 'b/out/toy/ppo']) == ['a/out/toy/ppo', 'b/out/toy/ppo']
    assert plot.names_of(['ppo/log.unsaved.jsonl', 'ppo', '.']) == ['log.unsaved.jsonl', 'ppo', tmp_path.name]

def test_a_run_at_work_that_replaces_an_old_one(runs, tmp_path, no_matplotlib):
    """Its log is log.new.jsonl until the first save."""
    log(tmp_path / 'ppo', lines(dict(step=1, kl=9)), 'log.new.jsonl')
    assert drawn(tmp_path, runs[:1])[1:] == ['1,9']
    assert drawn(tmp_path, [runs[0] + '/log.jsonl'], keys='loss')[1:] == ['1,4.0']

def header(tmp_path, *logs):
    runs = [log(tmp_path / f'r{i}', lines(dict(step=1, **row), dict(step=2, **row))) for i, row in enumerate(logs)]
    return drawn(tmp_path, runs)[0].split(',')[1:]

def test_the_usual_keys_that_all_runs_have(tmp_path, no_matplotlib):
    rest = dict(lr=1, time=1, loss=1, score=1)
    ppo, rloo = dict(kl=1, reward=1, explained_variance=1) | rest, dict(kl=1, reward=1, group_std=1) | rest
    assert header(tmp_path, ppo) == ['reward of r0', 'kl of r0', 'explained_variance of r0']
    assert header(tmp_path, ppo, rloo) == ['reward of r0', 'reward of r1', 'kl of r0', 'kl of r1']
    assert header(tmp_path, rloo, dict(loss=1, lr=1)) == ['loss of r0', 'loss of r1'] # of sft.py
    assert header(tmp_path, dict(step_size=1, lr=1)) == ['step_size of r0'] # somebody's own

def test_a_key_with_one_value_is_drawn_where_it_is_asked_for(tmp_path, no_matplotlib):
    run = log(tmp_path / 'dpo', lines(dict(step=1, loss=2), dict(step=2, loss=1), dict(step=2, val_loss=3)))
    assert drawn(tmp_path, [run]) == ['step,loss of dpo', '1,2', '2,1']
    assert drawn(tmp_path, [run], keys=' val_loss,loss,loss') == ['step,val_loss of dpo,loss of dpo', '1,,2', '2,3,1']
    short = log(tmp_path / 'short', lines(dict(step=1, val_loss=3)))
    assert drawn(tmp_path, [short]) == ['step,val_loss of short', '1,3'] # there is nothing else

def test_numbers_too_large_to_draw_are_left_out(tmp_path, axes):
    """Also where the largest that are drawn stand on both sides of 0."""
    rows = [dict(step=step, kl=kl) for step, kl in enumerate((1.0, 1e308, -1e308, 10 ** 400, 9e37, -9e37))]
    run = log(tmp_path / 'ppo', lines(*rows, dict(step=10 ** 400, kl=2), dict(step=1e300, kl=2)))
    for smooth, last in (1, '-9e+37'), (2, '0.0'):
        assert drawn(tmp_path, [run], smooth=smooth)[1::2] == ['0,1.0', f'5,{last}']

# ---- how it looks -----------------------------------------------------------------------------------------------

def test_the_legend_lies_beside_the_panels(tmp_path, axes):
    names = ['_old', 'a$b$c', *(f'run{i}' for i in range(18))]
    text = lines(dict(step=1, kl=1, loss=2), dict(step=2, kl=2, loss=1))
    drawn(tmp_path, [log(tmp_path / name, text) for name in names], keys='kl,loss')
    legend, = [ax.get_legend() for ax in axes if ax.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == names
    box, whole = legend.get_window_extent(), axes[0].figure.bbox
    assert not any(box.overlaps(ax.bbox) for ax in axes)
    assert all(ax.bbox.width > 2.2 * axes[0].figure.dpi for ax in axes) # inches: it took no room from them
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1

def test_every_run_has_its_own_look(tmp_path, axes):
    runs = [log(tmp_path / f'run{i}', lines(dict(step=1, kl=1), dict(step=2, kl=2))) for i in range(9)]
    drawn(tmp_path, runs)
    looks = [(line.get_color(), line.get_linestyle()) for line in axes[0].lines[:9]]
    assert len({colour for colour, _ in looks[:7]}) == 7 and {style for _, style in looks[:7]} == {'-'}
    assert looks[7:] == [(looks[0][0], '--'), (looks[1][0], '--')]

# ---- bad input --------------------------------------------------------------------------------------------------

def refused(capsys, runs, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        plot.main(plot.Config(**options), runs)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith('error: ') and err.count('\n') == 1
    return err.removeprefix('error: ').strip()

def test_bad_input_is_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, ['ppo', 'rloo'], keys='kl,klx') == (
        '--keys=kl,klx: no log has `klx`; there are kl, loss, gold, time')
    assert refused(capsys, ['none']) == "none: no such folder or file; wanted a run's folder, or a .jsonl file"
    assert refused(capsys, ['ppo', '.']) == ".: has no log.jsonl; wanted a run's folder, such as ppo, or a .jsonl file"
    assert refused(capsys, ['ppo/x.jsonl']).startswith('ppo/x.jsonl: ')
    assert refused(capsys, ['ppo', './ppo/']) == './ppo/: is given twice; wanted each run once'
    assert refused(capsys, []) == 'wanted the folders of runs, as in python lab/plot.py out/toy/ppo out/toy/rloo'
    for text in ('', lines(dict(prompt='p')), '[1]\n{"step": 1}\n', lines(dict(step='one', kl=1))):
        log(tmp_path / 'odd', text)
        assert refused(capsys, ['odd']).startswith('odd/log.jsonl: wanted lines with `step` and other numbers')
    log(tmp_path / 'lr', lines(dict(step=1, lr=1)))
    assert refused(capsys, ['lr', 'ppo']).startswith('--keys: the runs have no key in common; wanted some of lr, kl')
    assert refused(capsys, ['ppo'], out='ppo/log.jsonl/x.png') == (
        '--out=ppo/log.jsonl/x.png: wanted a file in a folder that can be written to')
    assert sorted(os.listdir()) == ['lr', 'odd', 'ppo', 'rloo'] and os.listdir('ppo') == ['log.jsonl']
    for options in (dict(smooth=0), dict(out='plot.pdf')):
        with pytest.raises(ValueError, match='must be'):
            plot.Config(**options)

@pytest.mark.parametrize('name', ['mine.csv', 'mine.png'])
def test_other_files_are_not_replaced(runs, tmp_path, capsys, name, no_matplotlib):
    (tmp_path / name).write_text('month,rent\n1,800\n')
    out = str(tmp_path / 'mine.png')
    assert refused(capsys, runs, keys='kl', out=out) == (
        f"--out={out}: {tmp_path / name} is there, and no older plot of this script; wanted another name")
    assert (tmp_path / name).read_text() == 'month,rent\n1,800\n'
    drawn(tmp_path, runs, keys='kl')
    assert drawn(tmp_path, runs, keys='gold')[0] == 'step,gold of ppo,gold of rloo' # its own are

# ---- the command line -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('how', [[os.path.join(ROOT, 'lab', 'plot.py')], ['-m', 'lab.plot']])
def test_runs_and_options_in_any_order(runs, tmp_path, how):
    cwd = ROOT if how[0] == '-m' else tmp_path
    done = subprocess.run([sys.executable, *how, '--keys', 'kl', runs[0], f'--out={tmp_path}/a.png', runs[1]], cwd=cwd,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'a.csv').read_text().startswith('step,kl of ppo,kl of rloo\n')
    done = subprocess.run([sys.executable, *how, runs[0], '--key=kl'], cwd=cwd, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (2, 'error: --key=kl: unknown option key, did you mean keys?\n')
