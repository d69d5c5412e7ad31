"""tokens.py against ids, masks and merges worked out by hand. The bytes tokenizer makes every id checkable by eye."""
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import tokens
from tokens import (EOS, Batches, Rows, Stream, by_length, collate, collate_answers, dialogue, encode_comparisons,
                    encode_demonstrations, encode_prompts, encode_rankings, encode_text, is_text_file, load_tokenizer,
                    load_training_set, merge, pad, prompt_ids, read_preferences, read_ranked, read_records,
                    response_ids, save_bpe, train_bpe, truncate, write_records)

CACHE = Path(__file__).resolve().parents[2] / "shared" / "tiktoken_cache"
BYTES = load_tokenizer("bytes")
# "### Human: Hi\n### Assistant:" and " Yo" with its end of text, byte by byte
PROMPT_HI = [35, 35, 35, 32, 72, 117, 109, 97, 110, 58, 32, 72, 105, 10,
             35, 35, 35, 32, 65, 115, 115, 105, 115, 116, 97, 110, 116, 58]
RESPONSE_YO = [32, 89, 111, 256]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers

def test_bytes_tokenizer():
    assert (BYTES.name, BYTES.n_vocab, BYTES.eos) == ("bytes", 257, 256)
    assert BYTES.encode("é!") == [0xC3, 0xA9, 0x21]
    assert BYTES.decode([72, 256, 105]) == "Hi" # the end of text is left out, wherever it stands


def test_end_of_text_typed_by_a_user_is_text():
    ids = prompt_ids(BYTES, "<|endoftext|>")
    assert 256 not in ids and BYTES.decode(ids) == "### Human: <|endoftext|>\n### Assistant:"
    ids = response_ids(BYTES, "<|endoftext|>")
    assert ids.count(256) == 1 and ids[-1] == 256 and len(ids) == 1 + 13 + 1


def test_streamed_character_split_over_tokens():
    assert BYTES.decode_bytes([0xC3]) == b"\xc3" and BYTES.decode_bytes([0xC3, 0xA9, 256]) == "é".encode()
    assert BYTES.decode([0xC3]) == "\ufffd" # never an exception


def test_bpe_merges_by_hand():
    # words: "aab" once, " aab" twice, " ab" once. Pairs: ab 4, aa 3, " a" 3          -> 256 = ab
    # then a+ab 3, " "+a 2, " "+ab 1                                                  -> 257 = aab
    # then " "+aab 2, " "+ab 1                                                        -> 258 = " aab"; " ab" is too rare
    ranks = train_bpe(["aab aab aab", " ab"], vocab_size=1000, min_count=2)
    assert len(ranks) == 259 and [ranks[b"ab"], ranks[b"aab"], ranks[b" aab"]] == [256, 257, 258]
    tok = tokens.Tokenizer("tiktoken", ranks)
    assert (tok.n_vocab, tok.eos) == (260, 259)
    assert tok.encode("aab ab aab") == [257, 32, 256, 258]


def test_bpe_ties_and_vocab_size():
    texts = ["ba", "ab", "ba", "ab"] # both pairs twice: the one whose bytes sort first goes first
    ranks = train_bpe(texts, vocab_size=1000, min_count=2)
    assert len(ranks) == 258 and (ranks[b"ab"], ranks[b"ba"]) == (256, 257)
    assert train_bpe(texts[::-1], 1000, 2) == ranks
    assert len(train_bpe(texts, vocab_size=258, min_count=2)) == 257 # 256 bytes, one merge, the end of text
    assert len(train_bpe(texts, vocab_size=1000, min_count=3)) == 256


def test_bpe_counts_follow_the_merges():
    # after every merge the pair counts must be those of a fresh count; here a word holds its best pair three times
    # "abababc" x1, "bc" x2: ab 3, bc 1+2 = 3, ba 2 -> ab first; then ab+ab 2, b+c 2, ab+c 1 -> "abab" sorts first;
    # then bc 2 (abab+ab is left once)
    ranks = train_bpe(["abababc", "bc", "bc"], vocab_size=1000, min_count=2)
    assert [token for token, rank in ranks.items() if rank >= 256] == [b"ab", b"abab", b"bc"]


