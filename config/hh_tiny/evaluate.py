# HH-RLHF on a laptop, 6 of 6: the table.
#   python evaluate.py config/hh_tiny/evaluate.py
models = "base=out/hh_tiny/base,sft=out/hh_tiny/sft,ppo=out/hh_tiny/ppo,dpo=out/hh_tiny/dpo"
reward_model = "out/hh_tiny/reward"
best_of = 4
prompts = "data/hh_rlhf/prompts_val.jsonl"
max_new_tokens = 64
text = "data/hh_rlhf/demonstrations_val.jsonl"
rankings = "data/hh_rlhf/comparisons_val.jsonl"
out_dir = "out/hh_tiny/evaluate"
