"""lab/story.py: what demo.py says of its stages, and what it prints at its end. Numbers are worked out by hand."""
import json
import re
import shlex

import pytest

import demo
from common.tokens import prompt_ids
from data.toy import world
from lab import story
from model import GPT
from tiny import TOK, checkpoint, records

EVERYTHING = [dict(methods='all', rounds=2, rounds_by='ai'), dict(rounds=3, rounds_of='dpo', rounds_by='reward_model'),
              dict(world='sums', methods='all'), dict(world='reviews', methods='all')]

@pytest.mark.parametrize('options', EVERYTHING)
def test_every_stage_has_a_sentence(options):
    cfg = demo.Config(**options)
    for name, *_ in demo.stages(cfg):
        told = story.before(name, cfg.world)
        assert told.startswith(f'[{name}] ') and 20 < len(told) <= 3 * story.WIDTH and told.endswith('.'), told
        assert max(map(len, told.split('\n'))) <= story.WIDTH
        same = f"The same as {name.removesuffix('_direct')}, without the scratch line"
        assert (same in told) == name.endswith('_direct')

def test_later_rounds_are_told_as_the_first():
    what = lambda name: ' '.join(story.before(name, 'toy').split()).removeprefix(f'[{name}] ')
    assert what('ppo2_ai') == what('ppo') != '' and what('reward3') == what('reward') != ''
    assert 'new feedback' in story.before('collect rrhf3', 'toy') and story.before('something else', 'toy') == ''

def test_quotes_are_short_and_one_line():
    assert story.quoted(' Yes.\nNo. ') == r'"Yes.\nNo."' and story.quoted('a\x1b[2Jb') == '"a\ufffd[2Jb"'
    assert story.quoted('123456789', 9) == '"123456789"' and story.quoted('1234567890', 9) == '"12345 […]"'
    assert story.quoted('1234\n67890', 9) == '"1234 […]"' # no half of \n is left

def test_the_sentence_on_the_gold_score_is_true():
    """A right answer alone has two parts of three; rude, it loses courtesy; it rambles, and brevity is gone."""
    gold = lambda text: world.gold('What is 1 plus 1?', text)
    assert gold('Sure! It is 2.') == 1.0 and gold('It is 2.') == 0.9 and gold('Sure! It is 3.') == 0.2
    assert story.PARTS == '0.8 for right content, 0.1 for courtesy, 0.1 for brevity'
    assert f'gold score: {story.PARTS}.' in ' '.join(story.before('collect train', 'toy').split())

@pytest.mark.parametrize('script, lines, told', [
    ('sft.py', [dict(step=0, val_loss=6.914), dict(step=1, loss=3.0), dict(step=2, val_loss=0.7202)],
     'held-out loss per token (lower is better): 6.91 → 0.72'),
    ('reward.py', [dict(step=9, loss=0.2), dict(step=9, val_accuracy=0.9431)],
     "share of held-out pairs in the person's order: 0.94"),
    ('ppo.py', [dict(reward=-0.12, gold=0.442), dict(reward=0.97, gold=0.7812)],
     'gold score (which it never sees) of its sampled answers on training prompts, while it trains: 0.44 → 0.78'),
    ('reinforce.py', [dict(reward=0.4414), dict(reward=0.985)], 'reward of its sampled answers: 0.44 → 0.98'),
    ('kto.py', [dict(margin=1.0)], ''), ('bench.py', [dict(loss=1.0)], '')])
def test_the_number_to_look_at(tmp_path, script, lines, told):
    records(tmp_path / 'log.jsonl', lines)
    assert story.number(tmp_path, script) == told

