"""model.py against an independent GPT-2 (transformers, or numbers it once computed), and against values by hand."""
import math
import random

import pytest
import torch

import model as model_module
from common.batches import Row, collate_answers
from model import GPT, GPTConfig, sample_token, token_entropy, token_logp
from models import (GREEDY, IDX, LOGITS, SCORES, all_values, close, formula_folder, full_logp, hf_greedy, hf_score,
                    ragged, random_model, rotor, signs, three_tokens)
from tiny import one_line

# ---------------------------------------------------------------------------------------------------------------------
# numbers that transformers computed

def test_logits_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path))
    logits, loss = model(torch.tensor([IDX]))
    torch.testing.assert_close(logits, torch.tensor([LOGITS]), **close)
    assert loss is None

def test_greedy_answers_to_ragged_prompts_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path))
    assert model.generate([p for p, _ in GREEDY], 5, temperature=0) == [answer for _, answer in GREEDY]

def test_reward_scores_equal_the_stored_ones(tmp_path):
    model = GPT.from_pretrained(formula_folder(tmp_path, reward=True))
    idx, lengths = ragged([row for row, _ in SCORES], fill=4)
    torch.testing.assert_close(model.rewards(idx, lengths), torch.tensor([s for _, s in SCORES]), **close)

def test_stored_numbers_are_those_of_transformers(hf, tmp_path):
    theirs = hf.GPT2LMHeadModel.from_pretrained(formula_folder(tmp_path / 'lm')).eval()
    torch.testing.assert_close(theirs(torch.tensor([IDX])).logits, torch.tensor([LOGITS]), **close)
    assert all(hf_greedy(theirs, prompt, 5) == answer for prompt, answer in GREEDY)
    theirs = hf.GPT2ForSequenceClassification.from_pretrained(formula_folder(tmp_path / 'rm', reward=True)).eval()
    assert all(hf_score(theirs, row) == pytest.approx(score, abs=1e-5) for row, score in SCORES)

# ---------------------------------------------------------------------------------------------------------------------
# generation

RAGGED = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [10, 0], [0, 0, 7, 7, 7, 7]]

def alone(model, prompt, n, eos=None):
    """Return greedy tokens and their log-probabilities, the whole forward again for every token."""
    ids, logps = list(prompt), []
    while len(logps) < n and (not logps or ids[-1] != eos):
        logp = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        ids.append(logp.argmax().item())
        logps.append(logp.max().item())
    return ids[len(prompt):], logps

def test_cached_logits_equal_uncached_ones_at_every_step(monkeypatch):
    model, seen, real = random_model(), [], sample_token
    monkeypatch.setattr(model_module, 'sample_token', lambda logits, *a: (seen.append(logits), real(logits, *a))[1])
    torch.manual_seed(1)
    answers = model.generate(RAGGED, 8)
    assert len(seen) == 8 and [len(a) for a in answers] == [8] * 5
    for step, logits in enumerate(seen):
        for row, (prompt, answer) in enumerate(zip(RAGGED, answers)):
            expected = model(torch.tensor([prompt + answer[:step]]))[0][0, -1]
            torch.testing.assert_close(logits[row], expected, **close)

@pytest.mark.parametrize('eos', [None, 4])
def test_recorded_logp_equals_the_full_forwards(eos):
    model = random_model()
    torch.manual_seed(2)
    answers, logps = model.generate_with_logp(RAGGED * 4, 8, eos=eos)
    assert len({len(a) for a in answers}) > 1 or eos is None # rows did end at different times
    for prompt, answer, logp in zip(RAGGED * 4, answers, logps):
        full = full_logp(model(torch.tensor([prompt + answer]))[0], torch.tensor([prompt + answer]))
        torch.testing.assert_close(torch.tensor(logp), full[0, len(prompt) - 1:], **close)

def test_a_ragged_row_equals_the_row_alone_and_ends_of_others_do_not_matter():
    model = random_model(seed=3)
    answers, logps = model.generate_with_logp(RAGGED, 8, temperature=0)
    for prompt, answer, logp in zip(RAGGED, answers, logps):
        expected, expected_logp = alone(model, prompt, 8)
        assert answer == expected and logp == pytest.approx(expected_logp, abs=1e-5)
    for eos in range(11): # each token in turn ends some rows early and others never
        cut = [a[:a.index(eos) + 1] if eos in a else a for a in answers]
        assert model.generate(RAGGED, 8, temperature=0, eos=eos) == cut

