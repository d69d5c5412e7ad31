"""sft.py: the losses by hand, which tokens count, text and demonstrations, teachers. test_stages.py has the rest."""
import math

import pytest
import torch

import sft
from common.tokens import Tokenizer, prompt_ids
from model import GPT
from sft import distillation_loss, sft_loss
from tiny import DEMONSTRATIONS, TOK, by_hand, checkpoint, has_checkpoint, records, run, stops, weights

SCRATCH = dict(init_from='scratch', tokenizer='bytes', n_layer=1, n_head=2, n_embd=16, block_size=64, batch_size=4)

@pytest.fixture
def data(tmp_path):
    return records(tmp_path / 'demonstrations.jsonl', DEMONSTRATIONS)

def test_sft_loss_by_hand():
    # (1 + 2 + 3 + 6) / 4, the other two numbers are padding
    logp = torch.tensor([[-1., -2., 1e6], [-3., 777., -6.]], requires_grad=True)
    mask = torch.tensor([[1., 1., 0.], [1., 0., 1.]])
    loss = sft_loss(logp, mask)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(3.0)
    assert logp.grad.tolist() == [[-0.25, -0.25, 0.0], [-0.25, 0.0, -0.25]]

def test_distillation_loss_by_hand():
    # teacher (1/2, 1/4, 1/4), student uniform: KL = 1/2 log(3/2) + 2 * 1/4 log(3/4) = 0.202733 - 0.143841 = 0.058892;
    # a second token on which both agree: the mean is a half of it
    teacher = torch.tensor([[2., 1., 1.], [5., 0., 3.]], requires_grad=True)
    p = teacher * torch.tensor([[math.log(2)] * 3, [1.] * 3])
    student = torch.tensor([[7., 7., 7.], [4., -1., 2.]], requires_grad=True) # logits may be shifted by any number
    loss = distillation_loss(student, p, 1.0)
    loss.backward()
    assert loss.shape == () and loss.item() == by_hand(0.029446)
    # (q - p) / N: a third less a half, a third less a quarter, over two tokens
    assert student.grad.tolist()[0] == by_hand([-0.083333, 0.041667, 0.041667])
    assert student.grad.tolist()[1] == by_hand([0.0, 0.0, 0.0]) and teacher.grad is None

def test_distillation_at_a_temperature_by_hand():
    # T = 2 halves the logits: the teacher's log 4, 0, 0 becomes the (1/2, 1/4, 1/4) of above; 4 * 0.058892
    student = torch.tensor([[7., 7., 7.]], requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[math.log(4), 0., 0.]]), 2.0)
    loss.backward()
    assert loss.item() == by_hand(0.235566)
    assert student.grad.tolist()[0] == by_hand([-0.333333, 0.166667, 0.166667]) # T^2 * 1/T * (q - p)

def test_distillation_of_no_token_is_zero():
    assert distillation_loss(torch.zeros(0, 3), torch.zeros(0, 3), 1.0).item() == 0.0

def test_a_uniform_models_first_loss_is_log_vocabulary(tmp_path, data):
    # every logit 0: ln 257 = 5.549076 nats, whichever tokens are counted
    folder = checkpoint(tmp_path / 'uniform')
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.wte.weight.zero_()
    model.save_pretrained(folder)
    for loss_on in ('response', 'all'):
        log = run(sft, out_dir=str(tmp_path / loss_on), init_from=folder, train_data=data, val_data=data, batch_size=8,
                  max_steps=1, loss_on=loss_on)
        assert log[0]['val_loss'] == by_hand(5.549076) and log[0]['step'] == 0
        assert log[1]['loss'] == by_hand(5.549076) and log[1]['step'] == 1
        assert log[2]['val_loss'] < 5.549 and len(log) == 3

def test_the_loss_counts_the_tokens_asked_for(tmp_path, data, monkeypatch):
    """28 bytes stand around every prompt's 2; the answers have 3 + 1 and more."""
    counted = []
    monkeypatch.setattr(sft, 'sft_loss', lambda logp, mask: (counted.append(mask.sum()), sft_loss(logp, mask))[1])
    for loss_on in ('response', 'all'):
        run(sft, out_dir=str(tmp_path / loss_on), train_data=data, max_steps=1, loss_on=loss_on,
            **SCRATCH | dict(batch_size=8))
    # answers: 2 9 1 17 3 10 5 1 characters = 48, each with a space and its end of text: 48 + 16
    # prompts: 2 4 1 3 2 2 1 1 characters = 16, in a template of 26 ("### Human: ", "\n", "### Assistant:"): 224;
    # the first token of a row is predicted by nothing: 64 + 224 - 8
    assert counted == [64.0, 280.0]

def test_after_training_on_one_demonstration_the_greedy_answer_ends(tmp_path):
    data = records(tmp_path / 'one.jsonl', [dict(prompt='Hi', response='Yo')] * 4)
    log = run(sft, out_dir=str(tmp_path / 'out'), train_data=data, max_steps=60,
              **SCRATCH | dict(lr=0.02, log_every=20))
    model = GPT.from_pretrained(str(tmp_path / 'out'))
    assert model.generate([prompt_ids(TOK, 'Hi')], 10, temperature=0, eos=TOK.eos) == [[32, 89, 111, 256]] # " Yo", end
    assert log[-1]['loss'] < 0.1

