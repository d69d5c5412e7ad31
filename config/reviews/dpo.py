# Reviews: DPO on the policy's own answers, ranked by the reward model.
#   python dpo.py config/reviews/dpo.py
# On what people wrote, without a reward model; an epoch of these is as long as four:
#   python dpo.py config/reviews/dpo.py --train_data=data/reviews/comparisons_train.jsonl --epochs=1 \
#       --out_dir=out/reviews/dpo_people
init_from = "out/reviews/sft"
train_data = "out/reviews/rankings_train.jsonl"
val_data = "data/reviews/comparisons_val.jsonl"
beta = 0.2
epochs = 3
lr = 3e-4
lr_schedule = "linear"
batch_size = 32
eval_every = 0
out_dir = "out/reviews/dpo"
