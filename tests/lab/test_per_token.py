"""lab/per_token.py: what --show writes at every save are the numbers of the run, and the run is the same without."""
import json
import os
from types import SimpleNamespace

import pytest
import torch

import ppo
import reinforce
from common.rewards import Reward
from common.rollout import pack_turns
from lab.per_token import check_sample, compare, describe_answers, read_samples
from model import GPT, GPTConfig
from stages import die_after
from tiny import (EOS, PROMPTS, RUN, TOK, LikesOnes, assert_resumes_exactly, by_hand, checkpoint, in_processes, losses,
                  one_line, records, run, stops, weights)

@pytest.fixture
def given(tmp_path):
    return dict(policy=checkpoint(tmp_path / 'sft'), reward_model=checkpoint(tmp_path / 'rm', 1, reward_head=True),
                prompts=records(tmp_path / 'prompts.jsonl', PROMPTS), max_new_tokens=6, batch_size=4, lr=1e-2)

def text_of(folder):
    with open(os.path.join(folder, 'samples.jsonl')) as f:
        return f.read()

def samples_of(folder):
    return read_samples(os.path.join(folder, 'samples.jsonl'))

def close(values):
    return pytest.approx(values, abs=2e-5) # of numbers around 1 to six digits

def watched(monkeypatch, script, **options):
    """Run a script; return the batches that it rolled out, and its samples."""
    batches, roll_out = [], script.roll_out

    def watching(*args):
        out = roll_out(*args)
        batches.append(out[0])
        return out

    monkeypatch.setattr(script, 'roll_out', watching)
    run(script, **options)
    return batches, samples_of(options['out_dir'])

# ---------------------------------------------------------------------------------------------------------------------
# the numbers

def check_saved_policy(answer, saved, reference):
    """Compare entropy, ratio and alternatives with whole logits of the saved policy and the reference."""
    before, ids = TOK.encode(answer['prompt']), answer['ids']
    with torch.no_grad():
        q, ref = (model(torch.tensor([before + ids]))[0][0, len(before) - 1:-1].log_softmax(-1)
                  for model in (saved, reference)) # (k, V) each
    logp = q[range(len(ids)), ids]
    assert answer['ratio'] == close((logp - torch.tensor(answer['logp'])).exp().tolist())
    assert answer['ref_logp'] == close(ref[range(len(ids)), ids].tolist())
    assert answer['entropy'] == close((-q.exp() * q).sum(-1).tolist())
    for name, log_q in ('top', q), ('ref_top', ref):
        for t, five in enumerate(answer[name]):
            assert [x for _, _, x in five] == close(log_q[t].sort(descending=True)[0][:5].tolist())
            assert [log_q[t, i].item() for _, i, _ in five] == close([x for _, _, x in five])

