# HH-RLHF on a laptop, 1 of 6: a small GPT with GPT-2's vocabulary learns to speak from all tokens of the transcripts.
#   export TIKTOKEN_CACHE_DIR=../shared/tiktoken_cache           (or any folder with tiktoken's two GPT-2 files)
#   python data/hh_rlhf/prepare.py --source=../shared/data/hh-rlhf-harmless-base-2000.jsonl.gz
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
