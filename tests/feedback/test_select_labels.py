"""feedback/select_labels.py: disagreement and farthest-first by hand, and which prompts collect.py then ranks."""
import numpy as np
import pytest
import torch

import collect
from common.checkpoints import load_reward_model
from common.records import read_records
from common.tokens import prompt_ids, response_ids
from data.toy import world
from feedback import select_labels
from feedback.scores import score_records
from feedback.select_labels import disagreement, farthest_first, most_uncertain, words_of
from tiny import TOK, by_hand, checkpoint, records, run, stops

def test_disagreement_by_hand():
    # two answers: the models see differences of 1 and 3; mean 2, both 1 away from it
    assert disagreement([[1., 0.], [5., 2.]]) == by_hand(1.0)
    # all that differs is a constant: 100 on both of the second model's scores
    assert disagreement([[1., 0.], [101., 100.]]) == by_hand(0.0)
    # pairs 0-1, 0-2, 1-2: differences (0, 0), (2, -2), (2, -2); standard deviations 0, 2, 2, mean 4/3
    assert disagreement([[1., 1., -1.], [0., 0., 2.]]) == by_hand(4 / 3)
    # three models, differences 0, 3, 6: mean 3, variance (9 + 0 + 9)/3 = 6
    assert disagreement([[0., 0.], [3., 0.], [0., -6.]]) == by_hand(6 ** 0.5)

def test_most_uncertain_first():
    scores = [[[0., 0.], [1., 0.]], [[0., 0.], [9., 0.]], [[7., 7., 7.], [-7., -7., -7.]], [[0., 0., 0.], [4., 0., 0.]]]
    assert most_uncertain(scores, 3) == [1, 3, 0] # 4.5; (2 + 2 + 0)/3; 0.5; and 0, however far apart the scores are

def test_words():
    table = words_of([dict(responses=['b a', 'a']), dict(responses=['c']), dict(responses=['a c', 'c'])])
    assert table.tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 1]] # a b c

def test_farthest_first_by_hand():
    """
    Sets A = {1 2}, B = {1 2 3}, C = {4}, D = {2 3}, E = {1 2}. From A: B 1 - 2/3, C 1, D 1 - 1/3, E 0: C is next. From
    A or C: B 1/3, D 2/3, E 0: D. From A, C or D: B 1/3 (D's is 1/3 too), E 0: B, and E last, being A again.
    """
    table = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=np.float32)
    assert farthest_first(table, 5) == [0, 2, 3, 1, 4]
    assert farthest_first(table, 2) == [0, 2] and farthest_first(table, 99) == [0, 2, 3, 1, 4]
    assert farthest_first(np.ones((3, 2), dtype=np.float32), 3) == [0, 1, 2] # all alike: each once all the same

