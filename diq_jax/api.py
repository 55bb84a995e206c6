"""The public functions that join several rooms. `diq_jax` names them and all others."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from diq_jax import config, errors, fields, influence_config
from diq_jax.data import chat, encoded, example
from diq_jax.influence import score as influence
from diq_jax.models import load, tokenizer
from diq_jax.run import devices, reading, records

Rows = Sequence[example.Example] | Sequence[example.Encoded]


def score(
    model: load.Model,
    pool: Rows,
    targets: Rows,
    *,
    template: str = config.Data().template,
    date: str = config.Data().date,
    max_tokens: int = 0,
    truncation: str = "end",
    **settings: Any,
) -> influence.Scores:
    """Scores each example of a pool by what a training step on it does to the targets' loss.

    Args:
        model: from load_model.
        pool: from load_examples; examples that are encoded already are used as they are.
        targets: likewise.
        template: as data.template, the layout of a completion.
        date: as data.date, the day that chat templates take for today.
        max_tokens: of an example; 0 = the model's positions.
        truncation: as model.truncation, what becomes of longer examples.
        **settings: fields of the config's section influence, such as engine="projected",
            projection={"dim": 1024}.

    Returns:
        The scores in the order of the pool, without the examples that truncation drops.

    Raises:
        UserError: a setting or an example is wrong, or nothing is left to score.
    """
    defaults = fields.defaults(influence_config.Influence)
    sections = {name: value for name, value in defaults.items() if isinstance(value, dict)}
    chosen = fields.build(influence_config.Influence, sections | settings, "influence.")
    tok = tokenizer.load_tokenizer(model.path, "model")
    layout = chat.make_layout(tok, model.cfg.vocab_size, date, "model")
    most = max_tokens or model.cfg.max_positions

    def encode(rows: Rows, name: str) -> list[example.Encoded]:
        made = [row for row in rows if isinstance(row, example.Encoded)]
        if len(made) < len(rows):
            texts = [row for row in rows if isinstance(row, example.Example)]
            made, *_ = encoded.encode_all(texts, layout, template, most, truncation, name)
        if not made:
            raise errors.UserError(f"{name}: there is no example to score.")
        return made

    tasks = {row.example_id: getattr(row, "task", "") for row in targets}
    target_rows = encode(targets, "targets")
    return influence.score(
        model,
        encode(pool, "pool"),
        target_rows,
        chosen,
        devices.make_placement(config.Parallel()),
        [tasks[row.example_id] for row in target_rows],
    )


class Artifacts(Mapping[str, pa.Table]):
    """Maps file names to the tables of a run's finished stages: run["influence/influence.parquet"].

    A file is held against its stage's record when it is read. Of a .jsonl file, a column that mixes
    types is text, as JSON.

    Attributes:
        records: the stage.json of each finished stage, by stage.
    """

    def __init__(self, workdir: str | os.PathLike, verify: bool = True) -> None:
        self.workdir, self._verify = pathlib.Path(workdir), verify
        found = ((path.parent, records.read(path.parent)) for path in self._stages())
        self.records = {
            folder.name: record
            for folder, record in found
            if record and record["status"] == records.DONE
        }
        if not self.records:
            raise errors.UserError(f"{workdir} holds no finished stage of a run.")

    def _stages(self) -> list[pathlib.Path]:
        return sorted(self.workdir.glob(f"*/{records.NAME}"))

    def __iter__(self) -> Iterator[str]:
        for stage, record in self.records.items():
            names = (name for name in record["outputs"] if name.endswith((".parquet", ".jsonl")))
            yield from (f"{stage}/{name}" for name in names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> pa.Table:
        path = self._path(name, list(self))
        if path.suffix == ".parquet":
            return reading.read_table(path)
        rows = reading.read_jsonl(path)
        columns = dict.fromkeys(column for row in rows for column in row)
        return pa.table({column: _column([row.get(column) for row in rows]) for column in columns})

    def json(self, name: str) -> Any:
        """Reads a .json file of a finished stage, such as evaluate/results.json."""
        names = [f"{stage}/{n}" for stage, r in self.records.items() for n in r["outputs"]]
        return reading.read_json(self._path(name, [n for n in names if n.endswith(".json")]))

    def _path(self, name: str, known: Sequence[str]) -> pathlib.Path:
        if name not in known:
            raise KeyError(f"{self.workdir} has no {name!r}.{errors.nearest(name, known)}")
        if self._verify:
            records.verify(self.workdir / name)
        return self.workdir / name


def open_run(workdir: str | os.PathLike, verify: bool = True) -> Artifacts:
    """Opens the artifacts of a run as tables.

    Args:
        verify: whether files are held against the checksums that their stages recorded.

    Raises:
        UserError: no stage has finished there; on reading, a file is not as its stage wrote it.
    """
    return Artifacts(workdir, verify)


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])
