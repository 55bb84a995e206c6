"""The picture of the difficulty classifier: calibration, and which levels it takes for which."""

from collections.abc import Mapping
from typing import Any

import matplotlib.figure
import numpy as np

from diq_jax.report import style


def panels(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Finds the perspectives of difficulty/metrics.json that have what `draw` needs."""
    every = found.get("perspectives", {})
    return {name: values for name, values in every.items() if "calibration" in values}


def rows(perspectives: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lists the points and cells that `draw` shows, each with its count of labelled rows."""
    found = []
    for name, values in perspectives.items():
        for key in ("before", "after"):
            for b in values["calibration"][key]["reliability"]:
                found.append((name, f"reliability {key}", b["confidence"], b["right"], b["rows"]))
        for (label, level), count in np.ndenumerate(np.array(values["confusion"])):
            found.append((name, "confusion", level + 1.0, label + 1.0, int(count)))
    return [
        dict(zip(("perspective", "panel", "x", "y", "rows"), row, strict=True)) for row in found
    ]


def draw(perspectives: Mapping[str, Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draws for each perspective reliability before and after the temperature, and confusion."""
    figure = matplotlib.figure.Figure((8, 3.3 * len(perspectives)))
    axes = figure.subplots(len(perspectives), 2, squeeze=False)
    for (name, values), (left, right) in zip(perspectives.items(), axes, strict=True):
        _reliability(left, values["calibration"])
        left.set_title(name)
        _confusion(right, np.array(values["confusion"]))
    return figure


def _reliability(ax, calibration):
    ax.plot([0, 1], [0, 1], **style.THRESHOLD)
    after = f"temperature {calibration['temperature']:.2f}"
    styles = (("before", style.POOL, "as it is"), ("after", style.ARMS[0], after))
    for key, colour, label in styles:
        bins, error = calibration[key]["reliability"], calibration[key]["ece"]
        x, y = ([b[axis] for b in bins] for axis in ("confidence", "right"))
        label = f"{label}: ECE {error:.3f}"
        ax.plot(x, y, "o-", color=colour, markersize=4, linewidth=1, label=label)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("probability of the likeliest level")
    ax.set_ylabel("share that is right")
    ax.legend(fontsize=8, loc="upper left")


def _confusion(ax, counts):
    """Counts by label (rows, from the bottom) and level (columns), shaded by share of the label."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    steps = np.arange(1, len(counts) + 1)
    # Cells as vectors: an image would be an address inside the page's SVG.
    ax.pcolormesh(share, cmap="Greys", vmin=0, vmax=1.6)
    for (row, column), count in np.ndenumerate(counts):
        ax.annotate(f"{count:,}", (column + 0.5, row + 0.5), ha="center", va="center", fontsize=8)
    ax.set_xticks(steps - 0.5, steps)
    ax.set_yticks(steps - 0.5, steps)
    ax.grid(visible=False)
    ax.set_xlabel("level, rounded")
    ax.set_ylabel("label, rounded")
