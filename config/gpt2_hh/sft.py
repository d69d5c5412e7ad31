# GPT-2 124M on HH-RLHF, 1 of 5: supervised fine-tuning on the answers that people preferred.
#   python data/hh_rlhf/prepare.py
#   python sft.py config/gpt2_hh/sft.py
# Memory: about 9.3 GiB in bfloat16, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
init_from = "gpt2"
train_data = "data/hh_rlhf/demonstrations_train.jsonl"
val_data = "data/hh_rlhf/demonstrations_val.jsonl"
epochs = 1
batch_size = 32
grad_accum = 4
lr = 2e-5
warmup_steps = 100
eval_every = 500
save_every = 1000
out_dir = "out/gpt2_hh/sft"