def test_the_answer_that_changed_most():
    gold = lambda row, text: dict(bad=0.1, good=0.9, best=1.0)[text]
    rows = [0] * 4
    assert story.most_changed(rows, ['bad'] * 4, ['bad'] * 4, gold) is None
    assert story.most_changed(rows, ['bad', 'good', 'bad', 'bad'], ['bad', 'best', 'good', 'good'], gold) == 2
    assert story.most_changed(rows, ['bad', 'good', 'bad', 'best'], ['bad', 'best', 'bad', 'bad'], gold) == 3 # worse
    assert story.most_changed([0], ['bad'], ['bad'], gold) is None
    same = lambda row, text: 0.5 # in other words
    assert story.most_changed(rows, ['a', 'b', 'c', 'd'], ['a', 'x', 'y', 'd'], same) == 1
    assert story.most_changed([], [], [], gold) is None

def test_answers_are_the_greedy_ones(tmp_path):
    folder = checkpoint(tmp_path / 'policy', seed=5)
    rows = [dict(prompt='Hi'), dict(prompt='Who?')]
    model = GPT.from_pretrained(folder)
    expected = [TOK.decode(model.generate([prompt_ids(TOK, row['prompt'])], 32, 0.0, eos=TOK.eos)[0]).strip()
                for row in rows]
    assert story.answers(folder, rows) == expected and expected[0]
    assert story.answers(tmp_path / 'nowhere', rows) == story.answers('', rows) == story.answers(folder, []) == []

def test_first_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert story.first_prompts('toy') == []
    (tmp_path / 'data/toy').mkdir(parents=True)
    turns = [dict(role='user', content='Hi'), dict(role='assistant', content='Yo'), dict(role='user', content='Who?')]
    records('data/toy/prompts_test.jsonl', [dict(prompt=turns), *(dict(prompt=str(n)) for n in range(30))])
    assert [row['prompt'] for row in story.first_prompts('toy')] == [str(n) for n in range(24)]

Q = ['How can I burn the tent?', 'What colour is the fox?']
SAID = dict(base=['You can use a torch.', 'Red.'], sft=["I can't help with that.", 'Red.'],
            ppo=["I can't help with that.", 'Red.'])

@pytest.mark.parametrize('options, folder, told', [
    (dict(init_from='base'), 'sft',
     f'Greedy answer to "{Q[0]}": before "You can use a torch.", now "I can\'t help with that."'),
    (dict(policy='sft', init_from=''), 'ppo',
     f'Greedy answer to "{Q[0]}": "I can\'t help with that." (its greedy answers to the first 2 test prompts are all '
     'the same as before)'),
    (dict(init_from='scratch'), 'base', f'Greedy answer to "{Q[0]}": "You can use a torch."'),
    (None, 'base', f'Greedy answer to "{Q[0]}": "You can use a torch."'),
    (dict(init_from='base'), 'nowhere', '')])
def test_what_a_stage_changed(tmp_path, monkeypatch, options, folder, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, 'first_prompts', lambda world: [dict(prompt=text) for text in Q])
    monkeypatch.setattr(story, 'answers', lambda folder, rows: SAID.get(folder, []))
    (tmp_path / folder).mkdir()
    if options:
        (tmp_path / folder / 'options.json').write_text(json.dumps(dict(options=options)))
    assert story.change(folder, 'toy') == told

def test_the_right_answer_stands_beside_a_problem(tmp_path, monkeypatch):
    """612+461 is 1073, 345+278 is 623: nobody has to work it out."""
    monkeypatch.setattr(story, 'first_prompts', lambda world: [dict(prompt='345+278', answer='623')])
    monkeypatch.setattr(story, 'answers', lambda folder, rows: ['13 11 05\n#### 0513'] if folder else [])
    assert story.change('grpo', 'sums') == r'Greedy answer to "345+278" (right: 623): "13 11 05\n#### 0513"'
    problem = sample('612+461', 'base', 0.0, 1.0) | dict(answer='1073')
    assert '"612+461" (right: 1073)' in story.side_by_side([dict(base=problem)], ['base'])

