# Rejection sampling: supervised fine-tuning on the best of four of the policy's own answers.
#   python collect.py config/toy/collect_best.py
#   python sft.py config/toy/rejection.py
init_from = "out/toy/sft"
train_data = "out/toy/best_of_n.jsonl"
val_fraction = 0.05
epochs = 3
batch_size = 32
lr = 1.6e-3
eval_every = 0
out_dir = "out/toy/rejection"
