"""Tell what the stages of demo.py are for, and what each of them changed.

Lines are at most WIDTH columns wide. Numbers come from log.jsonl, results.json and samples.jsonl. Answers to the first
test prompts are the greedy ones of the checkpoints.
"""

import json
import os
import re
import sys
import textwrap
from collections import Counter
from itertools import islice

from common.checkpoints import load_policy, read_log, read_options
from common.records import read_lines
from common.tokens import load_tokenizer, prompt_ids
from data import checker
from data.reviews import gold as reviews
from data.toy import world as toy
from feedback.annotators import visible
from lab.tables import align

import torch

WIDTH = 100
FIRST = 24 # so many test prompts are tried for one whose answer a stage has changed
GOLD = dict(toy=toy.gold, sums=checker.exact_match, reviews=reviews.gold) # {world: (record, answer) -> how good it is}
OPEN = dict(darwin='open', win32='start') # {sys.platform: what opens a page}, else xdg-open
PARTS = "0.8 for right content, 0.1 for courtesy, 0.1 for brevity" # of the gold score
READ = ("Sampled: drawn at temperature 1, as PPO does while it trains. 0.9 = right and brief; courtesy, such as Sure! "
        "or Sorry, adds the last 0.1. Broken text scores 0.") # how to read the answers
BY_REWARD = 'ppo', 'reinforce', 'rloo', 'grpo' # methods that learn from the reward model
FALL = 0.2 # of a share: two standard errors, where a category has some 50 prompts
FOR = dict( # {world: {stage: what it is for}}
    toy={
        'data': "A small world is written: facts, things nobody can know, harmful requests; good and bad answers.",
        'pretrain': "A tiny GPT learns to write, from a corpus full of wrong and rude answers: the base model. Greedy "
                    "answers, which take the likeliest token each time, show what it learns.",
        'sft': "The base model learns from a few hundred demonstrations how to answer: the SFT model.",
        'collect train': "The SFT model samples four answers to each prompt, and a simulated person ranks them, with "
                         "some errors, by the gold score: " + PARTS + ".",
        'collect test': "The same as collect train, on held-out prompts: to measure with.",
        'collect round': "The last policy answers the prompts, and its answers are ranked: new feedback.",
        'collect best': "The SFT model samples four answers to each prompt, and the reward model picks the best.",
        'reward': "A reward model learns from the rankings to give any answer a score.",
        'ppo': "PPO: the SFT model goes on as the policy. It writes answers; those that the reward model scores high "
               "become likelier, but drifting away from SFT costs reward.",
        'dpo': "DPO: learns from the rankings themselves, without a reward model. Better answers become likelier and "
               "worse ones less likely, compared with the SFT model.",
        'reinforce': "REINFORCE: PPO's goal without a critic. An answer becomes likelier if it scores above the "
                     "running mean of all scores.",
        'rloo': "RLOO: PPO's goal without a critic. An answer becomes likelier if it scores above the mean of the "
                "other answers to the same prompt.",
        'grpo': "GRPO: no critic. An answer becomes likelier if it scores above the mean of its group, the answers to "
                "one prompt; the group's spread is the unit.",
        'rrhf': "RRHF: learns the best answer, and pushes down worse ones that are likelier than better ones.",
        'ipo': "IPO: DPO with a square loss. The margin between better and worse has a target.",
        'hinge': "Hinge: DPO that leaves a pair alone once its margin is large enough.",
        'simpo': "SimPO: DPO without a reference; the mean log-probability of an answer's tokens is its reward.",
        'orpo': "ORPO: cross-entropy on the better answer, and its odds against the worse one; no reference.",
        'kto': "KTO: no pairs; each answer is called good or bad by itself.",
        'rejection': "Rejection sampling: the SFT model is fine-tuned on the best answers that were picked.",
        'distill': "Distillation: a smaller student learns the teacher's probabilities at every token.",
        'verdicts': "Pairs of answers are written down with a verdict: what an AI judge learns from.",
        'judge': "A model learns to say which of two answers is better: the AI judge.",
        'evaluate': "All models answer prompts that nothing was trained on; the gold score judges them."},
    sums={
        'data': "A world of sums is written. Most writers are hasty and never carry, some are careful. On a scratch "
                "line they note the carry and the digit of each column, from the right: 345+278 is 13 12 06, and then "
                "the answer, #### 0623.",
        'pretrain': "A tiny GPT learns to add and subtract from both kinds of writers: the base model. Greedy "
                    "answers, which take the likeliest token each time, show what it learns.",
        'sft': "It learns from a few more answers, a quarter of them by careful writers: the SFT model.",
        'grpo': "GRPO: a checker gives 1 for the right number and 0 for any other. Of several answers to a problem, "
                "those above the mean become likelier.",
        'rloo': "RLOO: a checker gives 1 for the right number and 0 for any other. An answer becomes likelier if it "
                "scores above the mean of the other answers to the problem.",
        'ppo': "PPO: a checker gives 1 for the right number and 0 for any other. A critic predicts how often that will "
               "be; better answers become likelier.",
        'evaluate': "All models solve problems that nothing was trained on.",
        'others': "All models solve problems with 2, 4, 5 and 6 digits, where only 3 were practised."},
    reviews={
        'data': "Short remarks on products are read. Whoever wrote one put it under Pros or under Cons. They are split "
                "in parts, so that policy, reward model and gold classifier never share such a label.",
        'sft': "A small GPT learns, without labels, to go on with what people began to say: the policy before "
               "training.",
        'fluency': "Another GPT learns the same from other people's remarks. It will say how usual answers read.",
        'reward': "A reward model learns from pairs of remarks that begin with the same word or two: the Pro scores "
                  "above the Con.",
        'collect train': "The SFT model goes on in four ways with each beginning, and the reward model ranks them.",
        'ppo': "PPO: remarks that the reward model scores high become likelier, but drifting away from SFT costs "
               "reward.",
        'dpo': "DPO: better ones of the ranked answers become likelier and worse ones less likely, compared with the "
               "SFT model.",
        'rrhf': "RRHF: the same rankings; the model itself is to find better answers likelier.",
        'dpo_people': "DPO on people's own pairs, without a reward model: Pros become likelier, Cons less likely.",
        'evaluate': "All models go on with the beginnings of remarks that nothing was trained on. A naive Bayes "
                    "classifier of other people's labels judges them: the gold score."})
