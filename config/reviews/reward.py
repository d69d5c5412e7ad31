# Reviews: the reward model, from pairs of remarks that begin with the same word or two, the Pro above the Con.
#   python reward.py config/reviews/reward.py
init_from = "out/reviews/sft"
train_data = "data/reviews/comparisons_train.jsonl"
val_data = "data/reviews/comparisons_val.jsonl"
epochs = 2
batch_size = 32
lr = 5e-4
lr_schedule = "linear"
eval_every = 0
out_dir = "out/reviews/reward"
