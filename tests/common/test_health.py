"""common/health.py: each rule on a log that is sick in one way, healthy logs, and the table of docs/log.md.

    python tests/common/test_health.py      # write the table anew
"""
import json
import os
import sys

if __name__ == '__main__':
    sys.path[:0] = [os.path.abspath(os.path.join(os.path.dirname(__file__), *up)) for up in (['..'], ['..', '..'])]

import pytest

import ppo
from common import rollout
from common.health import RULES, Health
from common.run import Run
from common.training import finish_step, training_bar
from tiny import PROMPTS, ROOT, Config, checkpoint, records, run

PPO = dict(batch_size=64, minibatches=2, max_steps=20, critic='separate')
RLOO = PPO | dict(kind='rloo')
DPO = dict(batch_size=32, max_steps=20, loss='dpo', beta=0.1)
REWARD = dict(batch_size=16, max_steps=20, lm_coef=0.0)

def lines(start=1, stop=20, **keys):
    """Return lines of a log; keys: {key: its value at a step}, None where it is left out."""
    found = [dict(step=i) | {key: at(i) for key, at in keys.items()} for i in range(start, stop + 1)]
    return [{key: value for key, value in line.items() if value is not None} for line in found]

def rl(**keys):
    """Return the log of a healthy run of reinforcement learning, but for keys."""
    return lines(**dict(
        first_ratio=lambda i: 7e-6, kl=lambda i: 0.1 * (i - 1), kl_k3=lambda i: 0.12 * (i - 1),
        clipfrac=lambda i: 0.14, approx_kl=lambda i: 0.15, ended=lambda i: 0.98, length=lambda i: 9 - 0.15 * i,
        explained_variance=lambda i: -0.4 if i < 5 else 0.5, entropy=lambda i: 0.6 - 0.025 * i, group_std=lambda i: 0.2,
        gold=lambda i: 0.4 + 0.02 * i + 0.02 * (-1) ** i, reward=lambda i: -0.1 + 0.05 * i,
        grad_norm=lambda i: 0.2 + 0.3 * (i % 4), loss=lambda i: 0.69) | keys)

def pairs(**keys):
    """Return the log of a healthy run of DPO or the reward model, but for keys."""
    return lines(**dict(loss=lambda i: 0.7 - 0.02 * i, accuracy=lambda i: 0.5 + 0.01 * i, margin=lambda i: 0.2 * i,
                        grad_norm=lambda i: 3.0, val_loss=lambda i: {0: 0.69, 10: 0.5, 20: 0.51}.get(i),
                        val_accuracy=lambda i: {0: 0.5, 20: 0.65}.get(i), val_shorter_wins=lambda i: 0.4,
                        val_pairs=lambda i: 500) | dict(start=0) | keys)

def judge(tmp_path, log, options, dtype='float32', began=0):
    """Return the lines on a log that comes line by line, and then the last one."""
    path, said, health = tmp_path / 'log.jsonl', [], Health(options, dtype, began)
    path.write_text('')
    for line in log:
        with open(path, 'a') as f:
            f.write(json.dumps(line) + '\n')
        health.tell(path, said.append, line is log[-1])
    return said

HEALTHY = dict(ppo=(rl(), PPO), rloo=(rl(), RLOO), dpo=(pairs(), DPO), reward=(pairs(), REWARD),
               steep=(pairs(margin=lambda i: 0.8 * i), DPO | dict(beta=8.0)), # 2 nats: a margin grows with beta
               kto=(lines(kl=lambda i: 0.0, margin=lambda i: 3.0, loss=lambda i: 0.45), dict(DPO, loss=None)),
               sft=(lines(loss=lambda i: 5 - 0.2 * i, val_loss=lambda i: {1: 6.9, 20: 0.7}.get(i)), REWARD))

@pytest.mark.parametrize('name', HEALTHY)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_healthy_run_hears_nothing(tmp_path, name, dtype):
    assert judge(tmp_path, *HEALTHY[name], dtype) == []

