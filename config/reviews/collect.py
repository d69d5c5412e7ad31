# Reviews: four ways to go on, ranked by the reward model. People cannot be asked any more, so DPO and RRHF learn from a
# model of their labels, as in Rafailov et al. 2023, section 6.
#   python collect.py config/reviews/collect.py
policy = "out/reviews/sft"
prompts = "data/reviews/prompts_train.jsonl"
annotator = "reward_model"
reward_model = "out/reviews/reward"
out = "out/reviews/rankings_train.jsonl"
max_new_tokens = 32
