"""common/checkpoints.py: checkpoints that survive a kill at any moment, resuming, and the log."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from common.checkpoints import (OPTIONAL, digest, finish_save, load_checkpoint, load_policy, load_reward_model, log,
                                prepare_out_dir, read_log, save_checkpoint, save_if_due)
from common.records import LOCKS
from common.run import Run, start, stop
from common.tokens import load_tokenizer
from common.training import make_optimizer, optimizer_step
from model import GPT, GPTConfig
from tiny import ROOT, RUN, TOK, Config, checkpoint, in_processes, killed, one_line, records

def tiny(seed=0, n_embd=8):
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=n_embd, dropout=0.2))

def config(folder, **more):
    return Config(out_dir=str(folder), **more)

def files(folder):
    """Return the names in a folder, but for the tokenizer's and the lock."""
    return sorted(set(os.listdir(folder)) - {'.lock', *OPTIONAL})

def rewrite_state(folder, state):
    """Put another state into a checkpoint, as if it had been saved so."""
    torch.save(state, folder / 'state.pt')
    about = json.loads((folder / 'options.json').read_text())
    about['files']['state.pt'] = digest(folder / 'state.pt')
    (folder / 'options.json').write_text(json.dumps(about))

def train(cfg, first, last):
    """Steps first + 1 ... last of a toy run with dropout and random data, saved at the end as a script would do it."""
    run = start(cfg)
    prepare_out_dir(run, cfg)
    model = tiny(seed=5 + cfg.resume)
    optimizer = make_optimizer(model, cfg)
    state = load_checkpoint(run, cfg, model, {'adam': optimizer})
    assert (state['step'] if state else 0) == first
    model.train()
    for step in range(first, last):
        idx = torch.randint(257, (2, 8))
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer_step(run, cfg, step, model, optimizer, 0.01)
        log(run, cfg, step + 1, loss=loss.item())
    save_checkpoint(run, cfg, model, TOK, last, {'adam': optimizer}, kept=torch.tensor([1.5]), cursor=7)
    stop(run)
    return model, optimizer, state

def test_four_steps_equal_two_and_two_more_bitwise(tmp_path):
    model, optimizer, _ = train(config(tmp_path / 'a'), 0, 4)
    after = torch.rand(3)
    train(config(tmp_path / 'b'), 0, 2)
    resumed, resumed_optimizer, state = train(config(tmp_path / 'b', resume=True), 2, 4)
    assert torch.equal(torch.rand(3), after)
    assert state['kept'].tolist() == [1.5] and state['cursor'] == 7 # what the script had put beside it
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(p, q)
    for p, q in zip(optimizer.state.values(), resumed_optimizer.state.values()):
        assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)
    losses = [[line['loss'] for line in read_log(str(tmp_path / d / 'log.jsonl'))] for d in 'ab']
    assert losses[0] == losses[1] and len(losses[0]) == 4

def test_a_checkpoint_from_before_adapters_goes_on(tmp_path):
    """It has no adapter, and its options do not name them: it is one of all weights."""
    model, _, _ = train(config(tmp_path / 'a'), 0, 4)
    train(config(tmp_path / 'b'), 0, 2)
    state = torch.load(tmp_path / 'b/state.pt', weights_only=True)
    about = json.loads((tmp_path / 'b/options.json').read_text())
    del state['adapter']
    for options in (state['options'], about['options']):
        for key in ('lora_rank', 'lora_alpha', 'lora_on', 'tensorboard'):
            del options[key]
    (tmp_path / 'b/options.json').write_text(json.dumps(about))
    rewrite_state(tmp_path / 'b', state)
    resumed, _, _ = train(config(tmp_path / 'b', resume=True), 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))

