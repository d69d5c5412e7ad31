# GPT-2 124M on HH-RLHF, 5 of 5: the table, on 1000 held-out prompts. One model at a time is on the
# GPU, beside the reward model and the reference.
#   python evaluate.py config/gpt2_hh/evaluate.py
# Not run yet: neither its time nor its scores are known.
models = "base=gpt2,sft=out/gpt2_hh/sft,ppo=out/gpt2_hh/ppo,dpo=out/gpt2_hh/dpo"
reward_model = "out/gpt2_hh/reward"
best_of = 4
prompts = "data/hh_rlhf/prompts_val.jsonl"
max_prompts = 1000
max_new_tokens = 128
text = "data/hh_rlhf/demonstrations_val.jsonl"
rankings = "data/hh_rlhf/comparisons_val.jsonl"
out_dir = "out/gpt2_hh/evaluate"
