# HH-RLHF on a laptop, 2 of 6: only the answers, so that the model learns to answer and to stop.
#   python sft.py config/hh_tiny/sft.py
init_from = "out/hh_tiny/base"
train_data = "data/hh_rlhf/demonstrations_train.jsonl"
val_data = "data/hh_rlhf/demonstrations_val.jsonl"
epochs = 1
batch_size = 8
lr = 2e-4
eval_every = 100
out_dir = "out/hh_tiny/sft"
