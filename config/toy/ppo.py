# PPO on the toy world. gold only logs the gold score: the policy is trained only on the reward model. lr and kl_coef
# were chosen on the val prompts (docs/results.md, "How settings were chosen"), as in the files of other methods.
#   python ppo.py config/toy/ppo.py
# With --show=4 --save_every=5 it keeps answers token by token: python microscope.py --samples=out/toy/ppo/samples.jsonl
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
max_steps = 34
batch_size = 64
minibatches = 2
epochs = 2
grad_accum = 4
lr = 8e-4
critic_lr = 7e-4
kl_coef = 0.18
gold = "data.toy.world:gold"
out_dir = "out/toy/ppo"
