# Reviews: RRHF on the same rankings, by their ranks alone.
#   python rrhf.py config/reviews/rrhf.py
init_from = "out/reviews/sft"
train_data = "out/reviews/rankings_train.jsonl"
val_data = "data/reviews/comparisons_val.jsonl"
use_scores = False
rank_coef = 0.3
batch_size = 32
lr = 5e-4
eval_every = 0
out_dir = "out/reviews/rrhf"
