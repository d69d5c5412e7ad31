# GRPO on the toy world: two epochs over each iteration's answers. kl_coef is the price of a nat per token here, against
# advantages of standard deviation 1.
#   python reinforce.py config/toy/grpo.py
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
kl_coef = 0.1
gold = "data.toy.world:gold"
out_dir = "out/toy/grpo"
