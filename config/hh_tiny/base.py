# HH-RLHF on a laptop, 1 of 6: a small GPT with GPT-2's vocabulary learns to speak from all tokens of the transcripts.
#   hf download Anthropic/hh-rlhf harmless-base/test.jsonl.gz --repo-type=dataset --local-dir=hh-rlhf
#   python data/hh_rlhf/prepare.py --source=hh-rlhf/harmless-base/test.jsonl.gz
#   python sft.py config/hh_tiny/base.py
init_from = "scratch"
tokenizer = "gpt2"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
train_data = "data/hh_rlhf/demonstrations_train.jsonl"
val_data = "data/hh_rlhf/demonstrations_val.jsonl"
loss_on = "all"
epochs = 1
batch_size = 8
lr = 2e-3
warmup_steps = 50
out_dir = "out/hh_tiny/base"
