"""The selection stage on files: every method that has its input, knobs, reasons, refusals."""

import re
import types

import numpy as np
import pyarrow as pa
import pytest
import stores
import tiny

from diq_jax import config, errors, selection_config
from diq_jax.run import artifacts, reading, stages
from diq_jax.selection import handoff, methods, orders, select, stage

N, KEEP = 24, 6
FILES = {"selection/selection.parquet", "selection/baselines.parquet", "selection/thresholds.json"}


def make(workdir, shuffle=None, scored=True, stored=True, perspectives=config.PERSPECTIVES):
    """The artifacts that the stage reads, in any order of rows."""
    rng = np.random.default_rng(0)
    ids = np.array([f"ex-{i:02d}" for i in range(N)])
    order = np.arange(N) if shuffle is None else shuffle
    levels = rng.integers(1, 6, (3, N)).astype(np.float32)
    tokens = rng.integers(1, 400, N).astype(np.int32)
    influence = (3 - np.log(tokens) + rng.normal(0, 0.5, N)).astype(np.float32)
    ifd = rng.normal(1, 0.1, N)
    ifd[3] = np.nan
    tables = {
        "prepare/pool.parquet": {
            "source": np.where(np.arange(N) % 3 == 0, "a", "b"),
            "row": np.array([f'{{"id": "{i}"}}' for i in ids]),
            **{n: np.array([f"{n} {i}" for i in ids]) for n in ("question", "reasoning", "answer")},
            "letter": np.where(np.arange(N) % 2 == 0, "B", ""),
            "context": np.full(N, ""),
        },
        "difficulty/difficulty.parquet": {
            p: levels[i] if p in perspectives else np.full(N, np.nan, np.float32)
            for i, p in enumerate(config.PERSPECTIVES)
        },
        "influence/influence.parquet": {
            "influence": influence,
            "loss": rng.gamma(4, 0.5, N),
            "tokens": tokens,
        },
    }
    by_target = np.random.default_rng(2).normal(size=(N, 3)).astype(np.float32)
    lists = pa.array(list(by_target[order]), pa.list_(pa.float32()))
    if scored:
        tables["difficulty/model_scores.parquet"] = {
            "loss": rng.gamma(4, 0.5, N).astype(np.float32),
            "ifd": ifd,
            "similarity": rng.normal(size=N).astype(np.float32),
            "reasoning_tokens": tokens // 2,
        }
        tables["influence/tuned.parquet"] = {
            "color": by_target[:, 0],
            "temp": by_target[:, 1],
            "temp_cluster": (tokens % 3).astype(np.int32),
        }
    for name, columns in tables.items():
        columns = {"example_id": ids, **columns}
        columns = {k: v[order] for k, v in columns.items()}
        if scored and name == "influence/influence.parquet":
            columns |= {"influence_by_target": lists, "alignment": by_target[order, 2]}
        artifacts.write_table(workdir / name, columns, unknown=("ifd", *config.PERSPECTIVES))
    if stored:
        writer = stores.open_writer(workdir / "influence/store", N, shard_rows=10)
        rows = np.random.default_rng(1).normal(size=(N, 8)).astype(np.float32)
        stores.add(writer, list(range(N)), rows[order], np.zeros(N, np.float32))
        stores.finish(writer, list(ids[order]), np.zeros((1, 8)), ["mean"])
    return workdir


def run(workdir, **changes):
    """Returns selection.parquet as columns."""
    selection = selection_config.Selection(
        **{"retention_ratio": KEEP / N, "hygiene": "off"} | changes
    )
    settings = types.SimpleNamespace(
        data=config.Data(), difficulty=config.Difficulty(), selection=selection
    )
    stage.run(stages.Context(settings, workdir, tiny.placement()))
    return reading.read_table(workdir / "selection/selection.parquet").to_pydict()


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


FROM_RUNS = [name for name in methods.METHODS if name != "file"]


