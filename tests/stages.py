"""
The training stages on tiny models, as test_processes.py runs them in one process, in forked ones and under torchrun:

    torchrun --nproc_per_node=2 tests/stages.py JOBS.json      # a list of [script, options, what else]
"""
import importlib
import json
import os
import signal
import sys

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sft
from common import rollout, training
from common.rollout import sample_answers
from tiny import DEMONSTRATIONS, PROMPTS, RANKINGS, checkpoint, records, run

import torch
import torch.distributed as dist

SAMPLING = ('ppo', 'ppo_shared', 'ppo_lora', 'rloo', 'reinforce')

def stages(folder):
    """Return {name: (script, options)}: every stage, on data that two processes cannot share evenly."""
    at = lambda name: os.path.join(folder, name)
    demonstrations = records(at('demonstrations.jsonl'), DEMONSTRATIONS)
    rankings = records(at('rankings.jsonl'), RANKINGS[:7]) # of two batches of 4 the second begins again
    held_out = records(at('held_out.jsonl'), RANKINGS[7:]) # one row: the second process has nothing to measure
    sft = checkpoint(at('sft_model'), n_layer=2)
    supervised = dict(init_from=sft, train_data=rankings, val_data=held_out, batch_size=4)
    sampled = dict(policy=sft, reward_model=checkpoint(at('reward_model'), 1, n_layer=2, reward_head=True),
                   prompts=records(at('prompts.jsonl'), PROMPTS), max_new_tokens=6, epochs=2, batch_size=4)
    ptx = dict(ptx_coef=0.5, ptx_data=demonstrations, ptx_batch_size=5)
    return dict(
        sft=('sft', dict(tokenizer='bytes', n_layer=2, n_head=2, n_embd=16, block_size=64, grad_accum=2, batch_size=4,
                         train_data=demonstrations, val_data=records(at('one.jsonl'), DEMONSTRATIONS[:1]))),
        reward=('reward', supervised | dict(lm_coef=0.5)),
        dpo=('dpo', supervised), ipo=('dpo', supervised | dict(loss='ipo', grad_accum=2)), rrhf=('rrhf', supervised),
        kto=('kto', supervised), dpo_lora=('dpo', supervised | dict(lora_rank=2, lora_on='all')),
        ppo=('ppo', sampled | ptx | dict(whiten_rewards=True, entropy_coef=0.01, kl_target=1.0)),
        ppo_shared=('ppo', sampled | ptx | dict(critic='shared', grad_accum=2)),
        ppo_lora=('ppo', sampled | dict(lora_rank=2)),
        rloo=('reinforce', sampled | dict(n_answers=2)),
        reinforce=('reinforce', sampled | dict(kind='reinforce', n_answers=1)))

def sample_by_row(model, prompts, tok, max_new_tokens, temperature=1.0, rows=256, desc=None):
    """Sample as rollout.sample_answers, but an answer hangs on its prompt alone, whichever process gives it."""
    answers, logps, seen = [], [], {}
    for prompt in prompts:
        nth = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
        torch.manual_seed(1000 * nth + sum(prompt))
        answer, logp = model.generate_with_logp([prompt], max_new_tokens, temperature, eos=tok.eos)
        answers, logps = answers + answer, logps + logp
    return answers, logps

def sample_with(function):
    """Let the sampling stages sample with a function, sample_by_row or rollout.sample_answers."""
    rollout.sample_answers = sft.sample_answers = function

def die_after(step):
    """SIGKILL this process at the end of the step of that number, what was due then being saved."""
    save_if_due = training.save_if_due

    def then_die(run, cfg, done, save):
        save_if_due(run, cfg, done, save)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    training.save_if_due = then_die

def main(path):
    dist.init_process_group('gloo') # one group for all jobs
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    with open(f"{path}.{os.environ['RANK']}.pid", 'w') as f:
        f.write(str(os.getpid()))
    with open(path) as f:
        jobs = json.load(f)
    for script, options, more in jobs:
        sample_with(sample_by_row if 'by row' in more else sample_answers)
        if 'die' in more and os.environ['RANK'] == '1':
            die_after(3)
        run(importlib.import_module(script), **options)

if __name__ == '__main__':
    main(sys.argv[1])
