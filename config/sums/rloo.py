# RLOO with the same checker. At twice the learning rate it stands still for 30 iterations on one seed of two.
#   python reinforce.py config/sums/rloo.py
policy = "out/sums/sft"
reward = "data.checker:exact_match"
prompts = "data/sums/prompts_train.jsonl"
max_new_tokens = 32
kind = "rloo"
n_answers = 8
max_steps = 200
batch_size = 256
lr = 1e-3
kl_coef = 0.0
out_dir = "out/sums/rloo"
