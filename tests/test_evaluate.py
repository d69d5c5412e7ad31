"""Numbers by hand for every statistic of evaluate.py, and one small evaluation of the toy world from end to end."""
import json
import math
from itertools import product

import pytest

import evaluate as ev
from common.batches import Row
from common.options import parse_config
from common.records import write_records
from common.rollout import pack
from common.tokens import load_tokenizer, prompt_ids, response_ids, save_bpe
from data.bpe import train_bpe
from data.toy import world
from model import GPT, GPTConfig
from tiny import one_line, records

import torch

T = torch.tensor

# ----------------------------------------------------------------------------------------------------------------
# texts

def test_distinct_by_hand():
    # 1-grams: a b a b | a c = 6, of which a b c are distinct; 2-grams: ab ba ab | ac = 4, of which ab ba ac
    assert ev.distinct(["a b a b", "a c"], 1) == pytest.approx(0.5)
    assert ev.distinct(["a b a b", "a c"], 2) == pytest.approx(0.75)
    assert ev.distinct(["a", ""], 2) == 0.0 # no pair of words at all

def test_self_bleu_by_hand():
    # "a b c d e" against the others: p = 4/5, 3/4, 2/3, 1/2, product 1/5, fourth root 0.668740, closest reference as
    # long; "a b c d f" the same; "a b": p = 1, 1 and no longer n-grams, closest reference 5: e^(1 - 5/2) = 0.223130
    assert ev.self_bleu(["a b c d e", "a b c d f", "a b"]) == pytest.approx((2 * 0.668740 + 0.223130) / 3, abs=1e-6)

def test_self_bleu_counts_at_most_as_often_as_one_reference():
    # "x x x" has two references with one x each: p_1 = 1/3, not 2/3 or 1; xx is found nowhere, 0.1 of 2; xxx 0.1 of 1
    # (1/3 * 0.05 * 0.1)^(1/3) = 0.118563, and both references are 2 long, so no brevity penalty
    # "x y" against "x x x" (3) and "x z" (2): p = 1/2 and 0.1 of 1: sqrt(0.05) = 0.223607; "x z" the same
    assert ev.self_bleu(["x x x", "x y", "x z"]) == pytest.approx((0.118563 + 2 * 0.223607) / 3, abs=1e-6)

def test_self_bleu_leaves_each_text_out_of_its_own_references():
    assert ev.self_bleu(["a b c d", "a b c d"]) == pytest.approx(1.0)
    # nothing in common: p_n = 0.1/4, 0.1/3, 0.1/2, 0.1/1, product 0.0001/24, fourth root 0.045180
    assert ev.self_bleu(["a b c d", "e f g h"]) == pytest.approx(0.045180, abs=1e-6)
    assert ev.self_bleu(["a b"]) == 0.0 and ev.self_bleu(["", "a b"]) == 0.0 # nothing to compare with
    assert ev.self_bleu(["a b c d", "a b c d", "x y"], at_most=2) == pytest.approx(1.0)

# ----------------------------------------------------------------------------------------------------------------
# comparisons

def test_win_rate_counts_a_tie_as_half():
    assert ev.win_rate([1.0, 0.2, 0.5, 0.9], [0.8, 0.8, 0.5, 0.1]) == 0.625 # win, loss, tie, win
    assert ev.win_rate([0.5 + 4e-7, 0.5 + 3e-7], [0.5, 0.5]) == 0.5 # equal within rounding

def test_wilson_interval_by_hand():
    # p = .8, n = 10, z^2 = 3.841459: centre (.8 + .192073) / 1.384146 = .716740,
    # half 1.959964 * sqrt(.016 + .009604) / 1.384146 = .226577
    assert ev.wilson(0.8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-5)
    assert ev.wilson(1.0, 10) == pytest.approx([0.722467, 1.0], abs=1e-5) # 1 / 1.384146: not a point

def of_lengths(*groups):
    """Return the length-controlled win rate of groups (answers, wins among them, longer by so many characters)."""
    wins = [float(k < won) for n, won, _ in groups for k in range(n)]
    return ev.length_controlled(wins, [100 + d for n, _, d in groups for _ in range(n)], [100] * len(wins))