LOOK_AT = { # {script: (key of log.jsonl, what it is); the first that was logged counts}
    'sft.py': [('val_loss', 'held-out loss per token (lower is better)')],
    'reward.py': [('val_accuracy', "share of held-out pairs in the person's order")],
    'ppo.py': [('gold', "gold score (which it never sees) of its sampled answers on training prompts, while it "
                        "trains"),
               ('reward', 'reward of its sampled answers')],
    'dpo.py': [('val_accuracy', "share of held-out pairs in the person's order")],
    'kto.py': [('val_margin', 'margin of good answers over bad ones, held out')]}
LOOK_AT |= {'reinforce.py': LOOK_AT['ppo.py'], 'rrhf.py': LOOK_AT['dpo.py']}
MADE = ('text', 'practice_scratch', 'demonstrations', 'demonstrations_scratch', 'prompts') # by the stage data

def before(name, world):
    """Name a stage and what it is for, '' of an unknown one."""
    kind = re.sub(r' ?\d.*|_direct$', '', name) # ppo2_ai is one more ppo
    if kind.startswith('collect ') and kind not in FOR[world]:
        kind = 'collect round'
    direct = f"The same as {kind}, without the scratch line: the answer is the number alone."
    what = direct if name.endswith('_direct') else FOR[world].get(kind, '')
    return fill(f"[{name}] {what}") if what else ''

def quoted(text, at_most=60):
    """Return a text in quotes, in one line, cut if longer."""
    text = visible(text).strip().replace('\n', r'\n')
    short = text[:at_most - 4].rstrip(' \\') + ' […]' # no half \n
    return f'"{text if len(text) <= at_most else short}"'

def asked(row):
    """Quote a record's prompt. Its right answer, if it has one, follows."""
    return quoted(row['prompt'], WIDTH - 20) + (f" (right: {row['answer']})" if 'answer' in row else '')

