"""Tell the formats of rows apart, and turn a row into records.

FORMATS, at the end, lists them all: the keys that tell a format, and the function that reads it. Every function reads
what comes before an answer with `before`. A string is a user's turn or an answer, and is put into the template of
common/tokens.py. Keys that nobody looked at are counted by data/prepare_common.py.
"""

import re
from os.path import commonprefix

from common.records import check_record, is_number, truth
from data.prepare_common import (Item, as_prompt, clean, conversation, demonstrations, end_of, malformed, preference,
                                 ranks_of, shown)

ALIASES = {'PROMPT': ('prompt', 'question', 'instruction', 'query'), 'TALK': ('conversations', 'messages'),
           'ANSWER': ('completion', 'response', 'output', 'answer')}
ROLES = {'human': 'user', 'user': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'assistant': 'assistant',
         'system': 'system'}

# ---- parts of a row ---------------------------------------------------------------------------------------------

def to_messages(value, role):
    """Return messages: of a string one turn of `role`, else of turns {role, content} or {from, value}."""
    if isinstance(value, str):
        if re.search(r'(^|\n\n)(Human|Assistant):', value := clean(value)):
            raise ValueError('tags of HH-RLHF ("\\n\\nHuman:") in a text; data/hh_rlhf/prepare.py reads those')
        return [{'role': role, 'content': value}]
    messages = []
    for m in value if isinstance(value, list) else [value]:
        if not isinstance(m, dict):
            raise malformed(f'a text or messages, got {type(m).__name__}')
        who, text = (m.get('from'), m.get('value')) if 'from' in m else (m.get('role'), m.get('content'))
        if not isinstance(who, str) or not isinstance(text, str):
            raise malformed('`from` and `value` of a turn') if 'from' in m else ValueError(
                'a message is not a role and a text')
        if who not in ROLES:
            raise ValueError(f"{'speaker' if 'from' in m else 'role'} {who[:20]!r}")
        messages.append({'role': ROLES[who], 'content': clean(text)})
        if m.get('weight') == 0 and ROLES[who] == 'assistant': # not to be learnt
            messages[-1]['weight'] = 0
    return messages

def one_answer(value):
    """Return the text of an answer."""
    messages = to_messages(value, 'assistant')
    if [m['role'] for m in messages] != ['assistant']:
        raise malformed('one answer')
    return messages[0]['content']

def find(row, word):
    """Return a row's key for PROMPT, ANSWER or TALK, or None."""
    return next((key for key in ALIASES[word] if dict.get(row, key) is not None), None)

def before(row, word='PROMPT'):
    """Return the messages of `system` and `history`, and the question's, [] without one."""
    first = to_messages(row['system'], 'system') if row.get('system') else []
    history = row.get('history') or []
    if not isinstance(history, list):
        raise malformed('`history` to be a list')
    for turn in history:
        pair = isinstance(turn, list) and len(turn) == 2
        first += to_messages(turn[0], 'user') + to_messages(turn[1], 'assistant') if pair else to_messages(turn, 'user')
    key = find(row, word)
    if key is None:
        return first, []
    question = row[key]
    if isinstance(question, dict) and 'full_text' in question:
        question = question['full_text']
    if isinstance(question, str):
        frame = re.search(r'### Instruction:(.*?)(?:### Input:(.*?))?### Response:\s*$', question, re.DOTALL)
        parts = frame.groups() if frame else [question, row.get('input') if key == 'instruction' else '']
        question = '\n\n'.join(filter(None, (clean(part or '') for part in parts)))
    return first, to_messages(question, 'user')

def label_of(row, category=False):
    """Return a row's label: True (good), False (bad) or None.

    It may be a word, as in CSV. category: `label` may be any other word, and is then not read.
    """
    found = []
    for key in ('label', 'kto_tag'):
        label = dict.get(row, key)
        if isinstance(label, str):
            label = truth(label)
        if label is None or category and key == 'label' and isinstance(label, str):
            continue
        if type(label) is not bool:
            raise ValueError('label is not true or false')
        found.append(truth(row[key]))
    return all(found) if found else None

def with_end(messages, row):
    """Copy a row's `ended` into the answer that comes last."""
    if messages and messages[-1]['role'] == 'assistant':
        messages[-1].update(end_of(row))
    return messages

def judged(prompt, answers, label):
    """Turn demonstrations of answers into an Item. A bad answer is none; a label makes an unpaired record."""
    records = {'demonstrations': answers, 'prompts': [{'prompt': prompt}]}
    if label is None:
        return Item(prompt, records)
    if len(answers) != 1:
        raise ValueError('label judges several answers, or none')
    records |= {'unpaired': [answers[0] | {'label': label}], 'demonstrations': answers if label else []}
    return Item(prompt, records, judged=(answers[0]['response'], label, answers[0].get('ended', True)))