def test_rows_that_end_leave_the_batch(monkeypatch):
    model, sizes, embed = rotor(), [], GPT.trunk
    monkeypatch.setattr(GPT, 'trunk', lambda self, idx, *a, **k: (
        sizes.append(tuple(idx.shape)), embed(self, idx, *a, **k))[1])
    prompts = [[5], [7, 6], [1, 7, 4], [0, 0, 7, 2]] # token 7 is the end; in a prompt it is harmless
    answers = model.generate(prompts, 4, temperature=0, eos=7)
    assert answers == [[6, 7], [7], [5, 6, 7], [3, 4, 5, 6]] # the end is kept; the last row stops at four tokens
    # whole prompts; then one token a row: 3 rows are left of 4, then 2, then 1
    assert sizes == [(4, 4), (3, 1), (2, 1), (1, 1)]

def test_a_row_that_ended_is_silent_while_it_waits_in_the_batch(monkeypatch):
    sizes, embed = [], GPT.trunk
    monkeypatch.setattr(GPT, 'trunk', lambda self, idx, *a, **k: (sizes.append(len(idx)), embed(self, idx, *a, **k))[1])
    # one end of six rows does not yet pay for moving the cache: 5 > 0.8 * 6; the second leaves 4 <= 4.8
    answers = rotor().generate([[6], [5, 5], [0], [0, 1], [1], [2, 2, 2]], 4, temperature=0, eos=7)
    assert answers == [[7], [6, 7], [1, 2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert sizes == [6, 6, 4, 4]

def test_a_compiled_step_says_the_same():
    """One shape while answers grow and rows end, so it is compiled once; and once more where more room is needed."""
    model, compiled = random_model(seed=3, block_size=300), []
    few, many = [RAGGED * 2, [[1, 2, 3] * 40, [4]]], [] # room for 128 tokens, and for 256
    for prompts in few:
        many += [model.generate(prompts, n, temperature=0, eos=4) for n in (8, 15)]
    torch.compiler.reset()
    model.compile_decoding(backend=lambda graph, inputs: (compiled.append(graph), graph.forward)[1])
    for prompts in few:
        for n in (8, 15):
            assert model.generate(prompts, n, temperature=0, eos=4) == many.pop(0)
    assert len(compiled) == 3 # 10 rows of 128, 2 rows of 128 and of 256
    for eos in range(11): # each token in turn ends rows, and they stay
        answers = model.generate(RAGGED * 2, 8, temperature=0)
        cut = [a[:a.index(eos) + 1] if eos in a else a for a in answers]
        assert model.generate(RAGGED * 2, 8, temperature=0, eos=eos) == cut
    assert len(compiled) == 3

@pytest.mark.parametrize('n', [1, 2, 5])
def test_max_new_tokens_is_respected(n):
    assert rotor().generate([[1], [2, 3]], n, temperature=0) == [[2, 3, 4, 5, 6][:n], [4, 5, 6, 7, 0][:n]]

def test_an_answer_may_fill_the_context_and_no_more():
    model = random_model()
    prompt = [1] * 12
    assert model.generate([prompt, [2]], 4, temperature=0) == [alone(model, prompt, 4)[0], alone(model, [2], 4)[0]]
    with pytest.raises(ValueError, match='context of 16'):
        model.generate([prompt], 5)
    with pytest.raises(ValueError, match='context of 16'):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match='empty prompt'):
        model.generate([[1], []], 4)

@pytest.mark.parametrize('how', [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)])
def test_narrow_sampling_is_greedy(how):
    model = random_model(seed=3)
    torch.manual_seed(4)
    assert model.generate(RAGGED, 8, **how) == [alone(model, prompt, 8)[0] for prompt in RAGGED]

