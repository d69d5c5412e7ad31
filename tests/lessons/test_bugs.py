"""lessons/bugs.py: each bug is a real function but for the lines in the solutions, in numbers by hand; the runs."""
import ast
import inspect
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

from common import rollout
from common.batches import Answers, Row
from lessons import course
from tiny import DEMONSTRATIONS, PROMPTS, ROOT, RUN, TOK, by_hand, checkpoint, exits, records

bugs = course.load('bugs')
T = torch.tensor
LOG = math.log

def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()

# ---------------------------------------------------------------------------------------------------------------------
# each function on a tiny input: what the real one returns, what the sick one does, both worked out by hand

def scored(f):
    """One answer of two tokens, log-ratios .5 and 1, at .1 a nat, and a score of 2; the third position is padding."""
    return f(T([2.0]), T([[0.5, 1.0, 9.0]]), T([[1.0, 1.0, 0.0]]), 0.1)

def estimated(f):
    """Rewards 0 and 1, values 1/2 and 1/4, lambda 1/2: deltas -1/4 and 3/4, advantages 1/8 and 3/4."""
    return torch.cat(f(T([[0.0, 1.0, 0.0]]), T([[0.5, 0.25, 0.0]]), T([[1.0, 1.0, 0.0]]), 1.0, 0.5))

def clipped(f):
    """Two tokens at ratios 1.5 and 1.1, A = 1: the loss, and its gradients by log pi."""
    logp = T([[LOG(1.5), LOG(1.1)]], requires_grad=True)
    loss = f(logp, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2)
    return [loss.item(), *(torch.autograd.grad(loss, logp)[0][0].tolist() if loss.requires_grad else [0.0, 0.0])]

def paired(f, loss='dpo', beta=1.0):
    """Chosen: 2 tokens, log pi -2, reference -1. Rejected: 4 tokens, -4 and -6. The loss, accuracy and margin."""
    answers = Answers(None, None, None, sizes=T([2, 4]), pairs=T([[0, 1]]), groups=T([2]))
    cfg = SimpleNamespace(loss=loss, beta=beta, label_smoothing=0.0)
    value, measured = f(T([-2.0, -4.0]), T([-1.0, -6.0]), answers, cfg)
    return [value, measured['accuracy'], measured['margin']]

def loaded(f):
    """The dropout of policy and reference, and whether they are one model."""
    class Model:
        def __init__(self, folder, dropout=0.0):
            self.dropout = dropout

        def to(self, device):
            return self

    f.__globals__.update(load_policy=Model, load_reward=lambda *args: None)
    run = SimpleNamespace(device='cpu', freeze=lambda m: m)
    policy, _, reference = f(SimpleNamespace(policy='', lora_rank=0), run, TOK)
    return [policy.dropout, reference.dropout, policy is reference]

def sampled(f):
    """The prompts [6, 7] and [5], as the model gets them, and the temperature."""
    class Model:
        def generate_with_logp(self, prompts, max_new_tokens, temperature, eos):
            self.got = [*sum(prompts, []), temperature]
            return [[], []], [[], []]

    f(model := Model(), [[6, 7], [5]], TOK, 3)
    return model.got

