"""Train a byte-pair encoding on texts; common/tokens.py reads, writes and uses it."""

from collections import Counter, defaultdict

import regex # comes with tiktoken

from common.tokens import BYTES, GPT2_SPLIT, merge

def train_bpe(texts, vocab_size, min_count=2):
    """Train a byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) within GPT-2's words.

    Again and again the most frequent pair of neighbours becomes a token; of equally frequent pairs, the one whose bytes
    sort first. As in tiktoken a pair is known by its joined bytes, (ab, c) and (a, bc) alike. So the finished encoding
    splits the training text as training left it. Stops at `vocab_size` tokens, the end-of-text token included, or when
    no pair occurs `min_count` times (which keeps rare names from becoming single tokens). Returns ranks {bytes: id},
    the 256 bytes first.
    """
    ranks = dict(BYTES)
    counts_of = Counter(word.encode() for text in texts for word in regex.findall(GPT2_SPLIT, text))
    freqs = list(counts_of.values()) # each distinct word is worked on once, with its frequency
    words = [[bytes([b]) for b in word] for word in counts_of]
    counts, places = Counter(), defaultdict(set) # joined pair -> its count; -> the words that hold it

    def tally(w, sign):
        for left, right in zip(words[w], words[w][1:]):
            counts[left + right] += sign * freqs[w]
            places[left + right].add(w)

    for w in range(len(words)):
        tally(w, 1)
    while len(ranks) + 1 < vocab_size and counts:
        top = max(counts.values())
        if top < max(min_count, 1):
            break
        token = min(pair for pair, n in counts.items() if n == top)
        ranks[token] = len(ranks)
        for w in places.pop(token): # only the words that hold the pair change
            tally(w, -1)
            merge(words[w], ranks)
            tally(w, 1)
        counts.pop(token)
        places.pop(token, None)
    return ranks
