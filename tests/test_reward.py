"""reward.py: the losses by hand, what a run scores and logs, what normalising leaves. test_stages.py has the rest."""
import math
import os
from types import SimpleNamespace

import pytest
import torch

import reward
from common.batches import Row, encode_rankings, to_table
from common.checkpoints import load_policy, load_reward_model
from common.run import Run
from common.tokens import prompt_ids, response_ids
from common.training import make_optimizer
from model import GPT, GPTConfig
from models import signs
from reward import (bradley_terry_loss, evaluate, margin_of, normalise_rewards, ranking_loss, regression_loss,
                    score_rows, standardise)
from tiny import (COMPARISONS, RANKINGS, TOK, assert_resumes_exactly, assert_same_for_micro_batches, by_hand, records,
                  run, stops)

T = torch.tensor

# ---------------------------------------------------------------------------------------------------------------------
# the losses; -log sigmoid(x) = log(1 + e^-x): 1 -> 0.313262, 0 -> 0.693147, 2 -> 0.126928, -0.5 -> 0.974077

def test_bradley_terry_by_hand():
    chosen, rejected = T([2., 0.], requires_grad=True), T([1., 0.], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected) # (0.313262 + 0.693147) / 2
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.503204)
    # -sigmoid(-1) / 2, -sigmoid(0) / 2: chosen scores rise, rejected ones fall
    assert chosen.grad.tolist() == by_hand([-0.134471, -0.25])
    assert rejected.grad.tolist() == by_hand([0.134471, 0.25])

def test_a_margin_has_to_be_exceeded():
    chosen = T([2., 0.], requires_grad=True)
    loss = bradley_terry_loss(chosen, T([1., 0.]), margin=T([1., 0.5])) # differences 0, -0.5
    loss.backward()
    assert loss.item() == by_hand(0.833612) # (0.693147 + 0.974077) / 2
    assert chosen.grad.tolist() == by_hand([-0.25, -0.311230]) # -sigmoid(0) / 2, -sigmoid(0.5) / 2

def test_ranking_loss_by_hand():
    # C > A > B with scores C 1, A 0, B -1 makes three pairs: CA 1, CB 2, AB 1: (0.313262 + 0.126928 + 0.313262) / 3
    scores = T([[0., -1., 1.]], requires_grad=True)
    loss = ranking_loss(scores, T([[1, 2, 0]]))
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.251150)
    # A loses to C and beats B, by as much: 0. C: -(sigmoid(-1) + sigmoid(-2)) / 3 = -(0.268941 + 0.119203) / 3
    assert scores.grad.tolist() == [by_hand([0.0, 0.129381, -0.129381])]

def test_every_prompt_weighs_the_same_and_absent_answers_nothing():
    scores = T([[0., -1., 1.], [0., 0., 1e6], [5., 5., 5.], [1., 0., 5.]], requires_grad=True)
    ranks = T([[1, 2, 0], [0, 1, -1], [0, 0, 0], [0, 1, 1]])
    loss = ranking_loss(scores, ranks)
    loss.backward()
    # 0.251150 as above; one pair of equal scores 0.693147; all tied: no pair, not counted;
    # a tie for second place: pairs of 1 and -4, (0.313262 + 4.018150) / 2 = 2.165706. Their mean: 3.110003 / 3
    assert loss.item() == by_hand(1.036668)
    assert scores.grad[0].tolist() == by_hand([0.0, 0.043127, -0.043127]) # a third of the above
    assert scores.grad[1].tolist() == by_hand([-1 / 6, 1 / 6, 0.0])
    assert scores.grad[2].tolist() == [0.0, 0.0, 0.0]
    # pairs (0, 1): sigmoid(-1) = 0.268941, (0, 2): sigmoid(4) = 0.982014, over 2 pairs and 3 prompts
    assert scores.grad[3].tolist() == by_hand([-0.208493, 0.044824, 0.163669])
    assert ranking_loss(scores[2:3], ranks[2:3]).item() == 0.0

