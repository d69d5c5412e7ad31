"""demo.py: which commands it runs, what it reuses, and how it goes on after a stop. The stages themselves are faked."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import collect as collect_script
import demo
from common import run
from common.options import RunOptions, parse_config, print_help
from tiny import in_processes, one_line

STAGES = ['data', 'pretrain', 'sft', 'collect train', 'collect test', 'reward', 'ppo', 'dpo', 'evaluate']

def results_of(**gold):
    """Return the text of a results.json: {model: its gold score}; its greedy answers are as good."""
    rows = {name: dict(dict.fromkeys(('helpful', 'honest', 'harmless'), score), gold=score)
            for name, score in gold.items()}
    return json.dumps(dict(prompts=2, models=rows, greedy=rows))

class Fake:
    """Stands in for demo.start: notes the commands, leaves each stage's product, and fails where it is told to."""

    def __init__(self, monkeypatch, cfg):
        self.commands, self.settings, self.fail_at, self.cfg = [], {}, None, cfg
        self.signals, self.busy, self.at_once, self.code = [], set(), 0, 130
        self.results = results_of(**dict.fromkeys(['base', 'sft', *demo.METHODS, 'ppo2', 'ppo3'], 0.5))
        monkeypatch.setattr(demo, 'start', self)

    def __call__(self, command, slot, purpose, stdout, settings):
        assert len(purpose) > 20 and stdout.name.startswith(f'{self.cfg.out_dir}/printed/')
        assert stdout.mode == ('a' if '--resume=True' in command else 'w')
        assert slot == min({0, 1} - self.busy) # the lowest line that is free
        self.commands.append(command)
        self.settings[purpose.split(']')[0][1:]] = settings
        name, *_, product, needs = max((s for s in demo.stages(self.cfg) if self.is_stage(s, command)),
                                       key=lambda s: len(s[3])) # a later round's options are more than the first's
        self.busy.add(slot)
        self.at_once = max(self.at_once, len(self.busy))
        return FakeProcess(self, name, product, needs, slot)

    @staticmethod
    def is_stage(stage, command):
        return (command[1] == stage[1] and stage[2] in ('', *command)
                and all(f'--{k}={v}' in command for k, v in stage[3].items()))

class FakeProcess:
    """Ends when it is asked for the second time."""

    def __init__(self, fake, name, product, needs, slot):
        self.fake, self.name, self.product, self.slot = fake, name, product, slot
        self.returncode, self.asked = None, 0
        done = json.loads(Path(fake.cfg.out_dir, 'demo.json').read_text())
        assert all(done[need][2] is not None for need in needs) # what it stands on is there

    def poll(self):
        self.asked += 1
        if self.asked == 2:
            os.makedirs(os.path.dirname(self.product), exist_ok=True)
            self.returncode = self.fake.code if self.name == self.fake.fail_at else 0
            if self.returncode:
                Path(os.path.dirname(self.product), 'state.pt').touch()
            else:
                Path(self.product).write_text(self.fake.results if self.product.endswith('results.json') else '{}')
            if self.product.endswith('results.json') and not self.returncode:
                Path(self.product).with_name('samples.jsonl').write_text(''.join(json.dumps(dict(
                    prompt='1+1', kind='helpful', category='2 digits', model=name, sampled='3', greedy='2',
                    sampled_gold=i % 2, greedy_gold=1)) + '\n' for i, name in enumerate(
                        json.loads(self.fake.results)['models'])))
            self.fake.busy.remove(self.slot)
        return self.returncode

    def send_signal(self, number):
        self.fake.signals.append((self.name, number))

@pytest.fixture
def cfg(tmp_path, monkeypatch):
    root = Path(demo.__file__).parent
    (tmp_path / 'config').symlink_to(root / 'config')
    (tmp_path / 'data/toy').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return demo.Config(out_dir='out/two', seed=7)

def test_all_stages_then_none(cfg, monkeypatch, capsys):
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    assert len(fake.commands) == 9
    pretrain = fake.commands[1]
    assert pretrain[1:3] == ['sft.py', 'config/toy/pretrain.py']
    assert '--out_dir=out/two/base' in pretrain and '--seed=7' in pretrain and '--overwrite=True' in pretrain
    assert fake.at_once == 2 and [c[1] for c in fake.commands[5:8]] == ['reward.py', 'dpo.py', 'ppo.py']
    ppo = fake.commands[7] # every path into out/toy now points into out/two
    assert {'--policy=out/two/sft', '--reward_model=out/two/reward', '--out_dir=out/two/ppo'} <= set(ppo)
    results = json.loads(Path('out/two/evaluate/results.json').read_text())
    assert list(results['seconds']) == STAGES and results['seed'] == 7
    demo.main(cfg)
    assert len(fake.commands) == 9 # a second run reuses everything
    assert capsys.readouterr().out.count('done before') == 9

