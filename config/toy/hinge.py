# The hinge on log-ratios (SLiC) on the same rankings. A pair beyond the margin pulls no more.
#   python dpo.py config/toy/hinge.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
loss = "hinge"
beta = 1.5
lr = 8e-4
batch_size = 32
eval_every = 0
out_dir = "out/toy/hinge"
max_steps = 100
