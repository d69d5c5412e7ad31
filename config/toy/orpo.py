# ORPO on the same rankings, without a reference: beta weighs the odds ratio against the cross-entropy on the better.
#   python dpo.py config/toy/orpo.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
loss = "orpo"
beta = 1.0
lr = 1.6e-3
batch_size = 32
eval_every = 0
out_dir = "out/toy/orpo"
max_steps = 100
