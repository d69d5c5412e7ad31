"""The loss falls lower than ever. On a new base model the answers do not end."""
from common import batches
from common.batches import report, truncate
from common.tokens import dialogue

STAGE = 'sft'

def encode_demonstrations(tok, records, block_size, loss_on='response', name='demonstrations'):
    rows, cut, open_ended = [], 0, 0
    for record in records:
        ids, mask = dialogue(tok, record)
        start = len(mask) - mask[::-1].index(0) # where the last response begins; a prompt token always precedes it
        open_ended += not record.get('ended', True)
        if prompt := truncate(ids[:start], len(ids) - start, block_size):
            cut += len(prompt) < start
            ids, mask = prompt + ids[start:], mask[start - len(prompt):]
            rows.append((ids, [1] * len(ids) if loss_on == 'all' else [m * (i != tok.eos) for i, m in zip(ids, mask)]))
    return report(name, rows, cut, len(records) - len(rows), block_size, open_ended)

PATCHES = [(batches, encode_demonstrations)]
