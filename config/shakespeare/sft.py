# Shakespeare by characters, with the shape, batch and steps of nanoGPT's configuration for a CPU. nanoGPT reaches a
# validation loss of 1.88.
#   python data/shakespeare/prepare.py && python sft.py config/shakespeare/sft.py
# One byte per token; the last tenth of the file is held out.
init_from = "scratch"
train_data = "data/shakespeare/input.txt"
tokenizer = "bytes"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
loss_on = "all"
val_fraction = 0.1
max_steps = 2000
batch_size = 12
lr = 1e-3
warmup_steps = 100
weight_decay = 0.1
eval_every = 500
eval_batches = 0
out_dir = "out/shakespeare/base"
