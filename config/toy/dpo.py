# DPO on the same rankings.
#   python dpo.py config/toy/dpo.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
beta = 1.0
lr = 8e-4
lr_schedule = "linear"
batch_size = 32
eval_every = 0
out_dir = "out/toy/dpo"
