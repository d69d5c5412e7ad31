"""demo.py: which commands it runs, what it reuses, and how it goes on after a stop. The stages themselves are faked."""
import json
import os
from pathlib import Path

import pytest

import demo

STAGES = ['data', 'pretrain', 'sft', 'collect train', 'collect test', 'reward', 'ppo', 'dpo', 'evaluate']


class Fake:
    """Stands in for demo.run: notes the commands, leaves each stage's product, and fails where it is told to."""

    def __init__(self, monkeypatch, cfg):
        self.commands, self.fail_at, self.cfg = [], None, cfg
        monkeypatch.setattr(demo, 'run', self)

    def __call__(self, command):
        self.commands.append(command)
        name, *_, product = next(s for s in demo.stages(self.cfg) if s[1] == command[1]
                                 and (s[1] != 'sft.py' and s[1] != 'collect.py' or self.is_stage(s, command)))
        os.makedirs(os.path.dirname(product), exist_ok=True)
        if name == self.fail_at:
            Path(os.path.dirname(product), 'state.pt').touch()
            return 130
        Path(product).write_text('{}')
        return 0

    @staticmethod
    def is_stage(stage, command):
        return stage[2] in command and all(f'--{k}={v}' in command for k, v in stage[3].items())


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
    ppo = fake.commands[6] # every path into out/toy now points into out/two
    assert {'--policy=out/two/sft', '--reward_model=out/two/reward', '--out_dir=out/two/ppo'} <= set(ppo)
    results = json.loads(Path('out/two/evaluate/results.json').read_text())
    assert list(results['seconds']) == STAGES and results['seed'] == 7
    demo.main(cfg)
    assert len(fake.commands) == 9 # a second run reuses everything
    assert capsys.readouterr().out.count('done before') == 9


def test_goes_on_after_a_stop(cfg, monkeypatch):
    fake = Fake(monkeypatch, cfg)
    fake.fail_at = 'ppo'
    with pytest.raises(SystemExit) as stop:
        demo.main(cfg)
    assert stop.value.code == 130 and len(fake.commands) == 7
    fake.fail_at = None
    demo.main(cfg)
    assert fake.commands[7][1] == 'ppo.py' and '--resume=True' in fake.commands[7]
    assert fake.commands[8][1] == 'dpo.py' and '--overwrite=True' in fake.commands[8]


def test_what_stands_on_a_changed_stage_is_made_anew(cfg, monkeypatch):
    fake = Fake(monkeypatch, cfg)
    demo.main(cfg)
    os.remove('out/two/reward/model.safetensors')
    demo.main(cfg)
    assert [c[1] for c in fake.commands[9:]] == ['reward.py', 'ppo.py', 'dpo.py', 'evaluate.py']
    assert all('--resume=True' not in c for c in fake.commands)
    fake.commands.clear()
    demo.main(demo.Config(out_dir='out/two', seed=8)) # another seed: all but the data
    assert len(fake.commands) == 8
