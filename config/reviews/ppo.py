# Reviews: PPO. gold only logs what a classifier of other people's labels says. Other prices of the KL are measured by
# lab/reviews_frontier.py (docs/results.md, "Reviews").
#   python ppo.py config/reviews/ppo.py
policy = "out/reviews/sft"
reward_model = "out/reviews/reward"
prompts = "data/reviews/prompts_train.jsonl"
max_new_tokens = 32
max_steps = 40
batch_size = 64
minibatches = 2
epochs = 2
grad_accum = 2
lr = 5e-4
critic_lr = 5e-4
kl_coef = 0.1
gold = "data.reviews.gold:gold"
out_dir = "out/reviews/ppo"
