"""common/tokens.py against ids and masks by hand. The bytes tokenizer makes every id checkable by eye."""
import json
import os
from pathlib import Path

import pytest
import regex # comes with tiktoken

from common import tokens
from common.tokens import EOS, GPT2_SPLIT, Tokenizer, dialogue, load_tokenizer, prompt_ids, response_ids, save_bpe
from data.bpe import train_bpe
from tiny import PROMPT_HI, RESPONSE_YO, TOK, assistant, exits, one_line, user

CACHE = Path(__file__).resolve().parents[3] / "shared" / "tiktoken_cache"

# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def test_bytes_tokenizer():
    assert (TOK.name, TOK.n_vocab, TOK.eos) == ("bytes", 257, 256)
    assert TOK.encode("é!") == [0xC3, 0xA9, 0x21]
    assert TOK.decode([72, 256, 105]) == "Hi" # the end of text is left out, wherever it stands

def test_end_of_text_typed_by_a_user_is_text():
    ids = prompt_ids(TOK, "<|endoftext|>")
    assert 256 not in ids and TOK.decode(ids) == "### Human: <|endoftext|>\n### Assistant:"
    ids = response_ids(TOK, "<|endoftext|>")
    assert ids.count(256) == 1 and ids[-1] == 256 and len(ids) == 1 + 13 + 1

def test_streamed_character_split_over_tokens():
    assert TOK.decode_bytes([0xC3]) == b"\xc3" and TOK.decode_bytes([0xC3, 0xA9, 256]) == "é".encode()
    assert TOK.decode([0xC3]) == "\ufffd" # never an exception

def test_tiktoken_file_round_trip(tmp_path, monkeypatch):
    ranks = train_bpe(["aab aab aab ab"], 1000, 2)
    save_bpe(ranks, tmp_path / "toy.tiktoken")
    lines = (tmp_path / "toy.tiktoken").read_text().splitlines()
    assert lines[97] == "YQ== 97" and lines[256] == "YWI= 256" # base64 of "a" and "ab"
    tok = load_tokenizer(str(tmp_path / "toy.tiktoken"))
    assert (tok.name, tok.ranks, tok.n_vocab) == ("tiktoken", ranks, len(ranks) + 1)
    import tiktoken.load # tiktoken's own reader agrees
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "") # it would leave a copy of the file there
    assert tiktoken.load.load_tiktoken_bpe(str(tmp_path / "toy.tiktoken")) == ranks

def test_tokenizer_in_a_checkpoint_folder(tmp_path):
    tok = Tokenizer("tiktoken", train_bpe(["aab aab aab ab"], 1000, 2))
    tok.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).ranks == tok.ranks
    TOK.save(str(tmp_path)) # the last one saved counts
    assert load_tokenizer(str(tmp_path)).name == "bytes"

@pytest.mark.parametrize("content, where", [
    ("YQ== 0\nnonsense\n", ":2: wanted a token"),
    ("YQ== 0\nYg= 1\n", ":2: wanted a token"),
    ("YQ== 0\nYg== one\n", ":2: wanted a token"),
    ("YQ== 0\nYQ== 1\n", ":2: wanted a new token of rank 1"),
    ("YQ== 0\nYg== 2\n", ":2: wanted a new token of rank 1"),
    ("YQ== 0\n", ": wanted all 256 single bytes"),
    ("", ": wanted all 256 single bytes"),
])
def test_corrupt_tiktoken_file(tmp_path, capsys, content, where):
    path = tmp_path / "bad.tiktoken"
    path.write_text(content)
    exits(capsys, f"{path}{where}", load_tokenizer, str(path))

def test_unknown_tokenizers(tmp_path, capsys):
    exits(capsys, "wanted gpt2, bytes, a .tiktoken file", load_tokenizer, "gpt5")
    exits(capsys, "'out/nowhere', which is neither a folder here nor a model on the hub", load_tokenizer, "out/nowhere")
    exits(capsys, f"{tmp_path / 'no.tiktoken'}: no such file", load_tokenizer, str(tmp_path / "no.tiktoken"))
    exits(capsys, f"{tmp_path}: wanted a checkpoint", load_tokenizer, str(tmp_path))
    (tmp_path / "tokenizer_name").write_text("llama")
    exits(capsys, "tokenizer_name: wanted gpt2 or bytes, got 'llama'", load_tokenizer, str(tmp_path))