def test_the_scale_of_float16_is_resumed(tmp_path):
    run, model = Run('cpu', 'float16'), tiny()
    run.backward(model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[1])
    run.scaler.update(1024.0)
    save_checkpoint(run, config(tmp_path), model, TOK, 1, {})
    for dtype, scale in (('float16', 1024.0), ('float32', 1.0)): # 1: not scaled
        other = Run('cpu', dtype)
        load_checkpoint(other, config(tmp_path, resume=True), tiny(), {})
        assert other.scaler.get_scale() == scale
    save_checkpoint(other, config(tmp_path), model, TOK, 1, {})
    load_checkpoint(run, config(tmp_path, resume=True), tiny(), {}) # another dtype's checkpoint has no scale
    assert run.scaler.get_scale() == 1024.0

def test_the_files_of_a_checkpoint(tmp_path):
    train(config(tmp_path), 0, 1)
    assert files(tmp_path) == ['config.json', 'log.jsonl', 'model.safetensors', 'options.json', 'state.pt']
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert state['options']['lr'] == 8.0 and state['step'] == 1
    assert load_tokenizer(str(tmp_path)).name == 'bytes'

def save_step(folder, step):
    """A checkpoint whose weights, state and samples all say `step`."""
    model = tiny()
    with torch.no_grad():
        model.wte.weight.fill_(step)
    save_checkpoint(RUN, config(folder), model, TOK, step, {'adam': make_optimizer(model, Config())}, [f'{step}', '0'])

def loaded_step(folder):
    """What a resumed run finds: the step of the state, and the one of the weights."""
    cfg, model = config(folder, resume=True), tiny()
    prepare_out_dir(RUN, cfg)
    state = load_checkpoint(RUN, cfg, model, {'adam': make_optimizer(model, cfg)})
    return state['step'], model.wte.weight[0, 0].item()

def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every change of the file system during a save is once the last that happens."""
    outcomes = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        os.makedirs(folder)
        save_step(folder, 1)
        done = not killed(monkeypatch, moment, lambda: save_step(folder, 2))
        step, weights = loaded_step(folder)
        assert step == weights and (folder / 'samples.jsonl').read_text() == f'{step}\n0\n'
        outcomes.append(step)
        assert sorted(set(files(folder)) - {'.saving', 'log.jsonl'}) == [
            'config.json', 'model.safetensors', 'options.json', 'state.pt']
        save_step(folder, 3) # what the kill left behind is in nobody's way
        assert loaded_step(folder) == (3, 3.0) and not os.path.exists(folder / '.saving')
        if done:
            break
    # makedirs twice, options.json, rename; from the rename on the new one counts: five files to move, one rmdir
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes) and outcomes.count(2) >= 6

def test_a_save_cut_short_is_ignored_and_a_finished_one_moved_into_place(tmp_path):
    save_step(tmp_path, 1)
    os.makedirs(tmp_path / '.saving')
    (tmp_path / '.saving/state.pt').write_bytes(b'half of')
    finish_save(str(tmp_path))
    assert loaded_step(tmp_path) == (1, 1.0)
    save_step(tmp_path / 'other', 2)
    os.rename(tmp_path / 'other', tmp_path / '.saved')
    assert loaded_step(tmp_path) == (2, 2.0) and not os.path.exists(tmp_path / '.saved')

@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch, error):
    save_step(tmp_path, 1)
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(error))
        line = one_line(capsys, lambda: save_step(tmp_path, 2), code=1)
    assert str(tmp_path) in line and 'step 2' in line
    assert loaded_step(tmp_path) == (1, 1.0)

def test_weights_that_cannot_be_written_leave_the_last_checkpoint(tmp_path, capsys):
    """The system lets no file grow above 8 kB: the weights, 257 times 8 numbers and more, do not fit."""
    resource = pytest.importorskip('resource', reason="limits of a process are a thing of POSIX")
    save_step(tmp_path, 1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[1]))
    try:
        line = one_line(capsys, lambda: save_step(tmp_path, 2), code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert 'File too large' in line and str(tmp_path) in line and 'the last one is intact' in line
    assert loaded_step(tmp_path) == (1, 1.0) and not os.path.exists(tmp_path / '.saving')

def test_a_checkpoint_is_only_replaced_when_told_so(tmp_path, capsys):
    log(RUN, config(tmp_path), 1, loss=2.0)
    save_step(tmp_path, 1)
    line = one_line(capsys, lambda: prepare_out_dir(RUN, config(tmp_path)))
    assert f"--out_dir={tmp_path}: holds a checkpoint" in line
    assert '--resume=True' in line and '--overwrite=True' in line
    assert loaded_step(tmp_path) == (1, 1.0) and len(read_log(str(tmp_path / 'log.jsonl'))) == 1

def test_an_overwritten_checkpoint_stays_whole_until_the_first_save(tmp_path):
    """With its log: the new run's lines stand beside it until then."""
    log(RUN, config(tmp_path), 1, loss=2.0)
    save_step(tmp_path, 1)
    prepare_out_dir(RUN, config(tmp_path, overwrite=True))
    log(RUN, config(tmp_path), 1, loss=7.0)
    shutil.copytree(tmp_path, tmp_path.parent / 'ended')
    assert loaded_step(tmp_path.parent / 'ended') == (1, 1.0) # the new run ended here
    assert [line['loss'] for line in read_log(tmp_path.parent / 'ended/log.jsonl')] == [2.0]
    assert [line['loss'] for line in read_log(tmp_path.parent / 'ended/log.unsaved.jsonl')] == [7.0]
    save_step(tmp_path, 2) # or went on
    assert loaded_step(tmp_path) == (2, 2.0)
    assert [line['loss'] for line in read_log(tmp_path / 'log.jsonl')] == [7.0]
    assert not os.path.exists(tmp_path / 'log.new.jsonl')

