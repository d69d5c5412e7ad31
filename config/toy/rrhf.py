# RRHF on the rankings that DPO learns from, by their ranks: their scores are the person's noise-free ones. A large
# rank_coef pushes worse answers down faster than it lifts better ones; the smallest that was tried did best.
#   python rrhf.py config/toy/rrhf.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
use_scores = False
rank_coef = 0.03
batch_size = 32
lr = 3.2e-3
eval_every = 0
max_steps = 180
out_dir = "out/toy/rrhf"
