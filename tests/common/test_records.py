"""common/records.py: rows of JSON checked one by one, written whole or not at all."""
import gzip
import json
import os

import pytest

from common.records import (goodness, is_text_file, read_json, read_preferences, read_ranked, read_records,
                            read_unpaired, write_atomic, write_records)
from tiny import assistant, exits, one_line, user

def test_write_atomic(tmp_path):
    path = str(tmp_path / 'a')
    for text in ('old', 'new é'):
        write_atomic(path, text)
        assert open(path, encoding='utf-8').read() == text
    assert os.listdir(tmp_path) == ['a']

GOOD = {
    "text": {"text": "a"},
    "demonstrations": {"prompt": "a", "response": "b"},
    "comparisons": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
    "rankings": {"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1], "scores": [1.5, 1]},
    "ratings": {"prompt": "a", "response": "b", "helpful": 7, "honest": 9.5, "ended": False, "annotator": "Anna"},
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
    # what a float32 and an int64 do not hold
    bad("comparisons", margin=10**309) + ("`margin` to be a number",),
    bad("comparisons", margin=-1e38) + ("`margin` to be a number",),
    bad("comparisons", scores=[10**309, 1]) + ("`scores` to be two numbers",),
    bad("rankings", scores=[10**309, 1]) + ("`scores` to be 2 numbers",),
    bad("rankings", ranks=[0, 2**63]) + ("`ranks` to be 2 integers",),
    bad("ratings", response=" ") + ("`response` to be text",),
    bad("ratings", helpful=..., honest=...) + ("numbers below 1e38 for one or more of helpful, harmless, honest",),
    bad("ratings", helpful="7") + ("numbers below 1e38",), bad("ratings", honest=True) + ("numbers below 1e38",),
    bad("ratings", score=None) + ("numbers below 1e38",), bad("ratings", ended=[True]) + ("`ended` to be true or",),
    # what is not to be learnt
    bad("demonstrations", label=False) + ("wanted demonstrations, got a bad answer (`label` is false); kto.py",),
    bad("demonstrations", messages=[user("a"), assistant("b")], label=False) + ("kto.py learns from those",),
    *[bad("demonstrations", **row, **{key: label}) + (f"a bad answer (`{key}` is {json.dumps(label)})",)
      for row in ({}, {"messages": [user("a"), assistant("b")]}) for key in ("label", "kto_tag")
      for label in (False, 0, 0.0, "false", "False", "0")],
    bad("demonstrations", messages=[user("a"), assistant("b")], ended="false") + ("`ended` to be true or false",),
    bad("demonstrations", messages=[user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]) + (
        "wanted no `weight` of 0 in `messages`",),
])
def test_bad_row_is_named_by_file_and_line(tmp_path, capsys, kind, line, wish):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD[kind]).encode() + b"\n\n" + line + b"\n") # the empty line counts as a line
    exits(capsys, f"{path}:3: wanted", read_records, path, kind)
    exits(capsys, wish, read_records, path, kind)

def test_good_answers_are_demonstrations(tmp_path):
    """Labels of another sense are extra keys."""
    rows = [GOOD["demonstrations"] | {"label": x} for x in (True, 1, "true", "1", "greeting", 2, None, [0])]
    write_records(tmp_path / "rows.jsonl", rows)
    assert read_records(tmp_path / "rows.jsonl", "demonstrations") == rows

