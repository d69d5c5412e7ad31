"""
What the seven training scripts do alike: what they refuse, how they stop and resume, micro-batches, one gradient sum.

Each stage is given its smallest options. The files of the methods have their losses; test_processes.py has several
processes.
"""
import importlib
import os
import signal
from dataclasses import dataclass

import pytest
import torch

from common import batches
from common.run import Run
from common.training import Means
from model import GPT
from tiny import (COMPARISONS, DEMONSTRATIONS, PROMPTS, RANKINGS, assert_ctrl_c_resumes_exactly, assert_nan_stops,
                  assert_resumes_exactly, assert_same_for_micro_batches, checkpoint, has_checkpoint, interrupt_after,
                  launch, losses, records, run, stops, weights)

STAGES = ('sft', 'reward', 'dpo', 'kto', 'rrhf', 'ppo', 'reinforce')
SAMPLING = ('ppo', 'reinforce')
FROM_PREFERENCES = ('reward', 'dpo', 'kto', 'rrhf')
SUPERVISED = ('sft', *FROM_PREFERENCES)
SCRATCH = dict(init_from='scratch', tokenizer='bytes', n_layer=1, n_head=2, n_embd=16, block_size=64)

@dataclass
class Stage:
    name: str
    folder: str # of its models and records: {folder} in an option stands for it
    options: dict # the fewest with which it trains

    def __post_init__(self):
        self.script = importlib.import_module(self.name)
        self.start = 'policy' if self.name in SAMPLING else 'init_from' # the option of the model that it starts from
        self.data = 'prompts' if self.name in SAMPLING else 'train_data' # and of its records
        self.out = os.path.join(self.folder, 'out')

    def given(self, **more):
        more = {k: v.format(folder=self.folder) if isinstance(v, str) else v for k, v in more.items()}
        unread = {'critic_lr'} if more.get('critic') == 'shared' else set()
        if more.get('init_from', 'scratch') != 'scratch':
            unread |= SCRATCH.keys()
        return {k: v for k, v in self.options.items() if k not in unread} | more

    def run(self, **more):
        return run(self.script, **dict(out_dir=self.out) | self.given(**more))

    def stops(self, capsys, code=2, **more):
        return stops(capsys, self.script, code, **dict(out_dir=self.out) | self.given(**more))

def make(name, folder):
    """Make a stage with the models and records that it needs."""
    policy = checkpoint(folder / 'sft')
    if name in SAMPLING:
        own = dict(ppo=dict(minibatches=2, epochs=2, critic_lr=1e-3, batch_size=4), reinforce=dict(batch_size=8))[name]
        return Stage(name, str(folder), own | dict(
            policy=policy, reward_model=checkpoint(folder / 'rm', 1, reward_head=True), max_new_tokens=6,
            prompts=records(folder / 'prompts.jsonl', PROMPTS)))
    records(folder / 'comparisons.jsonl', COMPARISONS)
    data = records(folder / 'data.jsonl', DEMONSTRATIONS if name == 'sft' else RANKINGS)
    own = SCRATCH if name == 'sft' else dict(init_from=policy)
    return Stage(name, str(folder), own | dict(train_data=data, batch_size=4))

@pytest.fixture
def stage(request, tmp_path):
    """Make the stage whose name a test is parametrised with."""
    return make(request.param, tmp_path)

def each(*names):
    return pytest.mark.parametrize('stage', names or STAGES, indirect=True)

def table(names, rows):
    """Parametrise by rows (stage, …)."""
    return pytest.mark.parametrize(f"stage, {names}", rows, indirect=['stage'])

def cross(names, rows):
    return [(name, *row) for name in names for row in rows]

# ---------------------------------------------------------------------------------------------------------------------
# options

