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

Words = tuple[str, ...]

# Chinese and Japanese do without spaces: each of their characters is a word.
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_぀-ヿ㐀-鿿]+")
OPTION = re.compile(r"\s*\(?[A-Z][.):]\s")  # "A. ", "(A) ", "A) ", "A: " at the start of a line
NUMBER = re.compile(r"\d+")

PERMUTATIONS = 128  # of a MinHash
MISSED = 1e-3  # at most this share of pairs at the threshold is missed
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, or the first words of a run would shift away


def words(text: str) -> Words:
    """The words in order, without case, punctuation, white space and Unicode's variants (NFKC)."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def lines(text: str) -> tuple[Words, ...]:
    """The lines as words, sorted, option letters taken off: the same for shuffled options."""
    found = (words(OPTION.sub("", line, count=1)) for line in text.splitlines())
    return tuple(sorted(filter(None, found)))


def shingles(text: Words, n: int) -> frozenset[Words]:
    """Its runs of n words; of a shorter text, the text itself."""
    n = min(n, len(text))
    return frozenset(text[i : i + n] for i in range(len(text) - n + 1))


def jaccard(a: frozenset, b: frozenset) -> float:
    """The share of what either holds that both hold."""
    return len(a & b) / len(a | b)


def containment(a: frozenset, b: frozenset) -> float:
    """The share of the smaller that the larger holds."""
    return len(a & b) / min(len(a), len(b))


def alike(texts: Sequence[Words], n: int, threshold: float) -> Iterator[tuple[int, int]]:
    """Candidates (u, v), u < v, whose shingles of n words may have that Jaccard similarity.

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
        yield from ((u, v) for u in index.query(sketch))
        index.insert(v, sketch)


def sharing(texts: Sequence[Words], n: int, limit: int) -> Iterator[tuple[int, int]]:
    """Candidates (u, v), u < v, that share a run of n words which is no boilerplate.

    Boilerplate is a run that stands in more than `limit` of the texts, whatever its numbers: "blood
    pressure is 120/80 mm Hg" and "... 130/85 mm Hg" count as the same.
    """
    vocabulary = {word for text in texts for word in text}
    masks = {word: NUMBER.sub("0", word) for word in vocabulary}
    codes = _codes(vocabulary | set(masks.values()))
    runs, forms, owners = [], [], []
    for u, text in enumerate(texts):
        run, first = np.unique(_runs([codes[word] for word in text], n), return_index=True)
        runs.append(run)
        forms.append(_runs([codes[masks[word]] for word in text], n)[first])
        owners.append(np.full(len(run), u))
    form, texts_with = np.unique(np.concatenate([np.unique(f) for f in forms]), return_counts=True)
    rare = ~np.isin(np.concatenate(forms), form[texts_with > limit])
    run, owner = np.concatenate(runs)[rare], np.concatenate(owners)[rare]
    order = np.lexsort((owner, run))
    run, owner = run[order], owner[order]
    found, step = [np.zeros((0, 2), int)], 1
    while (same := run[step:] == run[:-step]).any():
        found.append(np.stack([owner[:-step][same], owner[step:][same]], axis=1))
        step += 1
    yield from map(tuple, np.unique(np.concatenate(found), axis=0).tolist())


def _band_rows(threshold):
    """The most rows a band may have, for the fewest candidates, so that hardly a pair is missed."""
    for rows in range(PERMUTATIONS // 2, 1, -1):
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= MISSED:
            return rows
    return 1


def _codes(vocabulary):
    """A 64-bit number for each word, the same in every process."""
    return {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        for word in vocabulary
    }


def _runs(codes, n):
    """A hash of each run of n codes: (T,) -> (max(0, T - n + 1),) uint64, modulo 2**64."""
    codes = np.array(codes, np.uint64)
    total = np.zeros(max(0, len(codes) - n + 1), np.uint64)
    for i in range(n):
        total = total * MULTIPLIER + codes[i : i + len(total)]
    return total
