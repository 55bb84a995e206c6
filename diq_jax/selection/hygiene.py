"""Rows of the pool that repeat each other, a target or a test: pairs, and which rows to drop.

A pair is reported once, under the first kind that holds:

    exact       the same words: case, punctuation, white space and Unicode variants aside
    options     the same lines in another order, their option letters aside
    near        Jaccard similarity of the sets of word shingles
    excerpt     the longer text holds most shingles of the shorter, one run of 8 words among them
    ngram       a run of 13 words in common with a target or a test: the usual contamination test
    paraphrase  cosine of the encoder's mean-pooled embeddings

Compared are the questions with their options, and inside the pool also whole rows (question,
reasoning, answer), by all kinds but the last two. For excerpt and ngram a shared run counts only if
it is no boilerplate, as `texts.sharing` has it. Rows without text (pre-tokenised ones) are not
compared.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from diq_jax import selection_config
from diq_jax.selection import texts

KINDS = ("exact", "options", "near", "excerpt", "ngram", "paraphrase")
EXCERPT_WORDS = 8  # the run that an excerpt shares at least; shorter ones are stock phrases
BLOCK = 1024  # rows of a block of cosines

Embed = Callable[[Sequence[str]], np.ndarray]  # n texts -> (n, D)
Found = Iterator[tuple[int, int, str, float]]  # two texts, kind, similarity


@dataclasses.dataclass(frozen=True)
class ComparedRow:
    """Holds what is compared of a row; `place` is pool for the pool's rows."""

    example_id: str
    place: str
    question: str  # its options included, as lines
    completion: str  # reasoning and answer; "" for a row of choices


class Repeat(NamedTuple):
    """Names a pool row and what it repeats; inside the pool, `other` has the smaller id."""

    example_id: str
    other: str
    other_in: str
    kind: str
    similarity: float


def ask(stem: str, choices: Iterable[str]) -> str:
    """Writes a question with its choices as lines "A. ...", as the pool's questions carry them."""
    return "\n".join([stem, *(f"{chr(ord('A') + i)}. {c}" for i, c in enumerate(choices))])


def find(
    pool: Sequence[ComparedRow],
    against: Sequence[ComparedRow],
    settings: selection_config.Selection,
    embed: Embed | None,
) -> list[Repeat]:
    """Finds all pairs, sorted; they depend on the rows, not on their order.

    Args:
        against: targets and tests; they are not compared with each other.
        settings: its thresholds.
        embed: gives embeddings of questions; None leaves paraphrases out.
    """
    pool = sorted(pool, key=lambda row: row.example_id)
    rows = [*pool, *sorted(against, key=lambda row: (row.place, row.example_id))]
    questions = [row.question for row in rows]
    whole = [f"{row.question}\n{row.completion}" if row.completion else "" for row in pool]
    best: dict[tuple[int, int], tuple[int, float]] = {}
    for view, encode in ((questions, embed), (whole, None)):
        for i, j, kind, similarity in _row_pairs(view, len(pool), settings, encode):
            found = KINDS.index(kind), -similarity
            best[i, j] = min(best.get((i, j), found), found)
    pairs = []
    for (i, j), (kind, similarity) in best.items():
        row, other = (rows[j], rows[i]) if j < len(pool) else (rows[i], rows[j])
        pairs.append(
            Repeat(row.example_id, other.example_id, other.place, KINDS[kind], -similarity)
        )
    return sorted(pairs)


def dropped(pairs: Sequence[Repeat]) -> dict[str, Repeat]:
    """Returns the rows to leave out, each with a pair that is the reason.

    First go all that overlap a target or a test; then, by id, each that repeats a row which stays:
    so no pair is left.
    """
    out: dict[str, Repeat] = {}
    for pair in sorted(pairs):
        if pair.other_in != "pool":
            out.setdefault(pair.example_id, pair)
    for pair in sorted(pairs):
        if pair.other_in == "pool" and pair.other not in out:
            out.setdefault(pair.example_id, pair)
    return out


def _row_pairs(view, pool, settings, embed) -> Found:
    """Yields pairs of rows, the first of the two in the pool; rows of equal words are one text."""
    groups: dict[texts.Words, list[int]] = {}
    for row, text in enumerate(view):
        if found := texts.words(text):
            groups.setdefault(found, []).append(row)
    if not groups:
        return
    members = list(groups.values())
    for same in members:
        yield from ((i, j, "exact", 1.0) for i in same if i < pool for j in same if i < j)
    raw = [view[same[0]] for same in members]
    in_pool = np.array([same[0] < pool for same in members])
    for u, v, kind, similarity in _text_pairs(raw, in_pool, settings, embed):
        for i, j in (sorted((i, j)) for i in members[u] for j in members[v]):
            if i < pool and (kind != "ngram" or j >= pool):
                yield i, j, kind, similarity


def _text_pairs(raw, in_pool, settings, embed) -> Found:
    """Yields pairs of texts, one of them in the pool; a pair may come under several kinds."""
    # A run of words that goes on through the letters of options would be longer than it is.
    distinct = [texts.unlettered(text) for text in raw]

    def compared(candidates):
        return ((u, v) for u, v in candidates if in_pool[u] or in_pool[v])

    cut = functools.cache(lambda u, n: texts.shingles(distinct[u], n))
    n, limit = settings.shingle_words, settings.boilerplate_texts
    yield from _shuffled(raw)
    for u, v in compared(texts.alike(distinct, n, settings.near_similarity)):
        similarity = texts.jaccard(cut(u, n), cut(v, n))
        if similarity >= settings.near_similarity:
            yield u, v, "near", similarity
    for u, v in compared(texts.sharing(distinct, EXCERPT_WORDS, limit)):
        similarity = texts.containment(cut(u, n), cut(v, n))
        if similarity >= settings.excerpt_containment:
            yield u, v, "excerpt", similarity
    if not in_pool.all():
        for u, v in compared(texts.sharing(distinct, settings.ngram_words, limit)):
            runs = (cut(u, settings.ngram_words), cut(v, settings.ngram_words))
            yield u, v, "ngram", texts.containment(*runs)
    if embed is not None:
        yield from _paraphrases(embed(raw), settings.paraphrase_similarity)


def _shuffled(raw) -> Found:
    groups: dict[tuple[texts.Words, ...], list[int]] = {}
    for u, text in enumerate(raw):
        if found := texts.lines(text):
            groups.setdefault(found, []).append(u)
    for same in groups.values():
        yield from ((u, v, "options", 1.0) for u in same for v in same if u < v)


def _paraphrases(vectors, threshold) -> Found:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for start in range(0, len(unit), BLOCK):
        cosine = unit[start : start + BLOCK] @ unit.T
        for u, v in np.argwhere(cosine >= threshold).tolist():
            if start + u < v:
                yield start + u, v, "paraphrase", float(cosine[u, v])
