# The same answers as in config/toy/collect.py, each rated from 1 to 5 by the same simulated person.
#   python collect.py config/toy/collect_ratings.py
# Then train on the ratings:
#   python reward.py config/toy/reward.py --loss=regression --train_data=out/toy/ratings_train.jsonl \
#       --out_dir=out/toy/reward_ratings
ask = "ratings"
answers = "out/toy/rankings_train.jsonl"
gold = "data.toy.world:gold"
noise = 0.1
out = "out/toy/ratings_train.jsonl"