def test_ppos_samples(tmp_path, given, monkeypatch):
    out = str(tmp_path / 'out')
    batches, samples = watched(monkeypatch, ppo, out_dir=out, max_steps=4, save_every=2, show=3, kl_coef=0.3, lam=0.5,
                               missing_eos_penalty=0.7, epochs=3, minibatches=2, **given)
    assert [answer['step'] for answer in samples] == [2] * 3 + [4] * 3 # of the iteration before each save
    reward_model = GPT.from_pretrained(given['reward_model'])
    for n, answer in enumerate(samples):
        batch, b = batches[2 * (n // 3) + 1], n % 3
        at, k = batch['mask'][b] > 0, len(answer['ids'])
        for name, array in dict(logp='old_logp', ref_logp='ref_logp', reward='rewards', value='old_values',
                                returns='returns', whitened='advantages').items():
            assert answer[name] == close(batch[array][b, at].tolist()), name
        assert answer['score'] == close(batch['scores'][b, 0].item())
        assert answer['ended'] == (answer['ids'][-1] == TOK.eos)
        assert TOK.encode(answer['prompt']) + answer['ids'] == batch['idx'][b, :at.nonzero().max() + 2].tolist()
        # the equations, from the columns that they need
        assert answer['kl'] == close([p - q for p, q in zip(answer['logp'], answer['ref_logp'])])
        assert answer['reward'] == close([-0.3 * kl for kl in answer['kl'][:-1]] + [answer['score']
                                                                                   - 0.3 * answer['kl'][-1]])
        A, after = 0.0, 0.0 # the advantage and the value of the next token
        for t in reversed(range(k)):
            A, after = answer['reward'][t] + after - answer['value'][t] + 0.5 * A, answer['value'][t]
            assert answer['advantage'][t] == close(A)
            clipped = answer['ratio'][t] > 1.2 if answer['whitened'][t] > 0 else answer['ratio'][t] < 0.8
            assert answer['clipped'][t] == clipped
        row = torch.tensor([TOK.encode(answer['prompt']) + answer['ids']])
        scores = [reward_model.rewards(row, torch.tensor([n])).item() for n in range(row.size(1) - k, row.size(1) + 1)]
        assert answer['prefix'] == close(scores)
        assert answer['score'] == close(scores[-1] - 0.7 * (not answer['ended']))
    assert any(c for answer in samples for c in answer['clipped'])
    for answer in samples[3:]: # the last ones are of the checkpoint that is there
        check_saved_policy(answer, GPT.from_pretrained(out), GPT.from_pretrained(given['policy']))

def test_rloos_samples(tmp_path, given, monkeypatch):
    """Of two answers to a prompt each one's advantage is its R less the other's, at all its tokens."""
    out = str(tmp_path / 'out')
    _, samples = watched(monkeypatch, reinforce, out_dir=out, max_steps=2, show=4, kl_coef=0.3, n_answers=2, epochs=3,
                         **given)
    assert [answer['step'] for answer in samples] == [2] * 4
    R = [answer['score'] - 0.3 * sum(answer['kl']) for answer in samples]
    for answer, mine, others in zip(samples, R, [R[1], R[0], R[3], R[2]]):
        assert answer['advantage'] == close([mine - others] * len(answer['ids']))
        assert not {'reward', 'value', 'returns', 'whitened'} & answer.keys() and 'prefix' in answer
        check_saved_policy(answer, GPT.from_pretrained(out), GPT.from_pretrained(given['policy']))

@pytest.mark.parametrize('more', [
    dict(reward_model='', reward='{folder}/r.py:length'), dict(reward='{folder}/r.py:length'),
    dict(reward_model='{rm},{rm}'), dict(reward_policy='{sft}')])
def test_no_scores_of_prefixes_where_no_reward_model_alone_scores(tmp_path, given, more):
    (tmp_path / 'r.py').write_text('length = lambda record, response: float(len(response))')
    more = {k: v.format(folder=tmp_path, rm=given['reward_model'], sft=given['policy']) for k, v in more.items()}
    for script in ppo, reinforce:
        run(script, out_dir=tmp_path / script.__name__, max_steps=1, show=2, **given | more)
        assert ['prefix' in answer for answer in samples_of(tmp_path / script.__name__)] == [False] * 2

def test_of_a_dialogue_the_last_answer():
    """Two turns, and one answer that fills its room; what stands before the last answer is its prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    turns = [([1, 2], None), ([5, EOS], [-.5, -.25]), ([3, 3, EOS], None), ([1, 1, EOS], [-1., -2., -3.])]
    rolls = pack_turns([turns, [([4], None), ([7, 8], [-4., -5.])]], EOS)
    mask = rolls.mask
    batch = dict(idx=rolls.idx, mask=mask, old_logp=rolls.logp, ref_logp=-mask, advantages=mask * 7,
                 scores=torch.tensor([[10.0], [20.0]]).expand_as(mask))
    tok = SimpleNamespace(eos=EOS, decode=str, decode_bytes=lambda ids: b'%d' % ids[0])
    ratio = torch.arange(float(mask.numel())).view_as(mask)
    models = model, Reward([LikesOnes()]), model
    dialogue, answer = describe_answers(models, batch, rolls.lengths, 2, ratio, mask, tok, RUN)
    assert dialogue['prompt'] == str([1, 2, 5, EOS, 3, 3, EOS]) and dialogue['ids'] == [1, 1, EOS]
    assert dialogue['logp'] == [-1, -2, -3] and dialogue['kl'] == [0, -1, -2] and dialogue['advantage'] == [7, 7, 7]
    assert dialogue['ratio'] == [6, 7, 8] # the answer is positions 6 to 8
    assert dialogue['prefix'] == [0, 1, 2, 2] and dialogue['score'] == 10 and dialogue['ended']
    assert answer['prompt'] == '[4]' and answer['ids'] == [7, 8] and answer['ratio'] == [9, 10]
    assert answer['kl'] == [-3, -4] and answer['score'] == 20 and not answer['ended']

RATIOS, A = [[1.1, 1.3, 0.7, 0.9], [2.0, 0.5, 0.5, 9.0]], [[1., 1., 1., 1.], [-1., -1., -1., 0.]]

@pytest.mark.parametrize('options, ratio, clipped', [
    (dict(), RATIOS, [[0, 1, 0, 0], [0, 1, 1, 0]]), # the clip is 0.2
    (dict(clip_high=0.4), RATIOS, [[0, 0, 0, 0], [0, 1, 1, 0]]),
    (dict(loss='cispo', clip_high=0.25), RATIOS, [[0, 1, 0, 0], [1, 0, 0, 0]]), # whatever the sign
    # (1.1 1.3 0.7 0.9)^1/4 = 0.9009^1/4 = 0.974247; of the three tokens that count (2 0.5 0.5)^1/3 = 0.793701
    (dict(ratio='sequence'), [[0.974247] * 4, [0.793701] * 4], [[0] * 4, [1, 1, 1, 0]])])
def test_ratio_and_clip_by_hand(monkeypatch, options, ratio, clipped):
    mask = torch.tensor([[1., 1., 1., 1.], [1., 1., 1., 0.]])
    monkeypatch.setattr('lab.per_token.frozen', lambda *args: torch.tensor(RATIOS).log() - 2)
    batch = dict(idx=None, mask=mask, old_logp=torch.full((2, 4), -2.0), advantages=torch.tensor(A))
    got = compare(SimpleNamespace(logp=None), batch, None, reinforce.Config(prompts='-', **options), RUN)
    assert (got[0] * mask).tolist() == [by_hand([r * m for r, m in zip(*rows)]) for rows in zip(ratio, mask.tolist())]
    assert got[1].tolist() == clipped

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_sixteen_bits_and_a_shared_critic(tmp_path, given, script):
    more = dict(critic='shared') if script is ppo else {}
    run(script, out_dir=tmp_path / 'out', max_steps=2, show=2, **given | dict(dtype='bfloat16') | more)
    assert len(samples_of(tmp_path / 'out')) == 2 # each is checked

# ---------------------------------------------------------------------------------------------------------------------
# the file

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_the_run_is_the_same_and_resumes_with_its_samples(tmp_path, given, script):
    shown = given | dict(show=2, epochs=2)
    assert_resumes_exactly(tmp_path, script, **shown)
    assert [answer['step'] for answer in samples_of(tmp_path / 'whole')] == [2, 2, 4, 4]
    assert text_of(tmp_path / 'halves') == text_of(tmp_path / 'whole')
    assert in_processes(1, killed, script, dict(out_dir=tmp_path / 'killed', max_steps=4, save_every=2) | shown) == [-9]
    assert text_of(tmp_path / 'killed') == ''.join(text_of(tmp_path / 'whole').splitlines(True)[:2])
    run(script, out_dir=tmp_path / 'killed', max_steps=4, save_every=2, resume=True, **shown)
    assert text_of(tmp_path / 'killed') == text_of(tmp_path / 'whole')
    lines = run(script, out_dir=tmp_path / 'without', max_steps=4, save_every=2, **shown | dict(show=0))
    assert weights(tmp_path / 'without') == weights(tmp_path / 'whole') == weights(tmp_path / 'killed')
    assert losses(lines) == losses(map(json.loads, open(tmp_path / 'whole/log.jsonl')))
    assert not os.path.exists(tmp_path / 'without/samples.jsonl')
    # a resumed run without --show keeps what is there; a new one in this folder does not
    kept = text_of(tmp_path / 'whole')
    run(script, out_dir=tmp_path / 'whole', max_steps=5, resume=True, **shown | dict(show=0))
    assert text_of(tmp_path / 'whole') == kept
    run(script, out_dir=tmp_path / 'whole', max_steps=1, overwrite=True, **shown)
    assert [answer['step'] for answer in samples_of(tmp_path / 'whole')] == [1, 1]
    run(script, out_dir=tmp_path / 'whole', max_steps=1, overwrite=True, **shown | dict(show=0))
    assert not os.path.exists(tmp_path / 'whole/samples.jsonl')

def killed(script, options):
    die_after(3)
    run(script, **options)

@pytest.mark.parametrize('script', [ppo, reinforce])
def test_of_two_processes_the_first_writes(tmp_path, given, script):
    options = given | dict(max_steps=2, save_every=1) | (dict(n_answers=2) if script is reinforce else {})
    run(script, out_dir=tmp_path / 'one', show=4, **options)
    for folder, show in ('two', 2), ('without', 0):
        assert in_processes(2, run_in, script, options | dict(out_dir=tmp_path / folder, show=show)) == [0, 0]
    one, two = (samples_of(tmp_path / folder) for folder in ('one', 'two'))
    assert [answer['step'] for answer in two] == [1, 1, 2, 2]
    # of four prompts it answers the first and the third; in reinforce.py of two the first, twice
    rows = [0, 2, 4, 6] if script is ppo else [0, 1, 4, 5]
    assert [answer['prompt'] for answer in two] == [one[row]['prompt'] for row in rows]
    assert weights(tmp_path / 'two') == weights(tmp_path / 'without')

def run_in(script, options):
    run(script, **options)

@pytest.mark.parametrize('script', [ppo, reinforce])
@pytest.mark.parametrize('show, message', [(-1, 'show must be at least 0, got -1'), (5, 'show must be at most '
                                           'batch_size * minibatches, got 5'), ('a', 'show must be int')])
def test_bad_options(tmp_path, given, capsys, script, show, message):
    assert message in stops(capsys, script, out_dir=tmp_path / 'out', show=show, **given)
    assert not os.path.exists(tmp_path / 'out')

ANSWER = dict(step=5, prompt='Hi', score=0.5, ended=True, ids=[65, 256], tokens=[['A', ''], ['\\xe4', '你']],
              **{name: [0.25, -1] for name in ('logp', 'ref_logp', 'kl', 'entropy', 'advantage', 'clipped')},
              ratio=[1.0, None], top=[[['A', 65, -0.1]], []], ref_top=[[], []])

def test_lines_that_are_answers():
    check_sample(ANSWER)
    check_sample(ANSWER | dict(value=[1, 2], reward=[1, 2], returns=[1, 2], whitened=[1, 2], prefix=[1, 2, 3]))

@pytest.mark.parametrize('change, message', [
    ('{"step": 5, "prom', 'wanted one JSON object a line'), ('[]', 'wanted a JSON object, got list'),
    ('', 'wanted one JSON object a line'), (dict(step=-1), '`step` to be a count of iterations'),
    (dict(step='5'), '`step`'), (dict(prompt=None), '`prompt` to be text'), (dict(ids=[]), '`ids` to be token ids'),
    (dict(ids=['a', 'b']), '`ids` to be token ids'), (dict(ids=None), '`ids`'),
    (dict(score='x'), '`score` to be a number'), (dict(ended=1), '`ended` to be true or false'),
    (dict(tokens=[['A', '']]), '`tokens` to be 2 pairs of texts'), (dict(tokens=[['A'], ['B']]), '`tokens`'),
    (dict(logp=[1.0]), '`logp` to be 2 numbers'), (dict(kl=['a', 1]), '`kl`'),
    (dict(value=[True, 1]), '`value` to be 2 numbers'), (dict(prefix=[1, 2]), '`prefix` to be 3 numbers'),
    (dict(top=[[], [['A', 65]]]), '`top` to be 2 lists of (text, id, number)'), (dict(ref_top=[7, 8]), '`ref_top`')])
def test_a_damaged_line_is_named(tmp_path, capsys, change, message):
    path = tmp_path / 'samples.jsonl'
    damaged = change if isinstance(change, str) else json.dumps(ANSWER | change)
    path.write_text(f'{json.dumps(ANSWER)}\n{damaged}\n{json.dumps(ANSWER)}\n')
    line = one_line(capsys, lambda: read_samples(path))
    assert line.startswith(f'{path}:2: ') and message in line

def test_a_key_that_is_absent_is_named(tmp_path, capsys):
    for key in ANSWER:
        (tmp_path / 'samples.jsonl').write_text(json.dumps({k: v for k, v in ANSWER.items() if k != key}))
        line = one_line(capsys, lambda: read_samples(tmp_path / 'samples.jsonl'))
        assert f"{tmp_path / 'samples.jsonl'}:1: wanted `{'ids' if key == 'ids' else key}`" in line

def test_an_empty_file_and_none(tmp_path, capsys):
    (tmp_path / 'empty').write_text('')
    assert 'empty: wanted answers' in one_line(capsys, lambda: read_samples(tmp_path / 'empty'))
    assert 'none: no such file' in one_line(capsys, lambda: read_samples(tmp_path / 'none'))

def test_a_damaged_file_does_not_stop_a_resumed_run(tmp_path, given):
    """It is kept as it is: the state to resume from is elsewhere."""
    run(ppo, out_dir=tmp_path / 'out', max_steps=1, show=1, **given)
    with open(tmp_path / 'out/samples.jsonl', 'ab') as f:
        f.write(b'\xff{"half')
    run(ppo, out_dir=tmp_path / 'out', max_steps=2, show=1, resume=True, **given)
    lines = text_of(tmp_path / 'out').splitlines()
    assert len(lines) == 3 and lines[1] == '\ufffd{"half' and json.loads(lines[2])['step'] == 2
