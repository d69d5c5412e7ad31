# How often the answers to held-out problems are right: the checker gives 1 or 0. The second command asks for sums of
# 2, 4, 5 and 6 digits, where only 3 were practised.
#   python evaluate.py config/sums/evaluate.py
#   python evaluate.py config/sums/evaluate.py --prompts=data/sums/prompts_others.jsonl --out_dir=out/sums/others
models = "base=out/sums/base,sft=out/sums/sft,grpo=out/sums/grpo"
prompts = "data/sums/prompts_test.jsonl"
max_new_tokens = 32
gold = "data.checker:exact_match"
figures = False
out_dir = "out/sums/evaluate"
