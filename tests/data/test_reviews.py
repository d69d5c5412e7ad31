"""Reviews: what is read and left out, parts and pairs, and the naive Bayes classifier by hand."""
import math
import os
import zipfile

import pytest

import data.reviews.prepare as prepare
from common.records import read_records
from common.tokens import load_tokenizer, prompt_ids
from data.reviews import gold as reviews
from feedback.functions import load_reward_function
from tiny import ROOT, by_hand, one_line, records, run, stops

ADJECTIVES = {True: ['good', 'great', 'fast', 'sharp', 'sturdy'], False: ['bad', 'poor', 'slow', 'blurry', 'flimsy']}
NOUNS = ['battery', 'screen', 'zoom', 'sound', 'price', 'case', 'lens', 'menu', 'size', 'cable', 'memory', 'keys']

def remarks(label):
    """Return 180 remarks under one label."""
    ends = '', ' indeed', ' mostly'
    return [f'{noun} is {how}{end}' for noun in NOUNS for how in ADJECTIVES[label] for end in ends]

def write_zip(path, pros=(), cons=()):
    """Write a small pros_cons.zip."""
    with zipfile.ZipFile(path, 'w') as file:
        for tag, lines in (('Pros', [*remarks(True), *pros]), ('Cons', [*remarks(False), *cons])):
            file.writestr(f'pros_cons/Integrated{tag}.txt', ''.join(f'   <{tag}>{line}</{tag}>\n' for line in lines))
    return str(path)