def fill(text, indent=''):
    """Break a text into lines; indent: of all but the first."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)

def first_prompts(world):
    """Return the first FIRST test prompts, as records. Dialogues are left out."""
    path = f'data/{world}/prompts_test.jsonl'
    rows = (json.loads(line) for _, line in read_lines(path)) if os.path.exists(path) else ()
    return list(islice((row for row in rows if isinstance(row['prompt'], str)), FIRST))

@torch.no_grad()
def answers(folder, rows):
    """Return a policy's greedy answers to prompt records. Without a policy [] is returned."""
    if not rows or not os.path.exists(f'{folder}/config.json'):
        return []
    torch.set_num_threads(1) # other stages are at work
    tok, model = load_tokenizer(folder, 'policy'), load_policy(folder).eval()
    room = model.config.block_size // 2
    ids = [prompt_ids(tok, row['prompt'])[-room:] for row in rows]
    return [tok.decode(answer).strip() for answer in model.generate(ids, min(32, room), 0.0, eos=tok.eos)]

def number(folder, script):
    """Return the number to look at in a folder's log, or ''. The first and the last value are shown."""
    log = read_log(f'{folder}/log.jsonl')
    for key, what in LOOK_AT.get(script, []):
        values = [line[key] for line in log if key in line]
        if values:
            return f"{what}: " + ' → '.join(dict.fromkeys(f'{value:.2f}' for value in (values[0], values[-1])))
    return ''

def most_changed(rows, old, new, gold):
    """Return the index at which answers differ most in gold score.

    Of equally large differences the first counts; other words with the same score are a small one. Where the lists are
    equal None is returned.
    """
    far = [abs(gold(row, now) - gold(row, was)) if was != now else -1 for row, was, now in zip(rows, old, new)]
    return max(range(len(far)), key=far.__getitem__) if max(far, default=-1) >= 0 else None

def change(folder, world):
    """Show the test prompt whose greedy answer a stage has changed most. Without answers '' is returned."""
    options, rows = read_options(folder).get('options', {}), first_prompts(world)
    old, new = answers(options.get('policy') or options.get('init_from'), rows), answers(folder, rows)
    at = most_changed(rows, old, new, GOLD[world])
    if at is not None:
        return f"Greedy answer to {asked(rows[at])}: before {quoted(old[at])}, now {quoted(new[at])}"
    if not new:
        return ''
    same = f" (its greedy answers to the first {len(new)} test prompts are all the same as before)" if old else ''
    return f"Greedy answer to {asked(rows[0])}: {quoted(new[0])}{same}"

def ranked(path):
    """Count the prompts of a file of rankings. The best and the worst answer of one are shown."""
    rows = [line for _, line in read_lines(path)]
    for row in map(json.loads, rows):
        if len(set(row.get('ranks', []))) > 1 and isinstance(row['prompt'], str):
            best, worst = (row['responses'][row['ranks'].index(f(row['ranks']))] for f in (min, max))
            return (f"{len(rows)} prompts ranked. Sampled answers to {asked(row)}: best {quoted(best)}, worst "
                    + quoted(worst))
    return f"{len(rows)} prompts"

def after(stage, world, seconds):
    """Say what a stage changed, with the number to look at. stage: an entry of demo.stages."""
    name, script, *_, product, _ = stage
    folder = os.path.dirname(product)
    if script == 'collect.py':
        told = [ranked(product)]
    elif script.startswith('data/'):
        counts = {kind: f'{folder}/{kind}_train.jsonl' for kind in MADE} if name == 'data' else {name: product}
        told = [', '.join(f"{kind.removesuffix('_scratch')} {sum(1 for _ in read_lines(path))}"
                          for kind, path in counts.items() if os.path.exists(path))]
    else:
        told = [number(folder, script)]
        if script in LOOK_AT and script != 'reward.py' and name != 'judge': # which answer no prompts
            told.append(change(folder, world))
    return fill(f"  [{name}] {seconds:.0f} s: " + '. '.join(filter(None, told)), '    ').rstrip(': ')