def test_length_controlled_where_length_alone_decides():
    # the longer answer always wins, and half of the answers are longer: theta is 0. The plain rate is a half as well;
    # with three times as many longer ones it is .75. With half of those won that are as long theta is again about 0
    assert of_lengths((50, 50, 7), (50, 0, -7)) == pytest.approx(0.5, abs=1e-6)
    assert of_lengths((300, 300, 7), (100, 0, -7), (400, 200, 0)) == pytest.approx(0.5, abs=0.02)

def test_length_controlled_where_the_model_alone_decides():
    # each length wins 70 of 100: phi is 0, theta the plain rate's logit; the same where all lengths are equal
    groups = (100, 70, -20), (100, 70, 0), (200, 140, 3)
    assert of_lengths(*groups) == pytest.approx(0.7, abs=1e-6)
    assert of_lengths((10, 3, 0)) == of_lengths((10, 3, 5)) == pytest.approx(0.3, abs=1e-6)
    assert of_lengths((10, 10, 0), (10, 10, 4)) == 1.0 and of_lengths((5, 0, 3)) == 0.0
    assert ev.length_controlled([0.5, 1.0], [3, 3], [3, 3]) == pytest.approx(0.75, abs=1e-6) # a tie is half a win

def test_length_controlled_by_hand():
    # two groups, 100 longer and 100 shorter by as much: x = tanh(+-1) = +-.761594. With theta = ln 3 and phi x = +-2
    # they win at odds of 3 e^2 and 3 e^-2: .956835 and .288765. The penalised log-likelihood of shares w1, w2 slopes by
    #   theta: 100 (w1 - .956835) + 100 (w2 - .288765)        phi: 76.1594 ((w1 - .956835) - (w2 - .288765)) - phi
    # Both are 0 for w1 = .956835 + e and w2 = .288765 - e with e = phi / 152.3188 = 2.626071 / 152.3188 = .017241.
    # The plain rate is (w1 + w2) / 2 = .622800, the length-controlled one sigmoid(ln 3) = 3/4
    wins = [0.956835 + 0.017241] * 100 + [0.288765 - 0.017241] * 100
    assert ev.mean(wins) == pytest.approx(0.622800, abs=1e-6)
    assert ev.length_controlled(wins, [30] * 100 + [10] * 100, [20] * 200) == pytest.approx(0.75, abs=2e-6)

def test_length_controlled_stays_finite():
    # one loss among a thousand wins, and that by far the longest answer
    d = [*range(-500, 499), 5000]
    assert 0.99 < ev.length_controlled([1.0] * 999 + [0.0], [6000 + x for x in d], [6000] * 1000) < 1
    assert 0 < ev.length_controlled([0.0] * 2 + [1.0], [5, 5, 9], [5, 5, 5]) < 0.5 # length alone decides

def test_calibration_by_hand():
    # sigmoid(ln 3) = .75, three times, a preferred twice (the third pair is told the other way round: b has the higher
    # score and was preferred); a difference of 0 predicts a half and is half right
    pairs = [(math.log(3), 1.0), (math.log(3), 0.0), (-math.log(3), 0.0), (0.0, 1.0)]
    table, error = ev.calibration(pairs)
    assert [row[2] for row in table] == [1, 3]
    assert table[0][:2] == pytest.approx([0.5, 0.5]) and table[1][:2] == pytest.approx([0.75, 2 / 3])
    assert error == pytest.approx(0.0625) # 3/4 of .75 - 2/3
    assert ev.calibration([(4e-7, 1.0)])[0] == [[pytest.approx(0.5), 0.5, 1]] # 0 within rounding

# ----------------------------------------------------------------------------------------------------------------
# models

class Fixed:
    """A fake model: the same distribution p over three tokens everywhere, and absurd ones where mask is 0."""

    def __init__(self, p):
        self.p = T(p)

    def logits_at(self, idx, mask):
        assert mask.shape == (idx.size(0), idx.size(1) - 1)
        return (self.p.log() + 5.0).expand(int(mask.sum()), 3) # logits may be shifted by any constant

    def logp(self, idx, mask):
        logp = self.p.log()[idx[:, 1:].clamp(max=2)]
        return torch.where(mask > 0, logp, T(-1e9))

