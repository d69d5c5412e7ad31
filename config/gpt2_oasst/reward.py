# GPT-2 124M on OASST1's English trees, 2 of 3: the reward model, from rankings of several answers.
#   python reward.py config/gpt2_oasst/reward.py
# Memory: about 2.4 GiB in bfloat16 with checkpointing, for micro-batches of 8 rows of 1024 tokens, as worked out by
#   python bench.py --workload=memory --dtype=bfloat16 --batch_size=8
# Not run yet: neither its time nor its scores are known.
# A row holds all answers to a prompt. Long rows take more memory than this; lower batch_size or raise grad_accum.
init_from = "out/gpt2_oasst/sft"
train_data = "data/oasst1/rankings_train.jsonl"
val_data = "data/oasst1/rankings_val.jsonl"
epochs = 1
batch_size = 32
grad_accum = 4
checkpointing = True
lr = 1e-5
warmup_steps = 20
out_dir = "out/gpt2_oasst/reward"
