"""The report's pictures, each a function of arrays."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib import layout_engine

from diq_jax.report.style import ARMS, POOL, SELECTED, THRESHOLD

QUADRANTS = {
    1: "hard, high influence",
    2: "easy, high influence",
    3: "hard, low influence",
    4: "easy, low influence",
}
DIFFICULTY, INFLUENCE = "difficulty (level)", "influence (nats per unit learning rate)"
PICKED = (POOL, *ARMS[:2], SELECTED)  # by neither of two, by one, by the other, by both
CORNERS = {1: (1, 1), 2: (0, 1), 3: (1, 0), 4: (0, 0)}


def fences(values: np.ndarray) -> tuple[float, float]:
    """Finds the range to draw: all values, or the middle 90 % and its width on either side."""
    low, high = float(np.min(values)), float(np.max(values))
    inner = np.percentile(values, 5, method="higher"), np.percentile(values, 95, method="lower")
    width = float(inner[1] - inner[0])
    if width <= 0 or high - low <= 4 * width:
        return low, high
    return max(low, float(inner[0]) - width), min(high, float(inner[1]) + width)


def shown(selected: np.ndarray, rank: np.ndarray, most: int) -> np.ndarray:
    """Finds at most `most` examples to draw, as indices: selected ones first, spread by rank."""
    order = np.argsort(rank, kind="stable")
    chosen, others = order[selected[order]], order[~selected[order]]
    chosen = _spread(chosen, max(most // 2, most - len(others)))
    return np.concatenate([chosen, _spread(others, most - len(chosen))])


def _spread(items, most):
    places = np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)
    return items[places]


def quadrants(
    difficulty: np.ndarray,
    influence: np.ndarray,
    selected: np.ndarray,
    counts: Mapping[int, tuple[int, int]],
    thresholds: Mapping[str, float | None],
) -> matplotlib.figure.Figure:
    """Draws the scatter of the two scores (n,), thresholds too; influence inside its fences.

    Args:
        counts: {quadrant: (examples, selected ones)} of the whole pool.
        thresholds: difficulty, influence; None where the cut is not on what is drawn.
    """
    figure, [ax] = _figure(5.2)
    _points(ax, difficulty, influence, selected)
    ax.set_xlim(*limits(difficulty))
    ax.set_ylim(*limits(influence))
    for line, axis in ((ax.axvline, "difficulty"), (ax.axhline, "influence")):
        if thresholds[axis] is not None:
            line(thresholds[axis], **THRESHOLD)
    for quadrant, (x, y) in CORNERS.items():
        ax.annotate(
            quadrant_label(quadrant, counts), (x, y), (-6 if x else 6, -6 if y else 6),
            xycoords="axes fraction", textcoords="offset points", ha="right" if x else "left",
            va="top" if y else "bottom", fontweight="bold",
        )  # fmt: skip
    difficulty_title, influence_title = axis_titles(thresholds)
    ax.set_xlabel(difficulty_title)
    ax.set_ylabel(influence_title)
    _legend_above(figure)
    return figure


def axis_titles(thresholds: Mapping[str, float | None]) -> tuple[str, str]:
    """Names the axes of difficulty and influence, with their thresholds."""

    def title(name: str, axis: str, digits: str) -> str:
        at = thresholds[axis]
        return name if at is None else f"{name}, threshold {at:{digits}}"

    return title(DIFFICULTY, "difficulty", ".2f"), title(INFLUENCE, "influence", ".3g")


def quadrant_label(quadrant: int, counts: Mapping[int, tuple[int, int]]) -> str:
    """Writes the name of a quadrant and its counts."""
    examples, chosen = counts[quadrant]
    return f"Q{quadrant} {QUADRANTS[quadrant]}: {examples:,}, {chosen:,} selected"


def tokens(
    answer_tokens: np.ndarray, influence: np.ndarray, selected: np.ndarray, rho: str
) -> matplotlib.figure.Figure:
    """Draws influence against the number of answer tokens: the length confound, for the eye."""
    figure, [ax] = _figure(4)
    _points(ax, answer_tokens, influence, selected)
    if np.max(answer_tokens) > 20 * np.median(answer_tokens):
        _logarithmic(ax, "x")
    else:
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("answer tokens (scored)")
    ax.set_ylabel(INFLUENCE)
    ax.set_title(f"Spearman {rho}")
    _legend_above(figure)
    return figure


def distributions(
    panels: Sequence[tuple[str, np.ndarray, float | None]], selected: np.ndarray
) -> matplotlib.figure.Figure:
    """Draws histograms: the selected examples' shares over those of the whole pool.

    Args:
        panels: axis label, scores (n,), threshold or None.
    """
    figure, axes = _figure(3.2, len(panels))
    for ax, (label, values, threshold) in zip(axes, panels, strict=True):
        _histogram(ax, values, selected)
        if threshold is not None:
            ax.axvline(threshold, **THRESHOLD, label="threshold")
        ax.set_xlabel(label)
    axes[0].set_ylabel("share of group (%)")
    _legend_above(figure)
    return figure


def shares(values: np.ndarray, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (edges (b + 1,), the pool's share in each bin, the selection's, (b,)), in percent."""
    low, high = np.min(values), np.max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 25)
    pool, chosen = (np.histogram(v, edges)[0] for v in (values, values[selected]))
    return edges, 100 * pool / max(1, len(values)), 100 * chosen / max(1, selected.sum())