def test_bpe_encodes_as_trained():
    """tiktoken's encoder is the oracle for `merge`, the rule of training, on words full of overlapping pairs."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aabc"), size=rng.integers(1, 12))) for _ in range(300)]
    ranks = train_bpe(texts, vocab_size=320, min_count=2)
    tok = tokens.Tokenizer("tiktoken", ranks)
    for text in texts:
        parts = [bytes([b]) for b in text.encode()]
        merge(parts, ranks)
        assert [ranks[p] for p in parts] == tok.encode(text)
        assert tok.decode(tok.encode(text)) == text


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
    tok = tokens.Tokenizer("tiktoken", train_bpe(["aab aab aab ab"], 1000, 2))
    tok.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).ranks == tok.ranks
    BYTES.save(str(tmp_path)) # the last one saved counts
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
    BYTES.save("gpt2")
    assert load_tokenizer("gpt2").name == "bytes"


def test_ids_above_the_end_of_text_say_nothing(gpt2):
    assert BYTES.decode([72, 105, 256, 257, 300]) == "Hi" # a model may have more words than its tokenizer
    assert gpt2.decode([15496, 50256, 50257, 50303, 995]) == "Hello world"


def test_our_split_is_gpt2s(gpt2):
    text = "It's  we'll\n\n 12 cafés, naïve?!  \t end"
    assert len(gpt2.encode(text)) > 0
    words = tokens.regex.findall(tokens.GPT2_SPLIT, text)
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
    assert prompt_ids(BYTES, "Hi") == PROMPT_HI
    assert prompt_ids(BYTES, [user("Hi")]) == PROMPT_HI
    assert response_ids(BYTES, "Yo") == RESPONSE_YO


def test_dialogue_one_turn():
    ids, mask = dialogue(BYTES, {"prompt": "Hi", "response": "Yo"})
    assert ids == PROMPT_HI + RESPONSE_YO
    assert mask == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1] # " ", "Y", "o" and the end of text
    assert dialogue(BYTES, {"messages": [user("Hi"), assistant("Yo")]}) == (ids, mask)


def test_dialogue_multi_turn():
    messages = [user("a"), assistant("b"), user("c"), assistant("de")]
    ids, mask = dialogue(BYTES, {"messages": messages})
    # "### Human: a" 12, "\n### Assistant:" 15 | " b" + end 3 | "\n### Human: c" 13, 15 | " de" + end 4
    assert mask == [0] * 27 + [1] * 3 + [0] * 28 + [1] * 4
    assert [i for i, m in zip(ids, mask) if m] == [32, 98, 256, 32, 100, 101, 256]
    assert BYTES.decode(ids) == "### Human: a\n### Assistant: b\n### Human: c\n### Assistant: de"
    # the same conversation as a prompt of messages: only the last answer is learnt, and the ids are the same
    ids2, mask2 = dialogue(BYTES, {"prompt": messages[:3], "response": "de"})
    assert ids2 == ids and mask2 == [0] * 58 + [1] * 4


def test_dialogue_with_system_or_assistant_first():
    ids, mask = dialogue(BYTES, {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]})
    assert BYTES.decode(ids) == "### System: s\n### Human: a\n### Assistant: b" and mask == [0] * 41 + [1] * 3
    ids, mask = dialogue(BYTES, {"messages": [assistant("x"), user("a"), assistant("b")]})
    assert BYTES.decode(ids) == "### Assistant: x\n### Human: a\n### Assistant: b"
    assert mask == [0] * 14 + [1] * 3 + [0] * 28 + [1] * 3


def test_prompt_ids_are_a_prefix_of_the_whole():
    """Guards against the boundary token that merges when prompt and response are encoded together."""
    ranks = train_bpe(["### Human: x\n### Assistant: x"] * 9, 1000, 2) # would love to merge ": x"
    ranks[b": x"] = len(ranks)
    tok = tokens.Tokenizer("tiktoken", ranks)
    for turn in ("x", " x", "x\n", "###", "é"):
        prompt = prompt_ids(tok, turn)
        ids, _ = dialogue(tok, {"prompt": turn, "response": turn})
        assert ids[:len(prompt)] == prompt
        longer = [user(turn), assistant(turn), user(turn)]
        assert prompt_ids(tok, longer)[:len(ids)] == ids


# ---------------------------------------------------------------------------------------------------------------------
# truncation and encoded data sets

def test_truncate():
    assert truncate([1, 2, 3, 4, 5], n_response=3, block_size=5) == [4, 5] # the oldest text goes first
    assert truncate([1, 2], n_response=3, block_size=5) == [1, 2]
    assert truncate([1, 2], n_response=4, block_size=5) == [2]
    assert truncate([1, 2], n_response=5, block_size=5) is None
    assert truncate([1, 2], n_response=9, block_size=5) is None


def test_demonstrations_keep_the_response_and_count(capsys):
    records = [{"prompt": "Hi", "response": "Yo"}, {"prompt": "Hi", "response": "Yoyoyoy"},
               {"prompt": "Hi", "response": "Yoyoyoyo"}] # responses of 4, 9 and 10 tokens
    rows = encode_demonstrations(BYTES, records, block_size=10, name="train")
    assert capsys.readouterr().out == "train: 2 rows, 2 prompts cut, 1 left out (a response alone fills 10 tokens)\n"
    assert rows[0] == ([115, 116, 97, 110, 116, 58] + RESPONSE_YO, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]) # "stant:"
    assert rows[1] == ([58, 32, 89, 111, 121, 111, 121, 111, 121, 256], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    rows = encode_demonstrations(BYTES, records[:1], block_size=32, loss_on="all", name="val")
    assert capsys.readouterr().out == "val: 1 rows, 0 prompts cut, 0 left out\n"
    assert rows == [(PROMPT_HI + RESPONSE_YO, [1] * 32)]


def test_demonstrations_cut_takes_the_oldest_turn():
    record = {"messages": [user("a"), assistant("b"), user("c"), assistant("de")]} # 27 + 3 + 28 + 4 tokens
    (ids, mask), = encode_demonstrations(BYTES, [record], block_size=34)
    assert BYTES.decode(ids) == "b\n### Human: c\n### Assistant: de" # "b" and its end are left of the first answer
    assert mask == [1, 1] + [0] * 28 + [1] * 4


def test_nothing_left_ends_the_program(capsys):
    exits(capsys, "train: no row is left", encode_demonstrations, BYTES, [{"prompt": "Hi", "response": "Yo"}], 4,
          "response", "train")


def test_comparisons_share_the_cut(capsys):
    records = [{"prompt": "Hi", "chosen": "Yo", "rejected": "Yolo", "margin": 2},
               {"prompt": "Hi", "chosen": "Yo", "rejected": "Y" * 14}]
    rows = encode_comparisons(BYTES, records, block_size=16, name="train")
    assert capsys.readouterr().out == "train: 1 rows, 1 prompts cut, 1 left out (a response alone fills 16 tokens)\n"
    # the rejected answer has 6 tokens, so the last 10 of the prompt stay, "Assistant:", for both
    assert rows == [([65, 115, 115, 105, 115, 116, 97, 110, 116, 58], RESPONSE_YO, [32, 89, 111, 108, 111, 256], 2.0)]
    assert encode_comparisons(BYTES, records[1:], 64)[0][3] == 0.0


def test_rankings():
    record = {"prompt": "Hi", "responses": ["Yo", "Y", "Yolo"], "ranks": [0, 2, 1]}
    (prompt, responses, ranks), = encode_rankings(BYTES, [record], block_size=8)
    assert prompt == [116, 58] and ranks == [0, 2, 1]
    assert responses == [RESPONSE_YO, [32, 89, 256], [32, 89, 111, 108, 111, 256]]


def test_prompts(capsys):
    assert encode_prompts(BYTES, [{"prompt": "Hi"}], room=3, name="prompts") == [[110, 116, 58]]
    assert capsys.readouterr().out == "prompts: 1 rows, 1 prompts cut, 0 left out\n"
    assert encode_prompts(BYTES, [{"prompt": "Hi"}], room=28) == [PROMPT_HI]
    exits(capsys, "wanted block_size above max_new_tokens", encode_prompts, BYTES, [{"prompt": "Hi"}], 0)


def test_text_ends_each_document():
    ids = encode_text(BYTES, [{"text": "ab"}, {"text": "<|"}])
    assert ids.tolist() == [97, 98, 256, 60, 124, 256] and ids.dtype == np.int32


def test_pad_and_collate():
    assert pad([[1, 2, 3], [4]], fill=9).tolist() == [[1, 2, 3], [4, 9, 9]]
    idx, mask = collate([([5, 6, 256], [0, 1, 1]), ([7, 256], [0, 1])])
    assert idx.tolist() == [[5, 6, 256], [7, 256, 0]] and idx.dtype == torch.long
    assert mask.tolist() == [[1, 1], [1, 0]] and mask.dtype == torch.float32 # position t speaks of token t+1


# ---------------------------------------------------------------------------------------------------------------------
# batches

def test_batches_are_a_pure_function_of_seed_and_step():
    lengths = [i * 7 % 31 for i in range(103)]
    a, b = Batches(lengths, 8, seed=1), Batches(lengths, 8, seed=1)
    steps = [a.at(step) for step in range(40)]
    assert [b.at(step) for step in reversed(range(40))] == steps[::-1]
    assert steps != [Batches(lengths, 8, seed=2).at(step) for step in range(40)]


@pytest.mark.parametrize("n, batch_size, epoch_steps, twice", [(104, 8, 13, 0), (103, 8, 13, 1), (1000, 3, 334, 2)])
def test_batches_drop_no_row(n, batch_size, epoch_steps, twice):
    batches = Batches(list(range(n)), batch_size, seed=0)
    assert batches.epoch_steps == epoch_steps
    for epoch in range(3):
        drawn = [batches.at(epoch * epoch_steps + i) for i in range(epoch_steps)]
        assert all(len(rows) == batch_size for rows in drawn)
        seen = Counter(row for rows in drawn for row in rows)
        assert sorted(seen) == list(range(n)) and sum(count == 2 for count in seen.values()) == twice
    assert batches.at(0) != batches.at(epoch_steps) # epochs differ


def test_batches_larger_than_the_data():
    assert Counter(Batches([3, 1], 5, seed=0).at(4)) in (Counter({0: 3, 1: 2}), Counter({0: 2, 1: 3}))


def test_batches_hold_like_lengths_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 101, size=1000)
    batches = Batches(lengths, 10, seed=0)
    drawn = [lengths[batches.at(step)] for step in range(100)]
    # 50 batches share the range of 100 lengths: about 2 apart within each; ten rows at random would be 82 apart
    assert np.mean([np.ptp(x) for x in drawn]) < 4
    means = [x.mean() for x in drawn]
    assert abs(np.corrcoef(means, range(100))[0, 1]) < 0.4 # no curriculum from short to long


# ---------------------------------------------------------------------------------------------------------------------
# records

def exits(capsys, message, function, *args):
    """The call ends the program: exit code 2 and one line that contains `message`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1, err


