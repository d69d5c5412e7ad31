init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_val.jsonl"
beta = 0.5
lr = 2e-4
batch_size = 32
eval_every = 0
out_dir = "out/toy/dpo"
