"""The influence stage on files: engines agree, a store takes new targets, a killed one is whole."""

import pathlib
import random
import signal
import time

import folders
import numpy as np
import pyarrow.parquet as pq
import pytest
import scripts

from diq_jax import config, errors, pipeline, stats
from diq_jax.influence import store
from diq_jax.run import reading

ROOT = pathlib.Path(__file__).parents[2]
PROJECTED = {"influence.engine": "projected", "influence.projection.dim": 4096}
TABLE = "influence/influence.parquet"


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(24))
    folders.write(base / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(4, "test"))
    run(base, base / "exact")
    return base


def fields(made, **changes):
    return {
        "model.path": str(made / "decoder"),
        "model.max_tokens": 256,
        "data.pool": str(made / "pool.jsonl"),
        "data.targets": str(made / "targets.jsonl"),
        "data.tests": str(made / "tests.jsonl"),
    } | changes


def run(made, workdir, changes=None):
    """Returns the influence table."""
    c = config.default()
    for name, value in fields(made, **(changes or {})).items():
        *parents, last = name.split(".")
        node = c
        for parent in parents:
            node = node[parent]
        node[last] = value
    pipeline.run(config.resolve(c), workdir, ["prepare", "influence"], overwrite=False)
    return pq.read_table(workdir / TABLE)


def influence(table):
    return table["influence"].to_numpy()


def test_packed_and_by_token_equal_exact(made, tmp_path):
    expected = influence(pq.read_table(made / "exact" / TABLE))
    changes = {"influence.packing": True, "influence.per_token": True}
    table = run(made, tmp_path, changes)
    np.testing.assert_allclose(influence(table), expected, atol=1e-5 * np.abs(expected).max())
    shares, tokens = table["token_influence"].to_pylist(), table["tokens"].to_pylist()
    assert [len(share) for share in shares] == tokens
    np.testing.assert_allclose([sum(s) for s in shares], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets, count", [("task", 2), ("example", 6)])
def test_several_targets_average_to_the_mean(made, tmp_path, targets, count):
    expected = influence(pq.read_table(made / "exact" / TABLE))
    table = run(made, tmp_path, {"influence.targets": targets})
    np.testing.assert_allclose(influence(table), expected, rtol=1e-4, atol=1e-4)
    assert {len(row) for row in table["influence_by_target"].to_pylist()} == {count}
    names = reading.read_json(tmp_path / "influence/stage.json")["target_groups"]
    assert len(names) == count


def test_the_store_gives_the_scores_and_takes_new_targets(made, tmp_path, capsys):
    changes = PROJECTED | {"influence.store.shard_rows": 10, "influence.targets": "task"}
    table = run(made, tmp_path / "run", changes)
    exact = influence(pq.read_table(made / "exact" / TABLE))
    assert stats.pearson(influence(table), exact) > 0.98
    opened = store.open_store(tmp_path / "run/influence/store")
    opened.verify()
    assert len(opened.shards) == 3 and opened.manifest["made_from"]["parameters"] == "all"
    by_target = np.array(table["influence_by_target"].to_pylist())
    np.testing.assert_allclose(opened.scores(opened.targets), by_target, rtol=1e-4, atol=1e-4)

    # The same targets, scored anew from the store: the same numbers.
    output = tmp_path / "again.parquet"
    where = f"--workdir={tmp_path / 'run'}", f"--targets={made / 'targets.jsonl'}"
    scripts.script("score", f"--output={output}", *where).check_returncode()
    again = pq.read_table(output)
    np.testing.assert_allclose(influence(again), influence(table), rtol=1e-3, atol=1e-3)
    assert again.column_names[2:] == opened.manifest["targets"]


def test_cosine_is_the_cosine_of_what_is_kept(made, tmp_path):
    table = run(made, tmp_path, PROJECTED | {"influence.normalize": "cosine"})
    opened = store.open_store(tmp_path / "influence/store")
    expected = opened.scores(opened.targets, "cosine")[:, 0]
    np.testing.assert_allclose(influence(table), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() <= 1


def test_adam_agrees_between_engines_after_a_warm_up(made, tmp_path):
    """Two epochs, summed by learning rate: projected is within 5 |g| |v| / sqrt(dim) of exact."""
    adam = {
        "influence.direction": "adam",
        "influence.warmup.epochs": 2,
        "influence.warmup.fraction": 0.5,
        "influence.parameters": "attn|mlp",
    }
    exact = influence(run(made, tmp_path / "exact", adam))
    changes = adam | PROJECTED | {"influence.projection.dim": 2048}
    projected = influence(run(made, tmp_path / "projected", changes))
    record = reading.read_json(tmp_path / "projected/influence/stage.json")
    assert sum(point["share"] for point in record["checkpoints"]) == pytest.approx(1)
    bound = 0
    for k, point in enumerate(record["checkpoints"]):
        opened = store.open_store(tmp_path / f"projected/influence/store-epoch-{k + 1}")
        norms = np.linalg.norm(opened.rows(0, len(opened)), axis=1)
        bound += point["share"] * norms * point["directions"]["mean"]["norm"] * 5 / np.sqrt(2048)
    assert (np.abs(exact - projected) < bound).all()


def test_gauss_newton_with_much_damping_is_the_mean_direction(made, tmp_path):
    """(G + lambda)^-1 gbar -> gbar / lambda. With little damping the residuals of the solution fall
    and stand in stage.json.
    """
    expected = influence(pq.read_table(made / "exact" / TABLE))
    solver = {"influence.direction": "gauss_newton", "influence.gauss_newton.examples": 10}

    def solved(name, damping):
        changes = solver | {"influence.gauss_newton.damping": damping}
        got = influence(run(made, tmp_path / name, changes))
        record = reading.read_json(tmp_path / name / "influence/stage.json")
        return got, record["directions"]["mean"]

    got, about = solved("much", 1e4)
    close = 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(got * about["lambda"], expected, atol=close)
    got, about = solved("little", 0.1)
    assert about["residuals"][-1] < 0.5 * about["residuals"][0]
    assert np.abs(got * about["lambda"] - expected).max() > 10 * close


def test_less_ranks_by_the_best_task(made, tmp_path):
    changes = {
        "influence.engine": "projected",
        "influence.parameters": "lora",
        "influence.direction": "less",
        "influence.normalize": "cosine",
        "influence.targets": "task",
        "influence.projection.dim": 256,
        "influence.warmup.epochs": 1,
        "influence.warmup.fraction": 0.5,
    }
    table = run(made, tmp_path, changes)
    by_task = np.array(table["influence_by_target"].to_pylist())
    np.testing.assert_allclose(influence(table), by_task.max(axis=1), rtol=1e-6)
    opened = store.open_store(tmp_path / "influence/store-epoch-1")
    unit_rows, unit_targets = (
        store.unit(rows) for rows in (opened.rows(0, len(opened)), opened.targets)
    )
    cosines = unit_rows @ unit_targets.T  # (rows, targets), targets of one task side by side
    np.testing.assert_allclose(by_task[:, 0], cosines[:, :3].mean(axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"influence.projection.dim": 10**6}, r"is larger than the 8,096 parameters"),
        ({"influence.parameters": "q_prj"}, r"influence\.parameters: 'q_prj' matches none"),
    ],
)
def test_a_projection_that_does_not_fit_is_refused(made, tmp_path, changes, message):
    with pytest.raises(errors.UserError, match=message):
        run(made, tmp_path, PROJECTED | changes)


