# SimPO on the same rankings. With no reference to hold it, the smallest learning rate that was tried did best.
#   python dpo.py config/toy/simpo.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
loss = "simpo"
beta = 2.0
simpo_margin = 0.5
lr = 1e-4
batch_size = 32
eval_every = 0
out_dir = "out/toy/simpo"
max_steps = 100
