# PPO on whole dialogues of the toy world, with a reward for each answer: the gold score of what the user wants to know
# (data/toy/dialogues.py). There is no reward model. First: python data/toy/dialogues.py
#   python ppo.py config/toy/dialogue_ppo.py
policy = "out/toy/sft"
reward_model = ""
reward = "data.toy.dialogues:gold"
user = "data.toy.dialogues:user"
max_turns = 3
turn_rewards = True
prompts = "data/toy/dialogues_train.jsonl"
max_new_tokens = 24
max_steps = 34
batch_size = 64
minibatches = 2
epochs = 2
grad_accum = 4
lr = 7e-4
critic_lr = 7e-4
kl_coef = 0.06
out_dir = "out/toy/dialogue_ppo"
