# GPT-2 124M on HH-RLHF, 2 of 5: the reward model.
#   python reward.py config/gpt2_hh/reward.py
# Memory: about 4.8 GiB in bfloat16, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
init_from = "out/gpt2_hh/sft"
train_data = "data/hh_rlhf/comparisons_train.jsonl"
val_data = "data/hh_rlhf/comparisons_val.jsonl"
epochs = 1
batch_size = 32
grad_accum = 4
lr = 1e-5
warmup_steps = 100
eval_every = 1000
save_every = 1000
out_dir = "out/gpt2_hh/reward"
