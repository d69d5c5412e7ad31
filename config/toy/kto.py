# KTO on the same rankings, taken apart: an answer that beats more than beat it is good, one that is beaten by more is
# bad. Answers in the middle are left out, and prompts whose answers all tie.
# desirable_weight makes up for there being more bad answers than good ones.
#   python kto.py config/toy/kto.py
init_from = "out/toy/sft"
train_data = "out/toy/rankings_train.jsonl"
val_data = "out/toy/rankings_test.jsonl"
beta = 0.5
desirable_weight = 1.5
lr = 1.6e-3
batch_size = 96
eval_every = 0
out_dir = "out/toy/kto"
max_steps = 100