def test_scores_in_a_table_keep_their_gradients():
    rows = [Row([1], [[2]] * n, {}) for n in (2, 3, 2)]
    assert to_table(T([1, 2, 3, 4, 5, 6, 7]), rows, -1).tolist() == [[1, 2, -1], [3, 4, 5], [6, 7, -1]]
    values = torch.arange(1., 8.).requires_grad_()
    table = to_table(values, rows, 0.0)
    (table * T([[1., 2., 99.], [3., 4., 5.], [6., 7., 99.]])).sum().backward()
    assert table.tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 0]] and values.grad.tolist() == [1, 2, 3, 4, 5, 6, 7]

def test_margins_are_of_comparisons():
    """In rankings `margin` is a key that nothing reads."""
    rows = [dict(chosen='a', rejected='b', margin=0.5), dict(chosen='a', rejected='b'), dict(responses=[], margin='x')]
    assert [margin_of(Row([1], [[2], [3]], record)) for record in rows] == [0.5, 0.0, 0.0]

def test_weight_decay_is_for_matrices_heads_included():
    model = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=4, value_head=True, reward_head=True))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    make_optimizer(model, SimpleNamespace(lr=0.1, weight_decay=0.5)).step()
    decayed = {name for name, p in model.named_parameters() if p.flatten()[0].item() == by_hand(0.95)} # 1 - .1 * .5
    assert decayed == {'wte.weight', 'wpe.weight', 'value_head.weight', 'reward_head.weight', 'h.0.attn.c_attn.weight',
                       'h.0.attn.c_proj.weight', 'h.0.mlp.c_fc.weight', 'h.0.mlp.c_proj.weight'}
    still = {name: p for name, p in model.named_parameters() if name not in decayed} # the head of rewards has no bias
    assert 'value_head.bias' in still and all(name.endswith('bias') or '.ln_' in f".{name}" for name in still)
    assert all((p == 1).all() for p in still.values())

# ---------------------------------------------------------------------------------------------------------------------
# ratings

def rated(*values, ranks=None, key='ratings'):
    """Make a row whose answers have these ratings."""
    ranks = ranks or [sorted(set(values), reverse=True).index(x) for x in values]
    return Row([1], [[2]] * len(values), {'ranks': ranks, key: list(values), 'responses': ['a'] * len(values)})

def test_regression_loss_by_hand():
    scores = T([2., 0., -1.], requires_grad=True)
    loss = regression_loss(scores, T([1., 0., 0.5])) # (1 + 0 + 2.25) / 3
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(1.083333)
    assert scores.grad.tolist() == by_hand([2 / 3, 0.0, -1.0]) # 2 (score - z) / 3

@pytest.mark.parametrize('key', ['ratings', 'scores'])
def test_ratings_are_standardised(key):
    """7, 1 and 4: mean 4, variance (9 + 9 + 0) / 3 = 6. Rankings with `scores` are read alike."""
    rows = [rated(7., 1., key=key), rated(4., key=key)]
    standardise(rows, 'file')
    assert [row.record['ratings'] for row in rows] == [by_hand([1.224745, -1.224745]), by_hand([0.0])]

def test_a_loss_of_ratings_is_a_mean_over_answers():
    """Not over prompts: z 1, -1 | 1; scores 0, 0 | 3: (1 + 1 + 4) / 3 = 2, where prompts would give (1 + 4) / 2."""
    rows = [rated(1., -1.), rated(1.)]
    assert reward.preference_loss(T([0., 0., 3.]), rows, False, 'regression').item() == by_hand(2.0)

def test_held_out_ratings_by_hand():
    """
    z 1, -1 | 0, 0 | 0; scores 3, 1 | 2, 0 | 1: squares 4, 4, 4, 0, 1: 13/5. The correlation: scores less their mean 1.4
    are 1.6, -.4, .6, -1.4, -.4, with z (1.6 + .4) = 2; 2 / sqrt(2 * 5.2), 5.2 their squares' sum. One pair, in order.
    """
    class Fixed(torch.nn.Module):
        def rewards(self, idx, lengths, groups):
            return T([3., 1., 2., 0., 1.])

    rows = [rated(1., -1.), rated(0., 0.), rated(0.)]
    found = evaluate(Fixed(), rows, Run('cpu', 'float32'), loss='regression')
    assert found == {'val_loss': by_hand(2.6), 'val_correlation': by_hand(0.620174), 'val_accuracy': 1.0,
                     'val_shorter_wins': 0.5, 'val_pairs': 1}

