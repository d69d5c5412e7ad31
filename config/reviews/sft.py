# Reviews: a small GPT learns to go on with what people began to say: the policy before training, and the reference.
#   python data/reviews/prepare.py --source=pros_cons.zip
#   python sft.py config/reviews/sft.py
# The same for another model, from other people's remarks, by which fluency is measured:
#   python sft.py config/reviews/sft.py --train_data=data/reviews/gold_train.jsonl \
#       --val_data=data/reviews/gold_test.jsonl --out_dir=out/reviews/fluency
init_from = "scratch"
tokenizer = "data/reviews/reviews.tiktoken"
n_layer = 4
n_head = 4
n_embd = 192
block_size = 64
dropout = 0.1
train_data = "data/reviews/demonstrations_train.jsonl"
val_data = "data/reviews/demonstrations_val.jsonl"
epochs = 5
batch_size = 64
lr = 2e-3
lr_schedule = "linear"
warmup_steps = 50
eval_every = 0
eval_batches = 0
out_dir = "out/reviews/sft"
