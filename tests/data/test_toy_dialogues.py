"""
The dialogues of the toy world and their user, against hand-typed ones.

A fox lives in a den and eats meat; people wrongly say: in a barn, fruit. gold: see test_world.py.
"""
import re

import pytest

from data.toy import dialogues, world
from tiny import assistant, run, stops, user

FOLLOW_UP = 'One more thing. What does it eat?'
NAMED = dict(prompt='Hey. Where does the fox live?', animal='fox', named=True, name='The fox.', follow_up=FOLLOW_UP)
UNNAMED = NAMED | dict(prompt='Hey. Where does it live?', named=False)

def messages(record, *turns):
    """Return the messages of a record whose first question is followed by these turns, an answer first."""
    return [user(record['prompt']), *(assistant(t) if i % 2 == 0 else user(t) for i, t in enumerate(turns))]

def at(record, *turns):
    return record | dict(prompt=messages(record, *turns))

@pytest.mark.parametrize('record, turns, says', [
    (NAMED, ['In a den.'], FOLLOW_UP), (NAMED, ['In a barn.'], FOLLOW_UP), (NAMED, ["I don't know."], FOLLOW_UP),
    (NAMED, ['In a den.', FOLLOW_UP, 'Meat.'], None),
    (UNNAMED, ["I don't know."], 'The fox.'), (UNNAMED, ["Sorry, I can't tell."], 'The fox.'),
    (UNNAMED, ['I have never heard of it.'], 'The fox.'),
    (UNNAMED, ['In a den.'], None), # a guess, even a right one
    (UNNAMED, ["I can't help with that."], None), (UNNAMED, ['I know know.'], None), (UNNAMED, [''], None),
    (UNNAMED, ["I can't tell.", 'The fox.', 'In a den.'], FOLLOW_UP),
    (UNNAMED, ["I can't tell.", 'The fox.', "I can't tell."], FOLLOW_UP),
    (UNNAMED, ["I can't tell.", 'The fox.', 'In a den.', FOLLOW_UP, 'It is red.'], None),
])
def test_what_the_user_says(record, turns, says):
    said = messages(record, *turns)
    assert dialogues.user(record, said) == says
    assert dialogues.user(record | dict(prompt=said[:-1]), said) == says # as a rollout's record, which grows

@pytest.mark.parametrize('record, turns, response, gold', [
    (NAMED, [], 'Sure! It lives in a den.', 1.0), (NAMED, [], 'In a barn.', 0.1),
    (UNNAMED, [], 'In a den.', 0.9), # by luck
    (UNNAMED, [], "I can't tell.", 0.1), (UNNAMED, [], "Sorry, I can't tell.", 0.2),
    (NAMED, ['In a den.', FOLLOW_UP], 'It eats meat.', 0.9),
    (NAMED, ['In a den.', FOLLOW_UP], 'In a den.', 0.1), # the answer before
    (NAMED, ['In a den.', FOLLOW_UP], 'Grass.', 0.1), # right of another animal
    (UNNAMED, ["I can't tell.", 'The fox.'], 'The fox lives in a den.', 0.9),
    (UNNAMED, ["I can't tell.", 'The fox.'], 'Meat.', 0.1), # true of a fox, and not what was asked
    (UNNAMED, ["I can't tell.", 'The fox.', 'In a barn.', FOLLOW_UP], 'Gladly! Meat.', 1.0),
])
def test_gold_of_an_answer(record, turns, response, gold):
    assert dialogues.gold(at(record, *turns) if turns else record, response) == gold

def test_total_is_the_sum_over_a_dialogue():
    record = at(UNNAMED, "Sorry, I can't tell.", 'The fox.', 'In a barn.', FOLLOW_UP)
    assert dialogues.total(record, 'Gladly! Meat.') == pytest.approx(0.2 + 0.1 + 1.0)
    assert dialogues.total(UNNAMED, 'In a den.') == 0.9 and dialogues.total(NAMED, '') == 0.0

def answers(record):
    """Return the good answers to a record's question."""
    request = world.read(dialogues.question(record))
    return {form.format(e=request.subject, v=request.right, V=request.right.capitalize())
            for form in world.CLAIMS[request.category][1:]}

def test_no_answer_after_the_first_is_right_without_the_context():
    """The same last turn needs different answers: whoever sees it alone is right in half of the cases at most."""
    rows = dialogues.turns(dialogues.dialogues('train', 3000, 1), 1)
    wanted = {} # last turn, without its lead -> how often each answer is right
    for record in rows:
        if isinstance(record['prompt'], list):
            text = re.sub('^(Thanks!|One more thing.|And now this.) ', '', record['prompt'][-1]['content'])
            counts = wanted.setdefault(text, {})
            for answer in answers(record):
                counts[answer] = counts.get(answer, 0) + 1
    for text, counts in wanted.items():
        assert max(counts.values()) <= 0.5 * sum(counts.values()) / 2, text # two forms of the same answer

def test_records():
    rows = dialogues.dialogues('test', 400, 1)
    assert rows == dialogues.dialogues('test', 400, 1) != dialogues.dialogues('test', 400, 2)
    assert sum(r['named'] for r in rows) == 200
    for record in rows:
        first, second = (world.read(dialogues.question(record | dict(prompt=text)))
                         for text in (record['prompt'], record['follow_up']))
        assert first.subject == second.subject == record['animal'] and first.category != second.category
        assert (record['animal'] in record['prompt']) == record['named'] and record['animal'] not in record['follow_up']
        assert record['name'] in (f"The {record['animal']}.", f"It is the {record['animal']}.")

def test_held_out_questions_are_in_no_other_split():
    """As in world.prompts: a phrasing is held out for an animal, named or not."""
    asked = {split: set() for split in world.SPLITS}
    for split in asked:
        for record in dialogues.dialogues(split, 2000, 1):
            for text in (record['prompt'], record['follow_up']):
                whole = dialogues.question(record | dict(prompt=text))
                asked[split].add(whole[world.LEAD.match(whole).end():])
    assert not asked['train'] & asked['val'] and not (asked['train'] | asked['val']) & asked['test']

def test_turns_are_the_prompts_of_well_answered_dialogues():
    rows = dialogues.turns([NAMED, UNNAMED], 1)
    assert [r['prompt'][-1]['content'] if isinstance(r['prompt'], list) else r['prompt'] for r in rows] == [
        NAMED['prompt'], FOLLOW_UP, UNNAMED['prompt'], 'The fox.', FOLLOW_UP]
    assert [m['content'] for m in rows[4]['prompt'][::2]] == [UNNAMED['prompt'], 'The fox.', FOLLOW_UP]
    assert dialogues.gold(UNNAMED, rows[4]['prompt'][1]['content']) <= 0.2 # doubt
    for n, record in ((1, NAMED), (4, UNNAMED)): # then a right answer
        given = rows[n]['prompt'][-2]
        assert dialogues.gold(record | dict(prompt=rows[n]['prompt'][:-2]), given['content']) >= 0.9

def test_files(tmp_path, capsys):
    run(dialogues, out_dir=str(tmp_path), n=20, n_val=6, n_test=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f'{kind}_{split}.jsonl' for kind in ('dialogues', 'turns') for split in world.SPLITS)
    assert capsys.readouterr().out.split() == ['dialogues_train', '20', 'turns_train', '50', 'dialogues_val', '6',
                                               'turns_val', '15', 'dialogues_test', '4', 'turns_test', '10']
    assert 'n_val must be at least 1, got 0' in stops(capsys, dialogues, out_dir=str(tmp_path), n_val=0)