def test_generation_switches_dropout_off_and_back():
    model = random_model(seed=3, dropout=0.5)
    expected = [alone(model, prompt, 8)[0] for prompt in RAGGED]
    model.train()
    assert model.generate(RAGGED, 8, temperature=0) == expected and model.training
    with pytest.raises(ValueError):
        model.generate([[]], 1)
    assert model.training

def test_stream_yields_the_tokens_of_generate():
    steps = [(rows.tolist(), tokens.tolist()) for rows, tokens, _ in rotor().stream([[5], [3]], 3, 0, eos=7)]
    assert steps == [([0, 1], [6, 4]), ([0, 1], [7, 5]), ([1], [6])]

# probabilities 1/2, 3/10, 1/5, 0, in another order. 20000 draws; five standard deviations sqrt(20000 p (1-p)) are at
# most 5 * 70.7 = 354. At temperature 2 a probability's root counts: .707107 .547723 .447214, of 1.702044 in all.
@pytest.mark.parametrize('how, p', [
    (dict(), [0.3, 0.0, 0.5, 0.2]),
    (dict(temperature=2.0), [0.321803, 0.0, 0.415446, 0.262751]),
    (dict(top_k=2), [0.375, 0.0, 0.625, 0.0]), # 3/8 and 5/8
    (dict(top_k=9), [0.3, 0.0, 0.5, 0.2]), # more than there are tokens
    (dict(top_p=0.6), [0.375, 0.0, 0.625, 0.0]), # 1/2 does not reach .6, with 3/10 it does
    (dict(top_p=0.9), [0.3, 0.0, 0.5, 0.2]),
    (dict(top_k=2, top_p=0.55), [0.0, 0.0, 1.0, 0.0]), # of the two that stay, 5/8 alone reaches .55
])
def test_sample_token_draws_by_the_probabilities(how, p):
    torch.manual_seed(5)
    logits = torch.log(torch.tensor([0.3, 0.0, 0.5, 0.2])) + 2.0
    tokens, logp = sample_token(logits.repeat(20000, 1), **how)
    counts = torch.bincount(tokens, minlength=4).tolist()
    for word in range(4):
        assert abs(counts[word] - 20000 * p[word]) <= 5 * math.sqrt(20000 * p[word] * (1 - p[word]))
        assert p[word] > 0 or counts[word] == 0
    assert logp.tolist() == pytest.approx([math.log(p[t]) for t in tokens.tolist()], abs=2e-6)

@pytest.mark.parametrize('u, word', [(0.0, 1), (0.499999, 1), (0.500001, 3), (1 - 2 ** -53, 3)])
def test_tokens_of_probability_zero_are_never_drawn(monkeypatch, u, word):
    """The smallest and the largest random number that there is, with impossible tokens first, between and last."""
    monkeypatch.setattr(torch, 'rand', lambda *size, dtype=None, device=None: torch.full(size, u, dtype=dtype))
    tokens, _ = sample_token(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).log())
    assert tokens.tolist() == [word]

class OnApple(torch.Tensor):
    """A tensor as on an Apple GPU: it says mps, and there is no float64."""
    device = property(lambda self: torch.device('mps'))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if (kwargs or {}).get('dtype') is torch.float64:
            raise TypeError('mps has no float64')
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs)

def test_apples_gpus_draw_the_same(monkeypatch):
    torch.manual_seed(8)
    logits = torch.randn(5, 40)
    torch.manual_seed(9)
    tokens, logp = sample_token(logits)
    monkeypatch.setattr(torch.Tensor, 'to', lambda self, device: self.as_subclass(OnApple)) # from the CPU, and back
    torch.manual_seed(9)
    there = sample_token(logits.as_subclass(OnApple))
    assert [x.device.type for x in there] == ['mps', 'mps']
    assert there[0].tolist() == tokens.tolist() and there[1].tolist() == logp.tolist()

def test_rows_of_a_batch_are_drawn_independently():
    torch.manual_seed(6)
    tokens, _ = sample_token(torch.zeros(2000, 2))
    same = (tokens[:1000] == tokens[1000:]).sum().item()
    assert abs(same - 500) <= 79 # five standard deviations, 5 * sqrt(1000 / 4)

# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities, losses, heads

