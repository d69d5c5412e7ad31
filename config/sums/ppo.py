# PPO with the same checker: the critic starts as the policy, with a fresh value head.
#   python ppo.py config/sums/ppo.py
policy = "out/sums/sft"
reward = "data.checker:exact_match"
prompts = "data/sums/prompts_train.jsonl"
max_new_tokens = 32
max_steps = 60
batch_size = 128
minibatches = 2
epochs = 2
lr = 1e-3
critic_lr = 1e-3
kl_coef = 0.0
out_dir = "out/sums/ppo"
