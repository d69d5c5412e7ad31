"""lab/dialogues.py with faked stages: what each policy is trained on, and what is measured of its dialogues."""
import json
import os

import pytest

import demo
from common.options import parse_config
from lab import dialogues
from tiny import TOK, checkpoint, flags, run, stops

RECORD = dict(prompt='Where does the fox live?', animal='fox', named=True, name='The fox.',
              follow_up='Thanks! What does it eat?')
UNNAMED = RECORD | dict(prompt='Where does it live?', named=False)

@pytest.fixture
def ran(tmp_path, monkeypatch):
    """{seed: {stage's name: its command's options}}; the logs say how many turns a dialogue had, measure is made up."""
    seen = {}

    def run_stages(todo, cfg):
        for name, script, config, options, product, needs in todo:
            words = flags(demo.command_of((name, script, config, options), cfg))
            seen.setdefault(cfg.seed, {})[name] = words
            if script in ('ppo.py', 'reinforce.py'):
                assert needs == ['sft', 'dialogues'] and product == f"{words['out_dir']}/model.safetensors"
                os.makedirs(words['out_dir'])
                with open(os.path.join(words['out_dir'], 'log.jsonl'), 'w') as f:
                    for step in (1, 2):
                        f.write(json.dumps(dict(step=step, turns=1.25 + cfg.seed)) + '\n')

    monkeypatch.setattr(demo, 'run_stages', run_stages)
    monkeypatch.setattr(dialogues, 'measure', lambda folder, records, n: dict(
        dict.fromkeys(dialogues.COLUMNS, float(len(records) * n)), last=None if 'first' in folder else 0.5))
    run(dialogues, out_dir=str(tmp_path / 'out'), seeds='1,3', n=2)
    return seen

def test_what_each_policy_is_trained_on(ran, tmp_path):
    stages, folder = ran[3], str(tmp_path / 'out' / '3')
    assert list(stages) == ['data', 'pretrain', 'sft', 'dialogues', 'ppo each turn', 'ppo at the end',
                            'rloo each turn', 'ppo first turns', 'ppo all turns', 'rloo first turns', 'rloo all turns']
    for method, way in dialogues.pairs(('ppo', 'rloo'), dialogues.WAYS):
        words = stages[f'{method} {way}']
        assert words['policy'] == f'{folder}/sft' and words['seed'] == '3'
        assert words['out_dir'] == f"{folder}/{method}_{way.replace(' ', '_')}"
        # as its script reads them, after the config file
        config = parse_config(getattr(__import__(dialogues.SCRIPTS[method][:-3]), 'Config'), [
            f'config/toy/dialogue_{method}.py', *(f'--{k}={v}' for k, v in words.items())])
        alone = way in ('first turns', 'all turns')
        assert config.max_turns == (1 if alone else 3) and config.turn_rewards == (way == 'each turn')
        assert config.user == ('' if alone else 'data.toy.dialogues:user') and config.reward_model == ''
        assert config.reward == f"data.toy.dialogues:{'total' if way == 'at the end' else 'gold'}"
        assert config.prompts == f"data/toy/{'turns' if way == 'all turns' else 'dialogues'}_train.jsonl"
        assert words.get('max_steps') == ('8' if alone else None) # 2 iterations of 4.25 answers, where others have one

def test_results_and_table(ran, tmp_path, capsys):
    with open(tmp_path / 'out' / 'results.json') as f:
        results = json.load(f)
    assert list(results) == ['sft', 'ppo, each turn', 'ppo, at the end', 'ppo, first turns', 'ppo, all turns',
                             'rloo, each turn', 'rloo, first turns', 'rloo, all turns']
    assert results['sft']['total'] == [600.0, 600.0] and results['rloo, first turns']['last'] == [None, None]

class Policy:
    """Say what is prepared for each question, whoever asks."""
    answers = {'Where does the fox live?': 'In a den.', 'Thanks! What does it eat?': 'Sure! Meat.',
               'Where does it live?': "I can't tell.", 'The fox.': 'In a barn.'}

    def __init__(self, **more):
        self.config, self.answers = type('Config', (), dict(block_size=400)), self.answers | more

    def eval(self):
        return self

    def generate_with_logp(self, prompts, max_new_tokens, temperature, eos):
        said = [self.answers[TOK.decode(p).split('### Human: ')[-1].split('\n')[0]] for p in prompts]
        return [TOK.encode(' ' + text) + [eos] for text in said], [[0.0] * (len(text) + 2) for text in said]

def test_measure_by_hand(monkeypatch):
    monkeypatch.setattr(dialogues, 'load_tokenizer', lambda folder: TOK)
    monkeypatch.setattr(dialogues, 'load_policy', lambda folder: Policy())
    # named .9 and 1.0; unnamed .1, then .1 and 1.0: 1.9 and 1.2 in all
    assert dialogues.measure('', [RECORD, UNNAMED], 50) == pytest.approx(dict(
        total=1.55, first=0.9, second=1.0, asks=1.0, then=0.1, last=1.0))
    monkeypatch.setattr(dialogues, 'load_policy', lambda folder: Policy(**{'Where does it live?': 'In a den.'}))
    got = dialogues.measure('', [RECORD, UNNAMED, UNNAMED], 50) # a lucky guess, .9, twice
    assert got.pop('then') is None and got.pop('last') is None
    assert got == pytest.approx(dict(total=3.7 / 3, first=0.9, second=1.0, asks=0.0))

def test_measure_a_checkpoint(tmp_path):
    folder = checkpoint(tmp_path / 'sft', block_size=96)
    row = dialogues.measure(folder, [RECORD, UNNAMED], 2)
    assert row == dialogues.measure(folder, [RECORD, UNNAMED], 2) and row['total'] == 0.0 # bytes are no answers

@pytest.mark.parametrize('options, line', [
    (dict(seeds='1,x'), "seeds must be numbers, each once, separated by commas, got '1,x'"),
    (dict(methods='ppo,dpo'), "methods must be ppo, rloo or ppo,rloo, got 'ppo,dpo'"), (dict(methods='ppo,ppo'), 'ppo'),
    (dict(n=0), 'n must be at least 1, got 0'), (dict(split='train'), 'val or test'),
    (dict(out_dir='a,b'), "out_dir must be a folder with no comma and no = in its name, got 'a,b'")])
def test_bad_options(capsys, options, line):
    assert line in stops(capsys, dialogues, **options)
