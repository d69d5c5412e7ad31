# Over-optimisation (Gao, Schulman and Hilton 2022): without a price on the KL, PPO drives the reward model's score up
# long after the gold score has turned down. The control differs only in beta. Both log the gold score.
#   python ppo.py config/toy/overoptimise.py
#   python ppo.py config/toy/overoptimise.py --kl_coef=0.1 --out_dir=out/toy/beta0.1
#   python evaluate.py --figure_runs="beta 0=out/toy/beta0,beta 0.1=out/toy/beta0.1" --out_dir=out/toy/evaluate
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
max_steps = 60
batch_size = 64
minibatches = 2
epochs = 2
grad_accum = 4
lr = 1e-3
critic_lr = 1e-3
lr_schedule = "constant"
kl_coef = 0.0
gold = "data.toy.world:gold"
out_dir = "out/toy/beta0"
