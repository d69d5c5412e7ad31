# DPO on the same rankings. beta 1 holds it near the reference; 0.3 at this learning rate runs away.
#   python dpo.py config/toy/dpo.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
beta = 1.0
lr = 6e-4
lr_schedule = "linear"
batch_size = 32
eval_every = 0
out_dir = "out/toy/dpo"
