"""Prepare OASST1, OpenAssistant's human conversation trees with ranked answers.

    python data/oasst1/prepare.py                                                  # English, from the hub
    python data/oasst1/prepare.py --lang=zh,ja --out_dir=data/oasst1_zh            # other languages
    python data/oasst1/prepare.py --source=en_100_tree.jsonl                       # one file

Köpf et al. 2023, https://arxiv.org/abs/2304.07327, Apache-2.0. A tree begins with a user's message. Every message may
have several replies, and people ranked the assistant's replies to one message (rank 0 is the best). A file holds trees,
{"tree_state", "prompt": {"text", "role", "lang", "replies": […]}}, or messages, which are joined by `message_id` and
`parent_id` or hold their replies.

Every answer that is the best of its siblings, on a path of such answers, becomes a demonstration. The ranked answers to
a message become a ranking, and every user's message a prompt, with all that was said before it. A message that was
deleted, failed its review or is in another language is cut off with its replies. So is an unranked answer beside
others. A tree is in one split, with all trees of the same beginning. docs/data.md shows the expected output.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root

from common.options import fail, launch
from data.prepare_common import Item, PrepareOptions, as_prompt, clean, find_files, prepare

KNOWN = {'2023-04-12_oasst_ready.trees.jsonl.gz': 10364, '2023-04-12_oasst_ready.messages.jsonl.gz': 88838,
         '2023-04-12_oasst_all.trees.jsonl.gz': 66497, '2023-04-12_oasst_all.messages.jsonl.gz': 161443}

@dataclass
class Config(PrepareOptions):
    repo: str = 'OpenAssistant/oasst1' # the data set on the hub, and its file
    file: str = '2023-04-12_oasst_ready.trees.jsonl.gz'
    lang: str = 'en' # languages to keep, by code, separated by commas; empty = all
    out_dir: str = 'data/oasst1' # where the records go

def with_replies(message):
    """Return a message and all below it; what is no message is passed over."""
    found = [message]
    for message in found: # grows as it is walked
        replies = message.get('replies')
        found += [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
    return found

def trees(rows):
    """Turn (place, row), … into (place, tree), ….

    Single messages are joined by `parent_id`. A message may hold its replies already.
    """
    messages = {} # message_id -> (place, message)
    for place, row in rows:
        if row is None or 'prompt' in row or not isinstance(row.get('message_id'), str):
            whole = row is None or 'prompt' in row or not isinstance(row.get('replies'), list)
            yield place, row if whole else {'tree_state': row.get('tree_state'), 'prompt': row}
        elif row['message_id'] in messages:
            yield place, {'left out': 'message_id that another message has'}
        else:
            messages[row['message_id']] = place, row
            row['replies'] = row['replies'] if isinstance(row.get('replies'), list) else []
    held = {str(reply.get('message_id')) for _, row in messages.values() for reply in with_replies(row)[1:]}
    for name in held & messages.keys():
        yield messages.pop(name)[0], {'left out': 'message_id that another message has'}
    for _, message in messages.values():
        if str(message.get('parent_id')) in messages:
            messages[str(message['parent_id'])][1]['replies'].append(message)
    lost = dict(messages)
    for place, message in messages.values():
        if message.get('parent_id') is None:
            yield place, {'tree_state': message.get('tree_state'), 'prompt': message}
            for reply in with_replies(message):
                lost.pop(str(reply.get('message_id')), None)
    for place, message in lost.values(): # parse_tree says which message is no tree
        yield place, {'left out': 'reply in no tree'} if str(message['parent_id']) in messages else message

def flaw(message, role, langs):
    """Say why a message cannot have this role; '' if it can."""
    if not (isinstance(message, dict) and isinstance(message.get('replies') or [], list)
            and isinstance(message.get('text'), str) and message.get('role') in ('prompter', 'assistant')):
        return 'malformed message'
    flaws = {'deleted message': message.get('deleted'),
             'message that failed its review': message.get('review_result') is False,
             'message in another language': langs and message.get('lang') not in langs,
             'roles that do not alternate': message['role'] != role, 'empty message': not message['text'].strip()}
    return next((reason for reason, holds in flaws.items() if holds), '')

def parse_tree(tree, langs):
    """Turn a tree into demonstrations, rankings and prompts. ValueError says why there are none."""
    if 'prompt' not in tree:
        raise ValueError(tree.get('left out', 'no tree, and no message whose parent is there'))
    if (tree.get('tree_state') or 'ready_for_export') != 'ready_for_export':
        raise ValueError(f"tree is {str(tree['tree_state'])[:40]}, not ready_for_export")
    if reason := flaw(tree['prompt'], 'prompter', langs):
        raise ValueError(f'begins with: {reason}')
    demonstrations, rankings, prompts, cut = [], [], [], []

    def replies(message, role):
        flaws = [(reply, flaw(reply, role, langs)) for reply in message.get('replies') or []]
        cut.extend(reason for _, reason in flaws if reason)
        return [reply for reply, reason in flaws if not reason]

    todo = [(tree['prompt'], [], True)] # a user's message, what was said before it, and was every answer there the best
    while todo:
        user, before, on_best_path = todo.pop()
        messages = before + [{'role': 'user', 'content': clean(user['text'])}]
        prompt = as_prompt(messages)
        prompts.append({'prompt': prompt})
        answers = replies(user, 'assistant')
        if len(answers) > 1:
            ranked = sorted((a for a in answers if type(a.get('rank')) is int), key=lambda a: a['rank'])
            cut += ['unranked answer beside others'] * (len(answers) - len(ranked))
            answers = ranked # the best first
        ranks = sorted({a['rank'] for a in answers if len(answers) > 1}) # numbered anew: some may have gone
        if len(ranks) > 1: # all tied, they order nothing
            rankings.append({'prompt': prompt, 'responses': [clean(a['text']) for a in answers],
                             'ranks': [ranks.index(a['rank']) for a in answers]})
        if answers and on_best_path:
            demonstrations.append({'prompt': prompt, 'response': clean(answers[0]['text'])})
        for answer in reversed(answers): # the next to be worked on is the last in the list
            said = messages + [{'role': 'assistant', 'content': clean(answer['text'])}]
            best = on_best_path and answer is answers[0]
            todo += [(reply, said, best) for reply in reversed(replies(answer, 'prompter'))]
    return Item(prompts[0]['prompt'], {'demonstrations': demonstrations, 'rankings': rankings, 'prompts': prompts}, cut)

def main(cfg):
    if cfg.source and len(files := sum(find_files(cfg.source, '', ()), [])) > 1:
        fail(f'--source={cfg.source}: wanted one file (those of OASST1 repeat one another), found {len(files)}')
    langs = list(filter(None, cfg.lang.split(',')))
    splits = prepare(cfg, lambda tree: parse_tree(tree, langs), cfg.repo, [cfg.file], unit='trees', known=KNOWN,
                     join=trees)
    for name, records in splits.items():
        ranks = [r['ranks'] for r in records['rankings']]
        pairs = sum(a < b for r in ranks for a in r for b in r)
        print(f'{name:5s}   {sum(map(len, ranks))} answers in {len(ranks)} rankings make {pairs} pairs')

if __name__ == '__main__':
    launch(main, Config)
