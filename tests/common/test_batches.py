"""common/batches.py: records to rows, rows to tensors, and which rows make up a batch, all by hand."""
from collections import Counter

import numpy as np
import pytest
import torch

from common.batches import (Batches, Demonstrations, Row, Windows, by_length, collate, collate_answers,
                            encode_demonstrations, encode_prompts, encode_rankings, hold_out,
                            load_training_set, pad, share_prompts, split, split_by_tokens, to_table, truncate)
from common.records import write_records
from tiny import PROMPT_HI, RESPONSE_YO, TOK, assistant, exits, user

# ---------------------------------------------------------------------------------------------------------------------
# records to rows

def test_truncate():
    assert truncate([1, 2, 3, 4, 5], n_response=3, block_size=5) == [4, 5] # the oldest text goes first
    assert truncate([1, 2], n_response=3, block_size=5) == [1, 2]
    assert truncate([1, 2], n_response=4, block_size=5) == [2]
    assert truncate([1, 2], n_response=5, block_size=5) is None
    assert truncate([1, 2], n_response=9, block_size=5) is None

def test_demonstrations_keep_the_response_and_count(capsys):
    records = [{"prompt": "Hi", "response": "Yo"}, {"prompt": "Hi", "response": "Yoyoyoy"},
               {"prompt": "Hi", "response": "Yoyoyoyo"}] # responses of 4, 9 and 10 tokens
    rows = encode_demonstrations(TOK, records, block_size=10, name="train")
    assert capsys.readouterr().out == "train: 2 rows, 2 prompts cut, 1 left out (a response alone fills 10 tokens)\n"
    assert rows[0] == ([115, 116, 97, 110, 116, 58] + RESPONSE_YO, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]) # "stant:"
    assert rows[1] == ([58, 32, 89, 111, 121, 111, 121, 111, 121, 256], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    rows = encode_demonstrations(TOK, records[:1], block_size=32, loss_on="all", name="val")
    assert capsys.readouterr().out == "val: 1 rows, 0 prompts cut, 0 left out\n"
    assert rows == [(PROMPT_HI + RESPONSE_YO, [1] * 32)]

def test_demonstrations_cut_takes_the_oldest_turn():
    record = {"messages": [user("a"), assistant("b"), user("c"), assistant("de")]} # 27 + 3 + 28 + 4 tokens
    (ids, mask), = encode_demonstrations(TOK, [record], block_size=34)
    assert TOK.decode(ids) == "b\n### Human: c\n### Assistant: de" # "b" and its end are left of the first answer
    assert mask == [1, 1] + [0] * 28 + [1] * 4

def test_nothing_left_ends_the_program(capsys):
    exits(capsys, "train: no row is left", encode_demonstrations, TOK, [{"prompt": "Hi", "response": "Yo"}], 4,
          "response", "train")

def test_rankings_share_the_cut(capsys):
    records = [{"prompt": "Hi", "responses": ["Yo", "Yolo"], "ranks": [0, 1], "margin": 2},
               {"prompt": "Hi", "responses": ["Yo", "Y" * 14], "ranks": [0, 1]}]
    rows = encode_rankings(TOK, records, block_size=16, name="train")
    assert capsys.readouterr().out == "train: 1 rows, 1 prompts cut, 1 left out (a response alone fills 16 tokens)\n"
    # the second answer has 6 tokens, so the last 10 of the prompt stay, "Assistant:", for both
    assert rows == [([65, 115, 115, 105, 115, 116, 97, 110, 116, 58], [RESPONSE_YO, [32, 89, 111, 108, 111, 256]],
                     records[0])]

def test_a_row_carries_its_record():
    """The dict itself, whatever is in it, also behind one that was left out."""
    record = {"prompt": "Hi", "responses": ["Yo", "Y", "Yolo"], "ranks": [0, 2, 1], "scores": [1.5, 0, 1]}
    none = {"prompt": "Hi", "responses": ["Y" * 8, "Y"], "ranks": [0, 1]}
    row, = encode_rankings(TOK, [none, record], block_size=8)
    assert row.record is record and row.ranks is record["ranks"]
    assert row.prompt == [116, 58]
    assert row.answers == [RESPONSE_YO, [32, 89, 256], [32, 89, 111, 108, 111, 256]]
    assert row.length == 2 + 4 + 3 + 6

def test_answers_without_ranks(capsys):
    """As those that a policy just gave: nothing but `responses` is needed."""
    row, = encode_rankings(TOK, [{"prompt": "Hi", "responses": ["Yo"]}], block_size=64)
    assert (row.prompt, row.answers) == (PROMPT_HI, [RESPONSE_YO])
    assert collate_answers([row, row]).pairs.shape == (0, 2)

def test_prompts(capsys):
    assert encode_prompts(TOK, [{"prompt": "Hi"}], room=3, name="prompts") == [[110, 116, 58]]
    assert capsys.readouterr().out == "prompts: 1 rows, 1 prompts cut, 0 left out\n"
    assert encode_prompts(TOK, [{"prompt": "Hi"}], room=28) == [PROMPT_HI]
    exits(capsys, "wanted block_size above max_new_tokens", encode_prompts, TOK, [{"prompt": "Hi"}], 0)

def test_text_ends_each_document(tmp_path):
    (tmp_path / 'text.jsonl').write_text('{"text": "ab"}\n{"text": "<|"}\n')
    windows, _ = load_training_set(str(tmp_path / 'text.jsonl'), TOK, block_size=4, batch_size=1, seed=1)
    assert windows.stream.tolist() == [97, 98, 256, 60, 124, 256] and windows.stream.dtype == np.int32

def test_pad_and_collate():
    assert pad([[1, 2, 3], [4]], fill=9).tolist() == [[1, 2, 3], [4, 9, 9]]
    idx, mask = collate([([5, 6, 256], [0, 1, 1]), ([7, 256], [0, 1])])
    assert idx.tolist() == [[5, 6, 256], [7, 256, 0]] and idx.dtype == torch.long
    assert mask.tolist() == [[1, 1], [1, 0]] and mask.dtype == torch.float32 # position t describes token t+1

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
# prompts that are followed by several answers

def test_collate_answers_by_hand():
    # prompt 1 2 3 with answers 4 5 | 6, the second is better; prompt 7 with 8 | 9 10 | 8, the first and third tie
    a = collate_answers([Row([1, 2, 3], [[4, 5], [6]], dict(ranks=[1, 0])),
                         Row([7], [[8], [9, 10], [8]], dict(ranks=[0, 1, 0]))])
    assert a.idx.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 0], [7, 8, 0, 0, 0], [7, 9, 10, 0, 0], [7, 8, 0, 0, 0]]
    # position t describes token t+1: the prompt's last token predicts the answer's first
    assert a.mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert (a.lengths.tolist(), a.sizes.tolist(), a.groups.tolist()) == ([5, 4, 2, 3, 2], [2, 1, 1, 2, 1], [2, 3])
    assert a.pairs.tolist() == [[1, 0], [2, 3], [4, 3]] # better, worse
    types = {name: x.dtype for name, x in vars(a).items()}
    assert types == dict.fromkeys(types, torch.long) | dict(mask=torch.float32)
    assert [x.tolist() for x in vars(a.to('cpu')).values()] == [x.tolist() for x in vars(a).values()]

