# REINFORCE on the toy world: as rloo.py, but all answers are compared with one running mean.
#   python reinforce.py config/toy/reinforce.py
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
kind = "reinforce"
max_steps = 60
batch_size = 128
grad_accum = 4
lr = 1.6e-3
kl_coef = 0.21
gold = "data.toy.world:gold"
out_dir = "out/toy/reinforce"