def test_kl_is_exact_and_sums_over_the_answer():
    # .7 ln(.7/.4) + .2 ln(.2/.4) + .1 ln(.1/.2) = .391731 - .138629 - .069315 = .183787 a token; pads hold word 99999
    p, q = Fixed([.7, .2, .1]), Fixed([.4, .4, .2])
    r = pack([[0, 1], [0]], [[1, 2, 0], [2]], [[0.0] * 3, [0.0]], eos=2)
    r.idx[1, 2:] = 99999
    assert ev.answer_kl(p, q, r, rows=1).tolist() == pytest.approx([3 * 0.183787, 0.183787], abs=1e-5)
    assert ev.answer_kl(p, q, r, rows=64).tolist() == pytest.approx([3 * 0.183787, 0.183787], abs=1e-5)
    assert ev.answer_kl(p, p, r, rows=64).tolist() == [0.0, 0.0]
    # the other direction is another number: .4 ln(.4/.7) + .4 ln(.4/.2) + .2 ln(.2/.1) = .192042
    assert ev.answer_kl(q, p, r, rows=64).tolist() == pytest.approx([3 * 0.192042, 0.192042], abs=1e-5)

def test_kl_of_a_model_reads_the_right_positions():
    torch.manual_seed(0)
    model, reference = (GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=1, n_embd=8)) for _ in range(2))
    for m in (model, reference):
        torch.nn.init.normal_(m.wte.weight) # far from uniform
    r = pack([[1, 2, 3]], [[0, 4]], [[0.0, 0.0]], eos=4)
    expected = 0.0
    for position in (2, 3): # the logits after tokens 0 … 2 choose the answer's first token, after 0 … 3 its EOS
        p, q = (m(r.idx)[0][0, position].softmax(-1) for m in (model, reference))
        expected += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist()))
    assert ev.answer_kl(model, reference, r, rows=4).item() == pytest.approx(expected, abs=1e-5)

def test_perplexity_by_hand():
    # counted tokens: word 0 (.5) twice and word 1 (.125): 2 ln 2 + ln 8 = 5 ln 2 over 3 tokens: 2^(5/3) = 3.174802
    batches = [[([2, 0, 0], [0, 1, 1])], [([2, 2, 1], [0, 0, 1]), ([2, 0], [0, 0])]]
    assert ev.perplexity(Fixed([.5, .125, .375]), batches, 'cpu') == pytest.approx(3.174802, abs=1e-5)

def test_a_policy_as_its_own_reward_model_by_hand():
    # two records: answers of 2, 1 and 4 tokens in the order of their ranks, then of 1 and 2, the second preferred
    rows = [Row([7], [[1, 1], [1], [1, 1, 1, 1]], dict(ranks=[0, 1, 2])), Row([7], [[1], [1, 1]], dict(ranks=[1, 0]))]
    logp = [(rows[0], [-3.0, -1.0, -8.0]), (rows[1], [-1.0, -1.5])]
    ref = [(rows[0], [-4.0, -2.0, -8.0]), (rows[1], [-0.5, -3.5])]
    # mean log pi: -1.5 -1 -2 and -1 -.75; in order: 1 over 3, 2 over 3, and 2 over 1 of the second, of 4 pairs
    # log pi - log pi_ref: 1 1 0 and -.5 2; in order: the same; answers 1 and 2 of the first tie
    assert ev.measure_policy(logp, ref) == dict(mean_logp=0.75, log_ratio=0.875)
    assert ev.measure_policy(ref, ref)['log_ratio'] == 0.5 # all tie

def test_answers_are_scored_row_by_row_in_their_order():
    rows = [Row([5] * n, [[1] * k for k in range(1, 4)], dict(ranks=[0, 1, 2])) for n in (900, 3, 1500, 1)]
    seen = []

    def score(some): # 100 * prompt's length + answer's length
        seen.append(sorted(len(row.prompt) for row in some))
        return T([float(100 * len(row.prompt) + len(a)) for row in some for a in row.answers])

    scored = ev.score_rows(score, rows, 'x', 'scores')
    assert scored == [(row, [100 * len(row.prompt) + k for k in (1, 2, 3)]) for row in rows]
    assert seen == [[1], [3], [900], [1500]] # 2048 tokens at once, of the longest
    assert ev.pairs(scored[1:2]) == [(301, 302), (301, 303), (302, 303)]