def test_all_methods(cfg, monkeypatch):
    cfg = demo.Config(out_dir='out/two', seed=7)
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    everything = demo.Config(out_dir='out/two', seed=7, methods='all')
    fake.cfg = everything
    demo.main(everything)
    new = ['reinforce', 'rloo', 'grpo', 'rrhf', 'ipo', 'hinge', 'simpo', 'orpo', 'kto', 'rejection', 'distill']
    best = fake.commands.pop(9) # before all others: the reward model is there
    assert best[1:3] == ['collect.py', 'config/toy/collect_best.py'] and '--reward_model=out/two/reward' in best
    scripts = ['reinforce.py'] * 3 + ['rrhf.py'] + ['dpo.py'] * 4 + ['kto.py', 'sft.py', 'sft.py', 'evaluate.py']
    assert [c[1] for c in fake.commands[9:]] == scripts # PPO and DPO are there
    for name, command in zip(new, fake.commands[9:]):
        assert command[2] == f'config/toy/{name}.py' and f'--out_dir=out/two/{name}' in command
        assert Path(f'out/two/{name}/model.safetensors').exists()
    models = ['base', 'sft', 'ppo', 'dpo', *new]
    assert '--models=' + ','.join(f'{m}=out/two/{m}' for m in models) in fake.commands[-1]
    results = json.loads(Path('out/two/evaluate/results.json').read_text())
    assert list(results['seconds']) == [*STAGES[:6], 'collect best', *STAGES[6:-1], *new, 'evaluate']
    assert {'--train_data=out/two/best_of_n.jsonl', '--init_from=out/two/sft'} <= set(fake.commands[-3])
    assert {'--train_data=out/two/best_of_n.jsonl', '--teacher=out/two/rejection'} <= set(fake.commands[-2])

def test_what_is_not_asked_for_now_stays_known(cfg, monkeypatch):
    everything = demo.Config(out_dir='out/two', seed=7, methods='all')
    fake = Fake(monkeypatch, everything)
    demo.main(everything)
    assert len(fake.commands) == 21
    for again in (cfg, everything): # the models to be measured are others each time, nothing else is
        fake.cfg = again
        demo.main(again)
        assert fake.commands[-1][1] == 'evaluate.py'
    assert len(fake.commands) == 23
    os.remove('out/two/sft/model.safetensors') # now the others, made from another one, are out of date
    fake.cfg = cfg
    demo.main(cfg)
    n, fake.cfg = len(fake.commands), everything
    demo.main(everything)
    assert len(fake.commands) == n + 13

def test_an_older_record_counts_as_none(cfg, monkeypatch):
    fake = Fake(monkeypatch, cfg)
    os.makedirs('out/two')
    Path('out/two/demo.json').write_text(json.dumps(dict(data=[['python', 'data/toy/prepare.py'], 3.2])))
    demo.main(cfg)
    assert len(fake.commands) == 9

def test_results_that_are_not_its_own(cfg, monkeypatch):
    """evaluate.py was run by hand into the same folder: it is run again."""
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    Path('out/two/evaluate/results.json').write_text(json.dumps(dict(models=dict(sft={}, rlaif={}))))
    demo.main(cfg)
    assert [c[1] for c in fake.commands[9:]] == ['evaluate.py']
    assert fake.commands[9][-1] == '--overwrite=True' # it refuses to replace results unasked

def test_fresh_does_all_again_and_removes_nothing(cfg, monkeypatch):
    fresh = demo.Config(out_dir='out/two', seed=7, fresh=True)
    fake = Fake(monkeypatch, fresh)
    demo.main(fresh) # there is no such folder yet
    Path('out/two/mine').touch()
    demo.main(fresh)
    assert len(fake.commands) == 18 and Path('out/two/mine').exists()
    assert all('--overwrite=True' in c for c in fake.commands if not c[1].startswith('data/'))

@pytest.mark.parametrize('entry', [
    [1, 2, 3], [['--seed=1', 5], 2, 3], [['sft.py'], 'then', None], [['sft.py'], 1, 'now']])
def test_an_entry_of_another_shape_counts_as_not_done(entry, cfg):
    os.makedirs('out/two')
    Path('out/two/demo.json').write_text(json.dumps(dict(pretrain=entry, sft=[['sft.py', '--seed=7'], 1, 2.5])))
    assert demo.read_record(cfg) == dict(sft=[['sft.py', '--seed=7'], 1, 2.5])

def test_a_list_of_methods(cfg, monkeypatch, capsys):
    chosen = demo.Config(out_dir='out/two', seed=7, methods='rrhf,ppo')
    fake = Fake(monkeypatch, chosen)
    demo.main(chosen)
    assert [c[1] for c in fake.commands[5:]] == ['reward.py', 'rrhf.py', 'ppo.py', 'evaluate.py']
    assert '--models=base=out/two/base,sft=out/two/sft,rrhf=out/two/rrhf,ppo=out/two/ppo' in fake.commands[-1]
    fake.results = results_of(base=0.1, sft=0.2, rrhf=0.3, ppo=0.4)
    demo.main(demo.Config(out_dir='out/two', seed=7, methods='rrhf,ppo', fresh=True))
    out = capsys.readouterr().out
    assert '\n  python sample.py --policy=out/two/base,out/two/sft,out/two/rrhf,out/two/ppo\n' in out
    assert '\nrrhf  0.30     0.30    0.30      0.30  0.30     0.30    0.30      0.30\n' in out
    assert '\n"1+1"\nbase  0.0 "3"   ' in out and '\nsft   1.0 "3"   ' in out

