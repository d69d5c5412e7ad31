"""Options that the chosen method does not read are refused, in a line that names the option and what reads it."""
import importlib
from dataclasses import dataclass

import pytest

from common.options import parse_config, unread

NEEDED = dict( # what each script cannot do without
    sft='--train_data=x', reward='--train_data=x', dpo='--train_data=x', rrhf='--train_data=x', kto='--train_data=x',
    ppo='--prompts=x', reinforce='--prompts=x', evaluate='--models=a=b --prompts=x', sample='', demo='',
    bench='--workload=sft', microscope='', collect='--prompts=x --annotator=human')

def refused(script, words, capsys):
    """Return the line that ends the script with these options."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(importlib.import_module(script).Config, f"{NEEDED[script]} {words}".split())
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return line

@dataclass
class Config:
    loss: str = 'a'
    share: float = 0.25
    size: int = 3

    def __post_init__(self):
        unread(self, self.loss == 'b', 'loss=b', 'share', 'size')

def test_a_default_may_be_said(tmp_path):
    assert parse_config(Config, ['--share=0.25', '--size=3']) == Config()
    assert parse_config(Config, ['--loss=b', '--share=0.5']).share == 0.5

def test_a_config_file_counts_as_a_flag_does(tmp_path, capsys):
    path = tmp_path / 'a.py'
    path.write_text("loss = 'b'\nsize = 4\n")
    assert parse_config(Config, [str(path)]).size == 4
    with pytest.raises(SystemExit):
        parse_config(Config, [str(path), '--loss=a'])
    assert capsys.readouterr().err == f"error: {path}:2: size must be left at 3: only loss=b reads it, got 4\n"
    assert parse_config(Config, [str(path), '--loss=a', '--size=3']).size == 3

@pytest.mark.parametrize('script, words, reader', [
    *((script, '--eval_every=7', 'val_data') for script in ('sft', 'reward', 'dpo', 'rrhf', 'kto')),
    *(('dpo', f'--loss={loss} --label_smoothing=0.1', 'loss=dpo') for loss in ('ipo', 'hinge', 'simpo', 'orpo')),
    *(('dpo', f'--loss={loss} --simpo_margin=1', 'loss=simpo') for loss in ('dpo', 'ipo', 'hinge', 'orpo')),
    *(('sft', f'--init_from=x --{key}', 'init_from=scratch')
      for key in ('tokenizer=bytes', 'n_layer=2', 'n_head=2', 'n_embd=8', 'block_size=9')),
    ('sft', '--val_data=x --val_fraction=0.1', 'a run without val_data'), ('sft', '--eval_batches=3', 'val_data'),
    ('sft', '--temperature=2', 'teacher'), ('sft', '--divergence=jsd', 'teacher'), ('sft', '--on_policy=1', 'teacher'),
    ('sft', '--teacher=x --jsd_beta=0.9', 'divergence=jsd'), ('sft', '--teacher=x --max_new_tokens=9', 'on_policy'),
    ('reinforce', '--kind=rloo --baseline_decay=0.5', 'kind=reinforce'),
    *((script, words, reader) for script in ('ppo', 'reinforce') for words, reader in (
        ('--lcb_coef=2', 'ensemble=lcb'), ('--reward_weight=2', 'reward'), ('--reward_beta=2', 'reward_policy'))),
    ('ppo', '--value_coef=0.5', 'critic=shared'),
    ('ppo', '--kl_gain=0.2', 'kl_target'), ('ppo', '--ptx_batch_size=8', 'ptx_coef'),
    ('sample', '--temperature=0 --top_k=5', 'a temperature above 0'),
    ('sample', '--temperature=0 --top_p=0.9', 'a temperature above 0'),
    ('evaluate', '--models= --figure_runs=a=b --prompts= --gold=data.toy.world:gold', 'models'),
    ('evaluate', '--models= --figure_runs=a=b --prompts= --max_new_tokens=8', 'models'),
    ('microscope', '--prompt=Hi --max_prompts=3', 'a run without prompt'),
    *(('microscope', f'--samples=x --{key}=3', 'a run without samples') for key in (
        'policy', 'reference', 'reward_model', 'critic', 'prompt', 'prompts', 'max_prompts', 'n_answers', 'ppo')),
    ('bench', '--tokens=64', 'workload=memory'), ('bench', '--workload=memory --data=x', 'a workload that is timed'),
    ('bench', '--init_from=x --preset=small', 'a run without init_from'),
    ('bench', '--workload=ppo --steps=2', 'a workload of optimizer steps'),
    ('demo', '--rounds_of=dpo', '--rounds above 1'), ('demo', '--rounds_by=ai', '--rounds above 1'),
    ('collect', '--prompts= --annotator=simulated --merge=a,b --keep=best', 'a run without merge'),
    ('collect', '--prompts= --answers=x --policy=y', 'a run without answers'),
    ('collect', '--prompts= --answers=x --n_answers=8', 'a run without answers'),
    ('collect', '--prompts= --answers=x --temperature=2', 'a run without answers'),
    ('collect', '--prompts= --answers=x --max_new_tokens=9', 'a run without answers'),
    ('collect', '--gold=data.toy.world:gold', 'annotator=simulated'), ('collect', '--noise=0', 'annotator=simulated'),
    ('collect', '--tie=0.3', 'any annotator but human'), ('collect', '--port=80', 'page=True'),
    ('collect', '--guidelines=x', 'page=True'), ('collect', '--overlap=0.2', 'split'),
    ('collect', '--annotator=function --reward=f --rater=x', 'annotator=human'),
    *(('collect', f'--annotator=simulated --split=2 --{word}', 'a run without split') for word in (
        'rater=x', 'tie=1', 'keep=best', 'ask=ratings', 'noise=0', 'gold=x', 'page=True', 'compare=x', 'resume=True')),
    ('collect', '--judge_instruction=x', 'annotator=ai'),
    *(('collect', f'--annotator=ai --judge=x --judge_{key}=9', 'judge_url')
      for key in ('model', 'requests', 'tokens', 'timeout', 'tries', 'cache')),
])
def test_what_reads_it(script, words, reader, capsys):
    option = words.split()[-1]
    key = option.partition('=')[0].removeprefix('--')
    line = refused(script, words, capsys)
    assert line.startswith(f"error: {option}: {key} must be left at "), line
    assert f": only {reader} reads it, got " in line

def test_eval_every_may_be_0_without_held_out_data():
    for script in ('sft', 'dpo'):
        assert parse_config(importlib.import_module(script).Config, ['--train_data=x', '--eval_every=0']).val_data == ''

@pytest.mark.parametrize('loss, beta', [('dpo', 0.1), ('ipo', 0.1), ('hinge', 0.1), ('simpo', 2.0), ('orpo', 0.1)])
def test_each_loss_of_dpo_has_its_own_beta(loss, beta):
    Config = importlib.import_module('dpo').Config
    assert parse_config(Config, ['--train_data=x', f'--loss={loss}']).beta == beta
    assert parse_config(Config, ['--train_data=x', f'--loss={loss}', '--beta=0.7']).beta == 0.7
