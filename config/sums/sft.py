# A few demonstrations, a quarter of them by careful writers: the likeliest answer stays the hasty one.
#   python sft.py config/sums/sft.py
init_from = "out/sums/base"
train_data = "data/sums/demonstrations_scratch_train.jsonl"
val_data = "data/sums/demonstrations_scratch_val.jsonl"
epochs = 1
batch_size = 16
lr = 3e-4
warmup_steps = 5
eval_every = 0
out_dir = "out/sums/sft"
