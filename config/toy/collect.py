policy = "out/toy/sft"
prompts = "data/toy/prompts_train.jsonl"
out = "out/toy/rankings_train.jsonl"
max_new_tokens = 32
