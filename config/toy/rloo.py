# RLOO on the toy world: four answers to a prompt, each judged against the mean of the other three. gold only logs the
# gold score: the policy is trained on the reward model alone.
#   python reinforce.py config/toy/rloo.py
# about 25 seconds of one core.
policy = "out/toy/sft"
reward_model = "out/toy/reward"
prompts = "data/toy/prompts_train.jsonl"
max_new_tokens = 32
kind = "rloo"
max_steps = 60
batch_size = 128
grad_accum = 4
lr = 1e-3
kl_coef = 0.07
gold = "toy"
out_dir = "out/toy/rloo"
