"""Show what PPO sees at every token of an answer, in the terminal and on a page.

    python microscope.py --policy=out/toy/ppo --reference=out/toy/sft --reward_model=out/toy/reward
    python microscope.py --policy=out/toy/sft,out/toy/ppo --reference=out/toy/sft --reward_model=out/toy/reward \
        --critic=out/toy/ppo --prompt="What is the colour of the camel?"
    python microscope.py --samples=out/toy/ppo/samples.jsonl

One iteration of PPO, by ppo.py's own functions and with the options of the policy's own run: the policy answers, every
token is measured, and an update of a copy shows how the ratio moves and where the clip bites (* in the terminal). Two
policies, with a comma between, stand side by side. The page is one HTML file that needs nothing else.

With --samples nothing is computed: ppo.py and reinforce.py --show=N have written down N answers at every save, and on
the page one scrolls through training.

In a terminal, tokens that PPO pushes up (their whitened advantage is above 0) are green and the others red. Elsewhere,
or with NO_COLOR set, the others are between ⟦ and ⟧.
"""

import copy
import dataclasses
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import ppo
from common.batches import encode_prompts
from common.checkpoints import load_policy, read_log, read_options
from common.options import RunOptions, fail, launch, parse_config, require, unread
from common.records import files_of, read_records, write_atomic
from common.rollout import check_context, check_same_vocabulary
from common.run import default_signals, start, stop
from common.tokens import load_tokenizer
from common.training import make_optimizer
from common.weights import open_pretrained
from lab.per_token import COLUMNS, compare, describe_answers, legend, plain, read_samples
from lab.report import is_page

import torch

LORA = 'lora_rank', 'lora_alpha', 'lora_on'
HTML = Path(__file__).with_name('lab') / 'microscope.html'

@dataclass
class Config(RunOptions):
    policy: str = 'out/ppo' # the model to look at, a folder or a model on the hub; two, with a comma between
    reference: str = 'out/sft' # the policy before training, to which the KL is measured
    reward_model: str = 'out/reward' # a folder or a model on the hub
    critic: str = '' # a checkpoint of ppo.py; shared: the policy's own value head; empty: as PPO starts it
    prompt: str = '' # answer this one prompt
    prompts: str = '' # or the first prompts of this file; without both, of the file that the policy was trained on
    max_prompts: int = 6 # of the file
    n_answers: int = 1 # to each prompt
    ppo: str = '' # options of ppo.py, as a config file or "--lam=0 --lr=1e-4"; empty = those of the policy's own run
    samples: str = '' # instead of models: the samples.jsonl of ppo.py or reinforce.py --show=N, or two, with a comma
    out: str = 'out/microscope.html' # the page; an older one is replaced

    def __post_init__(self):
        super().__post_init__()
        folders, files = self.policy.split(','), files_of(self.samples)
        require(self, policy=(len(folders) <= 2 and all(folders), 'one folder, or two with a comma between'),
                samples=(not self.samples or len(files) <= 2 and all(files), 'one file, or two with a comma between'),
                prompts=(not (self.prompt and self.prompts), 'left out where there is a prompt'),
                max_prompts=(self.max_prompts >= 1, 'at least 1'), n_answers=(self.n_answers >= 1, 'at least 1'),
                out=(self.out.endswith('.html'), 'a file that ends with .html'))
        unread(self, not self.prompt, 'a run without prompt', 'max_prompts')
        unread(self, not self.samples, 'a run without samples',
               *(key for key in Config.__annotations__ if key not in ('samples', 'out')))

def check_out(path):
    """End the program where the page cannot be written."""
    if not os.access(os.path.dirname(path) or '.', os.W_OK) or os.path.isdir(path):
        fail(f"--out={path}: wanted a file in a folder that exists and can be written to")
    if os.path.exists(path) and not is_page(path, 'Token microscope'):
        fail(f"--out={path}: is there, and no page of the microscope; wanted another name")

def settings(cfg, folders):
    """Return the options of a policy's run, changed by --ppo."""
    try:
        words, given = shlex.split(cfg.ppo), {}
    except ValueError as e:
        fail(f"--ppo={cfg.ppo}: {e}; wanted options of ppo.py")
    for folder in folders if all(word.startswith('--') for word in words) else []:
        about = read_options(folder)
        if about.get('script') in ('ppo.py', 'reinforce.py'):
            try:
                given = {k: v for k, v in about['options'].items() if hasattr(ppo.Config, k) and k != 'show'}
                found = ppo.Config(**given)
            except (ValueError, TypeError, KeyError, AttributeError) as e:
                fail(f"{folder}/options.json: {e}; wanted the options of a run of {about['script']}")
            log = read_log(os.path.join(folder, 'log.jsonl'))
            if found.kl_target and log: # it moved during the run
                given['kl_coef'] = log[-1].get('kl_coef', found.kl_coef)
            break
    return parse_config(ppo.Config, ['--prompts=none', *(f"--{k}={v}" for k, v in given.items()), *words])