def test_lone_answers_are_learnt_without_a_pair():
    class Fixed(torch.nn.Module):
        def rewards(self, idx, lengths, groups):
            return T([0., 2.])

    found = evaluate(Fixed(), [rated(1.), rated(-1.)], Run('cpu', 'float32'), loss='regression')
    assert found == {'val_loss': by_hand(5.0), 'val_correlation': by_hand(-1.0), 'val_pairs': 0} # (1 + 9) / 2

# ---------------------------------------------------------------------------------------------------------------------
# normalising

@pytest.mark.parametrize('bias', [True, False])
def test_normalised_rewards_survive_the_checkpoint(tmp_path, bias):
    model = signs(reward_head=True, bias=bias)
    with torch.no_grad():
        model.reward_head.weight.copy_(T([[1., 2., 4., 8.]]))
    idx, lengths = T([[0, 2], [1, 0], [2, 1]]), T([1, 1, 1])
    normalise_rewards(model, mean=-3.0, std=4.0) # scores -9, -5, 3 before: (s + 3) / 4 = -1.5, -0.5, 1.5
    assert model.rewards(idx, lengths).tolist() == pytest.approx([-1.5, -0.5, 1.5], abs=1e-4)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path)
    assert torch.equal(loaded.rewards(idx, lengths), model.rewards(idx, lengths))
    assert loaded.config == model.config

# ---------------------------------------------------------------------------------------------------------------------
# runs

def scores_alone(model, rows):
    """Each answer of the records scored in a row of its own."""
    out = []
    for r in rows:
        for text in r['responses']:
            ids = prompt_ids(TOK, r['prompt']) + response_ids(TOK, text)
            out.append(model.rewards(T([ids]), T([len(ids)])).item())
    return T(out)

def test_the_first_loss_is_that_of_the_scores(tmp_path, sft_model, data, monkeypatch):
    """With a head of next to nothing every pair costs log 2, and is a tie within rounding."""
    with monkeypatch.context() as m:
        def without_head(*args, **more):
            model = load_policy(*args, **more)
            torch.nn.init.normal_(model.reward_head.weight, std=1e-8)
            return model
        m.setattr(reward, 'load_policy', without_head)
        log = run(reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=data, batch_size=8,
                  max_steps=2)
    assert log[0]['loss'] == by_hand(0.693147) and log[0]['accuracy'] == 0.5
    assert log[1]['loss'] < log[0]['loss'] and set(log[0]) == {'step', 'loss', 'accuracy', 'lr', 'grad_norm', 'time'}

def test_it_learns_and_is_normalised(tmp_path, sft_model, data):
    out = str(tmp_path / 'out')
    log = run(reward, out_dir=out, init_from=sft_model, train_data=data, val_data=data, batch_size=8, max_steps=60,
              lr=0.01, log_every=30, eval_every=30)
    assert log[-1]['val_accuracy'] > 0.9 > log[0]['val_accuracy']
    scores = scores_alone(GPT.from_pretrained(out).eval(), RANKINGS)
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4) and scores.std().item() == pytest.approx(1.0, abs=1e-4)
    # shorter wins: pairs of different rank whose better answer is shorter (equal lengths half a point)
    #   Hi: Hello there > Yo > hm: 0, 0 and ½ = .5 of 3; Who: 0 of 1; A: b before bb, bbbbbb, c: 1 + 1 + ½, the two
    #   before c: 0 + 0, 2.5 of 5; Why: 0 of 1; No: 1 of 1; Up: Down we go and Down before up, 0 of 2; 1: 0 of 1;
    #   x: z before xyxyxyxy and y: 1 + ½, xyxyxyxy before y: 0, 1.5 of 3. In all 5.5 of 17
    assert log[-1]['val_shorter_wins'] == by_hand(0.323529)
    assert 'val_ceiling' not in log[-1]

