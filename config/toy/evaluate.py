# Everything about the toy models, on prompts that nothing was trained on.
#   python evaluate.py config/toy/evaluate.py
models = "base=out/toy/base,sft=out/toy/sft,ppo=out/toy/ppo,dpo=out/toy/dpo"
reward_model = "out/toy/reward"
best_of = 4
prompts = "data/toy/prompts_test.jsonl"
max_new_tokens = 32
text = "data/toy/text_val.jsonl"
rankings = "out/toy/rankings_test.jsonl"
comparisons = "data/toy/comparisons_test.jsonl"
gold = "data.toy.world:gold"
out_dir = "out/toy/evaluate"