def test_online_rounds(cfg, monkeypatch, capsys):
    """Each round asks the policy of the one before, trains on all rankings so far, and goes on from that policy."""
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    assert 'rounds' not in json.loads(Path('out/two/evaluate/results.json').read_text())
    three = demo.Config(out_dir='out/two', seed=7, rounds=3)
    fake.cfg, fake.results = three, results_of(base=0.2, sft=0.4, ppo=0.7, dpo=0.6, ppo2=0.8, ppo3=0.75)
    demo.main(three)
    new = fake.commands[9:] # the first round is there
    assert [c[1] for c in new] == ['collect.py', 'reward.py', 'ppo.py'] * 2 + ['evaluate.py']
    rankings = ['out/two/rankings_train.jsonl', 'out/two/rankings_ppo2.jsonl', 'out/two/rankings_ppo3.jsonl']
    for n, last, (collect, reward, ppo) in ((2, 'ppo', new[:3]), (3, 'ppo2', new[3:6])):
        assert {f'--policy=out/two/{last}', f'--out={rankings[n - 1]}',
                '--prompts=data/toy/prompts_train.jsonl'} <= set(collect)
        assert reward[2] == 'config/toy/reward.py' and {
            '--init_from=out/two/sft', '--train_data=' + ','.join(rankings[:n]), f'--out_dir=out/two/reward{n}',
            '--val_data=out/two/rankings_test.jsonl'} <= set(reward)
        assert ppo[2] == 'config/toy/ppo.py' and {
            f'--policy=out/two/{last}', f'--reward_model=out/two/reward{n}', f'--out_dir=out/two/ppo{n}'} <= set(ppo)
        assert len({word.split('=')[0] for word in ppo}) == len(ppo) # no option twice
    models = ['base', 'sft', 'ppo', 'dpo', 'ppo2', 'ppo3']
    assert '--models=' + ','.join(f'{m}=out/two/{m}' for m in models) in new[-1]
    results = json.loads(Path('out/two/evaluate/results.json').read_text())
    assert results['rounds'] == [0.7, 0.8, 0.75]
    assert 'gold score of ppo, sampled, by round: 0.700, 0.800, 0.750' in capsys.readouterr().out
    os.remove('out/two/reward2/model.safetensors')
    demo.main(three)
    assert [c[1] for c in fake.commands[16:]] == ['reward.py', 'ppo.py', 'collect.py', 'reward.py', 'ppo.py',
                                                  'evaluate.py'] # all that came after it

@pytest.mark.parametrize('of', ['dpo', 'rrhf'])
def test_online_rounds_without_a_reward_model(cfg, monkeypatch, capsys, of):
    """Each round ranks the answers of the policy before, and trains that policy on these rankings alone."""
    three = demo.Config(out_dir='out/two', seed=7, methods=f'ppo,{of}', rounds=3, rounds_of=of)
    fake = Fake(monkeypatch, three)
    fake.results = results_of(**{'base': 0.2, 'sft': 0.4, 'ppo': 0.9, of: 0.5, f'{of}2': 0.6, f'{of}3': 0.8})
    demo.main(three)
    new = fake.commands[7:]
    assert [c[1] for c in new] == ['collect.py', f'{of}.py'] * 2 + ['ppo.py', 'evaluate.py'] # PPO waits, and is alone
    for n, last, (collect, train) in ((2, of, new[:2]), (3, f'{of}2', new[2:4])):
        rankings = f'out/two/rankings_{of}{n}.jsonl'
        assert collect[2] == 'config/toy/collect.py' and {
            f'--policy=out/two/{last}', f'--out={rankings}', '--prompts=data/toy/prompts_train.jsonl'} <= set(collect)
        assert train[2] == f'config/toy/{of}.py' and {
            f'--init_from=out/two/{last}', f'--train_data={rankings}', f'--out_dir=out/two/{of}{n}',
            '--val_data=out/two/rankings_test.jsonl'} <= set(train)
        assert all(len({word.split('=')[0] for word in c}) == len(c) for c in (collect, train)) # no option twice
    assert any(word.endswith(f',{of}={f"out/two/{of}"},{of}2=out/two/{of}2,{of}3=out/two/{of}3') for word in new[-1])
    assert json.loads(Path('out/two/evaluate/results.json').read_text())['rounds'] == [0.5, 0.6, 0.8]
    assert f'gold score of {of}, sampled, by round: 0.500, 0.600, 0.800' in capsys.readouterr().out

