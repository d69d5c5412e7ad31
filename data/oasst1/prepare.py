"""
Human conversation trees: OpenAssistant's OASST1 (Köpf et al. 2023, https://arxiv.org/abs/2304.07327, Apache-2.0).

A tree begins with a user's message; every message may have several replies, and people ranked the assistant's replies
to one message (rank 0 is the best). Read are the files of trees, one a line, {"tree_state", "prompt": {"text", "role",
"lang", "replies": […]}}, and the flat ones, one message a line with `message_id` and `parent_id`.

    $ python data/oasst1/prepare.py                                                  # English, from the hub
    $ python data/oasst1/prepare.py --lang=zh,ja --out_dir=data/oasst1_zh            # another language, or several
    $ python data/oasst1/prepare.py --source=oasst-en-100-trees.jsonl

writes, each as _train.jsonl and _val.jsonl,

    demonstrations   every answer that is the best of its siblings and stands on a path of such answers, once, behind
                     all that was said before it; users' different replies to a best answer all lead on
    rankings         the ranked answers to one message, wherever it stands: K of them make K(K-1)/2 pairs
    prompts          every user's message, behind all that was said before it

A message that was deleted, failed its review or is in another language is cut off with all its replies, and so is an
unranked answer beside others, which leaves no best one where none is ranked. Trees that are not ready_for_export are
left out, as are those whose first message is cut off. A tree stands in one split, with all trees of the same beginning.

The counts one should see for oasst-en-100-trees.jsonl:

    cut 4 unranked answers beside others; kept 100 of 100 trees
    split   demonstrations   rankings   prompts   user turns in demonstrations (mean, max)
    train              139        202       452   1.32, 2
    val                  6          9        22   1.33, 2
    train   613 answers in 202 rankings make 727 pairs; val   26 answers in 9 rankings make 26 pairs

For 2023-04-12_oasst_ready.trees.jsonl.gz, the file fetched by default, the data card says 10,364 trees with 88,838
messages in 35 languages, 71,956 of all 161,443 messages in English.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository's root, where common.py and tokens.py are

from common import fail, launch
from data.prepare_common import (Counts, Item, as_prompt, check_options, clean, find_files, read, rows_of,
                                 write_splits)

KNOWN = {'2023-04-12_oasst_ready.trees.jsonl.gz': 10364, '2023-04-12_oasst_ready.messages.jsonl.gz': 88838,
         '2023-04-12_oasst_all.trees.jsonl.gz': 66497, '2023-04-12_oasst_all.messages.jsonl.gz': 161443}


@dataclass
class Config:
    source: str = '' # a .jsonl or .jsonl.gz file of trees or of messages; empty = from the hub
    repo: str = 'OpenAssistant/oasst1' # the data set on the hub, and its file
    file: str = '2023-04-12_oasst_ready.trees.jsonl.gz'
    lang: str = 'en' # languages to keep, by code, separated by commas; empty = all
    out_dir: str = 'data/oasst1' # where the records go
    val_fraction: float = 0.05 # share of the trees that makes val
    seed: int = 1337 # which trees these are

    def __post_init__(self):
        check_options(self)


def trees(rows):
    """(place, row), … -> (place, tree), …: trees as they are, single messages joined to theirs by `parent_id`."""
    messages = {}
    for place, row in rows:
        if 'prompt' not in row and isinstance(row.get('message_id'), str):
            if row['message_id'] in messages:
                yield place, {'left out': 'message_id that another message has'}
                continue
            messages[row['message_id']] = place, row | {'replies': []}
        else:
            yield place, row
    for place, message in messages.values():
        parent = message.get('parent_id')
        if parent is None:
            continue
        if isinstance(parent, str) and parent in messages:
            messages[parent][1]['replies'].append(message)
        else:
            yield place, message # no tree: parse_tree says so
    reached = [message for _, message in messages.values() if message.get('parent_id') is None]
    for message in reached: # grows as it is walked
        reached += message['replies']
    reached = {message['message_id'] for message in reached}
    for place, message in messages.values():
        if message.get('parent_id') is None:
            yield place, {'tree_state': message.get('tree_state'), 'prompt': message}
        elif str(message['parent_id']) in messages and message['message_id'] not in reached:
            yield place, {'left out': 'reply in no tree'}


def flaw(message, role, langs):
    """Why a message cannot be used as one of this role; '' if it can."""
    if not isinstance(message, dict) or not isinstance(message.get('replies') or [], list):
        return 'malformed message'
    if not isinstance(message.get('text'), str) or message.get('role') not in ('prompter', 'assistant'):
        return 'malformed message'
    if message.get('deleted'):
        return 'deleted message'
    if message.get('review_result') is False:
        return 'message that failed its review'
    if langs and message.get('lang') not in langs:
        return 'message in another language'
    if message['role'] != role:
        return 'roles that do not alternate'
    return '' if message['text'].strip() else 'empty message'


def parse_tree(tree, langs):
    """A tree -> its demonstrations, rankings and prompts; ValueError says why there are none."""
    if 'prompt' not in tree:
        raise ValueError(tree.get('left out', 'no tree, and no message whose parent is there'))
    if (tree.get('tree_state') or 'ready_for_export') != 'ready_for_export':
        raise ValueError(f"tree is {str(tree['tree_state'])[:40]}, not ready_for_export")
    if reason := flaw(tree['prompt'], 'prompter', langs):
        raise ValueError(f'begins with: {reason}')
    demonstrations, rankings, prompts, cut = [], [], [], []

    def replies(message, role):
        reasons = [flaw(reply, role, langs) for reply in message.get('replies') or []]
        cut.extend(filter(None, reasons))
        return [reply for reply, reason in zip(message.get('replies') or [], reasons) if not reason]

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
        if len(answers) > 1:
            ranks = sorted({a['rank'] for a in answers}) # numbered anew: some ranks may have gone with their answers
            if len(ranks) > 1: # all tied, they order nothing
                rankings.append({'prompt': prompt, 'responses': [clean(a['text']) for a in answers],
                                 'ranks': [ranks.index(a['rank']) for a in answers]})
        if answers and on_best_path:
            demonstrations.append({'prompt': prompt, 'response': clean(answers[0]['text'])})
        branches = []
        for answer in answers:
            said = messages + [{'role': 'assistant', 'content': clean(answer['text'])}]
            branches += [(reply, said, on_best_path and answer is answers[0]) for reply in replies(answer, 'prompter')]
        todo += reversed(branches) # the next to be worked on is the last in the list
    return Item(prompts[0]['prompt'], {'demonstrations': demonstrations, 'rankings': rankings, 'prompts': prompts}, cut)


def main(cfg):
    files, _ = find_files(cfg.source, cfg.repo, [cfg.file])
    if len(files) > 1:
        fail(f'--source={cfg.source}: wanted one file (those of OASST1 repeat one another), found {len(files)}')
    langs, counts = list(filter(None, cfg.lang.split(','))), Counts()
    items = read(trees(rows_of(files, counts)), lambda tree: parse_tree(tree, langs), counts)
    splits = write_splits(items, [], cfg, counts, unit='trees', known=KNOWN)
    for name, records in splits.items():
        ranks = [r['ranks'] for r in records['rankings']]
        pairs = sum(a < b for r in ranks for a in r for b in r)
        print(f'{name:5s}   {sum(map(len, ranks))} answers in {len(ranks)} rankings make {pairs} pairs')


if __name__ == '__main__':
    launch(main, Config)
