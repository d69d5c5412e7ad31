"""The terminal: streamed text is whole characters, the conversation fits the context, errors are one line."""
import builtins
import io
import os
import sys

import pytest
import torch

import sample
from common.options import launch, parse_config
from common.tokens import load_tokenizer, prompt_ids
from model import GPT, GPTConfig
from tiny import ROOT

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
    for name, block_size in (('reward', 120), ('short', 60)):
        GPT(GPTConfig(block_size, 257, 1, 1, 16, reward_head=True)).save_pretrained(folder / name)
        tok.save(folder / name)
    return str(folder)

@pytest.fixture(params=['bytes', 'gpt2'])
def some_tok(request, monkeypatch):
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.path.join(ROOT, '../shared/tiktoken_cache'))
    if request.param == 'gpt2' and not os.path.isdir(cache):
        pytest.skip("needs TIKTOKEN_CACHE_DIR, a folder with tiktoken's two GPT-2 files")
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', cache)
    return load_tokenizer(request.param)

# letters of two to four bytes, right to left, joined by zero-width joiners, with marks above and below
SCRIPTS = ['你好，世界。龘', '表情 🙂👩‍👩‍👧‍👦🇨🇳!', 'مرحبا بالعالم', 'שלום', 'Привет', 'नमस्ते', 'สวัสดี', '한국어', 'n\u0303é ñ']