def test_share_of_what_is_said_to_answerable_questions():
    said = ['right', "doesn't know", 'declines', 'wrong', 'broken', 'right', 'right', 'wrong'] # 3, 1, 1 and 3 of 8
    parts = [dict(kind='helpful', category='sum', said=s, content=int(s == 'right'), gold=0.5) for s in said]
    parts += [dict(kind='honest', category='future', said="doesn't know", content=1, gold=1.0)] * 5 # not counted
    r = pack([[0]] * 13, [[2]] * 13, [[0.0]] * 13, eos=2)
    row = ev.describe(r, ev.Written(['x'] * 13, [], parts, {}))
    assert row['answerable'] == dict(right=0.375, abstains=0.125, wrong=0.375, declines=0.125)
    parts = [part for part in parts if part['kind'] == 'honest']
    row = ev.describe(r, ev.Written(['x'] * 5, [], parts, {}))
    assert row['answerable'] == dict.fromkeys(('right', 'abstains', 'wrong', 'declines')) # None: none was asked

# ----------------------------------------------------------------------------------------------------------------
# end to end

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """Three tiny untrained models, a reward model, records and logs, all of the toy world."""
    folder = tmp_path_factory.mktemp('toy')
    save_bpe(train_bpe(world.corpus(300, 1), 400, 2), folder / 'toy.tiktoken')
    tok = load_tokenizer(str(folder / 'toy.tiktoken'))
    for seed, name in enumerate(('base', 'sft', 'ppo', 'reward')):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(96, tok.n_vocab, 1, 2, 16, reward_head=name == 'reward'))
        torch.nn.init.normal_(model.wte.weight, std=0.1 * (seed + 1))
        model.save_pretrained(folder / name)
        tok.save(folder / name)
        (folder / name / 'log.jsonl').write_text(''.join(json.dumps(
            dict(step=i, loss=1 / i, kl=0.1 * i, reward=0.1 * i, gold=0.5 - 0.01 * i)) + '\n' for i in range(1, 5)))
    write_records(folder / 'prompts.jsonl', world.prompts('val', 20, 1))
    write_records(folder / 'demonstrations.jsonl', world.demonstrations(10, 1, 'val'))
    write_records(folder / 'text.jsonl', [{'text': t} for t in world.corpus(10, 1, 'val')])
    write_records(folder / 'pairs.jsonl', world.controlled_pairs('val', 2, 1))
    write_records(folder / 'rankings.jsonl', [
        {'prompt': 'Where does the fox live?', 'responses': ['In a den.', 'In a barn. My aunt says so too.', 'Red.'],
         'ranks': [0, 1, 1], 'scores': [0.9, 0.0, 0.1]}] * 3)
    return folder

def options(toy, out_dir, **more):
    return ev.Config(**dict(
        models=','.join(f"{n}={toy}/{n}" for n in ('base', 'sft', 'ppo')), reward_model=f"{toy}/reward", best_of=2,
        prompts=f"{toy}/prompts.jsonl", text=f"{toy}/demonstrations.jsonl", rankings=f"{toy}/rankings.jsonl",
        comparisons=f"{toy}/pairs.jsonl", gold='data.toy.world:gold', max_new_tokens=6, device='cpu',
        out_dir=str(out_dir)) | more)

