"""lab/lora.py: what it runs, and how much an adapter trains."""
from demo import Config, command_of
from lab.lora import lora, stages, trained_share
from tiny import checkpoint

def test_the_commands():
    at = Config(seed=2, out_dir='out/lora/2', methods='ppo')
    todo = stages(at, 'ppo', dict(a=lora(4, '1e-3')), 'some.jsonl', 'ranks')
    assert [stage[0] for stage in todo][-3:] == ['ppo', 'a', 'ranks'] # all weights, the adapter, both measured
    words = command_of(todo[-2], at)
    assert words[:3] == ['python', 'ppo.py', 'config/toy/ppo.py'] and {
        '--lora_rank=4', '--lora_on=all', '--lr=1e-3', '--critic_lr=1e-3', '--out_dir=out/lora/2/a', '--seed=2',
        '--policy=out/lora/2/sft', '--reward_model=out/lora/2/reward'} <= {*words}
    words = command_of(todo[-1], at)
    assert {'--models=sft=out/lora/2/sft,ppo=out/lora/2/ppo,a=out/lora/2/a', '--prompts=some.jsonl'} <= {*words}

def test_the_share_by_hand(tmp_path):
    """One layer, 16 wide, rank 2: c_attn 2 (16 + 48), c_proj 2 (16 + 16), c_fc and its c_proj 2 (16 + 64) each."""
    n, share = trained_share(2, checkpoint(tmp_path))
    assert n == 128 + 64 + 2 * 160
    # 257 tokens and 64 positions of 16; two layer norms and the last one of 32; weights and biases of the four layers
    assert share == n / ((257 + 64) * 16 + 3 * 32 + (16 + 1) * 48 + (16 + 1) * 16 + (16 + 1) * 64 + (64 + 1) * 16)
