# The toy reward model. lm_coef keeps it predicting the preferred answers: without it, right against wrong answers
# are hardly learnt in the time (see docs/results.md).
#   python reward.py config/toy/reward.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
batch_size = 16
lr = 1.5e-3
lr_schedule = "linear"
eval_every = 0
out_dir = "out/toy/reward"
max_steps = 1100
lm_coef = 0.5
