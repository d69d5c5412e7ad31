# The base model of the world of sums: answers of careful and hasty writers, most of them hasty.
#   python sft.py config/sums/base.py
# Without the scratch line there is more to learn, and a step takes less time:
#   python sft.py config/sums/base.py --train_data=data/sums/practice_direct_train.jsonl \
#       --val_data=data/sums/practice_direct_val.jsonl --max_steps=8000 --out_dir=out/sums/base_direct
init_from = "scratch"
tokenizer = "data/sums/sums.tiktoken"
n_layer = 2
n_head = 4
n_embd = 64
block_size = 64
train_data = "data/sums/practice_scratch_train.jsonl"
val_data = "data/sums/practice_scratch_val.jsonl"
max_steps = 3500
batch_size = 32
lr = 4e-3
lr_schedule = "linear"
warmup_steps = 50
eval_every = 0
eval_batches = 0
out_dir = "out/sums/base"