def test_a_target_whose_gradient_is_not_finite_is_named(made, tmp_path, monkeypatch):
    """The loss is finite, its gradient is not: one sentence that names the target."""
    from diq_jax.influence import direction

    original = direction.mean_gradient

    def broken(space, batches, *args):
        pairs = list(batches)
        found = original(space, pairs, *args)
        bad = any((np.asarray(b.tokens)[:, 3] == tokens[3]).any() for _, b in pairs)
        return {"params": {"w": np.full(2, np.nan)}} if bad else found

    rows = pq.read_table(made / "exact/prepare/targets.parquet")
    tokens = rows["input_ids"][2].as_py()
    ids = zip(rows["example_id"].to_pylist(), rows["input_ids"].to_pylist(), strict=True)
    expected = [i for i, t in ids if t[3] == tokens[3]]
    monkeypatch.setattr(direction, "mean_gradient", broken)
    with pytest.raises(errors.UserError, match=f"target '{expected[0]}' is not finite"):
        run(made, tmp_path)


@pytest.mark.slow
def test_a_store_killed_at_random_moments_is_whole(made, tmp_path):
    """kill -9 twice, then to the end: every file of the store as if nothing had happened."""
    pool = folders.write(tmp_path / "pool.jsonl", folders.pool_rows(240))
    changes = PROJECTED | {
        "influence.parameters": "attn",
        "influence.projection.dim": 512,
        "influence.batch_tokens": 64,
        "influence.store.shard_rows": 50,
        "data.pool": str(pool),
    }

    flags = [f"--config={ROOT / 'configs/quickstart.py'}", "--stages=prepare,influence"]
    flags += [f"--config.{k}={v}" for k, v in fields(made, **changes).items()]

    rng = random.Random(0)
    partial = tmp_path / "killed/influence/partial/rows"

    def finished():
        return len(list(partial.glob("part-*")))

    for _ in range(2):
        before = finished()
        process = scripts.start("run_diq", *flags, f"--workdir={tmp_path / 'killed'}")
        while process.poll() is None and finished() <= before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    for name in ("killed", "whole"):
        scripts.script("run_diq", *flags, f"--workdir={tmp_path / name}").check_returncode()
    for file in (tmp_path / "whole/influence").rglob("*"):
        if file.is_file() and file.name != "stage.json":
            other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
            assert file.read_bytes() == other.read_bytes(), file
    assert not partial.parent.exists()