def adapt(model, options):
    """Add the adapters that the options of a run ask for."""
    if options.get('lora_rank'):
        model.adapt(*(options[key] for key in LORA))

def load_models(cfg, ppo_cfg, folder, run, tok):
    """Load ppo.Models of a policy, the critic as --critic says."""
    shared = cfg.critic == 'shared'
    if shared and not open_pretrained(folder)[0]['value_head']:
        fail(f"--critic=shared: {folder} has no value head; wanted a policy of ppo.py --critic=shared")
    unread = 'critic_lr' if shared else 'value_coef' # by this critic
    own = dict(policy=folder, reward_model=cfg.reward_model, critic='shared' if shared else 'separate',
               **{unread: getattr(ppo.Config, unread)})
    alone = dict(ensemble='mean', reward='', reward_policy='', reward_reference='', user='', max_turns=1,
                 turn_rewards=False) # the reward model's score alone can be shown of every prefix
    apart = {key: getattr(ppo.Config, key) for key in LORA} # no trunk for two: the critic may be one of another run
    models = ppo.load_models(dataclasses.replace(ppo_cfg, **own, **alone, **apart), run, tok)
    adapt(models.policy, vars(ppo_cfg))
    reference = run.freeze(load_policy(cfg.reference, 'reference').to(run.device))
    check_same_vocabulary(models.policy, reference, 'reference', cfg.reference, tok)
    check_context(models.policy, reference, 'reference', cfg.reference)
    if cfg.critic and not shared:
        path = os.path.join(cfg.critic, 'state.pt')
        try:
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=True) # the optimizers stay on the disk
            adapt(models.critic, state.get('options', {}))
            frozen = {name: p for name, p in models.critic.named_parameters() if not p.requires_grad}
            models.critic.load_state_dict(frozen | state['critic'])
        except Exception: # a damaged file makes torch.load raise nearly anything
            wrong = 'holds no critic of the shape of this reward model' if os.path.exists(path) else 'is missing'
            fail(f"--critic={cfg.critic}: {path} {wrong}; wanted a checkpoint of ppo.py with a separate critic, which "
                 "began as this reward model")
    elif not shared:
        adapt(models.critic, vars(ppo_cfg))
    return models._replace(reference=reference)

def after_update(models, batch, lengths, cfg, run):
    """Make one iteration's updates on copies; return ratio and clipped, (B, T-1) each (see `compare`)."""
    models = copy.deepcopy(models._replace(reward=None, reference=None))
    trained = ['policy'] if models.critic is models.policy else ['policy', 'critic']
    optimizers = {name: make_optimizer(getattr(models, name), cfg, eps=1e-5) for name in trained}
    ppo.update(models, optimizers, batch, lengths, cfg, run, 0)
    return compare(models.policy, batch, lengths, cfg, run)

def look(models, prompts, n_shown, tok, cfg, run):
    """Answer prompts (lists of ids), update copies; return the first n_shown answers, as describe_answers does."""
    batch, lengths, _ = ppo.roll_out(models, prompts, [{}] * len(prompts), tok, cfg, cfg.kl_coef, run)
    ratio, clipped = after_update(models, batch, lengths, cfg, run) # (B, T-1) each
    return describe_answers(models, batch, lengths, n_shown, ratio, clipped, tok, run)

def print_answer(answer, in_colour):
    """Print a table of an answer, a line per token."""
    names = {key: f' {name:>7}' for key, (name, _) in COLUMNS.items() if key in answer}
    print(''.join(names.values()) + '  token')
    for t, (label, whole) in enumerate(map(plain, token) for token in answer['tokens']):
        up = ((answer.get('whitened') or answer['advantage'])[t] or 0) > 0 # None: infinite
        text = f"\x1b[{32 if up else 31}m{label}\x1b[0m" if in_colour else label if up else f'⟦{label}⟧'
        line = [(len(names[key]), answer[key][t + (key == 'prefix')]) for key in names]
        print(''.join(f'{math.inf if x is None else x:{n}.3f}' for n, x in line)
              + ('* ' if answer['clipped'][t] else '  ') + text + (f' (part of {whole})' if whole else ''))