def test_the_ceiling_is_the_annotators_own_score():
    class Fixed(torch.nn.Module):
        def rewards(self, idx, lengths, groups):
            return T([3., 1., 2., 0., 0.])

    rows = [Row([1], [[2], [3], [4]], dict(responses=['a', 'bb', 'c'], ranks=[0, 1, 2], scores=[5., 4., 6.])),
            Row([1], [[2], [3]], dict(responses=['a', 'b'], ranks=[1, 0]))]
    # model: 3 > 1 and 3 > 2 right, 1 > 2 wrong, 0 = 0 half: 2.5 of 4. The person's scores, for the first prompt alone:
    # 5 > 4 right, 5 > 6 and 4 > 6 wrong. Shorter: a, bb right; a, c half; bb, c wrong; b, a half
    # the loss of 3 - 1, 3 - 2, 1 - 2 is (0.126928 + 0.313262 + 1.313262) / 3 = 0.584484, of 0 - 0 0.693147; their mean
    assert evaluate(Fixed(), rows, Run('cpu', 'float32')) == {
        'val_accuracy': by_hand(0.625), 'val_ceiling': by_hand(1 / 3), 'val_shorter_wins': by_hand(0.5),
        'val_loss': by_hand(0.638815), 'val_pairs': 4}

def test_margins_count_in_the_held_out_loss():
    class Fixed(torch.nn.Module):
        def rewards(self, idx, lengths, groups):
            return T([2., 1., 0., 0.])

    rows = [Row([1], [[2], [3]], dict(chosen='a', rejected='b', responses=['a', 'b'], ranks=[0, 1], margin=margin))
            for margin in (1.0, 0.5)]
    # as in test_a_margin_has_to_be_exceeded; where no training row has a margin, those held out do not count
    for margins, expected in ((True, 0.833612), (False, 0.503204)):
        found = evaluate(Fixed(), rows, Run('cpu', 'float32'), margins)
        assert found['val_loss'] == by_hand(expected) and found['val_pairs'] == 2 and found['val_accuracy'] == 0.75

@pytest.mark.parametrize('rows', [RANKINGS, COMPARISONS])
def test_the_held_out_loss_is_the_training_loss(tmp_path, sft_model, rows):
    """On the same rows, before the first step; lm_coef's part is not in it. At every measurement all is logged."""
    path = records(tmp_path / 'rows.jsonl', rows)
    log = run(reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=path, val_data=path, eval_every=1,
              batch_size=len(rows), max_steps=2)
    held_out, steps = ([line for line in log if key in line] for key in ('val_loss', 'loss'))
    assert [line['step'] for line in held_out] == [0, 1, 2] and [line['step'] for line in steps] == [1, 2]
    for before, after in zip(held_out, steps):
        assert before['val_loss'] == pytest.approx(after['loss'], abs=1e-5)
        assert before['val_accuracy'] == by_hand(after['accuracy'])
        assert before['val_pairs'] == (17 if rows is RANKINGS else 4)
    other = run(reward, out_dir=str(tmp_path / 'lm'), init_from=sft_model, train_data=path, val_data=path, max_steps=1,
                batch_size=len(rows), lm_coef=0.5)
    assert other[0]['val_loss'] == held_out[0]['val_loss'] and other[1]['loss'] > steps[0]['loss'] + 0.1

def test_score_rows_keeps_the_order(sft_model):
    torch.manual_seed(0)
    model = load_policy(sft_model, reward_head=True)
    rows = encode_rankings(TOK, RANKINGS * 9, 64) # more than fit one batch
    got = score_rows(model, rows, Run('cpu', 'float32'))
    torch.testing.assert_close(T(got), scores_alone(model.eval(), RANKINGS * 9), rtol=0, atol=1e-5)