@pytest.mark.parametrize("method", FROM_RUNS)
def test_every_method_gives_a_total_order_with_reasons(made, method):
    got = run(made, method=method)
    assert sorted(got["rank"]) == list(range(1, N + 1))
    assert sum(got["selected"]) == KEEP == sum(rank <= KEEP for rank in got["rank"])
    assert (
        got["rank"] == reading.read_table(made / "selection/baselines.parquet")[method].to_pylist()
    )
    for rank, selected, why in zip(got["rank"], got["selected"], got["why"], strict=True):
        assert ("beyond the budget of 6" in why) != selected
        assert f"place {rank} of 24" in why or " in Q" in why


def test_an_exported_selection_and_decisions_come_back(made, tmp_path):
    """What the explorer exports selects those examples, in that order."""
    first = run(made)
    ids = [first["example_id"][i] for i in np.argsort(first["rank"])]
    wanted, path = [*ids[1:KEEP], ids[KEEP + 3]], tmp_path / "selection.jsonl"
    artifacts.write_jsonl(path, [{"example_id": i} for i in wanted])
    got = run(made, method=f"file:{path}")
    assert [got["example_id"][i] for i in np.argsort(got["rank"])][:KEEP] == wanted
    edits = tmp_path / "edits.jsonl"
    artifacts.write_jsonl(
        edits,
        [
            {"example_id": ids[0], "decision": "never", "reason": "a wrong dose"},
            {"example_id": ids[-1], "decision": "keep", "reason": ""},
        ],
    )
    got = run(made, edits=str(edits))
    order = [got["example_id"][i] for i in np.argsort(got["rank"])]
    assert order == [ids[-1], *ids[1:-1], ids[0]]
    whys = dict(zip(got["example_id"], got["why"], strict=True))
    assert whys[ids[0]].endswith("; never taken, decided by hand: a wrong dose")


def test_the_order_of_the_file_changes_nothing(made, tmp_path):
    """Ranks of all methods and reasons belong to examples, bit for bit."""
    shuffle = np.random.default_rng(7).permutation(N)
    make(tmp_path, shuffle)
    for changes in ({"method": "k_center"}, {"length_residual": True, "source_cap": 0.5}):
        here, there = run(made, **changes), run(tmp_path, **changes)
        for name in ("example_id", "rank", "selected", "why", "quadrant"):
            assert there[name] == [here[name][i] for i in shuffle], name
        tables = [reading.read_table(f / "selection/baselines.parquet") for f in (made, tmp_path)]
        assert tables[0].column_names == ["example_id", *FROM_RUNS]
        assert tables[1].equals(tables[0].take(shuffle))