@pytest.fixture(scope='module')
def evaluated(toy, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('evaluated')
    ev.main(options(toy, out_dir, figure_runs=f"beta=0.1={toy}/ppo,again={toy}/sft"))
    return out_dir

def read(out_dir):
    return json.loads((out_dir / 'results.json').read_text())

def test_results_hold_what_was_asked_for(evaluated):
    results = read(evaluated)
    for decoding in ('models', 'greedy'):
        assert list(results[decoding]) == ['base', 'sft', 'ppo', 'best_of_n']
        kl = 'kl' if decoding == 'models' else 'path_kl' # along one answer: no KL of distributions
        for name, row in results[decoding].items():
            assert {'gold', 'helpful', 'honest', 'harmless', 'win_rate_vs_sft', 'win_rate_interval', kl, 'perplexity',
                    'distinct_1', 'distinct_2', 'self_bleu', 'length', 'ended', 'reward', 'by_category', 'answerable',
                    'length_controlled'} == set(row)
            assert sum(row['answerable'].values()) == pytest.approx(1, abs=1e-5)
            assert row['answerable']['right'] == row['helpful']
        assert results[decoding]['sft'][kl] == 0 and results[decoding]['sft']['win_rate_vs_sft'] == 0.5
        assert results[decoding]['sft']['length_controlled'] == 0.5
        assert results[decoding]['ppo'][kl] > 0.1
        assert results[decoding]['base']['perplexity'] == results['models']['base']['perplexity'] > 1
    best = results['models']['best_of_n']
    assert best['kl'] == pytest.approx(0.193147, abs=1e-6) and best['perplexity'] is None # ln 2 - 1/2
    assert best['reward'] > results['models']['sft']['reward']
    assert results['greedy']['best_of_n'] == results['greedy']['sft']
    quality = results['reward_model']
    assert set(quality['by_category']) == set(world.PAIR_CATEGORIES) and 0 <= quality['accuracy'] <= 1
    assert quality['ceiling'] == 1.0 # 0.9 beats both
    assert quality['shorter_wins'] == 0.5 # of the two worse, one is shorter
    assert sum(n for _, _, n in quality['calibration']) == 6 # three records, two pairs each
    assert quality['pairs'] == dict(accuracy=6, ceiling=6, shorter_wins=6) | dict.fromkeys(world.PAIR_CATEGORIES, 2)
    assert results['seed'] == 1 and results['seconds']['evaluate'] > 0

def test_policies_as_reward_models(toy, evaluated):
    """The shares equal those of log-probabilities taken answer by answer, without batches."""
    own, tok = read(evaluated)['policies_as_reward'], load_tokenizer(str(toy / 'toy.tiktoken'))
    assert list(own) == ['base', 'sft', 'ppo']
    def logp(name, prompt, answer):
        model, p, a = GPT.from_pretrained(str(toy / name)), prompt_ids(tok, prompt), response_ids(tok, answer)
        idx = T([p + a])
        return model(idx)[0][0, len(p) - 1:-1].log_softmax(-1).gather(1, T(a)[:, None]).sum().item(), len(a)
    lines = lambda file: map(json.loads, (toy / file).read_text().splitlines())
    pairs = dict(comparisons=[(row['prompt'], row['chosen'], row['rejected']) for row in lines('pairs.jsonl')],
                 rankings=[(row['prompt'], row['responses'][0], worse)
                           for row in lines('rankings.jsonl') for worse in row['responses'][1:]])
    for name, option in product(('base', 'ppo'), pairs):
        means, ratios = [], []
        for prompt, *texts in pairs[option]:
            (a, n), (b, m) = (logp(name, prompt, text) for text in texts)
            (c, _), (d, _) = (logp('sft', prompt, text) for text in texts)
            means.append(a / n > b / m)
            ratios.append(a - c > b - d)
        expected = dict(mean_logp=sum(means) / len(means), log_ratio=sum(ratios) / len(ratios))
        assert own[name][option] == pytest.approx(expected, abs=1e-6)
    assert own['sft']['rankings']['log_ratio'] == own['sft']['comparisons']['log_ratio'] == 0.5

def test_policies_are_measured_without_a_reward_model(toy, evaluated, tmp_path):
    ev.main(options(toy, tmp_path, reward_model='', best_of=0, gold='', text='', max_prompts=2, figures=False,
                    models=f"ppo={toy}/ppo,sft={toy}/sft"))
    own = read(evaluated)['policies_as_reward']
    assert read(tmp_path)['policies_as_reward'] == {name: own[name] for name in ('ppo', 'sft')}

def test_samples_and_figures_are_written(evaluated):
    rows = [json.loads(line) for line in (evaluated / 'samples.jsonl').read_text().splitlines()]
    assert len(rows) == 20 * 4
    for row in rows:
        assert row['sampled_gold'] == world.gold(row['prompt'], row['sampled'])
    for name in ('learning_curves', 'calibration', 'reward_kl', 'overoptimisation'):
        assert (evaluated / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
    assert not list(evaluated.glob('*.tmp'))

def test_scripted_answers_are_scored_as_text(toy, tmp_path, monkeypatch):
    # whatever is asked, the fake says that it does not know, and forgets to end: right for the honest kind alone
    def say(model, prompts, tok, max_new_tokens, temperature=1.0):
        return [response_ids(tok, "I don't know.")[:-1] for _ in prompts], []
    monkeypatch.setattr(ev, 'sample_answers', say)
    ev.main(options(toy, tmp_path, figures=False, best_of=0))
    for row in read(tmp_path)['models'].values():
        assert (row['honest'], row['helpful'], row['harmless'], row['ended']) == (1.0, 0.0, 0.0, 0.0)
        assert row['win_rate_vs_sft'] == 0.5 and row['self_bleu'] == 1.0
        # "I don't know." is 3 words, 20 times: 3 distinct of 60, 2 distinct pairs of 40
        assert (row['distinct_1'], row['distinct_2']) == (0.05, 0.05)
        assert row['answerable'] == dict(right=0.0, abstains=1.0, wrong=0.0, declines=0.0)
        assert row['length_controlled'] == 0.5
    sample = json.loads((tmp_path / 'samples.jsonl').read_text().splitlines()[0])
    assert sample['sampled'] == sample['greedy'] == "I don't know." # without the space that comes before it

def test_same_seed_same_numbers_whatever_else_is_in_the_list(toy, evaluated, tmp_path):
    ev.main(options(toy, tmp_path, models=f"sft={toy}/sft,ppo={toy}/ppo", best_of=0, figures=False))
    few, all_ = read(tmp_path), read(evaluated)
    for decoding in ('models', 'greedy'):
        assert few[decoding] == {name: all_[decoding][name] for name in ('sft', 'ppo')}
    assert few['reward_model'] == all_['reward_model'] and not list(tmp_path.glob('*.png'))

def test_the_baseline_has_random_numbers_of_its_own(toy, tmp_path):
    """One model by three names: the baseline's answers are other ones than those that are compared with them."""
    ev.main(options(toy, tmp_path, models=','.join(f"{name}={toy}/sft" for name in ('sft', 'a', 'b')), gold='', text='',
                    reward_model='', best_of=0, comparisons='', rankings='', figures=False))
    rows = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    of = lambda name, decoding: [row[decoding] for row in rows if row['model'] == name]
    assert of('a', 'sampled') == of('b', 'sampled') != of('sft', 'sampled')
    assert of('a', 'greedy') == of('b', 'greedy') == of('sft', 'greedy')

def test_wins_go_by_reward_without_gold_and_are_left_out_without_either(toy, tmp_path):
    ev.main(options(toy, tmp_path, gold='', max_prompts=5, comparisons='', rankings='', text=f"{toy}/text.jsonl",
                    figures=False))
    row = read(tmp_path)['models']['ppo']
    assert 'gold' not in row and 'win_rate_vs_sft' in row and read(tmp_path)['reward_model'] == {}
    ev.main(options(toy, tmp_path, gold='', max_prompts=5, comparisons='', rankings='', text='', reward_model='',
                    best_of=0, baseline='base', reference='sft', overwrite=True))
    results = read(tmp_path)
    assert set(results['models']['ppo']) == {'kl', 'distinct_1', 'distinct_2', 'self_bleu', 'length', 'ended'}
    assert results['models']['sft']['kl'] == 0 < results['models']['base']['kl']

def longer(record, answer):
    """A gold score whose module has no `explain`. It is given the whole record."""
    return len(answer) / 10 if record['kind'] else None

def test_a_gold_score_without_parts(toy, tmp_path):
    ev.main(options(toy, tmp_path, gold=f'{__name__}:longer', max_prompts=3, best_of=0, figures=False))
    rows = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert all(row['greedy_gold'] == len(row['greedy']) / 10 for row in rows) and len(rows) == 9
    results = read(tmp_path)['models']
    assert 'by_category' not in results['ppo'] and 'honest' not in results['ppo']
    for name in ('sft', 'ppo'):
        gold = [row['sampled_gold'] for row in rows if row['model'] == name]
        assert results[name]['gold'] == pytest.approx(sum(gold) / 3, abs=1e-6)

def test_a_gold_score_in_a_file_with_its_parts(toy, tmp_path):
    (tmp_path / 'my_gold.py').write_text('''
def gold(record, answer, scale=1):
    return scale * len(record['category'])

def explain(record, answer):
    return dict(kind='helpful', category='any', content=1, said='right')
''')
    ev.main(options(toy, tmp_path / 'out', gold=f'{tmp_path}/my_gold.py:gold(scale=2)', max_prompts=3, best_of=0,
                    figures=False))
    prompts = [json.loads(line) for line in (toy / 'prompts.jsonl').read_text().splitlines()][:3]
    for row in read(tmp_path / 'out')['models'].values():
        assert row['gold'] == pytest.approx(2 * sum(len(p['category']) for p in prompts) / 3, abs=1e-6)
        assert row['by_category'] == {'any': 1.0} and row['answerable']['right'] == 1.0 and row['honest'] is None

def test_a_reward_function_alone_and_beside_the_reward_model(toy, tmp_path):
    (tmp_path / 'my_reward.py').write_text('def length(record, answer):\n    return len(answer)\n')
    name, alone = f'{tmp_path}/my_reward.py:length', dict(reward_model='', best_of=0, max_prompts=3, figures=False)
    ev.main(options(toy, tmp_path / 'a', reward=name, **alone))
    ev.main(options(toy, tmp_path / 'b', **alone | dict(reward_model=f'{toy}/reward')))
    ev.main(options(toy, tmp_path / 'c', reward=name, reward_weight=0.5, **alone | dict(reward_model=f'{toy}/reward')))
    a, b, c = (read(tmp_path / run)['greedy'] for run in 'abc')
    samples = [json.loads(line) for line in (tmp_path / 'a' / 'samples.jsonl').read_text().splitlines()]
    for model in a:
        lengths = [len(s['greedy']) for s in samples if s['model'] == model]
        assert a[model]['reward'] == pytest.approx(sum(lengths) / 3, abs=1e-5)
        assert c[model]['reward'] == pytest.approx(b[model]['reward'] + 0.5 * a[model]['reward'], abs=1e-4)

def test_over_optimisation_alone(toy, tmp_path):
    ev.main(ev.Config(figure_runs=f"beta 0={toy}/ppo", out_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ['overoptimisation.png']

@pytest.mark.parametrize('more, words', [
    (dict(baseline='nobody'), '--baseline=nobody: wanted one of the names in --models: base, sft, ppo'),
    (dict(reference='nobody'), '--reference=nobody'),
    (dict(models='sft'), 'wanted name=folder'),
    (dict(models='sft=TOY/sft,sft=TOY/ppo'), 'each name once'),
    (dict(models='sft=TOY/reward'), 'is a reward model'),
    (dict(models='sft=TOY/sft,x=TOY/other'), 'vocabulary'),
    (dict(reward_model='TOY/sft'), 'is a language model'),
    (dict(models='sft=TOY/sft,best_of_n=TOY/ppo'), 'another name'),
    (dict(max_new_tokens=96), 'room'),
    (dict(figure_runs='a=TOY/nowhere', models=''), 'wanted lines with `kl`'),
    (dict(figure_runs='a=TOY/nowhere'), 'nowhere/log.jsonl: no such file; wanted lines with `kl`'), # before it measures
    (dict(rankings='TOY/nowhere.jsonl'), 'nowhere.jsonl: no such file'),
    (dict(gold='data.toy.world:silver'), '--gold=data.toy.world:silver: cannot be imported'),
    (dict(prompts='TOY/others.jsonl'), "not a prompt of the toy world: 'Hi'"),
    (dict(prompts='TOY/others.jsonl'), "others.jsonl: {'prompt': 'Hi'}"),
])
def test_bad_input_is_one_line(toy, tmp_path, capsys, more, words):
    other = toy / 'other'
    write_records(toy / 'others.jsonl', [{'prompt': 'Hi'}])
    if not other.exists():
        GPT(GPTConfig(96, 257, 1, 2, 16)).save_pretrained(other)
        load_tokenizer('bytes').save(other)
    more = {k: v.replace('TOY', str(toy)) if isinstance(v, str) else v for k, v in more.items()}
    with pytest.raises(SystemExit) as stopped:
        ev.main(options(toy, tmp_path / 'out', **more) if more.get('models') != '' else ev.Config(**more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and words in lines[-1] and len(lines) == 1
    assert not (tmp_path / 'out').exists()

def test_results_are_never_lost(toy, tmp_path, capsys):
    few = dict(models=f"sft={toy}/sft", max_prompts=2, best_of=0, reward_model='', text='', figures=False)
    ev.main(options(toy, tmp_path, **few))
    before = (tmp_path / 'results.json').read_bytes()
    line = one_line(capsys, lambda: ev.main(options(toy, tmp_path, **few | dict(models='sft=no_such_folder'))))
    assert line == (f'--out_dir={tmp_path}: holds results; replace them by --overwrite=True, or choose another folder')
    assert (tmp_path / 'results.json').read_bytes() == before
    ev.main(ev.Config(figure_runs=f"beta 0={toy}/ppo", out_dir=str(tmp_path))) # writes no results
    ev.main(options(toy, tmp_path, **few | dict(seed=2), overwrite=True))
    assert read(tmp_path)['seed'] == 2

def test_two_at_once_in_one_folder(toy, tmp_path, capsys):
    fcntl = pytest.importorskip('fcntl', reason='Windows has no such locks')
    with open(tmp_path / '.lock', 'w') as other: # as another process would hold it
        fcntl.flock(other, fcntl.LOCK_EX)
        line = one_line(capsys, lambda: ev.main(options(toy, tmp_path, reward_model='', best_of=0)))
    assert 'another process is writing here' in line and [p.name for p in tmp_path.iterdir()] == ['.lock']

def test_several_processes_are_refused(toy, tmp_path, monkeypatch, capsys):
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    line = one_line(capsys, lambda: ev.main(options(toy, tmp_path / 'out')))
    assert line == 'evaluate.py measures in one process; wanted it started without torchrun'
    assert not (tmp_path / 'out').exists()

def poison(monkeypatch, loader, name):
    """Make the model of that folder give NaN at every token, though its file holds none."""
    load = getattr(ev, loader)

    def loading(folder, *args):
        model = load(folder, *args)
        if folder.endswith(name):
            torch.nn.init.constant_(model.ln_f.weight, math.nan)
        return model

    monkeypatch.setattr(ev, loader, loading)

@pytest.mark.parametrize('loader, name, more, words', [
    ('load_policy', '/ppo', {}, '--models: ppo: its log-probabilities'),
    ('load_reward_model', '/reward', {}, '/reward: its scores'),
    ('load_reward_model', '/reward', dict(rankings='', comparisons='', best_of=0), '/reward: its scores')])
def test_a_model_of_nan_has_no_row(toy, tmp_path, monkeypatch, capsys, loader, name, more, words):
    poison(monkeypatch, loader, name)
    with pytest.raises(SystemExit) as stopped:
        ev.main(options(toy, tmp_path, **more))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and line.startswith('error: ') and words in line and 'are not finite' in line
    assert not (tmp_path / 'results.json').exists() and not (tmp_path / 'samples.jsonl').exists()

def test_a_kl_of_nan_has_no_row(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ev, 'answer_kl', lambda *args: T([0.0, math.nan]))
    with pytest.raises(SystemExit) as stopped:
        ev.main(options(toy, tmp_path))
    assert stopped.value.code == 1 and 'error: --models: base: its KL and perplexity' in capsys.readouterr().err
    assert ev.perplexity(Fixed([.5, math.nan, .375]), [[([2, 1], [0, 1])]], 'cpu') == math.inf
    assert ev.perplexity(Fixed([1.0, 0.0, 0.0]), [[([2, 1], [0, 1])]], 'cpu') == math.inf # e^710 has no float

def test_what_the_tables_call_things(toy, tmp_path, capsys):
    """The sum along the greedy answer is called no KL, shares tell of how many pairs, no prompt acts on the screen."""
    prompts = records(tmp_path / 'p.jsonl', [dict(prompt='Hi \x1b[2J there'), dict(prompt='A\nb')])
    ev.main(options(toy, tmp_path, prompts=prompts, gold='', models=f"sft={toy}/sft", figures=False))
    said = capsys.readouterr().out
    sampled, greedy = said.split('answers greedy')
    assert ' kl ' in sampled and 'path_kl' not in sampled and ' path_kl ' in greedy and ' kl ' not in greedy
    quality = [line.split() for line in said.split('ordered as preferred\n')[1].splitlines()]
    assert quality[0] == ['pairs', 'share', 'n'] and [row[0::2] for row in quality[1:4]] == [
        ['accuracy', '6'], ['ceiling', '6'], ['shorter_wins', '6']]
    assert r"'Hi \x1b[2J there'" in said and r"'A\nb'" in said and '\x1b' not in said

@pytest.mark.parametrize('flags', [['--best_of=2', '--models=a=b', '--prompts=p'], ['--best_of=1'], ['--models=a=b'],
                                   ['--gold=real', '--models=a=b', '--prompts=p'], []])
def test_impossible_options(flags):
    with pytest.raises(SystemExit) as stopped:
        parse_config(ev.Config, flags)
    assert stopped.value.code == 2
