# Reviews: all models go on with the beginnings of remarks that nothing was trained on. rankings: how often the reward
# model, and each policy as one, prefers the Pro to the Con.
#   python evaluate.py config/reviews/evaluate.py
models = "sft=out/reviews/sft,ppo=out/reviews/ppo,dpo=out/reviews/dpo"
reward_model = "out/reviews/reward"
best_of = 4
prompts = "data/reviews/prompts_test.jsonl"
max_new_tokens = 32
text = "data/reviews/demonstrations_val.jsonl"
rankings = "data/reviews/comparisons_val.jsonl"
gold = "data.reviews.gold:gold"
out_dir = "out/reviews/evaluate"
