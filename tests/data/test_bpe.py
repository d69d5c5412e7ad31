"""data/bpe.py against merges by hand."""
import numpy as np

from common.tokens import Tokenizer, merge
from data.bpe import train_bpe

def test_bpe_merges_by_hand():
    # words: "aab" once, " aab" twice, " ab" once. Pairs: ab 4, aa 3, " a" 3          -> 256 = ab
    # then a+ab 3, " "+a 2, " "+ab 1                                                  -> 257 = aab
    # then " "+aab 2, " "+ab 1                                                        -> 258 = " aab"; " ab" is too rare
    ranks = train_bpe(["aab aab aab", " ab"], vocab_size=1000, min_count=2)
    assert len(ranks) == 259 and [ranks[b"ab"], ranks[b"aab"], ranks[b" aab"]] == [256, 257, 258]
    tok = Tokenizer("tiktoken", ranks)
    assert (tok.n_vocab, tok.eos) == (260, 259)
    assert tok.encode("aab ab aab") == [257, 32, 256, 258]

def test_bpe_ties_and_vocab_size():
    texts = ["ba", "ab", "ba", "ab"] # both pairs twice: the one whose bytes sort first goes first
    ranks = train_bpe(texts, vocab_size=1000, min_count=2)
    assert len(ranks) == 258 and (ranks[b"ab"], ranks[b"ba"]) == (256, 257)
    assert train_bpe(texts[::-1], 1000, 2) == ranks
    assert len(train_bpe(texts, vocab_size=258, min_count=2)) == 257 # 256 bytes, one merge, the end of text
    assert len(train_bpe(texts, vocab_size=1000, min_count=3)) == 256

def test_bpe_counts_follow_the_merges():
    # after every merge the pair counts must be those of a fresh count; here a word holds its best pair three times
    # "abababc" x1, "bc" x2: ab 3, bc 1+2 = 3, ba 2 -> ab first; then ab+ab 2, b+c 2, ab+c 1 -> "abab" sorts first;
    # then bc 2 (abab+ab is left once)
    ranks = train_bpe(["abababc", "bc", "bc"], vocab_size=1000, min_count=2)
    assert [token for token, rank in ranks.items() if rank >= 256] == [b"ab", b"abab", b"bc"]

def test_bpe_encodes_as_trained():
    """tiktoken's encoder is the oracle for `merge`, the rule of training, on words full of overlapping pairs."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("aabc"), size=rng.integers(1, 12))) for _ in range(300)]
    ranks = train_bpe(texts, vocab_size=320, min_count=2)
    tok = Tokenizer("tiktoken", ranks)
    for text in texts:
        parts = [bytes([b]) for b in text.encode()]
        merge(parts, ranks)
        assert [ranks[p] for p in parts] == tok.encode(text)
        assert tok.decode(tok.encode(text)) == text
