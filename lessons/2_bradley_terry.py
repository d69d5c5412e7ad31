"""Lesson 2: what rankings can tell a reward model, and what they cannot.

    python lessons/2_bradley_terry.py

Bradley and Terry (1952) give every answer a score s, and say how often a person prefers a to b:

    P(a is preferred) = sigmoid(s_a - s_b)

We play the person. Our scores are the rewards of world.py, and we add noise. Then we learn scores from the comparisons
alone. First each of the 156 answers has a score of its own; at the end a GPT looks for reasons.

Exercises
1. Write `2 * REWARDS[a] - 2 * REWARDS[b]` in `person`, and run. Which person of the old table answers as the new person
   of noise 2 does? Say it first.
2. Fill in `chain`: a beats b in 80 % of cases, b beats c in 90 %. How often does a beat c, by Bradley and Terry? Hint:
   p / (1 - p) are the odds. And what if c beats a: which scores say that?
3. Fill in `half_loss`: ties stay in, and both sides of a tie get half a win. Will the slope be above or below 1?
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository's root

from lessons.course import draw, tell_exercises
from lessons.world import ALL, ANSWERS, REWARDS, WORDS, descend, expected, log_pi, new_policy
from reward import bradley_terry_loss, ranking_loss

import torch

N = len(REWARDS)
BETTER = REWARDS[:, None] > REWARDS # (N, N)
UMS = torch.tensor([float(answer.count(WORDS.index('um'))) for answer in ANSWERS]) # (N,) words worth nothing
PROMPT_OF = torch.arange(N) % 2 # as if the answers belonged to two prompts
SAME = PROMPT_OF[:, None] == PROMPT_OF # (N, N)

def person(n, noise, may=BETTER | ~BETTER):
    """Return up to n pairs that may (N, N) allows: (2, n), chosen and rejected, and how far apart they felt (n,)."""
    a, b = torch.randint(N, (2, n))
    a, b = a[may[a, b]], b[may[a, b]]
    u = torch.rand(len(a))
    felt = REWARDS[a] - REWARDS[b] + noise * (u / (1 - u)).log() # logistic noise, whose distribution is the sigmoid
    return torch.stack([torch.where(felt > 0, a, b), torch.where(felt > 0, b, a)]), felt.abs()

def learn(pairs, steps, start=0.0 * REWARDS, ranks=None):
    """Return a table of scores (N,) learnt from pairs (2, n), and the loss; ranks: (n, 2), for ties."""
    scores = start.clone().requires_grad_()
    loss_of = lambda: bradley_terry_loss(*scores[pairs]) if ranks is None else ranking_loss(scores[pairs].T, ranks)
    descend([scores], loss_of, steps, 0.05)
    return scores.detach(), loss_of().item()

def slope(scores):
    """Return how many points of score go with one point of reward."""
    r = REWARDS - REWARDS.mean()
    return (scores @ r / (r @ r)).item()

def in_order(scores, pairs=BETTER):
    """Return the share of pairs (N, N) that the scores put in order; pairs: better and worse."""
    return (scores[:, None] > scores)[pairs].float().mean().item()

def shift(n, steps):
    """Yield for two starts: the loss, and the order within and between two prompts."""
    pairs, _ = person(n, 1.0, SAME) # nobody compares an answer to one prompt with an answer to the other
    for start in (0.0 * PROMPT_OF, 5.0 * PROMPT_OF): # the second: all answers to the second prompt 5 points higher
        scores, loss = learn(pairs, steps, start)
        yield loss, in_order(scores, BETTER & SAME), in_order(scores, BETTER & ~SAME)

def without_ties(n, steps):
    """Return the share of ties and the slope: a person calls a tie what feels less than 1 apart."""
    pairs, felt = person(n, 1.0)
    ranks = torch.stack([0 * felt, (felt >= 1)], 1).long() # (n, 2), two equal ranks make a tie
    return (felt < 1).float().mean().item(), slope(learn(pairs, steps, ranks=ranks)[0])

def length(seed, n, steps, share):
    """Train a GPT on pairs whose better answer has more "um"; add a share of all others, return what it learnt."""
    longer = UMS[:, None] > UMS # (N, N)
    pairs, _ = person(n, 0.0, BETTER & longer | (BETTER & longer).T | (torch.rand(N, N) < share))
    model = new_policy(seed, reward_head=True)
    scores_of = lambda: model.rewards(ALL.idx, ALL.lengths) # (N,)
    descend(model.parameters(), lambda: bradley_terry_loss(*scores_of()[pairs]), steps, 0.003)
    scores = scores_of().detach() / scores_of().std()
    best = (log_pi(new_policy(seed)).detach() + 2 * scores).log_softmax(0) # where these scores lead, see lesson 6
    return dict(usual=in_order(scores, BETTER & longer), other=in_order(scores, BETTER & longer.T),
                reward=expected(best).item(), ums=expected(best, UMS).item())

def main(seeds=(0, 1, 2), n=20000, steps=300):
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(dict(
            shift=list(shift(n, steps)), ties=without_ties(n, steps),
            noise={noise: [learn(person(k, noise)[0], steps)[0] for k in (n, n // 10)] for noise in (0.5, 1, 2)},
            certain=[learn(person(n, 0.0, BETTER | BETTER.T)[0], k * steps)[0] for k in (1, 2, 3)],
            length={share: length(seed, n, 2 * steps // 3, share) for share in (0, 0.01, 0.03, 0.1, 1)}))
    row = lambda values: ' '.join(f"{value:5.2f}" for value in values) # a column is a seed
    print(f"Three numbers in a row are three seeds. Scores come from {n} comparisons.\n\nSHIFT, of two prompts:")
    for k, start in enumerate(('all scores start at 0', 'those of prompt 2 at 5')):
        loss, within, between = zip(*(f['shift'][k] for f in found))
        print(f"{start:23} loss {row(loss)}   order within prompts {row(within)}   between {row(between)}")
    print(f"The losses differ by {max(abs(f['shift'][0][0] - f['shift'][1][0]) for f in found):.6f}: they are blind to "
          f"the shift.\n\nNOISE of the person; few: from {n // 10} comparisons.")
    for noise in found[0]['noise']:
        many, few = zip(*(f['noise'][noise] for f in found))
        print(f"{noise:4}  slope {row(map(slope, many))}   slope x noise {row(noise * slope(s) for s in many)}   "
              f"order {row(map(in_order, many))}   few {row(map(in_order, few))}")
    print("A steep score means a sure person. Without noise scores have no size; their range grows with the steps:",
          *(f"{s.max() - s.min():.0f}" for s in found[0]['certain']))
    print(f"\nTIES. Share {row(f['ties'][0] for f in found)}   slope without them {row(f['ties'][1] for f in found)}   "
          f"with a forced choice {row(slope(f['noise'][1][0]) for f in found)}\n\n"
          "LENGTH. In training the better answer has more \"um\", but for a share of other pairs. usual: order of such "
          "pairs.\nother: order where the better one has fewer. Then reward and ums of the best policy by the scores.")
    for share in found[0]['length']:
        rows = [f['length'][share] for f in found]
        print(f"{share:5}  " + '   '.join(f"{key} {row(r[key] for r in rows)}" for key in rows[0]))

    def slopes(ax):
        for noise, (scores, _) in found[0]['noise'].items():
            ax.plot(REWARDS, scores - scores.mean(), 'o', ms=3, label=f"noise {noise}")
        ax.set(xlabel='true reward', ylabel='learnt score', title='more noise, flatter scores')
        ax.legend()

    def lengths(ax):
        for f in found: # as words: evenly spaced
            ax.plot([str(share) for share in f['length']], [r['other'] for r in f['length'].values()], 'o-')
        ax.set(xlabel='share of other pairs', ylabel='in order where the better is shorter', title='longer is better?')

    draw('2_bradley_terry', slopes, lengths)
    tell_exercises(globals())
    return found

def chain(p_ab, p_bc):
    """Return how often a is preferred to c."""

def half_loss(scores, ranks):
    """Return the mean loss () of pairs, scores and ranks (B, 2); at equal ranks both orders count one half."""

T = torch.tensor
CHECKS = dict(chain=lambda f: abs(f(0.8, 0.9) - 36 / 37) < 1e-6 and abs(f(0.5, 0.3) - 0.3) < 1e-6,
              half_loss=lambda f: abs(f(T([[1., 0], [2, 0], [0, 0]]), T([[0, 1], [1, 0], [0, 0]])) - 1.0444) < 1e-4)

if __name__ == '__main__':
    main()
