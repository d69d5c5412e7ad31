# Right answers on problems that no stage has seen, by the checker.
#   python evaluate.py config/sums/evaluate.py
#   python evaluate.py config/sums/evaluate.py --prompts=data/sums/prompts_others.jsonl --out_dir=out/sums/others
models = "base=out/sums/base,sft=out/sums/sft,grpo=out/sums/grpo"
prompts = "data/sums/prompts_test.jsonl"
max_new_tokens = 32
gold = "data.checker:exact_match"
figures = False
out_dir = "out/sums/evaluate"
