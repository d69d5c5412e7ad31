# GPT-2 124M on OASST1's English trees, 1 of 3: supervised fine-tuning on the answers ranked best.
#   python data/oasst1/prepare.py
#   python sft.py config/gpt2_oasst/sft.py
# Memory: about 9.3 GiB in bfloat16, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
init_from = "gpt2"
train_data = "data/oasst1/demonstrations_train.jsonl"
val_data = "data/oasst1/demonstrations_val.jsonl"
epochs = 2
batch_size = 32
grad_accum = 4
lr = 2e-5
warmup_steps = 50
out_dir = "out/gpt2_oasst/sft"