@pytest.mark.parametrize('kind', ['rankings', 'comparisons'])
def test_the_logged_loss_is_that_of_each_answer_alone(tmp_path, sft_model, data, monkeypatch, kind):
    rows = RANKINGS if kind == 'rankings' else COMPARISONS
    path = records(tmp_path / 'rows.jsonl', rows)
    kept = []

    def keep(*args, **more):
        model = load_policy(*args, **more)
        kept.append(scores_alone(model.eval(), [r if 'ranks' in r else dict(prompt=r['prompt'], responses=[
            r['chosen'], r['rejected']]) for r in rows]).tolist())
        return model.train()

    with monkeypatch.context() as m:
        m.setattr(reward, 'load_policy', keep)
        log = run(reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=path, max_steps=1,
                  batch_size=len(rows))
    scores, expected = iter(kept[0]), []
    for r in rows: # straight from the papers' formulas, one pair at a time
        ranks, margin = r.get('ranks', [0, 1]), r.get('margin', 0.0)
        s = [next(scores) for _ in ranks]
        pairs = [math.log(1 + math.exp(s[j] - s[i] + margin)) for i in range(len(s)) for j in range(len(s))
                 if ranks[i] < ranks[j]]
        expected.append(sum(pairs) / len(pairs))
    assert log[0]['loss'] == pytest.approx(sum(expected) / len(expected), abs=1e-5)

def test_lm_coef_adds_the_cross_entropy_of_the_best_answers(tmp_path, sft_model):
    """The mean over the tokens of all best answers of the batch; the best rank need not be 0, and may be shared."""
    rows = [dict(prompt='Hi', responses=['Yo', 'hm', 'Hello'], ranks=[1, 2, 1]), dict(prompt='A', responses=['b', 'c'],
                                                                                   ranks=[3, 0])]
    path, losses = records(tmp_path / 'rows.jsonl', rows), []
    for coef in (0.0, 0.5):
        log = run(reward, out_dir=str(tmp_path / str(coef)), init_from=sft_model, train_data=path, max_steps=1,
                  batch_size=2, lm_coef=coef)
        losses.append(log[0]['loss'])
    model, total, n = GPT.from_pretrained(sft_model).eval(), 0.0, 0
    for prompt, text in (('Hi', 'Yo'), ('Hi', 'Hello'), ('A', 'c')): # 4 + 7 + 3 tokens, space and end included
        ids = prompt_ids(TOK, prompt) + response_ids(TOK, text)
        start = len(prompt_ids(TOK, prompt))
        logp = model(T([ids]))[0].log_softmax(-1)[0]
        total += sum(logp[t - 1, ids[t]].item() for t in range(start, len(ids)))
        n += len(ids) - start
    assert n == 14 and losses[1] - losses[0] == pytest.approx(-0.5 * total / 14, abs=1e-5)

def test_a_margin_in_rankings_is_an_extra_key(tmp_path, sft_model, data):
    other = records(tmp_path / 'more.jsonl', [r | dict(margin='large') for r in RANKINGS])
    logs = [run(reward, out_dir=str(tmp_path / name), init_from=sft_model, train_data=path, max_steps=1)
            for name, path in (('a', data), ('b', other))]
    assert logs[0][0]['loss'] == logs[1][0]['loss']

def test_every_save_is_normalised_and_training_does_not_notice(tmp_path, sft_model, data):
    """A checkpoint on the way is a usable reward model; the weights that train are the others."""
    options = dict(init_from=sft_model, train_data=data, max_steps=3)
    run(reward, out_dir=str(tmp_path / 'once'), save_every=0, **options)
    run(reward, out_dir=str(tmp_path / 'often'), save_every=1, **options)
    read = lambda name: (tmp_path / name / 'model.safetensors').read_bytes()
    assert read('once') == read('often')
    seen, save = [], reward.save_checkpoint

    def saving(run, cfg, model, tok, step, optimizers, **more):
        rows = encode_rankings(TOK, RANKINGS, model.config.block_size)
        rows = [row for row in rows if len(set(row.ranks)) > 1]
        scores = T(score_rows(model, rows, run))
        seen.append((step, scores.mean().item(), scores.std().item()))
        save(run, cfg, model, tok, step, optimizers, **more)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(reward, 'save_checkpoint', saving)
        run(reward, out_dir=str(tmp_path / 'seen'), save_every=1, **options)
    assert [step for step, *_ in seen] == [1, 2, 3]
    for _, mean, std in seen:
        assert (mean, std) == (pytest.approx(0.0, abs=1e-5), pytest.approx(1.0, abs=1e-5))

