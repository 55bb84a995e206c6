"""What lies behind a URL is read as what lies here; a URL that nothing reads is no folder here."""

import folders
import fsspec
import numpy as np
import pytest
import scripts

from diq_jax import errors
from diq_jax.data import sources
from diq_jax.models import checkpoint
from diq_jax.run import remote


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An empty bucket in memory, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    return system


def put(bucket, path, place):
    bucket.put(str(path), place, recursive=path.is_dir())


def test_rows_of_a_url_are_those_of_its_file(bucket, tmp_path):
    for name, count in (("a.jsonl", 3), ("b.jsonl", 5)):
        folders.write(tmp_path / name, folders.pool_rows(count))
        put(bucket, tmp_path / name, f"/data/{name}")
    local = sources.load_examples(str(tmp_path / "b.jsonl"))
    assert sources.load_examples("memory://data/b.jsonl") == local
    assert len(sources.read_rows("memory://data/*.jsonl", "data.pool")) == 8
    assert sources.load_targets("memory://data/a.jsonl", 0, 0, "")[0].task == "a"


def test_a_file_that_has_changed_is_read_anew(bucket, tmp_path):
    for count in (3, 5):
        folders.write(tmp_path / "a.jsonl", folders.pool_rows(count))
        put(bucket, tmp_path / "a.jsonl", "/data/a.jsonl")
        [first], [again] = (remote.fetch("memory://data/a.jsonl", "data.pool") for _ in range(2))
        assert first == again
        assert len(sources.load_examples("memory://data/a.jsonl")) == count


def test_weights_of_a_url_are_those_of_its_folder(bucket, tmp_path):
    folder = folders.decoder(tmp_path / "model")
    put(bucket, folder, "/models/tiny")
    opened = [checkpoint.open_checkpoint(p, "model.path") for p in (folder, "memory://models/tiny")]
    assert opened[0].fingerprint == opened[1].fingerprint
    for name in opened[0].tensors:
        np.testing.assert_array_equal(opened[0].read(name), opened[1].read(name))


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://data/none.jsonl", "there is no file"),
        ("memory://data/*.jsonl", "there is no file"),
        ("nothing://data/a.jsonl", "cannot be read"),
    ],
)
def test_a_url_without_rows_is_one_sentence(bucket, url, message):
    with pytest.raises(errors.UserError, match=rf"data\.pool: .*{message}|data\.pool.*{message}"):
        sources.read_rows(url, "data.pool")


def test_a_url_without_a_model_is_one_sentence(bucket):
    with pytest.raises(errors.UserError, match=r"model\.path: memory://none is no file"):
        checkpoint.resolve("memory://none", "model.path")


@pytest.mark.parametrize(
    "job, flag",
    [
        ("run", "--from=gs://bucket/run"),
        ("run", "--config.influence.lora.path=s3://bucket/adapter"),
        ("run", "--config.influence.direction=peft:gs://bucket/adapter"),
        ("score", "--output=gs://bucket/scores.parquet"),
        ("export", "--adapter=gs://bucket/adapter"),
    ],
)
def test_a_url_is_no_folder_here(job, flag, tmp_path):
    given = {
        "run": ["--config=quickstart", "--workdir=run"],
        "score": ["--workdir=run", "--targets=sample", "--output=a.parquet"],
        "export": ["--adapter=a", "--output=b"],
    }[job]
    name = flag.partition("=")[0]
    others = [f for f in given if not f.startswith(f"{name}=")]
    ended = scripts.script(job, *others, flag, cwd=tmp_path)
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert f"{name.removeprefix('--config.')} must be on this machine" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_run_at_a_url_that_cannot_be_reached_is_one_sentence(tmp_path):
    flags = ("--workdir=nowhere://bucket/run", "--targets=sample", "--output=a.parquet")
    ended = scripts.script("score", *flags, cwd=tmp_path)
    assert ended.returncode == 2 and not list(tmp_path.iterdir())
    assert "--workdir: nowhere://bucket/run cannot be read" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