def test_scores_of_records(tmp_path):
    """Each score is that of prompt, answer and end of text alone; what does not fit the context is left out."""
    folder = checkpoint(tmp_path / 'reward', reward_head=True)
    model, rows = load_reward_model(folder), [dict(prompt='Hi', responses=['Yo', 'Hello']),
                                              dict(prompt='Hi', responses=['x' * 100, 'y']),
                                              dict(prompt='Who?', responses=['me', 'you', 'us'])]
    scored = score_records(model, TOK, rows, 64, 'rows', 'cpu')
    assert [record for record, _ in scored] == [rows[0], rows[2]]
    for record, scores in scored:
        ids = [prompt_ids(TOK, record['prompt']) + response_ids(TOK, text) for text in record['responses']]
        alone = [model.rewards(torch.tensor([row]), torch.tensor([len(row)])).item() for row in ids]
        assert scores == pytest.approx(alone, abs=1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# runs

@pytest.fixture
def given(tmp_path):
    prompts = [dict(prompt=p['prompt'], number=i) for i, p in enumerate(world.prompts('train', 10, 1))]
    return dict(gold='data.toy.world:gold', policy=checkpoint(tmp_path / 'sft'),
                prompts=records(tmp_path / 'prompts.jsonl', prompts), n_answers=3, max_new_tokens=5, rows=3)

def test_selected_prompts_keep_the_answers_they_would_have_had(tmp_path, given):
    at = lambda name: str(tmp_path / f'{name}.jsonl')
    run(collect, out=at('all'), noise=0.0, **given)
    ensemble = ','.join(checkpoint(tmp_path / f'reward{seed}', seed=seed, reward_head=True) for seed in (1, 2, 3))
    everything, chosen = {row['number']: row for row in read_records(at('all'), 'rankings')}, {}
    for select, more in (('random', {}), ('diverse', {}), ('uncertain', dict(ensemble=ensemble))):
        for budget in (2, 5):
            run(collect, out=at(f'{select}{budget}'), noise=0.0, select=select, budget=budget, **more, **given)
            rows = read_records(at(f'{select}{budget}'), 'rankings')
            assert len(rows) == budget and all(row == everything[row['number']] for row in rows)
            chosen[select, budget] = [row['number'] for row in rows]
        assert chosen[select, 5][:2] == chosen[select, 2] # in order of worth
    assert len(set(map(tuple, chosen.values()))) == 6
    # the answers of a file are chosen from alike
    run(collect, out=at('again'), noise=0.0, select='diverse', budget=5, answers=at('all'), gold=given['gold'])
    assert [row['number'] for row in read_records(at('again'), 'rankings')] == chosen['diverse', 5]

def test_uncertain_takes_the_prompts_with_the_largest_disagreement(tmp_path, given, monkeypatch):
    """Scores typed in: the first model finds all equal, the second answer k of record n n * k (n = 7: none)."""
    calls = []

    def scoring(model, tok, rows, *_):
        calls.append(1)
        return [(row, [0.0 if len(calls) == 1 or i == 7 else 1.0 * i * k for k in range(len(row['responses']))])
                for i, row in enumerate(rows) if i != 9] # the tenth does not fit
    monkeypatch.setattr(select_labels, 'score_records', scoring)
    rankings = records(tmp_path / 'r.jsonl', [dict(prompt=f'{n}', responses=['a', 'b', 'c'], ranks=[0, 1, 2], number=n)
                                              for n in range(10)])
    folder, out = checkpoint(tmp_path / 'reward', reward_head=True), str(tmp_path / 'out.jsonl')
    monkeypatch.setattr(world, 'gold', lambda prompt, response: float(ord(response or ' ')))
    run(collect, answers=rankings, gold='data.toy.world:gold', out=out, select='uncertain',
        ensemble=f'{folder},{folder}', budget=3)
    assert [row['number'] for row in read_records(out, 'rankings')] == [8, 6, 5]

def test_an_ensemble_is_checked_before_anything_is_sampled(tmp_path, given, monkeypatch, capsys):
    def sampling(*args):
        raise AssertionError('sampled')

    monkeypatch.setattr(collect, 'sample_answers', sampling)
    good = checkpoint(tmp_path / 'good', reward_head=True)
    short = checkpoint(tmp_path / 'short', reward_head=True, block_size=32)
    wide = checkpoint(tmp_path / 'wide', reward_head=True, vocab_size=TOK.n_vocab + 7)
    for other, expected in ((str(tmp_path / 'nowhere'), 'nowhere: no such folder'),
                            (given['policy'], 'is a language model, wanted a reward model'),
                            (short, f"--ensemble={short}: its context is 32 tokens, the policy's 64"),
                            (wide, f"--ensemble={wide}: its vocabulary has 264 tokens, the policy's has 257")):
        assert expected in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), select='uncertain', budget=2,
                                 ensemble=f'{good},{other}', **given)

@pytest.mark.parametrize('options, expected', [
    (dict(select='best', budget=2), "--select=best: select must be random, uncertain, diverse or empty, got 'best'"),
    (dict(select='random'), 'budget must be at least 1 with select, else 0, got 0'),
    (dict(budget=3), '--budget=3: budget must be at least 1 with select, else 0, got 3'),
    (dict(select='uncertain', budget=3), "ensemble must be two reward models or more with select=uncertain"),
    (dict(select='diverse', budget=3, ensemble='a,b'), "else empty, got 'a,b'"),
    (dict(select='uncertain', budget=3, ensemble='nowhere,there'), 'nowhere'),
])
def test_bad_options(tmp_path, given, capsys, options, expected):
    assert expected in stops(capsys, collect, out=str(tmp_path / 'r.jsonl'), **given | options)
    assert not (tmp_path / 'r.jsonl').exists() and not (tmp_path / 'r.jsonl.partial').exists()
