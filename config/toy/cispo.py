# CISPO on the toy world: clipped weights times log pi. Nothing stops a token that moves far, so the policy strays
# further from the reference than with config/toy/grpo.py.
#   python reinforce.py config/toy/cispo.py
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
loss = "cispo"
clip_high = 4.0
out_dir = "out/toy/cispo"
