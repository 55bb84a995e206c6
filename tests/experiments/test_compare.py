"""The comparison on a tiny model: what a kill leaves, what is shared, and what the numbers say."""

import dataclasses
import json
import shutil

import folders
import jax
import numpy as np
import pytest
import tiny

from comparison import cost, experiment, grid, runner, statistics
from diq_jax import config, errors, pipeline
from diq_jax.evaluate import intervals
from diq_jax.run import devices, reading, stages
from diq_jax.selection import methods


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A tiny model and data, and a workdir whose scores and selection are made."""
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(24))
    folders.write(base / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(8, "test"))
    pipeline.run(settings(base), base / "run", experiment.STAGES, overwrite=False)
    return base


def settings(made, pool="pool.jsonl", **finetune) -> config.Config:
    c = config.default()
    c.model.path, c.model.max_tokens = str(made / "decoder"), 256
    for name, file in (("pool", pool), ("targets", "targets.jsonl"), ("tests", "tests.jsonl")):
        c.data[name] = str(made / file)
    c.difficulty.source = "columns"
    c.evaluate.bootstrap_samples = 200
    c.selection.retention_ratio = 0.25
    c.finetune.learning_rate, c.finetune.epochs, c.finetune.accumulation_steps = 1e-2, 2, 2
    for name, value in finetune.items():
        c.finetune[name] = value
    return config.resolve(c)


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


def without_seconds(tree):
    if isinstance(tree, dict):
        return {k: without_seconds(v) for k, v in tree.items() if "seconds" not in k}
    return [without_seconds(v) for v in tree] if isinstance(tree, list) else tree


def cell_files(workdir):
    return sorted((workdir / "compare/cells").iterdir())


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_results(made, workdir, tmp_path, monkeypatch, capsys):
    request = grid.parse(["diq"], ["0.25", "1"], 2, [])
    killed = shutil.copytree(workdir, tmp_path / "killed")
    whole = experiment.run(settings(made), workdir, request)
    assert [(r["method"], r["budget"]) for r in whole["rows"]] == [
        ("base", 0.0), ("random", 0.25), ("diq", 0.25), ("full", 1.0),
    ]  # fmt: skip
    assert len(cell_files(workdir)) == 1 + 2 + 2 + 2

    kept, keep = [], runner._keep

    def keep_three(file, *rest):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(file)
        keep(file, *rest)

    monkeypatch.setattr(runner, "_keep", keep_three)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings(made), killed, request)
    assert cell_files(killed) == sorted(kept)
    monkeypatch.setattr(runner, "_keep", keep)
    before = [file.stat().st_mtime_ns for file in kept]
    experiment.run(settings(made), killed, request)
    assert [file.stat().st_mtime_ns for file in kept] == before
    one, other = (
        json.dumps(without_seconds(reading.read_json(folder / "compare/results.json")))
        for folder in (workdir, killed)
    )
    assert one == other
    for name in ("table.md", "figure.png", "figure.svg", "figure.csv"):
        assert (killed / "compare" / name).stat().st_size > 1000
    assert "| diq | 25 % | 6 |" in (killed / "compare/table.md").read_text()
    assert "Win / tie / loss" in capsys.readouterr().out


def test_a_last_update_that_ruins_the_parameters_is_named_and_kept_nowhere(
    made, workdir, monkeypatch
):
    make_train_step = runner.fit.make_train_step

    def make_ruined(*args):
        train_step = make_train_step(*args)

        def ruined(*args):
            state, metrics = train_step(*args)
            return state.replace(factors=jax.tree.map(lambda x: x + np.inf, state.factors)), metrics

        return ruined

    monkeypatch.setattr(runner.fit, "make_train_step", make_ruined)
    monkeypatch.setattr(runner, "warm_up", lambda bench: None)
    once = settings(made, epochs=1, max_steps=1)
    context = stages.Context(once, workdir, devices.make_placement(once.parallel))
    cell = grid.GridCell("random", 0.25, 0, tuple(range(6)))
    with pytest.raises(errors.UserError, match=rf"{cell.name} has parameters .* not finite"):
        runner.run(context, runner.read_data(context), [cell])
    kept = [reading.read_json(file)["made_for"] for file in cell_files(workdir)]
    assert kept == [runner.BASE]


def test_equal_examples_are_trained_once_and_differ_by_exactly_nothing(made, workdir):
    rankings = [f"again={made / 'run'}:random", f"other={made / 'run'}"]
    request = grid.parse(["diq"], ["0.25"], 1, rankings)
    rows = experiment.run(settings(made), workdir, request)["rows"]
    assert [r["method"] for r in rows] == ["base", "random", "diq", "again", "other"]
    assert len(cell_files(workdir)) == 3  # base, random = again, diq = other
    for metric in statistics.METRICS:
        zero = rows[3]["metrics"][metric]["versus"]
        assert (zero["mean"], zero["low"], zero["high"]) == (0, 0, 0)
        assert zero["wins"] == zero["losses"] == 0
        assert rows[4]["metrics"][metric] == rows[2]["metrics"][metric]
    assert rows[4]["cost"]["selection_flops"] == rows[2]["cost"]["selection_flops"] > 0
    assert rows[1]["cost"]["selection_flops"] == 0


def test_a_cell_is_what_the_stages_give(made, workdir):
    """Fine-tuning and evaluation of run_diq.py, up to the padding of other batch shapes."""
    cfg = settings(made, baselines="")
    pipeline.run(cfg, workdir, ["finetune", "evaluate"], overwrite=False)
    rows = experiment.run(cfg, workdir, grid.parse(["diq"], ["0.25"], 1, []))["rows"]
    models = reading.read_json(workdir / "evaluate/results.json")["models"]
    for row, name in ((rows[0], "base"), (rows[2], "selected")):
        for metric in ("test_loss", "target_loss", "accuracy", "accuracy_norm"):
            for end in ("mean", "low", "high"):
                want = models[name][metric][end]
                assert row["metrics"][metric][end] == pytest.approx(want, abs=1e-5)
    losses = [r["loss"] for r in reading.read_jsonl(workdir / "finetune/losses.jsonl")]
    assert rows[2]["first_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert rows[2]["last_loss"] == pytest.approx(losses[-1], abs=1e-5)
    assert rows[2]["metrics"]["test_loss"] != rows[2]["metrics"]["test_loss_without_end"]


def test_the_gradient_is_compiled_once_for_all_cells(made, workdir, monkeypatch):
    """Cells differ in seed, examples and number of steps."""
    traced, example_sums = [], runner.sft.example_sums

    def counting(*args):
        sums = example_sums(*args)

        def counted(params, factors, frozen, key, rows):
            traced.append(rows.batch.tokens.shape)
            return sums(params, factors, frozen, key, rows)

        return counted

    monkeypatch.setattr(runner.sft, "example_sums", counting)
    experiment.run(settings(made), workdir, grid.parse(["diq"], ["0.25", "1"], 2, []))
    assert len(traced) == len(set(traced)) > 0


@pytest.mark.parametrize("chosen", [[0], [3, 5, 7], list(range(24))])
def test_all_cells_have_the_shapes_of_the_pool(made, workdir, chosen):
    with pipeline.at_work(settings(made), workdir) as context:
        bench = runner.make_bench(context, runner.read_data(context))
        groups = [g for step in runner.plan(bench, chosen, 1) for g in step.groups]
    assert {(g.tokens, g.answers) for g in groups} <= set(bench.shapes)
    for g in groups:
        rows = [bench.data.pool[i] for i in g.indices]
        assert max(len(r.input_ids) for r in rows) <= g.tokens
        assert max(r.answer_tokens for r in rows) <= g.answers


def test_budgets_nest_and_random_is_drawn_for_each_seed(made, workdir):
    request = grid.parse(["influence", "short_answers"], ["0.1", "0.25", "0.5"], 3, [])
    with pipeline.at_work(settings(made), workdir) as context:
        ranks, removed = grid.orders(context, request)
    table = reading.read_table(workdir / "selection/baselines.parquet")
    assert ranks["random"][0].tolist() == table["random"].to_pylist()
    assert len({tuple(draw) for draw in ranks["random"]}) == 3
    by_name = {(c.method, c.seed, c.budget): set(c.indices) for c in
               grid.cells(request, ranks, removed)}  # fmt: skip
    assert len(by_name) == 3 * 3 * 3
    for (method, seed, budget), chosen in by_name.items():
        assert len(chosen) == {0.1: 2, 0.25: 6, 0.5: 12}[budget]
        assert chosen <= by_name[method, seed, 0.5]


def test_no_budget_holds_what_hygiene_removed():
    removed = np.arange(10) >= 7
    ranks = {"random": np.arange(1, 11)[None]}
    cells = grid.cells(grid.parse([], ["0.9", "1"], 1, []), ranks, removed)
    assert [(c.method, c.indices) for c in cells] == [
        ("random", tuple(range(7))), ("full", tuple(range(7))),
    ]  # fmt: skip


def test_statistics_by_hand():
    # Two seeds, four questions: by seed (2 + 4 + 6 + 8) / 4 = 5 and 9; the mean is 7.
    values = np.array([[2.0, 4, 6, 8], [6, 8, 10, 12]])
    drawn = statistics.estimates(values, 500, 0)
    assert drawn[0] == 7 and 2 <= drawn.min() < 5 < 9 < drawn.max() <= 12
    # Alike over questions: only the drawn seeds matter, both the first, both the last, one of each.
    flat = np.array([[1.0] * 4, [3.0] * 4])
    assert set(statistics.estimates(flat, 500, 0)) == {1.0, 2.0, 3.0}

    found = {"accuracy": values, "test_loss": values}
    tasks = {name: ["a", "a", "b", "b"] for name in found}
    lower = {name: x - 1 for name, x in found.items()}
    out = statistics.compare(found, lower, tasks, 100, 0)
    for name, won, lost in (("accuracy", 4, 0), ("test_loss", 0, 4)):  # 2 tasks x 2 seeds
        versus = out[name]["versus"]
        assert (versus["mean"], versus["low"], versus["high"]) == (1, 1, 1)
        assert (versus["wins"], versus["ties"], versus["losses"]) == (won, 0, lost)
        assert out[name]["by_seed"] == [5, 9]
        assert versus["p"] == 2 / 101  # no resampling of 100 lies on the other side
        assert out[name]["versus_base"] is None
    base = {name: np.zeros((1, 4)) for name in found}
    to_base = statistics.compare(found, None, tasks, 100, 0, base)["accuracy"]["versus_base"]
    assert to_base["mean"] == 7 and 2 <= to_base["low"] < to_base["high"] <= 12
    alone = statistics.outcomes(np.ones((2, 1)), ["a"], False, 100, 0)
    assert alone == {"wins": 0, "ties": 2, "losses": 0}


def test_p_and_holms_correction_by_hand():
    # Of four resamplings one is below 0: 2 (1 + 1) / 5.
    assert statistics.p_value(np.array([1.0, 2, 3, -1, 1])) == pytest.approx(0.8)
    assert statistics.p_value(np.zeros(5)) == 1

    def row(method, budget, p, unit="rows"):
        value = {"versus": None if p is None else {"p": p}}
        return {"method": method, "budget": budget, "unit": unit, "metrics": {"brier": value}}

    rows = [row("random", 0.1, None), row("a", 0.1, 0.01), row("b", 0.1, 0.04),
            row("a", 0.5, 0.01), row("a", 0.1, 0.03, "tokens")]  # fmt: skip
    statistics.correct(rows)
    got = [(row["metrics"]["brier"]["versus"] or {}).get("p_holm") for row in rows]
    assert got == [None, 0.02, 0.04, 0.01, 0.03]  # two methods share only the first budget


def test_budgets_of_tokens_by_hand():
    # Ranks 1..4 of tokens 10, 40, 30, 20 (100 in all): half holds 10 + 40; a tenth holds the first;
    # a twentieth none, so the first alone.
    tokens, ranks = np.array([30, 10, 20, 40]), {"random": np.array([[3, 1, 4, 2]])}
    request = grid.parse([], ["0.05", "0.1", "0.5"], 1, [], ["rows", "tokens"])
    found = grid.cells(request, ranks, np.zeros(4, bool), tokens)
    assert [(c.unit, c.budget, c.indices) for c in found if c.unit == "tokens"] == [
        ("tokens", 0.05, (1,)), ("tokens", 0.1, (1,)), ("tokens", 0.5, (1, 3)),
    ]  # fmt: skip
    assert found[-1].name == "random 50 % of tokens seed 0"
    assert [c.indices for c in found if c.unit == "rows"][-1] == (1, 3)


@pytest.mark.slow
def test_directions_are_arms_and_bands_follow_the_budget(made, workdir):
    """diq@adam is the diq of a run along adam; adaptive has a selection for each budget."""
    cfg = settings(made)
    request = grid.parse(["diq", "adaptive"], ["0.05", "0.5"], 1, [], ["tokens"], ["adam"])
    rows = experiment.run(cfg, workdir, request)["rows"]
    assert [r["method"] for r in rows[:5]] == ["base", "random", "diq", "adaptive", "diq@adam"]
    folder = workdir / "compare/directions/adam"
    kept = reading.read_json(folder / "influence/stage.json")["config"]["influence"]
    assert kept["direction"] == "adam" and kept["warmup"]["epochs"] == 1
    influence = [reading.read_table(f / "influence/influence.parquet")["influence"].to_numpy()
                 for f in (workdir, folder)]  # fmt: skip
    assert np.abs(influence[0] - influence[1]).max() > 0
    with pipeline.at_work(cfg, workdir) as context:
        ranks, _ = grid.orders(context, request)
    assert not np.array_equal(ranks["adaptive", 0.05], ranks["adaptive", 0.5])
    assert all(r["metrics"]["choice_loss"]["versus_base"] for r in rows[1:])


@pytest.mark.slow
def test_cells_may_answer_in_words(made, workdir):
    cfg = settings(made)
    evaluate = dataclasses.replace(cfg.evaluate, protocol="generate", max_new_tokens=4)
    cfg = dataclasses.replace(cfg, evaluate=evaluate)
    rows = experiment.run(cfg, workdir, grid.parse(["diq"], ["0.25"], 1, []))["rows"]
    assert "accuracy_norm" not in rows[0]["metrics"]
    assert 0 <= rows[2]["metrics"]["accuracy"]["mean"] <= 1
    assert rows[2]["metrics"]["choice_loss"]["versus"]["p_holm"] <= 1


def test_with_one_seed_intervals_are_those_of_the_evaluate_stage():
    values = np.random.default_rng(0).normal(size=(1, 30))
    one, other = statistics.estimates(values, 300, 5), intervals.estimates(values[0], 300, 5)
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_flops_by_hand():
    cfg = tiny.decoder_config()
    # q, o 16 x 16, k, v 16 x 8, three of 16 x 24: 1,920 a layer; T = 10, A = 3.
    linear, attention, head = 2 * 2 * 1920 * 10, 2 * (2 * 4 * 4) * 100, 2 * 16 * 50 * 3

    def flops(kind, remat=False):
        return cost.example_flops(cfg, [10], [3], kind, remat)[0]

    assert flops("forward") == linear + attention + head
    assert flops("thin_gradient") == 2 * linear + 4 * attention + 3 * head
    assert flops("thin_gradient", True) == 3 * linear + 5 * attention + 3 * head
    rows = tiny.rows(5, 20, seed=0)
    influence = settings_of("exact")
    want = cost.total_flops(cfg, rows, "jvp") + cost.total_flops(cfg, rows[:2], "gradient")
    assert cost.influence_flops(cfg, influence, rows, rows[:2]) == pytest.approx(want)


def settings_of(engine):
    c = config.default()
    c.model.path, c.influence.engine = "x", engine
    return config.resolve(c).influence


def test_costs_scale_what_a_resumed_stage_took():
    assert cost._seconds({"seconds": 10.0, "tokens": 100, "resumed_tokens": 50}) == 20
    assert cost._seconds({"seconds": 10.0}) == 10
    assert cost.needs("diq") == cost.needs("quadrant_3") == ("difficulty", "influence")
    assert cost.needs("random") == cost.needs("short_answers") == ()
    scored = {"similarity", "perplexity", "middle_perplexity", "ifd", "long_reasoning"}
    assert {m for m in methods.METHODS if cost.needs(m) == ("model_scores",)} == scored
    assert cost.needs("k_center") == cost.needs("influence") == ("influence",)
    assert cost.needs("difficulty_knowledge") == ("difficulty",)


def test_a_dry_run_predicts_and_trains_nothing(made, workdir, capsys):
    experiment.dry_run(settings(made), workdir, grid.parse(["diq"], ["0.25", "1"], 2, []))
    shown = capsys.readouterr().out
    assert "6 cells: 2 methods (random, diq) x 25 %" in shown and "4 trainings on 25 %" in shown
    assert not (workdir / "compare").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["digq"], ["0.1"], 1, []), "--methods must be .* Did you mean 'diq'"),
        ((["diq"], ["1.5"], 1, []), "--budgets must be shares of the pool in"),
        ((["diq"], ["many"], 1, []), "--budgets must be shares of the pool in"),
        ((["diq"], ["0.1"], 0, []), "--seeds must be at least 1"),
        ((["diq"], ["0.1"], 1, [], ["token"]), "--units must be .* Did you mean 'tokens'"),
        ((["diq"], ["0.1"], 1, [], ["rows"], ["adams"]), "--directions must be .* 'adam'"),
        ((["diq"], ["0.1"], 1, ["less"]), "--rankings must be NAME=WORKDIR"),
        ((["diq"], ["0.1"], 1, ["diq=/tmp"]), "'diq' is the name of another row"),
        ((["diq"], ["0.1"], 1, ["less=/nowhere"]), "holds no finished selection stage"),
        ((["ifd"], ["0.1"], 1, []), "--methods=ifd needs difficulty.model_scores=True"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, made, workdir):
    with pytest.raises(errors.UserError, match=message) as caught:
        experiment.run(settings(made), workdir, grid.parse(*arguments))
    assert "\n" not in str(caught.value)
    assert not (workdir / "compare").exists()


def test_a_ranking_of_another_pool_is_refused(made, workdir, tmp_path):
    rows = folders.pool_rows(24)
    rows[3]["answer"] += "!"  # the same id
    folders.write(made / "other.jsonl", rows)
    pipeline.run(settings(made, "other.jsonl"), tmp_path / "other", experiment.STAGES, False)
    request = grid.parse([], ["0.25"], 1, [f"other={tmp_path / 'other'}"])
    with pytest.raises(errors.UserError, match=r"ranks another pool: 24 rows, 23 of them among"):
        experiment.run(settings(made), workdir, request)


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("selection", "source_cap", 0.5, "budgets compared are to nest"),
        ("finetune", "parameters", "all", "cells train adapters"),
    ],
)
def test_what_cells_do_not_do_is_refused(section, field, value, message, made):
    cfg = settings(made)
    changed = dataclasses.replace(getattr(cfg, section), **{field: value})
    with pytest.raises(errors.UserError, match=message):
        grid.check(dataclasses.replace(cfg, **{section: changed}), grid.parse([], ["0.25"], 1, []))


def test_random_draws_leave_out_what_the_stage_removed(made, tmp_path):
    rows = folders.pool_rows(24)
    rows[5] = rows[4] | {"id": "ex-005"}
    folders.write(made / "double.jsonl", rows)
    cfg = settings(made, "double.jsonl")
    cfg = dataclasses.replace(cfg, selection=dataclasses.replace(cfg.selection, hygiene="remove"))
    pipeline.run(cfg, tmp_path / "run", experiment.STAGES, False)
    request = grid.parse([], ["0.5", "1"], 2, [])
    with pipeline.at_work(cfg, tmp_path / "run") as context:
        ranks, removed = grid.orders(context, request)
    table = reading.read_table(tmp_path / "run/selection/baselines.parquet")
    assert removed[5] and ranks["random"][0].tolist() == table["random"].to_pylist()
    for cell in grid.cells(request, ranks, removed):
        assert not removed[list(cell.indices)].any()