def _histogram(ax, values, selected):
    edges, pool, chosen = shares(values, selected)
    ax.stairs(pool, edges, fill=True, color=POOL, alpha=0.45, label=f"pool, {len(values):,} rows")
    ax.stairs(chosen, edges, color=SELECTED, linewidth=1.6, label=f"selected, {selected.sum():,}")
    ax.grid(axis="x", visible=False)


def sources(
    names: Sequence[str], pool_share: np.ndarray, selected_share: np.ndarray
) -> matplotlib.figure.Figure:
    """Draws the share of the pool and share of the selection, in percent, by source."""
    places = np.arange(len(names))
    figure, [ax] = _figure(1.1 + 0.42 * len(names))
    ax.barh(places - 0.19, pool_share, 0.36, color=POOL, alpha=0.6, label="pool")
    ax.barh(places + 0.19, selected_share, 0.36, color=SELECTED, label="selected")
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    ax.set_yticks(places, [textwrap.shorten(name, 32, placeholder=" …") for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("share (%)")
    ax.grid(axis="y", visible=False)
    _legend_above(figure)
    return figure


def comparison(
    panels: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, float]]], bool]],
) -> matplotlib.figure.Figure:
    """Draws dots with 95 % intervals.

    Args:
        panels: title with unit, [(arm, {mean, low, high})], whether a line marks zero. Arms stand
            in one order in all panels, from the top down.
    """
    arms = list(dict.fromkeys(arm for _, dots, _ in panels for arm, _ in dots))
    colours = arm_colours(arms)
    figure, axes = _figure(1.0 + 0.42 * len(arms), len(panels), sharey=True)
    for ax, (title, dots, zero) in zip(axes, panels, strict=True):
        for arm, value in dots:
            y = arms.index(arm)
            ax.plot([value["low"], value["high"]], [y, y], color=colours[arm], linewidth=2)
            ax.plot(value["mean"], y, "o", color=colours[arm], markersize=6)
        if zero:
            ax.axvline(0, **THRESHOLD)
        ax.set_title(textwrap.fill(title, 80 // len(panels)))
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, prune="both"))
        ax.margins(x=0.08)
        ax.grid(axis="y", visible=False)
    engine = figure.get_layout_engine()
    assert isinstance(engine, layout_engine.ConstrainedLayoutEngine)  # by STYLE
    engine.set(wspace=0.06)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """Gives every arm its color, the same in all figures."""
    fixed = {"selected": SELECTED, "base": POOL}
    others = [arm for arm in arms if arm not in fixed]
    return fixed | {arm: ARMS[i % len(ARMS)] for i, arm in enumerate(others)}


Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def loss(curves: Curves, targets: Curves) -> matplotlib.figure.Figure:
    """Draws training loss by step, an arm a line, many as a running mean; dashed: targets' loss."""
    figure, [ax] = _figure(3.4)
    colours = arm_colours(list(curves))
    for arm, (steps, losses) in curves.items():
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        if window > 1:
            ax.plot(steps, losses, color=colours[arm], linewidth=0.6, alpha=0.3)
        ax.plot(
            steps[window - 1 :], smooth, color=colours[arm], label=arm, linewidth=1.6,
            marker="o" if len(losses) <= 40 else "", markersize=3,
        )  # fmt: skip
    for arm, (steps, losses) in targets.items():
        ax.plot(
            steps, losses, color=colours[arm], label=f"{arm}, targets",
            linewidth=1.2, linestyle="--", marker="s", markersize=3,
        )  # fmt: skip
    ax.set_xlabel("optimiser step")
    ax.set_ylabel("loss (nats per token)" if targets else "training loss (nats per token)")
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _legend_above(figure)
    return figure


