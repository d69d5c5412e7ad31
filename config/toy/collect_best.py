# Best of four: the answer that the reward model likes best becomes a demonstration.
#   python collect.py config/toy/collect_best.py
# then
#   python sft.py config/toy/rejection.py
policy = "out/toy/sft"
prompts = "data/toy/prompts_train.jsonl"
annotator = "reward_model"
reward_model = "out/toy/reward"
keep = "best"
out = "out/toy/best_of_n.jsonl"
max_new_tokens = 32
