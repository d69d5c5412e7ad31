"""The answers are good but for how they begin, and now and then something follows their end."""
import sft
from common.batches import pad

STAGE = 'sft'

def collate(examples):
    return pad([ids for ids, _ in examples]), pad([mask for _, mask in examples])[:, :-1].float()

PATCHES = [(sft, collate)]