def test_a_missing_checkpoint_is_not_a_tokenizers_fault(tmp_path, capsys):
    line = one_line(capsys, lambda: load_tokenizer("out/nowhere", "policy"))
    assert line.startswith("--policy=out/nowhere: no such folder; wanted a checkpoint, which an earlier stage such as "
                           "sft.py makes, or a model on the hub (gpt2, ")
    for name in ("bytes", str(tmp_path / "own.tiktoken")): # tokenizers, but no models
        exits(capsys, f"--init_from={name}: no such folder", load_tokenizer, name, "init_from")
    line = one_line(capsys, lambda: load_tokenizer(tmp_path, "reward_model")) # a run that never saved
    assert line.startswith(f"--reward_model={tmp_path}: holds no config.json; wanted a checkpoint, which an earlier")

@pytest.mark.parametrize("size, fits", [(256, False), (257, True), (300, True), (1, False)])
def test_a_tokenizer_has_to_fit_its_model(tmp_path, capsys, size, fits):
    TOK.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    if fits:
        assert load_tokenizer(tmp_path).name == "bytes"
    else:
        exits(capsys, f"{tmp_path / 'config.json'}: vocab_size is {size}, the tokenizer beside it has 257 tokens",
              load_tokenizer, tmp_path)

@pytest.fixture
def gpt2(monkeypatch):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not CACHE.is_dir():
            pytest.skip("needs TIKTOKEN_CACHE_DIR, a folder with tiktoken's two GPT-2 files")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return load_tokenizer("gpt2")

def test_gpt2(gpt2, tmp_path):
    assert (gpt2.name, gpt2.n_vocab, gpt2.eos) == ("gpt2", 50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995] # the numbers of the GPT-2 release
    ids = prompt_ids(gpt2, "<|endoftext|>")
    assert 50256 not in ids and response_ids(gpt2, "Hello")[-1] == 50256
    assert response_ids(gpt2, "world") == [995, 50256]
    gpt2.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).name == "gpt2"
    (tmp_path / "tokenizer_name").unlink() # a folder of the hub has neither file of ours
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}')
    assert load_tokenizer(str(tmp_path)).name == "gpt2"

@pytest.mark.parametrize("size, files, known", [
    (50257, {}, True),
    (50304, {}, True), # padded to a multiple of 64
    (50305, {}, False),
    (21128, {}, False), # a Chinese GPT-2 of the hub: words of BERT
    (50260, {"vocab.json": {"\u0120SolidGoldMagikarp": 43453, EOS: 50256}}, True), # and three added tokens
    (60000, {"tokenizer.json": {"model": {"vocab": {"\u0120SolidGoldMagikarp": 43453, EOS: 50256}}}}, True),
    (50257, {"vocab.json": {"\u0120the": 262, EOS: 50256}}, False), # as large as GPT-2's, in another language
    (50257, {"vocab.json": {"\u0120SolidGoldMagikarp": 43453, EOS: 0}}, False),
    (50257, {"tokenizer.json": {"model": {"vocab": [["a", -1.5]]}}}, False),
    (50257, {"tokenizer.json": []}, False),
    ("50257", {}, False),
    (None, {}, False),
])
def test_other_peoples_vocabularies(gpt2, tmp_path, capsys, size, files, known):
    for name, content in [*files.items(), ("config.json", {"vocab_size": size})]:
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    if known:
        assert load_tokenizer(str(tmp_path)).name == "gpt2"
    else:
        exits(capsys, f"{tmp_path}: wanted a checkpoint with tokenizer.tiktoken", load_tokenizer, str(tmp_path))

def test_the_hubs_gpt2s_speak_gpt2_without_being_asked(gpt2, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path) # where no folder has that name
    monkeypatch.setattr(tokens, "checkpoint_file", None)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        assert load_tokenizer(name).name == "gpt2"

