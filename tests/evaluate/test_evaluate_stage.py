"""The stage as a whole: models whose answers are known, devices, order, and a killed run."""

import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import signal
import sys

import forks
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from diq_jax import config, errors
from diq_jax.evaluate import intervals, measure, options, stage
from diq_jax.models import config as model_config
from diq_jax.models import decoder, export, hf, load, lora, loss
from diq_jax.run import artifacts, devices, parts, reading, stages

V = D = 32
SETTINGS = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-9,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CFG = model_config.decoder_config(SETTINGS, "test")
RESULTS, PREDICTIONS = "evaluate/results.json", "evaluate/predictions.jsonl"
ARMS = {"selected": "finetune/adapter", "random": "finetune/baselines/random"}


def save_model(folder, change=lambda path, leaf: leaf):
    params = decoder.init(jax.random.key(0), CFG, jnp.float32)
    params = jax.tree_util.tree_map_with_path(lambda p, x: change(p[0].key, x), params)
    hf.save_decoder(folder, params, SETTINGS, 10**9)
    return folder


def save_counting_model(folder, logit):
    """After token v comes v + 1: its logit is `logit`, all others are 0. Attention adds nothing."""
    leaves = {
        "embed": lambda x: jnp.eye(V),
        "layers": jnp.zeros_like,
        "final_norm": lambda x: x,
        "head": lambda x: jnp.roll(jnp.eye(V), 1, axis=1) * logit / math.sqrt(D),
    }
    return save_model(folder, lambda name, x: leaves[name](x))


def save_inputs(workdir, questions, targets):
    """Targets are (prompt, answer); questions are options.Question."""
    ints = pa.list_(pa.int32())
    artifacts.write_table(
        workdir / "prepare/targets.parquet",
        {
            "example_id": [f"t{i}" for i in range(len(targets))],
            "input_ids": pa.array([p + a for p, a in targets], ints),
            "labels": pa.array([[-100] * len(p) + a for p, a in targets], ints),
        },
    )
    artifacts.write_table(
        workdir / "prepare/tests.parquet",
        {
            "example_id": [q.example_id for q in questions],
            "task": [q.task for q in questions],
            "prompt_ids": pa.array([q.prompt_ids for q in questions], ints),
            "options": [list(q.letters) for q in questions],
            "option_ids": pa.array([q.option_ids for q in questions], pa.list_(ints)),
            "answer": pa.array([q.answer for q in questions], pa.int32()),
            "end_ids": pa.array([q.end_ids for q in questions], ints),
        },
    )
    return workdir


def save_random_inputs(workdir, order=None):
    rng = np.random.default_rng(0)

    def draw(low, high):
        return rng.integers(0, V - 1, rng.integers(low, high)).tolist()

    questions = [
        options.Question(
            f"q{i}", "xy"[i % 2], draw(8, 25), "ABC", [draw(1, 6) for _ in "ABC"], i % 3
        )
        for i in range(10)
    ]
    targets = [(draw(3, 20), draw(2, 9)) for _ in range(5)]
    return save_inputs(workdir, [questions[i] for i in order or range(10)], targets)


def save_adapters(workdir, change=lambda adapter: adapter):
    for i, folder in enumerate(ARMS.values()):
        adapter = lora.init(jax.random.key(i), CFG, "(q|k|v)_proj", 2, 4.0, False, "test")
        lora.save_peft(workdir / folder, change(adapter), CFG, 4.0, 0.0, "base")
    return workdir


def make_context(workdir, model, strategy="mesh"):
    settings = config.default()
    settings.model.path, settings.evaluate.bootstrap_samples = str(model), 200
    settings.evaluate.batch_tokens, settings.parallel.strategy = 160, strategy
    resolved = config.resolve(settings)
    return stages.Context(
        resolved, pathlib.Path(workdir), devices.make_placement(resolved.parallel)
    )


def outputs(workdir):
    """(results, {(model, example_id): prediction})."""
    rows = reading.read_jsonl(workdir / PREDICTIONS)
    by_key = {(row["model"], row["example_id"]): row for row in rows}
    return reading.read_json(workdir / RESULTS), by_key