def about(cfg, c, n):
    """Say which models, and which options, the numbers come from."""
    critic = {'': 'as PPO starts it, a copy of the reward model', 'shared': "the policy's own value head"}.get(
        cfg.critic, f"the one saved in {cfg.critic}")
    return (f"Reference: {cfg.reference}. Reward model: {cfg.reward_model}. Critic, for V, A and return: {critic}.",
            f"PPO's options: β {c.kl_coef:g}, γ {c.gamma:g}, λ {c.lam:g}; an answer that does not end loses "
            f"{c.missing_eos_penalty:g}. Ratio and clip ({c.clip:g}) are those after an update on {n} answers of "
            f"each policy, the shown ones among them: epochs {c.epochs}, minibatches {c.minibatches}, learning rate "
            f"{c.lr:g}, a fresh optimizer{' and fresh adapters' if c.lora_rank else ''}.")

def measure(cfg):
    """Let the policies answer, and describe the answers; return them, and two texts about them."""
    run, folders, found = start(cfg), cfg.policy.split(','), []
    default_signals() # there is nothing to save
    for name, option in *zip(folders, ['policy'] * 2), (cfg.reference, 'reference'), (cfg.reward_model, 'reward_model'):
        load_tokenizer(name, option) # a mistyped one ends here
    ppo_cfg = settings(cfg, folders)
    if not cfg.prompt and not os.path.exists(path := cfg.prompts or ppo_cfg.prompts):
        fail(f"--prompts={path}: no such file; wanted a --prompt, or a file of --prompts")
    records = [dict(prompt=cfg.prompt)] if cfg.prompt else read_records(path, 'prompts')
    n_shown = len(records[:cfg.max_prompts]) * cfg.n_answers
    per_iteration = ppo_cfg.batch_size * ppo_cfg.minibatches
    n = -(-n_shown // per_iteration) * per_iteration # whole iterations in one
    ppo_cfg = dataclasses.replace(ppo_cfg, n_answers=1, warmup_steps=0, out_dir=cfg.out,
                                  grad_accum=min(ppo_cfg.grad_accum, ppo_cfg.batch_size))
    for folder in folders:
        tok = load_tokenizer(folder, 'policy')
        models = load_models(cfg, ppo_cfg, folder, run, tok)
        block_size = models.policy.config.block_size
        ppo_cfg.max_new_tokens = min(ppo_cfg.max_new_tokens, block_size // 2)
        prompts = encode_prompts(tok, records[:n], block_size - ppo_cfg.max_new_tokens, 'prompts of the update')
        shown = [ids for ids in prompts[:cfg.max_prompts] for _ in range(cfg.n_answers)]
        others = islice(cycle(prompts[cfg.max_prompts:] or prompts), n - n_shown)
        torch.manual_seed(cfg.seed) # a second policy changes nothing in what the first one says
        found += [a | dict(model=folder) for a in look(models, shown + [*others], n_shown, tok, ppo_cfg, run)]
    stop(run)
    return found, about(cfg, ppo_cfg, n)

def read(cfg):
    """Read the answers of samples.jsonl files; return them, and two texts about them."""
    found, paths = [], [os.path.join(p, 'samples.jsonl') if os.path.isdir(p) else p for p in files_of(cfg.samples)]
    for path in paths:
        folder, name = os.path.split(path)
        run = folder if folder and name == 'samples.jsonl' else path
        found += [answer | dict(model=run) for answer in read_samples(path)]
    return found, (f"Read from {' and '.join(paths)}: answers that the run learnt from in the iteration before each "
                   "save, so each save has other prompts. Ratio and clip compare the policy as it was saved, after "
                   "that iteration's updates, with the one that chose the tokens. Entropy and the likeliest tokens are "
                   "those of the saved policy. All the rest is as it was while sampling.",
                   "The run's options are in options.json beside samples.jsonl.")

def main(cfg):
    check_out(cfg.out)
    in_colour = sys.stdout.isatty() and 'NO_COLOR' not in os.environ
    sys.stdout.reconfigure(errors='backslashreplace') # for a terminal without these characters
    answers, texts = read(cfg) if cfg.samples else measure(cfg)
    last = {answer['model']: answer.get('step') for answer in answers} # of each run
    for answer in (answer for answer in answers if answer.get('step') == last[answer['model']]):
        step = f", step {answer['step']}" if 'step' in answer else ''
        print(f"\n[{answer['model']}{step}] {plain(answer['prompt'])}")
        print_answer(answer, in_colour)
    data = json.dumps(dict(settings=texts, answers=answers)).replace('<', '\\u003c') # it ends no script
    write_atomic(cfg.out, HTML.read_text(encoding='utf-8').replace('"DATA"', data))
    print('\n' + legend(answers, in_colour), *texts, f"wrote {cfg.out}", sep='\n')

if __name__ == '__main__':
    launch(main, Config)
