# IPO on the same rankings: its loss has a least point, so the margin stops growing.
#   python dpo.py config/toy/ipo.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
loss = "ipo"
beta = 0.5
lr = 8e-4
batch_size = 32
eval_every = 0
out_dir = "out/toy/ipo"
max_steps = 100