GOOD = {
    "text": {"text": "a"},
    "demonstrations": {"prompt": "a", "response": "b"},
    "comparisons": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
    "rankings": {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "scores": [1.5, 1]},
    "prompts": {"prompt": [user("a"), assistant("b"), user("c")], "category": "extra keys stay"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_records_round_trip(tmp_path, kind):
    rows = [GOOD[kind], GOOD[kind] | {"note": "naïve 🙂"}]
    write_records(tmp_path / "rows.jsonl", rows)
    assert read_records(tmp_path / "rows.jsonl", kind) == rows
    assert "🙂" in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write((tmp_path / "rows.jsonl").read_bytes() + b"\n") # an empty line at the end is no row
    assert read_records(str(tmp_path / "rows.jsonl.gz"), kind) == rows


def test_messages_may_start_with_any_role(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]},
            {"messages": [assistant("b")]}]
    write_records(tmp_path / "rows.jsonl", rows)
    assert read_records(tmp_path / "rows.jsonl", "demonstrations") == rows


def bad(kind, **changes):
    return kind, json.dumps({k: v for k, v in (GOOD[kind] | changes).items() if v is not ...}).encode()


@pytest.mark.parametrize("kind, line, wish", [
    bad("text", text=...) + ("a row of kind text to have `text`",),
    bad("text", text=" \n") + ("`text` to be text",),
    bad("text", text=3) + ("`text` to be text",),
    bad("demonstrations", response=...) + ("to have `response`",),
    bad("demonstrations", response="  ") + ("`response` to be text that is not empty",),
    bad("demonstrations", prompt="") + ("`prompt` to be text",),
    bad("demonstrations", prompt=["a"]) + ("every message of `prompt`",),
    bad("demonstrations", messages=[]) + ("`messages` to be a list",),
    bad("demonstrations", messages=[user("a")]) + ("`messages` to end in the turn of the assistant",),
    bad("demonstrations", messages=[{"role": "gpt", "content": "a"}]) + ("`role` (user, assistant or system)",),
    bad("demonstrations", messages=[user(None), assistant("b")]) + ("every `content`",),
    bad("comparisons", chosen=...) + ("to have `chosen`",),
    bad("comparisons", rejected="") + ("`rejected` to be text",),
    bad("comparisons", prompt=[user("a"), assistant("b")]) + ("`prompt` to end in the turn of the user",),
    bad("comparisons", margin="1") + ("`margin` to be a number",),
    bad("comparisons", margin=True) + ("`margin` to be a number",),
    bad("rankings", responses="b") + ("`responses` to be a list",),
    bad("rankings", responses=["b", ""]) + ("`responses` to be a list of two texts or more",),
    bad("rankings", ranks=[0]) + ("`ranks` to be 2 integers",),
    bad("rankings", ranks=[0, 1.0]) + ("`ranks` to be 2 integers",),
    bad("rankings", ranks=[True, 0]) + ("`ranks` to be 2 integers",),
    bad("rankings", scores=[1]) + ("`scores` to be 2 numbers",),
    bad("prompts", prompt=...) + ("to have `prompt`",),
    bad("prompts", prompt=None) + ("`prompt` to be text",),
    bad("prompts", prompt=[]) + ("`prompt` to be a list of messages",),
    ("prompts", b'{"prompt": "a"', "wanted one JSON object a line"),
    ("prompts", b'["a"]', "wanted a JSON object, got list"),
    ("prompts", b'{"prompt": "\xff"}', "wanted UTF-8 text"),
    ("prompts", b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    ("prompts", b'{"prompt": "Hi", "more": 1e999}', "wanted finite numbers"),
    ("prompts", b"[" * 100_000, "nested too deeply"),
    ("comparisons", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "a finite number, got NaN"),
    ("comparisons", b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}', "wanted finite numbers"),
])
def test_bad_row_is_named_by_file_and_line(tmp_path, capsys, kind, line, wish):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD[kind]).encode() + b"\n\n" + line + b"\n") # the empty line counts as a line
    exits(capsys, f"{path}:3: wanted", read_records, path, kind)
    exits(capsys, wish, read_records, path, kind)