def test_a_checkpoint_in_a_folder_named_gpt2(gpt2, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.makedirs("gpt2")
    gpt2.save("gpt2")
    assert load_tokenizer("gpt2").name == "gpt2" # and does not look into itself for ever
    TOK.save("gpt2")
    assert load_tokenizer("gpt2").name == "bytes"

def test_ids_above_the_end_of_text_say_nothing(gpt2):
    assert TOK.decode([72, 105, 256, 257, 300]) == "Hi" # a model may have more tokens than its tokenizer
    assert gpt2.decode([15496, 50256, 50257, 50303, 995]) == "Hello world"

def test_our_split_is_gpt2s(gpt2):
    text = "It's  we'll\n\n 12 cafés, naïve?!  \t end"
    assert len(gpt2.encode(text)) > 0
    words = regex.findall(GPT2_SPLIT, text)
    assert words == ["It", "'s", " ", " we", "'ll", "\n\n", " 12", " cafés", ",", " naïve", "?!", "  \t", " end"]
    assert [i for word in words for i in gpt2.encode(word)] == gpt2.encode(text)

def test_gpt2_without_network_or_cache(monkeypatch, capsys):
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tokens.tiktoken, "get_encoding", offline)
    exits(capsys, "set TIKTOKEN_CACHE_DIR", load_tokenizer, "gpt2")

# ---------------------------------------------------------------------------------------------------------------------
# template and masks

def test_prompt_and_response_ids():
    assert prompt_ids(TOK, "Hi") == PROMPT_HI
    assert prompt_ids(TOK, [user("Hi")]) == PROMPT_HI
    assert response_ids(TOK, "Yo") == RESPONSE_YO

def test_dialogue_one_turn():
    ids, mask = dialogue(TOK, {"prompt": "Hi", "response": "Yo"})
    assert ids == PROMPT_HI + RESPONSE_YO
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1] # " ", "Y", "o" and the end of text
    assert dialogue(TOK, {"messages": [user("Hi"), assistant("Yo")]}) == (ids, mask)

def test_dialogue_multi_turn():
    messages = [user("a"), assistant("b"), user("c"), assistant("de")]
    ids, mask = dialogue(TOK, {"messages": messages})
    # "### Human: a" 12, "\n### Assistant:" 15 | " b" + end 3 | "\n### Human: c" 13, 15 | " de" + end 4
    assert mask == [0] * 27 + [1] * 3 + [0] * 28 + [1] * 4
    assert [i for i, m in zip(ids, mask) if m] == [32, 98, 256, 32, 100, 101, 256]
    assert TOK.decode(ids) == "### Human: a\n### Assistant: b\n### Human: c\n### Assistant: de"
    # the same conversation as a prompt of messages: only the last answer is learnt, and the ids are the same
    ids2, mask2 = dialogue(TOK, {"prompt": messages[:3], "response": "de"})
    assert ids2 == ids and mask2 == [0] * 58 + [1] * 4

def test_dialogue_that_was_cut_off():
    """Of `messages` the last answer alone has no end; the ids are those of the prompt and the response."""
    messages = [user("a"), assistant("b"), user("c"), assistant("de")]
    ids, mask = dialogue(TOK, {"messages": messages, "ended": False})
    assert [i for i, m in zip(ids, mask) if m] == [32, 98, 256, 32, 100, 101]
    assert ids == dialogue(TOK, {"prompt": messages[:3], "response": "de", "ended": False})[0]
    whole = dialogue(TOK, {"messages": messages, "ended": True})
    assert whole == (ids + [256], mask + [1]) == dialogue(TOK, {"messages": messages})

def test_dialogue_with_system_or_assistant_first():
    ids, mask = dialogue(TOK, {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]})
    assert TOK.decode(ids) == "### System: s\n### Human: a\n### Assistant: b" and mask == [0] * 41 + [1] * 3
    ids, mask = dialogue(TOK, {"messages": [assistant("x"), user("a"), assistant("b")]})
    assert TOK.decode(ids) == "### Assistant: x\n### Human: a\n### Assistant: b"
    assert mask == [0] * 14 + [1] * 3 + [0] * 28 + [1] * 3

def test_prompt_ids_are_a_prefix_of_the_whole():
    """Guards against the boundary token that merges when prompt and response are encoded together."""
    ranks = train_bpe(["### Human: x\n### Assistant: x"] * 9, 1000, 2) # would love to merge ": x"
    ranks[b": x"] = len(ranks)
    tok = Tokenizer("tiktoken", ranks)
    for turn in ("x", " x", "x\n", "###", "é"):
        prompt = prompt_ids(tok, turn)
        ids, _ = dialogue(tok, {"prompt": turn, "response": turn})
        assert ids[:len(prompt)] == prompt
        longer = [user(turn), assistant(turn), user(turn)]
        assert prompt_ids(tok, longer)[:len(ids)] == ids