# what is seen, the step at which it is said, the log and its options. Three lines make a median, six a comparison with
# the start
SICK = [
    ('first_ratio 0.0011, above 1e-3', 1, rl(first_ratio=lambda i: 0.0011), PPO),
    ('kl -0.3, below', 5, rl(kl=lambda i: -0.3, kl_k3=lambda i: 0.5), PPO),
    ('kl 101, above 100', 7, rl(kl=lambda i: 101.0 if i == 7 else 99.0, length=lambda i: 64.0), PPO),
    ('kl 24, above', 12, rl(kl=lambda i: 2.0 * i, length=lambda i: 7.9), PPO), # 3 nats a token are 23.7
    ('clipfrac 0.41', 2, rl(clipfrac=lambda i: 0.41 if i == 2 else 0.1), PPO),
    ('approx_kl 0.6', 20, rl(approx_kl=lambda i: 0.03 * i if i == 20 else 0.1), PPO),
    ('ended 0.4', 5, rl(ended=lambda i: 0.9 if i < 4 else 0.4), PPO), # the median of steps 3 to 5
    ('length 17', 9, rl(length=lambda i: 8.0 + (i > 7) * 9), PPO),
    ('length 3.9', 9, rl(length=lambda i: 8.0 - (i > 7) * 4.1), PPO),
    ('explained_variance 0', 15, rl(explained_variance=lambda i: 0.0), PPO),
    ('entropy 0.02', 16, rl(entropy=lambda i: 0.6 if i < 15 else 0.02), PPO),
    ('group_std 0.01', 3, rl(group_std=lambda i: 0.01), RLOO),
    ('gold 0.3', 17, rl(gold=lambda i: 0.8 + 0.02 * (-1) ** i if i < 16 else 0.3 - 0.1 * (i > 17)), PPO),
    ('grad_norm 11', 18, rl(grad_norm=lambda i: 1.0 if i < 16 else 11.0), PPO),
    ('loss 0.693, stays', 10, pairs(loss=lambda i: 0.693), DPO),
    ('loss 0.688, stays', 10, pairs(loss=lambda i: 0.688), REWARD),
    ('loss 0.8, above its start', 2, pairs(loss=lambda i: 0.8), DPO),
    ('loss 1.2, above its start', 2, pairs(loss=lambda i: 1.2), DPO | dict(loss='hinge')),
    ('loss 28, above its start', 2, pairs(loss=lambda i: 28.0), DPO | dict(loss='ipo')), # 1 / (4 beta^2) = 25
    ('margin 11', 12, pairs(margin=lambda i: 4.0 if i < 11 else 11.0), DPO), # beta 0.1
    ('margin 12', 12, pairs(margin=lambda i: 4.0 if i < 11 else 12.0), DPO | dict(loss='simpo', beta=2.0)),
    ('accuracy 0.5, near', 12, pairs(accuracy=lambda i: 0.5), REWARD | dict(max_steps=24, batch_size=32)),
    ('val_accuracy 0.59, not above', 20, pairs(val_accuracy=lambda i: {0: 0.5, 20: 0.59}.get(i)), REWARD),
    ('val_loss 0.55', 20, pairs(val_loss=lambda i: {0: 0.69, 10: 0.5, 20: 0.55}.get(i)), DPO)]

@pytest.mark.parametrize('seen, step, log, options', SICK, ids=[case[0] for case in SICK])
def test_each_sickness_is_said_once_and_at_the_end(tmp_path, seen, step, log, options):
    alarm, summary = judge(tmp_path, log, options)
    assert alarm.startswith(f"health: step {step}: {seen}") and '; try: ' in alarm
    assert summary.startswith(f"health: see docs/log.md; step {step}: {seen}")

def test_every_rule_has_its_sick_log(tmp_path):
    said = {judge(tmp_path, log, options)[0] for _, _, log, options in SICK}
    for rule in RULES:
        assert any(f": {rule.key} " in text and rule.see.replace('`', '') in text for text in said), rule

# 3 sqrt(2 * 0.5 / 128) = 0.265, with 16 answers 0.75; a KL that is tiny, or below 0 once, is noise
@pytest.mark.parametrize('log, options, dtype', [
    (rl(first_ratio=lambda i: 0.29), PPO, 'bfloat16'),
    (rl(kl=lambda i: -0.3, kl_k3=lambda i: 0.5), PPO | dict(batch_size=8), 'float32'),
    (rl(kl=lambda i: -0.005, kl_k3=lambda i: 1e-7), PPO, 'float32'),
    (rl(kl=lambda i: -0.09, kl_k3=lambda i: 1e-7), PPO, 'float16'),
    (rl(kl=lambda i: -0.5 if i == 9 else 0.5), PPO, 'float32'),
    (rl(group_std=lambda i: 0.0), RLOO | dict(kind='reinforce'), 'float32'), # no answers to compare
    (rl(gold=lambda i: 0.8 - 0.02 * i, reward=lambda i: -0.1 * i), PPO, 'float32'), # both fall
    (rl(gold=lambda i: 0.6 + 0.1 * (-1) ** i - 0.3 * (i > 17)), PPO, 'float32'), # no more than the noise
    (rl(gold=lambda i: 0.4 + 0.01 * i + 0.5 * (i == 9)), PPO, 'float32'), # one line is no peak
    (rl(explained_variance=lambda i: 0.0), PPO | dict(critic='shared'), 'float32'), # it has to learn from nothing
    (rl(grad_norm=lambda i: 0.0 if i % 2 else 1.0), PPO, 'float16'), # steps that the scaler left out
    (pairs(loss=lambda i: 0.693), REWARD | dict(lm_coef=0.5), 'float32'), # it has the cross-entropy in it
    (pairs(loss=lambda i: 0.693), DPO | dict(loss='simpo'), 'float32'),
    (pairs(accuracy=lambda i: 0.5), REWARD | dict(batch_size=2), 'float32'), # few pairs
    (pairs(val_accuracy=lambda i: {20: 0.59}.get(i), val_pairs=lambda i: 99), REWARD, 'float32')])
