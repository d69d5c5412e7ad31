"""data/hh_rlhf/prepare.py as its user calls it, on rows typed here and, where it is present, on a real file."""
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.records import read_records
from tiny import ROOT

REAL = Path(ROOT).parent / "shared" / "data" / "hh-rlhf-harmless-base-2000.jsonl.gz"

def prepare(*args):
    return subprocess.run([sys.executable, "data/hh_rlhf/prepare.py", *args], cwd=ROOT, capture_output=True, text=True)

def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)

def row(prompt, chosen, rejected):
    return {"chosen": prompt + "\n\nAssistant:" + chosen, "rejected": prompt + "\n\nAssistant:" + rejected}

def read_all(folder, kind):
    return [record for split in ("train", "val") for record in read_records(folder / f"{kind}_{split}.jsonl", kind)]

A, B = "\n\nHuman: a", "\n\nHuman: one\n\nAssistant: two\n\nHuman: three"
ROWS = [
    row(A, " good", " worse one"),
    row(B, " good", " bad"),
    row(A, " fine", " no"),                                          # 3: the same prompt again
    {"chosen": A + "\n\nAssistant: x", "rejected": B + "\n\nAssistant: y"}, # 4: prompts differ
    row(A, "", " y"),                                                # 5: empty
    row(A, " x", " y\n\nHuman: more"),                               # 6: a role tag inside an answer
    row(A, " x", " x "),                                             # 7: equal
    "{broken",                                                       # 8
    {"chosen": A},                                                   # 9
    row(A + "\n\nHuman: b", " x", " y"),                             # 10: two user turns in a row
    row("\n\nAssistant: hello" + A, " x", " y"),                     # 11: the assistant first
]

def test_what_is_kept_and_why_the_rest_is_not(tmp_path):
    source = tmp_path / "rows.jsonl.gz"
    write(source, ROWS)
    done = prepare(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--val_fraction=0.5")
    assert done.returncode == 0, done.stderr
    for reason, lines in {"prompts of chosen and rejected differ": [4], "chosen or rejected is empty": [5],
                          "role tag inside an answer": [6], "chosen equals rejected": [7], "malformed row": [8, 9],
                          "turns do not alternate, or one is empty": [10, 11]}.items():
        places = ", ".join(f"{source}:{n}" for n in lines)
        assert f"left out {len(lines):6d}  {reason}\n                 {places}\n" in done.stdout
    assert "kept          3  of 11 rows in 1 file(s)" in done.stdout
    assert "shorter answer wins in 33.3% of all" in done.stdout # good/worse one yes, good/bad no, fine/no no
    many = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"}]
    by_chosen = sorted(read_all(tmp_path / "out", "comparisons"), key=lambda r: r["rejected"])
    assert by_chosen == [{"prompt": many, "chosen": "good", "rejected": "bad"},
                         {"prompt": "a", "chosen": "fine", "rejected": "no"},
                         {"prompt": "a", "chosen": "good", "rejected": "worse one"}]
    demonstrations = read_all(tmp_path / "out", "demonstrations")
    assert sorted(r["response"] for r in demonstrations) == ["fine", "good", "good"]
    assert sorted(str(r["prompt"]) for r in read_all(tmp_path / "out", "prompts")) == sorted([str(many), "a"])

def test_one_prompt_is_in_one_split(tmp_path):
    write(tmp_path / "rows.jsonl.gz", [row(f"\n\nHuman: {i % 20}", f" yes {i}", " no") for i in range(100)])
    prompts = []
    for run in ("one", "two"): # and twice the same
        done = prepare(f"--source={tmp_path / 'rows.jsonl.gz'}", f"--out_dir={tmp_path / run}", "--val_fraction=0.2")
        assert done.returncode == 0, done.stderr
        train, val = (read_records(tmp_path / run / f"comparisons_{split}.jsonl", "comparisons")
                      for split in ("train", "val"))
        assert len(train) == 80 and len(val) == 20 # 16 and 4 prompts of 5 rows each
        assert not {r["prompt"] for r in train} & {r["prompt"] for r in val}
        prompts.append([r["prompt"] for r in val])
    assert prompts[0] == prompts[1]

def test_the_test_file_makes_val(tmp_path):
    write(tmp_path / "hh" / "base" / "train.jsonl.gz", [row(f"\n\nHuman: {i}", " yes", " no") for i in range(9)])
    write(tmp_path / "hh" / "base" / "test.jsonl.gz", [row(f"\n\nHuman: {i}", " yes", " no") for i in range(8, 11)])
    write(tmp_path / "hh" / "red-team" / "other.jsonl.gz", ["[]"]) # neither train nor test: not read
    done = prepare(f"--source={tmp_path / 'hh'}", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert [r["prompt"] for r in read_records(tmp_path / "out" / "prompts_val.jsonl", "prompts")] == ["8", "9", "10"]
    train = read_records(tmp_path / "out" / "prompts_train.jsonl", "prompts")
    assert [r["prompt"] for r in train] == [str(i) for i in range(8)] # 8 is in the test file
    assert "kept         11  of 12 rows in 2 file(s)" in done.stdout
    assert "left out      1  prompt is in the test files too" in done.stdout

@pytest.mark.parametrize("args, message", [
    (["--source={tmp}/none"], "none: wanted a file"),
    (["--source={tmp}"], "found none in"),
    (["--source={tmp}/plain.gz"], "plain.gz:1: cannot be read"),
    (["--source={tmp}/plain.gz", "--val_fraction=1.5"], "val_fraction must be between 0 and 1, got 1.5"),
    (["--source={tmp}/only_bad.txt"], "wanted rows for both splits, got 0 for train and 0 for val"),
])
def test_bad_input_exits_2_with_one_line(tmp_path, args, message):
    (tmp_path / "plain.gz").write_text("{}")
    (tmp_path / "only_bad.txt").write_text("{}\n")
    done = prepare(*[arg.format(tmp=tmp_path) for arg in args], f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr

@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/hh-rlhf-harmless-base-2000.jsonl.gz")
def test_counts_of_the_real_file(tmp_path):
    """The counts in docs/data.md."""
    done = prepare(f"--source={REAL}", f"--out_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "kept       1958  of 2000 rows" in done.stdout and "wins in 55.0% of all" in done.stdout
    counts = [len(read_records(tmp_path / f"{kind}_{split}.jsonl", kind))
              for kind in ("comparisons", "demonstrations", "prompts") for split in ("train", "val")]
    assert counts == [1761, 197, 1761, 197, 1760, 196]
