# RLOO on whole dialogues of the toy world; see dialogue_ppo.py. Four dialogues per first question are compared.
#   python reinforce.py config/toy/dialogue_rloo.py
policy = "out/toy/sft"
reward_model = ""
reward = "data.toy.dialogues:gold"
user = "data.toy.dialogues:user"
max_turns = 3
turn_rewards = True
prompts = "data/toy/dialogues_train.jsonl"
max_new_tokens = 24
kind = "rloo"
max_steps = 34
batch_size = 64
minibatches = 2
epochs = 2
grad_accum = 4
lr = 7e-4
kl_coef = 0.06
out_dir = "out/toy/dialogue_rloo"
