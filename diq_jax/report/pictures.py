"""The pictures of a run's report, each with the columns that it shows."""

from collections.abc import Callable, Mapping

import numpy as np

from diq_jax.report import classifier, figures, inputs, outcomes, studies, style, tables

PREFERENCES = {"loss": "loss (nats)", "margin": "margin (nats)", "accuracy": "pairs in order"}


def draw(run: inputs.ReportData) -> dict[str, style.Picture]:
    """Draws {name: picture}, without those that this run has no data for."""
    found = {name: make(run) for name, make in PICTURES.items()}
    return {name: picture for name, picture in found.items() if picture is not None}


def _points(run, name):
    """Returns (values of a score, influence, whether selected) of the rows of a scatter."""
    return (v[run.drawn] for v in (run.examples[name], run.influence, run.examples["selected"]))


def _quadrants(run):
    if not run.has_difficulty:
        return None
    x, y, chosen = _points(run, "difficulty")
    shown = {"difficulty": x, "influence": y, "selected": chosen}
    rest = run.quadrant_counts, run.thresholds
    return style.render(shown, figures.quadrants, x, y, chosen, *rest)


def _tokens(run):
    x, y, chosen = _points(run, "tokens")
    shown = {"answer_tokens": x, "influence": y, "selected": chosen}
    rho = tables.correlation(run.examples["influence"], run.examples["tokens"])
    return style.render(shown, figures.tokens, x, y, chosen, rho)


def _distributions(run):
    panels = [(figures.INFLUENCE, run.influence, run.thresholds["influence"])]
    if run.has_difficulty:
        difficulty = run.examples["difficulty"], run.thresholds["difficulty"]
        panels.insert(0, (figures.DIFFICULTY, *difficulty))
    rows = []
    for name, values, _ in panels:
        edges, *shares = figures.shares(values, run.examples["selected"])
        for low, high, pool, chosen in zip(edges[:-1], edges[1:], *shares, strict=True):
            bin_ = {"score": name, "from": low, "to": high}
            rows.append(bin_ | {"pool_percent": pool, "selected_percent": chosen})
    return style.render(_columns(rows), figures.distributions, panels, run.examples["selected"])


def _sources(run):
    shares = tables.group_shares(run.examples["source"], run.examples["selected"])
    if len(shares) < 2:
        return None
    names, *counts = zip(*shares, strict=True)
    pool, picked = (100 * np.array(n) / max(1, sum(n)) for n in counts)
    shown = {"source": names, "pool_percent": pool, "selected_percent": picked}
    return style.render(shown, figures.sources, names, pool, picked)


def _comparison(run):
    if not run.results:
        return None
    panels = outcomes.panels(run.results)
    rows = [
        {"panel": title, "arm": arm, **value} for title, dots, _ in panels for arm, value in dots
    ]
    return style.render(_columns(rows), figures.comparison, panels)


def _loss(run):
    if not run.losses:
        return None
    names = ("arm", "step", "loss", "target_loss")
    shown = {name: [entry.get(name) for entry in run.losses] for name in names}
    curves = (_curves(run.losses, name) for name in names[2:])
    return style.render(shown, figures.loss, *curves)


def _curves(losses, name):
    """Returns {arm: (steps, values)} of the steps that have the value."""
    curves: dict[str, tuple[list, list]] = {}
    for entry in losses:
        if name in entry:
            steps, values = curves.setdefault(entry["arm"], ([], []))
            steps.append(entry["step"])
            values.append(entry[name])
    return curves


def _preferences(run):
    if not run.preferences:
        return None
    shown = {n: [entry[n] for entry in run.preferences] for n in ("step", *PREFERENCES)}
    curves = {label: shown[name] for name, label in PREFERENCES.items()}
    return style.render(shown, figures.preferences, shown["step"], curves)


def _classifier(run):
    perspectives = classifier.panels(run.classifier)
    if not perspectives:
        return None
    return style.render(_columns(classifier.rows(perspectives)), classifier.draw, perspectives)


def _study(run):
    return studies.picture(run.study) if run.study else None


def _columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


PICTURES: Mapping[str, Callable[[inputs.ReportData], style.Picture | None]] = {
    "classifier": _classifier,
    "comparison": _comparison,
    "distributions": _distributions,
    "loss": _loss,
    "preferences": _preferences,
    "quadrants": _quadrants,
    "sources": _sources,
    "study": _study,
    "tokens": _tokens,
}