def assert_close(left, right):
    assert left.keys() == right.keys()
    for key, row in left.items():
        for letter, value in row["log_likelihoods"].items():
            np.testing.assert_allclose(right[key]["log_likelihoods"][letter], value, rtol=1e-5)


def run_child(*args, devices_count=1):
    """This file as a script, in its own process."""
    # conftest's flags are inherited: what is compiled otherwise differs in its last bits.
    inherited = os.environ.get("XLA_FLAGS", "")
    flags = f"{inherited} --xla_force_host_platform_device_count={devices_count}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return forks.run([__file__, *args], env)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Four times the usual spread: the model has opinions, and float error stays small.
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, lambda name, x: x if name == "final_norm" else 4 * x)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """An uninterrupted run of three models on one device: its folder, what it returned, and the
    batches that were traced.
    """
    workdir = save_adapters(save_random_inputs(tmp_path_factory.mktemp("finished")))
    traced, original = [], loss.token_losses

    def token_losses(params, cfg, batch, *rest):
        traced.append((batch.tokens.shape, batch.parent_ids is None))
        return original(params, cfg, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "token_losses", token_losses)
        returned = stage.run(make_context(workdir, model))
    return workdir, returned, traced


def counting_questions():
    ids = lambda *x: np.array(x, np.int32)  # noqa: E731
    right = (ids(9), ids(7), ids(5, 6, 7))  # the prompt ends with 4
    return [
        options.Question("q0", "x", ids(3, 4), ("A", "B", "C"), right, 2),
        options.Question("q1", "y", ids(9, 4), ("A", "B"), (ids(5, 6), ids(6, 7)), 0),
    ]


def test_a_model_that_knows_the_answer_scores_one(tmp_path):
    model = save_counting_model(tmp_path / "model", 30.0)
    save_inputs(tmp_path, counting_questions(), [([2, 3], [4, 5])])
    assert stage.run(make_context(tmp_path, model))["models"] == ["base"]
    base = outputs(tmp_path)[0]["models"]["base"]
    for metric, expected in {
        "accuracy": 1,
        "accuracy_norm": 1,
        "test_loss": 0,
        "target_loss": 0,
    }.items():
        np.testing.assert_allclose(list(base[metric].values()), expected, atol=1e-5)
    assert base["versus"] == {}
    assert base["tasks"]["x"]["questions"] == 1


def test_raw_and_normalised_accuracy_by_hand(tmp_path):
    # log Z = log(e^2 + 31) = 3.648: a wrong token has -3.648, a right one -1.648. q0: A and B, one
    # wrong token each, beat C, three right ones with -4.945, by the sum, and lose by the mean.
    model = save_counting_model(tmp_path / "model", 2.0)
    save_inputs(tmp_path, counting_questions(), [([2, 3], [4, 5]), ([2, 3], [4, 9])])
    stage.run(make_context(tmp_path, model))
    results, predictions = outputs(tmp_path)
    log_z = math.log(math.exp(2) + 31)
    row = predictions["base", "q0"]
    assert (row["answer"], row["prediction"], row["prediction_norm"]) == ("C", "A", "C")
    assert row["tokens"] == {"A": 1, "B": 1, "C": 3}
    got = [row["loss"], *row["log_likelihoods"].values()]
    expected = [log_z - 2, -log_z, -log_z, 3 * (2 - log_z)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    base = results["models"]["base"]
    assert (base["accuracy"]["mean"], base["accuracy_norm"]["mean"]) == (0.5, 1.0)
    # The letters are the first tokens, and q0's C is 2 ahead; its share e^2 / (e^2 + 2). Of q1, A
    # is 2 ahead of B by its first token, and B's second one is as right as A's.
    letters = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 1) - 2
    np.testing.assert_allclose(base["choice_loss_letters"]["mean"], np.mean(letters), rtol=1e-5)
    np.testing.assert_allclose(row["margin"], 3 * (2 - log_z) + log_z, rtol=1e-5)
    np.testing.assert_allclose(
        predictions["base", "q1"]["choice_loss"], math.log1p(math.exp(-2)), rtol=1e-5
    )
    # Target losses: both tokens right, and one of two.
    np.testing.assert_allclose(base["target_loss"]["mean"], log_z - (2 + 1) / 2, rtol=1e-5)


