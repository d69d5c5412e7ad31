# DAPO on the toy world: a wider clip above 1, and prompts whose answers all score alike are replaced by others. A
# reward model hardly ever scores two answers alike, so the reward is the gold score itself.
#   python reinforce.py config/toy/dapo.py
policy = "out/toy/sft"
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
reward = "data.toy.world:gold"
clip_high = 0.28
refill = 3
out_dir = "out/toy/dapo"