def test_the_log_of_a_run_that_never_saved_is_kept(tmp_path):
    prepare_out_dir(RUN, config(tmp_path))
    log(RUN, config(tmp_path), 1, loss=7.0)
    prepare_out_dir(RUN, config(tmp_path))
    assert read_log(tmp_path / 'log.jsonl') == []
    assert [line['loss'] for line in read_log(tmp_path / 'log.unsaved.jsonl')] == [7.0]

def test_an_overwritten_checkpoints_tokenizer_and_samples_go_too(tmp_path):
    save_step(tmp_path, 1)
    (tmp_path / 'adapter').mkdir()
    for name in OPTIONAL:
        (tmp_path / name).write_text('of the old run')
    prepare_out_dir(RUN, config(tmp_path, overwrite=True))
    save_checkpoint(RUN, config(tmp_path), tiny(), TOK, 1, {})
    assert not os.path.exists(tmp_path / 'samples.jsonl')
    assert 'of the old run' not in [(tmp_path / name).read_text() for name in OPTIONAL if (tmp_path / name).exists()]
    assert load_tokenizer(str(tmp_path)).name == 'bytes'

def test_a_new_folder_is_made_and_one_that_cannot_be_is_told(tmp_path, capsys):
    prepare_out_dir(RUN, config(tmp_path / 'a/b'))
    assert files(tmp_path / 'a/b') == ['log.jsonl']
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file/below', '/proc/nowhere'):
        assert f"--out_dir={folder}: " in one_line(capsys, lambda: prepare_out_dir(RUN, config(folder)))

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize('resume', [False, True])
def test_a_folder_without_permission_is_told(tmp_path, capsys, resume):
    save_step(tmp_path, 1)
    os.chmod(tmp_path, 0o500)
    try:
        cfg = config(tmp_path, resume=resume, overwrite=not resume)
        assert f"--out_dir={tmp_path}: " in one_line(capsys, lambda: prepare_out_dir(RUN, cfg))
    finally:
        os.chmod(tmp_path, 0o700)

def test_resume_without_a_checkpoint_is_told(tmp_path, capsys):
    cfg, model = config(tmp_path, resume=True), tiny()
    assert 'state.pt is missing' in one_line(capsys, lambda: prepare_out_dir(Run('cpu', 'float32'), cfg))
    assert load_checkpoint(RUN, config(tmp_path), model, {}) is None

