# The answers of config/toy/collect.py again: only 500 of their prompts are ranked, and --select says which.
#   python collect.py config/toy/select.py
#   python collect.py config/toy/select.py --select=diverse --out=out/toy/diverse.jsonl
answers = "out/toy/rankings_train.jsonl"
select = "random"
budget = 500
gold = "data.toy.world:gold"
noise = 0.1
tie = 0.3
out = "out/toy/random.jsonl"