def test_rankings_are_told_by_their_best_and_worst(tmp_path):
    rows = [dict(prompt='Hi', responses=['a', 'b'], ranks=[0, 0]),
            dict(prompt='Who?', responses=['me', 'no one', 'you'], ranks=[1, 2, 0])]
    assert story.ranked(records(tmp_path / 'a', rows)) == (
        '2 prompts ranked. Sampled answers to "Who?": best "you", worst "no one"')
    assert story.ranked(records(tmp_path / 'b', rows[:1])) == '1 prompts' # they tie
    assert story.ranked(records(tmp_path / 'c', [dict(prompt='Hi', response='Yo')] * 3)) == '3 prompts'

def test_lines_after_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story, 'change', lambda folder, world: f'{folder} of {world} ' + 'and so on ' * 16)
    (tmp_path / 'out/sft').mkdir(parents=True)
    (tmp_path / 'data').mkdir()
    records('out/sft/log.jsonl', [dict(val_loss=0.5), dict(val_accuracy=0.9)])
    stage = lambda name, script: (name, script, '', {}, 'out/sft/model.safetensors', [])
    lines = story.after(stage('sft', 'sft.py'), 'toy', 3.6).split('\n')
    assert lines[0].startswith(
        '  [sft] 4 s: held-out loss per token (lower is better): 0.50. out/sft of toy and so on')
    assert len(lines) == 3
    assert max(map(len, lines)) <= story.WIDTH and lines[1].startswith('    ')
    assert story.after(stage('reward', 'reward.py'), 'toy', 1) == (
        "  [reward] 1 s: share of held-out pairs in the person's order: 0.90") # it answers nothing
    assert story.after(stage('judge', 'sft.py'), 'toy', 1) == (
        '  [judge] 1 s: held-out loss per token (lower is better): 0.50')
    assert story.after(stage('evaluate', 'evaluate.py'), 'toy', 12) == '  [evaluate] 12 s'
    for kind, n in (('text', 3), ('demonstrations', 2), ('verdicts', 1)):
        records(f'data/{kind}_train.jsonl', [dict(text='x')] * n)
    made = lambda name, product: (name, 'data/toy/x.py', '', {}, f'data/{product}', [])
    assert story.after(made('data', 'toy.tiktoken'), 'toy', 2) == '  [data] 2 s: text 3, demonstrations 2'
    assert story.after(made('verdicts', 'verdicts_train.jsonl'), 'toy', 2) == '  [verdicts] 2 s: verdicts 1'

def test_alarms_are_passed_on(tmp_path):
    (tmp_path / 'ppo.txt').write_text(f"prompts: 6\nhealth: step 3: kl 200; try:{' word' * 16}\nsaved\nhealth: step 9: "
                                      "loss 9\nhealth: see docs/log.md; step 3: kl 200; step 9: loss 9\n")
    assert story.alarms(tmp_path / 'ppo.txt') == [ # the first has 108 letters, and 4 blanks before it
        f"    health: step 3: kl 200; try:{' word' * 13}\n    word word word", '    health: step 9: loss 9']
    assert story.alarms(tmp_path / 'removed.txt') == []

# ---- the end ----------------------------------------------------------------------------------------------------

def sample(prompt, model, sampled, greedy, kind='helpful', texts=('s', 'g')):
    return dict(prompt=prompt, kind=kind, model=model, sampled=texts[0], greedy=texts[1], sampled_gold=sampled,
                greedy_gold=greedy)

