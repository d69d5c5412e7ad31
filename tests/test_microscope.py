"""
microscope.py: its numbers are ppo.roll_out's and the models' own, some by hand; the page escapes all texts, and works
in a real browser, by mouse and by keys, at the width of a desk and of a phone.
"""
import json
import math
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'feedback'))

import microscope
import ppo
import reinforce
from browser import KEYS, MISSING, Browser
from common.options import parse_config
from common.rewards import Reward
from common.tokens import prompt_ids
from lab import per_token
from model import GPT
from tiny import EOS, PROMPT, PROMPTS, ROOT, RUN, TOK, LikesOnes, bed, by_hand, checkpoint, records, run, stops

EVIL = '<img src=x onerror="document.title=\'broken into\'"></script><script>document.title="broken into"</script>'
COLUMNS = dict(logp='old_logp', value='old_values', returns='returns', whitened='advantages')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Two iterations of PPO on tiny models; two answers an iteration, so that batches are small."""
    folder = tmp_path_factory.mktemp('micro')
    sft, reward = checkpoint(folder / 'sft'), checkpoint(folder / 'reward', seed=1, reward_head=True)
    model = GPT.from_pretrained(sft)
    with torch.no_grad():
        model.wte.weight[-1] -= 0.1 * model.ln_f.bias # longer answers
    model.save_pretrained(sft)
    prompts = records(folder / 'prompts.jsonl', PROMPTS)
    for critic in ('separate', 'shared'):
        run(ppo, policy=sft, reward_model=reward, prompts=prompts, out_dir=folder / critic, critic=critic, max_steps=2,
            batch_size=2, minibatches=1, max_new_tokens=12, kl_coef=0.3, lam=0.8, missing_eos_penalty=0.7, lr=1e-3)
    return SimpleNamespace(folder=folder, reference=sft, reward_model=reward, policy=str(folder / 'separate'),
                           shared=str(folder / 'shared'), prompts=prompts)

def options(made, **more):
    return dict(policy=made.policy, reference=made.reference, reward_model=made.reward_model, device='cpu',
                out='page.html') | more

def page_of(path):
    with open(path, encoding='utf-8') as f:
        return json.loads(re.search('<script type="application/json" id="data">(.*)</script>', f.read())[1])

def shown(made, tmp_path, **more):
    """Return the page's answers and the two texts about them."""
    run(microscope, **options(made, out=tmp_path / 'page.html', **more))
    page = page_of(tmp_path / 'page.html')
    return page['answers'], page['settings']

# ---------------------------------------------------------------------------------------------------------------------
# the numbers

@pytest.mark.parametrize('critic', ['', 'saved', 'shared'])
@pytest.mark.parametrize('whiten_rewards', [False, True])
def test_the_numbers_are_those_of_roll_out(made, tmp_path, critic, whiten_rewards):
    policy = made.shared if critic == 'shared' else made.policy
    words = ['--kl_coef=0.3', '--lam=0.8', '--missing_eos_penalty=0.7', '--max_new_tokens=12', '--batch_size=6',
             f'--whiten_rewards={whiten_rewards}', '--lr=1e-2']
    answers, _ = shown(made, tmp_path, policy=policy, critic=made.policy if critic == 'saved' else critic, n_answers=2,
                       prompts=made.prompts, max_prompts=2, ppo=' '.join(words), seed=3)
    cfg = parse_config(ppo.Config, words + ['--prompts=-', f'--policy={policy}', f'--reward_model={made.reward_model}',
                                            f"--critic={'shared' if critic == 'shared' else 'separate'}"])
    models = ppo.load_models(cfg, RUN, TOK)._replace(reference=GPT.from_pretrained(made.reference))
    if critic == 'saved':
        models.critic.load_state_dict(torch.load(os.path.join(made.policy, 'state.pt'), weights_only=True)['critic'])
    asked = [prompt_ids(TOK, row['prompt']) for row in PROMPTS[:6]]
    torch.manual_seed(3) # shown are two answers to each of two prompts; two more prompts fill the iteration
    batch, lengths, _ = ppo.roll_out(models, [asked[i] for i in (0, 0, 1, 1, 2, 3)], [{}] * 6, TOK, cfg, 0.3, RUN)
    assert len(answers) == 4 and sorted(len(answer['ids']) for answer in answers)[1] > 2
    for b, answer in enumerate(answers):
        at = batch['mask'][b] > 0
        row, k = batch['idx'][b:b + 1, :lengths[b]], len(answer['ids'])
        mask = batch['mask'][b:b + 1, :lengths[b] - 1]
        assert answer['ids'] == row[0, -k:].tolist() and answer['prompt'] == TOK.decode(row[0, :-k].tolist())
        for name, array in COLUMNS.items():
            assert answer[name] == pytest.approx(batch[array][b, at].tolist(), abs=2e-5), name
        with torch.no_grad(): # the models' own doors, and for the rest the whole logits
            assert answer['ref_logp'] == pytest.approx(models.reference.logp(row, mask)[mask > 0].tolist(), abs=2e-5)
            model, T = models.reward.models[0], row.size(1)
            scores = [model.rewards(row[:, :n], torch.tensor([n])).item() for n in range(T - k, T + 1)]
            log_q = {name: model(row)[0][0, -k - 1:-1].log_softmax(-1) for name, model in (
                ('top', models.policy), ('ref_top', models.reference))} # (k, V)
        assert answer['prefix'] == pytest.approx(scores, abs=2e-5)
        assert answer['score'] == pytest.approx(scores[-1] - (0 if answer['ended'] else 0.7), abs=2e-5)
        assert answer['ended'] == (answer['ids'][-1] == TOK.eos)
        assert answer['entropy'] == pytest.approx((-log_q['top'].exp() * log_q['top']).sum(-1).tolist(), abs=2e-5)
        for name, q in log_q.items():
            for t, row_of_five in enumerate(answer[name]):
                logps = [logp for _, _, logp in row_of_five]
                assert logps == pytest.approx(q[t].sort(descending=True)[0][:5].tolist(), abs=2e-5)
                assert [q[t, i].item() for _, i, _ in row_of_five] == pytest.approx(logps, abs=2e-5)
        # what ties the columns together
        assert answer['kl'] == pytest.approx([p - q for p, q in zip(answer['logp'], answer['ref_logp'])], abs=2e-5)
        returns = [a + v for a, v in zip(answer['advantage'], answer['value'])]
        assert answer['returns'] == pytest.approx(returns, abs=2e-5)
        if not whiten_rewards:
            due = [-0.3 * kl for kl in answer['kl']]
            due[-1] += answer['score']
            assert answer['reward'] == pytest.approx(due, abs=2e-5)
    if not critic: # PPO's critic starts as the reward model: it says of a state what that says of the prefix
        assert answers[0]['value'] == pytest.approx(answers[0]['prefix'][:-1], abs=2e-5)
    else:
        assert answers[0]['value'] != pytest.approx(answers[0]['prefix'][:-1], abs=1e-3)

