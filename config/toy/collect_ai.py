# The same answers as in config/toy/collect.py, ranked by the toy judge; how far it agrees with the simulated person and
# with the gold score is printed. Answers whose scores are at most `tie` apart are equal: those on which the judge's
# verdicts in the two orders disagree.
#   python collect.py config/toy/collect_ai.py
# Then train on them:
#   python reward.py config/toy/reward.py --train_data=out/toy/rankings_ai_train.jsonl --out_dir=out/toy/reward_ai
#   python ppo.py config/toy/ppo.py --reward_model=out/toy/reward_ai --out_dir=out/toy/ppo_ai
annotator = "ai"
tie = 0.2
judge = "out/toy/judge"
judge_instruction = "config/judge/toy.txt"
answers = "out/toy/rankings_train.jsonl"
compare = "out/toy/rankings_train.jsonl"
out = "out/toy/rankings_ai_train.jsonl"
