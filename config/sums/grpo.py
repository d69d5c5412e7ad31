# GRPO with a checker as the reward: 1 for the right final answer, else 0. There is no reward model to fool, and so no
# price on the KL. At half the learning rate one seed was as good after 100 iterations.
#   python reinforce.py config/sums/grpo.py
policy = "out/sums/sft"
reward = "data.checker:exact_match"
prompts = "data/sums/prompts_train.jsonl"
max_new_tokens = 32
kind = "grpo"
n_answers = 8
epochs = 2
minibatches = 2
max_steps = 150
batch_size = 128
lr = 1e-3
kl_coef = 0.0
out_dir = "out/sums/grpo"
