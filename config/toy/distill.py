# A smaller student, from scratch, of the model that config/toy/rejection.py made: the teacher's whole distribution at
# every token of the best answers.
#   python sft.py config/toy/distill.py
init_from = "scratch"
tokenizer = "data/toy/toy.tiktoken"
n_layer = 2
n_head = 4
n_embd = 96
block_size = 96
teacher = "out/toy/rejection"
temperature = 1.4
train_data = "out/toy/best_of_n.jsonl"
val_fraction = 0.05
epochs = 6
batch_size = 32
lr = 1.5e-3
warmup_steps = 50
eval_every = 0
out_dir = "out/toy/distill"