def test_who_ranks_the_later_rounds(cfg, monkeypatch):
    """The judge is made first; the reward model is that of the first round. The folders have other names."""
    by_ai = demo.Config(out_dir='out/two', seed=7, methods='dpo', rounds=2, rounds_of='dpo', rounds_by='ai')
    fake = Fake(monkeypatch, by_ai)
    fake.results = results_of(**dict.fromkeys(
        ('base', 'sft', 'dpo', 'dpo2_ai', 'dpo2_reward_model', 'ppo', 'ppo2_ai'), 0.5))
    demo.main(by_ai)
    needs = lambda: {name: stands_on for name, *_, stands_on in demo.stages(fake.cfg)}
    assert {'judge', 'dpo'} <= {*needs()['collect dpo2_ai']}
    verdicts, = (c for c in fake.commands if c[1] == 'data/toy/judge.py')
    assert verdicts == ['python', 'data/toy/judge.py'] # it knows neither --overwrite nor the seed of the stages
    judge, = (c for c in fake.commands if 'config/toy/judge.py' in c)
    assert judge[1] == 'sft.py' and '--out_dir=out/two/judge' in judge
    collect, train = fake.commands[-3:-1]
    assert collect[2] == 'config/toy/collect_ai.py' and {
        '--judge=out/two/judge', '--answers=', '--compare=', '--policy=out/two/dpo', '--max_new_tokens=32',
        '--prompts=data/toy/prompts_train.jsonl', '--out=out/two/rankings_dpo2_ai.jsonl'} <= set(collect)
    assert '--out_dir=out/two/dpo2_ai' in train and '--train_data=out/two/rankings_dpo2_ai.jsonl' in train
    parse_config(collect_script.Config, collect[2:]) # collect.py takes these options

    fake.cfg = demo.Config(out_dir='out/two', seed=7, methods='dpo', rounds=2, rounds_of='dpo',
                           rounds_by='reward_model')
    demo.main(fake.cfg)
    collect, train = fake.commands[-3:-1] # all else was there
    assert {'reward', 'dpo'} <= {*needs()['collect dpo2_reward_model']}
    assert collect[2] == 'config/toy/collect_best.py' and {
        '--reward_model=out/two/reward', '--keep=all', '--policy=out/two/dpo'} <= set(collect)
    assert '--train_data=out/two/rankings_dpo2_reward_model.jsonl' in train
    parse_config(collect_script.Config, collect[2:])

    fake.cfg = demo.Config(out_dir='out/two', seed=7, rounds=2, rounds_by='ai')
    demo.main(fake.cfg)
    assert ['--train_data=out/two/rankings_train.jsonl,out/two/rankings_ppo2_ai.jsonl' in c
            for c in fake.commands[-4:]] == [False, True, False, False] # collect, reward, PPO, evaluate
    assert '--reward_model=out/two/reward2_ai' in fake.commands[-2]

@pytest.mark.parametrize('options, expected', [
    (['--rounds=0'], '--rounds=0: rounds must be 1, or more with ppo among the methods, got 0'),
    (['--rounds=2', '--methods=dpo'], '--rounds=2: rounds must be 1, or more with ppo among the methods, got 2'),
    (['--rounds=2', '--rounds_of=rrhf'], '--rounds=2: rounds must be 1, or more with rrhf among the methods, got 2'),
    (['--rounds_of=kto'], "--rounds_of=kto: rounds_of must be ppo, dpo or rrhf, got 'kto'"),
    (['--rounds=2', '--rounds_by=me'],
     "--rounds_by=me: rounds_by must be one of person, reward_model, ai, got 'me'"),
    (['--rounds=2', '--rounds_by=reward_model'], '--rounds_by=reward_model: rounds_by must be person or ai with '
     "rounds_of=ppo, whose reward model learns from these rankings, got 'reward_model'"),
    (['--rounds_of=dpo'],
     "--rounds_of=dpo: rounds_of must be left at 'ppo': only --rounds above 1 reads it, got 'dpo'")])
