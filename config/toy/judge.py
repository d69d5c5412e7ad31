# A judge for the toy world: a small GPT that says which of two answers is better (see data/toy/judge.py).
#   python data/toy/judge.py && python sft.py config/toy/judge.py
#   python collect.py config/toy/collect_ai.py
# Held-out loss 0.16 nats per token.
init_from = "out/toy/base"
train_data = "data/toy/verdicts_train.jsonl"
val_data = "data/toy/verdicts_val.jsonl"
epochs = 2
batch_size = 32
lr = 1e-3
eval_every = 250
eval_batches = 0
out_dir = "out/toy/judge"