def test_collate_answers_without_pairs():
    assert collate_answers([Row([1], [[2], [3]], dict(ranks=[0, 0]))]).pairs.shape == (0, 2)

def laid(idx, keep, groups):
    """Return what share_prompts makes of lists: ids, positions, who sees whom (x) per row, and keep's new places."""
    ids, positions, mask, places = share_prompts(torch.tensor(idx), torch.tensor(keep), torch.tensor(groups))
    assert mask.shape == (len(groups), 1, ids.size(1), ids.size(1)) and mask.dtype == torch.bool
    sees = [[''.join('.x'[x] for x in row).rstrip('.') for row in square] for square in mask[:, 0].tolist()]
    return ids.tolist(), positions.tolist(), sees, places.tolist()

def test_prompts_are_shared_as_the_docstring_draws_it():
    # the prompt 1 2 3, answers 4 9 | 5 6 9. Kept are 3 4 9 | 3 5 6 9 of six columns; 7 is a pad
    ids, positions, sees, places = laid([[1, 2, 3, 4, 9, 7], [1, 2, 3, 5, 6, 9]], [2, 3, 4, 8, 9, 10, 11], [2])
    assert ids == [[1, 2, 3, 4, 9, 5, 6, 9]] and positions == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert sees == [['x', 'xx', 'xxx', 'xxxx', 'xxxxx', 'xxx..x', 'xxx..xx', 'xxx..xxx']]
    assert places == [2, 3, 4, 2, 5, 6, 7]