def test_schema_and_arms(finished):
    workdir, returned, _ = finished
    results, predictions = outputs(workdir)
    assert (results["tests"], results["targets"]) == (10, 5)
    assert list(results["models"]) == ["base", "selected", "random"] == returned["models"]
    assert returned["rows"] == len(predictions) == 30
    tables = [
        reading.read_table(workdir / f"prepare/{name}.parquet") for name in ("targets", "tests")
    ]
    target_tokens = sum(map(len, tables[0]["input_ids"].to_pylist()))
    test_tokens = sum(
        len(row["prompt_ids"]) + sum(map(len, row["option_ids"])) for row in tables[1].to_pylist()
    )
    assert returned["tokens"] == 3 * (target_tokens + test_tokens)
    assert {m: list(v["versus"]) for m, v in results["models"].items()} == {
        "base": [],
        "selected": ["base", "random"],
        "random": ["base"],
    }
    metrics = ["target_loss", *intervals.METRICS]
    for model in results["models"].values():
        assert list(model) == [*metrics, "tasks", "versus"]
        assert list(model["tasks"]) == ["x", "y"]
        for group in (model, *model["versus"].values()):
            for metric in metrics:
                assert group[metric]["low"] <= group[metric]["mean"] <= group[metric]["high"]
    assert sorted(p.name for p in (workdir / "evaluate").iterdir()) == [
        "predictions.jsonl",
        "results.json",
    ]


def test_one_program_for_a_shape_serves_all_models(finished):
    traced = finished[2]
    assert len(traced) == len(set(traced)) <= 2 * measure.MAX_SHAPES


def test_base_alone_and_in_another_order(tmp_path, model, finished):
    order = np.random.default_rng(3).permutation(10).tolist()
    context = make_context(save_random_inputs(tmp_path, order), model)
    assert stage.run(context)["models"] == ["base"]
    results, predictions = outputs(tmp_path)
    expected_results, expected = outputs(finished[0])
    assert_close(predictions, {key: row for key, row in expected.items() if key[0] == "base"})
    for metric in ("test_loss", "accuracy", "accuracy_norm", "target_loss"):
        got, whole = (r["models"]["base"][metric]["mean"] for r in (results, expected_results))
        np.testing.assert_allclose(got, whole, rtol=1e-5)
    arms = [list(expected[name, "q0"]["log_likelihoods"].values()) for name in ("base", *ARMS)]
    assert min(np.abs(np.subtract(*pair)).max() for pair in itertools.combinations(arms, 2)) > 1e-3


def test_killed_and_resumed_is_identical(tmp_path, model, finished):
    save_adapters(save_random_inputs(tmp_path))
    killed = run_child(tmp_path, model, "mesh", 8)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / stage.PARTIAL
    assert {path.parent.parent.name for path in partial.rglob("*.arrow")} == {"base", "selected"}
    cut = max(partial.rglob("selected/*/part-*.arrow"))
    cut.write_bytes(cut.read_bytes()[:-5])  # as a power cut might leave it
    returned = stage.run(make_context(tmp_path, model))
    for name in (RESULTS, PREDICTIONS):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()
    assert 0 < returned["resumed_tokens"] < returned["tokens"] == finished[1]["tokens"]
    assert not partial.exists()


def test_eight_devices_are_one(tmp_path, model, finished):
    folders = [save_adapters(save_random_inputs(tmp_path / name)) for name in ("mesh", "pmap")]
    child = run_child(tmp_path, model, "both", 0, devices_count=8)
    assert child.returncode == 0, child.stderr
    for folder in folders:
        results, predictions = outputs(folder)
        assert_close(outputs(finished[0])[1], predictions)
        got = results["models"]["selected"]["versus"]["random"]["target_loss"]
        expected = outputs(finished[0])[0]["models"]["selected"]["versus"]["random"]["target_loss"]
        np.testing.assert_allclose(list(got.values()), list(expected.values()), atol=1e-5)