def test_what_is_read_and_left_out(tmp_path, capsys):
    """180 remarks each and: a copy but for signs, one word, one under both (3 times), an escape; a line without tag."""
    source = write_zip(tmp_path / 'p.zip', ['Zoom, is GOOD!', 'small', 'none yet', 'it &amp;quot;works&amp;quot;'],
                       ['None yet', 'none yet.', 'it breaks</Cons>\n<b>x y</b>\n<Cons>it hurts'])
    out = tmp_path / 'out'
    run(prepare, source=source, out_dir=str(out), vocab_size=300)
    lines = {line[:40].strip(): int(line[40:].split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert lines['read, Pros'] == 184 and lines['read, Cons'] == 185
    assert lines['left out, said before'] == 1 and lines['left out, one word'] == 1
    assert lines['left out, under Pros and under Cons'] == 3 and lines['left out, no <Cons>'] == 1
    files = {path.stem: read_records(path, 'text' if 'x' in path.stem else 'prompts') for path in out.glob('*.jsonl')}
    assert all(lines[name] == len(rows) for name, rows in files.items())
    whole = {name: {f"{row['prompt']} {row['response']}" for row in rows}
             for name, rows in files.items() if name.startswith(('demonstrations', 'gold'))}
    assert len(set().union(*whole.values())) == sum(map(len, whole.values())) # no remark is in two files
    prompts = [row['prompt'] for name, rows in files.items() if name.startswith('prompts') for row in rows]
    assert len(set(prompts)) == len(prompts) and all(1 <= len(prompt.split()) <= 2 for prompt in prompts)
    for split in ('train', 'val'): # pairs are of the same people's remarks as the demonstrations
        for row in read_records(out / f'comparisons_{split}.jsonl', 'comparisons'):
            pair = [f"{row['prompt']} {row[key]}" for key in ('chosen', 'rejected')]
            assert {*pair} <= whole[f'demonstrations_{split}'] and len(row['prompt'].split()) in (1, 2)
            assert any(how in pair[0] for how in [*ADJECTIVES[True], 'it "works"']), pair
            assert any(how in pair[1] for how in [*ADJECTIVES[False], 'it breaks', 'it hurts']), pair
    for row in files['gold_train']:
        assert row['pros'] == any(how in row['response'].split() for how in [*ADJECTIVES[True], '"works"'])
    labels = [row['pros'] for row in files['gold_train']]
    assert labels != sorted(labels, reverse=True) # the Pros do not all come first
    tok = load_tokenizer(str(out / 'reviews.tiktoken'))
    assert tok.n_vocab == 300 and len(prompt_ids(tok, 'zoom')) < 16 # 31 bytes

def test_the_same_from_a_folder_and_from_the_network(tmp_path, monkeypatch):
    source = write_zip(tmp_path / 'p.zip')
    zipfile.ZipFile(source).extractall(tmp_path / 'unpacked')
    monkeypatch.setattr(prepare, 'URL', f'file://{source}')
    made = []
    for where in (source, str(tmp_path / 'unpacked'), ''):
        out = tmp_path / f'out{len(made)}'
        run(prepare, source=where, out_dir=str(out), vocab_size=280)
        made.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert made[0] == made[1] == made[2] and len(made[0]) == 10

def test_pairs_by_hand():
    """One Pro and five Cons begin with `a`: it is used three times. Nobody begins with `c` on the other side."""
    rows = [('a b', True, {}), *((f'a {i}', False, {}) for i in range(5)), ('c d', True, {}), ('x 1', False, {}),
            ('x 2', True, {}), ('x 3', True, {})]
    assert prepare.compare(rows) == [
        *(dict(prompt='a', chosen='b', rejected=str(i)) for i in range(3)),
        dict(prompt='x', chosen='2', rejected='1'), dict(prompt='x', chosen='3', rejected='1')]
    # pairs of one word, and of two where there is more to say
    rows = [('a b c', True, {}), ('a b d', False, {}), ('a e', False, {})]
    assert prepare.compare(rows) == [
        dict(prompt='a', chosen='b c', rejected='b d'), dict(prompt='a', chosen='b c', rejected='e'),
        dict(prompt='a b', chosen='c', rejected='d')]

def test_shares_of_the_parts():
    found = [prepare.choose(dict(a=0.5, b=0.3, c=0.2), 'x', i) for i in range(4000)]
    for name, share in dict(a=0.5, b=0.3, c=0.2).items(): # the standard error is at most .008
        assert found.count(name) / 4000 == pytest.approx(share, abs=0.03)

def test_bad_sources(tmp_path, capsys):
    (tmp_path / 'no.zip').write_text('no zip')
    (tmp_path / 'empty').mkdir()
    with zipfile.ZipFile(tmp_path / 'few.zip', 'w') as file:
        file.writestr('IntegratedPros.txt', '<Pros>good zoom</Pros>\n')
        file.writestr('IntegratedCons.txt', '<Cons>bad zoom</Cons>\n')
    for name, wanted in (('no.zip', 'wanted a zip or a folder with IntegratedPros.txt and'), ('none', 'wanted a zip'),
                         ('empty', 'wanted a zip'), ('few.zip', 'too few remarks, there are none for ')):
        line = stops(capsys, prepare, source=str(tmp_path / name), out_dir=str(tmp_path / 'out'))
        assert line.startswith(f'--source={tmp_path / name}: {wanted}'), line
    assert not (tmp_path / 'out').exists()

# ---------------------------------------------------------------------------------------------------------------------
# the gold score

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three remarks: two Pros, one Con."""
    os.makedirs(tmp_path / 'data/reviews')
    for split in ('train', 'test'):
        records(tmp_path / f'data/reviews/gold_{split}.jsonl', [
            dict(prompt='good', response='zoom', pros=True),
            dict(prompt='good', response='price', pros=split == 'train'),
            dict(prompt='bad', response='zoom', pros=False)])
    monkeypatch.chdir(tmp_path)

def test_naive_bayes_by_hand(folder):
    """
    Pros have the words good good zoom price and the pairs (< good) twice, (good zoom) (zoom >) (good price) (price >):
    10. Cons: bad zoom, (< bad) (bad zoom) (zoom >): 5. Eleven are different, so the denominators are 21 and 16.
    """
    odds, prior = reviews.log_odds(os.path.abspath('data/reviews/gold_train.jsonl'))
    assert len(odds) == 11 and prior == by_hand(math.log(2))
    assert odds['good'] == by_hand(math.log(3 / 21) - math.log(1 / 16))
    assert odds['zoom'] == odds['zoom', '>'] == by_hand(math.log(2 / 21) - math.log(2 / 16))
    assert odds['<', 'bad'] == by_hand(math.log(1 / 21) - math.log(2 / 16))
    # good lens: 2/1 of the labels, 16*3/21 of the word and of the pair (< good); lens was never seen
    x = 2 * (48 / 21) ** 2
    assert reviews.gold(dict(prompt='Good'), 'lens') == by_hand(x / (1 + x))
    assert reviews.gold(dict(prompt='bad'), '') == by_hand(1 / (1 + (21 / 8) ** 2 / 2))
    assert reviews.gold(dict(prompt='bad'), 'bad ' * 5000) < 1e-200 # and no overflow
    assert reviews.accuracy() == (2 / 3, 3) # the test file calls good price a Con

def test_it_is_a_reward_function(folder):
    score = load_reward_function('data.reviews.gold:gold', 'gold', [dict(prompt='good')], 'p.jsonl')
    assert score(dict(prompt='good'), 'lens') == by_hand(0.912656)

@pytest.mark.parametrize('labels, got', [
    ([True, 'true', False], "'true', False, True"), ([True, None, False], 'False, None, True'), ([True, True], 'True'),
    ([False], 'False')])
def test_labels_that_teach_nothing(folder, capsys, labels, got):
    rows = [dict(prompt='good', response='zoom', pros=label) for label in labels]
    for split, read in (('test', reviews.accuracy), ('train', lambda: reviews.gold(rows[0], ''))):
        path = records(os.path.abspath(f'data/reviews/gold_{split}.jsonl'), rows)
        where, _, said = one_line(capsys, read).partition(': ')
        assert path.endswith(where) and where.endswith(f'gold_{split}.jsonl')
        assert said == f'wanted `pros` in each row, true in some and false in others; got {got}'

def test_the_real_ones(tmp_path, capsys):
    source = os.path.join(ROOT, '../shared/data/pros_cons.zip')
    if not os.path.exists(source):
        pytest.skip('needs ../shared/data/pros_cons.zip')
    counts = prepare.Counter()
    rows = prepare.read_remarks(source, counts)
    assert counts['read, Pros'] == 22940 and counts['read, Cons'] == 22935 and len(rows) == 39610
    assert sum(n for what, n in counts.items() if what.startswith('left out')) == 45875 - 39610