def alarms(path):
    """Return what the health monitor has printed in a file. Its list at the end is left out."""
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return [fill(f'    {line}', '    ') for line in f if line.startswith('health: step')]
    except OSError: # somebody has removed it
        return []

# ---- the end ----------------------------------------------------------------------------------------------------

def shown(names):
    """Choose at most four policies: the base and SFT models, the first that was trained, and the last."""
    return [*dict.fromkeys([*names[:3], names[-1]])]

def dividing(samples, names, kind_of):
    """Return the prompt of each kind that divides the policies most: [{name: sample}].

    There their gold scores differ most. The spreads of sampled and of greedy answers are added; of equal ones the first
    counts. Dialogues are left out. samples: the records of samples.jsonl; kind_of: sample -> its kind.
    """
    prompts, best = {}, {} # best: {kind: (spread, {name: sample})}
    for sample in samples:
        if sample['model'] in names and isinstance(sample['prompt'], str):
            prompts.setdefault(sample['prompt'], {})[sample['model']] = sample
    for group in prompts.values():
        kind = kind_of(next(iter(group.values())))
        scores = [[sample[f'{decoding}_gold'] for sample in group.values()] for decoding in ('sampled', 'greedy')]
        spread = round(sum(max(row) - min(row) for row in scores), 6)
        if spread > best.get(kind, (0,))[0]:
            best[kind] = spread, group
    return [group for _, group in best.values()]

def side_by_side(groups, names):
    """Lay out sampled and greedy answers of the policies, with gold scores."""
    first = max(map(len, names))
    room = (WIDTH - first - 4) // 2 # of a column
    cell = lambda sample, decoding: f"{sample[f'{decoding}_gold']:.1f} {quoted(sample[decoding], room - 6)}"
    lines = [' ' * first + '  ' + 'sampled'.ljust(room) + '  greedy'] if groups else []
    for group in groups:
        lines += ['', asked(next(iter(group.values())))]
        lines += [f"{name.ljust(first)}  {cell(group[name], 'sampled').ljust(room)}  {cell(group[name], 'greedy')}"
                  for name in names]
    return lines

def gold_table(results, names):
    """Lay out gold scores and shares of right content, sampled and greedy."""
    keys = ['gold', 'helpful', 'honest', 'harmless']
    rows = [[name, *(f'{results[part][name][key]:.2f}' for part in ('models', 'greedy') for key in keys)]
            for name in names]
    header, *rest = align(['', *keys, *keys], rows)
    middle = (len(header) - max(map(len, names))) // 2 + max(map(len, names)) # where the greedy ones begin
    title = ' ' * max(map(len, names)) + '  sampled'
    return [title.ljust(middle) + '  greedy', header, *rest]

def why_base_helps(greedy, trained):
    """Say why greedy SFT is right less often than base.

    The reason holds if "I don't know" and refusals make up more than half of what is lost. Else '' is returned. greedy:
    {model: row} of results.json; trained: the names of further policies.
    """
    if not all('answerable' in greedy.get(name, {}) for name in ('base', 'sft')):
        return ''
    right = {name: row['answerable']['right'] for name, row in greedy.items()}
    evades = {name: row['answerable']['abstains'] + row['answerable']['declines'] for name, row in greedy.items()}
    lost = right['base'] - right['sft']
    if lost <= 0 or evades['sft'] - evades['base'] <= lost / 2:
        return ''
    shares = [f"{evades[name]:.0%} ({name})" for name in ('base', 'sft', *trained)]
    return fill(
        f"Why is greedy sft less helpful ({right['sft']:.2f}) than greedy base ({right['base']:.2f})? Its "
        "demonstrations hold more \"I don't know\" and more refusals than the corpus, and so small a model says them "
        f"where it could answer, too: to {', '.join(shares)} of the prompts that can be answered.")

def by_prompt(samples, category):
    """Return {prompt: {model: sample}} of a category."""
    found = {}
    for sample in samples:
        if sample.get('category') == category:
            found.setdefault(json.dumps(sample['prompt']), {})[sample['model']] = sample
    return found

