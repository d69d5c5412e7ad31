# HH-RLHF on a laptop, 5 of 6: DPO on the same comparisons.
#   python dpo.py config/hh_tiny/dpo.py
init_from = "out/hh_tiny/sft"
train_data = "data/hh_rlhf/comparisons_train.jsonl"
val_data = "data/hh_rlhf/comparisons_val.jsonl"
beta = 0.1
batch_size = 8
lr = 1e-4
out_dir = "out/hh_tiny/dpo"
