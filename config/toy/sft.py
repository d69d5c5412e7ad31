# The toy assistant: 600 good but imperfect demonstrations.
#   python sft.py config/toy/sft.py
# Held-out loss 0.66 nats per token of the answers.
init_from = "out/toy/base"
train_data = "data/toy/demonstrations_train.jsonl"
val_data = "data/toy/demonstrations_val.jsonl"
epochs = 3
batch_size = 16
lr = 5e-4
warmup_steps = 5
out_dir = "out/toy/sft"