def test_the_end_of_text_is_the_tokenizers_where_the_model_has_more_tokens(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=2, n_embd=8))
    save_checkpoint(RUN, config(tmp_path), model, TOK, 1, {})
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert (saved['vocab_size'], saved['eos_token_id'], saved['bos_token_id']) == (300, 256, 256)

def test_resume_with_another_shape_is_told(tmp_path, capsys):
    save_step(tmp_path, 1)
    line = one_line(capsys, lambda: load_checkpoint(RUN, config(tmp_path, resume=True), tiny(n_embd=16), {}))
    assert f"n_embd is 8 in {tmp_path} and 16 in this run" in line

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

@pytest.mark.parametrize('damage', ['text', 'empty', 'half', 'not a zip', 'pickle', 'no optimizer', 'no rng', 'a list',
                                    'another optimizer', 'code', 'wrong rng'])
def test_a_damaged_state_is_told_in_one_line(tmp_path, capsys, damage):
    save_step(tmp_path, 1)
    path = tmp_path / 'state.pt'
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage == 'no optimizer':
        torch.save({k: v for k, v in state.items() if k != 'optimizers'}, path)
    elif damage == 'no rng':
        torch.save({k: v for k, v in state.items() if k != 'rng'}, path)
    elif damage == 'wrong rng':
        torch.save({**state, 'rng': {'cpu': torch.zeros(3)}}, path)
    elif damage == 'a list':
        torch.save([1, 2], path)
    elif damage == 'another optimizer':
        other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
        torch.save({**state, 'optimizers': {'adam': other.state_dict()}}, path)
    elif damage == 'code':
        torch.save(Malicious(str(tmp_path / 'executed')), path)
    else:
        path.write_bytes({'text': b'hello world', 'empty': b'', 'half': whole[:len(whole) // 2], 'pickle': b'\x80\x02.',
                          'not a zip': b'PK\x03\x04 and so on'}[damage])
    model, cfg = tiny(), config(tmp_path, resume=True)
    optimizers = {'adam': make_optimizer(model, cfg)}
    line = one_line(capsys, lambda: load_checkpoint(RUN, cfg, model, optimizers))
    assert f"{path}: not a state to resume from (it changed since it was saved" in line
    rewrite = json.loads((tmp_path / 'options.json').read_text())
    rewrite['files']['state.pt'] = digest(path) # should the damage come before the digest
    (tmp_path / 'options.json').write_text(json.dumps(rewrite))
    line = one_line(capsys, lambda: load_checkpoint(RUN, cfg, model, optimizers))
    assert f"{path}: not a state to resume from" in line
    assert not os.path.exists(tmp_path / 'executed')

@pytest.mark.parametrize('name', ['state.pt', 'model.safetensors'])
def test_a_flipped_bit_is_found(tmp_path, capsys, name):
    save_step(tmp_path, 1)
    whole = (tmp_path / name).read_bytes()
    for at in range(0, len(whole), len(whole) // 12):
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        assert f"{tmp_path / name}: not a state to resume from (it changed" in one_line(
            capsys, lambda: loaded_step(tmp_path))
    (tmp_path / name).write_bytes(whole)
    assert loaded_step(tmp_path) == (1, 1.0)

def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    save_step(tmp_path, 1)
    for value in (float('nan'), float('inf')):
        model = tiny()
        with torch.no_grad():
            model.h[0].mlp.c_fc.weight[3, 3] = value
        line = one_line(capsys, lambda: save_checkpoint(RUN, config(tmp_path), model, TOK, 2, {}), code=1)
        assert line.startswith('h.0.mlp.c_fc.weight is not finite after step 2; nothing was saved since')
    assert loaded_step(tmp_path) == (1, 1.0)

def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, 'rename', lambda *a: (done.append('rename'), rename(*a)))
    if not os.path.exists('/proc/self/fd'):
        pytest.skip("asks Linux for the names of open files")
    save_step(tmp_path, 1)
    before = [os.path.basename(name) for name in done[:done.index('rename')]]
    assert {'state.pt', 'model.safetensors', 'config.json', 'options.json'} <= set(before)

def test_a_folder_that_was_removed_is_made_anew(tmp_path):
    cfg = config(tmp_path / 'out')
    prepare_out_dir(RUN, cfg)
    shutil.rmtree(tmp_path / 'out')
    log(RUN, cfg, 1, loss=1.0)
    shutil.rmtree(tmp_path / 'out')
    save_step(tmp_path / 'out', 2)
    assert loaded_step(tmp_path / 'out') == (2, 2.0)

def test_one_run_a_folder(tmp_path, capsys):
    """Another process, as long as it lives, however it ends."""
    pytest.importorskip('fcntl', reason="Windows has no such locks")
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from common.records import lock; lock(sys.argv[2]); "
            "print('locked', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, '-c', code, ROOT, str(tmp_path / '.lock')], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b'locked\n'
        line = one_line(capsys, lambda: prepare_out_dir(RUN, config(tmp_path)))
        assert line.startswith(f"{tmp_path}: another process is writing here")
        assert files(tmp_path) == []
    finally:
        other.kill()
        other.wait(), other.stdout.close()
    prepare_out_dir(RUN, config(tmp_path))
    prepare_out_dir(RUN, config(tmp_path)) # its own lock stops nobody
    assert os.path.realpath(tmp_path / '.lock') in LOCKS

def test_a_folder_that_another_run_made_anew(tmp_path, capsys):
    """The first run's folder was removed, its lock with it."""
    pytest.importorskip('fcntl', reason="Windows has no such locks")
    cfg = config(tmp_path / 'out')
    prepare_out_dir(RUN, cfg)
    shutil.rmtree(tmp_path / 'out')
    os.makedirs(tmp_path / 'out')
    import fcntl
    with open(tmp_path / 'out/.lock', 'w') as other: # as another process holds it
        fcntl.flock(other, fcntl.LOCK_EX)
        assert 'another process is writing here' in one_line(capsys, lambda: log(RUN, cfg, 1, loss=1.0))
    log(RUN, cfg, 1, loss=1.0)

def test_what_a_kill_left_half_moved_is_read_as_one(tmp_path, monkeypatch):
    """By whoever loads it, before any run completes it."""
    save_step(tmp_path, 1)
    replace, moved = os.replace, []

    def once(old, new):
        if moved and '.saved' in old:
            raise KeyboardInterrupt
        moved.extend([new] * ('.saved' in old))
        replace(old, new)

    with monkeypatch.context() as m:
        m.setattr(os, 'replace', once)
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, 2)
    assert len(moved) == 1 and load_policy(str(tmp_path)).wte.weight[0, 0].item() == 2.0

