"""A study's figure, in the report's style: NAME.png, NAME.svg and, with what it shows, NAME.csv."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.figure
import pandas

from diq_jax.report import style
from diq_jax.run import artifacts


def write(
    folder: pathlib.Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[..., matplotlib.figure.Figure],
    *args: Any,
) -> None:
    """Draws `draw(*args)` and writes it, and the rows that it shows, atomically.

    Args:
        rows: of any depth; a value in a mapping becomes a column "outer.inner", a list JSON.
    """
    table = pandas.json_normalize([dict(row) for row in rows])
    columns = table.map(lambda x: json.dumps(x) if isinstance(x, (list, tuple)) else x)
    for suffix, made in style.render(columns.to_dict("list"), draw, *args).files.items():
        with artifacts.atomic(folder / f"{name}.{suffix}") as temporary:
            temporary.write_bytes(made)


def title(figure: matplotlib.figure.Figure, text: str) -> None:
    """Puts a title over all panels, at the left."""
    figure.suptitle(text, fontsize=10, fontweight="bold", x=0.01, ha="left")
