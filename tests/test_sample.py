"""The terminal: streamed text is whole characters, the conversation fits the context, errors are one line."""
import builtins

import pytest

import common # before torch: it sets how torch's threads wait

import torch

import sample
from model import GPT, GPTConfig
from tokens import load_tokenizer, prompt_ids

tok = load_tokenizer('bytes') # every byte is a token, so every character that is not ASCII is spread over several


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('policy')
    model = GPT(GPTConfig(block_size=120, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
    torch.nn.init.normal_(model.wte.weight, std=0.5)
    model.save_pretrained(folder)
    tok.save(folder)
    torch.manual_seed(0)
    GPT(GPTConfig(120, 257, 1, 1, 16, reward_head=True)).save_pretrained(folder / 'reward')
    tok.save(folder / 'reward')
    return str(folder)


def test_streamed_characters_are_whole():
    pieces = list(sample.stream_text(tok, tok.encode(' naïve €\n 🙂') + [tok.eos]))
    assert ''.join(pieces) == 'naïve €\n 🙂' # the answer's first space alone is left out
    assert '\ufffd' not in ''.join(pieces) and 'ï' in pieces and '€' in pieces and '🙂' in pieces


def test_broken_characters_do_not_stop_the_stream():
    euro = tok.encode('€')
    assert ''.join(sample.stream_text(tok, euro[:2] + tok.encode('a') + euro[:1])) == '\ufffda\ufffd'


def test_conversation_forgets_whole_turns_first():
    user, assistant = ({'role': role, 'content': 'x' * 10} for role in ('user', 'assistant'))
    messages = [user, assistant, user, assistant, user]
    one, three, five = (len(prompt_ids(tok, messages[-n:])) for n in (1, 3, 5))
    assert sample.fit(tok, messages, five) == (prompt_ids(tok, messages), '')
    assert sample.fit(tok, messages, five - 1) == (prompt_ids(tok, messages[2:]), 'forgot the oldest 2 messages')
    assert sample.fit(tok, messages, three - 1) == (prompt_ids(tok, [user]), 'forgot the oldest 4 messages')
    ids, notice = sample.fit(tok, messages, one - 1)
    assert ids == prompt_ids(tok, [user])[1:] and notice == f"read only the last {one - 1} of {one} tokens"


def test_one_prompt_prints_what_generate_gives(folder, capsys):
    sample.main(sample.Config(policy=folder, prompt='Hi', temperature=0.0, max_new_tokens=9, device='cpu'))
    out = capsys.readouterr().out
    model = GPT.from_pretrained(folder)
    (answer,) = model.generate([prompt_ids(tok, 'Hi')], 9, temperature=0.0, eos=tok.eos)
    assert out == tok.decode(answer).removeprefix(' ') + '\n'


def test_same_seed_same_answer_and_score(folder, capsys):
    outs = []
    for seed in (1, 1, 2):
        sample.main(sample.Config(policy=folder, prompt='Hi', seed=seed, device='cpu', reward_model=folder + '/reward'))
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2] and '[score ' in outs[0]


def test_conversation(folder, capsys, monkeypatch):
    seen, lines = [], iter(['Hello there', 'and again, with rather more words', '/reset', 'Hello', ''])
    monkeypatch.setattr(builtins, 'input', lambda _: next(lines))
    fit = sample.fit
    monkeypatch.setattr(sample, 'fit', lambda tok, messages, n: seen.append(len(messages)) or fit(tok, messages, n))
    sample.main(sample.Config(policy=folder, max_new_tokens=20, device='cpu'))
    out = capsys.readouterr().out
    assert seen == [1, 3, 1] # the second line came with its history, /reset took it away
    assert out.count('model: ') == 3 and '(forgot the oldest 2 messages: the context holds 120 tokens' in out


def test_end_of_input_ends(folder, capsys, monkeypatch):
    def no_more(_):
        raise EOFError
    monkeypatch.setattr(builtins, 'input', no_more)
    sample.main(sample.Config(policy=folder, device='cpu'))


@pytest.mark.parametrize('more, words', [
    (dict(prompt='x' * 50), 'wanted at most 60, the context of 120 less an answer of 60'),
    (dict(policy='FOLDER/reward'), 'is a reward model'),
    (dict(reward_model='FOLDER'), 'is a language model'),
    (dict(policy='FOLDER/nowhere'), 'nowhere'),
])
def test_bad_input_is_one_line(folder, capsys, more, words):
    more = {k: v.replace('FOLDER', folder) for k, v in more.items()}
    with pytest.raises(SystemExit) as stopped:
        sample.main(sample.Config(**dict(policy=folder, prompt='Hi', device='cpu') | more))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and words in err and err.count('\n') == 1


@pytest.mark.parametrize('flag', ['--temperature=-1', '--top_p=0', '--top_k=-1', '--max_new_tokens=0'])
def test_impossible_options(flag):
    with pytest.raises(SystemExit) as stopped:
        common.parse_config(sample.Config, [flag])
    assert stopped.value.code == 2
