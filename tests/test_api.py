"""The public API on a tiny model: README's example, and the artifacts of a run as tables."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import scripts

import diq_jax
from diq_jax import errors

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    made = scripts.make(tmp_path_factory.mktemp("made"))
    (made / "my_model").symlink_to(made / "decoder")
    flags = ("--stages=prepare,difficulty,influence", "--config.difficulty.source=columns")
    ended = scripts.on_data("run_diq", made, made / "run", *flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return made


def test_the_example_of_the_readme_selects_what_a_run_ranks_first(made):
    example = re.search(
        r"## From Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )[1]
    assert example in (ROOT / "docs/api.md").read_text()
    after = "\nimport json\nprint(json.dumps([row['id'] for row in subset]))"
    ended = subprocess.run(
        [sys.executable, "-c", example + after], capture_output=True, text=True, cwd=made,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    table = diq_jax.open_run(made / "run")["influence/influence.parquet"]
    first = np.argsort(-table["influence"].to_numpy())[:2]
    assert sorted(table["example_id"].to_numpy()[first]) == sorted(eval(ended.stdout))


def test_a_score_is_the_stages_and_takes_the_fields_of_influence(made):
    model = diq_jax.load_model(str(made / "decoder"))
    pool, targets = (diq_jax.load_examples(str(made / f"{n}.jsonl")) for n in ("pool", "targets"))
    found = diq_jax.score(model, pool, targets, max_tokens=512)
    table = diq_jax.open_run(made / "run")["influence/influence.parquet"]
    assert found.example_ids == table["example_id"].to_pylist()
    np.testing.assert_array_equal(found.influence, table["influence"].to_numpy())
    projected = {"engine": "projected", "projection": {"dim": 512, "kind": "rademacher"}}
    other = diq_jax.score(model, pool, targets, parameters="attn", **projected)
    assert np.isfinite(other.influence).all() and (other.influence != found.influence).any()
    with pytest.raises(errors.UserError, match=r"influence\.engin does not exist.*'engine'"):
        diq_jax.score(model, pool, targets, engin="exact")
    with pytest.raises(errors.UserError, match="targets: there is no example"):
        diq_jax.score(model, pool, [])


def test_a_run_is_a_mapping_of_verified_tables(made, tmp_path):
    run = diq_jax.open_run(made / "run")
    assert set(run.records) == {"prepare", "difficulty", "influence"}
    assert "prepare/pool.parquet" in run and len(run) == len(list(run)) > 3
    assert all(run[name].num_rows > 0 for name in run)
    with pytest.raises(KeyError, match=r"Did you mean 'influence/influence\.parquet'"):
        run["influence/influence.parqet"]
    with pytest.raises(errors.UserError, match="holds no finished stage"):
        diq_jax.open_run(tmp_path)
    path = made / "run/difficulty/difficulty.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(errors.UserError, match="was damaged or changed"):
        run["difficulty/difficulty.parquet"]
    path.write_bytes(whole)


def test_columns_that_mix_types_are_text(made, tmp_path):
    run = diq_jax.open_run(made / "run", verify=False)
    (made / "run/prepare/rows.jsonl").write_text('{"a": 1, "b": 1}\n{"a": "x", "c": [2]}\n')
    run.records["prepare"]["outputs"]["rows.jsonl"] = ""
    assert run["prepare/rows.jsonl"].to_pydict() == {
        "a": ["1", '"x"'], "b": [1, None], "c": [None, [2]],
    }  # fmt: skip


def test_every_public_name_is_there_and_nothing_is_loaded_before():
    code = "import diq_jax, sys; assert not {'jax', 'numpy', 'pyarrow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": "."})
    for name in diq_jax._PUBLIC:
        assert callable(getattr(diq_jax, name)) and name in dir(diq_jax)
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        diq_jax.scores  # noqa: B018
