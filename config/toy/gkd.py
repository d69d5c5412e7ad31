# The student of config/toy/distill.py goes on with answers of its own: at each of their tokens it learns its teacher's
# distribution, by the reverse KL. Of train_data only the prompts are read, so a file of prompts does too.
#   python sft.py config/toy/gkd.py
init_from = "out/toy/distill"
teacher = "out/toy/rejection"
on_policy = 1.0
divergence = "reverse"
max_new_tokens = 32
train_data = "out/toy/best_of_n.jsonl"
max_steps = 200
batch_size = 32
lr = 1e-3
eval_every = 0
out_dir = "out/toy/gkd"