def stepped(f):
    """A weight of 0 with a gradient of 3, clipped to 1, at a learning rate of 1: the norm, the new weight."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    layer.weight.grad = T([[3.0]])
    norm = f(RUN, SimpleNamespace(grad_clip=1.0, out_dir=''), 0, layer, torch.optim.SGD(layer.parameters(), 1.0), 1.0)
    return [norm, layer.weight.item()]

def averaged(f):
    """Micro-batches of one token at log pi -1 and of three at -3: 10 / 4 nats a token, the mean of means is 2."""
    model, one = SimpleNamespace(logp=lambda idx, mask: -mask.sum() * mask * one), T(1.0, requires_grad=True)
    f.__globals__['take_step'] = lambda run, cfg, step, model, optimizer, measured: measured
    rows = [([0, 1], [0, 1]), ([0, 1, 1, 1], [0, 1, 1, 1])]
    return [f(model, None, None, rows, SimpleNamespace(grad_accum=2), RUN, 0)['loss']]

def packed(f):
    """The prompt 1 2 and the answer 3 with its EOS 9: the mask, log pi."""
    rolls = f([[([1, 2], None), ([3, 9], [-0.5, -0.25])]], 9)
    return torch.cat([rolls.mask, rolls.logp])

def whitened(f):
    """1 and 3 under the mask, 0 in a pad. Of all three the mean is 4/3 and the variance 14/9."""
    return f(T([[1.0, 3.0, 0.0]]), T([[1.0, 1.0, 0.0]]))

LENGTHS = SimpleNamespace(rewards=lambda idx, lengths, groups: lengths.float())
CASES = dict( # the function on its input, the real numbers, the sick ones
    coin=(lambda f: f([Row([1, 2, 3], [[4, 9], [5, 6, 9]], {})]).lengths, [5, 6], [3, 3]),
    endless=(lambda f: f(TOK, [dict(prompt='Hi', response='Yo')], 64)[0][1][-5:], [0, 1, 1, 1, 1], [0, 1, 1, 1, 0]),
    ever_more=(estimated, [[0.125, 0.75, 0], [0.625, 1, 0]], [[0.25, 1, 0], [0.75, 1.25, 0]]),
    faint=(lambda f: [f(T([[1.0, 3.0, 9.0]]), T([[1.0, 1.0, 0.0]]))], [2], [4 / 3]),
    first_word=(lambda f: f([([5, 6, 7], [0, 1, 1])])[1], [[1, 1]], [[0, 1]]),
    four_is_not_one=(averaged, [2.5], [2.0]),
    less_for_more=(lambda f: f(T([[1.0, 3.0], [5.0, 9.0]]), 'rloo'), [[-2, 2], [-4, 4]], [[-4, -6], [4, 6]]),
    lopsided=(whitened, [[-1, 1, 0]], [[1, 3, 0]]),
    lottery=(lambda f: f(LENGTHS, torch.zeros(2, 4), T([2, 4])), [2, 4], [4, 4]),
    louder=(whitened, [[-1, 1, 0]], [[-1 / 14 ** 0.5, 5 / 14 ** 0.5, 0]]),
    moving_target=(estimated, [[0.125, 0.75, 0], [0.625, 1, 0]], [[0.125, 0.75, 0], [-0.5, 1.25, 0]]),
    never_zero=(loaded, [0, 0, False], [0, 0.1, False]),
    no_brake=(clipped, [-1.15, 0, -0.55], [-1.3, -0.75, -0.55]),
    no_price=(loaded, [0, 0, False], [0, 0, True]),
    no_wages=(scored, [[-0.05, 1.9, 0]], [[-0.05, -0.1, 2]]),
    one_short=(packed, [[0, 1, 1], [0, -0.5, -0.25]], [[0, 1, 0], [0, -0.5, 0]]),
    overpriced=(lambda f: [f(T(LOG(0.5)), T(LOG(0.25)))], [0.5 - 1 + LOG(2)], [2 - 1 - LOG(2)]), # q/p is a half
    proud=(paired, [3 + LOG(1 + math.exp(-3)), 0, -3], [LOG(1 + math.exp(-3)), 1, 3]), # h is -1 - 2
    ragged=(sampled, [5, 6, 7, 1.0], [0, 5, 6, 7, 1.0]),
    restless=(loaded, [0, 0, False], [0.1, 0, False]),
    runaway=(scored, [[-0.05, 1.9, 0]], [[0.05, 2.1, 0]]),
    sharp=(sampled, [5, 6, 7, 1.0], [5, 6, 7, 0.7]),
    standstill=(clipped, [-1.15, 0, -0.55], [-1.15, 0, 0]),
    stuck=(paired, [3 + LOG(1 + math.exp(-3)), 0, -3], [LOG(2), 0.5, 0]),
    # beta 1/2: the target is 1; of means h is -1/2 - 1/2, of sums -1 - 2
    timid=(lambda f: paired(f, 'ipo', 0.5), [(-1 - 1) ** 2, 0, -0.5], [(-3 - 1) ** 2, 0, -1.5]),
    too_good=(lambda f: f(T([[LOG(0.5), LOG(0.3), LOG(0.2)]]), T([[0, 1]]), T([[1.0]])), [[LOG(0.3)]], [[LOG(0.5)]]),
    unbridled=(stepped, [3, -1], [0, -3]),
    worse_than_chance=(lambda f: [f(T([[2.0, 0.0]]), T([[0, 1]]))], # -log sigmoid of 2, and of -2
                       [LOG(1 + math.exp(-2))], [2 + LOG(1 + math.exp(-2))]))

def test_every_bug_has_its_numbers():
    assert list(CASES) == bugs.BUGS and len(bugs.BUGS) >= 16
    assert {course.load(f'bugs/{name}').STAGE for name in bugs.BUGS} == set(bugs.STAGES)

@pytest.mark.parametrize('name', bugs.BUGS)
def test_a_bug_changes_these_numbers(name, monkeypatch):
    bug, (numbers, real, sick) = course.load(f'bugs/{name}'), CASES[name]
    place, function = bug.PATCHES[0]
    for f, expected in (getattr(place, function.__name__), real), (function, sick):
        with monkeypatch.context() as m:
            for key in ('load_policy', 'load_reward', 'take_step'): # a case may put others in their place
                if key in f.__globals__:
                    m.setitem(f.__globals__, key, f.__globals__[key])
            assert torch.as_tensor(numbers(f)).double().flatten().tolist() == by_hand(
                torch.as_tensor(expected).double().flatten().tolist())

# ---------------------------------------------------------------------------------------------------------------------
# the solutions

SOLUTIONS = {part.split('\n')[0]: part for part in read('lessons/solutions/bugs.md').split('\n## ')[1:]}

def plain(text):
    """Return the syntax tree of the first function in a text, less its docstring."""
    tree = next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))
    if ast.get_docstring(tree):
        tree.body = tree.body[1:]
    return ast.dump(tree)

def test_every_bug_has_a_solution():
    assert list(SOLUTIONS) == bugs.BUGS

@pytest.mark.parametrize('name', bugs.BUGS)
def test_the_solution_names_the_lines_that_are_wrong(name):
    """With its lines put right the function is the real one. It is patched where that is used."""
    text, bug = read(f'lessons/bugs/{name}.py'), course.load(f'bugs/{name}')
    hunks = re.findall(r'((?:^-.*\n)+)((?:^\+.*\n)+)', SOLUTIONS[name], re.MULTILINE)
    assert 1 <= len(hunks) <= 2 and sum(wrong.count('\n') for wrong, _ in hunks) <= 3
    for wrong, right in hunks:
        wrong, right = (re.sub('^[-+]', '', lines, flags=re.MULTILINE) for lines in (wrong, right))
        assert text.count(wrong) == 1
        text = text.replace(wrong, right)
    _, function = bug.PATCHES[0]
    for place, sick in bug.PATCHES:
        real = getattr(place, function.__name__)
        assert sick is function and real is not function
        assert plain(text) == plain(inspect.getsource(real))
        path = os.path.relpath(inspect.getsourcefile(inspect.unwrap(real)), ROOT).replace(os.sep, '/')
        assert f"`{function.__name__}` of {path}." in SOLUTIONS[name]

@pytest.mark.parametrize('page', ['lessons/README.md', 'lessons/README.zh.md'])
def test_the_pages_list_every_bug(page):
    rows = re.findall(r'^\| \[(\w+)\]\(bugs/(\w+)\.py\) \| (\w+) \|', read(page), re.MULTILINE)
    assert rows == [(name, name, course.load(f'bugs/{name}').STAGE) for name in bugs.BUGS]

# ---------------------------------------------------------------------------------------------------------------------
# what counts as given away

def test_outside_by_hand():
    """First values of 1 to 2, so the limit is 10 away from them; at the end 15 values of 1.2 to 2.6, the limit 1.4."""
    healthy = [[dict(step=i, x=x + 0.1 * i, lr=5.0) for i in range(7)] for x in (1.0, 1.5, 2.0)]
    log = lambda first, last: [dict(step=i, x=last if i else first, lr=9.0, y=3.0) for i in range(7)]
    assert bugs.outside(log(11.9, 3.9), healthy) == bugs.outside(log(-8.9, -0.1), healthy) == {}
    assert bugs.outside(log(17.0, 2.0), healthy) == {'x': pytest.approx(1.5)} # (17 - 2) / 10
    assert bugs.outside(log(2.0, 6.8), healthy) == {'x': pytest.approx(3.0)} # (6.8 - 2.6) / 1.4
    assert bugs.outside(log(2.0, -3.0), healthy) == {'x': pytest.approx(3.0)} # (1.2 + 3) / 1.4
    one_spike = log(1.5, 2.0)[:-1] + [dict(step=6, x=99.0)]
    assert bugs.outside(one_spike, healthy) == {}

def test_what_differs_by_rounding_alone_is_inside():
    log = lambda *values: [dict(kl=x) for x in values]
    healthy = [log(1e-8), log(2e-8), log(3e-8)]
    assert bugs.outside(log(9e-3), healthy) == {} and list(bugs.outside(log(0.02), healthy)) == ['kl']

def test_the_furthest_comes_first():
    healthy = [[dict(a=x, b=x)] for x in (0.0, 0.5, 1.0)]
    assert list(bugs.outside([dict(a=12.0, b=13.0)], healthy)) == ['b', 'a']

@pytest.mark.parametrize('values, cells, jump', [
    ([], '––––', ''), ([7.0], '   7', ''), ([1.0, 5.0], '1  5', ''), ([1.0, 2.0, 5.0], '12 5', ''), # index 0, 1, 1, 2
    ([1.0, 3.0, 2.0, 6.0], '1326', '2.3'), # (2 + 1 + 4) / 3
    ([1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 9.0], '1359', '1.3')]) # (1 + 1 + 1 + 1 + 0 + 4) / 6
def test_four_places_by_hand(values, cells, jump):
    assert bugs.places(values) == ''.join(f'{cell.strip():>10}' for cell in cells) + f'{jump:>9}'

def test_a_jump_is_seen_between_the_lines_shown(capsys):
    """Both begin and end alike, and at the four lines that are shown: 0, 3, 6 and 9 of ten."""
    logs = [[dict(policy_loss=(i % 3 > 0) * size, val_loss=2.0) if i == 9 else dict(policy_loss=(i % 3 > 0) * size)
             for i in range(10)] for size in (0.5, 3.0)]
    bugs.show('lopsided', (logs[0], {}), (logs[1], {}))
    first, _, runs, header, loss, val, *_ = capsys.readouterr().out.splitlines()
    assert 'jump: how far a number moves from line to line' in first and runs.split() == ['healthy', 'lopsided']
    assert header.split() == ['begin', '1/3', '2/3', 'end', 'jump'] * 2
    assert loss.split() == ['policy_loss', *'0000', '0.33', *'0000', '2'] # six moves in nine, each by 0.5 or 3
    assert val.split() == ['val_loss', '2', '2'] # measured once, printed once

# ---------------------------------------------------------------------------------------------------------------------
# the runs

@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Give PPO and SFT on tiny models in place of those of the toy world."""
    data = dict(sft=records(tmp_path / 'demonstrations.jsonl', DEMONSTRATIONS),
                ppo=records(tmp_path / 'prompts.jsonl', PROMPTS))
    tiny = dict(
        sft=dict(init_from=checkpoint(tmp_path / 'base'), train_data=data['sft'], batch_size=4),
        ppo=dict(policy=checkpoint(tmp_path / 'sft'), reward_model=checkpoint(tmp_path / 'reward', reward_head=True),
                 prompts=data['ppo'], max_new_tokens=8, batch_size=8, lr=1e-3))
    monkeypatch.setattr(bugs, 'command_of', lambda stage, cfg: [
        'python', stage[1], *(f'--{k}={v}' for k, v in (tiny[stage[0]] | stage[3] | dict(seed=cfg.seed)).items())])