def test_rounds_that_cannot_be(options, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(demo.Config, options)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {expected}\n"

def test_the_world_of_sums(cfg, monkeypatch, capsys):
    """With and without the scratch line side by side; the checker is in config/sums."""
    chosen = demo.Config(world='sums', out_dir='out/two', seed=7)
    fake = Fake(monkeypatch, chosen)
    fake.results = json.dumps(dict(models=dict(base={}, sft={}, grpo={})))
    shares = dict(accuracy=dict(base=0.2, sft=0.4, grpo=0.97), sampled=dict(base=0.1, sft=0.3, grpo=0.9),
                  by_digits=dict(base={'3 digits': 0.2}, sft={'3 digits': 0.4}, grpo={'3 digits': 0.97}))
    monkeypatch.setattr(demo.sums, 'results', lambda out, methods: shares)
    Path('data/sums').mkdir()
    demo.main(chosen)
    scripts = [c[1] for c in fake.commands]
    assert scripts[0] == 'data/sums/prepare.py' and fake.at_once == 2
    assert scripts[1:] == ['sft.py'] * 4 + ['reinforce.py'] * 2 + ['evaluate.py'] * 4
    assert not any('toy' in word for c in fake.commands for word in c)
    direct = [c for c in fake.commands if '--out_dir=out/two/grpo_direct' in c]
    assert len(direct) == 1 and {'config/sums/grpo.py', '--policy=out/two/sft_direct', '--seed=7'} <= set(direct[0])
    results = json.loads(Path('out/two/results.json').read_text())
    assert {key: results[key] for key in shares} == shares and results['seed'] == 7
    assert results['seconds'] >= 0 and list(results['stages']) == [s[0] for s in demo.stages(chosen)]
    out = capsys.readouterr().out
    assert '\ngrpo     0.90    0.97      0.97\n' in out and '\nsft   1.0 "3"   ' in out
    assert '\n  python sample.py --policy=out/two/base,out/two/sft,out/two/grpo\n' in out
    demo.main(chosen)
    assert len(fake.commands) == 11 # a second run reuses everything
    Path('out/two/others_direct/results.json').write_text(json.dumps(dict(models=dict(mine={}))))
    demo.main(chosen)
    assert [c[-2:] for c in fake.commands[11:]] == [['--seed=7', '--overwrite=True']] # not its own: made again
    assert one_line(capsys, lambda: demo.main(demo.Config(world='sums', out_dir='out/two', seed=8))).startswith(
        '--seed=8: out/two was made with --seed=7')

def test_defaults_of_the_world_of_sums():
    assert vars(parse_config(demo.Config, ['--world=sums'])).items() >= dict(out_dir='out/sums', methods='grpo').items()
    assert vars(parse_config(demo.Config, [])).items() >= dict(out_dir='out/toy', methods='ppo,dpo').items()
    assert parse_config(demo.Config, ['--world=sums', '--methods=all']).methods == 'grpo,rloo,ppo'

@pytest.mark.parametrize('options, expected', [
    (['--world=moon'], "--world=moon: world must be toy, or sums or reviews with rounds=1, got 'moon'"),
    (['--world=sums', '--methods=dpo'], "--methods=dpo: methods must be all, or names among grpo,rloo,ppo, each once, "
                                        "got 'dpo'"),
    (['--world=sums', '--methods=ppo,dpo'], "--methods=ppo,dpo: methods must be all, or names among grpo,rloo,ppo, "
                                            "each once, got 'ppo,dpo'"), # the toy world's default, too
    (['--world=sums', '--rounds=2', '--methods=ppo'], "--world=sums: world must be toy, or sums or reviews with "
                                                      "rounds=1, got 'sums'")])
def test_worlds_that_cannot_be(options, expected, capsys):
    assert one_line(capsys, lambda: parse_config(demo.Config, options)) == expected

def test_a_folder_that_is_given_is_taken():
    """Also where it is another world's default."""
    assert parse_config(demo.Config, ['--world=reviews', '--out_dir=out/toy']).out_dir == 'out/toy'

@pytest.mark.parametrize('methods', ['ppo,a2c', 'ppo, dpo', 'ppo,ppo', 'all,ppo'])
def test_methods_that_are_not_there(methods, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(demo.Config, [f'--methods={methods}'])
    assert stopped.value.code == 2 and capsys.readouterr().err == (
        f"error: --methods={methods}: methods must be all, or names among ppo,dpo,reinforce,rloo,grpo,rrhf,ipo,"
        f"hinge,simpo,orpo,kto,rejection,distill, each once, got {methods!r}\n")

def test_no_student_without_its_teacher(capsys):
    with pytest.raises(SystemExit):
        parse_config(demo.Config, ['--methods=ppo,distill'])
    assert 'methods must be with rejection, who teaches distill' in capsys.readouterr().err

def test_goes_on_after_a_stop(cfg, monkeypatch):
    fake = Fake(monkeypatch, cfg)
    fake.fail_at = 'ppo'
    with pytest.raises(SystemExit) as stop:
        demo.main(cfg)
    assert stop.value.code == 130 and len(fake.commands) == 8 and fake.signals == []
    fake.fail_at = None
    demo.main(cfg)
    assert fake.commands[8][1] == 'ppo.py' and '--resume=True' in fake.commands[8]
    assert fake.commands[9][1] == 'evaluate.py' and len(fake.commands) == 10

def test_a_stage_that_fails_stops_the_one_beside_it(cfg, monkeypatch, capsys):
    fake = Fake(monkeypatch, cfg)
    fake.fail_at, fake.code = 'reward', 1
    with pytest.raises(SystemExit) as stop:
        demo.main(cfg)
    assert stop.value.code == 1 and fake.signals == [('dpo', signal.SIGINT)]
    assert 'reward ended with exit code 1' in capsys.readouterr().err
    record = json.loads(Path('out/two/demo.json').read_text())
    assert record['reward'][2] is None and record['dpo'][2] is not None # it had come to its end all the same
    assert 'ppo' not in record

def test_a_stage_that_is_made_anew_does_not_resume_its_older_run(cfg, monkeypatch):
    """It was killed before its first save: the state beside it is that of the run before."""
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    Path('out/two/ppo/state.pt').touch()
    os.utime('out/two/ppo/state.pt', (1e9, 1e9))
    os.remove('out/two/reward/model.safetensors')
    fake.fail_at = 'ppo'
    monkeypatch.setattr(Path, 'touch', lambda self: None) # nothing is saved
    with pytest.raises(SystemExit):
        demo.main(cfg)
    fake.fail_at = None
    demo.main(cfg)
    assert [c[-1] for c in fake.commands if c[1] == 'ppo.py'] == ['--overwrite=True'] * 3
    assert os.path.exists('out/two/ppo/state.pt') # it may be that of a run started by hand

def test_what_stands_on_a_changed_stage_is_made_anew(cfg, monkeypatch):
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    os.remove('out/two/reward/model.safetensors')
    demo.main(cfg)
    assert [c[1] for c in fake.commands[9:]] == ['reward.py', 'ppo.py', 'evaluate.py'] # DPO does not need it
    assert all('--resume=True' not in c for c in fake.commands)
    fake.commands.clear()

def test_a_folder_holds_one_seed(cfg, monkeypatch, capsys):
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    before = Path('out/two/demo.json').read_text()
    assert one_line(capsys, lambda: demo.main(demo.Config(out_dir='out/two', seed=8))) == (
        '--seed=8: out/two was made with --seed=7; wanted that, another --out_dir, or --fresh=True, which replaces it')
    assert len(fake.commands) == 9 and Path('out/two/demo.json').read_text() == before
    fake.cfg = demo.Config(out_dir='out/two', seed=8, fresh=True)
    demo.main(fake.cfg)
    assert len(fake.commands) == 18 and '--seed=8' in fake.commands[-1]

def test_two_at_once_in_one_folder(cfg, monkeypatch, capsys):
    fcntl = pytest.importorskip('fcntl', reason='Windows has no such locks')
    fake = Fake(monkeypatch, cfg)
    os.makedirs('out/two')
    with open('out/two/.lock', 'w') as other: # as another process would hold it
        fcntl.flock(other, fcntl.LOCK_EX)
        assert 'another process is writing here' in one_line(capsys, lambda: demo.main(cfg))
    assert fake.commands == [] and os.listdir('out/two') == ['.lock']
    demo.main(cfg)
    assert len(fake.commands) == 9

def test_runs_in_the_repository_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = one_line(capsys, lambda: demo.main(demo.Config()))
    assert line.endswith(f'wanted: cd {Path(demo.__file__).resolve().parent}') and os.listdir(tmp_path) == []

@pytest.mark.parametrize('folder', ['out/a,b', 'out/a=b'])
def test_folders_that_no_list_can_hold(folder, capsys):
    line = one_line(capsys, lambda: parse_config(demo.Config, [f'--out_dir={folder}']))
    assert line.endswith(f'a folder with no comma and no = in its name, got {folder!r}')

def test_help_names_the_methods(capsys):
    print_help(demo.Config)
    assert f"The methods: {', '.join(demo.METHODS)}." in capsys.readouterr().out

def test_a_stage_is_announced_and_summed_up(cfg, monkeypatch, capsys):
    """The sentence before it stands above its command, that after it below; what it prints itself is in a file."""
    Fake(monkeypatch, cfg)
    start = demo.start
    def fake(command, slot, purpose, stdout, settings):
        demo.say(f'\n{purpose}', '$ command')
        stdout.write('3 rows\nhealth: step 3: kl 200\n')
        if command[1] == 'sft.py':
            os.makedirs('out/two/base', exist_ok=True)
            Path('out/two/base/log.jsonl').write_text('{"val_loss": 6.9}\n{"val_loss": 0.72}\n')
        return start(command, slot, purpose, stdout, settings)
    monkeypatch.setattr(demo, 'start', fake)
    demo.claim(cfg)
    demo.run_stages(demo.stages(cfg)[:2], cfg)
    assert capsys.readouterr().out == (
        f"\n{demo.story.before('data', 'toy')}\n$ command\n  [data] 0 s\n    health: step 3: kl 200\n"
        f"\n{demo.story.before('pretrain', 'toy')}\n$ command\n"
        "  [pretrain] 0 s: held-out loss per token (lower is better): 6.90 → 0.72\n    health: step 3: kl 200\n")
    assert Path('out/two/printed/pretrain.txt').read_text() == '3 rows\nhealth: step 3: kl 200\n'

def test_in_a_terminal_bars_make_room(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    monkeypatch.delenv('NO_COLOR', raising=False)
    demo.say('why', '$ how')
    demo.say('so')
    monkeypatch.setenv('NO_COLOR', '1')
    demo.say('why', '$ how')
    assert capsys.readouterr().out == '\r\x1b[Jwhy\n\x1b[2m$ how\x1b[0m\n\r\x1b[Jso\n\r\x1b[Jwhy\n$ how\n'

@pytest.mark.parametrize('system, typed', [
    ('posix', "$ OMP_NUM_THREADS=3 python sft.py '--out_dir=out/my toy'"),
    ('nt', '$ set OMP_NUM_THREADS=3& python sft.py "--out_dir=out/my toy"')])
def test_prints_what_one_can_type(system, typed, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'POSIX', system == 'posix')
    monkeypatch.setattr(demo.subprocess, 'Popen', lambda words, env, **more: more | dict(env=env))
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    more = demo.start(['python', 'sft.py', '--out_dir=out/my toy'], 0)
    assert capsys.readouterr().out == f'\n{typed}\n' and more['env']['OMP_NUM_THREADS'] == '3'
    demo.start(['python', 'sft.py'], 0, settings=dict(OMP_NUM_THREADS='2'))
    assert capsys.readouterr().out == dict(
        posix='\n$ OMP_NUM_THREADS=2 python sft.py\n',
        nt='\n$ set OMP_NUM_THREADS=2& python sft.py\n')[system]
    assert ('process_group' in more) == (system == 'posix') # Windows has none of this

def test_which_stages_stand_alone():
    """Preferences are learnt from beside the reward model; the only method that learns from rewards waits for them."""
    def alone(**options):
        return demo.alone(demo.stages(demo.Config(**options)))

    before = {'data', 'pretrain', 'sft', 'collect train', 'collect test', 'reward', 'dpo'}
    assert alone() == dict(data=set(), pretrain={'data'}, sft={'data', 'pretrain'}, ppo=before,
                           evaluate=before | {'ppo'})
    assert list(alone(methods='all')) == ['data', 'pretrain', 'sft', 'evaluate']
    assert 'ppo' not in alone(methods='ppo,rejection') # rejection learns from rewards, too
    assert list(alone(methods='ppo')) == ['data', 'pretrain', 'sft', 'reward', 'ppo', 'evaluate']
    assert alone(methods='ppo,dpo', rounds=2)['ppo'] == before # and not for what stands on itself
    assert list(alone(world='sums')) == ['data']

@pytest.mark.parametrize('cores, own, given', [(2, None, dict(OMP_NUM_THREADS='2')), (1, None, {}), (2, '1', {}),
                                               (2, '4', {})])
def test_a_stage_that_stands_alone_takes_two_cores(cores, own, given, cfg, monkeypatch):
    """Whatever else runs: how many threads there are changes how sums round."""
    monkeypatch.setattr(demo.os, 'cpu_count', lambda: cores)
    monkeypatch.setenv('OMP_NUM_THREADS', own) if own else monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    fake = Fake(monkeypatch, cfg)
    demo.claim(cfg)
    demo.run_stages(demo.stages(cfg), cfg)
    assert all(fake.settings[name] == given for name in ('pretrain', 'sft', 'ppo', 'evaluate'))
    assert all(fake.settings[name] == {} for name in ('collect train', 'collect test', 'reward', 'dpo'))

def test_seconds_in_which_something_ran():
    """1 to 4 and 2 to 3 side by side, then a night, then 20 to 21.5: 3 + 1.5."""
    assert demo.busy([(20, 21.5), (1, 4), (2, 3)]) == 4.5

def test_ppo_waits_for_dpo_also_after_a_stop(cfg, monkeypatch):
    """Where the reward model was done before DPO had begun, DPO goes first, and nothing runs beside PPO."""
    fake = Fake(monkeypatch, cfg)
    demo.claim(cfg)
    demo.run_stages([stage for stage in demo.stages(cfg) if stage[0] not in ('ppo', 'dpo', 'evaluate')], cfg)
    done = len(fake.commands)
    demo.run_stages(demo.stages(cfg), cfg)
    assert [command[1] for command in fake.commands[done:]] == ['dpo.py', 'ppo.py', 'evaluate.py']

def test_windows_ends_a_stage_without_a_signal(monkeypatch):
    monkeypatch.setattr(demo, 'POSIX', False)
    ended = []
    class Stage:
        def terminate(self):
            ended.append(self)
    stage = Stage() # it has no send_signal, which raises ValueError there
    demo.tell({0: ('sft', stage)}, signal.SIGINT)
    assert ended == [stage]

# ----------------------------------------------------------------------------------------------------------------
# what a real stage prints: a demo.py with one stage, which fails

PRINTS = """
import sys
print('1 rows')
print('error: too few', file=sys.stderr)
sys.exit(2)
"""

def test_errors_are_seen_in_full_and_the_rest_is_kept(cfg, tmp_path):
    (tmp_path / 'stage.py').write_text(PRINTS)
    code = ("import demo; cfg = demo.Config(out_dir='out/one'); demo.claim(cfg); "
            "demo.run_stages([('one by one', 'stage.py', '', {}, 'out/one/product', [])], cfg)")
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(Path(demo.__file__).parent), OMP_NUM_THREADS='1'))
    kept = 'out/one/printed/one_by_one.txt'
    assert done.returncode == 2 and (tmp_path / kept).read_text() == '1 rows\n'
    assert done.stderr == ('error: too few\n'
                           'one by one ended with exit code 2; mend what is wrong, '
                           'then the same command continues from here\n')
    assert done.stdout == ('\n$ OMP_NUM_THREADS=1 python stage.py --seed=1 --overwrite=True\n'
                           f'what one by one printed: {kept}\n')

# ----------------------------------------------------------------------------------------------------------------
# signals: a real demo.py with one stage, which notes every signal and ends a moment after the first

STAGE = """
import os, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: told.append(number))
with open('pid.tmp', 'w') as f:
    f.write(str(os.getpid()))
os.rename('pid.tmp', 'pid')
end = time.time() + 30
while not told and time.time() < end: # a test that fails leaves no process
    time.sleep(0.01)
time.sleep(0.1)
with open('told.tmp', 'w') as f:
    f.write(' '.join(map(str, told)))
os.rename('told.tmp', 'told')
sys.exit(128 + sum(told[:1]))
"""

def wait_for(what, within=20):
    """Return what() as soon as it is true."""
    end = time.time() + within
    while not (value := what()):
        assert time.time() < end, 'nothing came'
        time.sleep(0.01)
    return value

def start_demo(tmp_path, stdout, stderr):
    """Start a demo.py; return it, and the pid of its stage, which is at work."""
    (tmp_path / 'stage.py').write_text(STAGE)
    code = ("import demo; cfg = demo.Config(out_dir='out/one'); demo.claim(cfg); "
            "demo.run_stages([('one', 'stage.py', '', {}, 'out/one/product', [])], cfg)")
    process = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, start_new_session=True, text=True,
                               env=os.environ | dict(PYTHONPATH=str(Path(demo.__file__).parent)),
                               stdout=stdout, stderr=stderr)
    wait_for((tmp_path / 'pid').exists)
    return process, int((tmp_path / 'pid').read_text())