def test_the_prompts_shown_are_those_asked_for(made, tmp_path):
    """Also where the policy's run had several answers to each."""
    answers, _ = shown(made, tmp_path, prompts=made.prompts, max_prompts=3, ppo='--n_answers=2')
    asked = [answer['prompt'].split('Human: ')[1].split('\n')[0] for answer in answers]
    assert asked == [row['prompt'] for row in PROMPTS[:3]]

def bed_of(**more):
    """The bed of tiny.py, whose reward counts the ones, and options for it."""
    policy = bed(1)
    models = ppo.Models(policy, bed(3, value_head=True), Reward([LikesOnes()]), bed(2))
    tok = SimpleNamespace(eos=EOS, decode=str, decode_bytes=lambda ids: b''.join(b'%d' % i for i in ids if i < EOS))
    return models, tok, ppo.Config(**dict(prompts='-', max_new_tokens=2, batch_size=8, device='cpu', lr=0.05,
                                          missing_eos_penalty=0.5, kl_coef=0.25, **more))

def test_an_answer_by_hand():
    models, tok, cfg = bed_of(lam=1.0)
    torch.manual_seed(0)
    found = microscope.look(models, [PROMPT] * 64, 32, tok, cfg, RUN)
    assert len(found) == 32
    for answer in found:
        ids = answer['ids']
        ones = [0, *(ids[:n].count(1) for n in range(1, len(ids) + 1))]
        assert answer['prefix'] == ones # the reward model after no token, after the first, …
        assert answer['score'] == ones[-1] - (0.5 if ids[-1] != EOS else 0)
        # with lambda and gamma 1 a return is all that is still to come
        to_go = [answer['score'] - 0.25 * sum(answer['kl'][t:]) for t in range(len(ids))]
        assert answer['returns'] == pytest.approx(to_go, abs=2e-5)
        assert [label for label, _ in answer['tokens']] == [per_token.EOS if i == EOS else str(i) for i in ids]
        assert sum(math.exp(logp) for _, _, logp in answer['top'][0]) == pytest.approx(1.0, abs=1e-4) # of 4 tokens
    assert any(1 in answer['ids'] for answer in found) and any(not answer['ended'] for answer in found)

def test_ratio_and_clip_by_hand(monkeypatch):
    """The four cases of test_policy_loss_by_hand, one within the clip, and an advantage of 0."""
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 7.0, 1.0]])
    batch = dict(idx=torch.zeros(1, 8, dtype=torch.long), old_logp=-torch.ones(1, 7),
                 advantages=torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, 0.0, 9.0]]),
                 mask=torch.tensor([[1.0] * 6 + [0.0]]))
    models, _, cfg = bed_of()
    monkeypatch.setattr(ppo, 'update', lambda *a: None)
    monkeypatch.setattr(per_token, 'frozen', lambda *a: ratio.log() - 1)
    got, clipped = microscope.after_update(models, batch, torch.tensor([8]), cfg, RUN)
    assert got.tolist() == [by_hand(ratio[0].tolist())]
    assert clipped[0, :6].tolist() == [1, 0, 0, 1, 0, 0]

def test_the_update_is_ppos_own_on_a_copy():
    models, tok, cfg = bed_of(epochs=3)
    torch.manual_seed(0)
    batch, lengths, _ = ppo.roll_out(models, [PROMPT] * 32, [{}] * 32, tok, cfg, cfg.kl_coef, RUN)
    before = [p.clone() for model in models[:2] for p in model.parameters()]
    torch.manual_seed(1)
    ratio, _ = microscope.after_update(models, batch, lengths, cfg, RUN)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for model in models[:2] for p in model.parameters())))
    torch.manual_seed(1)
    optimizers = {name: ppo.make_optimizer(getattr(models, name), cfg, eps=1e-5) for name in ('policy', 'critic')}
    ppo.update(models, optimizers, batch, lengths, cfg, RUN, 0)
    with torch.no_grad():
        expected = (models.policy.logp(batch['idx'], batch['mask']) - batch['old_logp']).exp()
    torch.testing.assert_close(ratio, expected, rtol=0, atol=1e-5)
    assert (ratio - 1).abs().max() > 0.1

