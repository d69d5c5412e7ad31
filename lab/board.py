"""Compare policies by people's verdicts: win rates, Elo, wins at equal length, agreement; or by mean ratings.

    python -m lab.board out/anna.jsonl out/ben.jsonl --by=kind
    python -m lab.board out/both.jsonl --baseline=out/sft --out_dir=out/board
    python -m lab.board out/anna_ratings.jsonl

The files hold rankings with `policies`, merged or one a rater, or ratings with `policy`, as collect.py writes them. A
tie is half a win for each. docs/feedback.md explains the tables.
"""

import html
import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import combinations, count

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) # as with `python lab/NAME.py`

from common.options import fail, joined, launch, require
from common.records import QUALITIES, first_row, is_text, read_records, write_atomic
from feedback.agreement import by_rater, compare, of_raters
from feedback.annotators import answers_of, visible
from lab.tables import align
from lab.wins import measure, measure_ratings, votes_of

@dataclass
class Config:
    baseline: str = '' # the policy to compare with; empty = a folder named sft, else the first one
    by: str = '' # a key of the records, such as kind: also a table for each of its values
    out_dir: str = '' # gets board.json and, of rankings, board.svg; empty = only print
    bootstrap: int = 1000 # so many times the prompts are drawn anew, for the intervals
    seed: int = 1 # of these draws

    def __post_init__(self):
        require(self, bootstrap=(self.bootstrap >= 100, 'at least 100'), seed=(self.seed >= 0, 'at least 0'))

def groups_of(rows, by):
    """Return {title: rows} of all records, and of each value of their key `by`."""
    if by and not any(by in row for row in rows):
        fail(f"--by={by}: no record has this key; they have {', '.join(sorted({key for row in rows for key in row}))}")
    groups = {'all': rows}
    for row in rows if by else []:
        groups.setdefault(visible(f"{by}: {row.get(by, '–')}"), []).append(row)
    return groups

def task(row):
    """Return a row's prompt, its answers and who wrote which; two policies may write the same."""
    writers = row.get('policies') if isinstance(row.get('policies'), list) else [] # votes_of refuses what is no list
    return json.dumps([row['prompt'], sorted({*zip(answers_of(row), map(str, writers))})])

def of_rankings(files, cfg):
    """Return {title: table} and remarks."""
    raters = by_rater(files, task)
    rows, where = [row for mine in raters.values() for row in mine.values()], ', '.join(files)
    votes = {title: votes_of(group, where) for title, group in groups_of(rows, cfg.by).items()}
    every, left_out = votes['all']
    if not every:
        found = sorted({visible(name) for row in rows for name in row['policies']})
        fail(f"{where}: wanted different answers of two policies to one prompt, found none; there are answers of "
             f"{', '.join(found)}")
    if all(v.win == 0.5 for v in every):
        fail(f"{where}: wanted answers of one policy ranked above those of another; all {len(every) // 2} pairs of two "
             "policies tie")
    names = list(dict.fromkeys(v.policy for v in every))
    baseline = cfg.baseline or next((name for name in names if os.path.basename(name) == 'sft'), names[0])
    if baseline not in names:
        fail(f"--baseline={baseline}: wanted one of {', '.join(names)}")
    tables = {title: measure(mine, baseline, cfg.bootstrap, cfg.seed) for title, (mine, _) in votes.items() if mine}
    said = [f'baseline: {baseline}', 'Every policy is given half a win and half a loss more, against an average '
            'one, so that no Elo is infinite; their mean is 1000']
    said += [f"{name} {'won' if row['win_rate'] else 'lost'} everything: only that half keeps its Elo finite"
             for name, row in tables['all'].items() if row['win_rate'] in (0, 1)]
    said += [f'{n} pairs {why} left out' for why, n in left_out.items()]
    return tables, said + [f'{a} and {b}: {compare(raters[a].values(), raters[b].values())}'
                           for a, b in combinations(raters, 2)]

def of_ratings(files, cfg):
    """Return {title: table} and remarks."""
    rows = [row for path in files for row in read_records(path, 'ratings')]
    qualities = [quality for quality in QUALITIES if any(quality in row for row in rows)]
    answers = [{} for _ in qualities] # of each quality: {answer: its raters' numbers}
    for row in rows:
        if not is_text(row.get('policy')) or not all(quality in row for quality in qualities):
            fail(f"{', '.join(files)}: wanted `policy` and {', '.join(qualities)} in every rating, as collect.py "
                 f"--policy=A,B writes them; got one with {', '.join(row)}")
        for quality, said in zip(qualities, answers):
            answer = json.dumps([row['prompt'], row['response'], row.get('ended', True)])
            said.setdefault(answer, []).append(row[quality])
    tables = {title: measure_ratings(group, qualities, cfg.bootstrap, cfg.seed)
              for title, group in groups_of(rows, cfg.by).items()}
    return tables, [f'{quality}: {of_raters([*said.values()])}' for quality, said in zip(qualities, answers)]