@table('options, expected', [
    *cross(STAGES, [
        (dict(epochs=0), '--epochs=0: epochs must be at least 1, got 0'),
        (dict(batch_size=4, grad_accum=3), '--batch_size=4: must be a multiple of 3, processes x grad_accum'),
        (dict(resume=True), 'state.pt is missing, there is no checkpoint to resume from'),
        (dict(seed=2**32), 'seed must be below 2^32'),
        (dict(lr=-1), '--lr=-1: lr must be at least 0, got -1.0'),
        (dict(lr_schedule='step'), "lr_schedule must be one of constant, linear, cosine, got 'step'")]),
    *cross(SUPERVISED, [
        (dict(init_from='nowhere'), 'nowhere'),
        (dict(train_data='nowhere.jsonl'), 'nowhere.jsonl: no such file'),
        (dict(val_data='nowhere.jsonl'), 'nowhere.jsonl: no such file')]),
    *cross(SAMPLING, [
        (dict(policy='nowhere'), 'nowhere'),
        (dict(reward_model='nowhere'), 'nowhere'),
        (dict(prompts='nowhere.jsonl'), 'nowhere.jsonl: no such file'),
        (dict(prompts=''), "prompts must be a file of prompts, got ''"),
        (dict(max_steps=0), '--max_steps=0: max_steps must be at least 1, got 0'),
        (dict(clip=-0.1), '--clip=-0.1: clip must be at least 0, got -0.1'),
        (dict(kl_coef=-1), '--kl_coef=-1: kl_coef must be at least 0, got -1.0'),
        (dict(max_new_tokens=64), 'wanted block_size above max_new_tokens'),
        (dict(max_new_tokens=65), 'wanted block_size above max_new_tokens'),
        (dict(gold='data.toy.world:gold'),
         "--gold=data.toy.world:gold: ValueError: not a prompt of the toy world: 'Hi' ("),
        (dict(gold='toy'), "--gold=toy: '' names no function; wanted MODULE:FUNCTION")]),
    ('sft', dict(train_date='x'), '--train_date=x: unknown option train_date, did you mean train_data?'),
    ('sft', dict(lr='fast'), "--lr=fast: lr must be float, got 'fast'"),
    ('sft', dict(train_data=''), "train_data must be a file of records, see --help, got ''"),
    ('sft', dict(loss_on='answer'), "--loss_on=answer: loss_on must be response or all, got 'answer'"),
    ('sft', dict(val_fraction=1.0), '--val_fraction=1.0: val_fraction must be at least 0 and below 1, got 1.0'),
    ('sft', dict(eval_batches=-1), 'eval_batches must be at least 0, got -1'),
    ('sft', dict(val_data='', val_fraction=0.01), 'rows or tokens are too few with val_fraction=0.01'),
    ('sft', dict(temperature=0), '--temperature=0: temperature must be above 0, got 0.0'),
    ('sft', dict(tokenizer='klingon'), "wanted gpt2, bytes, a .tiktoken file or a checkpoint folder, got 'klingon'"),
    ('sft', dict(n_head=3), 'n_embd must be a multiple of n_head, got n_embd=16, n_head=3'),
    ('reward', dict(init_form='x'), '--init_form=x: unknown option init_form, did you mean init_from?'),
    ('reward', dict(epochs=1.5), '--epochs=1.5: epochs must be int, got 1.5'),
    ('reward', dict(train_data=''), "train_data must be a file of records, see --help, got ''"),
    ('reward', dict(normalise_on=0), '--normalise_on=0: normalise_on must be at least 1, got 0'),
    ('reward', dict(lm_coef=-1), '--lm_coef=-1: lm_coef must be at least 0, got -1.0'),
    ('dpo', dict(label_smooth=0.1), '--label_smooth=0.1: unknown option label_smooth, did you mean label_smoothing?'),
    ('dpo', dict(beta='high'), "--beta=high: beta must be float, got 'high'"),
    ('dpo', dict(beta=-0.1), '--beta=-0.1: beta must be at least 0, got -0.1'),
    ('dpo', dict(label_smoothing=0.5),
     '--label_smoothing=0.5: label_smoothing must be at least 0 and below 0.5, got 0.5'),
    ('dpo', dict(loss='sympo'), "--loss=sympo: loss must be one of dpo, ipo, hinge, simpo, orpo, got 'sympo'"),
    ('dpo', dict(simpo_margin=-1), '--simpo_margin=-1: simpo_margin must be at least 0, got -1.0'),
    ('dpo', dict(train_data=''), "train_data must be a file of records, see --help, got ''"),
    ('kto', dict(undesirable=2), '--undesirable=2: unknown option undesirable, did you mean undesirable_weight?'),
    ('kto', dict(beta=0), '--beta=0: beta must be above 0, got 0.0'),
    ('kto', dict(batch_size=1), '--batch_size=1: batch_size must be at least 2, got 1'),
    ('kto', dict(desirable_weight=-1), '--desirable_weight=-1: desirable_weight must be at least 0, got -1.0'),
    ('kto', dict(undesirable_weight=-1), '--undesirable_weight=-1: undesirable_weight must be at least 0, got -1.0'),
    ('kto', dict(train_data=''), "train_data must be a file of records, see --help, got ''"),
    ('rrhf', dict(rank_coeff=2), '--rank_coeff=2: unknown option rank_coeff, did you mean rank_coef?'),
    ('rrhf', dict(rank_coef=-1), '--rank_coef=-1: rank_coef must be at least 0, got -1.0'),
    ('rrhf', dict(use_scores=1), '--use_scores=1: use_scores must be bool, got 1'),
    ('rrhf', dict(train_data=''), "train_data must be a file of records, see --help, got ''"),
    ('ppo', dict(rewardmodel='x'), '--rewardmodel=x: unknown option rewardmodel, did you mean reward_model?'),
    ('ppo', dict(epochs='two'), "--epochs=two: epochs must be int, got 'two'"),
    ('ppo', dict(lam=1.5), '--lam=1.5: lam must be between 0 and 1, got 1.5'),
    ('ppo', dict(critic='none'), "--critic=none: critic must be separate or shared, got 'none'"),
    ('ppo', dict(kl_target=6.0, kl_coef=0.0), 'kl_coef must be above 0 with kl_target, which multiplies it, got 0.0'),
    ('ppo', dict(kl_target=6.0, kl_gain=5.0), '--kl_gain=5.0: kl_gain must be above 0 and below 5, got 5.0'),
    ('ppo', dict(ptx_coef=1.0), 'ptx_data must be given together with ptx_coef'),
    ('ppo', dict(ptx_coef=1.0, ptx_data='{folder}/prompts.jsonl', ptx_batch_size=1, grad_accum=2),
     '--ptx_batch_size=1: must be at least 2, processes x grad_accum'),
    ('reinforce', dict(n_answer=2), '--n_answer=2: unknown option n_answer, did you mean n_answers?'),
    ('reinforce', dict(kind='ppo'), "--kind=ppo: kind must be reinforce, rloo or grpo, got 'ppo'"),
    ('reinforce', dict(kind='rloo', n_answers=1), '--n_answers=1: n_answers must be at least 2 with kind=rloo, got 1'),
    ('reinforce', dict(kind='reinforce', n_answers=0), '--n_answers=0: n_answers must be at least 1, got 0'),
    ('reinforce', dict(batch_size=6), '--batch_size=6: must be a multiple of 4, processes x n_answers'),
    ('ppo', dict(batch_size=6, n_answers=4), '--batch_size=6: must be a multiple of 4, processes x n_answers'),
    ('ppo', dict(n_answers=0), '--n_answers=0: n_answers must be at least 1, got 0'),
    ('reinforce', dict(baseline_decay=1.0),
     '--baseline_decay=1.0: baseline_decay must be at least 0 and below 1, got 1.0'),
    ('reinforce', dict(baseline_decay=0.5),
     '--baseline_decay=0.5: baseline_decay must be left at 0.9: only kind=reinforce reads it, got 0.5'),
    ('reinforce', dict(scale_std=False),
     '--scale_std=False: scale_std must be left at True: only kind=grpo reads it, got False'),
    ('reinforce', dict(kind='reinforce', refill=2),
     '--refill=2: refill must be left at 0: only kind=rloo or grpo reads it, got 2'),
    ('reinforce', dict(refill=-1), '--refill=-1: refill must be at least 0, got -1'),
    ('reinforce', dict(clip_high=-0.1), '--clip_high=-0.1: clip_high must be at least 0, got -0.1'),
    ('reinforce', dict(loss='cispo', clip_high=1.0, clip=0.3),
     '--clip=0.3: clip must be left at 0.2: only loss=clip reads it, got 0.3'),
    ('reinforce', dict(loss='gspo'), "--loss=gspo: loss must be clip or cispo, got 'gspo'"),
    ('reinforce', dict(ratio='answer'), "--ratio=answer: ratio must be token or sequence, got 'answer'"),
    ('reinforce', dict(average='tokens'),
     "--average=tokens: average must be token, answer or constant, got 'tokens'"),
])
def test_bad_options(stage, capsys, options, expected):
    assert expected in stage.stops(capsys, **dict(max_steps=1) | options)
    assert not has_checkpoint(stage.out)

