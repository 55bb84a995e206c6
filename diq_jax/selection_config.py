"""The section `selection` of the configuration (config.py)."""

import dataclasses
from collections.abc import Iterator

from diq_jax import fields
from diq_jax.fields import field


@dataclasses.dataclass(frozen=True)
class Selection(fields.Section, section="selection", decides=("selection",)):
    """Says how the pool is ordered, and how much of it is kept."""

    method: str = field(
        "diq",
        "The method that orders the pool: diq, or another one to compare it with "
        "(selection/methods.py); file:PATH takes the examples of a JSONL of example_id, in its "
        "order.",
    )
    retention_ratio: float = field(0.1, "The share of the pool to keep.", fields.SHARE)
    edits: str = field(
        "",
        "A JSONL of example_id, decision (keep or never) and reason, such as the report exports: "
        "kept examples rank first, the others last and are never selected.",
    )
    seed: int = field(0, "The seed of the random order.", fields.SEED)
    hygiene: str = field(
        "report",
        "What happens to rows that repeat another, a target or a test: nothing (off), a report "
        "(hygiene.parquet), or they rank last and are never selected (remove).",
        choices=("off", "report", "remove"),
    )
    near_similarity: float = field(
        0.6,
        "The Jaccard similarity of two texts' shingles from which they are near duplicates.",
        fields.SHARE,
    )
    excerpt_containment: float = field(
        0.8,
        "The share of the shorter text's shingles in the longer from which it is an excerpt.",
        fields.SHARE,
    )
    shingle_words: int = field(3, "How many words a shingle has.", fields.Span(1, 1000))
    ngram_words: int = field(
        13,
        "How many words in a row a pool row may not share with a target or a test.",
        fields.Span(1, 1000),
    )
    boilerplate_texts: int = field(
        10,
        "A phrase in more texts than this, or in more than one in a thousand, is boilerplate, "
        "which may be shared.",
        fields.COUNT._replace(least=2),
    )
    paraphrase_similarity: float = field(
        0.0,
        "The cosine of difficulty.encoder's embeddings from which questions are paraphrases, "
        "such as 0.9; 0 = none are looked for.",
        fields.UNIT,
    )
    quadrant_order: str = field(
        "1,2,3,4", "The order in which diq fills the budget from the quadrants 1, 2, 3 and 4."
    )
    source_cap: float = field(
        1.0,
        "The largest share of the budget from one `source` of the pool; below 1 a smaller budget "
        "need not lie inside a larger one.",
        fields.SHARE,
    )
    length_residual: bool = field(
        False, "Sorts and cuts by what a regression on log answer tokens leaves of the influence."
    )
    band_center: float = field(
        50.0,
        "method=adaptive: the center of the band of difficulty at 1 % of the pool, as a "
        "percentile.",
        fields.Span(0, 100),
    )
    band_rise: float = field(
        25.0,
        "method=adaptive: by how many percentiles the center rises for ten times the budget.",
        fields.Span(-100, 100),
    )
    band_width: float = field(
        50.0, "method=adaptive: the width of the band, in percentiles.", fields.Span(0, 200)
    )

    def conflicts(self) -> Iterator[tuple[bool, str]]:
        """Yields orders and budgets that are none."""
        yield (
            sorted(self.quadrant_order.split(",")) != ["1", "2", "3", "4"],
            "selection.quadrant_order must be 1, 2, 3 and 4 in some order, separated by commas; "
            f"got {self.quadrant_order!r}.",
        )

    @property
    def band(self) -> tuple[float, float, float]:
        """Returns the center at 1 % of the pool, rise for ten times the budget, and width."""
        return self.band_center, self.band_rise, self.band_width

    @property
    def quadrants(self) -> tuple[int, ...]:
        """Returns the quadrants in the order in which they fill the budget."""
        return tuple(int(q) for q in self.quadrant_order.split(","))