def test_token_logp_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).log() + torch.tensor(4.0)
    idx, mask = torch.tensor([[1, 2, 0], [9, 9, 1]]), torch.tensor([[1., 1.], [0., 1.]])
    # position 0 speaks of token 2: ln .25; position 1 of token 0: ln .1; below position 1 of token 1: ln .3
    logp = token_logp(logits, idx, mask)
    assert logp.flatten().tolist() == pytest.approx([-1.386294, -2.302585, 0.0, -1.203973], abs=1e-6)

def test_token_entropy_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.25], [1., 1., 1.]]).log() + torch.tensor(4.0)
    # 1/2 ln 2 + 1/2 ln 4 = 1.5 ln 2; ln 3
    assert token_entropy(logits, torch.tensor([[0., 1., 1.]])).tolist() == [pytest.approx([0.0, 1.039721, 1.098612],
                                                                                         abs=1e-6)]

def test_forwards_loss_by_hand_and_ignored_targets():
    model, idx = three_tokens(), torch.tensor([[0, 1, 2], [2, 2, 1]])
    logits, loss = model(idx, torch.tensor([[1, 0, -100], [-100, 2, -100]]))
    assert logits.shape == (2, 3, 3)
    assert loss.item() == pytest.approx(1.155245, abs=1e-6) # (ln 4 + ln 2 + ln 4) / 3
    assert model(idx, torch.tensor([[0, 0, 0], [0, 0, -100]]))[1].item() == pytest.approx(0.693147, abs=1e-6) # ln 2

def test_logp_and_entropy_by_hand():
    idx, mask = torch.tensor([[1, 0, 2], [2, 2, 0]]), torch.tensor([[1., 1.], [0., 1.]])
    model = three_tokens()
    logp, entropy, values = model.logp_entropy_values(idx, mask, with_entropy=True)
    expected = [[-0.693147, -1.386294], [0.0, -0.693147]] # ln 1/2 for token 0, ln 1/4 for the others, 0 if not counted
    assert logp.flatten().tolist() == pytest.approx(sum(expected, []), abs=1e-6)
    # 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 4 = 1.5 ln 2
    assert entropy.flatten().tolist() == pytest.approx([1.039721, 1.039721, 0.0, 1.039721], abs=1e-6)
    assert values is None # no value head
    assert model.logp_entropy_values(idx, mask)[1] is None
    assert torch.equal(model.logp(idx, mask), logp)

def test_masked_positions_agree_with_the_full_computation_gradients_included():
    model = random_model()
    idx = torch.randint(11, (3, 9))
    mask = torch.tensor([[0., 0., 1., 1., 1., 0., 0., 0.], [0.] * 8, [1., 0., 0., 0., 0., 1., 1., 1.]])
    full = model(idx)[0] # (B, T, V)
    torch.testing.assert_close(model.logits_at(idx, mask), full[:, :-1][mask > 0], **close)
    expected, logp = full_logp(full, idx) * mask, model.logp(idx, mask)
    torch.testing.assert_close(logp, expected, **close)
    weight = torch.linspace(-1, 2, 24).view(3, 8) # each position with a gradient of its own
    expected_grads = torch.autograd.grad((weight * expected).sum(), model.parameters())
    for grad, expected_grad in zip(torch.autograd.grad((weight * logp).sum(), model.parameters()), expected_grads):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)

def test_nothing_counted_gives_zeros():
    model, idx = random_model(value_head=True), torch.randint(11, (2, 4))
    logp, entropy, values = model.logp_entropy_values(idx, torch.zeros(2, 3), with_entropy=True)
    assert logp.tolist() == entropy.tolist() == values.tolist() == [[0.0] * 3] * 2