def test_a_second_policy_changes_nothing_in_the_first(made, tmp_path):
    one, _ = shown(made, tmp_path, prompt='Hi')
    two, _ = shown(made, tmp_path, prompt='Hi', policy=f'{made.policy},{made.reference}')
    assert two[:1] == one and [a['model'] for a in two] == [made.policy, made.reference]
    assert two[1]['kl'] == pytest.approx([0.0] * len(two[1]['ids']), abs=2e-5) # the reference, measured to itself

@pytest.fixture(scope='module')
def adapted(made):
    """The folder of a run of PPO with adapters."""
    run(ppo, policy=made.reference, reward_model=made.reward_model, prompts=made.prompts, lora_rank=2, lr=1e-2,
        out_dir=made.folder / 'lora', max_steps=2, batch_size=2, minibatches=1, max_new_tokens=6, critic_lr=1e-2)
    return str(made.folder / 'lora')

def test_the_critic_of_a_run_with_adapters(made, adapted, tmp_path):
    """V is that of W + alpha / rank B A, here 4 / 2, by the full matrix; the reward model stays as it is."""
    kept = torch.load(os.path.join(adapted, 'state.pt'), weights_only=True)['critic']
    critic = GPT.from_pretrained(made.reward_model, value_head=True)
    with torch.no_grad():
        for name in {name.split('.lora.')[0] for name in kept if '.lora.' in name}:
            A, B = (kept[f'{name}.lora.{i}.weight'] for i in (0, 1))
            critic.get_submodule(name).weight += 2 * B @ A
        critic.value_head.weight.copy_(kept['value_head.weight'])
        critic.value_head.bias.copy_(kept['value_head.bias'])
    for policy, folder in (made.reference, adapted), (adapted, adapted), (adapted, made.policy): # runs may be mixed
        answer, = shown(made, tmp_path, policy=policy, critic=folder, prompt='Hi')[0]
        row = torch.tensor([prompt_ids(TOK, 'Hi') + answer['ids']])
        with torch.no_grad():
            values = critic.values(row, torch.ones(1, row.size(1) - 1))[0, -len(answer['ids']):].tolist()
            last = GPT.from_pretrained(made.reward_model).rewards(row, torch.tensor([row.size(1)])).item()
        assert (answer['value'] == pytest.approx(values, abs=2e-5)) == (folder == adapted)
        assert answer['prefix'][-1] == pytest.approx(last, abs=2e-5)