def test_the_same_inputs_give_the_same_bytes(made, tmp_path):
    make(tmp_path)
    run(made)
    run(tmp_path)
    for name in FILES:
        assert (made / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_reasons_of_diq_are_true_of_their_rows(made):
    got = run(made)
    thresholds = reading.read_json(made / "selection/thresholds.json")
    pattern = (
        r"Q(\d): difficulty (\S+) (>=|<) (\S+), influence (\S+) (>=|<) (\S+); "
        r"place (\d+) of (\d+) in Q(\d)(; beyond the budget of 6)?"
    )
    for i, why in enumerate(got["why"]):
        q, d, d_sign, tau, v, v_sign, m, place, size, same, beyond = re.fullmatch(
            pattern, why
        ).groups()
        assert int(q) == int(same) == got["quadrant"][i]
        assert float(d) == pytest.approx(got["difficulty"][i], rel=1e-2)
        assert float(v) == pytest.approx(got["influence"][i], rel=1e-2)
        assert float(tau) == pytest.approx(thresholds["difficulty"], rel=1e-2)
        assert float(m) == pytest.approx(thresholds["influence"], rel=1e-2)
        assert (float(d) >= float(tau)) == (d_sign == ">=") == (int(q) in (1, 3))
        assert (float(v) >= float(m)) == (v_sign == ">=") == (int(q) in (1, 2))
        inside = [j for j in range(N) if got["quadrant"][j] == int(q)]
        assert int(size) == len(inside)
        assert int(place) == 1 + sum(got["rank"][j] < got["rank"][i] for j in inside)
        assert (beyond is None) == got["selected"][i]


@pytest.mark.parametrize(
    "method, clause",
    [
        ("random", r"random place 1 of 24"),
        ("influence", r"influence [-\d.]+, place 1 of 24"),
        ("difficulty_reasoning", r"reasoning difficulty 5, place 1 of 24"),
        ("difficulty_overall", r"difficulty 5, place 1 of 24"),
        ("short_answers", r"\d+ answer tokens, place 1 of 24"),
        ("similarity", r"mean cosine with the targets [\d.]+, place 1 of 24"),
        ("perplexity", r"perplexity [\d.]+, place 1 of 24"),
        (
            "middle_perplexity",
            r"log perplexity [\d.]+, [\d.e-]+ from the median [\d.]+, place 1 of 24",
        ),
        ("ifd", r"ifd 0\.\d+ < 1, place 1 of 24"),
        ("long_reasoning", r"\d+ reasoning tokens, place 1 of 24"),
        ("round_robin", r"taken by target '1', influence on it [\d.]+, place 1 of 24"),
        ("diq_round_robin", r"Q1: taken by target '1', influence on it [-\d.]+, place 1 of 24"),
        (
            "adaptive",
            r"difficulty at percentile \d+, in the band 60 to 100 of a budget of 25 %, "
            r"influence [-\d.]+, place 1 of 24",
        ),
        (
            "difficulty_length",
            r"difficulty 5 and \d+ reasoning tokens, mean percentile \d+, place 1 of 24",
        ),
        ("color", r"training on the targets lowers its loss by [\d.]+, place 1 of 24"),
        ("temp", r"loss of its first tokens [\d.]+, in cluster \d, place 1 of 24"),
        ("k_center", r"nearest to the mean gradient, place 1 of 24"),
        ("facility_location", r"adds [\d.]+ to the coverage, place 1 of 24"),
    ],
)
def test_reasons_say_what_the_method_saw(made, method, clause):
    got = run(made, method=method)
    assert re.fullmatch(clause, got["why"][got["rank"].index(1)])
    if method == "ifd":
        last = got["rank"].index(N)
        assert last == 3 and got["why"][3].startswith("no ifd (too short an answer), place 24 of")


def test_a_value_just_below_its_threshold_is_shown_so():
    assert orders.against(3.04, 3.05) == "3.04 < 3.05"
    assert orders.against(3.0499, 3.05) == "3.0499 < 3.05"
    assert orders.against(3.1, 3.1) == "3.1 >= 3.1"
    low = np.nextafter(np.float32(1), np.float32(0))
    assert orders.against(low, np.float32(1)) == "0.9999999 < 1"


def test_a_source_cap_is_kept_and_said(made):
    # A third of the pool is of source a; half of the budget of 6 may be of each.
    sources = np.array(reading.read_table(made / "prepare/pool.parquet")["source"].to_pylist())
    got = run(made, source_cap=0.5)
    selected = np.array(got["selected"])
    assert [int((selected & (sources == s)).sum()) for s in "ab"] == [3, 3]
    assert sorted(got["rank"]) == list(range(1, N + 1))
    passed = [why for why in got["why"] if "passed over" in why]
    assert passed and all("source 'b' has its 3 already" in why for why in passed)
    own = reading.read_table(made / "selection/baselines.parquet")["diq"].to_pylist()
    assert own != got["rank"] and own == run(made)["rank"]
    with pytest.raises(errors.UserError, match=r"source_cap=0\.2 leaves room for 2 of the budget"):
        run(made, source_cap=0.2)


def test_the_residual_ranks_and_the_influence_stays_raw(made):
    raw, got = run(made), run(made, length_residual=True)
    assert got["influence"] == raw["influence"] and got["rank"] != raw["rank"]
    tokens = reading.read_table(made / "influence/influence.parquet")["tokens"].to_numpy()
    left = select.length_residual(np.array(raw["influence"]), tokens, np.arange(N))
    thresholds = reading.read_json(made / "selection/thresholds.json")
    assert thresholds["influence"] is None
    assert thresholds["influence_residual"] == pytest.approx(np.median(left))
    high = left >= np.median(left)
    np.testing.assert_array_equal(np.isin(got["quadrant"], (1, 2)), high)
    assert all("influence residual" in why for why in got["why"])


@pytest.mark.parametrize(
    "lacking, method, message",
    [
        ("scored", "ifd", r"selection\.method=ifd needs difficulty/model_scores\.parquet: set "),
        ("stored", "k_center", r"needs influence/store, the gradients of the base model"),
        ("many", "facility_location", r"a pool of at most 20,000 examples"),
        ("scored", "round_robin", r"an influence for each of several targets: set influence\.targ"),
        ("scored", "color", r"needs influence/tuned\.parquet: set influence\.tuned\.color=True"),
        ("scored", "temp", r"needs influence/tuned\.parquet: set influence\.tuned\.temp=True"),
        ("knowledge", "diq_knowledge", r"perspective 'knowledge', which the pool lacks"),
        ("knowledge", "difficulty_knowledge", r"perspective 'knowledge', which the pool lacks"),
        ("overall", "quadrant_2", r"needs the difficulty perspective 'overall'"),
    ],
)
def test_a_missing_input_is_one_sentence(tmp_path, monkeypatch, lacking, method, message):
    known = [p for p in config.PERSPECTIVES if p != lacking]
    make(tmp_path, scored=lacking != "scored", stored=lacking != "stored", perspectives=known)
    if lacking == "many":
        monkeypatch.setattr(methods, "MOST_ROWS", 5)
    with pytest.raises(errors.UserError, match=message) as caught:
        run(tmp_path, method=method)
    assert "\n" not in str(caught.value)
    run(tmp_path, method="random")
    columns = reading.read_table(tmp_path / "selection/baselines.parquet").column_names
    assert method not in columns and "influence" in columns


def test_a_store_of_another_pool_is_refused(tmp_path):
    make(tmp_path)
    make(tmp_path, np.arange(N)[::-1], stored=False)
    with pytest.raises(errors.UserError, match="the pool hold different examples"):
        run(tmp_path)


def test_what_is_handed_on(made):
    got = run(made)
    order = np.argsort(got["rank"])[: sum(got["selected"])]
    ids = [got["example_id"][i] for i in order]
    pool = reading.read_table(made / "prepare/pool.parquet")
    letters = dict(zip(*(pool[n].to_pylist() for n in ("example_id", "letter")), strict=True))
    assert [row["id"] for row in reading.read_jsonl(made / "selection/selected.jsonl")] == ids
    for id_, row in zip(ids, reading.read_jsonl(made / handoff.MESSAGES), strict=True):
        answer = f"B. answer {id_}" if letters[id_] else f"answer {id_}"
        assert row == {
            "id": id_,
            "messages": [
                {"role": "user", "content": f"question {id_}"},
                {"role": "assistant", "content": f"reasoning {id_}\n\n{answer}"},
            ],
        }
    joined = reading.read_table(made / handoff.EXAMPLES).to_pydict()
    for name in ("example_id", "influence", "quadrant", "rank", "selected", "why"):
        assert joined[name] == got[name]
    assert joined["question"] == pool["question"].to_pylist()
    assert joined["difficulty_overall"] == got["difficulty"]
    assert "similarity" in joined


def test_a_pool_of_an_earlier_version_has_no_messages(made, capsys):
    path = made / "prepare/pool.parquet"
    old = reading.read_table(path)
    try:
        artifacts.write_table(path, old.drop_columns(["letter", "context"]))
        (made / handoff.MESSAGES).unlink(missing_ok=True)
        assert sum(run(made)["selected"]) > 0 and not (made / handoff.MESSAGES).exists()
        assert "rows are left out" in capsys.readouterr().err
    finally:
        artifacts.write_table(path, old)
