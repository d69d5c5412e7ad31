"""Describe answers token by token, as PPO, REINFORCE, RLOO and GRPO see them.

microscope.py draws such answers. With --show=N, ppo.py and reinforce.py describe N answers of their last iteration at
every save, in out_dir/samples.jsonl, a JSON line each. Of an answer of k tokens it holds

    step, prompt, score, ended      finished iterations; the text before the answer; less the penalty for no end
    ids, tokens                     of each token its (text, the character of which it is a part, or '')
    logp, ref_logp, kl              under the policy that chose it and the reference
    reward, value, returns          ppo.py alone
    advantage, whitened             whitened: ppo.py alone, reinforce.py's loss reads the other one
    ratio, clipped                  the policy after the updates, compared with the one that chose
    entropy, top, ref_top           of the policy as it was saved: the five likeliest (text, id, log-probability)
    prefix                          k + 1 scores, after no token, one, …; where one reward model alone scores answers

Nothing here draws random numbers or leaves gradients: a run with --show is the same run, bit for bit.
"""

import json
import math
import os
import textwrap

from common.options import fail
from common.records import check, is_number, parse_line, read_lines
from common.rollout import frozen, frozen_rewards, kl_k1
from common.tokens import EOS

import torch

NEEDED = 'logp', 'ref_logp', 'kl', 'entropy', 'advantage', 'ratio', 'clipped' # lists of k numbers
OPTIONAL = 'reward', 'value', 'returns', 'whitened'
COLUMNS = dict( # of the terminal: (name, what it is)
    logp=('log pi', 'log-probability of the token'), ref_logp=('log ref', "the reference's"),
    kl=('KL', 'log pi - log ref'), entropy=('entropy', 'how open the choice was'),
    reward=('reward', '-β KL, plus the score at the end'), value=('V', 'return the critic expects'),
    advantage=('A', 'how much better than expected'), whitened=('A white', 'A with mean 0, variance 1'),
    returns=('return', 'A + V'), prefix=('RM score', 'so far (only the last one counts)'),
    ratio=('ratio', 'new / old probability after an update'))

# ---- texts ------------------------------------------------------------------------------------------------------

def plain(text):
    """Escape characters that do not print."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)

def spell(tok, ids):
    """Return (label, whole) of each token: its text, and the character of which it is a part, or ''.

    Bytes that are no whole character, and characters that do not print, are escaped, as in \\xe4.
    """
    parts = [tok.decode_bytes([i]) for i in ids]
    at, spans = 0, [] # of every character: its bytes' places in the text
    for c in b''.join(parts).decode('utf-8', 'surrogateescape'):
        n = len(c.encode('utf-8', 'surrogateescape'))
        spans += [(at, at + n, c)] * n
        at += n
    out, start = [], 0
    for i, part in zip(ids, parts):
        end = start + len(part)
        whole = ''.join(dict.fromkeys(c for a, b, c in spans[start:end] if a < start or b > end))
        label = EOS if i == tok.eos else plain(part.decode('utf-8', 'backslashreplace')) if part else f'<{i}>'
        out.append((label, plain(whole)))
        start = end
    return out

def numbers(x):
    """Round a tensor to six digits, as a list, None where infinite."""
    return [float(f'{v:.6g}') if math.isfinite(v) else None for v in x.tolist()]

def legend(answers, in_colour):
    """Explain the marks and the columns of the terminal's tables."""
    marks = 'Green: pushed up. Red: pushed down.' if in_colour else '⟦ ⟧: pushed down.'
    white = ['whitened' in answer for answer in answers]
    marks += ' The sign of A white decides; that of A may differ.' * any(white)
    marks += ' Without A white, the sign of A decides.' * (not all(white))
    told = [f"{name}: {what}" for key, (name, what) in COLUMNS.items() if any(key in answer for answer in answers)]
    return '\n'.join(textwrap.fill(text, 100, break_on_hyphens=False) for text in (
        f"{marks} *: the clip bites.", f"{'; '.join(told)}. More: docs/log.md."))

# ---- numbers ----------------------------------------------------------------------------------------------------

def compare(policy, batch, lengths, cfg, run):
    """Compare an updated policy with the one that sampled: ratio and clipped, (B, T-1) each.

    clipped: 1 where the clipped surrogate has no gradient any more, although the advantage is not 0. With
    reinforce.py's --loss=cispo: where the weight is held at 1 + clip_high. batch, lengths: as roll_out returns them.
    """
    mask, A = batch['mask'], batch['advantages'] # (B, T-1) each
    with run.autocast():
        logp = frozen(policy.logp, batch['idx'], mask, lengths) # (B, T-1)
    log_ratio = (logp - batch['old_logp']) * mask # (B, T-1)
    if getattr(cfg, 'ratio', 'token') == 'sequence':
        log_ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(mask)
    ratio = log_ratio.exp()
    high = ratio > 1 + (getattr(cfg, 'clip_high', 0) or cfg.clip)
    low = ratio < 1 - cfg.clip
    clipped = high & (A != 0) if getattr(cfg, 'loss', '') == 'cispo' else high & (A > 0) | low & (A < 0)
    return ratio, clipped.float()

