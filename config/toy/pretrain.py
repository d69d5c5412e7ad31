# The toy world's base model: next-token prediction on a corpus of mixed behaviour, one document a row.
#   python sft.py config/toy/pretrain.py
# 0.7M parameters, about 70 seconds of one core. Held-out loss 0.71 nats a token.
init_from = "scratch"
tokenizer = "data/toy/toy.tiktoken"
n_layer = 2
n_head = 4
n_embd = 128
block_size = 96
train_data = "data/toy/text_train.jsonl"
val_data = "data/toy/text_val.jsonl"
loss_on = "all"
max_steps = 1000
batch_size = 20
lr = 3e-3
lr_schedule = "linear"
warmup_steps = 50
out_dir = "out/toy/base"
packed = False