def test_values_and_rewards_by_hand():
    model = signs(value_head=True, reward_head=True)
    with torch.no_grad():
        model.value_head.weight.copy_(torch.tensor([[1., 2., 4., 8.]]))
        model.value_head.bias.fill_(0.5)
        model.reward_head.weight.copy_(torch.tensor([[1., 2., 4., 8.]]))
    # the head on tokens 0, 1, 2: 1+2-4-8 = -9, 1-2+4-8 = -5, 1-2-4+8 = 3
    idx = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0], [2, 2, 2, 1]])
    values = all_values(model, idx)
    assert values.shape == (3, 4)
    torch.testing.assert_close(values[:2], torch.tensor([[-8.5, -4.5, 3.5, 3.5], [-4.5, 3.5, -8.5, -8.5]]),
                               rtol=0, atol=1e-4) # the layer norm's 0.999995
    mask = torch.tensor([[0., 1., 0.], [1., 0., 1.], [0., 0., 0.]])
    expected = torch.tensor([[0., -4.5, 0.], [-4.5, 0., -8.5], [0., 0., 0.]]) # before tokens 1, 2 and 3, where counted
    torch.testing.assert_close(model.values(idx, mask), expected, rtol=0, atol=1e-4)
    rewards = model.rewards(idx, torch.tensor([2, 3, 1])) # last real tokens: 1, 0, 2
    assert rewards.tolist() == pytest.approx([-5.0, -9.0, 3.0], abs=1e-4)

def test_one_pass_for_policy_and_critic_agrees_with_two():
    model, idx = random_model(value_head=True), torch.randint(11, (3, 6))
    mask = torch.tensor([[0., 1., 1., 0., 0.], [0., 0., 0., 1., 1.], [1., 0., 0., 0., 0.]])
    logp, entropy, values = model.logp_entropy_values(idx, mask, with_entropy=True)
    torch.testing.assert_close(logp, full_logp(model(idx)[0], idx) * mask, **close)
    torch.testing.assert_close(values, all_values(model, idx)[:, :-1] * mask, **close)
    torch.testing.assert_close(values, model.values(idx, mask), **close)
    log_q = model(idx)[0][:, :-1].log_softmax(-1)
    torch.testing.assert_close(entropy, -(log_q.exp() * log_q).sum(-1) * mask, **close)

@pytest.mark.parametrize('fill', [10, 0])
def test_padding_with_absurd_tokens_changes_nothing(fill):
    model = random_model(value_head=True, reward_head=True)
    rows = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 1, 1, 4]]
    idx, lengths = ragged(rows, fill)
    mask = (torch.arange(1, 6) < lengths[:, None]).float()
    logp, values, rewards = model.logp(idx, mask), all_values(model, idx), model.rewards(idx, lengths)
    for b, row in enumerate(rows):
        one, n = torch.tensor([row]), len(row)
        torch.testing.assert_close(logp[b, :n - 1], full_logp(model(one)[0], one)[0], **close)
        torch.testing.assert_close(values[b, :n], all_values(model, one)[0], **close)
        torch.testing.assert_close(rewards[b], model.rewards(one, torch.tensor([n]))[0], **close)

def test_a_later_token_never_changes_an_earlier_position():
    model = random_model(value_head=True)
    idx = torch.randint(11, (1, 8))
    other = idx.clone()
    other[0, 5:] = (idx[0, 5:] + 1) % 11
    assert torch.equal(model(idx)[0][0, :5], model(other)[0][0, :5])
    assert not torch.allclose(model(idx)[0][0, 5:], model(other)[0][0, 5:])

@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_checkpointing_changes_no_gradient(monkeypatch, dropout):
    """Every block works twice: its activations are not kept. With dropout the second time draws as the first."""
    calls, forward = [], model_module.Block.forward
    monkeypatch.setattr(model_module.Block, 'forward', lambda self, *a: (calls.append(self), forward(self, *a))[1])
    idx, mask, found = torch.randint(11, (3, 8)), (torch.rand(3, 7) < 0.7).float(), []
    for checkpointing in (False, True):
        model = random_model(dropout=dropout).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        calls.clear()
        model.logp(idx, mask).sum().backward()
        assert len(calls) == len(model.h) * (1 + checkpointing)
        found.append([p.grad for p in model.parameters()])
        with torch.no_grad():
            calls.clear()
            model.logp(idx, mask)
        assert len(calls) == len(model.h)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert max(g.abs().max().item() for g in found[0]) > 1e-3

