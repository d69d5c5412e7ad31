# The toy world's base model: next-token prediction on a corpus of mixed behaviour, one document per row.
#   python sft.py config/toy/pretrain.py
# 0.5M parameters. Held-out loss 0.72 nats per token.
init_from = "scratch"
tokenizer = "data/toy/toy.tiktoken"
n_layer = 2
n_head = 4
n_embd = 128
block_size = 96
train_data = "data/toy/text_train.jsonl"
val_data = "data/toy/text_val.jsonl"
loss_on = "all"
max_steps = 800
batch_size = 20
lr = 4e-3
lr_schedule = "linear"
warmup_steps = 50
out_dir = "out/toy/base"
packed = False
eval_every = 400