# ---------------------------------------------------------------------------------------------------------------------
# records

RANKING = '{"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, 1]}'
COMPARISON = '{"prompt": "Hi", "chosen": "a", "rejected": "b"}'
LABELLED = '{"prompt": "Hi", "response": "a", "label": true}'
BAD_RANKINGS = [
    ('{"prompt": "Hi", "responses": ["a"], "ranks": [0]}', '`responses` to be a list of two texts or more'),
    ('{"prompt": "Hi", "responses": ["a", ""], "ranks": [0, 1]}', '`responses` to be a list of two texts or more'),
    ('{"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, 1, 2]}', '`ranks` to be 2 integers'),
    ('{"prompt": "Hi", "responses": ["a", "b"], "ranks": [0]}', '`ranks` to be 2 integers'),
    ('{"prompt": "Hi", "responses": ["a", "b"]}', 'to have `ranks`'),
    ('{"prompt": "Hi", "responses": ["a", "b"], "ranks": [0, 1], "scores": [1]}', '`scores` to be 2 numbers')]
BAD_COMPARISONS = [
    ('{"prompt": "Hi", "chosen": "a"}', 'to have `rejected`'),
    ('{"prompt": "Hi", "chosen": "a", "rejected": ""}', '`rejected` to be text that is not empty'),
    ('{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "big"}', '`margin` to be a number')]
