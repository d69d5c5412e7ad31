# GPT-2 124M on HH-RLHF, 4 of 5: DPO on the same comparisons.
#   python dpo.py config/gpt2_hh/dpo.py
# Memory: about 7.1 GiB in bfloat16, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
init_from = "out/gpt2_hh/sft"
train_data = "data/hh_rlhf/comparisons_train.jsonl"
val_data = "data/hh_rlhf/comparisons_val.jsonl"
beta = 0.1
epochs = 1
batch_size = 32
grad_accum = 4
lr = 2e-6
warmup_steps = 150
eval_every = 1000
save_every = 1000
out_dir = "out/gpt2_hh/dpo"
