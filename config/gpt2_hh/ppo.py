# GPT-2 124M on HH-RLHF, 3 of 5: PPO against that reward model; policy, critic, reward model and reference on one GPU.
#   python ppo.py config/gpt2_hh/ppo.py
# Memory: about 12.2 GiB in bfloat16, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
policy = "out/gpt2_hh/sft"
reward_model = "out/gpt2_hh/reward"
prompts = "data/hh_rlhf/prompts_train.jsonl"
max_new_tokens = 128
max_steps = 500
batch_size = 64
grad_accum = 8
lr = 5e-6
critic_lr = 1e-5
kl_coef = 0.05
save_every = 100
out_dir = "out/gpt2_hh/ppo"