def why_it_falls(samples, name):
    """Say where a greedy policy lost most right answers since SFT.

    The reward model is to blame where it scores wrong answers above SFT's right ones in more than half of the prompts.
    Where no category lost FALL, '' is returned. samples: the records of samples.jsonl; name: of the policy.
    """
    right, worst = lambda sample: sample['greedy_gold'] > 0.5, (FALL, '') # the content alone gives 0.8
    for category in dict.fromkeys(sample.get('category') for sample in samples):
        groups = [group for group in by_prompt(samples, category).values() if {name, 'sft'} <= group.keys()]
        shares = [sum(right(group[model]) for group in groups) / len(groups) for model in ('sft', name) if groups]
        if not shares or shares[0] - shares[1] < worst[0]:
            continue
        text, n = Counter(group[name]['greedy'] for group in groups).most_common(1)[0]
        told = (f"Greedy {name} is right on {shares[1]:.2f} of the {category} prompts (sft {shares[0]:.2f}): it says "
                f"{quoted(text)} to {n} of {len(groups)}.")
        rewards = [[group[model].get('greedy_reward') for model in (name, 'sft')] for group in groups
                   if right(group['sft']) and not right(group[name])]
        fooled = sum(wrong > good for wrong, good in rewards) if None not in sum(rewards, []) else 0
        if name in BY_REWARD and fooled > len(rewards) / 2: # ppo2 has another reward model
            told += (f" Of {len(rewards)} that only sft gets right, the reward model prefers {name}'s answer in "
                     f"{fooled}: reward hacking.")
        worst = shares[0] - shares[1], told
    return fill(worst[1])

def command(typed, *words):
    """Break a command into lines of WIDTH. A longer word has its own."""
    first, *rest = [typed([word]) for word in words]
    lines = [f'  {first}']
    for word in rest:
        if len(lines[-1]) + len(word) < WIDTH - 2: # a blank before it, and two signs behind it
            lines[-1] += f' {word}'
        else:
            lines[-1] += ' ^' if os.name == 'nt' else ' \\'
            lines.append(f'      {word}')
    return '\n'.join(lines)

def next_steps(out, names, typed, what, *more):
    """Say what one may type next. typed: words -> a command; more: the words of a further one, which does `what`."""
    page = f'{out}/evaluate/report.html'
    talk = ['python', 'sample.py', '--policy=' + ','.join(f'{out}/{name}' for name in names)]
    steps = [('talk to them side by side', talk), (what, more)]
    if os.path.exists(page):
        steps.insert(1, (f"read the report, {page}", [OPEN.get(sys.platform, 'xdg-open'), page]))
    return [fill(f"Next: {'; '.join(what for what, _ in steps)}."), *(command(typed, *words) for _, words in steps)]

def ending(out, methods, results, samples, typed):
    """Return what demo.py prints at its end: numbers, answers that differ, what to type next."""
    names = [name for name in results['models'] if name != 'best_of_n'] # a bound, no policy
    few = shown(names)
    why = [why_base_helps(results['greedy'], few[2:]), *(why_it_falls(samples, name) for name in few[2:])]
    seen = next((name for name in methods if name in BY_REWARD), '') # has its own prompts
    critic = read_options(f'{out}/{seen}').get('options', {}).get('critic') == 'separate'
    closer = ['python', 'microscope.py', f'--policy={out}/{seen or methods[0]}', f'--reference={out}/sft',
              f'--reward_model={out}/reward', *([f'--critic={out}/{seen}'] if critic else []),
              *([] if seen else ['--prompts=data/toy/prompts_test.jsonl']), f'--out={out}/evaluate/microscope.html']
    return '\n'.join([
        fill(f"Mean gold score on {results['prompts']} held-out prompts ({PARTS}), and the share of right answers to "
             "requests that can be answered (helpful), that nobody can answer (honest), and harmful ones (harmless):"),
        '', *gold_table(results, names), *(line for text in why if text for line in ('', text)),
        '', "Prompts on which they differ most, with the gold score of each answer:", '',
        *side_by_side(dividing(samples, few, lambda sample: sample['kind']), few), '', fill(READ), '',
        *next_steps(out, few, typed, 'see every token as PPO sees it', *closer)])