def test_dropout():
    model, idx = random_model(dropout=0.0).train(), torch.randint(11, (2, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model = random_model(dropout=0.3).train()
    assert not torch.allclose(model(idx)[0], model(idx)[0])
    model.eval()
    torch.testing.assert_close(model(idx)[0], random_model(dropout=0.0)(idx)[0], rtol=0, atol=0)

def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=300, n_layer=8, n_head=4, n_embd=64, value_head=True,
                          reward_head=True))
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.005, rel=0.05) # .02 / sqrt(2 * 8)
    assert model.reward_head.weight.std().item() == pytest.approx(0.124, abs=0.05) # 1 / sqrt(65)
    assert model.h[0].attn.c_attn.bias.abs().max().item() == 0 and model.value_head.weight.abs().max().item() == 0

def test_heads_must_divide_the_width(capsys):
    line = one_line(capsys, lambda: GPT(GPTConfig(n_embd=8, n_head=3, n_layer=1, vocab_size=5, block_size=4)))
    assert 'n_embd=8' in line and 'n_head=3' in line

# ---------------------------------------------------------------------------------------------------------------------
# prompts that are shared by their answers

PROMPTED = [Row([1, 2, 3], [[4, 5], [6], [4, 9, 10, 0]], dict(ranks=[1, 0, 2])),
            Row([7], [[8], [9, 10], [8]], dict(ranks=[0, 1, 0]))]

def seen_by_trunk(monkeypatch):
    """Return a list that grows by the shape of the token ids of each pass through the layers."""
    shapes, trunk = [], GPT.trunk
    monkeypatch.setattr(GPT, 'trunk', lambda self, idx, *a, **k: (
        shapes.append(tuple(idx.shape)), trunk(self, idx, *a, **k))[1])
    return shapes

@pytest.mark.parametrize('fill', [0, 10])
def test_answers_in_one_row_equal_the_same_answers_alone(monkeypatch, fill):
    """Log-probabilities, scores and the gradients of both, whatever the padding holds."""
    model = random_model(vocab_size=11, reward_head=True)
    batch = collate_answers(PROMPTED)
    assert batch.idx[3:].tolist() == [[7, 8] + [0] * 5, [7, 9, 10] + [0] * 4, [7, 8] + [0] * 5] # padding
    batch.idx[torch.arange(7) >= batch.lengths[:, None]] = fill
    shapes = seen_by_trunk(monkeypatch)
    logp = model.logp(batch.idx, batch.mask, batch.groups).sum(1)
    scores = model.rewards(batch.idx, batch.lengths, batch.groups)
    # 3 + 2 + 1 + 4 tokens and 1 + 1 + 2 + 1, each but for the first prompt's once; log pi needs no answer's last token
    assert shapes == [(2, 7), (2, 10)]
    weights = torch.tensor([1., -2., 0.5, 3., -1., 2.])
    ((logp + 2 * scores) * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    alone_logp, alone_scores = [], []
    for prompt, answers, _ in PROMPTED:
        for answer in answers:
            idx = torch.tensor([prompt + answer])
            alone_logp.append(full_logp(model(idx)[0], idx)[0, len(prompt) - 1:].sum())
            alone_scores.append(model.rewards(idx, torch.tensor([idx.size(1)]))[0])
    alone_logp, alone_scores = torch.stack(alone_logp), torch.stack(alone_scores)
    ((alone_logp + 2 * alone_scores) * weights).sum().backward()
    torch.testing.assert_close(logp, alone_logp, **close)
    torch.testing.assert_close(scores, alone_scores, **close)
    for p, g in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-4)

def test_a_row_of_answers_may_be_longer_than_the_context(monkeypatch):
    """Only prompt and one answer have to fit: positions start anew with every answer."""
    model, shapes = random_model(block_size=6), seen_by_trunk(monkeypatch)
    batch = collate_answers([Row([1, 2, 3], [[4, 5, 6], [7, 8, 9], [1, 1, 1]], dict(ranks=[0, 1, 2]))])
    found = model.logp(batch.idx, batch.mask, batch.groups)
    assert shapes == [(1, 9)] # 3 and three times 2
    torch.testing.assert_close(found, model.logp(batch.idx, batch.mask), **close)