def show(title, table):
    """Print {policy: its numbers}; an interval stands behind its number."""
    def cell(row, key):
        digits = 0 if key in ('comparisons', 'elo', 'characters', 'ratings') else 2
        numbers = ['–' if x is None else f'{x:.{digits}f}' for x in (row[key], *row.get(f'{key}_interval', []))]
        return '{} ({}–{})'.format(*numbers) if len(numbers) > 1 else numbers[0]
    keys = [key for key in [*table.values()][0] if not key.endswith('_interval')]
    lines = [['policy', *(key.replace('_', ' ') for key in keys)]]
    lines += [[name, *(cell(row, key) for key in keys)] for name, row in table.items()]
    print('', title, *align(lines[0], lines[1:]), sep='\n')

def draw(table):
    """Draw each policy's Elo with its interval; return the SVG text. A line stands at 1000, the mean."""
    ends = [1000, *(x for row in table.values() for x in (row['elo'], *row['elo_interval']))]
    step = next(n for n in (10 ** k * m for k in count(1) for m in (1, 2, 5)) if max(ends) - min(ends) <= 6 * n)
    below, above = (math.ceil(x / step) for x in (1000 - min(ends), max(ends) - 1000)) # in steps
    low, high = 1000 - step * below, 1000 + step * max(above, 1)
    left, bottom, parts = 30 + 8 * max(map(len, table)), 40 + 28 * len(table), []
    at = lambda elo: round(left + 400 * (elo - low) / (high - low), 1)
    for tick in range(low, high + 1, step):
        colour, dashes = ('#5f5d57', 'stroke-dasharray="4 3"') if tick == 1000 else ('#e0ddd4', '')
        parts.append(f'<path d="M{at(tick)} 30V{bottom}" stroke="{colour}" {dashes}/>'
                     f'<text x="{at(tick)}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<path d="M{left} {bottom}H{left + 400}" stroke="#1d1d1b"/>')
    for y, (name, row) in zip(count(50, 28), table.items()):
        (start, end), elo = row['elo_interval'], row['elo']
        parts.append(f'<text x="8" y="{y + 4}">{html.escape(name)}</text><text x="{left + 420}" y="{y + 4}">{elo:.0f}'
                     '</text><g stroke="#0072B2" stroke-width="2" fill="#0072B2">'
                     f'<path d="M{at(start)} {y}H{at(end)}"/><circle cx="{at(elo)}" cy="{y}" r="3"/></g>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 480}" height="{bottom + 30}" fill="#1d1d1b" '
            'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/><text x="8" y="20">'
            f'Elo, with 95 % intervals; dashed: 1000, the mean of all</text>{"".join(parts)}</svg>\n')

def main(cfg, files):
    if not files:
        fail("wanted files of verdicts, as in python -m lab.board out/anna.jsonl out/ben.jsonl")
    rated = ['response' in row and bool({*QUALITIES} & row.keys()) for row in map(first_row, files)]
    if len({*rated}) > 1:
        fail(f"{files[0]} and {files[rated.index(not rated[0])]}: wanted rankings alone or ratings alone, got both")
    if rated[0] and cfg.baseline:
        fail(f"--baseline={cfg.baseline}: wanted none with ratings, only rankings are compared with one")
    tables, remarks = (of_ratings if rated[0] else of_rankings)(files, cfg)
    for title, table in tables.items():
        show(title, table)
    print('', *remarks, sep='\n')
    if cfg.out_dir:
        os.makedirs(cfg.out_dir, exist_ok=True)
        path, found = os.path.join(cfg.out_dir, 'board'), vars(cfg) | dict(files=files, tables=tables, remarks=remarks)
        write_atomic(f'{path}.json', json.dumps(found, ensure_ascii=False, indent=1) + '\n')
        if not rated[0]:
            write_atomic(f'{path}.svg', draw(tables['all']))
        print(f"wrote {path}.json" + f" and {path}.svg" * (not rated[0]))

if __name__ == '__main__':
    args = joined(sys.argv[1:], Config.__annotations__)
    sys.argv[1:], given = ([arg for arg in args if arg.startswith('-') == option] for option in (True, False))
    launch(lambda cfg: main(cfg, given), Config)