def test_scores_that_do_not_differ_cannot_be_normalised(tmp_path, sft_model, capsys):
    rows = [dict(prompt='Hi', responses=['Yo', 'Yo'], ranks=[0, 1])] * 4
    said = stops(capsys, reward, code=1, out_dir=str(tmp_path / 'out'), init_from=sft_model, batch_size=4, max_steps=1,
                 train_data=records(tmp_path / 'same.jsonl', rows))
    assert 'the scores of the training answers do not differ' in said
    assert set(os.listdir(tmp_path / 'out')) == {'.lock', 'log.jsonl'}

# ---------------------------------------------------------------------------------------------------------------------
# runs on ratings

NUMBERS = iter([7, 2, 4, 9, 3, 8, 8, 1, 5, 5, 6, 2, 10, 4, 4, 9, 1, 3, 7, 6, 5])
RATINGS = [dict(prompt=row['prompt'], response=text, score=next(NUMBERS)) for row in RANKINGS
           for text in row['responses']]
RATINGS += [dict(prompt='Alone', response='one', score=9), dict(prompt='Alone too', response='two', score=1)]

@pytest.fixture
def ratings(tmp_path):
    return records(tmp_path / 'ratings.jsonl', RATINGS)

def test_it_learns_ratings(tmp_path, sft_model, ratings, capsys):
    """Held-out and training loss are alike on the same rows, and the scores are normalised as ever."""
    out, n = str(tmp_path / 'out'), len({row['prompt'] for row in RATINGS})
    log = run(reward, out_dir=out, init_from=sft_model, train_data=ratings, val_data=ratings, loss='regression',
              lr=0.01, batch_size=n, max_steps=60, eval_every=20)
    steps, held_out = ([line for line in log if key in line] for key in ('loss', 'val_loss'))
    assert held_out[0]['val_loss'] == pytest.approx(steps[0]['loss'], abs=1e-5)
    assert held_out[-1]['val_correlation'] > 0.95 and held_out[-1]['val_accuracy'] > 0.9
    assert held_out[0]['val_loss'] > 1 > 0.2 > held_out[-1]['val_loss'] # guessing the mean costs 1, the variance of z
    scores = scores_alone(GPT.from_pretrained(out).eval(), [row | dict(responses=[row['response']]) for row in RATINGS])
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-4) and scores.std().item() == pytest.approx(1.0, abs=1e-4)
    assert f"{len(RATINGS)} ratings of {len(RATINGS)} answers, 0 of them rated several times" in capsys.readouterr().out

def test_the_first_regression_loss_is_the_variance(tmp_path, sft_model, ratings, monkeypatch):
    def without_head(*args, **more):
        model = load_policy(*args, **more)
        torch.nn.init.zeros_(model.reward_head.weight)
        return model
    monkeypatch.setattr(reward, 'load_policy', without_head)
    log = run(reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=ratings, batch_size=10,
              max_steps=2, loss='regression')
    assert log[0]['loss'] == by_hand(1.0) and log[1]['loss'] < 1

def test_several_raters_and_rankings_with_scores_are_the_same_ratings(tmp_path, sft_model, ratings, capsys):
    """Each rater 1 above or below; or all in one ranking per prompt, which then are measured alike."""
    two = [records(tmp_path / f'{by}.jsonl', [row | dict(score=row['score'] + by) for row in RATINGS])
           for by in (1, -1)]
    rows = [row | dict(scores=[x['score'] for x in RATINGS if x['prompt'] == row['prompt']]) for row in RANKINGS]
    rows = [row | dict(ranks=[0] * len(row['ranks'])) for row in rows] # ties are no reason to leave them out
    files = dict(one=ratings, two=','.join(two))
    logs = {name: run(reward, out_dir=str(tmp_path / name), init_from=sft_model, train_data=path, max_steps=2, seed=1,
                      loss='regression') for name, path in files.items()}
    for a, b in zip(*logs.values()):
        assert a['loss'] == by_hand(b['loss'])
    n = len(RATINGS)
    assert f"{2 * n} ratings of {n} answers, {n} of them rated several times: 2.00 apart" in capsys.readouterr().out
    one = records(tmp_path / 'one.jsonl', [row for row in RATINGS if 'Alone' not in row['prompt']])
    scored = records(tmp_path / 'scored.jsonl', rows)
    logs = [run(reward, out_dir=str(tmp_path / name), init_from=sft_model, train_data=path, max_steps=1, batch_size=8,
                loss='regression')[0]['loss'] for name, path in (('a', one), ('b', scored))]
    assert logs[0] == by_hand(logs[1])