def test_files_that_cannot_be_read(tmp_path, capsys):
    exits(capsys, f"{tmp_path / 'no.jsonl'}: no such file", read_records, tmp_path / "no.jsonl", "prompts")
    exits(capsys, "cannot be read", read_records, tmp_path, "prompts")
    (tmp_path / "empty.jsonl").write_text("\n")
    exits(capsys, "a file without rows", read_records, tmp_path / "empty.jsonl", "prompts")
    (tmp_path / "plain.jsonl.gz").write_text('{"prompt": "a"}')
    exits(capsys, "plain.jsonl.gz:1: cannot be read", read_records, tmp_path / "plain.jsonl.gz", "prompts")
    whole = gzip.compress(json.dumps(GOOD["prompts"]).encode() * 99)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    exits(capsys, "half.jsonl.gz:1: cannot be read", read_records, tmp_path / "half.jsonl.gz", "prompts")


def test_plain_text_is_one_record(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_records(tmp_path / "a.txt", "text") == [{"text": "one\n\ntwo\n"}]
    exits(capsys, "wanted a .jsonl file of prompts", read_records, tmp_path / "a.txt", "prompts")
    (tmp_path / "b.txt").write_bytes(b"one\n\xff\n")
    exits(capsys, "b.txt:2: wanted UTF-8 text", read_records, tmp_path / "b.txt", "text")
    (tmp_path / "c.txt").write_text("")
    exits(capsys, "c.txt: wanted text, got an empty file", read_records, tmp_path / "c.txt", "text")


# ---------------------------------------------------------------------------------------------------------------------
# prompts that are followed by several answers

def test_collate_answers_by_hand():
    # prompt 1 2 3 with answers 4 5 | 6, the second is better; prompt 7 with 8 | 9 10 | 8, the first and third tie
    a = collate_answers([([1, 2, 3], [[4, 5], [6]], [1, 0]), ([7], [[8], [9, 10], [8]], [0, 1, 0])])
    assert a.idx.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 8, 0]]
    assert a.positions.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 1, 0]] # each answer starts where its prompt ends
    assert a.parts.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 3, 0]]
    # flattened places: the second row starts at 6. An answer's first token is predicted by the prompt's last
    assert a.sources.tolist() == [2, 3, 2, 6, 6, 8, 6]
    assert a.targets.tolist() == [4, 5, 6, 8, 9, 10, 8]
    assert a.owners.tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert a.last.tolist() == [4, 5, 7, 9, 10]
    assert a.sizes.tolist() == [2, 1, 1, 2, 1]
    assert a.pairs.tolist() == [[1, 0], [2, 3], [4, 3]] # better, worse
    assert all(x.dtype == torch.long for x in vars(a).values())
    assert [x.tolist() for x in vars(a.to('cpu')).values()] == [x.tolist() for x in vars(a).values()]