def test_prompts_of_two_groups_by_hand():
    # 1 2 with 3 | 4 5 6; and 7 with 8 | 9 10 | 8: an answer sampled twice is computed twice
    idx = [[1, 2, 3, 0, 0], [1, 2, 4, 5, 6], [7, 8, 0, 0, 0], [7, 9, 10, 0, 0], [7, 8, 0, 0, 0]]
    ids, positions, sees, places = laid(idx, [21, 2, 1, 6, 7, 8, 9, 10, 11, 15, 16, 17, 20], [2, 3]) # in any order
    assert ids == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 8, 0]]
    assert positions == [[0, 1, 2, 2, 3, 4], [0, 1, 1, 2, 1, 0]]
    assert sees[0] == ['x', 'xx', 'xxx', 'xx.x', 'xx.xx', 'xx.xxx']
    assert sees[1][:5] == ['x', 'xx', 'x.x', 'x.xx', 'x...x'] # nobody sees the pad behind them
    # the second row starts at 6
    assert places == [10, 2, 1, 1, 3, 4, 5, 6, 7, 6, 8, 9, 6]

@pytest.mark.parametrize("idx, keep, groups, ids, positions, last, places", [
    # answers that begin alike: what all rows of the group share is one more token of the prompt
    ([[1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 6, 7]], [4, 11], [2], [[1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 4, 5]],
     ['xxxx.xx'], [4, 6]),
    ([[1, 3, 4], [1, 3, 5], [1, 6, 5]], [2, 5, 8], [3], [[1, 3, 4, 3, 5, 6, 5]], [[0, 1, 2, 1, 2, 1, 2]],
     ['x....xx'], [2, 4, 6]), # two of three are not all
    # token 0, a pad in the shorter row: alike are three, also where that one is the first; its every token is shared
    ([[1, 2, 0, 0], [1, 2, 0, 0]], [3, 6], [2], [[1, 2, 0, 0]], [[0, 1, 2, 3]], ['xxxx'], [3, 2]),
    ([[1, 2, 0, 0], [1, 2, 0, 0]], [2, 7], [2], [[1, 2, 0, 0]], [[0, 1, 2, 3]], ['xxxx'], [2, 3]),
    ([[1, 2, 5], [1, 2, 5]], [2, 5], [2], [[1, 2, 5]], [[0, 1, 2]], ['xxx'], [2, 2]), # the same answer twice
    # a row on its own is laid down as it is, between others
    ([[1, 2], [1, 3], [4, 5], [6, 0]], [1, 3, 5, 6], [2, 1, 1], [[1, 2, 3], [4, 5, 0], [6, 0, 0]],
     [[0, 1, 1], [0, 1, 0], [0, 0, 0]], ['x.x', 'xxx', 'xxx'], [1, 2, 4, 6]),
    # nothing is kept of a row: nothing is alike, and nothing of it is laid down
    ([[1, 2, 3], [1, 2, 4]], [5], [2], [[1, 2, 4]], [[0, 1, 2]], ['xxx'], [2])])
def test_what_all_rows_begin_with_is_laid_down_once(idx, keep, groups, ids, positions, last, places):
    """last: what the last column of each row sees."""
    found = laid(idx, keep, groups)
    assert found[:2] == (ids, positions) and [row[-1] for row in found[2]] == last and found[3] == places

def test_to_table():
    rows = [Row([1], [[2]] * n, {}) for n in (2, 3, 1)]
    assert to_table(torch.arange(1., 7.), rows, -1.).tolist() == [[1, 2, -1], [3, 4, 5], [6, -1, -1]]