def test_healthy_and_sick_side_by_side(toy, capsys):
    """The temperature of the real function is back afterwards; both runs begin alike."""
    real = rollout.sample_answers
    bugs.main(bugs.Config(bug='sharp', iterations=5))
    out, err = capsys.readouterr()
    assert list(dict.fromkeys(re.findall(r'(\S+): +\d+%', err))) == ['healthy', 'sharp'] # the progress bars
    assert out.startswith('Trains ppo twice, healthy and with the bug. It takes about a minute.\n')
    assert rollout.sample_answers is real
    rows = {words[0]: words[1:] for line in out.splitlines() if len(words := line.split()) == 11}
    assert {'reward', 'kl', 'first_ratio', 'entropy'} <= rows.keys() and 'lr' not in rows
    values = list(map(float, rows['first_ratio']))
    assert max(values[:5]) < 1e-4 and min(values[5:9]) > 0.01
    assert re.search('health, healthy:\n    nothing', out)
    assert re.search('health, sharp:\n    step 1: first_ratio .* above 1e-3', out)
    assert 'lessons/solutions/bugs.md' in out

def test_the_table_tells_what_gives_a_bug_away(toy, monkeypatch, capsys):
    monkeypatch.setattr(bugs, 'BUGS', ['four_is_not_one', 'never_zero', 'sharp'])
    bugs.main(bugs.Config(iterations=5, table=True))
    out = capsys.readouterr().out.splitlines()
    silent, number, alarm = out[2:5]
    assert silent == '| four_is_not_one | sft | – | – |'
    assert re.fullmatch(r'\| never_zero \| ppo \| – \| `kl.*` \|', number)
    assert re.fullmatch(r'\| sharp \| ppo \| `first_ratio`.* \|', alarm)
    assert re.fullmatch(r'2 of 3 bugs are given away, and [0-4] of 4 more healthy runs', out[6]) # two of each stage
    said = r'healthy (ppo|sft), seed [45]: \w+(, \w+)*'
    assert all(re.fullmatch(said, line) for line in out[7:]) and len(out[7:]) == int(out[6].split()[8])

