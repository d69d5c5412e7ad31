# REINFORCE on the toy world: as rloo.py, but all answers are judged against one running mean.
#   python reinforce.py config/toy/reinforce.py
# about 25 seconds of one core.
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
kind = "reinforce"
max_steps = 60
batch_size = 128
grad_accum = 4
lr = 1e-3
kl_coef = 0.07
gold = "toy"
out_dir = "out/toy/reinforce"