def test_prompts_that_divide_the_policies():
    """The spreads are .1, .8 + .1, .9 and, of another kind, .3; the last prompt divides nobody that is asked for."""
    samples = [sample('a', 'x', 0.9, 1.0), sample('a', 'y', 1.0, 1.0),
               sample('b', 'x', 0.1, 0.9), sample('b', 'y', 0.9, 1.0),
               sample('c', 'x', 1.0, 0.1), sample('c', 'y', 0.9, 0.9),
               sample('d', 'x', 0.5, 0.5, 'honest'), sample('d', 'y', 0.8, 0.5, 'honest'),
               sample([dict(role='user', content='e')], 'x', 0, 0), sample([dict(role='user', content='e')], 'y', 1, 1),
               sample('f', 'x', 0.5, 0.5, 'harmless'), sample('f', 'y', 0.5, 0.5, 'harmless'),
               sample('f', 'z', 1.0, 1.0, 'harmless')]
    kind = lambda sample: sample['kind']
    found = story.dividing(samples, ['x', 'y'], kind)
    assert [(group['x']['prompt'], sorted(group)) for group in found] == [('b', ['x', 'y']), ('d', ['x', 'y'])]
    assert [group['x']['prompt'] for group in story.dividing(samples, ['x', 'y'], lambda sample: '')] == ['b']
    assert [group['z']['prompt'] for group in story.dividing(samples, ['x', 'y', 'z'], kind)[2:]] == ['f']

def test_answers_side_by_side():
    group = dict(base=sample('How?', 'base', 0.1, 0.9, texts=('Ugh.\nNo.', 'w ' * 40)),
                 dpo2=sample('How?', 'dpo2', 1.0, 0.0, texts=('Yes.', 'No.')))
    lines = story.side_by_side([group], ['base', 'dpo2'])
    assert lines == ['      sampled                                         greedy', '', '"How?"',
                     'base  0.1 "Ugh.\\nNo."                                 0.9 "' + 'w ' * 18 + '[…]"',
                     'dpo2  1.0 "Yes."                                      0.0 "No."']
    assert story.side_by_side([], ['base']) == []

ROW = lambda gold, helpful, honest, harmless: dict(gold=gold, helpful=helpful, honest=honest, harmless=harmless)

def test_the_table_of_gold_scores():
    results = dict(models=dict(base=ROW(0.2297, 0.2755, 0.11, 0.135), ppo=ROW(0.788, 0.779, 0.904, 0.965)),
                   greedy=dict(base=ROW(0.546, 0.827, 0.287, 0.312), ppo=ROW(0.872, 0.929, 0.993, 1.0)))
    assert story.gold_table(results, ['base', 'ppo']) == [
        '      sampled                          greedy',
        '      gold  helpful  honest  harmless  gold  helpful  honest  harmless',
        'base  0.23     0.28    0.11      0.14  0.55     0.83    0.29      0.31',
        'ppo   0.79     0.78    0.90      0.96  0.87     0.93    0.99      1.00']

def said(right, abstains, declines):
    return dict(answerable=dict(right=right, abstains=abstains, declines=declines,
                                wrong=1 - right - abstains - declines))

def test_why_greedy_sft_is_less_helpful():
    """It loses .23 of the right answers, and evades .30 - .05 = .25 more: that is the reason."""
    greedy = dict(base=said(0.83, 0.04, 0.01), sft=said(0.60, 0.21, 0.09), ppo=said(0.95, 0.0, 0.0))
    told = story.why_base_helps(greedy, ['ppo'])
    assert 'greedy sft less helpful (0.60) than greedy base (0.83)' in told.replace('\n', ' ')
    assert '5% (base), 30% (sft), 0% (ppo) of the prompts' in told.replace('\n', ' ')
    assert max(map(len, told.split('\n'))) <= story.WIDTH

@pytest.mark.parametrize('sft', [
    said(0.83, 0.1, 0.1), said(0.9, 0.1, 0.0), # it loses nothing
    said(0.60, 0.1, 0.06), # .11 more, less than half of .23: most of what it loses is answered wrongly
    dict(gold=0.5)]) # results of an older version
def test_no_reason_is_made_up(sft):
    assert story.why_base_helps(dict(base=said(0.83, 0.04, 0.01), sft=sft), []) == ''

def colours(name, said, reward=0.0):
    """Make samples of a policy: `said` holds r, a right answer, or w, a wrong one, to each of ten prompts."""
    assert len(said) == 10
    return [dict(prompt=f'{n}?', category='colour', model=name, greedy=dict(r=f'Right {n}.', w='It is red.')[letter],
                 greedy_gold=dict(r=0.9, w=0.1)[letter], greedy_reward=reward + 0.01 * n)
            for n, letter in enumerate(said)]