@pytest.fixture
def running(cfg, tmp_path):
    process, stage = start_demo(tmp_path, subprocess.DEVNULL, subprocess.PIPE)
    yield process, stage
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(stage, signal.SIGKILL)
    process.communicate()

def told(tmp_path):
    wait_for((tmp_path / 'told').exists)
    return [int(number) for number in (tmp_path / 'told').read_text().split()]

@pytest.mark.skipif(os.name != 'posix', reason='Windows has no signals')
@pytest.mark.parametrize('send', [os.kill, os.killpg]) # to its pid alone; to its group, as the terminal does
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_reaches_the_stage_once(running, tmp_path, send, name):
    process, _ = running
    number = getattr(signal, name)
    send(process.pid, number)
    assert process.wait(20) == 128 + number and told(tmp_path) == [number]
    assert process.stderr.read() == (
        f'one ended with exit code {128 + number}; the same command continues from here\n')

@pytest.mark.skipif(os.name != 'posix', reason='Windows has no signals')
def test_a_closed_terminal_loses_nothing(cfg, tmp_path):
    """Where the terminal is gone, a line for it is no error. The shell and the kernel both send SIGHUP."""
    terminal, its_end = os.openpty()
    process, _ = start_demo(tmp_path, its_end, its_end)
    os.close(its_end)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 128 + signal.SIGHUP and told(tmp_path) == [signal.SIGHUP]