def test_a_healthy_run_that_is_judged_like_a_bug(monkeypatch, capsys):
    """Seed 5 leaves the range of seeds 1 to 3 and raises an alarm; seed 4 does not."""
    def run_stage(cfg, stage, seed, options, patches=(), name='healthy'):
        x = 50.0 if seed == 5 or patches else 0.1 * seed
        return [dict(x=x)] * 5, dict(kl='step 1: kl') if seed == 5 else {}
    monkeypatch.setattr(bugs, 'run_stage', run_stage)
    bugs.measure(bugs.Config(table=True), ['sharp'])
    assert capsys.readouterr().out.splitlines()[2:] == [
        '| sharp | ppo | – | `x` |', '', '1 of 1 bugs are given away, and 1 of 2 more healthy runs',
        'healthy ppo, seed 5: kl, x']

def test_a_run_is_that_of_its_seed_and_iterations(toy):
    cfg = bugs.Config(bug='sharp', iterations=6)
    one, again, other = (bugs.run_stage(cfg, 'sft', seed, {})[0] for seed in (1, 1, 2))
    assert [line['step'] for line in one] == [5, 10, 15, 20, 25, 30]
    assert bugs.columns(one) == bugs.columns(again) != bugs.columns(other)

def test_the_list(capsys):
    bugs.main(bugs.Config())
    *lines, empty, command = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bugs.BUGS
    assert (empty, command) == ('', 'python lessons/bugs.py --bug=NAME')
    assert all(course.load(f'bugs/{name}').__doc__ in line for name, line in zip(bugs.BUGS, lines))

def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    none = str(tmp_path / 'none')
    exits(capsys, f"--out_toy={none}: {none}/sft is missing; wanted what `python demo.py` makes", bugs.main,
          bugs.Config(bug='runaway', out_toy=none))
    monkeypatch.chdir(tmp_path)
    exits(capsys, 'wanted: cd ', bugs.main, bugs.Config())

@pytest.mark.parametrize('args, said', [
    (['--bug=nothing'], "--bug=nothing: bug must be one of coin, endless"),
    (['--bug=sharp', '--iterations=4'], "iterations must be at least 5"),
    (['--iterations=9'], "iterations must be left at 20: only bug or table reads it"),
    (['--table=True', '--seed=2'], "seed must be left at 1: only bug without table reads it")])
def test_bad_options_are_one_line(capsys, args, said):
    from common.options import parse_config
    exits(capsys, said, parse_config, bugs.Config, args)