# ---------------------------------------------------------------------------------------------------------------------
# training sets

@pytest.mark.parametrize("n, batch_size", [(7, 3), (3, 3), (2, 5)])
def test_demonstrations_in_order_hold_every_row_once(n, batch_size):
    rows = [([i] * (1 + i * 5 % 7), [1] * (1 + i * 5 % 7)) for i in range(n)]
    data = Demonstrations(rows, batch_size, seed=1)
    batches = data.in_order(0)
    assert sorted(ids[0] for batch in batches for ids, _ in batch) == list(range(n))
    assert all(len(batch) <= batch_size for batch in batches)
    lengths = [len(ids) for batch in batches for ids, _ in batch]
    assert lengths == sorted(lengths)
    assert sorted(ids[0] for batch in data.in_order(1) for ids, _ in batch) == list(range(min(n, batch_size)))
    assert sorted({ids[0] for step in range(data.epoch_steps) for ids, _ in data.at(step)}) == list(range(n))

@pytest.mark.parametrize("n, T", [(11, 5), (12, 5), (10, 3), (4, 99)])
def test_windows_in_order_predicts_every_token_once(n, T):
    data = Windows(np.arange(100, 100 + n), T, batch_size=2, seed=1)
    batches = data.in_order(0)
    targets = [int(i) for batch in batches for ids, mask in batch for i, m in zip(ids[1:], mask[1:]) if m]
    assert targets == list(range(101, 100 + n)) # the first has nothing before it
    assert all(len(ids) <= T + 1 and len(batch) <= 2 for batch in batches for ids, _ in batch)
    assert len(data.in_order(1)) == 1 and data.in_order(1)[0][0][0].tolist() == batches[0][0][0].tolist()

def test_windows_are_a_pure_function_of_seed_and_step():
    a, b, c = (Windows(np.arange(50), 8, 4, seed) for seed in (1, 1, 2))
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
    data, none = load_training_set(str(path), TOK, 4, 2, seed=1)
    assert none is None and isinstance(data, Windows) and data.T == 4
    assert data.stream.tolist() == [97, 98, 99, 256, 100, 256, 101, 102, 103, 104, 105, 106, 256]
    assert "train: 13 tokens of text" in capsys.readouterr().out
    data, none = load_training_set(str(path), TOK, 4, 2, seed=1, packed=False, name="val")
    assert none is None and isinstance(data, Demonstrations)
    assert data.rows == [([97, 98, 99, 256], [1] * 4), ([100, 256], [1] * 2), ([101, 102, 103, 104], [1] * 4)]
    assert "val: 3 texts" in capsys.readouterr().out

def test_a_stream_of_text_holds_out_its_end(tmp_path):
    path = tmp_path / "text.jsonl"
    write_records(path, [{"text": c} for c in "abcdefgh"])
    train, val = load_training_set(str(path), TOK, 8, 2, seed=1, val_fraction=0.25)
    assert [s.stream.tolist() for s in (train, val)] == [
        [97, 256, 98, 256, 99, 256, 100, 256, 101, 256, 102, 256], [103, 256, 104, 256]]

MESSAGES = lambda *texts: [dict(role=role, content=text) for role, text in zip(('system', 'user', 'assistant'), texts)]

@pytest.mark.parametrize("record", [
    lambda prompt, n: dict(prompt=prompt, response=f"{n}"), lambda prompt, n: dict(text=prompt),
    lambda prompt, n: dict(prompt=[dict(role='user', content=prompt)], response=f"{n}"),
    lambda prompt, n: dict(messages=MESSAGES("one for all", prompt, f"{n}"))])
def test_a_prompt_is_never_on_both_sides(tmp_path, record):
    """Of 20 prompts with 3 answers each a quarter is held out, whatever the order of the rows."""
    rows = [record(f"prompt {i}", n) for n in range(3) for i in range(20)]
    first, found = lambda ids: TOK.decode(ids).split('prompt ')[1].split('\n')[0].split('<')[0], []
    for order in (rows, rows[::-1]):
        path = tmp_path / "rows.jsonl"
        write_records(path, order)
        train, val = load_training_set(str(path), TOK, 99, 2, seed=1, packed=False, val_fraction=0.25)
        found.append([{first(ids) for ids, _ in part.rows} for part in (train, val)])
        assert [len(part.rows) for part in (train, val)] == [45, 15]
    assert found[0] == found[1] and len(found[0][1]) == 5 and not found[0][0] & found[0][1]