def test_answers_that_are_not_learnt_count_nothing(monkeypatch):
    """Their scores stay; the vocabulary projection is done for the tokens that are learnt alone."""
    model, batch, sizes, logits = random_model(reward_head=True), collate_answers(PROMPTED), [], GPT.logits
    monkeypatch.setattr(GPT, 'logits', lambda self, x: (sizes.append(len(x)), logits(self, x))[1])
    both = lambda mask: model.logp_rewards(batch.idx, mask, batch.lengths, batch.groups)
    logp, scores = both(batch.mask)
    torch.testing.assert_close(logp, model.logp(batch.idx, batch.mask), **close)
    torch.testing.assert_close(scores, model.rewards(batch.idx, batch.lengths), **close)
    which = torch.tensor([1., 0., 0., 1., 1., 0.])[:, None]
    some, same = both(batch.mask * which)
    torch.testing.assert_close(some, logp * which, **close)
    torch.testing.assert_close(same, scores, **close)
    none, same = both(0 * batch.mask)
    assert not none.any() and sizes == [11, 11, 2 + 1 + 2, 0] # of 2 + 1 + 4 + 1 + 2 + 1 tokens
    torch.testing.assert_close(same, scores, **close)

def drawn_answers(draw, fill):
    """Return rows of three tokens to drawn prompts: idx, mask, lengths, groups, and the answers as lists."""
    prompts = [[draw.randrange(3) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 4))]
    said = [[[draw.randrange(3) for _ in range(draw.randint(1, 6))] for _ in range(draw.randint(1, 4))]
            for _ in prompts]
    rows = [(p, a) for p, answers in zip(prompts, said) for a in answers]
    idx, lengths = ragged([p + a for p, a in rows], fill)
    at = torch.arange(idx.size(1) - 1) # position t describes token t+1
    mask = (at >= torch.tensor([len(p) - 1 for p, _ in rows])[:, None]) & (at < lengths[:, None] - 1)
    return idx, mask.float(), lengths, torch.tensor([len(answers) for answers in said]), prompts, said

def shape_by_hand(prompts, said, T, cut):
    """Return the shape (B, S) of the shared rows, or (N, T) where these are no more work; of each row less `cut`."""
    sizes, N = [], sum(map(len, said))
    for prompt, answers in zip(prompts, said):
        rows = [(prompt + a)[:len(prompt + a) - cut] for a in answers]
        alike = 0
        while all(len(row) > alike and row[alike] == rows[0][alike] for row in rows):
            alike += 1
        sizes.append(alike + sum(len(row) - alike for row in rows))
    work = lambda n, length: n * length * (6 * 8 + length) # 8 channels
    shared = len(prompts), max(sizes)
    return shared if len(prompts) < N and work(*shared) < work(N, T) else (N, T)

