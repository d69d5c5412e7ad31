# GSPO on the toy world: one ratio for an answer, closer to 1 than those of its tokens, so the clip is narrower.
#   python reinforce.py config/toy/gspo.py
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
ratio = "sequence"
average = "answer"
clip = 0.02
out_dir = "out/toy/gspo"
