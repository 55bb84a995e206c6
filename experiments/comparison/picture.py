"""Score against budget: a line for each method, random as a band, the base model as a level.

A bar is the 95 % interval of the paired difference to random, around the method's mean: it leaves
random's line out where the difference is shown. (Intervals of the scores themselves are as wide as
questions differ, many times that.) The band reaches from random's lowest seed to its highest.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from diq_jax.report import figures, style

PANELS = {  # metric: (title, factor)
    "test_loss_without_end": ("test loss without end of turn (nats/token)", 1),
    "test_loss": ("test loss (nats/token)", 1),
    "target_loss": ("target loss (nats/token)", 1),
    "accuracy": ("accuracy (%)", 100),
}
NOTE = "Bars: 95 % interval of the paired difference to random; for the full pool, its seeds."
MARKERS = "oDs^vPX<>*"
RANDOM, FULL, BASE = "random", "full", "base"


def lines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists what `draw` shows, for CSV: a line for each method, budget and metric."""
    return [
        {name: row[name] for name in ("method", "budget", "unit")}
        | {"metric": metric, "mean": found["mean"], "by_seed": found["by_seed"]}
        | {f"versus_random.{end}": value for end, value in (found["versus"] or {}).items()}
        for row in results["rows"]
        for metric, found in ((m, row["metrics"][m]) for m in PANELS)
    ]


def draw(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Draws a panel for each of PANELS; budgets on a logarithmic scale, methods side by side.

    Args:
        results: compare/results.json.
    """
    unit = results["rows"][-1]["unit"] if len(results["rows"]) > 1 else "rows"
    rows = [r for r in results["rows"] if r["unit"] == unit or r["method"] in (BASE, FULL)]
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m not in (RANDOM, FULL, BASE)]
    figure = matplotlib.figure.Figure((8, 6.2))
    axes = figure.subplots(2, 2).flat
    for ax, (metric, (title, factor)) in zip(axes, PANELS.items(), strict=True):
        _panel(ax, rows, methods, metric, factor)
        ax.set_title(title)
        ax.set_xscale("log")
        ax.set_xticks(budgets, [f"{100 * b:g}" for b in budgets])
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set_xlim(budgets[0] / 1.5, budgets[-1] * 1.5)
        ax.grid(axis="x", visible=False)
        ax.set_xlabel("budget (% of the pool)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=4, fontsize=9, title=NOTE,
        title_fontsize=9, alignment="left",
    )  # fmt: skip
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    return figure


def _panel(ax, rows, methods, metric, factor):
    def points(method):
        """(budgets (n,), means (n,), lowest and highest seed (n, 2), paired interval (n, 2))."""
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["budget"])
        found = [r["metrics"][metric] for r in mine]
        means = np.array([f["mean"] for f in found])
        seeds = np.array([[min(f["by_seed"]), max(f["by_seed"])] for f in found])
        gaps = [f["versus"] or {"low": 0, "high": 0, "mean": 0} for f in found]
        ends = np.array([[g["low"] - g["mean"], g["high"] - g["mean"]] for g in gaps])
        budgets = np.array([r["budget"] for r in mine])
        return budgets, factor * means, factor * seeds, factor * (means[:, None] + ends)

    ax.axhline(points(BASE)[1][0], **style.THRESHOLD, label="base model")
    x, y, seeds, _ = points(RANDOM)
    if len(x) == 1:  # a band needs some width
        ax.fill_between(x * [1 / 1.15, 1.15], *seeds[0], color=style.POOL, alpha=0.3, linewidth=0)
    elif len(x):
        ax.fill_between(x, *seeds.T, color=style.POOL, alpha=0.3, linewidth=0)
    if len(x):
        ax.plot(x, y, "-o", color=style.MUTED, label="random, and its seeds", markersize=4)
    colours = figures.arm_colours(methods)
    for k, method in enumerate(methods):
        x, y, _, interval = points(method)
        x = x * 1.05 ** ((k // 2 + 1) * (1 if k % 2 else -1))  # side by side, random in the middle
        colour = style.SELECTED if method == "diq" else colours[method]
        ax.vlines(x, *interval.T, color=colour, linewidth=1.2)
        marker = MARKERS[k % len(MARKERS)]
        ax.plot(x, y, f"-{marker}", color=colour, label=method, markersize=5, linewidth=1.2)
    x, y, seeds, _ = points(FULL)
    if len(x):
        ax.vlines(x, *seeds.T, color=style.INK, linewidth=1.2)
        ax.plot(x, y, "*", color=style.INK, label="full pool, and its seeds", markersize=9)
