"""Texts as words: normalised, cut into runs of words, and which texts have runs in common.

A text is a tuple of words. Two texts are compared through their sets of shingles (runs of a few
words); the pairs worth comparing come from hashes, and no hash ever decides.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

import datasketch
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Words = tuple[str, ...]

# Chinese and Japanese do without spaces: each of their characters is a word.
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+")
OPTION = re.compile(r"^[ \t]*\(?[A-Za-z][.):]\s", re.MULTILINE)  # "A. ", "(A) ", "a) ", "A: "
NUMBER = re.compile(r"\d+")

PIECE_WORDS = 4  # of a stock phrase
PERMUTATIONS = 128  # of a MinHash
MISSED = 1e-3  # at most this share of pairs at the threshold is missed
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, or the first words of a run would shift away


def words(text: str) -> Words:
    """Returns the words in order, without case, punctuation, space, Unicode's variants (NFKC)."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def unlettered(text: str) -> Words:
    """Returns the words without the letters of options."""
    return words(OPTION.sub("", text))


def lines(text: str) -> tuple[Words, ...]:
    """Returns the lines as words, sorted, without option letters: the same for shuffled options."""
    return tuple(sorted(filter(None, map(unlettered, text.splitlines()))))


def shingles(text: Words, n: int) -> frozenset[Words]:
    """Returns the runs of n words of a text; of a shorter text, the text itself."""
    n = min(n, len(text))
    return frozenset(text[i : i + n] for i in range(len(text) - n + 1))


def jaccard(a: frozenset, b: frozenset) -> float:
    """Computes the size of the intersection as a share of the union."""
    return len(a & b) / len(a | b)


def containment(a: frozenset, b: frozenset) -> float:
    """Computes the size of the intersection as a share of the smaller set."""
    return len(a & b) / min(len(a), len(b))


def alike(texts: Sequence[Words], n: int, threshold: float) -> Iterator[tuple[int, int]]:
    """Yields candidates (u, v), u < v, whose shingles of n words may have that Jaccard similarity.

    MinHash with banding: a pair at the threshold is missed with a probability of at most `MISSED`,
    a more similar one more rarely; many of the pairs are less similar.
    """
    rows = _band_rows(threshold)
    index = datasketch.MinHashLSH(num_perm=PERMUTATIONS, params=(PERMUTATIONS // rows, rows))
    codes = _codes({word for text in texts for word in text})
    hashes = (
        # The upper half: a sketch takes 32 bits.
        (_runs([codes[word] for word in text], min(n, len(text))) >> np.uint64(32)).tolist()
        for text in texts
    )
    sketches = datasketch.MinHash.generator(hashes, num_perm=PERMUTATIONS, seed=0, hashfunc=int)
    for v, sketch in enumerate(sketches):
        yield from ((u, v) for u in index.query(sketch) if isinstance(u, int))
        index.insert(v, sketch)


def sharing(texts: Sequence[Words], n: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yields candidates (u, v), u < v, that share a run of n words which is no boilerplate.

    Boilerplate is a run that stands in more than `limit` of the texts, or one put together from
    stock phrases: half of its pieces of 4 words stand, whatever their numbers, in more than `limit`
    texts and in more than one in a thousand. "pressure is 120/80 mm" and "... 130/85 mm" are one.
    """
    run, owner = _telling_runs(texts, n, limit)
    order = np.lexsort((owner, run))
    run, owner = run[order], owner[order]
    _, group, size = np.unique(run, return_inverse=True, return_counts=True)
    few = size[group] <= limit
    run, owner = run[few], owner[few]
    found = [np.zeros((0, 2), int)]
    for step in range(1, limit):
        same = run[step:] == run[:-step]
        found.append(np.stack([owner[:-step][same], owner[step:][same]], axis=1))
    yield from map(tuple, np.unique(np.concatenate(found), axis=0).tolist())


def _telling_runs(texts, n, limit):
    """Returns (R,) hashes of texts' distinct runs of n words, no stock phrases, and the texts."""
    vocabulary = {word for text in texts for word in text}
    masks = {word: NUMBER.sub("0", word) for word in vocabulary}
    codes = _codes(vocabulary | set(masks.values()))
    width = min(PIECE_WORDS, n)
    pieces = [_runs([codes[masks[word]] for word in text], width) for text in texts]
    piece, standing = np.unique(np.concatenate(list(map(np.unique, pieces))), return_counts=True)
    common = piece[standing > max(limit, len(texts) // 1000)]
    rare = ~np.isin(np.concatenate(pieces), common)
    ends = np.cumsum([len(p) for p in pieces])
    runs, owners = [], []
    for u, (text, mine) in enumerate(zip(texts, np.split(rare, ends[:-1]), strict=True)):
        run = _runs([codes[word] for word in text], n)
        if len(run):
            telling = sliding_window_view(mine, n - width + 1).mean(axis=1) > 0.5
            run = np.unique(run[telling])
        runs.append(run)
        owners.append(np.full(len(run), u))
    return np.concatenate(runs), np.concatenate(owners)


def _band_rows(threshold):
    """Finds the most rows of a band, for the fewest candidates, that hardly miss a pair."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return rows
    return 1


def _codes(vocabulary):
    """Returns a 64-bit number for each word, the same in every process."""
    return {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        for word in vocabulary
    }


def _runs(codes, n):
    """Hashes each run of n codes: (T,) -> (max(0, T - n + 1),) uint64, modulo 2**64."""
    codes = np.array(codes, np.uint64)
    total = np.zeros(max(0, len(codes) - n + 1), np.uint64)
    for i in range(n):
        total = total * MULTIPLIER + codes[i : i + len(total)]
    return total