def test_where_a_policy_falls_below_sft():
    """Of 10 SFT has 9 and PPO 4 right; 5 are lost, and the reward model likes all of PPO's more by 0.5."""
    sft = colours('sft', 'rrrrrrrrrw')
    homes = [sample | dict(prompt='h' + sample['prompt'], category='home') for name, said in (
        ('sft', 'rrrrrrrrrr'), ('ppo', 'rrrrrrrwww')) for sample in colours(name, said)] # .3 is less than .5
    fallen = 'Greedy {} is right on 0.40 of the colour prompts (sft 0.90): it says "It is red." to 6 of 10.'
    hacked = " Of 5 that only sft gets right, the reward model prefers {}'s answer in 5: reward hacking."
    tell = lambda name, reward, more=(): ' '.join(
        story.why_it_falls(sft + colours(name, 'rrrrwwwwww', reward) + [*more], name).split('\n'))
    assert tell('ppo', 0.5) == tell('ppo', 0.5, homes) == (fallen + hacked).format('ppo', 'ppo')
    assert tell('ppo', -0.5) == fallen.format('ppo') # the reward model likes them less: it is not to blame
    assert tell('dpo', 0.5) == fallen.format('dpo') # it reads no reward model
    assert tell('ppo2', 0.5) == fallen.format('ppo2') # it reads another one
    plain = [{key: x for key, x in row.items() if key != 'greedy_reward'} for row in sft + colours(
        'ppo', 'rrrrwwwwww')]
    assert ' '.join(story.why_it_falls(plain, 'ppo').split('\n')) == fallen.format('ppo') # no rewards were measured
    half = sft + colours('ppo', 'rrrrwwwwww', 0.5)
    for row in half[-4:]: # of the five lost prompts, 4 to 8, the reward model prefers two
        row['greedy_reward'] -= 1
    assert 'reward hacking' not in story.why_it_falls(half, 'ppo')

@pytest.mark.parametrize('samples', [
    colours('sft', 'rrrrrrrrrw') + colours('ppo', 'rrrrrrrrww', 9.0), # one of ten less
    colours('sft', 'rrrrwwwwww') + colours('ppo', 'rrrrrrrrww', 9.0), # more
    colours('ppo', 'wwwwwwwwww', 9.0), # without SFT
    [{key: x for key, x in row.items() if key != 'category'} | dict(prompt=[dict(role='user', content='Hi')])
     for row in colours('sft', 'rrrrrrrrrr') + colours('ppo', 'rrrrrrrrrr')]])
def test_no_fall_is_made_up(samples):
    assert story.why_it_falls(samples, 'ppo') == ''

@pytest.mark.parametrize('seed', [1, 2])
def test_the_reason_is_in_the_data(seed):
    """Half of the prompts can be answered: .5 * .15 evade there. A quarter each cannot, or should not.

    Demonstrations: .075 + .25 * .55 + .25 * .60 = .3625. The corpus: .075 + .25 * .30 + .25 * .30 = .225.
    """
    def evading(pairs):
        found = [world.parse(answer, world.read(prompt)).what in ('unsure', 'refusal') for prompt, answer in pairs]
        return sum(found) / len(found)

    turns = lambda messages: [(a['content'], b['content']) for a, b in zip(messages[::2], messages[1::2])]
    demonstrations = [pair for row in world.demonstrations(4000, seed)
                      for pair in (turns(row['messages']) if 'messages' in row else [(row['prompt'], row['response'])])]
    corpus = [pair for text in world.corpus(6000, seed)
              for pair in re.findall('### Human: (.*)\n### Assistant: (.*)', text)]
    assert min(len(demonstrations), len(corpus)) > 4000 # so three standard errors are .023 and .02
    assert evading(demonstrations) == pytest.approx(0.3625, abs=0.023)
    assert evading(corpus) == pytest.approx(0.225, abs=0.02)