def test_json_that_is_nested_too_deeply(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert one_line(capsys, lambda: read_json(tmp_path / "config.json")).startswith(
        f"{tmp_path / 'config.json'}: not JSON (")

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

def test_files_that_are_no_records_say_what_is(tmp_path, capsys):
    for name, content, wanted in (
            ("lfs.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": a Git LFS pointer, not"),
            ("utf16.jsonl", '{"prompt": "a"}'.encode("utf-16"), ": wanted UTF-8 text, got UTF-16"),
            ("a.json", b'[{"prompt": "a"}]', ":1: wanted a JSON object, got list; data/trl/prepare.py reads arrays"),
            ("b.json", b'\n[\n {"prompt": "a"}]', "; data/trl/prepare.py reads arrays, CSV and parquet"),
            ("c.csv", b"prompt,chosen\na,b\n", "; data/trl/prepare.py reads arrays, CSV and parquet"),
            ("d.jsonl", b'{"question": "a"}', "to have `prompt` (data/trl/prepare.py reads other formats)")):
        (tmp_path / name).write_bytes(content)
        line = one_line(capsys, lambda: read_records(tmp_path / name, "prompts"))
        assert line.startswith(str(tmp_path / name)) and wanted in line, line
        one_line(capsys, lambda: read_preferences(tmp_path / name))
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    exits(capsys, "d.jsonl:2: wanted a JSON object, got list", read_records, tmp_path / "d.jsonl", "prompts")

def test_keys_that_would_change_what_is_learnt_are_named(tmp_path, capsys):
    """Others are welcome and not spoken of."""
    demonstration = dict(prompt="a", response="b", id=1, label=True)
    write_records(tmp_path / "d.jsonl", [demonstration | dict(system="s"), demonstration | dict(system="", history=[])])
    read_records(tmp_path / "d.jsonl", "demonstrations")
    path = tmp_path / "r.jsonl"
    assert capsys.readouterr().out == (f"{tmp_path / 'd.jsonl'}: `system` is not read in demonstrations (1 of 2 rows); "
                                       "data/trl/prepare.py may read it\n")
    write_records(path, [GOOD["rankings"] | dict(margin=1)])
    read_records(path, "rankings")
    assert f"{path}: `margin` is not read in rankings (1 of 1 rows)" in capsys.readouterr().out
    write_records(path, [GOOD["comparisons"]])
    read_records(path, "comparisons")
    assert capsys.readouterr().out == ""

def test_plain_text_is_one_record(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_records(tmp_path / "a.txt", "text") == [{"text": "one\n\ntwo\n"}]
    exits(capsys, "wanted a .jsonl file of prompts", read_records, tmp_path / "a.txt", "prompts")
    (tmp_path / "b.txt").write_bytes(b"one\n\xff\n")
    exits(capsys, "b.txt:2: wanted UTF-8 text", read_records, tmp_path / "b.txt", "text")
    (tmp_path / "c.txt").write_text("")
    exits(capsys, "c.txt: wanted text, got an empty file", read_records, tmp_path / "c.txt", "text")

# ---------------------------------------------------------------------------------------------------------------------
# preferences

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
        one_line(capsys, lambda: read_preferences(tmp_path / "bad.jsonl"))

def test_ranked_preferences(tmp_path, capsys):
    """Records whose answers all tie are left out: by the scores where asked for and there, else by the ranks."""
    rows = [dict(prompt="a", responses=["x", "y"], ranks=[1, 1]),
            dict(prompt="b", responses=["x", "y"], ranks=[0, 1], scores=[0.25, 1.5]),
            dict(prompt="c", responses=["x", "y"], ranks=[0, 1], scores=[2, 2]),
            dict(prompt="d", responses=["x", "y"], ranks=[1, 0], scores=None),
            dict(prompt="e", responses=["x", "y"], ranks=[1, 1], scores=[0, 1])]
    write_records(tmp_path / "r.jsonl", rows)
    found = lambda *more: [(r["prompt"], goodness(r, *more)) for r in read_ranked(tmp_path / "r.jsonl", *more)]
    assert found() == [("b", [0, -1]), ("c", [0, -1]), ("d", [-1, 0])]
    assert found(True) == [("b", [0.25, 1.5]), ("d", [-1, 0]), ("e", [0, 1])]
    assert read_ranked(tmp_path / "r.jsonl", True) == [rows[1], rows[3], rows[4]] # the records as they are
    write_records(tmp_path / "ties.jsonl", rows[:1])
    assert one_line(capsys, lambda: read_ranked(tmp_path / "ties.jsonl")) == (
        f"{tmp_path / 'ties.jsonl'}: all answers of every prompt tie; wanted some that are ranked above others")

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
    assert one_line(capsys, lambda: found("a", "pair")) == (
        f"{tmp_path / 'a.jsonl'},{tmp_path / 'pair.jsonl'}: wanted files of one kind, rankings or comparisons")

def test_what_ties_is_counted(tmp_path, capsys):
    rows = [dict(prompt=str(i), responses=["x", "y", "z"], ranks=ranks) for i, ranks in enumerate(
        ([0, 0, 0], [0, 1, 2], [1, 0, 0], [2, 2, 2]))]
    path = tmp_path / "r.jsonl"
    write_records(path, rows)
    assert [r["prompt"] for r in read_ranked(path, name="train")] == ["1", "2"]
    assert capsys.readouterr().out == "train: 2 of 4 prompts left out, all their answers tie\n"
    # good: x, y and z of the third and x of the second; bad: the others; y of the second is in the middle
    assert [r["label"] for r in read_unpaired(path, "train")] == [True, False, False, True, True]
    assert capsys.readouterr().out == "train: 7 of 12 answers left out, as many others beat them as they beat\n"
    write_records(path, rows[1:2])
    read_ranked(path)
    assert capsys.readouterr().out == ""

def test_comparisons_of_a_text_with_itself(tmp_path, capsys):
    """They are left out wherever comparisons are read; one answer that ended and one cut off are two."""
    path, rows = tmp_path / "c.jsonl", [dict(prompt="a", chosen=c, rejected="x") for c in "xyx"]
    write_records(path, rows + [rows[0] | dict(ended=[True, False]), rows[0] | dict(ended=[False, False])])
    for read in (read_preferences, read_ranked, read_unpaired):
        found = read(path)
        assert len(found) == (4 if read is read_unpaired else 2)
        assert f"{path}: 3 of 5 comparisons left out, their two texts are equal\n" == capsys.readouterr().out
    write_records(path, rows[:1])
    exits(capsys, f"{path}: wanted comparisons of two different texts, found none", read_preferences, path)

def test_comparisons_are_called_so(tmp_path, capsys):
    path = tmp_path / "c.jsonl"
    for row, wanted in ((dict(prompt="a", rejected="b"), "c.jsonl:1: wanted a row of kind comparisons to have `chose"),
                        (dict(prompt="a", better="b"), "c.jsonl: wanted rankings (`prompt`, `responses`, `ranks`) or "
                         "comparisons (`prompt`, `chosen`, `rejected`), got a first row with the keys better, prompt")):
        write_records(path, [row])
        exits(capsys, wanted, read_ranked, path)

def test_a_name_may_hold_a_comma(tmp_path):
    row = dict(prompt="a", chosen="x", rejected="y")
    write_records(tmp_path / "a,b.jsonl", [row])
    write_records(tmp_path / "c.jsonl", [row | dict(prompt="c")])
    assert [r["prompt"] for r in read_ranked(str(tmp_path / "a,b.jsonl"))] == ["a"]
    assert [r["prompt"] for r in read_ranked(f"{tmp_path / 'c.jsonl'},{tmp_path / 'c.jsonl'}")] == ["c", "c"]

@pytest.mark.parametrize("record, use_scores, expected", [
    (dict(ranks=[2, 0, 1]), False, [-2, 0, -1]),
    (dict(ranks=[2, 0, 1]), True, [-2, 0, -1]),
    (dict(ranks=[2, 0, 1], scores=None), True, [-2, 0, -1]),
    (dict(ranks=[1, 0], scores=[0.5, 7]), False, [-1, 0]),
    (dict(ranks=[1, 0], scores=[0.5, 7]), True, [0.5, 7])])
def test_goodness(record, use_scores, expected):
    assert goodness(record, use_scores) == expected

# ---------------------------------------------------------------------------------------------------------------------
# ratings

def rating(prompt, response, *numbers, **more):
    return dict(prompt=prompt, response=response, **dict(zip(("helpful", "harmless", "honest"), numbers)), **more)

def test_several_raters_are_averaged(tmp_path, capsys):
    """
    Anna: x (8 + 10 + 9) / 3 = 9, y 3, z 8. Ben: x 7, z 8. Their means: x 8, y 3, z 8: x and z tie. The same text
    without its end is another answer. A prompt with one answer, and one whose two answers tie, make no pair.
    """
    anna = [rating("p", "x", 8, 10, 9), rating("p", "y", 2, 4, 3), rating("p", "z", 8, 8, 8), rating("q", "x", 1, 1, 4)]
    ben = [rating("p", "z", 9, 8, 7), rating("r", "x", 5, 5, 5), rating("r", "x", 6, 5, 4, ended=False),
           rating("p", "x", 6, 8, 7)]
    for name, rows in dict(anna=anna, ben=ben).items():
        write_records(tmp_path / f"{name}.jsonl", rows)
    files = f"{tmp_path}/anna.jsonl,{tmp_path}/ben.jsonl"
    p, q, r = read_ranked(files, ties=True)
    assert p == dict(prompt="p", responses=["x", "y", "z"], ended=[True] * 3, ratings=[8, 3, 8], ranks=[0, 2, 0],
                     rated=[[9, 7], [3], [8, 8]])
    assert (q["responses"], q["ratings"], q["ranks"]) == (["x"], [2], [0])
    assert (r["responses"], r["ended"], r["ratings"], r["ranks"]) == (["x", "x"], [True, False], [5, 5], [0, 0])
    capsys.readouterr()
    assert read_ranked(files, name="train") == [p] # as a file of rankings
    assert "train: 2 of 3 prompts left out, all their answers tie" in capsys.readouterr().out

def test_ratings_of_other_qualities_do_not_mix(tmp_path, capsys):
    write_records(tmp_path / "a.jsonl", [rating("p", "x", 8, 10, 9), rating("p", "y", score=5)])
    assert one_line(capsys, lambda: read_ranked(str(tmp_path / "a.jsonl"))) == (
        f"{tmp_path / 'a.jsonl'}: wanted the same qualities in every rating, got helpful and harmless and honest, but "
        "score")
    write_records(tmp_path / "b.jsonl", [dict(prompt="p", responses=["x", "y"], ranks=[0, 1])])
    exits(capsys, "b.jsonl:1: wanted a row of kind ratings", read_ranked, f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