@pytest.mark.parametrize('key, value', [
    ('files', None), ('files', []), ('files', {}), ('inputs', None), ('inputs', []), ('options', 3)])
def test_options_of_an_odd_shape(tmp_path, capsys, key, value):
    save_step(tmp_path, 1)
    about = json.loads((tmp_path / 'options.json').read_text())
    (tmp_path / 'options.json').write_text(json.dumps(about | {key: value, 'options': None}))
    assert 'options.json: wanted `files`, `inputs` and `options`' in one_line(capsys, lambda: loaded_step(tmp_path))
    load_policy(str(tmp_path)) # only resuming needs them

def save_onto_a_file(folder):
    cfg = config(os.path.join(folder, 'out'))
    run = start(cfg)
    prepare_out_dir(run, cfg)
    if run.is_master:
        shutil.rmtree(cfg.out_dir)
        open(cfg.out_dir, 'w').close()
    save_checkpoint(run, cfg, tiny(), TOK, 1, {})

def test_a_save_that_fails_ends_all_processes(tmp_path, capfd):
    assert in_processes(2, save_onto_a_file, str(tmp_path)) == [1, 1]
    err = capfd.readouterr().err
    assert err.count('error: ') == 1 and 'could not be written' in err and 'Traceback' not in err

def test_resume_auto_goes_on_or_starts(tmp_path):
    cfg = config(tmp_path, resume='auto')
    prepare_out_dir(RUN, cfg)
    assert cfg.resume is False and load_checkpoint(RUN, cfg, tiny(), {}) is None
    save_step(tmp_path, 1)
    cfg = config(tmp_path, resume='auto')
    prepare_out_dir(RUN, cfg)
    assert cfg.resume is True and load_checkpoint(RUN, cfg, tiny(), {})['step'] == 1

