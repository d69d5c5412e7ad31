"""feedback/agreement.py: kappa by hand, two files compared, several files merged."""
import pytest

import collect
from common.records import read_records
from feedback import agreement
from tiny import by_hand, records, run, stops

@pytest.mark.parametrize('ours, theirs, k, p_o', [
    ([[0, 1, 2]], [[0, 2, 1]], 1 / 3, 2 / 3), # two of three pairs alike, no ties: p_e = 1/2, (2/3 - 1/2) / (1/2)
    ([[0, 0, 1]], [[0, 1, 1]], 0, 1 / 3), # a third ties at each: p_e = 1/9 + (2/3)(2/3)/2 = 1/3
    ([[0, 1]], [[1, 0]], -1, 0),
    ([[0, 1, 1]], [[0, 1, 1]], 1, 1),
    ([[0, 0]], [[0, 0]], None, 1), # nothing else was ever said: chance would agree as well
    ([[0, 1], [0, 0]], [[0, 1], [0, 1]], 1 / 3, 1 / 2), # t = 1/2, u = 0: p_e = (1/2)/2 = 1/4; (1/2 - 1/4) / (3/4)
])
def test_kappa_by_hand(ours, theirs, k, p_o):
    got, share, n = agreement.kappa(ours, theirs)
    assert share == by_hand(p_o) and n == sum(len(r) * (len(r) - 1) // 2 for r in ours)
    assert got is None if k is None else got == by_hand(k)

def test_kappa_knows_no_first_answer():
    """Turning every pair around changes nothing."""
    a, b = [[0, 1, 1, 2]], [[1, 0, 2, 2]]
    assert agreement.kappa(a, b) == agreement.kappa([r[::-1] for r in a], [r[::-1] for r in b]) == agreement.kappa(b, a)

def test_alpha_by_hand():
    """
    Means and variances: 1, 3: 2, variance 2; 4, 6: variance 2; of all four the mean is 3.5, the squares 6.25, 0.25,
    0.25, 6.25, D_e = 13/3. D_o = (2 * 2 + 2 * 2) / 4 = 2: alpha = 1 - 6/13. With three ratings 1, 1, 4 (variance 3) and
    two 4, 4: D_o = 9/5; mean 2.8, squares 3.24, 3.24, 1.44 three times, D_e = 10.8 / 4: 1 - 1.8 / 2.7.
    """
    assert agreement.alpha([[1, 3], [4, 6]]) == by_hand(7 / 13)
    assert agreement.alpha([[1, 1, 4], [4, 4]]) == by_hand(1 / 3)
    assert agreement.alpha([[1, 1], [5, 5]]) == 1 and agreement.alpha([[3, 3], [3, 3]]) is None
    assert agreement.alpha([[1, 2], [2, 1]]) == by_hand(-0.5) # D_o = 1/2, D_e = 1/3: worse than chance

def test_what_is_said_of_raters():
    """Two answers were rated twice: 2 and 2 apart. The third does not count."""
    assert agreement.of_raters([[1, 3], [4, 6], [9]]) == (
        "5 ratings of 3 answers, 2 of them rated several times: 2.00 apart on average, Krippendorff's alpha 0.538")
    assert agreement.of_raters([[1], [9]]) == "2 ratings of 2 answers, 0 of them rated several times"
    assert agreement.of_raters([[3, 3]]).endswith("0.00 apart on average, Krippendorff's alpha –")

def test_compare(capsys):
    """The same texts in another order; one prompt is missing there. The scores order fair before bad, the ranks tie."""
    ours = [dict(prompt='p', responses=['good', 'bad', 'fair'], ranks=[0, 2, 1]),
            dict(prompt='q', responses=['a', 'b'], ranks=[0, 1])]
    theirs = [dict(prompt='p', responses=['fair', 'good', 'bad', 'bad'], ranks=[1, 0, 1, 1], scores=[.5, .9, .1, .1])]
    said = agreement.compare(ours, theirs).split('\n')
    # pairs good-bad and good-fair alike, bad-fair tied there: p_o = 2/3, t = 0, u = 1/3, p_e = (1)(2/3)/2 = 1/3
    assert said[0] == ('1 prompts in common; the same on 0.667 of 3 pairs of answers, kappa 0.500; of the 2 that the '
                       'second does not tie, 1.000 in its order (a tie of the first: half)')
    assert 'with its scores: the same on 1.000 of 3 pairs of answers, kappa 1.000' in said[1]
    assert 'no prompt in common' in agreement.compare(ours[1:], theirs)

def test_the_same_text_cut_off_is_another_answer(tmp_path, capsys):
    """Anna and Ben rank "x" with its end and without it, in other orders; Cleo's two both have their end."""
    anna = dict(prompt='p', responses=['x', 'x'], ended=[True, False], ranks=[0, 1])
    ben = dict(prompt='p', responses=['x', 'x', 'x'], ended=[False, True, False], ranks=[1, 0, 1])
    cleo = dict(prompt='p', responses=['x', 'x'], ranks=[0, 0])
    assert agreement.compare([anna], [ben]).startswith('1 prompts in common; the same on 1.000 of 1 pairs')
    assert 'no prompt in common' in agreement.compare([anna], [cleo])
    files = [records(tmp_path / f'{n}.jsonl', [row]) for n, row in enumerate((anna, ben, cleo))]
    run(collect, merge=','.join(files), out=str(tmp_path / 'out.jsonl'))
    said = [dict(rater=path, ranks=[0, 1]) for path in files[:2]] # Cleo had nothing to decide
    assert read_records(tmp_path / 'out.jsonl', 'rankings') == [anna | dict(raters=2, opinions=said)]

def test_what_nobody_could_decide_does_not_count(tmp_path, capsys):
    """Files of older versions, and of models, hold prompts whose answers are all the same, with the ranks 0.

    Of p both raters find x better: one pair. Of s there is no pair, so it is in no count and in no merged file.
    """
    same = dict(prompt='s', responses=['x', 'x'], ranks=[0, 0], again=[0, 0])
    told = dict(prompt='p', responses=['x', 'y'], ranks=[0, 1], again=[0, 1])
    assert agreement.compare([told, same], [same, told]).startswith('1 prompts in common; the same on 1.000 of 1 pairs')
    assert agreement.compare([same], [same]) == 'no prompt in common (with the same answers)'
    assert agreement.with_oneself([same, told]).startswith('1 prompts ranked twice; the same on 1.000 of 1 pairs')
    anna, ben, only = (records(tmp_path / f'{name}.jsonl', rows) for name, rows in (
        ('anna', [told, same]), ('ben', [same, told]), ('only', [same])))
    out = str(tmp_path / 'out.jsonl')
    run(collect, merge=f'{anna},{ben}', out=out)
    said = capsys.readouterr().out
    assert f'{ben}: 1 of 2 prompts left out, all their answers are the same' in said
    assert f'{anna} with oneself: 1 prompts ranked twice' in said and f'{anna} and {ben}: 1 prompts in common' in said
    assert f'{out}: 1 prompts, 1 of them ranked by several raters' in said
    assert [row['prompt'] for row in read_records(out, 'rankings')] == ['p']
    more = records(tmp_path / 'more.jsonl', [same])
    said = stops(capsys, collect, merge=f'{only},{more}', out=str(tmp_path / 'none'))
    assert said == f'--merge={only},{more}: wanted prompts with two different answers, found none'
    assert not (tmp_path / 'none').exists()

def test_ratings_are_not_merged(tmp_path, capsys):
    files = [records(tmp_path / f'{n}.jsonl', [dict(prompt='p', response='x', score=n)]) for n in (1, 2)]
    assert stops(capsys, collect, merge=','.join(files), out=str(tmp_path / 'out.jsonl')) == (
        f'{files[0]}: wanted rankings, got ratings, which need no merging; reward.py --train_data=A,B reads several '
        'files of them')

def test_merge(tmp_path, capsys):
    """
    Anna: x > y > z, Ben: y > z > x. Beaten, a tie is half: x 2 + 0, y 1 + 2, z 0 + 1: y, x, z. Of three pairs they
    agree on y > z alone. Of s, Ben finds y and z equal: x 2 + 0, y 1 + 1.5, z 0 + 1.5. q and r stand alone.
    """
    anna = records(tmp_path / 'anna.jsonl', [
        dict(prompt='p', responses=['x', 'y', 'z'], ranks=[0, 1, 2], annotator='human', again=[0, 1, 2], number=7),
        dict(prompt='q', responses=['x', 'y'], ranks=[1, 0], annotator='human'),
        dict(prompt='q', responses=['y', 'x'], ranks=[1, 0], annotator='human'), # the first one counts
        dict(prompt='s', responses=['x', 'y', 'z'], ranks=[0, 1, 2])])
    ben = records(tmp_path / 'ben.jsonl', [
        dict(prompt='p', responses=['z', 'y', 'x', 'x'], ranks=[1, 0, 2, 2], annotator='ai', scores=[1., 2., 0., 0.]),
        dict(prompt='r', responses=['x', 'y'], ranks=[0, 1]),
        dict(prompt='s', responses=['x', 'y', 'z'], ranks=[1, 0, 0])])
    out = str(tmp_path / 'out.jsonl')
    run(collect, merge=f'{anna},{ben}', out=out)
    assert 'exists already' in stops(capsys, collect, merge=f'{anna},{ben}', out=out)
    run(collect, merge=f'{anna},{ben}', out=out, overwrite=True)
    rows = read_records(out, 'rankings')
    assert rows[0] == dict(prompt='p', responses=['x', 'y', 'z'], ranks=[1, 0, 2], annotator='human, ai', raters=2,
                           number=7, opinions=[dict(rater=anna, ranks=[0, 1, 2], annotator='human'),
                                               dict(rater=ben, ranks=[2, 0, 1], annotator='ai')])
    assert [(row['prompt'], row['ranks'], row['raters']) for row in rows[1:]] == [
        ('q', [1, 0], 1), ('s', [1, 0, 2], 2), ('r', [0, 1], 1)]
    said = capsys.readouterr().out
    # of s they agree on no pair: p_o = 1/6; Ben ties one pair of six: p_e = (5/6) / 2 = 5/12; (2/12 - 5/12) / (7/12)
    assert f'{anna} and {ben}: 2 prompts in common; the same on 0.167 of 6 pairs of answers, kappa -0.429' in said
    assert f'{anna} with oneself: 1 prompts ranked twice; the same on 1.000 of 3 pairs' in said
    assert '4 prompts, 2 of them ranked by several raters' in said

def test_merged_files_say_who_said_what(tmp_path, capsys):
    """
    Anna: x > y > z; Ben: y > z > x; Cleo: x = y > z. Anna and Ben agree on y > z alone: p_o = 1/3, p_e = 1/2. Beaten,
    a tie is half: x 2 + 0 + 1.5, y 1 + 2 + 1.5, z 0 + 1 + 0. Anna's second file is hers too: what she said of p again
    does not count. A merged file gives its raters to the next merge, so Cleo is compared with both.
    """
    anna = dict(prompt='p', responses=['x', 'y', 'z'], ranks=[0, 1, 2], annotator='human', rater='anna', seconds=9.5)
    more = [anna | dict(ranks=[2, 1, 0], seconds=1.0), anna | dict(prompt='q')]
    ben = anna | dict(responses=['z', 'y', 'x'], ranks=[1, 0, 2], rater='ben\x1b[2J', seconds=4.0)
    cleo = dict(prompt='p', responses=['x', 'y', 'z'], ranks=[0, 0, 1], annotator='ai')
    at = lambda name, *rows: records(tmp_path / f'{name}.jsonl', rows)
    two, three, files = str(tmp_path / 'two.jsonl'), str(tmp_path / 'three.jsonl'), (at('a', anna), at('b', *more))
    run(collect, merge=','.join((*files, at('c', ben))), out=two)
    said = capsys.readouterr().out
    assert 'anna and ben\ufffd[2J: 1 prompts in common; the same on 0.333 of 3 pairs of answers, kappa -0.333' in said
    assert said.count(' and ') == 1 and f'{two}: 2 prompts, 1 of them ranked by several' in said
    one, other = read_records(two, 'rankings')
    opinions = [dict(rater='anna', ranks=[0, 1, 2], annotator='human', seconds=9.5),
                dict(rater='ben\ufffd[2J', ranks=[2, 0, 1], annotator='human', seconds=4.0)]
    assert one['opinions'] == opinions and other['opinions'] == opinions[:1] and not {'rater', 'seconds'} & one.keys()
    run(collect, merge=f"{two},{at('d', cleo)}", out=three)
    said = capsys.readouterr().out
    assert said.count(' and ') == 3 and f"anna and {tmp_path}/d.jsonl: 1 prompts in common" in said
    one, other = read_records(three, 'rankings')
    assert one['ranks'] == [1, 0, 2] and one['raters'] == 3 and other['raters'] == 1
    assert one['opinions'] == opinions + [dict(rater=f'{tmp_path}/d.jsonl', ranks=[0, 0, 1], annotator='ai')]

@pytest.mark.parametrize('opinions', [7, 'x', [7], [['ranks']], [dict(ranks=[0])], {'rater': 'anna'}])
def test_opinions_that_are_none(tmp_path, capsys, opinions):
    row = dict(prompt='p', responses=['x', 'y'], ranks=[0, 1], opinions=opinions)
    path, out = records(tmp_path / 'a.jsonl', [row]), str(tmp_path / 'out.jsonl')
    said = stops(capsys, collect, merge=f"{path},{records(tmp_path / 'b.jsonl', [row])}", out=out)
    assert said.startswith(f"{path}: wanted `opinions` as --merge writes them: ")