@pytest.mark.parametrize('fill', [0, 2, 10])
def test_shared_prompts_change_no_number_and_no_gradient(monkeypatch, fill):
    """50 batches of few tokens, so that answers begin alike, end within others and hold what pads hold."""
    model, draw = random_model(value_head=True, reward_head=True), random.Random(fill)
    shapes, n_shared, n_tokens = seen_by_trunk(monkeypatch), 0, [0, 0]
    for _ in range(50):
        idx, mask, lengths, groups, prompts, said = drawn_answers(draw, fill)
        some = mask * torch.tensor([[draw.randint(0, 1)] for _ in mask]) # of some answers, as reward.py with lm_coef
        passes = [lambda g: [model.logp(idx, mask, g)], lambda g: [model.values(idx, mask, g)],
                  lambda g: model.logp_entropy_values(idx, mask, True, g), lambda g: [model.rewards(idx, lengths, g)],
                  lambda g: model.logp_rewards(idx, some, lengths, g)]
        found = []
        for g in (groups, None):
            shapes.clear()
            out = [x for one in passes for x in one(g)]
            weights = [torch.linspace(-1, 2, x.numel()).view(x.shape) for x in out]
            loss = sum((x * w).sum() for x, w in zip(out, weights)) / len(idx)
            found.append((out, torch.autograd.grad(loss, list(model.parameters()))))
            N, T = idx.shape
            full, less = ((N, T - cut) if g is None else shape_by_hand(prompts, said, T - cut, cut) for cut in (0, 1))
            assert shapes == [less] * 3 + [full] * 2
            n_tokens[g is None] += less[0] * less[1]
            n_shared += less[0] < N
        for a, b in zip(*(out for out, _ in found), strict=True):
            torch.testing.assert_close(a, b, **close)
        for a, b in zip(*(grads for _, grads in found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert n_shared > 25 and n_tokens[0] < 0.9 * n_tokens[1]

def test_prompts_are_not_shared_where_that_is_more_work(monkeypatch):
    """8 channels: rows x length x (6 x 8 + length)."""
    model, shapes = random_model(), seen_by_trunk(monkeypatch)
    for prompt, answers in (([1], [[2] * 7, [3] * 7]), ([1, 1], [[2] * 6, [3] * 6])):
        batch = collate_answers([Row(prompt, answers, {})])
        assert batch.idx.shape == (2, 8)
        found = model.logp(batch.idx, batch.mask, batch.groups)
        torch.testing.assert_close(found, model.logp(batch.idx, batch.mask), **close)
    # apart 2 * 7 * (48 + 7) = 770. 1 + 6 + 6 tokens: 13 * (48 + 13) = 793; 2 + 5 + 5: 12 * (48 + 12) = 720
    assert shapes == [(2, 7), (2, 7), (1, 12), (2, 7)]
    shapes.clear()
    model.logp(batch.idx, batch.mask, torch.tensor([1, 1])) # nothing is to be shared
    assert shapes == [(2, 7)]

@pytest.mark.parametrize('how', ['checkpointing', 'bfloat16'])
def test_shared_prompts_recomputed_and_in_16_bits(monkeypatch, how):
    model, batch = random_model().train(), collate_answers(PROMPTED)
    shapes, found, bits = seen_by_trunk(monkeypatch), [], how == 'bfloat16'
    for groups, special in ((batch.groups, True), (batch.groups, False), (None, False)):
        model.checkpointing = special and not bits
        with torch.autocast('cpu', torch.bfloat16, enabled=special and bits):
            logp = model.logp(batch.idx, batch.mask, groups)
        assert logp.dtype == torch.float32
        found.append([logp.detach(), *torch.autograd.grad(logp.sum(), list(model.parameters()))])
    assert shapes == [(2, 7), (2, 7), (6, 6)]
    # bfloat16 has 8 bits: of numbers up to 4 a hundredth, of gradients up to 70 more
    for name, special, shared, alone in zip(['logp', *(n for n, _ in model.named_parameters())], *found, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-4)
        if bits:
            assert (special - shared).norm() < 0.05 * shared.norm() + 1e-3, name
            continue
        torch.testing.assert_close(special, shared, rtol=0, atol=1e-6)

def test_repeated_prompts_share_one_pass_and_answer_as_alone(monkeypatch):
    model, passes, hidden = random_model(), [], GPT.hidden
    prompts = [[1, 2, 3], [4], [1, 2, 3], [1, 2, 3], [4], [5, 6, 7, 8]]
    alone = [model.generate([p], 6, temperature=0, eos=9)[0] for p in prompts]
    monkeypatch.setattr(GPT, 'hidden', lambda self, idx, *a, **k: (
        passes.append(idx.shape), hidden(self, idx, *a, **k))[1])
    assert model.generate(prompts, 6, temperature=0, eos=9) == alone
    assert passes == [(3, 4)] # three distinct prompts, the longest of four tokens

def test_answers_to_one_prompt_are_drawn_independently():
    model = random_model()
    torch.manual_seed(0)
    answers, logps = model.generate_with_logp([[1, 2, 3]] * 20 + [[4]] * 20, 6, eos=9)
    assert len({tuple(a) for a in answers[:20]}) > 10 and len({tuple(a) for a in answers[20:]}) > 10
    for prompt, answer, logp in zip([[1, 2, 3]] * 20 + [[4]] * 20, answers, logps, strict=True):
        idx = torch.tensor([prompt + answer])
        expected = full_logp(model(idx)[0], idx)[0, len(prompt) - 1:]
        torch.testing.assert_close(torch.tensor(logp), expected, **close)
