# Four answers to each prompt, ranked by a simulated person who sees the gold score through noise.
#   python collect.py config/toy/collect.py
#   python collect.py config/toy/collect.py --prompts=data/toy/prompts_test.jsonl --out=out/toy/rankings_test.jsonl
# Answers that seem at most 0.3 apart tie.
policy = "out/toy/sft"
prompts = "data/toy/prompts_train.jsonl"
out = "out/toy/rankings_train.jsonl"
max_new_tokens = 32
gold = "data.toy.world:gold"
noise = 0.1
tie = 0.3
