# RLOO on the toy world: four answers to a prompt, each compared with the mean of the other three. gold only logs the
# gold score: the policy is trained only on the reward model.
#   python reinforce.py config/toy/rloo.py
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
kind = "rloo"
max_steps = 60
batch_size = 128
grad_accum = 4
lr = 1.6e-3
kl_coef = 0.21
gold = "data.toy.world:gold"
out_dir = "out/toy/rloo"
