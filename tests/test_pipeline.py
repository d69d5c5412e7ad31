"""The whole way through the toy world with a tiny model, and the pages of options side by side."""
import dataclasses
import importlib
import os

import pytest

import collect
import dpo
import kto
import ppo
import reinforce
import reward
import rrhf
import sft
from common.checkpoints import load_policy, load_reward_model
from common.options import RunOptions, TrainOptions, parse_config
from common.records import read_records
from common.tokens import load_tokenizer
from data.toy import prepare, world
from tiny import ROOT, run

TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=96)

def test_the_toy_world_from_text_to_dpo(tmp_path, monkeypatch):
    # the answers of so small a model are all equally bad: here the best ones are about ten letters long
    monkeypatch.setattr(world, 'gold', lambda prompt, response: -abs(len(response) - 10) / 10)
    at = lambda *names: str(tmp_path.joinpath(*names))
    counts = dict(n_text=60, n_text_val=12, n_demonstrations=16, n_demonstrations_val=8, n_prompts=12, n_prompts_val=6,
                  n_prompts_test=6, n_pairs=1, vocab_size=300)
    options = [f"--{k}={v}" for k, v in (dict(out_dir=at('data')) | counts).items()]
    prepare.main(parse_config(prepare.Config, options))
    data = lambda name: at('data', f"{name}.jsonl")

    log = run(sft, out_dir=at('base'), tokenizer=at('data', 'toy.tiktoken'), train_data=data('text_train'),
              val_data=data('text_val'), loss_on='all', max_steps=20, batch_size=8, **TINY | dict(lr=0.01))
    assert set(log[1]) == {'step', 'loss', 'lr', 'grad_norm', 'time'} and log[-1]['val_loss'] < log[0]['val_loss'] - 0.5
    log = run(sft, out_dir=at('sft'), init_from=at('base'), train_data=data('demonstrations_train'),
              val_data=data('demonstrations_val'), max_steps=8, batch_size=8, lr=0.01)
    assert log[-1]['val_loss'] < log[0]['val_loss']
    assert load_tokenizer(at('sft')).n_vocab == load_policy(at('sft')).config.vocab_size == 300

    for split in ('train', 'val'):
        run(collect, out=at(f"rankings_{split}.jsonl"), policy=at('sft'), prompts=data(f"prompts_{split}"),
            max_new_tokens=12, gold='data.toy.world:gold')
    n = len(read_records(at('rankings_train.jsonl'), 'rankings'))
    assert n >= 8

    preferences = dict(init_from=at('sft'), train_data=at('rankings_train.jsonl'), val_data=at('rankings_val.jsonl'))
    log = run(reward, out_dir=at('reward'), max_steps=4, batch_size=4, eval_every=2, **preferences)
    assert set(log[-1]) == {'step', 'time', 'val_loss', 'val_accuracy', 'val_ceiling', 'val_shorter_wins', 'val_pairs'}
    assert [line['step'] for line in log if 'val_accuracy' in line] == [0, 2, 4]
    load_reward_model(at('reward'))

    for loss in ('dpo', 'ipo'):
        log = run(dpo, out_dir=at(loss), max_steps=4, batch_size=4, loss=loss, **preferences)
        assert log[-1]['step'] == 4 and 'val_margin' in log[-1] and log[0]['val_margin'] == pytest.approx(0.0, abs=1e-5)

    log = run(rrhf, out_dir=at('rrhf'), max_steps=4, batch_size=4, **preferences)
    assert log[-1]['step'] == 4 and 'val_rank_loss' in log[-1]
    log = run(kto, out_dir=at('kto'), max_steps=4, batch_size=4, **preferences)
    assert log[-1]['step'] == 4 and log[0]['val_loss'] == pytest.approx(0.5, abs=1e-5)

    options = dict(policy=at('sft'), reward_model=at('reward'), prompts=data('prompts_train'), max_new_tokens=12,
                   batch_size=4, minibatches=2, epochs=2, max_steps=2, gold='data.toy.world:gold')
    for name, more in dict(separate=dict(whiten_rewards=True, entropy_coef=0.01),
                           shared=dict(critic='shared', kl_target=6.0, early_stop_kl=0.1),
                           ptx=dict(ptx_coef=0.5, ptx_data=data('text_train'), ptx_batch_size=4)).items():
        log = run(ppo, out_dir=at(name), **options | more)
        assert log[0]['first_ratio'] < 1e-4 and {'reward', 'kl', 'gold', 'ended'} <= set(log[1])
        load_policy(at(name))
    for kind in ('reinforce', 'rloo', 'grpo'):
        log = run(reinforce, out_dir=at(kind), kind=kind, n_answers=2, **options)
        assert log[0]['first_ratio'] < 1e-4 and {'reward', 'kl', 'gold', 'ended'} <= set(log[1])
        load_policy(at(kind))