def test_a_first_question_is_never_on_both_sides():
    """However a row spells it, and wherever in the conversation the answer stands."""
    rows, places = [], []
    for q in map(str, range(20)):
        talk = [user(q), assistant("a"), user("more"), assistant("b")]
        same = [dict(prompt=q, response="a"), dict(prompt=talk[:1], response="a"), dict(prompt=talk[:3], response="b"),
                dict(messages=talk), dict(messages=talk, prompt="another", text="one for all"),
                dict(prompt=MESSAGES("one for all", q), response="a")]
        rows, places = rows + same, places + [q] * len(same)
    train, val = hold_out(rows, 0.25)
    assert [len(train), len(val)] == [90, 30]
    question = lambda part: {q for row, q in zip(rows, places) if row in part}
    assert len(question(val)) == 5 and not question(train) & question(val)

def test_texts_are_held_out_by_their_text():
    """Whatever other keys they have."""
    rows = [dict(text=c, messages=None, prompt="one for all") for c in "abcdefgh"]
    assert [len(part) for part in hold_out(rows, 0.25)] == [6, 2]

def test_training_set_of_demonstrations(tmp_path, capsys):
    path = tmp_path / "demonstrations.jsonl"
    write_records(path, [{"prompt": "Hi", "response": "Yo"}] * 2)
    data, none = load_training_set(str(path), TOK, 64, 2, seed=1)
    assert none is None and data.rows == [(PROMPT_HI + RESPONSE_YO, [0] * 28 + [1] * 4)] * 2
    data, _ = load_training_set(str(path), TOK, 64, 2, seed=1, loss_on="all")
    assert data.rows == [(PROMPT_HI + RESPONSE_YO, [1] * 32)] * 2
    write_records(path, [{"prompt": "Hi", "response": "Yo"}]) # one row is a training set, if a dull one
    data, _ = load_training_set(str(path), TOK, 64, 2, seed=1)
    assert data.at(0) == [(PROMPT_HI + RESPONSE_YO, [0] * 28 + [1] * 4)] * 2
    (tmp_path / "short.txt").write_text("x") # "x" and EOS: nothing is left to hold out
    with pytest.raises(SystemExit) as stopped:
        load_training_set(str(tmp_path / "short.txt"), TOK, 64, 2, seed=1, val_fraction=0.5)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(f"error: {tmp_path / 'short.txt'}: ")

# ---------------------------------------------------------------------------------------------------------------------
# parts

def test_parts():
    assert split([1, 2, 3, 4, 5, 6], 3) == [[1, 2], [3, 4], [5, 6]]
    assert split([1, 2, 3], 1) == [[1, 2, 3]]

@pytest.mark.parametrize('parts, least, expected', [
    (1, 1, ['bcdefa']), # 18 tokens, short rows first
    (2, 1, ['bcdef', 'a']), # 9 and 9
    (2, 2, ['bcde', 'fa']), # two processes: two rows each
    (3, 1, ['bcde', 'f', 'a']), # 4, 5 and 9: from 6 on, and from 12 on
    (6, 1, ['b', 'c', 'd', 'e', 'f', 'a']),
    (3, 2, ['bc', 'de', 'fa'])])
def test_micro_batches_hold_like_numbers_of_tokens(parts, least, expected):
    found = split_by_tokens(list('abcdef'), [9, 1, 1, 1, 1, 5], parts, least)
    assert [''.join(part) for part in found] == expected

def test_rows_by_length():
    rows = [Row([1] * p, [[2] * n for n in answers], {}) for p, answers in (
        (4, (4, 4)), (1, (1, 1)), (2, (9,)), (3, (2,)), (5, (1, 1, 1)))] # 12 3 11 5 8 tokens
    assert by_length(rows, 2) == [[1, 3], [4, 2], [0]] and by_length(rows, 9) == [[1, 3, 4, 2, 0]]