def test_what_the_batch_or_the_dtype_explains_is_no_alarm(tmp_path, log, options, dtype):
    assert judge(tmp_path, log, options, dtype) == []

def test_sixteen_bits_have_limits_too(tmp_path):
    assert 'step 1: first_ratio 0.31' in judge(tmp_path, rl(first_ratio=lambda i: 0.31), PPO, 'bfloat16')[0]
    assert 'step 5: kl -0.3' in judge(tmp_path, rl(kl=lambda i: -0.3, kl_k3=lambda i: 0.5), PPO, 'float16')[0]

def test_a_resumed_run_knows_its_past(tmp_path):
    log = rl(clipfrac=lambda i: 0.5 if i < 9 else 0.1, length=lambda i: 8.0 + (i > 7) * 9)
    assert [text.split(',')[0] for text in judge(tmp_path, log, PPO, began=8)] == [
        'health: step 9: length 17', 'health: see docs/log.md; step 1: clipfrac 0.5'] # the first was said before

def test_a_stage_says_it_while_it_runs(tmp_path, monkeypatch, capfd):
    """Its answers are sampled at another temperature than they are scored at."""
    sample = rollout.sample_answers
    monkeypatch.setattr(rollout, 'sample_answers', lambda *args: sample(*args, temperature=0.95))
    options = dict(policy=checkpoint(tmp_path / 'sft'), prompts=records(tmp_path / 'prompts.jsonl', PROMPTS),
                   reward_model=checkpoint(tmp_path / 'reward', reward_head=True), out_dir=str(tmp_path / 'out'),
                   max_new_tokens=8, batch_size=8, epochs=1)
    heard = lambda: [line for line in capfd.readouterr().out.splitlines() if line.startswith(('health', 'saved'))]
    run(ppo, max_steps=3, **options)
    alarm, summary, saved = heard()
    assert alarm.startswith('health: step 1: first_ratio ') and 'sampling and scoring disagree' in alarm
    assert summary.startswith('health: see docs/log.md; step 1: first_ratio ') and saved.startswith('saved ')
    run(ppo, max_steps=4, resume=True, **options)
    assert heard()[0] == summary # a resumed run has read its log

def test_other_processes_say_nothing(tmp_path, capfd):
    cfg, second = Config(out_dir=str(tmp_path), max_steps=1), Run('cpu', 'float32', rank=1)
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "clipfrac": 0.9}\n')
    for step in (bar := training_bar(second, cfg, None)):
        finish_step(second, cfg, bar, step + 1, dict(clipfrac=0.9), [], lambda done: None)
    assert capfd.readouterr() == ('', '')

# ---------------------------------------------------------------------------------------------------------------------
# the page

PAGE = os.path.join(ROOT, 'docs', 'log.md')

def with_table(page):
    """Return the text of docs/log.md with the table of these rules."""
    head = '| you see | reason | try |\n|--|--|--|\n'
    before, after = page.split(head, 1)
    rows = ''.join(f"| `{rule.key}` {rule.see} | {rule.reason} | {rule.remedy} |\n" for rule in RULES)
    return before + head + rows + '\n' + after.split('\n\n', 1)[1]

def test_the_page_has_the_rules():
    with open(PAGE, encoding='utf-8') as f:
        page = f.read()
    assert with_table(page) == page, 'run python tests/common/test_health.py'

if __name__ == '__main__':
    with open(PAGE, encoding='utf-8') as f:
        page = f.read()
    with open(PAGE, 'w', encoding='utf-8') as f:
        f.write(with_table(page))
