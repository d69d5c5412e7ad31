# HH-RLHF on a laptop, 3 of 6: the reward model, from 1761 human comparisons.
#   python reward.py config/hh_tiny/reward.py
init_from = "out/hh_tiny/sft"
train_data = "data/hh_rlhf/comparisons_train.jsonl"
val_data = "data/hh_rlhf/comparisons_val.jsonl"
epochs = 1
batch_size = 8
lr = 3e-4
out_dir = "out/hh_tiny/reward"