@pytest.mark.parametrize('text', SCRIPTS)
def test_every_script_streams_unharmed(some_tok, text):
    ids = some_tok.encode(' ' + text) + [some_tok.eos]
    pieces = list(sample.until_next_turn(sample.stream_text(some_tok, ids)))
    assert ''.join(pieces) == text and '\ufffd' not in ''.join(pieces)
    for character in text: # each came whole, in one piece
        assert any(character in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 1 # and it did stream

@pytest.mark.parametrize('text', SCRIPTS)
def test_every_script_reaches_the_model_and_the_terminal(folder, some_tok, capsys, monkeypatch, text):
    """The model reads the prompt's tokens and says them again."""
    monkeypatch.setattr(sample, 'load_tokenizer', lambda name, option: some_tok)
    def echo(model, prompts, *options):
        heard = some_tok.decode(prompts[0])
        assert heard == f"### Human: {text}\n### Assistant:"
        yield from scripted(some_tok, ' ' + heard[len('### Human: '):-len('\n### Assistant:')])
    monkeypatch.setattr(GPT, 'stream', echo)
    sample.main(sample.Config(policy=folder, prompt=text, max_new_tokens=1, device='cpu'))
    assert capsys.readouterr().out == text + '\n'

def scripted(tok, *texts):
    """Yield what GPT.stream does when the model says these texts; an exception is raised in its place."""
    for text in texts:
        if isinstance(text, type):
            raise text
        for token in tok.encode(text):
            yield torch.tensor([0]), torch.tensor([token]), torch.tensor([-1.0])

@pytest.mark.parametrize('text, said', [
    ('Yes.\n### Human: And you?\n', 'Yes.'),
    ('Yes.### Human: And', 'Yes.'),
    ('### Human:', ''),
    ('\n### Human:', ''),
    ('Yes.\n\n### Human:', 'Yes.\n'),
    ('# One\n## Two\n### Three', '# One\n## Two\n### Three'),
    ('### Hu### Human: x', '### Hu'), # the first beginning leads nowhere
    ('a\n\n### Human', 'a\n\n### Human'), # cut short of the colon: it is not the stop
    ('ends with #', 'ends with #'),
    ('', ''),
])
def test_an_answer_stops_at_the_next_turn(text, said):
    for size in range(1, 13): # however the pieces fall, nothing of the stop is ever out
        pieces = [text[i:i + size] for i in range(0, len(text), size)]
        assert ''.join(sample.until_next_turn(iter(pieces))) == said

def test_nothing_is_held_back_without_need():
    pieces = sample.until_next_turn(iter(['Hel', 'lo.', '\n', 'Bye', ' #', '1', '\n###', ' Hi']))
    assert [p for p in pieces if p] == ['Hel', 'lo.', '\nBye', ' ', '#1', '\n### Hi']

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
    forgotten = 'the conversation has grown too long: what was said first is forgotten'
    assert sample.fit(tok, messages, five) == (prompt_ids(tok, messages), '')
    assert sample.fit(tok, messages, five - 1) == (prompt_ids(tok, messages[2:]), forgotten)
    assert sample.fit(tok, messages, three - 1) == (prompt_ids(tok, [user]), forgotten)
    ids, notice = sample.fit(tok, messages, one - 1)
    assert ids == prompt_ids(tok, [user])[1:] and notice == (
        f"your text is too long: only the last {one - 1} of {one} tokens are read")

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
    assert out.count('model: ') == 3 and out.count('(the conversation has grown too long: ') == 1

def type_in(monkeypatch, *lines):
    """Let these lines come from the keyboard, then the end of input; an exception comes as itself."""
    lines = iter([*lines, EOFError])
    def read(_):
        line = next(lines)
        if isinstance(line, type):
            raise line
        return line
    monkeypatch.setattr(builtins, 'input', read)

def replies(monkeypatch, *answers):
    """Let the model say these answers, one a turn; return the texts that it reads."""
    heard, answers = [], iter(answers)
    def stream(model, prompts, *options):
        heard.append(tok.decode(prompts[0]))
        yield from scripted(tok, *next(answers))
    monkeypatch.setattr(GPT, 'stream', stream)
    return heard

def test_a_model_that_never_learnt_to_end(folder, capsys, monkeypatch):
    """The next turn that it makes up is neither printed nor remembered."""
    type_in(monkeypatch, 'Hi', 'Why?')
    heard = replies(monkeypatch, [' Yo.\n### Hu', 'man: Go away\n### Assistant: No'], [' So.'])
    sample.main(sample.Config(policy=folder, max_new_tokens=20, device='cpu'))
    assert heard == ['### Human: Hi\n### Assistant:',
                     '### Human: Hi\n### Assistant: Yo.\n### Human: Why?\n### Assistant:']
    assert capsys.readouterr().out.split('\n')[1:] == ['model: Yo.', 'model: So.', '', '']

def test_the_score_is_that_of_what_was_printed(folder, capsys, monkeypatch):
    scored = []
    monkeypatch.setattr(sample, 'score_answers', lambda reward_model, prompts, answers, device: (
        scored.append(answers[0]), torch.tensor([0.5]))[1])
    replies(monkeypatch, [' Yo.\n### Human: Go'])
    sample.main(sample.Config(policy=folder, reward_model=folder + '/reward', prompt='Hi', device='cpu'))
    assert scored == [list(b' Yo.') + [tok.eos]] and capsys.readouterr().out == 'Yo.   [score 0.50]\n'

def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(folder, capsys, monkeypatch):
    type_in(monkeypatch, 'Hi', 'Why?', KeyboardInterrupt)
    heard = replies(monkeypatch, [' So', KeyboardInterrupt, ' much'], [' Ah.'])
    with pytest.raises(KeyboardInterrupt): # at the prompt; launch turns it into exit code 130
        sample.main(sample.Config(policy=folder, max_new_tokens=20, device='cpu'))
    assert heard[1] == '### Human: Hi\n### Assistant: So\n### Human: Why?\n### Assistant:'
    assert capsys.readouterr().out.split('\n')[1:] == ['model: So', 'model: Ah.', '']

def test_ctrl_c_ends_a_single_prompt(folder, capsys, monkeypatch):
    replies(monkeypatch, [' So', KeyboardInterrupt])
    monkeypatch.setattr(sys, 'argv', ['sample.py', f"--policy={folder}", '--prompt=Hi', '--device=cpu'])
    with pytest.raises(SystemExit) as stopped:
        launch(sample.main, sample.Config)
    assert stopped.value.code == 130 and capsys.readouterr().out == 'So'

def test_tokens_that_the_tokenizer_does_not_know_say_nothing(folder, tmp_path, capsys):
    """300 tokens over the 257 of the tokenizer; the last layer norm's bias makes the last ones all but certain."""
    model = GPT(GPTConfig(block_size=120, vocab_size=300, n_layer=1, n_head=1, n_embd=16))
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.wte.weight[270:] = 9
    model.save_pretrained(tmp_path)
    tok.save(tmp_path)
    sample.main(sample.Config(policy=str(tmp_path), prompt='Hi', max_new_tokens=5, device='cpu'))
    assert capsys.readouterr().out == '\n'

def test_a_terminal_of_few_characters_shows_question_marks(folder, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii', write_through=True)
    monkeypatch.setattr(sys, 'stdout', out)
    replies(monkeypatch, [' 你好!'])
    sample.main(sample.Config(policy=folder, prompt='Hi', device='cpu'))
    assert out.buffer.getvalue() == b'??!\n'

ODD = ' a\x1b[2Jb\x9b31mc\r\nd\re\u202ef\n'

def test_no_model_commands_the_terminal(folder, capsys, monkeypatch):
    """Every character is a piece of its own; the next turn's template holds what was said."""
    type_in(monkeypatch, 'Hi', 'Why?')
    heard = replies(monkeypatch, [ODD], [' So.'])
    sample.main(sample.Config(policy=folder, max_new_tokens=9, device='cpu'))
    assert capsys.readouterr().out.split('model: ')[1] == 'a\ufffd[2Jb\ufffd31mc\nd\ufffde\ufffdf\n\n'
    assert heard[1] == f'### Human: Hi\n### Assistant:{ODD}\n### Human: Why?\n### Assistant:'

@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_a_line_end_of_windows_is_one(line_end):
    for size in range(1, 9):
        text = f'a{line_end}b{line_end}### Human: x'
        pieces = list(sample.until_next_turn(text[i:i + size] for i in range(0, len(text), size)))
        assert ''.join(pieces) == f'a{line_end}b' and not any(piece.endswith('\r') for piece in pieces)

@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('which', ['policy', 'reward_model'])
def test_a_broken_model_says_nothing(folder, tmp_path, capsys, temperature, which):
    """Its weights are finite, what they compute is not."""
    model = GPT.from_pretrained(folder if which == 'policy' else folder + '/reward')
    with torch.no_grad():
        model.h[0].ln_1.weight.fill_(1e30)
    model.save_pretrained(tmp_path)
    tok.save(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        sample.main(sample.Config(**dict(policy=folder, prompt='Hi', temperature=temperature, device='cpu')
                                  | {which: str(tmp_path)}))
    what = 'probabilities' if which == 'policy' else 'scores'
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        f'error: --{which}={tmp_path}: its {what} are not finite; wanted sound weights, or --dtype=float32\n')

@pytest.fixture(scope='module')
def others(folder, tmp_path_factory):
    """Two more policies, with other weights; the second has a longer context too."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ('loud', 'long')]
    for seed, to, block_size in zip((1, 2), folders, (120, 200)):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(block_size=block_size, vocab_size=257, n_layer=1, n_head=1, n_embd=16))
        torch.nn.init.normal_(model.wte.weight, std=0.5)
        model.save_pretrained(to)
        tok.save(to)
    return folders

@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_each_of_several_policies_says_what_it_says_alone(folder, others, capsys, temperature):
    same = dict(prompt='Hi', max_new_tokens=9, temperature=temperature, device='cpu', seed=3)
    folders, said = [folder, *others], {}
    for one in folders:
        sample.main(sample.Config(policy=one, **same))
        said[one] = capsys.readouterr().out
    sample.main(sample.Config(policy=','.join(folders), **same))
    width = max(map(len, folders)) + 2
    indent = ' ' * width
    assert capsys.readouterr().out == ''.join(
        one.ljust(width) + said[one][:-1].replace('\n', '\n' + indent) + '\n' for one in folders)
    assert temperature == 0 or len({*said.values()}) == 3 # the likeliest token repeats the prompt's last

def test_each_hears_its_own_answers_alone(folder, others, capsys, monkeypatch):
    type_in(monkeypatch, 'Hi', 'Why?', '/reset', 'Who?')
    heard = replies(monkeypatch, [' Yo.\nYes.'], [' No.'], [' So.'], [' Ah.'], [' I.'], [' You.'])
    sample.main(sample.Config(policy=f'{folder},{others[0]}', max_new_tokens=20, device='cpu'))
    assert heard[2:] == [
        '### Human: Hi\n### Assistant: Yo.\nYes.\n### Human: Why?\n### Assistant:',
        '### Human: Hi\n### Assistant: No.\n### Human: Why?\n### Assistant:',
        '### Human: Who?\n### Assistant:', '### Human: Who?\n### Assistant:']
    width = max(len(folder), len(others[0])) + 2
    assert capsys.readouterr().out == (
        f'{folder}: context of 120 tokens; {others[0]}: context of 120 tokens; '
        '/help says what you can type\n'
        + ''.join(one.ljust(width) + text + '\n' for one, text in (
            (folder, 'Yo.\n' + ' ' * width + 'Yes.'), (others[0], 'No.'), (folder, 'So.'), (others[0], 'Ah.'),
            (folder, 'I.'), (others[0], 'You.'))) + '\n')

def test_what_is_forgotten_is_said_once_a_turn(folder, others, capsys, monkeypatch):
    """Both forget the first turn: it comes before the first answer, not before each."""
    type_in(monkeypatch, 'x' * 40, 'y' * 40)
    replies(monkeypatch, [' a.'], [' b.'], [' c.'], [' d.'])
    sample.main(sample.Config(policy=f'{folder},{others[0]}', max_new_tokens=20, device='cpu'))
    first, second = capsys.readouterr().out.split('(the conversation has grown too long: what was said first is '
                                                  'forgotten)\n')
    assert ' b.'.strip() in first and second.split() == [folder, 'c.', others[0], 'd.']

def test_help_and_quit_are_no_prompts(folder, capsys, monkeypatch):
    type_in(monkeypatch, '/help', '/quit', 'Hi')
    heard = replies(monkeypatch)
    sample.main(sample.Config(policy=folder, max_new_tokens=20, device='cpu'))
    said = capsys.readouterr().out.split('\n')
    assert heard == [] and said[0].endswith('/help says what you can type')
    assert all(word in said[1] for word in ('/reset', '/quit', 'Ctrl-D', 'Ctrl-C')) and said[2:] == ['']

def test_policies_of_other_tokenizers_and_contexts(folder, others, capsys, monkeypatch):
    """Each reads the prompt by its own tokenizer, and has its own room: 60 tokens after 120, 100 after 200."""
    upper = load_tokenizer('bytes')
    upper.encode = lambda text: tok.encode(text.upper())
    monkeypatch.setattr(sample, 'load_tokenizer', lambda name, option: upper if name == others[1] else tok)
    heard = replies(monkeypatch, [' a.'], [' b.'])
    same = dict(max_new_tokens=500, device='cpu')
    sample.main(sample.Config(policy=f'{folder},{others[1]}', prompt='Hi', **same))
    assert heard == ['### Human: Hi\n### Assistant:', '### HUMAN: HI\n### ASSISTANT:']
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sample.main(sample.Config(policy=f'{others[1]},{folder}', prompt='x' * 50, **same))
    assert heard[2:] == [] and capsys.readouterr() == ('', (
        'error: --prompt: 76 tokens with their template; wanted at most 60, the context of 120 less an answer of 60 '
        f'({folder})\n'))

def test_a_folder_with_a_comma_in_its_name_is_one(folder, tmp_path, capsys):
    odd = str(tmp_path / 'a,b')
    GPT.from_pretrained(folder).save_pretrained(odd)
    tok.save(odd)
    outs = []
    for one in (folder, odd):
        sample.main(sample.Config(policy=one, prompt='Hi', device='cpu'))
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]

@pytest.mark.parametrize('policy', ['', 'a,', 'a,,b', 'a,b,a'])
def test_policies_are_named_once_each(policy, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(sample.Config, [f'--policy={policy}'])
    assert stopped.value.code == 2 and capsys.readouterr().err == (
        f"error: --policy={policy}: policy must be a checkpoint folder or a model on the hub, or several with commas "
        f"between, each once, got {policy!r}\n")

@pytest.mark.parametrize('wrong', ['out/nowhere', 'nowhere', 'outt/ppo', 'FOLDER/nowhere'])
def test_a_mistyped_folder_is_named_by_its_option(folder, capsys, wrong, monkeypatch):
    """Also one that could be a name of the hub."""
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9') # nobody listens there
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    wrong = wrong.replace('FOLDER', folder)
    with pytest.raises(SystemExit) as stopped:
        sample.main(sample.Config(policy=f'{folder},{wrong}', prompt='Hi', device='cpu'))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == '' and err.count('\n') == 1
    assert err.startswith(f'error: --policy={wrong}: ')

def test_end_of_input_ends(folder, capsys, monkeypatch):
    type_in(monkeypatch)
    sample.main(sample.Config(policy=folder, device='cpu'))

@pytest.mark.parametrize('more, words', [
    (dict(prompt='x' * 50), 'wanted at most 60, the context of 120 less an answer of 60'),
    (dict(policy='FOLDER/reward'), 'is a reward model'),
    (dict(reward_model='FOLDER'), 'is a language model'),
    (dict(policy='FOLDER/nowhere'), 'nowhere'),
    (dict(reward_model='FOLDER/short'), "its context is 60 tokens, the policy's 120; wanted one at least as long"),
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
        parse_config(sample.Config, [flag])
    assert stopped.value.code == 2