def test_a_run_with_adapters_updates_these_alone(made, adapted, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(ppo, 'update', lambda models, *a: trained.extend(
        name for name, p in models.policy.named_parameters() if p.requires_grad))
    _, (_, said) = shown(made, tmp_path, policy=adapted, prompt='Hi')
    assert trained and all('.lora.' in name for name in trained) and said.endswith('and fresh adapters.')

# ---------------------------------------------------------------------------------------------------------------------
# options and texts

def test_the_options_are_those_of_the_run(made, tmp_path):
    """Without --prompts its file too; --ppo names others; a model that PPO has not made has PPO's defaults."""
    answers, (models, said) = shown(made, tmp_path, max_prompts=3)
    assert [a['prompt'] for a in answers] == [f"### Human: {row['prompt']}\n### Assistant:" for row in PROMPTS[:3]]
    assert 'β 0.3, γ 1, λ 0.8' in said and 'loses 0.7' in said and 'on 4 answers' in said and 'rate 0.001,' in said
    assert max(len(a['ids']) for a in answers) <= 12
    assert 'as PPO starts it' in models and made.reference in models and made.reward_model in models
    models, said = shown(made, tmp_path, prompt='Hi', ppo='--lam=0 --batch_size=2', critic=made.policy)[1]
    assert 'β 0.3, γ 1, λ 0;' in said and f'saved in {made.policy}' in models
    said = shown(made, tmp_path, prompt='Hi', ppo=f"{os.path.join(ROOT, 'config/toy/ppo.py')} --batch_size=2")[1][1]
    assert 'β 0.18, γ 1, λ 0.95;' in said and 'on 4 answers' in said # of two minibatches
    assert 'β 0.05, γ 1, λ 0.95;' in shown(made, tmp_path, prompt='Hi', policy=made.reference)[1][1]

def test_a_beta_that_moved_is_the_last_one(made, tmp_path):
    out = tmp_path / 'adapted'
    lines = run(ppo, policy=made.reference, reward_model=made.reward_model, prompts=made.prompts, out_dir=out,
                max_steps=3, batch_size=8, minibatches=1, max_new_tokens=4, kl_coef=0.3, kl_target=6.0, kl_gain=1.0)
    assert lines[-1]['kl_coef'] < 0.25
    assert f"β {lines[-1]['kl_coef']:g}," in shown(made, tmp_path, prompt='Hi', policy=out)[1][1]

@pytest.mark.parametrize('text, expected', [
    ('a b', [('a', ''), (' ', ''), ('b', '')]),
    ('é\n', [('\\xc3', 'é'), ('\\xa9', 'é'), ('\\n', '')]),
    ('你', [('\\xe4', '你'), ('\\xbd', '你'), ('\\xa0', '你')]),
    ('\u202e<', [('\\xe2', '\\u202e'), ('\\x80', '\\u202e'), ('\\xae', '\\u202e'), ('<', '')]), # it turns text round
])
def test_tokens_by_hand(text, expected):
    assert per_token.spell(TOK, TOK.encode(text)) == expected

def test_tokens_of_broken_text():
    assert per_token.spell(TOK, [0xe4, 0xbd, 65, 256, 0xff]) == [
        ('\\xe4', ''), ('\\xbd', ''), ('A', ''), (per_token.EOS, ''), ('\\xff', '')] # no character is there to name
    words = SimpleNamespace(eos=9, decode_bytes=lambda ids: b''.join(
        {0: b' \xe4\xbd', 1: b'\xa0!', 2: ' 你'.encode()}.get(i, b'') for i in ids))
    assert per_token.spell(words, [0, 1, 2, 12]) == [(' \\xe4\\xbd', '你'), ('\\xa0!', '你'), (' 你', ''), ('<12>', '')]

def test_the_terminal(made, tmp_path, capsys, monkeypatch):
    answer, = shown(made, tmp_path, prompt='H\x1b[2J', policy=made.policy)[0]
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(f'[{made.policy}] ### Human: H\\x1b[2J\\n### Assistant:') # it steers no terminal
    assert lines[start + 1].split()[:2] == ['log', 'pi']
    for t, line in enumerate(lines[start + 2:start + 2 + len(answer['ids'])]):
        keys = 'logp', 'ref_logp', 'kl', 'entropy', 'reward', 'value', 'advantage', 'whitened', 'returns'
        row = [answer[key][t] for key in keys] + [answer['prefix'][t + 1], answer['ratio'][t]]
        assert line.startswith(''.join(f'{x:{9 if i == 9 else 8}.3f}' for i, x in enumerate(row)))
        label = answer['tokens'][t][0]
        assert line.endswith(('* ' if answer['clipped'][t] else '  ')
                             + (label if answer['whitened'][t] > 0 else f'⟦{label}⟧'))
    assert {w > 0 for w in answer['whitened']} == {True, False}
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.delenv('NO_COLOR', raising=False)
    shown(made, tmp_path, prompt='Hi')
    out = capsys.readouterr().out
    assert '\x1b[32m' in out and '\x1b[31m' in out and '⟦' not in out

def test_the_terminal_says_where_its_numbers_come_from(made, tmp_path, capsys, monkeypatch):
    for critic, told in ('', 'as PPO starts it, a copy of the reward model'), (made.policy, f'saved in {made.policy}'):
        _, texts = shown(made, tmp_path, prompt='Hi', critic=critic)
        *lines, models, options, wrote = capsys.readouterr().out.splitlines()
        *_, marks = (line for line in lines if line.startswith('⟦ ⟧: '))
        assert marks == ('⟦ ⟧: pushed down. The sign of A white decides; that of A may differ. *: the clip bites.')
        legend = lines[lines.index(marks) + 1:]
        assert len(legend) <= 4 and max(map(len, legend)) <= 100 and legend[-1].endswith(' More: docs/log.md.')
        assert [part.split(': ')[0] for part in ' '.join(legend).split('; ')] == [
            'log pi', 'log ref', 'KL', 'entropy', 'reward', 'V', 'A', 'A white', 'return', 'RM score', 'ratio']
        assert [models, options] == texts and 'Critic, for V, A and return: ' in models and told in models
        assert 'after an update on 2 answers of each policy, the shown ones among them' in options # a batch
        assert wrote == f"wrote {tmp_path / 'page.html'}"
    _, texts = shown(made, tmp_path, prompt='Hi', policy=made.shared, critic='shared')
    assert "Critic, for V, A and return: the policy's own value head." in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.delenv('NO_COLOR', raising=False)
    shown(made, tmp_path, prompt='Hi')
    assert '\nGreen: pushed up. Red: pushed down. The sign of A white decides;' in capsys.readouterr().out

def test_the_legend_names_the_columns_that_are_there():
    """Answers of reinforce.py: no critic, and so no whitened A."""
    told = per_token.legend([dict(logp=[-1.0], kl=[0.0], advantage=[1.0])], False)
    assert told.startswith('⟦ ⟧: pushed down. Without A white, the sign of A decides. *: the clip bites.\n')
    assert 'KL: ' in told
    assert not any(name in told for name in ('A white: ', 'RM score: ', 'V: ', 'return: '))

def test_the_header_stands_above_its_columns(capsys):
    """Every name ends where the numbers below it end, with a space before it."""
    keys = 'logp', 'kl', 'returns', 'prefix', 'ratio'
    answer = {key: [-1.5, 2.25] for key in keys} | dict(prefix=[0, 0.5, 12.125], ratio=[1.0, None], clipped=[0, 1],
                                                        tokens=[['a', ''], ['b', '']], advantage=[1.0, -1.0])
    microscope.print_answer(answer, False)
    assert capsys.readouterr().out.splitlines() == [
        '  log pi      KL       A  return RM score   ratio  token',
        '  -1.500  -1.500   1.000  -1.500    0.500   1.000  a',
        '   2.250   2.250  -1.000   2.250   12.125     inf* ⟦b⟧']

@pytest.mark.parametrize('state, said', [
    (None, 'is missing'), (b'PK', 'holds no critic of the shape of this reward model'),
    (dict(policy={}), 'holds no critic of the shape of this reward model'), # as of dpo.py
    (dict(critic=dict(w=torch.zeros(3))), 'holds no critic of the shape of this reward model')])
def test_a_folder_without_a_critic_is_one_clear_line(made, tmp_path, capsys, state, said):
    folder = tmp_path / 'dpo'
    folder.mkdir()
    if isinstance(state, bytes):
        (folder / 'state.pt').write_bytes(state)
    elif state:
        torch.save(state, folder / 'state.pt')
    line = stops(capsys, microscope, **options(made, prompt='Hi', critic=folder, out=tmp_path / 'page.html'))
    assert line == (f"--critic={folder}: {folder}/state.pt {said}; wanted a checkpoint of ppo.py with a separate "
                    "critic, which began as this reward model")

def test_the_page_needs_nothing_else_and_texts_stay_texts(made, tmp_path):
    """No address but the name of SVG; what a prompt holds cannot end the data."""
    answers, _ = shown(made, tmp_path, prompt='<b></script>', ppo='--max_new_tokens=2 --batch_size=1')
    html = (tmp_path / 'page.html').read_text()
    template = microscope.HTML.read_text()
    assert answers[0]['prompt'] == '### Human: <b></script>\n### Assistant:'
    assert html.count('<') == template.count('<') and '"DATA"' not in html
    assert re.findall(r'https?:[^\'"]*', html) == ['http://www.w3.org/2000/svg'] * html.count('http:')
    assert not re.search(r'\ssrc=|@import|url\(|fetch|innerHTML', html) and "default-src 'none'" in html
    assert set(re.findall(r'href="([^"]*)"', html)) == {'data:,'}

def test_an_infinite_ratio_is_no_number():
    assert per_token.numbers(torch.tensor([1.0, math.inf, 0.12345678])) == [1.0, None, 0.123457]

@pytest.mark.parametrize('wrong, message', [
    (dict(policy='a,b,c'), 'one folder, or two'), (dict(policy='{policy},'), 'one folder, or two'),
    (dict(policy='nowhere', prompt=''), '--policy=nowhere: no such folder'),
    (dict(policy='{reward_model}'), 'is a reward model'),
    (dict(reference='nowhere'), '--reference=nowhere'), (dict(reference='{reward_model}'), '--reference='),
    (dict(reward_model='{reference}'), '--reward_model='), (dict(prompts='nowhere.jsonl'), '--prompts=nowhere.jsonl'),
    (dict(prompt='Hi', prompts='{prompts}'), 'left out where there is a prompt'), (dict(max_prompts=0), 'at least 1'),
    (dict(critic='{reference}'), '--critic='), (dict(critic='{shared}'), 'with a separate critic'),
    (dict(critic='shared'), 'has no value head'), (dict(ppo='--lamm=1'), 'unknown option lamm, did you mean lam?'),
    (dict(ppo='--lam=2'), 'between 0 and 1'), (dict(ppo='"'), '--ppo="'), (dict(out='page.txt'), 'ends with .html'),
    (dict(out='{folder}/none/page.html'), '--out='), (dict(out='{folder}/other.html'), 'no page of the microscope'),
    (dict(policy='{reference}', prompt=''), 'no such file; wanted a --prompt'),
])
def test_bad_input_is_one_line(made, tmp_path, capsys, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    (made.folder / 'other.html').write_text('<title>Mine</title>')
    wrong = {k: v.format(**vars(made)) if isinstance(v, str) else v for k, v in wrong.items()}
    line = stops(capsys, microscope, **options(made, **dict(prompt='' if 'prompts' in wrong else 'Hi') | wrong))
    assert message in line
    assert os.listdir(tmp_path) == [] and (made.folder / 'other.html').read_text() == '<title>Mine</title>'

def test_damaged_options_are_one_line(made, tmp_path, capsys):
    folder = tmp_path / 'damaged'
    checkpoint(folder)
    (folder / 'options.json').write_text(json.dumps(dict(script='ppo.py', options=dict(prompts='x', lam=7))))
    assert 'lam must be between 0 and 1' in stops(capsys, microscope, **options(made, policy=folder, prompt='Hi'))

# ---------------------------------------------------------------------------------------------------------------------
# --samples

@pytest.fixture(scope='module')
def trained(made):
    """The samples of a run of ppo.py and of one of reinforce.py, of two saves each."""
    folders = []
    for script, more in (ppo, dict(critic='shared')), (reinforce, dict(n_answers=2)):
        folders.append(str(made.folder / f'shown_{script.__name__}'))
        run(script, policy=made.reference, reward_model=made.reward_model, prompts=made.prompts, out_dir=folders[-1],
            max_steps=2, save_every=1, show=2, batch_size=2, minibatches=1, max_new_tokens=6, **more)
    return folders

def test_the_page_of_samples_holds_the_file(trained, tmp_path, capsys):
    """Each line, and the run that it is of; the terminal tells the last step alone."""
    run(microscope, samples=f'{trained[0]}/samples.jsonl', out=tmp_path / 'page.html')
    page, lines = page_of(tmp_path / 'page.html'), []
    with open(f'{trained[0]}/samples.jsonl') as f:
        lines = [json.loads(line) for line in f]
    assert page['answers'] == [line | dict(model=trained[0]) for line in lines]
    assert f'{trained[0]}/samples.jsonl' in page['settings'][0] and 'as it was saved' in page['settings'][0]
    assert 'each save has other prompts' in page['settings'][0]
    out = capsys.readouterr().out
    said = [per_token.plain(line['prompt']) for line in lines if line['step'] == 2]
    assert re.findall(r'^\[(.*)\] (.*)$', out, re.M) == [(f'{trained[0]}, step 2', text) for text in said]
    out = out.split('⟦ ⟧')[0] # less the legend
    assert out.count('log pi') == 2 and out.count('A white') == 2

def test_two_runs_side_by_side_by_their_folders(trained, tmp_path, capsys):
    run(microscope, samples=','.join(trained), out=tmp_path / 'page.html')
    assert [a['model'] for a in page_of(tmp_path / 'page.html')['answers']] == [trained[0]] * 4 + [trained[1]] * 4
    tables = capsys.readouterr().out.split('⟦ ⟧')[0].split('\n[')[1:] # less the legend
    assert ['A white' in table for table in tables] == [True, True, False, False] # RLOO has none
    header, row = tables[2].splitlines()[1:3]
    assert header.split() == 'log pi log ref KL entropy A RM score ratio token'.split()
    with open(f'{trained[1]}/samples.jsonl') as f:
        answer = [json.loads(line) for line in f][2]
    keys = 'logp', 'ref_logp', 'kl', 'entropy', 'advantage'
    numbers = [answer[key][0] for key in keys] + [answer['prefix'][1], answer['ratio'][0]]
    assert row.startswith(''.join(f'{x:{9 if i == 5 else 8}.3f}' for i, x in enumerate(numbers)))

def test_a_file_of_others_steers_no_terminal(trained, tmp_path, capsys):
    with open(f'{trained[0]}/samples.jsonl') as f:
        line = json.loads(f.readline())
    line = line | dict(prompt='\x1b[2J', tokens=[['\x1b[3J', '\x1b']] * len(line['ids']))
    (tmp_path / 'theirs.jsonl').write_text(json.dumps(line) + '\n')
    run(microscope, samples=tmp_path / 'theirs.jsonl', out=tmp_path / 'page.html')
    out = capsys.readouterr().out
    assert '\x1b' not in out and '\\x1b[2J' in out and '\\x1b[3J' in out and '(part of \\x1b)' in out

@pytest.mark.parametrize('wrong, message', [
    (dict(samples='a,b,c'), 'one file, or two with a comma between'), (dict(samples='{0},'), 'one file, or two'),
    (dict(samples='nowhere.jsonl'), 'nowhere.jsonl: no such file'), (dict(samples='{0},nowhere'), 'nowhere: no such'),
    (dict(samples='{0}/log.jsonl'), '{0}/log.jsonl:1: wanted `prompt` to be text; ppo.py and reinforce.py write such'),
    (dict(samples='{0}/model.safetensors'), '{0}/model.safetensors:1: wanted'),
    (dict(samples='{0}', policy='x'), 'only a run without samples reads it'),
    (dict(samples='{0}', prompts='x'), 'only a run without samples reads it'),
    (dict(samples='{0}', out='none/page.html'), '--out=none/page.html: wanted a file in a folder')])
def test_bad_samples_are_one_line(trained, tmp_path, capsys, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    wrong = dict(out='page.html') | {key: value.format(*trained) for key, value in wrong.items()}
    assert message.format(*trained) in stops(capsys, microscope, **wrong)
    assert os.listdir(tmp_path) == []

def test_the_options_of_a_run_with_show_are_read(trained, made, tmp_path):
    answers, (_, said) = shown(made, tmp_path, policy=trained[0], prompt='Hi', ppo='--batch_size=1')
    assert len(answers) == 1 and 'on 1 answers' in said

# ---------------------------------------------------------------------------------------------------------------------
# in a browser

def made_up(model, prompt, k):
    """An answer of k tokens, of the form that `look` gives, with numbers of no meaning."""
    numbers = {name: [round(math.sin(n + 7 * t), 3) for t in range(k)] for n, name in enumerate((
        'logp', 'ref_logp', 'kl', 'entropy', 'reward', 'value', 'advantage', 'whitened', 'returns', 'ratio'))}
    five = [[[EVIL, 7, -0.5], [' b', 8, -1.5]]] * k
    return numbers | dict(model=model, prompt=prompt, ids=[7] * k, tokens=[[f' {t}', ''] for t in range(k)], score=0.5,
                          prefix=[round(math.cos(t), 3) for t in range(k + 1)], clipped=[0] * k, ended=True, top=five,
                          ref_top=five)

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_in_a_browser(made, tmp_path, monkeypatch):
    answers = [made_up(EVIL, 'Hi', 4), made_up('b', 'Hi', 5), made_up(EVIL, EVIL, 60), made_up('b', EVIL, 1)]
    assert set(answers[0]) == set(shown(made, tmp_path, prompt='Hi')[0][0])
    answers[0]['tokens'] = [[EVIL, ''], ['\\xe4', '你'], [' b', ''], [per_token.EOS, '']]
    answers[0]['clipped'][0], answers[0]['ratio'][1] = 1, None
    path = tmp_path / 'made_up.html'
    data = json.dumps(dict(answers=answers, settings=[EVIL, EVIL])).replace('<', '\\u003c')
    path.write_text(microscope.HTML.read_text().replace('"DATA"', data))
    monkeypatch.setitem(KEYS, 'Left', '\ue012'), monkeypatch.setitem(KEYS, 'Right', '\ue014')
    monkeypatch.setitem(KEYS, 'Up', '\ue013'), monkeypatch.setitem(KEYS, 'Down', '\ue015')
    monkeypatch.setitem(KEYS, 'End', '\ue010'), monkeypatch.setitem(KEYS, 'Home', '\ue011')
    browser = Browser(tmp_path / 'profile')
    cdp = lambda cmd, **params: browser.send('POST', '/goog/cdp/execute', cmd=cmd, params=params)
    panel = lambda card: browser.js(f'document.querySelectorAll(".panel")[{card}].innerText')
    number = lambda card, key: browser.js(
        f'document.querySelectorAll(".panel")[{card}].querySelector("[data-key={key}]").lastChild.textContent')
    try:
        cdp('Emulation.setDeviceMetricsOverride', width=1200, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(path.as_uri())
        browser.wait('document.querySelectorAll(".card").length === 4')
        assert browser.js('document.getElementById("about").open') # what the numbers mean
        assert 'RM score after each token (only the last one counts)' in browser.js('document.body.textContent')
        # nothing of a text became an element, or ran
        assert browser.js('document.title') == 'Token microscope' and browser.js('document.images.length') == 0
        assert EVIL in browser.js('document.body.textContent') and browser.js('document.scripts.length') == 2
        assert browser.js('document.querySelector(".token.clipped").textContent') == EVIL
        # both policies' answers to a prompt side by side
        tops = browser.js('[...document.querySelectorAll(".card")].map(c => c.getBoundingClientRect().top)')
        assert tops[0] == tops[1] < tops[2] == tops[3]
        # keys: the numbers are those of the data
        browser.js('document.querySelector(".token").focus()')
        browser.press('Home')
        assert f'token 1 of {len(answers[0]["ids"])}' in panel(0) and EVIL in panel(0) and 'the clip bites' in panel(0)
        for key in ('logp', 'kl', 'value', 'advantage'):
            assert float(number(0, key).replace('−', '-')) == pytest.approx(answers[0][key][0], abs=6e-4), key
        browser.press('Right')
        assert 'token 2 of' in panel(0) and 'part of 你' in panel(0) and number(0, 'ratio') == '∞'
        assert browser.js('document.activeElement.textContent') == '\\xe4'
        browser.press('Down')
        assert 'token 2 of' in panel(1) and browser.js('document.activeElement.closest(".card") === cards[1].root')
        browser.press('Left', 'Left', 'Left')
        assert 'token 1 of' in panel(1)
        browser.press('End', 'Up')
        assert 'token 4 of 4' in panel(0) # the answer above is shorter
        assert float(number(1, 'prefix').replace('−', '-')) == pytest.approx(answers[1]['prefix'][-1], abs=6e-4)
        # the mouse, over a token, then over the picture: its first token begins at 38 pixels
        over = lambda selector, dx: browser.send('POST', '/actions', actions=[dict(
            type='pointer', id='mouse', parameters=dict(pointerType='mouse'), actions=[dict(
                type='pointerMove', duration=0, x=dx, y=0, origin=browser.send(
                    'POST', '/element', using='css selector', value=selector))])])
        over('.card:nth-child(2) .token:nth-child(3)', 0)
        assert 'token 3 of' in panel(1)
        over('.card:nth-child(2) > svg', 45 - browser.js('cards[1].svg.clientWidth') // 2)
        assert 'token 1 of' in panel(1)
        # another colour
        blank = browser.js('document.querySelectorAll(".token")[2].style.backgroundColor')
        browser.js('($("metric").value = "entropy", $("metric").onchange())')
        assert browser.js('document.querySelectorAll(".token")[2].style.backgroundColor') != blank
        assert ', entropy ' in browser.js('document.querySelectorAll(".token")[2].ariaLabel')
        # one name for the reward model's score; however small, a number has a colour, and 0 has none
        assert browser.js('document.querySelector(".legend").textContent').startswith('RM score after each token')
        assert browser.js('[...$("metric").options].find(o => o.value === "prefix").text') == 'RM score'
        assert browser.js('[-1, -1e-6, 0, .5].map(tint)') == [
            'rgb(var(--down) / 0.500)', 'rgb(var(--down) / 0.120)', 'rgb(var(--up) / 0)', 'rgb(var(--up) / 0.310)']
        assert 'inset' in browser.js('getComputedStyle(document.querySelector(".now")).boxShadow') # no neighbour's
        # a phone, and darkness: nothing is wider than the screen, cards below one another, a tap chooses
        ink = browser.js('getComputedStyle(document.body).color')
        cdp('Emulation.setDeviceMetricsOverride', width=390, height=844, deviceScaleFactor=2, mobile=True)
        cdp('Emulation.setTouchEmulationEnabled', enabled=True)
        cdp('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark')])
        browser.open(path.as_uri())
        browser.wait('document.querySelectorAll(".card").length === 4')
        assert browser.js('document.documentElement.scrollWidth') == 390
        assert browser.js('getComputedStyle(document.body).color') != ink
        tops = browser.js('[...document.querySelectorAll(".card")].map(c => c.getBoundingClientRect().top)')
        assert tops == sorted(tops) and len(set(tops)) == 4
        browser.js('cards[0].tokens[2].textContent = "."')
        assert browser.js('cards[0].tokens[2].getBoundingClientRect().width') >= 24 # for a finger
        browser.click('.card .token:nth-child(2)')
        assert 'token 2 of' in panel(0)
    finally:
        browser.close()

@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_scrolling_through_training_in_a_browser(tmp_path, monkeypatch):
    """Run a was saved at steps 2, 4, 10; b, without a critic and a reward model of its own, at 4, 10 and 12."""
    answers = [made_up('a', 'Hi', 4) | dict(step=2, score=0.2), made_up('a', 'Hi', 5) | dict(step=4, score=0.4),
               made_up('a', EVIL, 60) | dict(step=10, score=1.0)]
    bare = [made_up('b', 'Hi', 3) | dict(step=4, score=1.4), made_up('b', EVIL, 7) | dict(step=10, score=2.0),
            made_up('b', 'Bye', 2) | dict(step=12, score=2.2)]
    for answer in bare:
        for key in ('value', 'returns', 'reward', 'whitened', 'prefix'):
            del answer[key]
    answers[1]['advantage'][4] = -9.0 # the largest of all steps
    monkeypatch.setitem(KEYS, 'Left', '\ue012'), monkeypatch.setitem(KEYS, 'Right', '\ue014')
    monkeypatch.setitem(KEYS, 'End', '\ue010'), monkeypatch.setitem(KEYS, 'Home', '\ue011')
    pages = {}
    for name, rows in ('both', answers + bare), ('bare', bare):
        path = pages[name] = tmp_path / f'{name}.html'
        data = json.dumps(dict(answers=rows, settings=['facts', 'options'])).replace('<', '\\u003c')
        path.write_text(microscope.HTML.read_text().replace('"DATA"', data))
    browser = Browser(tmp_path / 'profile')
    cdp = lambda cmd, **params: browser.send('POST', '/goog/cdp/execute', cmd=cmd, params=params)
    cards = lambda: browser.js('[...document.querySelectorAll(".card")].map(c => '
                               '[c.querySelector("h3").textContent, c.querySelectorAll(".token").length])')
    said = lambda: browser.js('document.getElementById("now").textContent')
    names = lambda card: browser.js(
        f'[...document.querySelectorAll(".panel")[{card}].querySelectorAll("[data-key]")].map(e => e.dataset.key)')
    missing = {'value', 'returns', 'reward', 'whitened', 'prefix', 'change'}
    try:
        cdp('Emulation.setDeviceMetricsOverride', width=1200, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(pages['both'].as_uri())
        browser.wait('document.querySelectorAll(".card").length === 1')
        assert said() == 'step 2, 1 of 4' and cards() == [['a', 4]]
        scale = browser.js('document.getElementById("high").textContent')
        assert scale == '9.00' # of all steps: the colours of two steps can be compared
        # by Tab to the slider, then by its arrow keys
        browser.press('Tab', 'Tab')
        assert browser.js('document.activeElement.id') == 'step'
        browser.press('Right')
        assert said() == 'step 4, 2 of 4' and cards() == [['a', 5], ['b', 3]]
        assert browser.js('document.activeElement.id') == 'step' # it stays there
        assert browser.js('document.getElementById("step").getAttribute("aria-valuetext")') == said()
        assert browser.js('document.getElementById("high").textContent') == scale
        tops = browser.js('[...document.querySelectorAll(".card")].map(c => c.getBoundingClientRect().top)')
        assert tops[0] == tops[1] # side by side
        # what a run has not is absent, in the panel and in the picture
        assert not missing & set(names(1)) and missing <= set(names(0)) and 'advantage' in names(1)
        assert browser.js('document.querySelectorAll(".card > svg").length') == 1
        assert browser.js('document.querySelector(".panel th").textContent') == 'likeliest, as saved'
        browser.js('($("metric").value = "value", $("metric").onchange())') # no colour for what is not there
        colours = browser.js('[...document.querySelectorAll(".card")].map(c => '
                             'c.querySelector(".token").style.backgroundColor !== "")')
        assert colours == [True, False]
        browser.press('Right')
        assert said() == 'step 10, 3 of 4' and cards() == [['a', 60], ['b', 7]]
        browser.press('End')
        assert said() == 'step 12, 4 of 4' and cards() == [['b', 2]] # a has no answer there
        assert browser.js('document.querySelector("h2").textContent') == 'Bye'
        browser.press('Left', 'Home')
        assert said() == 'step 2, 1 of 4' and cards() == [['a', 4]] and browser.js('document.images.length') == 0
        assert 'score 0.20' in browser.js('document.querySelector(".card").innerText')
        # a phone, in the dark: nothing is wider than the screen, the slider stays in sight
        cdp('Emulation.setDeviceMetricsOverride', width=390, height=844, deviceScaleFactor=2, mobile=True)
        for name, told in ('both', 'step 10, 3 of 4'), ('bare', 'step 12, 3 of 3'):
            browser.open(pages[name].as_uri())
            browser.wait('document.querySelectorAll(".card").length >= 1')
            browser.js('($("step").value = 2, $("step").oninput(), window.scrollTo(0, 500))')
            assert said() == told and browser.js('document.documentElement.scrollWidth') == 390
            assert not browser.js('document.getElementById("about").open') # the answers come first
            box = browser.js('(r => [r.top, r.bottom, r.width])($("step").getBoundingClientRect())')
            assert name == 'bare' or 0 <= box[0] < box[1] < 100 and box[2] > 80 # a page of two cards is long
        # nothing to draw, and no metric that nobody has
        assert browser.js('document.querySelectorAll(".card > svg").length') == 0
        metrics = browser.js('[...document.getElementById("metric").options].map(o => o.value)')
        assert metrics == ['logp', 'ref_logp', 'kl', 'entropy', 'advantage', 'ratio']
    finally:
        browser.close()