@torch.no_grad()
def describe_answers(models, batch, lengths, n, ratio, clipped, tok, run):
    """Return the first n answers of a batch as dicts of lists; of dialogues the last answers.

    models: ppo.py's four, or reinforce.py's three. batch, lengths: as its roll_out returns them. ratio, clipped: see
    `compare`. Entropy and alternatives are those of the policy as it is now.
    """
    policy, *_, reward, reference = models
    T = int(lengths[:n].max())
    idx, mask, ends = batch['idx'][:n, :T], batch['mask'][:n, :T - 1], lengths[:n] # (n, T), (n, T-1), (n,)
    t = torch.arange(T - 1, device=idx.device)
    before = ((t + 1) * (mask == 0) * (t < ends[:, None] - 1)).amax(1, keepdim=True) # (n, 1) prompt, earlier turns
    mask = mask * (t >= before) # (n, T-1) the last answer, N tokens in all
    sizes = mask.sum(1).long() # (n,)
    logp, ref_logp, A = batch['old_logp'], batch['ref_logp'], batch['advantages'] # (B, T-1) each
    columns = dict(logp=logp, ref_logp=ref_logp, kl=kl_k1(logp, ref_logp), advantage=A, ratio=ratio, clipped=clipped)
    if 'returns' in batch: # of ppo.py
        values, returns = batch['old_values'], batch['returns']
        columns |= dict(reward=batch['rewards'], value=values, advantage=returns - values, whitened=A, returns=returns)
    columns = {name: x[:n, :T - 1][mask > 0] for name, x in columns.items()} # (N,) each
    with run.autocast():
        log_q = [model.logits_at(idx, mask).log_softmax(-1) for model in (policy, reference)] # (N, V) each
        columns['entropy'] = -(log_q[0].exp() * log_q[0]).sum(-1) # (N,)
        # of each token: its five likeliest, as log-probabilities and ids
        tops = [list(zip(*(x.tolist() for x in q.topk(min(5, q.size(1)))))) for q in log_q]
        prefixes = None
        if len(reward.models) == 1 and not reward.function and not reward.policy:
            rows = torch.arange(len(idx), device=idx.device).repeat_interleave(sizes + 1) # a row for every prefix
            stops = torch.cat([torch.arange(end - k, end + 1, device=idx.device) for end, k in zip(ends, sizes)])
            prefixes = frozen_rewards(reward.models[0], idx[rows], stops).split((sizes + 1).tolist())
    found, at = [], 0
    for b, (end, k) in enumerate(zip(ends.tolist(), sizes.tolist())):
        ids = idx[b, end - k:end].tolist()
        answer = dict(prompt=tok.decode(idx[b, :end - k].tolist()), score=numbers(batch['scores'][b, :1])[0],
                      ended=ids[-1] == tok.eos, ids=ids, tokens=spell(tok, ids))
        answer |= {name: numbers(x[at:at + k]) for name, x in columns.items()}
        for name, top in zip(('top', 'ref_top'), tops):
            answer[name] = [[(spell(tok, [i])[0][0], i, round(logp, 5)) for logp, i in zip(*pair)]
                            for pair in top[at:at + k]]
        found.append(answer | (dict(prefix=numbers(prefixes[b])) if prefixes else {}))
        at += k
    return found

# ---- samples.jsonl ----------------------------------------------------------------------------------------------

def earlier_samples(cfg, state):
    """Return the lines of samples.jsonl where a run is resumed, else []; state: as load_checkpoint returns it."""
    path = os.path.join(cfg.out_dir, 'samples.jsonl')
    if not state or not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.read().splitlines()

def add_samples(samples, step, models, batch, lengths, tok, cfg, run):
    """Append this iteration's first cfg.show answers to samples, a list of lines.

    In the first process alone, of whose answers they are. models: after the updates.
    """
    if cfg.show and run.is_master:
        batch, lengths = {name: x[:cfg.show] for name, x in batch.items()}, lengths[:cfg.show]
        after = compare(models[0], batch, lengths, cfg, run)
        found = describe_answers(models, batch, lengths, len(lengths), *after, tok, run)
        samples += [json.dumps(dict(step=step) | answer, separators=(',', ':')) for answer in found]

def check_sample(row):
    """Raise ValueError where a line of samples.jsonl lacks something."""
    number = lambda x: x is None or is_number(x)
    each = lambda ok, key, n: isinstance(row.get(key), list) and len(row[key]) == n and all(map(ok, row[key]))
    entry = lambda x, *kinds: isinstance(x, list) and [*map(type, x)] == [*kinds]
    check('`step` to be a count of iterations', type(row.get('step')) is int and row['step'] >= 0)
    check('`prompt` to be text', isinstance(row.get('prompt'), str))
    k = len(row['ids']) if isinstance(row.get('ids'), list) else 0
    check('`ids` to be token ids', k and each(lambda x: type(x) is int, 'ids', k))
    check(f'`tokens` to be {k} pairs of texts', each(lambda x: entry(x, str, str), 'tokens', k))
    for key in (*NEEDED, *(key for key in OPTIONAL if key in row)):
        check(f'`{key}` to be {k} numbers', each(number, key, k))
    check(f'`prefix` to be {k + 1} numbers', 'prefix' not in row or each(number, 'prefix', k + 1))
    for key in 'top', 'ref_top':
        lists = lambda x: isinstance(x, list) and all(entry(y, str, int, float) for y in x)
        check(f'`{key}` to be {k} lists of (text, id, number)', each(lists, key, k))
    check('`score` to be a number', number(row.get('score', ())))
    check('`ended` to be true or false', type(row.get('ended')) is bool)

def read_samples(path):
    """Read the answers of a samples.jsonl; a line that is none ends the program."""
    answers = []
    for n, line in read_lines(path):
        try:
            check_sample(row := parse_line(line))
        except ValueError as error:
            fail(f'{path}:{n}: {error}; ppo.py and reinforce.py write such a file with --show')
        answers.append(row)
    if not answers:
        fail(f'{path}: wanted answers, got an empty file')
    return answers
