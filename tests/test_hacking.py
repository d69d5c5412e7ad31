"""The diffs of docs/hacking.md apply to a copy of the repository, and the commands below them run there."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import test_layout
from common.checkpoints import read_log
from common.records import parse_line, read_json, read_lines
from tiny import COMPARISONS, PROMPTS, RANKINGS, ROOT, by_hand, checkpoint, records

pytestmark = pytest.mark.skipif(not shutil.which('git'), reason='git applies the diffs')
TINY = dict(device='cpu', dtype='float32', overwrite='True')

def sections():
    """Return {title: (its diffs as one text, its commands)}."""
    with open(os.path.join(ROOT, 'docs', 'hacking.md'), encoding='utf-8') as f:
        text = f.read()
    parts = [part.partition('\n') for part in re.split(r'^## ', text, flags=re.MULTILINE)[1:]]
    blocks = lambda kind, part: [block for its_kind, block in re.findall(r'^```(\w*)\n(.*?)^```$', part, re.M | re.S)
                                 if its_kind == kind]
    return {title: (''.join(blocks('diff', part)), ''.join(blocks('', part)).splitlines()) for title, _, part in parts}

@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Copy the repository's source, and give tiny checkpoints and a way to change and to run it."""
    root = tmp_path / 'copy'
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns('.*', '__pycache__', 'out', 'tests', 'assets', 'venv',
                                                              '*.jsonl', '*.jsonl.gz'))

    monkeypatch.setattr(test_layout, 'ROOT', str(root))

    def apply(title):
        diff, commands = sections()[title]
        git_apply = lambda *options: subprocess.run(['git', 'apply', *options, '-'], cwd=root, input=diff, text=True,
                                                    capture_output=True)
        if git_apply('--check', '--reverse').returncode == 0:
            pytest.skip('this checkout has the change already')
        applied = git_apply()
        assert applied.returncode == 0, f"{applied.stderr}\nthe diff in docs/hacking.md has to follow the code"
        for path in re.findall(r'^\+\+\+ b/(.*)', diff, re.MULTILINE):
            test_layout.test_docstrings_begin_with_a_short_sentence(path)
            test_layout.test_lines_are_at_most_120_columns_wide(path)
        return commands

    def run(command, **options):
        """Run a command of the page with tiny data: options come after its own."""
        words = [sys.executable, *shlex.split(command)[1:], *(f'--{k}={v}' for k, v in options.items())]
        done = subprocess.run(words, cwd=root, text=True, capture_output=True,
                              env=os.environ | dict(OMP_NUM_THREADS='1'))
        assert done.returncode == 0, done.stderr
        return done.stdout

    sft = checkpoint(tmp_path / 'sft')
    return SimpleNamespace(root=root, apply=apply, run=run, sft=sft, out=str(tmp_path / 'out'),
                           data=lambda name, rows: records(tmp_path / name, rows))

def test_the_page_has_five_changes():
    assert len(sections()) == 5
    for title, (diff, commands) in sections().items():
        assert diff.startswith('--- ') and commands and all(c.startswith('python ') for c in commands), title
        assert sum(line.startswith('+') for line in diff.splitlines()) <= 40, title

def test_a_loss(copy):
    command, = copy.apply('A loss in the DPO family')
    copy.run(command, init_from=copy.sft, train_data=copy.data('r.jsonl', RANKINGS), val_data='', max_steps=2,
             batch_size=8, log_every=1, out_dir=copy.out, **TINY)
    log = read_log(os.path.join(copy.out, 'log.jsonl'))
    assert log[0]['loss'] == by_hand(0.693147) # log 2, as the page says
    assert log[1]['loss'] < log[0]['loss']
    # h = 0.5 * (1 - -1) = 1, as in test_dpo_loss_by_hand; e = 0.2: (0.8 * 0.313262 - 0.2 * 1.313262) / 0.6
    said = copy.run('python -c "import dpo, torch; T = torch.tensor; print(dpo.rdpo_loss('
                    'T([-1.]), T([-3.]), T([-2.]), T([-2.]), 0.5, 0.2)[0].item())"')
    assert float(said) == by_hand(-0.020072)

def test_an_advantage(copy):
    command, = copy.apply('An advantage in reinforce.py')
    copy.run(command, policy=copy.sft, reward_model=checkpoint(copy.root / 'rm', 1, reward_head=True), gold='',
             prompts=copy.data('p.jsonl', PROMPTS), max_new_tokens=6, batch_size=8, grad_accum=1, max_steps=2,
             out_dir=copy.out, **TINY)
    assert [line['step'] for line in read_log(os.path.join(copy.out, 'log.jsonl'))] == [1, 2]
    said = copy.run('python -c "import reinforce, torch; print(reinforce.advantages(torch.tensor('
                    '[[1., 2., 6.], [3., 3., 3.]]), '
                    "'lite').tolist())\"")
    # mean 3; the six rewards' variance is (4 + 1 + 9) / 6, its root 1.527525
    assert json.loads(said) == [by_hand([-1.309307, -0.654654, 1.963961]), [0.0, 0.0, 0.0]]

def test_a_data_set(copy):
    prepare, peek, train = copy.apply('A data set')
    rows = [dict(question=r['prompt'], answer=r[key], thumb=thumb) for r in COMPARISONS
            for key, thumb in (('chosen', 'up'), ('rejected', 'down'))]
    copy.run(prepare, source=copy.data('chats.jsonl', rows + [dict(question='Hm', answer='?', thumb='sideways')]))
    found = [parse_line(line) for _, line in read_lines(str(copy.root / 'data/thumbs/unpaired_train.jsonl'))]
    assert len(found) == 6 and found[0].keys() == {'prompt', 'response', 'label'} # val has the fourth prompt's two
    assert '⟦' in copy.run(peek, tokenizer=copy.sft)
    copy.run(train, init_from=copy.sft, val_data='', max_steps=1, batch_size=4, out_dir=copy.out, **TINY)
    assert os.path.exists(os.path.join(copy.out, 'model.safetensors'))

def test_an_annotator(copy):
    command, = copy.apply('An annotator')
    out = os.path.join(copy.out, 'shortest.jsonl')
    copy.run(command, policy=copy.sft, prompts=copy.data('p.jsonl', PROMPTS), max_new_tokens=6, gold='', tie=0,
             out=out, **TINY)
    found = [parse_line(line) for _, line in read_lines(out)]
    assert found
    for record in found:
        lengths = [len(text) for text in record['responses']]
        assert lengths[record['ranks'].index(0)] == min(lengths)
        assert record['ranks'][lengths.index(max(lengths))] == max(record['ranks'])

def test_a_metric(copy):
    command, = copy.apply('A metric')
    copy.run(command, models=f'sft={copy.sft},dpo={copy.sft}', reward_model='', best_of=0, figures='False', gold='',
             prompts=copy.data('p.jsonl', PROMPTS), max_new_tokens=6, text='', rankings='', comparisons='',
             out_dir=copy.out, device='cpu', dtype='float32')
    results = read_json(os.path.join(copy.out, 'results.json'), 'results')
    assert all(0 <= row['repeats'] <= 1 for row in results['models'].values())
    said = copy.run("python -c \"import evaluate; print(evaluate.repeats(['a b c d a b c d', 'a', 'b', '']))\"")
    assert float(said) == 0.25

def test_a_change_that_is_there_already_is_skipped(copy):
    copy.apply('A metric')
    with pytest.raises(pytest.skip.Exception, match='has the change already'):
        copy.apply('A metric')