def test_collate_answers_without_pairs():
    assert collate_answers([([1], [[2], [3]], [0, 0])]).pairs.shape == (0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# training sets

@pytest.mark.parametrize("n, batch_size", [(7, 3), (3, 3), (2, 5)])
def test_rows_in_order_hold_every_row_once(n, batch_size):
    rows = [([i] * (1 + i * 5 % 7), [1] * (1 + i * 5 % 7)) for i in range(n)]
    data = Rows(rows, batch_size, seed=1)
    batches = data.in_order(0)
    assert sorted(ids[0] for batch in batches for ids, _ in batch) == list(range(n))
    assert all(len(batch) <= batch_size for batch in batches)
    lengths = [len(ids) for batch in batches for ids, _ in batch]
    assert lengths == sorted(lengths)
    assert sorted(ids[0] for batch in data.in_order(1) for ids, _ in batch) == list(range(min(n, batch_size)))
    assert sorted({ids[0] for step in range(data.epoch_steps) for ids, _ in data.at(step)}) == list(range(n))


@pytest.mark.parametrize("n, T", [(11, 5), (12, 5), (10, 3), (4, 99)])
def test_stream_in_order_predicts_every_token_once(n, T):
    data = Stream(np.arange(100, 100 + n), T, batch_size=2, seed=1)
    batches = data.in_order(0)
    targets = [int(i) for batch in batches for ids, mask in batch for i, m in zip(ids[1:], mask[1:]) if m]
    assert targets == list(range(101, 100 + n)) # the first has nothing before it
    assert all(len(ids) <= T + 1 and len(batch) <= 2 for batch in batches for ids, _ in batch)
    assert len(data.in_order(1)) == 1 and data.in_order(1)[0][0][0].tolist() == batches[0][0][0].tolist()


def test_stream_windows_are_a_pure_function_of_seed_and_step():
    a, b, c = (Stream(np.arange(50), 8, 4, seed) for seed in (1, 1, 2))
    windows = lambda s, step: [ids.tolist() for ids, _ in s.at(step)]
    assert windows(a, 5) == windows(b, 5) != windows(c, 5) and windows(a, 5) != windows(a, 6)
    starts = set()
    for step in range(100):
        for ids, mask in a.at(step):
            assert len(ids) == len(mask) == 9 and ids.tolist() == list(range(ids[0], ids[0] + 9)) and set(mask) == {1}
            starts.add(int(ids[0]))
    assert starts == set(range(42)) # the last window ends with the last token
    assert a.epoch_steps == 2 # 49 predictions, 4 windows of 8 a step


def test_training_set_of_text_packed_and_not(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    write_records(path, [{"text": "abc"}, {"text": "d"}, {"text": "efghij"}])
    data, none = load_training_set(str(path), BYTES, 4, 2, seed=1)
    assert none is None and isinstance(data, Stream) and data.T == 4
    assert data.stream.tolist() == [97, 98, 99, 256, 100, 256, 101, 102, 103, 104, 105, 106, 256]
    assert "train: 13 tokens of text" in capsys.readouterr().out
    data, none = load_training_set(str(path), BYTES, 4, 2, seed=1, packed=False, name="val")
    assert none is None and isinstance(data, Rows)
    assert data.rows == [([97, 98, 99, 256], [1] * 4), ([100, 256], [1] * 2), ([101, 102, 103, 104], [1] * 4)]
    assert "val: 3 texts" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [True, False])
def test_training_set_holds_out_its_last_part(tmp_path, packed):
    path = tmp_path / "text.jsonl"
    write_records(path, [{"text": c} for c in "abcdefgh"])
    train, val = load_training_set(str(path), BYTES, 8, 2, seed=1, packed=packed, val_fraction=0.25)
    parts = [s.stream.tolist() if packed else [i for ids, _ in s.rows for i in ids] for s in (train, val)]
    assert parts == [[97, 256, 98, 256, 99, 256, 100, 256, 101, 256, 102, 256], [103, 256, 104, 256]]


def test_training_set_of_demonstrations(tmp_path, capsys):
    path = tmp_path / "demonstrations.jsonl"
    write_records(path, [{"prompt": "Hi", "response": "Yo"}] * 2)
    data, none = load_training_set(str(path), BYTES, 64, 2, seed=1)
    assert none is None and data.rows == [(PROMPT_HI + RESPONSE_YO, [0] * 28 + [1] * 4)] * 2
    data, _ = load_training_set(str(path), BYTES, 64, 2, seed=1, loss_on="all")
    assert data.rows == [(PROMPT_HI + RESPONSE_YO, [1] * 32)] * 2
    write_records(path, [{"prompt": "Hi", "response": "Yo"}]) # one row is a training set, if a dull one
    data, _ = load_training_set(str(path), BYTES, 64, 2, seed=1)
    assert data.at(0) == [(PROMPT_HI + RESPONSE_YO, [0] * 28 + [1] * 4)] * 2
    (tmp_path / "short.txt").write_text("x") # "x" and EOS: nothing is left to hold out
    with pytest.raises(SystemExit) as stopped:
        load_training_set(str(tmp_path / "short.txt"), BYTES, 64, 2, seed=1, val_fraction=0.5)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"error: {tmp_path / 'short.txt'}: ")