@pytest.mark.skipif(os.name != 'posix', reason='Windows has no signals')
def test_a_stage_saves_where_its_terminal_is_closed(tmp_path):
    def work():
        terminal, its_end = os.openpty()
        for file in (1, 2):
            os.dup2(its_end, file)
        os.close(its_end)
        os.close(terminal)
        sys.stderr, code = os.fdopen(2, 'w'), 1
        try:
            process = run.start(RunOptions(device='cpu'))
            os.kill(os.getpid(), signal.SIGHUP)
            print('saved', file=sys.stderr, flush=True)
            code = 10 + process.stop_requested()
        finally:
            os._exit(code) # without a line on the way

    assert in_processes(1, work) == [10 + signal.SIGHUP]

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a child that its parent is gone')
def test_the_stage_ends_with_demo(running, tmp_path):
    process, _ = running
    process.kill()
    assert process.wait(20) == -signal.SIGKILL and told(tmp_path) == [signal.SIGTERM]

def test_a_stage_that_outlives_demo_keeps_the_lock(cfg, capsys):
    pytest.importorskip('fcntl', reason='Windows has no such locks')
    demo.claim(cfg)
    stage = demo.start(['python', '-c', 'import time; time.sleep(60)'], 0)
    demo.LOCKS.pop(os.path.realpath('out/two/.lock')).close() # as if this process had ended
    assert 'another process is writing here' in one_line(capsys, lambda: demo.claim(cfg))
    stage.kill()
    stage.wait()
    demo.claim(cfg)

@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_ctrl_z_stops_the_stage_too(running, tmp_path):
    process, stage = running
    state = lambda pid: Path(f'/proc/{pid}/stat').read_text().split()[2]
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: state(process.pid) == state(stage) == 'T')
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: state(process.pid) != 'T' and state(stage) != 'T')
    process.terminate()
    assert process.wait(20) == 143 and told(tmp_path) == [signal.SIGTERM]