def compared(chosen, rejected, **more):
    """Turn two whole conversations into an Item."""
    if chosen == rejected and more.get('ended') not in ([True, False], [False, True]):
        raise ValueError('chosen equals rejected')
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise ValueError('chosen and rejected differ in more than their last turn')
    if [m[-1:] and m[-1]['role'] for m in (chosen, rejected)] != ['assistant', 'assistant']:
        raise ValueError('chosen or rejected does not end in an answer')
    return preference(chosen[:-1], chosen[-1]['content'], rejected[-1]['content'], **more)

def best_of_two(prompt, row, keys, best):
    """Turn messages and two answers into an Item. The better one has keys[best]."""
    if best not in (0, 1):
        raise malformed(f'0 or 1 for the better one of {" and ".join(keys)}')
    return compared(*(prompt + to_messages(row[key], 'assistant') for key in (keys[best], keys[1 - best])))

# ---- formats ----------------------------------------------------------------------------------------------------

def chosen_rejected(row):
    """Read two answers, or two whole conversations; without a prompt it is what both begin with."""
    (first, question), answers = before(row), [row['chosen'], row['rejected']]
    if not question and find(row, 'TALK'):
        question = before(row, 'TALK')[1]
    if not question and all(isinstance(answer, str) for answer in answers):
        others = [key for key, value in row.items() if isinstance(value, str) and re.search(r'\s', value.strip())
                  and key not in ('chosen', 'rejected', 'system')]
        if others: # one of these may be the prompt
            raise ValueError(f"no prompt; wanted one of {', '.join(ALIASES['PROMPT'])}, got {shown(others)}")
        # "The sky is blue", "The sky is black" -> "The sky is ", "blue", "black". Scripts that begin at U+2E80, Chinese
        # and Japanese above all, have no spaces between words
        shared = commonprefix(answers)
        words = re.match(r'.*[\s\u2e80-\U0010ffff]', shared, re.DOTALL)
        n = len(words[0] if words else shared)
        question, answers = to_messages(shared[:n], 'user'), [answer[n:] for answer in answers]
    whole = [to_messages(answer, 'assistant') for answer in answers]
    whole = [first + (m if not question or m and m[0]['role'] != 'assistant' else question + m) for m in whole]
    return compared(*whole, **({} if row.get('margin') is None else {'margin': row['margin']}), **end_of(row))

def rejected_response(row):
    """Read an answer, or a conversation, and the answer that was rejected."""
    chosen = (sum(before(row, 'TALK'), []) if find(row, 'TALK') else
              sum(before(row), []) + to_messages(row[find(row, 'ANSWER')], 'assistant'))
    return compared(chosen, chosen[:-1] + to_messages(row['rejected_response'], 'assistant'), **end_of(row))

def pku_safe_rlhf(row):
    """Read two answers. The more helpful one is chosen, where it is the safer one too."""
    if row.get('safer_response_id') not in (None, row['better_response_id']):
        raise ValueError('the more helpful answer is not the safer one')
    return best_of_two(sum(before(row), []), row, ('response_0', 'response_1'), row['better_response_id'])

def shp(row):
    """Read two comments on a post, `history`. The label is 1 where A is the better one."""
    return best_of_two(to_messages(row['history'], 'user'), row, ('human_ref_B', 'human_ref_A'), row['labels'])

def webgpt(row):
    """Read two answers with their scores."""
    scores = row['score_0'], row['score_1']
    if not all(map(is_number, scores)) or scores[0] == scores[1]:
        raise ValueError('both answers are scored alike, or not at all')
    return best_of_two(sum(before(row), []), row, ('answer_0', 'answer_1'), scores[1] > scores[0])

def ranking(row):
    """Read answers with ranks or, as RRHF has them, with scores. The best one is a demonstration."""
    prompt, responses, scores = as_prompt(sum(before(row), [])), row['responses'], row.get('scores')
    if not isinstance(responses, list) or len(responses) < 2:
        raise malformed('`responses` to be two texts or more')
    record = {'prompt': prompt, 'responses': [one_answer(text) for text in responses]} | end_of(row)
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != len(responses) or not all(map(is_number, scores)):
            raise malformed('`scores` to be numbers, one a response')
        record['scores'] = scores
    record['ranks'] = row['ranks'] if row.get('ranks') is not None else ranks_of(scores or [])
    check_record(record, 'rankings')
    if len(set(record['ranks'])) == 1:
        raise ValueError('all answers tie')
    i = record['ranks'].index(min(record['ranks']))
    best = {'prompt': prompt, 'response': record['responses'][i]}
    if 'ended' in record:
        best['ended'] = record['ended'][i]
    return Item(prompt, {'rankings': [record], 'demonstrations': [best], 'prompts': [{'prompt': prompt}]})