def preferences(
    steps: Sequence[int], panels: Mapping[str, Sequence[float]]
) -> matplotlib.figure.Figure:
    """Draws DPO's loss, margin and accuracy of each step's pairs.

    Args:
        panels: {axis label: a value for each step}.
    """
    figure, axes = _figure(2.6, len(panels))
    for ax, (label, values) in zip(axes, panels.items(), strict=True):
        ax.plot(steps, values, color=SELECTED, linewidth=1.6)
        ax.set_xlabel("optimiser step")
        ax.set_title(label)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    return figure


def overlap(
    budget: np.ndarray, share: np.ndarray, kept: Mapping[str, float]
) -> matplotlib.figure.Figure:
    """Draws the share of a budget that two orders have in common.

    Args:
        budget, share: in percent, (k,).
        kept: {run: its own budget in percent}.
    """
    figure, [ax] = _figure(3.2)
    ax.plot(budget, share, color=SELECTED, linewidth=1.6, label="in both")
    ax.plot(budget, budget, **THRESHOLD, label="by chance")
    for (name, at), colour in zip(kept.items(), ARMS, strict=False):
        ax.axvline(at, color=colour, linewidth=1, label=f"budget of {name}")
    _logarithmic(ax, "x")
    ax.set_ylim(0, 104)
    ax.set_xlabel("budget (% of the pool)")
    ax.set_ylabel("in both (% of the budget)")
    _legend_above(figure)
    return figure


def rank_rank(
    ranks: Mapping[str, np.ndarray], picked: np.ndarray, labels: Sequence[str]
) -> matplotlib.figure.Figure:
    """Draws the ranks of one run against those of the other.

    Args:
        ranks: {run: (n,)}, two of them.
        picked: (n,), a place in `labels` and in PICKED.
    """
    figure, [ax] = _figure(5.2)
    (x_name, x), (y_name, y) = ranks.items()
    for code, (label, colour) in enumerate(zip(labels, PICKED, strict=True)):
        of = picked == code
        style = dict(s=24 if code else 14, linewidths=0, alpha=0.85 if code else 0.5)
        ax.scatter(x[of], y[of], color=colour, label=label, rasterized=len(x) > 2000, **style)
    _logarithmic(ax, "x", "y")
    ax.set_xlabel(f"rank, {x_name}")
    ax.set_ylabel(f"rank, {y_name}")
    _legend_above(figure)
    return figure


def limits(values: np.ndarray) -> tuple[float, float]:
    """Finds the axis range: all values, with room above and below for the quadrants' labels."""
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.12 * (high - low) or 0.5
    return low - pad, high + pad


def _figure(height, columns=1, **options):
    """Makes a figure of the page's width: (figure, its axes from left to right)."""
    figure = matplotlib.figure.Figure((8, height))
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def _logarithmic(ax, *names):
    """Makes axes logarithmic, with plain numbers: the style reads no formulas."""
    for name in names:
        ax.set(**{f"{name}scale": "log"})
        ax.tick_params(axis=name, which="minor", **{f"label{s}": False for s in ("left", "bottom")})
        getattr(ax, f"{name}axis").set_major_formatter(
            matplotlib.ticker.StrMethodFormatter("{x:,g}")
        )


def _points(ax, x, y, selected):
    raster = len(x) > 2000  # as many vector marks would make the page heavy
    for group, name, style in (
        (~selected, "not selected", dict(s=18, color=POOL, alpha=0.6)),
        (selected, "selected", dict(s=30, color=SELECTED, marker="D")),
    ):
        style |= {"linewidths": 0, "label": f"{name}, {group.sum():,} drawn", "rasterized": raster}
        ax.scatter(x[group], y[group], **style)


def _legend_above(figure):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9)