def test_resuming_with_other_inputs(tmp_path, capsys):
    """Another model is refused, other data is noted, be the path the same or not."""
    from sft import Config as Options
    model, data = checkpoint(tmp_path / 'a'), records(tmp_path / 'a.jsonl', [dict(text='a')])
    other = checkpoint(tmp_path / 'b', seed=9)
    moved = shutil.copytree(model, tmp_path / 'c')
    cfg = lambda **more: Options(**dict(out_dir=str(tmp_path / 'out'), init_from=model, train_data=data) | more)
    prepare_out_dir(run := Run('cpu', 'float32'), first := cfg())
    save_checkpoint(run, first, tiny(), TOK, 1, {})

    def resume(**more):
        prepare_out_dir(run := Run('cpu', 'float32'), again := cfg(resume=True, **more))
        load_checkpoint(run, again, tiny(), {})
        return capsys.readouterr().out

    assert '--' not in resume() and '--' not in resume(init_from=str(moved))
    assert one_line(capsys, lambda: resume(init_from=other)) == (
        f"--init_from={other}: is not what the run in {tmp_path}/out began with; wanted the same model")
    scratch = dict(init_from='scratch', out_dir=str(tmp_path / 'scratch'))
    prepare_out_dir(run := Run('cpu', 'float32'), first := cfg(tokenizer='bytes', **scratch))
    save_checkpoint(run, first, tiny(), TOK, 1, {})
    assert '--tokenizer=gpt2: is not what the run in' in one_line(capsys, lambda: resume(**scratch))
    records(tmp_path / 'a.jsonl', [dict(text='b')])
    assert f"--train_data={data}: is not what the run in {tmp_path}/out began with; going on" in resume()

def test_an_unfinished_checkpoint_says_so(tmp_path, capsys):
    for step, said in ((3, 'unfinished, saved at step 3 of 12'), (12, '')):
        save_step(tmp_path, step)
        capsys.readouterr()
        load_policy(str(tmp_path))
        assert capsys.readouterr().out == (f"--policy={tmp_path}: {said}\n" if said else '')
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=8, reward_head=True))
    save_checkpoint(RUN, config(tmp_path / 'rm'), model, TOK, 3, {})
    load_reward_model(str(tmp_path / 'rm'))
    assert '--reward_model=' in capsys.readouterr().out

def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    cfg = config(tmp_path)
    for step in (1, 2, 2, 3, 4): # of the second step a second line, that of a measurement made after the checkpoint
        log(RUN, cfg, step, loss=step / 2, lr=1e-5)
        if step == 2 and not os.path.exists(tmp_path / 'state.pt'):
            save_step(tmp_path, 2)
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": ' + '9' * 5000 + '}\n' + '[' * 100_000 + '\n') # somebody's joke
        f.write('{"step": 5, "lo') # cut short by a kill
    assert loaded_step(tmp_path) == (2, 2.0)
    lines = read_log(str(tmp_path / 'log.jsonl'))
    assert [(line['step'], line['loss'], line['lr']) for line in lines] == [(1, 0.5, 1e-5), (2, 1.0, 1e-5)]
    log(RUN, cfg, 3, loss=9.0)
    assert json.loads(open(tmp_path / 'log.jsonl').read().splitlines()[2])['loss'] == 9.0