def test_a_likelihood_that_is_not_finite_names_model_and_question(tmp_path, model, monkeypatch):
    # Token 31 is in one question only. Files with NaN are refused, so that it is put in behind.
    loaded = load.load

    def broken(*args):
        made = loaded(*args)
        table = made.params["embed"]["embedding"].at[V - 1].set(jnp.nan)
        return dataclasses.replace(
            made, params=made.params | {"embed": made.params["embed"] | {"embedding": table}}
        )

    first = counting_questions()[0]
    odd = dataclasses.replace(first, example_id="q31", prompt_ids=np.array([V - 1, 2]))
    save_inputs(tmp_path, [first, odd], [([2, 3], [4, 5])])
    with monkeypatch.context() as patched:
        patched.setattr(load, "load", broken)
        with pytest.raises(
            errors.UserError, match=r"model 'base' gives question 'q31'.*not finite"
        ):
            stage.run(make_context(tmp_path, model))
    # A fine-tuning that diverged, here until A B overflows, is not blamed on the base, whose
    # adapter has the same shape.
    save_adapters(tmp_path, lambda adapter: jax.tree.map(lambda x: x * 1e30, adapter))
    shutil.rmtree(tmp_path / stage.PARTIAL)
    with pytest.raises(errors.UserError, match=r"model 'selected' gives target 't0'.*not finite"):
        stage.run(make_context(tmp_path, model))


def test_arms_and_fingerprints(tmp_path, model):
    context = make_context(tmp_path, model)
    assert stage.arms(context) == [("base", None)]
    assert list(stage.fingerprints(context)) == ["model.path"]
    save_adapters(tmp_path)
    folders = {name: tmp_path / folder for name, folder in ARMS.items()}
    assert stage.arms(context) == [("base", None), *folders.items()]
    weights = "finetune/baselines/random/adapter_model.safetensors"
    assert weights in stage.reads(context)
    (folders["random"] / "adapter_config.json").unlink()
    with pytest.raises(errors.UserError, match=r"random, which stage 'finetune' makes"):
        stage.arms(context)


def test_a_merged_model_scores_as_its_adapter(tmp_path, model):
    """What full fine-tuning leaves is a model of its own in place of an adapter."""
    save_random_inputs(tmp_path)
    context = make_context(tmp_path, model)
    adapter = lora.init(jax.random.key(0), CFG, "(q|k|v)_proj", 2, 4.0, False, "test")
    lora.save_peft(tmp_path / "finetune/adapter", adapter, CFG, 4.0, 0.0, "base")
    base = load.load(str(model), "float32", context.placement)
    merged = export.merge_adapter(base.params, adapter)
    hf.save_decoder(tmp_path / "finetune/model", merged, SETTINGS, 10**9)
    found = []
    for parameters in ("lora", "all"):
        finetune = dataclasses.replace(context.config.finetune, parameters=parameters, baselines="")
        cfg = dataclasses.replace(context.config, finetune=finetune)
        stage.run(dataclasses.replace(context, config=cfg))
        found.append(outputs(tmp_path)[1])
    assert {name for name, _ in found[1]} == {"base", "selected"}
    assert_close(*found)
    assert found[1]["base", "q0"]["loss"] != found[1]["selected", "q0"]["loss"]


def test_nothing_to_test_is_said(tmp_path, model):
    save_inputs(tmp_path, [], [([2, 3], [4, 5])])
    with pytest.raises(errors.UserError, match="got 1 and 0 from data"):
        stage.run(make_context(tmp_path, model))


def main(workdir, model, strategy, kill_after):
    """Runs the stage, by both strategies in WORKDIR/mesh and WORKDIR/pmap, or killed on the way."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if strategy == "both":
        for name in ("mesh", "pmap"):
            stage.run(make_context(pathlib.Path(workdir) / name, model, name))
        return
    add, added = parts.Parts.add, []

    def add_and_die(self, rows, columns):
        add(self, rows, columns)
        added.append(rows)
        if len(added) == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

    parts.Parts.add = add_and_die
    stage.run(make_context(workdir, model, strategy))


if __name__ == "__main__":
    main(*sys.argv[1:])