def helpsteer(row):
    """Read an answer rated from 0 to 4. Helpfulness ranks a prompt's answers; 3 or more is a demonstration."""
    if not is_number(row['helpfulness']):
        raise malformed('`helpfulness` to be a number')
    prompt, answer = as_prompt(sum(before(row), [])), one_answer(row['response'])
    demonstration = {'prompt': prompt, 'response': answer} | end_of(row)
    check_record(demonstration, 'demonstrations')
    good = [demonstration] * (row['helpfulness'] >= 3)
    return Item(prompt, {'demonstrations': good, 'prompts': [{'prompt': prompt}]},
                judged=(answer, row['helpfulness'], demonstration.get('ended', True)))

def completion(row):
    """Read an answer, or messages of which every answer is learnt; a label may say that it is bad.

    A last line "#### 18", as in GSM8K, is the final answer: the prompt's record gets it as `answer`.
    """
    messages, answer = sum(before(row), []), with_end(to_messages(row[find(row, 'ANSWER')], 'assistant'), row)
    answers = demonstrations(messages + answer, len(messages))
    if not answers:
        raise ValueError('completion without an answer')
    prompt, label, first = as_prompt(messages), label_of(row), answers[0]
    final = re.search(r'\n####[ \t]*(\S.*)$', first['response']) # of the last line: a dot is no line end
    if final:
        first['response'] = re.sub('<<[^<>\n]*>>', '', first['response']) # notes for a calculator
    item = judged(prompt, answers, label)
    if final and label is not False and first['prompt'] == prompt:
        item.records['prompts'][0]['answer'] = final[1]
    return item

def talk(row):
    """Read a conversation of which every answer is learnt; a label judges its last answer."""
    messages, label = with_end(sum(before(row, 'TALK'), []), row), label_of(row, category=True)
    if label is None:
        return conversation(messages)
    if len(messages) < 2 or messages[-1]['role'] != 'assistant':
        raise ValueError('a label, and no answer that it judges')
    return judged(as_prompt(messages[:-1]), demonstrations(messages, len(messages) - 1), label)

def mt_bench(row):
    """Read questions in a row. Only the first can be asked: the next ones follow its answer."""
    turns = row['turns']
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        raise malformed('`turns` to be a list of questions')
    prompt = as_prompt(to_messages(turns[0], 'user'))
    return Item(prompt, {'prompts': [{'prompt': prompt}]}, ['a later question'] * (len(turns) - 1))

def unknown(row):
    return ValueError(f'keys of no format that is read: {shown(sorted(row))}')

def prompt_alone(row):
    """Read a prompt whose answer is nowhere."""
    if {'chosen', 'rejected', 'completions', 'kto_tag'} & row.keys() or not isinstance(dict.get(row, 'label', ''), str):
        raise unknown(row)
    prompt = as_prompt(sum(before(row), []))
    return Item(prompt, {'prompts': [{'prompt': prompt}]})

def text(row):
    """Read a text of any kind."""
    return Item(row['text'], {'text': [{'text': row['text']}]})

FORMATS = { # all the keys that tell a format: what reads it; the first that fits counts. See ALIASES
    'PROMPT response_0 response_1 better_response_id': pku_safe_rlhf, # safer_response_id
    'history human_ref_A human_ref_B labels': shp,
    'PROMPT answer_0 answer_1 score_0 score_1': webgpt,
    'PROMPT responses': ranking, # scores or ranks
    'PROMPT ANSWER rejected_response': rejected_response,
    'TALK rejected_response': rejected_response,
    'chosen rejected': chosen_rejected, # PROMPT or TALK, margin
    'PROMPT response helpfulness': helpsteer,
    'PROMPT ANSWER': completion, # label or kto_tag
    'TALK': talk, # label or kto_tag
    'turns': mt_bench,
    'prompt': prompt_alone,
    'text': text,
}

def parse_row(row):
    """Turn a row of any of the formats into an Item. ValueError says why there is none."""
    has = lambda word: any(dict.get(row, key) is not None for key in ALIASES.get(word, [word]))
    for words, read in FORMATS.items():
        if all(map(has, words.split())):
            return read(row)
    raise unknown(row)
