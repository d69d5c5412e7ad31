# GPT-2 1.5B on HH-RLHF, 1 of 5: supervised fine-tuning on the answers that people preferred.
#   python data/hh_rlhf/prepare.py
#   python sft.py config/gpt2xl_hh/sft.py
# Memory: about 28.8 GiB in bfloat16 with checkpointing, for micro-batches of 4 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=4
# Not run yet: neither its time nor its scores are known.
init_from = "gpt2-xl"
train_data = "data/hh_rlhf/demonstrations_train.jsonl"
val_data = "data/hh_rlhf/demonstrations_val.jsonl"
epochs = 1
batch_size = 32
grad_accum = 8
checkpointing = True
lr = 5e-6
warmup_steps = 100
eval_every = 500
save_every = 1000
out_dir = "out/gpt2xl_hh/sft"