BAD_LABELS = [
    ('{"prompt": "Hi", "response": "a"}', 'a row of kind unpaired to have `label`'),
    ('{"prompt": "Hi", "response": "a", "label": 1}', '`label` to be true (a good answer) or false'),
    ('{"prompt": "Hi", "response": "a", "label": "good"}', '`label` to be true (a good answer) or false'),
    ('{"prompt": "Hi", "response": "", "label": true}', '`response` to be text that is not empty')]
BAD_DEMONSTRATIONS = [
    ('{"prompt": "Hi"}', 'to have `response`'),
    ('{"prompt": "Hi", "response": " "}', '`response` to be text that is not empty'),
    ('{"messages": [{"role": "user", "content": "Hi"}]}', '`messages` to end in the turn of the assistant')]

@table('good, bad, expected', [
    *cross(STAGES, [(None, '{"prompt": "Hi", "response": "Yo"', 'wanted one JSON object a line'),
                    (None, '[1, 2]', 'wanted a JSON object, got list')]),
    *cross(FROM_PREFERENCES, [(RANKING, *row) for row in BAD_RANKINGS]),
    *cross(FROM_PREFERENCES, [(COMPARISON, *row) for row in BAD_COMPARISONS]),
    *cross(['kto'], [(LABELLED, *row) for row in BAD_LABELS]),
    *cross(['sft'], [(None, *row) for row in BAD_DEMONSTRATIONS]),
    *cross(SAMPLING, [(None, '{"question": "Hi"}', 'to have `prompt`')])])
@pytest.mark.parametrize('between', [0, 1]) # empty lines
def test_a_bad_row_is_named_by_file_and_line(stage, capsys, good, bad, expected, between):
    with open(stage.options[stage.data], encoding='utf-8') as f:
        good = good or f.readline().strip()
    path = os.path.join(stage.folder, 'bad.jsonl')
    with open(path, 'w', encoding='utf-8') as f:
        f.write(good + '\n' + between * '\n' + bad + '\n')
    said = stage.stops(capsys, max_steps=1, **{stage.data: path})
    assert said.startswith(f"{path}:{2 + between}: ") and expected in said and not has_checkpoint(stage.out)