def test_resuming_says_which_options_changed(tmp_path, capsys):
    save_step(tmp_path, 1)
    capsys.readouterr()
    load_checkpoint(RUN, config(tmp_path, resume=True, lr=0.5), tiny(), {'adam': make_optimizer(tiny(), Config())})
    assert capsys.readouterr().out.splitlines()[0] == '--lr: 8.0 before, 0.5 from here on'

def test_resuming_with_other_options(tmp_path):
    """What the optimizer is told is what this run's options say; what it has learnt stays."""
    model = tiny()
    adam = make_optimizer(model, Config(weight_decay=0.1), betas=(0.9, 0.95))
    model.wte.weight.grad = torch.ones_like(model.wte.weight)
    adam.step()
    save_checkpoint(RUN, config(tmp_path), model, TOK, 1, {'adam': adam})
    again = make_optimizer(model, Config(weight_decay=0.3), betas=(0.9, 0.99))
    load_checkpoint(RUN, config(tmp_path, resume=True), model, {'adam': again})
    assert [g['weight_decay'] for g in again.param_groups] == [0.3, 0.0]
    assert again.param_groups[0]['betas'] == (0.9, 0.99)
    first = lambda optimizer: optimizer.state[model.wte.weight]['exp_avg']
    assert torch.equal(first(again), first(adam)) and first(adam).abs().min() > 0

def test_another_script_cannot_go_on(tmp_path, capsys):
    save_step(tmp_path, 1)
    path = str(tmp_path / 'state.pt')
    state = torch.load(path, weights_only=True)
    del state['script']
    for more, name in ((dict(script='dpo.py'), 'dpo.py'), ({}, 'an older version')):
        rewrite_state(tmp_path, state | more)
        assert one_line(capsys, lambda: loaded_step(tmp_path)) == (
            f"--resume=True: the checkpoint in {tmp_path} is one of {name}; wanted one of tiny.py")

def test_a_folder_that_is_not_where_it_began(tmp_path, monkeypatch):
    """No model to begin from, or the word scratch: no folder can be meant."""
    monkeypatch.chdir(tmp_path)
    prepare_out_dir(RUN, Config(out_dir='.', init_from=''))
    prepare_out_dir(RUN, Config(out_dir='scratch', init_from='scratch'))
    assert os.path.exists('log.jsonl') and os.path.exists('scratch/log.jsonl')

def test_a_log_that_is_not_text(tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(b'{"step": 1}\n\xff\xfe\n5\n{"step": 2}\n')
    assert read_log(tmp_path / 'log.jsonl') == [dict(step=1), dict(step=2)]

def test_small_numbers_survive_the_log(tmp_path):
    log(RUN, config(tmp_path), 1, lr=1.234e-7, tokens=12345678)
    line = read_log(str(tmp_path / 'log.jsonl'))[0]
    assert line['lr'] == pytest.approx(1.234e-7, rel=1e-3) and line['tokens'] == pytest.approx(12345678, rel=1e-5)

def test_only_the_first_process_writes(tmp_path):
    second = Run('cpu', 'float32', rank=1)
    save_checkpoint(second, config(tmp_path), tiny(), TOK, 1, {})
    log(second, config(tmp_path), 1, loss=1.0)
    assert os.listdir(tmp_path) == []

def test_save_if_due(capsys):
    run, saved = Run('cpu', 'float32'), []
    cfg = Config(max_steps=5, save_every=2)
    for step in range(1, 6):
        save_if_due(run, cfg, step, saved.append)
    assert saved == [2, 4, 5]
    for step in range(1, 6):
        save_if_due(run, Config(max_steps=5, save_every=0), step, saved.append)
    assert saved == [2, 4, 5, 5]
    run.interrupted = signal.SIGTERM
    with pytest.raises(KeyboardInterrupt) as ended:
        save_if_due(run, cfg, 3, saved.append)
    assert ended.value.args == (signal.SIGTERM,)
    assert saved[-1] == 3 and 'step 3' in capsys.readouterr().err