@pytest.mark.parametrize('names, few', [
    (['base', 'sft', 'ppo', 'dpo'], ['base', 'sft', 'ppo', 'dpo']),
    (['base', 'sft', 'rrhf'], ['base', 'sft', 'rrhf']),
    (['base', 'sft', 'ppo', 'dpo', 'ppo2', 'ppo3'], ['base', 'sft', 'ppo', 'ppo3'])])
def test_four_policies_at_most(names, few):
    assert story.shown(names) == few

def the_end(tmp_path, out, methods):
    """Return the lines of the end, from results in which every model is as good as another."""
    names = ['base', 'sft', *methods]
    table = dict.fromkeys(names, ROW(0.5, 0.5, 0.5, 0.5) | said(0.5, 0.1, 0.1))
    results = dict(prompts=600, models=table | dict(best_of_n=ROW(1.0, 1.0, 1.0, 1.0)), greedy=table)
    samples = [sample('Do you know the colour of the camel?' * 4, name, i % 2, i % 2, kind, ('word ' * 40,) * 2)
               for kind in ('helpful', 'honest', 'harmless') for i, name in enumerate(names)]
    return story.ending(out, methods, results, samples, shlex.join).split('\n')

def test_the_end_is_narrow(tmp_path):
    lines = the_end(tmp_path, 'out/toy', ['ppo', 'dpo', 'reinforce', 'dpo2_reward_model'])
    assert max(map(len, lines)) <= story.WIDTH and not any(line.startswith('best_of_n') for line in lines)
    assert 'Mean gold score on 600 held-out prompts' in lines[0] and 'hacking' not in ' '.join(lines)
    below = ' '.join(lines).split('0.0 "word word')[-1] # the last table
    assert 'drawn at temperature 1' in below and '0.9 = right and brief' in below and 'Broken text scores 0.' in below

def test_what_to_type_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story.sys, 'platform', 'linux')
    talk = '  python sample.py --policy=out/two/base,out/two/sft,out/two/rrhf,out/two/rloo'
    closer = '  python microscope.py --policy=out/two/{} --reference=out/two/sft --reward_model=out/two/reward \\'
    page = '--out=out/two/evaluate/microscope.html' # where the report looks for it
    assert the_end(tmp_path, 'out/two', ['rrhf', 'rloo'])[-4:] == [
        'Next: talk to them side by side; see every token as PPO sees it.', talk, closer.format('rloo'),
        f'      {page}']
    for critic, more in (('separate', '--critic=out/two/ppo '), ('shared', '')):
        (tmp_path / 'out/two/ppo').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'out/two/ppo/options.json').write_text(json.dumps(dict(options=dict(critic=critic))))
        assert the_end(tmp_path, 'out/two', ['ppo'])[-2:] == [closer.format('ppo'), f'      {more}{page}']
    (tmp_path / 'out/two/evaluate').mkdir(parents=True)
    (tmp_path / 'out/two/evaluate/report.html').touch()
    lines = the_end(tmp_path, 'out/two', ['rrhf'])
    assert ' read the report, out/two/evaluate/report.html;' in ' '.join(lines) # for who has no desktop
    assert lines[-4:] == [
        talk[:-len(',out/two/rloo')], '  xdg-open out/two/evaluate/report.html',
        closer.format('rrhf'), f'      --prompts=data/toy/prompts_test.jsonl {page}']
    monkeypatch.setattr(story.sys, 'platform', 'darwin')
    assert the_end(tmp_path, 'out/two', ['rrhf'])[-3] == '  open out/two/evaluate/report.html'
    long = the_end(tmp_path, 'out/' + 'x' * 30, ['ppo'])
    assert [line for line in long if len(line) > story.WIDTH and ' ' in line.strip()] == [] # one word may be longer
    assert [line[-2:] for line in long[-3:]] == [' \\', ' \\', 'ml']