@table('ties', [*cross(FROM_PREFERENCES, [(dict(ranks=[0, 0]),)]), ('rrhf', dict(ranks=[0, 1], scores=[0.5, 0.5]))])
def test_nothing_but_ties_is_refused(stage, tmp_path, capsys, ties):
    path = records(tmp_path / 'ties.jsonl', [dict(prompt='Hi', responses=['a', 'b']) | ties])
    said = stage.stops(capsys, train_data=path)
    assert said == f"{path}: all answers of every prompt tie; wanted some that are ranked above others"
    assert not has_checkpoint(stage.out)

# ---------------------------------------------------------------------------------------------------------------------
# checkpoints and out_dir

@each()
def test_models_that_do_not_fit(stage, tmp_path, capsys):
    head = checkpoint(tmp_path / 'head', reward_head=True)
    said = stage.stops(capsys, max_steps=1, **{stage.start: head})
    assert said == f"--{stage.start}={head}: is a reward model, wanted a language model"
    (tmp_path / 'empty').mkdir()
    assert str(tmp_path / 'empty') in stage.stops(capsys, max_steps=1, **{stage.start: str(tmp_path / 'empty')})
    assert not has_checkpoint(stage.out)

@each(*SAMPLING)
def test_reward_models_that_do_not_fit(stage, tmp_path, capsys):
    refused = lambda folder: stage.stops(capsys, max_steps=1, reward_model=folder)
    policy = stage.options['policy']
    assert refused(policy) == (
        f"--reward_model={policy}: is a language model, wanted a reward model (made by reward.py)")
    other = checkpoint(tmp_path / 'other', vocab_size=300, reward_head=True)
    assert refused(other) == (
        f"--reward_model={other}: its vocabulary has 300 tokens, the policy's has 257; wanted the same tokenizer")
    short = checkpoint(tmp_path / 'short', block_size=32, reward_head=True)
    assert refused(short) == (
        f"--reward_model={short}: its context is 32 tokens, the policy's 64; wanted one at least as long")
    (tmp_path / 'empty').mkdir()
    assert str(tmp_path / 'empty') in refused(str(tmp_path / 'empty'))
    assert not has_checkpoint(stage.out)

@table('key, more', [*cross(SUPERVISED, [('init_from', dict(init_from='{folder}/sft'))]),
                     *cross(SAMPLING, [('policy', {}), ('reward_model', {})]),
                     ('sft', 'teacher', dict(teacher='{folder}/sft'))])
def test_a_run_does_not_write_where_it_began(stage, capsys, key, more):
    began = stage.given(**more)[key]
    before = weights(began)
    for overwrite in (False, True):
        said = stage.stops(capsys, **more, out_dir=began, max_steps=1, overwrite=overwrite)
        assert said.startswith(f"--out_dir={began}: it, or its `adapter`, is --{key} too; wanted another folder")
    assert weights(began) == before

@each()
def test_a_checkpoint_is_replaced_only_when_told_so_and_never_for_bad_input(stage, tmp_path, capsys):
    old = checkpoint(tmp_path / 'old', seed=7)
    before = weights(old)
    said = stage.stops(capsys, out_dir=old, max_steps=1)
    assert said.startswith(f"--out_dir={old}: holds a checkpoint; continue it by --resume=True")
    wrong = [{stage.data: 'nowhere.jsonl'}, {stage.start: 'nowhere'}]
    wrong += [dict(n_head=3)] if stage.name == 'sft' else [dict(reward_model='nowhere')] * (stage.name in SAMPLING)
    for options in wrong:
        stage.stops(capsys, out_dir=old, max_steps=1, overwrite=True, **options)
        assert weights(old) == before
    stage.run(out_dir=old, max_steps=1, overwrite=True)
    assert weights(old) != before