@pytest.mark.parametrize('lm_coef', [0.0, 0.5])
def test_regression_sums_over_micro_batches_and_resumes_exactly(tmp_path, sft_model, ratings, monkeypatch, lm_coef):
    options = dict(init_from=sft_model, train_data=ratings, loss='regression', lm_coef=lm_coef, batch_size=8)
    assert_same_for_micro_batches(monkeypatch, tmp_path, reward, ['loss', 'accuracy'], max_steps=1, **options)
    assert_resumes_exactly(tmp_path, reward, **options)

def test_answers_rated_above_the_mean_are_learnt_to_be_written(tmp_path, sft_model):
    """Scores 1, 2 and 9, mean 4: the third alone, 3 tokens with space and end. Its prompt has no other answer."""
    rows = [dict(prompt='Hi', response='Yo', score=1), dict(prompt='Hi', response='hm', score=2),
            dict(prompt='A', response='c', score=9)]
    path, losses = records(tmp_path / 'rows.jsonl', rows), []
    for coef in (0.0, 0.5):
        log = run(reward, out_dir=str(tmp_path / str(coef)), init_from=sft_model, train_data=path, max_steps=1,
                  batch_size=2, lm_coef=coef, loss='regression')
        losses.append(log[0]['loss'])
    model, ids = GPT.from_pretrained(sft_model).eval(), prompt_ids(TOK, 'A') + response_ids(TOK, 'c')
    logp = model(T([ids]))[0].log_softmax(-1)[0]
    total = sum(logp[t - 1, ids[t]].item() for t in range(len(ids) - 3, len(ids)))
    assert losses[1] - losses[0] == pytest.approx(-0.5 * total / 3, abs=1e-5)

def test_lone_answers_alone_can_be_trained_on(tmp_path, sft_model):
    path = records(tmp_path / 'rows.jsonl', RATINGS[-2:])
    log = run(reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=path, val_data=path, max_steps=2,
              batch_size=2, loss='regression', lm_coef=0.5)
    assert 'accuracy' not in log[-2] and log[-1]['val_pairs'] == 0 and 'val_accuracy' not in log[-1]

def test_ratings_make_pairs_too(tmp_path, sft_model, ratings):
    """The default loss takes the pairs that they imply."""
    rows = [row | dict(ranks=[-x['score'] for x in RATINGS if x['prompt'] == row['prompt']]) for row in RANKINGS]
    rows = [row | dict(ranks=[rank + 10 for rank in row['ranks']]) for row in rows]
    logs = [run(reward, out_dir=str(tmp_path / name), init_from=sft_model, train_data=path, max_steps=1, batch_size=8)
            for name, path in (('a', ratings), ('b', records(tmp_path / 'rankings.jsonl', rows)))]
    assert logs[0][0]['loss'] == by_hand(logs[1][0]['loss'])

@pytest.mark.parametrize('rows, options, expected', [
    (RATINGS, dict(loss='mse'), "--loss=mse: loss must be pairwise or regression, got 'mse'"),
    (RANKINGS, dict(loss='regression'), '{path}: wanted ratings, or rankings with `scores`, that differ, with'),
    (COMPARISONS, dict(loss='regression'), '{path}: wanted ratings, or rankings with `scores`'),
    ([row | dict(score=3) for row in RATINGS], dict(loss='regression'),
     '{path}: wanted ratings, or rankings with `scores`, that differ'),
    ([row | dict(score=3) for row in RATINGS], dict(), 'all answers of every prompt tie'),
    ([dict(prompt='Hi', response='Yo', label=True)], dict(loss='regression'), 'wanted rankings'),
])
def test_bad_ratings(tmp_path, sft_model, capsys, rows, options, expected):
    path = records(tmp_path / 'rows.jsonl', rows)
    said = stops(capsys, reward, out_dir=str(tmp_path / 'out'), init_from=sft_model, train_data=path, **options)
    assert expected.format(path=path) in said and not os.path.exists(tmp_path / 'out')
