# GPT-2 124M on OASST1's English trees, 3 of 3: DPO on the same rankings.
#   python dpo.py config/gpt2_oasst/dpo.py
# Memory: about 4.5 GiB in bfloat16 with checkpointing, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
# A row holds all answers to a prompt. Long rows take more memory than this; lower batch_size or raise grad_accum.
init_from = "out/gpt2_oasst/sft"
train_data = "data/oasst1/rankings_train.jsonl"
val_data = "data/oasst1/rankings_val.jsonl"
beta = 0.1
epochs = 1
batch_size = 32
grad_accum = 4
checkpointing = True
lr = 2e-6
warmup_steps = 20
out_dir = "out/gpt2_oasst/dpo"
