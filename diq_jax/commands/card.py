"""Cards of models and data sets: the source, the selection, the numbers and the license."""

import pathlib
from collections.abc import Mapping
from typing import Any

from diq_jax import errors
from diq_jax.run import reading, records

CARD = "README.md"


def of_model(base: str, revision: str, adapter: pathlib.Path) -> str:
    """Writes the card of `base` with `adapter` merged, in Markdown.

    Where the adapter lies in a run, the card has its method, its config and its numbers.
    """
    is_hub_id = not pathlib.Path(base).exists() and base.count("/") == 1 and ":" not in base
    head = ["---", *([f"base_model: {base}"] if is_hub_id else []), "library_name: transformers"]
    lines = [
        *head, "tags: [diq_jax]", "---", "", f"# {pathlib.Path(base).name}, fine-tuned",
        "", f"Base model: {base}{f', revision {revision}' if revision else ''}.", "",
        "License: these weights are derived from the base model, whose license and terms of use "
        "apply, and so may those of the data that the adapter was trained on. This file grants "
        "nothing beyond them. Not for use in the care of patients.",
    ]  # fmt: skip
    workdir = adapter.absolute().parents[1]
    if (workdir / "selection" / records.NAME).is_file():
        lines += ["", "## Selection", "", *_selection(workdir)]
    return "\n".join([*lines, *_results(workdir)]) + "\n"


def of_data(workdir: pathlib.Path, file: str) -> str:
    """Writes the card of the rows that a finished run selected, in Markdown.

    Args:
        file: that holds them, beside the card.

    Raises:
        UserError: the selection is not finished.
    """
    lines = [
        "---", "tags: [diq_jax]", "task_categories: [text-generation]", "configs:",
        "- config_name: default", f"  data_files: {file}", "---", "", f"# {workdir.name}, selected",
        "", "Rows of a larger pool, best first, as chats that are ready to train on.", "",
        "License: the rows are those of the pool, whose license and terms of use apply. This file "
        "grants nothing beyond them. Not for use in the care of patients.",
        "", "## Selection", "", *_selection(workdir), *_results(workdir),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def push(folder: pathlib.Path, repository: str, kind: str = "model") -> str:
    """Uploads a folder as a private repository of the hub. Returns where it is.

    Args:
        kind: model or dataset.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    hub = huggingface_hub.HfApi()
    try:
        made = hub.create_repo(repository, private=True, exist_ok=True, repo_type=kind)
        hub.upload_folder(repo_id=repository, folder_path=folder, repo_type=kind)
    except (OSError, ValueError, hub_errors.HfHubHTTPError) as e:
        said = " ".join(str(e).split())[:200]
        raise errors.UserError(f"--push: {repository} cannot be written: {said}.") from None
    return str(made)


def _selection(workdir: pathlib.Path) -> list[str]:
    record = records.finished(workdir, "selection")
    cfg = record["config"]
    return [
        f"- method {cfg['selection']['method']}, retention_ratio "
        f"{cfg['selection']['retention_ratio']}: {record.get('selected', '?')} of "
        f"{record['rows']:,} rows",
        f"- pool {cfg['data']['pool']}, targets {cfg['data']['targets']}, template "
        f"{cfg['data']['template']}",
        f"- diq_jax {record.get('versions', {}).get('diq_jax', '?')}",
    ]


def _results(workdir: pathlib.Path) -> list[str]:
    """Returns the run's numbers as a section; nothing where it has none."""
    results = workdir / "evaluate/results.json"
    if not results.is_file():
        return []
    found = reading.read_record(results, {"models": dict, "tests": int})
    return ["", f"## Results on {found['tests']:,} test questions", "", *_numbers(found)]


def _numbers(results: Mapping[str, Any]) -> list[str]:
    """Tables the mean and the 95 % interval of each model's metrics."""
    models = results["models"]
    names = [
        name
        for name, value in next(iter(models.values())).items()
        if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys()
    ]
    rows = [
        [
            model,
            *(f"{of[n]['mean']:.4g} ({of[n]['low']:.4g} to {of[n]['high']:.4g})" for n in names),
        ]
        for model, of in models.items()
    ]
    table = [["model", *names], ["---"] * (len(names) + 1), *rows]
    return [f"| {' | '.join(row)} |" for row in table]