# ---------------------------------------------------------------------------------------------------------------------
# the pages of options

STAGES = ['sft', 'reward', 'dpo', 'kto', 'ppo', 'reinforce', 'rrhf']
SCRIPTS = STAGES + ['collect', 'evaluate', 'sample', 'demo', 'bench']

def options_of(name):
    return {f.name: f for f in dataclasses.fields(importlib.import_module(name).Config)}

def test_an_option_has_one_type_everywhere():
    types = {}
    for name in SCRIPTS:
        for key, field in options_of(name).items():
            types.setdefault(key, {}).setdefault(field.type, []).append(name)
    assert {key: found for key, found in types.items() if len(found) > 1} == {}
    assert {t for found in types.values() for t in found} <= {str, int, float, bool, bool | str}

@pytest.mark.parametrize('key, default', [
    ('seed', 1), ('device', 'auto'), ('dtype', 'auto'), ('compile', False), ('checkpointing', False),
    ('resume', False), ('overwrite', False),
    ('grad_accum', 1), ('grad_clip', 1.0), ('weight_decay', 0.0), ('max_new_tokens', 64), ('train_data', ''),
    ('val_data', ''), ('prompts', ''), ('policy', 'out/sft'), ('dropout', 0.0), ('beta2', 0.99)])
def test_a_shared_option_has_one_default(key, default):
    found = {name: options_of(name)[key].default for name in STAGES + ['collect'] if key in options_of(name)}
    assert found and all(value == default for value in found.values()), found

def test_every_stage_has_the_options_of_a_stage():
    for name in STAGES:
        wanted = {'out_dir', 'seed', 'device', 'dtype', 'compile', 'checkpointing', 'max_steps', 'batch_size',
                  'grad_accum', 'lr', 'lr_schedule', 'warmup_steps', 'weight_decay', 'grad_clip', 'save_every',
                  'log_every', 'resume', 'overwrite'}
        wanted |= {'policy', 'reward_model', 'prompts'} if name in ('ppo', 'reinforce') else {
            'init_from', 'train_data', 'val_data', 'eval_every'}
        assert wanted <= set(options_of(name)), (name, wanted - set(options_of(name)))
        assert options_of(name)['out_dir'].default == f"out/{name}"

@pytest.mark.parametrize('name', STAGES)
def test_a_stages_own_page_repeats_no_shared_option(name):
    """Only those whose default is its own."""
    Config = importlib.import_module(name).Config
    base, = Config.__bases__
    assert issubclass(base, TrainOptions)
    shared = {f.name: f.default for f in dataclasses.fields(base)}
    again = set(Config.__annotations__) & set(shared) - {'train_data'} # each says of which records
    assert {'out_dir'} <= again <= {'out_dir', 'lr_schedule', 'batch_size', 'eval_every', 'n_answers'}
    assert all(options_of(name)[key].default != shared[key] for key in again)

@pytest.mark.parametrize('name', ['collect', 'evaluate', 'sample', 'bench'])
def test_a_script_that_saves_nothing_has_no_options_of_saving(name):
    Config = importlib.import_module(name).Config
    assert Config.__bases__ == (RunOptions,)
    again = set(Config.__annotations__) & {f.name for f in dataclasses.fields(RunOptions)}
    assert all(options_of(name)[key].default != getattr(RunOptions, key) for key in again), again
    assert not set(options_of(name)) & {'save_every', 'log_every'}

def config_files():
    for folder, _, names in os.walk(os.path.join(ROOT, 'config')):
        yield from (os.path.relpath(os.path.join(folder, name), ROOT) for name in sorted(names) if name.endswith('.py'))

@pytest.mark.parametrize('path', sorted(config_files()))
def test_a_config_file_fits_the_script_it_names(path):
    """The command in its first lines names the script; what it writes lies below out/NAME."""
    text = open(os.path.join(ROOT, path), encoding='utf-8').read()
    name, = {name for name in SCRIPTS if f"python {name}.py {path}" in text}
    cfg = parse_config(importlib.import_module(name).Config, [os.path.join(ROOT, path)])
    assert (cfg.out if name == 'collect' else cfg.out_dir).startswith(f"out/{path.split('/')[1]}/")
