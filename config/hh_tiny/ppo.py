# HH-RLHF on a laptop, 4 of 6: PPO against that reward model.
#   python ppo.py config/hh_tiny/ppo.py
policy = "out/hh_tiny/sft"
reward_model = "out/hh_tiny/reward"
prompts = "data/hh_rlhf/prompts_train.jsonl"
max_new_tokens = 64
max_steps = 40
batch_size = 16
minibatches = 2
epochs = 2
grad_accum = 2
lr = 2e-4
critic_lr = 2e-4
kl_coef = 0.05
out_dir = "out/hh_tiny/ppo"
