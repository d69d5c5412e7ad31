# Dr. GRPO on the toy world: advantages are not divided by their spread, nor sums over tokens by an answer's length. So
# they are smaller than in config/toy/grpo.py, and so is the price of a nat.
#   python reinforce.py config/toy/drgrpo.py
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
kind = "grpo"
epochs = 2
minibatches = 2
max_steps = 44
batch_size = 64
grad_accum = 4
lr = 4e-4
gold = "data.toy.world:gold"
scale_std = False
average = "constant"
kl_coef = 0.03
out_dir = "out/toy/drgrpo"
