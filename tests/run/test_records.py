"""What a stage recorded, and artifacts held against it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diq_jax import config, errors
from diq_jax.run import artifacts, records

NAME = "influence/influence.parquet"


def scores(values, kind=np.float32):
    n = len(values)
    return {
        "example_id": [f"e{i}" for i in range(n)],
        "influence": pa.array(values, pa.from_numpy_dtype(kind)),
        "loss": np.ones(n, np.float32),
        "tokens": np.ones(n, np.int32),
    }


def write(workdir, values=(1.0, 2.0, -3.0), **changes):
    """A finished influence stage."""
    artifacts.write_table(workdir / NAME, scores(list(values)))
    record = {
        "stage": "influence",
        "status": "done",
        "config": {},
        "inputs": {},
        "outputs": {"influence.parquet": artifacts.sha256(workdir / NAME)},
        "rows": 3,
        "seconds": 1.5,
    }
    artifacts.write_json(workdir / "influence/stage.json", record | changes)


def test_a_table_is_what_its_stage_wrote(tmp_path):
    write(tmp_path)
    assert records.verify(tmp_path / NAME)
    assert records.table(tmp_path, NAME)["influence"].to_pylist() == [1, 2, -3]


def test_every_flipped_byte_is_refused(tmp_path):
    write(tmp_path)
    whole = (tmp_path / NAME).read_bytes()
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 0x80
        (tmp_path / NAME).write_bytes(damaged)
        expected = r"influence\.parquet was damaged or changed.*--stages=influence --overwrite"
        with pytest.raises(errors.UserError, match=expected):
            records.table(tmp_path, NAME)


def test_verification_can_be_left_out(tmp_path):
    write(tmp_path)
    artifacts.write_table(tmp_path / NAME, scores([5.0]))
    assert records.table(tmp_path, NAME, verified=False)["influence"].to_pylist() == [5]


@pytest.mark.parametrize(
    "values, kind, problem",
    [
        ([1.0, float("nan"), 2.0], np.float32, "finite numbers; row 1 is nan"),
        ([1.0, 2.0, None], np.float32, "finite numbers; row 2 is null"),
        ([1, 2, 3], np.int64, "finite numbers; its type is int64"),
    ],
)
def test_a_record_does_not_make_a_wrong_value_right(tmp_path, values, kind, problem):
    write(tmp_path)
    pq.write_table(pa.table(scores(values, kind)), tmp_path / NAME)
    outputs = {"influence.parquet": artifacts.sha256(tmp_path / NAME)}
    artifacts.write_json(
        tmp_path / "influence/stage.json",
        json.loads((tmp_path / "influence/stage.json").read_text()) | {"outputs": outputs},
    )
    with pytest.raises(errors.UserError, match=f"'influence' must hold {problem}.*Redo the stage"):
        records.table(tmp_path, NAME)


def test_a_file_of_the_users_own_has_no_record(tmp_path):
    artifacts.write_table(tmp_path / NAME, scores([1.0]))
    assert not records.verify(tmp_path / NAME)


def test_a_file_that_the_stage_did_not_write_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "influence/more.parquet").write_bytes(b"")
    with pytest.raises(errors.UserError, match="not among the files"):
        records.verify(tmp_path / "influence/more.parquet")


def test_the_record_of_a_file_in_a_folder_of_its_own_is_found(tmp_path):
    file = tmp_path / "finetune/baselines/random/adapter_model.safetensors"
    artifacts.write_text(file, "weights")
    outputs = {"baselines/random/adapter_model.safetensors": artifacts.sha256(file)}
    write(tmp_path)
    record = json.loads((tmp_path / "influence/stage.json").read_text())
    record |= {"stage": "finetune", "outputs": outputs}
    artifacts.write_json(tmp_path / "finetune/stage.json", record)
    assert records.verify(file)
    file.write_text("weightz")
    with pytest.raises(errors.UserError, match="--stages=finetune --overwrite"):
        records.verify(file)


def test_a_stage_at_work_vouches_for_nothing(tmp_path):
    write(tmp_path, status="running")
    with pytest.raises(errors.UserError, match="has not finished: run with --stages=influence"):
        records.table(tmp_path, NAME)
    with pytest.raises(errors.UserError, match=r"--runs: .* holds no finished influence stage"):
        records.finished(tmp_path, "influence", "--runs")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "is not JSON"),
        ('{"stage": "influence", "sta', "is not JSON"),
        ("[" * 20_000 + "]" * 20_000, "nested deeper"),
        ("[]", "must hold a JSON object"),
        ('{"name": "somebody\'s stage"}', "has no field 'stage'"),
        ({"status": "finished"}, "status must be one of clearing, running, done"),
        ({"config": [1]}, "config must be an object"),
        ({"inputs": {"a": 1}}, "inputs: a must be a text"),
        ({"outputs": {"a": None}}, "outputs: a must be a text"),
        ({"versions": {"jax": 0.1}}, "versions: jax must be a text"),
        ({"versions": ["jax"]}, "versions must be an object"),
        ({"rows": "3"}, "rows must be a whole number"),
        ({"tokens_per_second": "fast"}, "tokens_per_second must be a number"),
        ("\ud800", "is not UTF-8"),
    ],
)
def test_a_record_of_others_is_one_sentence(tmp_path, text, problem):
    write(tmp_path, **(text if isinstance(text, dict) else {}))
    if isinstance(text, str):
        path = tmp_path / "influence/stage.json"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(errors.UserError, match=problem) as caught:
        records.read(tmp_path / "influence")
    assert "\n" not in str(caught.value) and "another --workdir" in str(caught.value)


def test_a_config_of_another_version_is_named(tmp_path):
    record = {"config": config.default().to_dict()}
    record["config"]["model"]["path"] = "x"
    assert records.config_of(record, tmp_path).model.path == "x"
    for broken in ({"modell": {}}, {"model": 3}, {}, {"model": {"path": "x"}}):
        with pytest.raises(errors.UserError, match=r"stage\.json holds a config of another"):
            records.config_of({"config": broken}, tmp_path)


def test_a_sealed_result_is_what_was_written(tmp_path):
    path = tmp_path / "cell.json"
    artifacts.write_json(path, records.seal({"loss": [0.5, 1e-9], "name": "ü"}))
    assert records.unseal(path) == {"loss": [0.5, 1e-9], "name": "ü"}
    path.write_text(path.read_text().replace("0.5", "0.4"))
    with pytest.raises(errors.UserError, match=r"damaged or changed.*Delete it"):
        records.unseal(path)
    assert records.unseal(path, verified=False)["loss"] == [0.4, 1e-9]
    path.write_text('{"loss": 1}')  # of an earlier version
    assert records.unseal(path) == {"loss": 1}
