# RRHF on the same rankings
#   python rrhf.py config/toy/rrhf.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
use_scores = False
rank_coef = 0.3
batch_size = 32
lr = 1e-3
eval_every = 0
max_steps = 180
out_dir = "out/toy/rrhf"