@table('changed, expected', [
    ('sft', dict(n_embd=32), 'n_embd is 16 in {out} and 32 in this run'),
    *cross(FROM_PREFERENCES, [(dict(init_from='{folder}/wide'), 'n_embd is 16 in {out} and 32 in this run')]),
    *cross(SAMPLING, [(dict(policy='{folder}/wide'), 'n_embd is 16 in {out} and 32 in this run')]),
    ('ppo', dict(critic='shared'), 'value_head is False in {out} and True in this run')])
def test_resume_with_another_model_is_refused(stage, tmp_path, capsys, changed, expected):
    checkpoint(tmp_path / 'wide', n_embd=32)
    stage.run(max_steps=1)
    before = weights(stage.out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        stage.run(max_steps=2, resume=True, **changed)
    line = capsys.readouterr().err.strip().split('\n')[-1] # the bar of dpo.py's reference comes before
    assert stopped.value.code == 2
    assert line == f"error: --resume=True: {expected.format(out=stage.out)}; wanted the same model"
    assert weights(stage.out) == before

# ---------------------------------------------------------------------------------------------------------------------
# stopping and resuming

KINDS = [('reinforce', dict(kind='reinforce')), ('reinforce', dict(kind='rloo')),
         ('reinforce', dict(kind='grpo', epochs=2)),
         ('reinforce', dict(kind='grpo', epochs=2, ratio='sequence', average='answer', scale_std=False))]

@table('options', [
    ('sft', dict(dropout=0.1)), # dropout: the generator counts
    ('sft', dict(dtype='float16', checkpointing=True)), ('sft', dict(teacher='{folder}/sft', temperature=2.0)),
    ('reward', dict(dropout=0.1)), # the shorter run ends with normalised scores; the longer takes those it trained
    ('dpo', {}), ('kto', {}), ('rrhf', {}), ('ppo', dict(kl_target=1.0, kl_gain=0.08)),
    ('ppo', dict(critic='shared', kl_target=1.0, kl_gain=0.08)), *KINDS])
def test_four_steps_equal_two_and_two_more(stage, tmp_path, options):
    assert_resumes_exactly(tmp_path, stage.script, **stage.given(**options))

@table('options', [*cross((*SUPERVISED, 'ppo'), [({},)]), KINDS[0]])
def test_ctrl_c(stage, tmp_path, monkeypatch, capsys, options):
    assert_ctrl_c_resumes_exactly(tmp_path, monkeypatch, capsys, stage.script, **stage.given(**options))

def test_sigterm_saves_and_ends_with_143(tmp_path, monkeypatch, capsys):
    """As a job scheduler sends it; the closed terminal's SIGHUP goes the same way."""
    sft = make('sft', tmp_path)
    for number in (signal.SIGTERM, signal.SIGHUP):
        out = str(tmp_path / str(number))
        with monkeypatch.context() as m:
            interrupt_after(m, 2, number)
            code = launch(m, sft.script, out_dir=out, max_steps=3, save_every=0, **sft.options)
        assert code == 128 + number and f"saved {out} at step 2" in capsys.readouterr().err
        sft.run(out_dir=out, max_steps=3, resume='auto')
        assert torch.load(os.path.join(out, 'state.pt'), weights_only=True)['step'] == 3

@each()
def test_what_a_finished_run_says(stage, capsys):
    stage.run(max_steps=1)
    assert f"saved {stage.out}; next: python " in capsys.readouterr().out
    before = weights(stage.out)
    stage.run(max_steps=1, resume=True)
    assert f"{stage.out}: all 1 steps are done; a larger --max_steps trains on" in capsys.readouterr().out
    assert weights(stage.out) == before

@each('sft', 'ppo')
def test_warmup_that_outlasts_the_run_is_noted(stage, capsys):
    stage.run(max_steps=2, warmup_steps=2)
    assert '--warmup_steps=2: the run of 2 steps ends before --lr is reached' in capsys.readouterr().out

ONE_STEP = dict(epochs=1, minibatches=1) # an iteration

@table('poisoned, options', [*cross(SUPERVISED, [('init_from', dict(init_from='{folder}/sft'))]),
                             *cross(SAMPLING, [('policy', ONE_STEP), ('reward_model', ONE_STEP)])])
def test_a_loss_that_is_no_number_stops(stage, tmp_path, capsys, poisoned, options):
    """A model of NaN at once; and a step that throws the weights far away, at the next one."""
    assert_nan_stops(tmp_path, capsys, stage.script, poisoned, **stage.given(grad_clip=0.0, **options))

@each(*SAMPLING)
def test_a_step_that_throws_the_weights_far_away_stops_within_an_iteration(stage, capsys):
    stage.run(max_steps=1, save_every=1)
    before = weights(stage.out)
    line = stage.stops(capsys, code=1, max_steps=2, resume=True, lr=1e30, grad_clip=0.0, epochs=2)
    assert 'step 2' in line and weights(stage.out) == before and GPT.from_pretrained(stage.out)

# ---------------------------------------------------------------------------------------------------------------------
# an optimizer step

PAIRS = ('loss', 'accuracy', 'margin', 'chosen_reward', 'rejected_reward')

@table('keys, options', [
    ('sft', ('loss', 'grad_norm'), {}), ('sft', ('loss', 'grad_norm'), dict(teacher='{folder}/sft', temperature=2.0)),
    *[('reward', ('loss', 'accuracy', 'grad_norm'), dict(lm_coef=lm_coef) | data) for lm_coef in (0.0, 0.3)
      for data in ({}, dict(train_data='{folder}/comparisons.jsonl', batch_size=4))],
    # beta 0.5: a loss of about 1, so that 1e-6 is within the precision of its float32 sums
    *[('dpo', PAIRS, dict(loss=loss, beta=0.5)) for loss in ('dpo', 'ipo', 'hinge', 'simpo', 'orpo')],
    *[('kto', ('loss', 'kl', 'desirable_reward', 'undesirable_reward', 'margin'), dict(lr=0.01, beta=0.5) | data)
      for data in ({}, dict(train_data='{folder}/comparisons.jsonl'))], # parts of equal size, and of 3, 2, 2 and 1
    ('rrhf', ('loss', 'rank_loss', 'sft_loss', 'accuracy'), {}),
    ('ppo', ('loss', 'policy_loss', 'value_loss', 'kl', 'ratio'), ONE_STEP),
    *[('ppo', ('loss', 'policy_loss', 'value_loss', 'kl', 'ratio'), ONE_STEP | more)
      for more in (dict(critic='shared'), dict(n_answers=2), dict(n_answers=4))], # as many prompts as parts, and fewer
    *[(name, ('loss', 'policy_loss', 'kl_loss', 'kl'), options) for name, options in KINDS]])
def test_micro_batches_of_different_token_counts(stage, tmp_path, monkeypatch, keys, options):
    """One batch of all rows, whole and in four parts: the same gradients and numbers."""
    given = stage.given(**dict(batch_size=8, max_steps=2) | options)
    assert_same_for_micro_batches(monkeypatch, tmp_path, stage.script, keys, **given)

@table('options, a_step', [*cross(SUPERVISED, [({}, 1)]), ('ppo', {}, 8), ('ppo', dict(critic='shared'), 4),
                           ('reinforce', {}, 1), ('reinforce', dict(kind='grpo', epochs=2, minibatches=2), 4)])
@pytest.mark.parametrize('grad_accum', [1, 2, 4])
def test_gradients_are_summed_once_per_optimizer_step(stage, monkeypatch, options, a_step, grad_accum):
    """Whatever the number of micro-batches; PPO makes two epochs of two minibatches, its critic as many steps."""
    backward, summed, stepped = [], [], []
    noting = lambda kept, function: lambda *a, **k: (kept.append(1), function(*a, **k))[1]
    monkeypatch.setattr(Run, 'backward', noting(backward, Run.backward))
    monkeypatch.setattr(Run, 'sum_gradients', noting(summed, Run.sum_gradients))
    monkeypatch.setattr(torch.optim.AdamW, 'step', noting(stepped, torch.optim.AdamW.step))
    stage.run(max_steps=2, grad_accum=grad_accum, **options)
    assert len(summed) == len(stepped) == 2 * a_step
    models = 2 if stage.name == 'ppo' and not options else 1 # which share a loss: a critic of its own and the policy
    assert len(backward) * models == 2 * a_step * grad_accum

@each()
def test_an_update_returns_plain_numbers(stage, monkeypatch):
    """What is measured of a micro-batch is kept without its graph; what comes out is what the log has."""
    found, kept, update, add = [], [], stage.script.update, Means.add
    monkeypatch.setattr(stage.script, 'update', lambda *a: (found.append(update(*a)), found[-1])[1])
    monkeypatch.setattr(Means, 'add', lambda self, *a: (add(self, *a), kept.extend(self.totals.values()))[0])
    log = stage.run(max_steps=2)
    assert len(found) == len(log) == 2 and kept and not any(total.requires_grad for total in kept)
    for measured, line in zip(found, log):
        assert {type(value) for value in measured.values()} <= {float, int}
        assert {'loss', 'lr', 'grad_norm'} <= set(measured) <= set(line)
        assert {key: line[key] for key in measured} == pytest.approx(measured, rel=1e-7)

# a gradient that is scaled up by 65536 and not down again would show; some are too large, and left out
@each()
def test_float16_and_checkpointing_train_as_float32_does(stage, tmp_path):
    norms, scalers = {}, {}
    options = dict(epochs=4, minibatches=1, max_new_tokens=8, batch_size=8) if stage.name == 'ppo' else {}
    options |= dict(init_from='{folder}/sft') if stage.name == 'sft' else {}
    for dtype in ('float32', 'float16'):
        out = str(tmp_path / dtype)
        lines = stage.run(out_dir=out, max_steps=4, dtype=dtype, checkpointing=dtype == 'float16', lr=1e-6, **options)
        norms[dtype] = [line['grad_norm'] for line in lines]
        scalers[dtype] = torch.load(os.path.join(out, 'state.pt'), weights_only=True)['scaler']
    left_out = norms['float16'].count(0.0)
    assert left_out < 4
    for a, b in zip(norms['float16'], norms['float32'], strict=True):
        assert a == 0.0 or 0.5 < a / b < 2.0 # what is sampled may differ
    assert scalers['float32'] == {}
    assert scalers['float16']['scale'] == 65536.0 / 2 ** left_out or stage.name in SAMPLING # several steps a line

# all eight rows: prompts of 8 * 26 + 16 bytes; the demonstrations' answers have 48 and two each, the rankings' 94 and
# two for each of 23
@table('n_tokens', [('sft', 288), ('kto', 288), ('reward', 364), ('dpo', 364), ('rrhf', 364)])
def test_micro_batches_are_split_by_tokens(stage, tmp_path, monkeypatch, n_tokens):
    seen, split_by_tokens = [], batches.split_by_tokens
    monkeypatch.setattr(batches, 'split_by_tokens', lambda rows, lengths, parts, least: (
        seen.append((len(rows), sum(lengths), parts, least)), split_by_tokens(rows, lengths, parts, least))[1])
    labelled = [r | dict(label=True) for r in DEMONSTRATIONS]
    data = records(tmp_path / 'd.jsonl', dict(sft=DEMONSTRATIONS, kto=labelled).get(stage.name, RANKINGS))
    stage.run(max_steps=1, train_data=data, batch_size=8, grad_accum=2)
    assert seen == [(8, n_tokens, 2, 1)]

# ---------------------------------------------------------------------------------------------------------------------
# torch.compile

@pytest.fixture(scope='module')
def compiler():
    """Skip where torch.compile cannot make a kernel: it needs a C++ compiler."""
    try:
        torch.compile(lambda x: (x + 1).cos())(torch.ones(3))
    except Exception as error: # torch has many names for it
        pytest.skip(f"torch.compile makes no kernel here: {type(error).__name__}")
    yield
    torch.compiler.reset()

@pytest.mark.slow
@each('sft')
def test_a_compiled_run_is_the_same(stage, tmp_path, compiler):
    plain, compiled = (stage.run(out_dir=str(tmp_path / str(compile)), compile=compile, max_steps=3)
                       for compile in (False, True))
    for a, b in zip(losses(plain), losses(compiled), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