def test_text_is_told_from_demonstrations(tmp_path):
    for name, row, expected in (("a.jsonl", {"text": "x"}, True), ("b.jsonl", {"prompt": "x", "response": "y"}, False),
                                ("c.jsonl", {"messages": [user("x"), assistant("a \"text\"")]}, False)):
        write_records(tmp_path / name, [row])
        assert is_text_file(tmp_path / name) == expected
    (tmp_path / "d.txt").write_text("x")
    assert is_text_file(tmp_path / "d.txt")


def test_preferences(tmp_path, capsys):
    """A comparison is a ranking of two."""
    write_records(tmp_path / "c.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2}])
    assert read_preferences(tmp_path / "c.jsonl") == [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2, "responses": ["a", "b"], "ranks": [0, 1]}]
    row = {"prompt": "Hi", "responses": ["a \"chosen\"", "b", "c"], "ranks": [2, 0, 0]}
    write_records(tmp_path / "r.jsonl", [row])
    assert read_preferences(tmp_path / "r.jsonl") == [row]
    for text in ("", '{"prompt": "Hi", "chosen": "a"}\n', "{}\n"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            read_preferences(tmp_path / "bad.jsonl")
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_ranked_preferences(tmp_path, capsys):
    """Records whose answers all tie are left out; scores, where asked for and there, come before the ranks."""
    rows = [dict(prompt="a", responses=["x", "y"], ranks=[1, 1]),
            dict(prompt="b", responses=["x", "y"], ranks=[0, 1], scores=[0.25, 1.5]),
            dict(prompt="c", responses=["x", "y"], ranks=[0, 1], scores=[2, 2]),
            dict(prompt="d", responses=["x", "y"], ranks=[1, 0], scores=None),
            dict(prompt="e", responses=["x", "y"], ranks=[1, 1], scores=[0, 1])]
    write_records(tmp_path / "r.jsonl", rows)
    found = lambda *more: [(r["prompt"], r["ranks"]) for r in read_ranked(tmp_path / "r.jsonl", *more)]
    assert found() == [("b", [0, 1]), ("c", [0, 1]), ("d", [1, 0])]
    assert found(True) == [("b", [-0.25, -1.5]), ("d", [1, 0]), ("e", [0, -1])]
    write_records(tmp_path / "ties.jsonl", rows[:1])
    with pytest.raises(SystemExit) as stopped:
        read_ranked(tmp_path / "ties.jsonl")
    assert stopped.value.code == 2 and capsys.readouterr().err == (
        f"error: {tmp_path / 'ties.jsonl'}: all answers of every prompt tie; wanted some that are ranked above others\n")


def test_ranked_preferences_of_several_files(tmp_path, capsys):
    """In the order of the files; one whose prompts all tie adds nothing; rankings and comparisons do not mix."""
    rows = {"a": dict(prompt="a", responses=["x", "y"], ranks=[0, 1]), "b": dict(prompt="b", responses=["x", "y"],
            ranks=[1, 0]), "tie": dict(prompt="t", responses=["x", "y"], ranks=[0, 0]),
            "pair": dict(prompt="p", chosen="x", rejected="y", margin=2.0)}
    for name, row in rows.items():
        write_records(tmp_path / f"{name}.jsonl", [row])
    found = lambda *names: read_ranked(",".join(str(tmp_path / f"{name}.jsonl") for name in names))
    assert found("b", "tie", "a") == [rows["b"], rows["a"]]
    assert [r["margin"] for r in found("pair", "pair")] == [2.0, 2.0]
    with pytest.raises(SystemExit) as stopped:
        found("a", "pair")
    assert stopped.value.code == 2 and capsys.readouterr().err == (
        f"error: {tmp_path / 'a.jsonl'},{tmp_path / 'pair.jsonl'}: wanted files of one kind, rankings or comparisons\n")


def test_rows_by_length():
    rows = [([1] * p, [[2] * n for n in answers], None) for p, answers in ((4, (4, 4)), (1, (1, 1)), (2, (9,)), (3, (2,)),
                                                                           (5, (1, 1, 1)))] # 12 3 11 5 8 tokens
    assert by_length(rows, 2) == [[1, 3], [4, 2], [0]] and by_length(rows, 9) == [[1, 3, 4, 2, 0]]