def test_epochs(tmp_path, data):
    log = run(sft, out_dir=str(tmp_path / 'a'), train_data=data, epochs=2, **SCRATCH | dict(batch_size=3))
    assert log[-1]['step'] == 6 # 8 rows make 3 batches

@pytest.mark.parametrize('packed', [True, False])
def test_text(tmp_path, packed):
    data = records(tmp_path / 'text.jsonl', [dict(text=f"{i} and {i}, " * 5) for i in range(12)])
    log = run(sft, out_dir=str(tmp_path / 'out'), train_data=data, val_fraction=0.25, packed=packed, max_steps=10,
              eval_every=5, **SCRATCH | dict(lr=0.01))
    assert [(line['step'], 'val_loss' in line) for line in log if 'val_loss' in line or line['step'] == 10] == [
        (0, True), (5, True), (10, False), (10, True)]
    assert log[-1]['val_loss'] < 5.0 < log[0]['val_loss']

@pytest.fixture
def teacher(tmp_path):
    return checkpoint(tmp_path / 'teacher')

def test_a_student_takes_over_the_teachers_distributions(tmp_path, data, teacher):
    """A smaller student from scratch: the KL falls, at the answers' tokens alone, and the teacher stays as it is."""
    before = weights(teacher)
    log = run(sft, out_dir=str(tmp_path / 'out'), train_data=data, teacher=teacher, max_steps=150,
              **SCRATCH | dict(n_embd=8, lr=0.01, batch_size=8, log_every=1))
    assert log[0]['loss'] > 0.5 and log[-1]['loss'] < 0.3 * log[0]['loss'] and weights(teacher) == before

def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, data, teacher):
    for temperature in (1.0, 3.0):
        log = run(sft, out_dir=str(tmp_path / str(temperature)), init_from=teacher, train_data=data, teacher=teacher,
                  max_steps=1, batch_size=8, temperature=temperature)
        assert log[0]['loss'] == by_hand(0.0) and log[0]['grad_norm'] == pytest.approx(0.0, abs=1e-5)

def test_the_teacher_is_asked_at_the_counted_tokens(tmp_path, data, teacher, monkeypatch):
    """64 answer tokens in all (see above), whatever the prompts hold."""
    asked = []
    monkeypatch.setattr(sft, 'distillation_loss',
                        lambda *a: (asked.append([tuple(x.shape) for x in a[:2]] + [a[2]]), distillation_loss(*a))[1])
    run(sft, out_dir=str(tmp_path / 'out'), train_data=data, teacher=teacher, max_steps=1, temperature=2.5,
        **SCRATCH | dict(batch_size=8))
    assert asked == [[(64, 257), (64, 257), 2.5]]

def test_teachers_that_do_not_fit(tmp_path, data, capsys, teacher):
    out, options = str(tmp_path / 'out'), SCRATCH | dict(train_data=data, max_steps=1)
    wide, short = checkpoint(tmp_path / 'wide', vocab_size=300), checkpoint(tmp_path / 'short', block_size=32)
    head = checkpoint(tmp_path / 'head', reward_head=True)
    other = checkpoint(tmp_path / 'other')
    Tokenizer('tiktoken', {bytes([255 - i]): i for i in range(256)}).save(tmp_path / 'other') # as many, but others
    for folder, expected in (
            (wide, "its vocabulary has 300 tokens, the policy's has 257; wanted the same tokenizer"),
            (other, 'has a tokenizer of its own; wanted the one of the policy'),
            (short, "its context is 32 tokens, the student's 64; wanted one at least as long"),
            (head, 'is a reward model, wanted a language model')):
        said = stops(capsys, sft, out_dir=out, teacher=folder, **options)
        assert said.startswith(f"--teacher={folder}: ") and said.endswith(expected)
    assert 'nowhere' in stops(capsys, sft, out_dir=out, teacher='nowhere', **options)
    assert not has_checkpoint(out)

def test_dropout_is_off_while_measuring(tmp_path, data):
    logs = [run(sft, out_dir=str(tmp_path / str(dropout)), train_data=data, val_data=data, max_steps=1, dropout=dropout,
                **SCRATCH) for dropout in (0.0, 0.5)]
    assert logs[0][0]['val_loss'] == logs[1][0]['val_loss'] # the same weights
    assert logs[0][1]['loss'] != logs[1][1]['loss']

def test_a_response_longer_than_the_context_is_left_out(tmp_path, capsys):
    data = records(tmp_path / 'd.jsonl', [dict(prompt='Hi', response='x' * 64)] * 2)
    said = stops(capsys, sft, out_dir=str(tmp_path / 'out'), train_data=data, max_steps=1, **SCRATCH)
    assert 'every response alone fills block_size=64 tokens' in said
