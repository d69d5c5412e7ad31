init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_val.jsonl"
batch_size = 32
lr = 1e-3
eval_every = 0
out_dir = "out/toy/reward"
