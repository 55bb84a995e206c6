"""The base model's scores: formulas by hand, and on the tiny model against one row at a time."""

import functools
import pathlib
import signal
import time

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import tiny

from diq_jax import config, errors, pipeline
from diq_jax.data import batches, chat, encoded, example
from diq_jax.difficulty import model_scores
from diq_jax.models import decoder, load, tokenizer
from diq_jax.run import parts, reading

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """A model that begins sequences with a token of its own, pool and targets; and a finished
    stage.
    """
    base = tmp_path_factory.mktemp("made")
    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", pool_rows())
    folders.write(base / "targets.jsonl", folders.choice_rows(5, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(2, "test"))
    run(base, base / "whole")
    return base


def pool_rows():
    """With a row whose completion is one token, which has no IFD, and one of two spans."""
    level = {"difficulty_overall": 3}
    one = level | {"id": "one", "input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    two = level | {"id": "two", "input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}
    return [*folders.pool_rows(9), one, two]


def fields(made, **changes):
    return {
        "model.path": str(made / "decoder"),
        "model.max_tokens": 256,
        "data.pool": str(made / "pool.jsonl"),
        "data.targets": str(made / "targets.jsonl"),
        "data.tests": str(made / "tests.jsonl"),
        "difficulty.source": "columns:overall=difficulty_overall",
        "difficulty.model_scores": True,
        "influence.batch_tokens": 512,
    } | changes


def run(made, workdir, stages=("prepare", "difficulty"), **changes):
    c = config.default()
    for name, value in fields(made, **changes).items():
        section, field = name.split(".")
        c[section][field] = value
    pipeline.run(config.resolve(c), workdir, list(stages), False)


WIDTH = 160  # one shape for all rows


@functools.partial(jax.jit, static_argnames="cfg")
def forward(params, cfg, tokens):
    places = jnp.arange(WIDTH, dtype=jnp.int32)[None]
    hidden = decoder.apply(params, cfg, tokens[None], places, jnp.ones_like(places))
    return hidden[0], jax.nn.log_softmax(decoder.logits(params, cfg, hidden)[0])


def token_losses(model, ids):
    """The loss of each of ids after the first, and the hidden states (T, D): one row at a time, its
    later places unread.
    """
    tokens = np.zeros(WIDTH, np.int32)
    tokens[: len(ids)] = ids
    hidden, log_p = (np.asarray(x) for x in forward(model.params, model.cfg, tokens))
    losses = [-log_p[t, ids[t + 1]] for t in range(len(ids) - 1)]
    return np.array([np.nan, *losses]), hidden[: len(ids)].astype(np.float64)


def embedding(hidden):
    weights = np.arange(1, len(hidden) + 1)
    mean = (weights[:, None] * hidden).sum(axis=0) / weights.sum()
    return mean / np.linalg.norm(mean)


def test_every_column_equals_a_recomputation_row_by_row(made):
    table = reading.read_table(made / "whole/difficulty/model_scores.parquet").to_pydict()
    pool_table = reading.read_table(made / "whole/prepare/pool.parquet")
    targets_table = reading.read_table(made / "whole/prepare/targets.parquet")
    model = load.load(str(made / "decoder"), "float32", tiny.placement())
    directions = np.array(
        [embedding(token_losses(model, t.input_ids)[1]) for t in encoded.from_table(targets_table)]
    )
    tasks = np.array(targets_table["task"].to_pylist())
    assert table["example_id"] == pool_table["example_id"].to_pylist()
    for i, row in enumerate(encoded.from_table(pool_table)):
        scored = np.flatnonzero(row.labels != example.IGNORED)
        losses, hidden = token_losses(model, row.input_ids)
        expected = losses[scored].mean()
        assert table["loss"][i] == pytest.approx(expected, rel=1e-5)
        assert table["perplexity"][i] == pytest.approx(np.exp(expected), rel=1e-4)
        assert table["answer_tokens"][i] == len(scored)
        # The tiny tokenizer begins nothing: the completion's first token is in neither loss.
        alone, _ = token_losses(model, row.input_ids[scored[0] :])
        more = losses[scored[1:]] - alone[scored[1:] - scored[0]]
        assert more.size == 0 or table["ifd"][i] == pytest.approx(np.exp(more.mean()), rel=1e-4)
        assert np.isnan(table["ifd"][i]) == (row.example_id == "one")
        cosines = directions @ embedding(hidden)
        assert table["similarity"][i] == pytest.approx(cosines.mean(), abs=1e-5)
        by_task = [cosines[tasks == task].mean() for task in set(tasks)]
        assert table["task_similarity"][i] == pytest.approx(np.mean(by_task), abs=1e-5)
        # A byte a token.
        assert table["reasoning_tokens"][i] == len(pool_table["reasoning"][i].as_py().encode())
    assert table["reasoning_tokens"][-2:] == [0, 0]


def test_the_weighted_mean_by_hand():
    # Places 1 2 3 of the states 6, 3, 2: (1 * 6 + 2 * 3 + 3 * 2) / 6 = 3; a padding row is 0.
    row = example.Encoded("a", np.array([7, 8, 9], np.int32), np.array([-100, 8, 9], np.int32))
    batch = batches.make_batch([row], 2, 5, 2)
    hidden = jnp.array([[6.0, 3, 2, 99, 99], [1, 1, 1, 1, 1]])[..., None]
    np.testing.assert_allclose(model_scores.embeddings(hidden, batch), [[3], [0]])


def test_directions_by_hand():
    # Unit rows (1, 0) (0, 1) of task a and (0.6, 0.8) of task b: their mean is (1.6, 1.8) / 3; of
    # the tasks' means (0.5, 0.5) and (0.6, 0.8) it is (0.55, 0.65).
    found = np.array([[2.0, 0], [0, 5], [3, 4]])
    got = model_scores.target_directions(found, ["a", "a", "b"])
    np.testing.assert_allclose(got, [[1.6 / 3, 1.8 / 3], [0.55, 0.65]])


def test_a_completion_alone_keeps_the_beginning_of_the_sequence():
    ids, labels = np.array([1, 5, 6, 7], np.int32), np.array([-100, -100, 6, 7], np.int32)
    row = example.Encoded("a", ids, labels)
    alone = model_scores.without_prompt(row, 1)
    np.testing.assert_array_equal(alone.input_ids, [1, 6, 7])
    np.testing.assert_array_equal(alone.labels, [-100, 6, 7])
    assert alone.answer_tokens == row.answer_tokens == 2
    for bos in (None, 5):
        alone = model_scores.without_prompt(row, bos)
        np.testing.assert_array_equal(alone.input_ids, [6, 7])
        assert alone.answer_tokens == 1
    short = example.Encoded("b", ids[:3], labels[:3])
    assert model_scores.without_prompt(short, None) is None
    assert model_scores.without_prompt(short, 1).answer_tokens == 1


def test_a_prompt_that_is_only_the_beginning_gives_an_ifd_of_one():
    row = example.Encoded("a", np.array([1, 6], np.int32), np.array([-100, 6], np.int32))
    alone = model_scores.without_prompt(row, 1)
    np.testing.assert_array_equal(alone.input_ids, row.input_ids)


def test_a_template_without_reasoning_has_no_reasoning_tokens(made):
    tok = tokenizer.load_tokenizer(str(made / "decoder"), "test")
    layout = chat.make_layout(tok, len(tok), "2024-07-26", "test")
    assert list(model_scores.reasoning_tokens(["abc", ""], layout, "plain")) == [3, 0]
    assert list(model_scores.reasoning_tokens(["abc", ""], layout, "so {answer}")) == [0, 0]


def test_the_stage_records_the_weights_only_where_it_reads_them(made, tmp_path):
    inputs = reading.read_json(made / "whole/difficulty/stage.json")["inputs"]
    assert set(inputs) == {
        "model.path", "model.path tokenizer", "model.path chat template", "model.dtype",
        "prepare/pool.parquet", "prepare/targets.parquet"
    }  # fmt: skip
    with pytest.raises(errors.UserError, match=r"model_scores was True, is now False"):
        run(made, made / "whole", ["difficulty"], **{"difficulty.model_scores": False})
    with pytest.raises(errors.UserError, match=r"model\.dtype was 'float32', is now 'bfloat16'"):
        run(made, made / "whole", ["difficulty"], **{"model.dtype": "bfloat16"})
    run(made, tmp_path, **{"difficulty.model_scores": False})
    assert set(reading.read_json(tmp_path / "difficulty/stage.json")["inputs"]) == {
        "prepare/pool.parquet"
    }


@pytest.mark.parametrize("name, rows", [("given", 1), ("given", 8), ("alone", 3)])
def test_a_run_cut_anywhere_gives_the_same_bytes(made, tmp_path, monkeypatch, name, rows):
    """Interrupted as soon as so many rows are done."""
    run(made, tmp_path / "whole", **{"influence.batch_tokens": 128})
    add = parts.Parts.add

    def dies(self, *args):
        add(self, *args)
        if self.folder.name == name and len(self.done) >= rows:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "cut", **{"influence.batch_tokens": 128})
    run(made, tmp_path / "cut", **{"influence.batch_tokens": 128})
    for name in ("model_scores.parquet", "difficulty.parquet"):
        whole, cut = (tmp_path / run / "difficulty" / name for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
    counts = reading.read_json(tmp_path / "cut/difficulty/stage.json")
    assert 0 < counts["resumed_tokens"] < counts["tokens"]
    assert not (tmp_path / "cut/difficulty/partial").exists()


@pytest.mark.slow
def test_killed_scores_continue_to_identical_bytes(made, tmp_path):
    pool = folders.write(tmp_path / "pool.jsonl", folders.pool_rows(400))
    changes = {"data.pool": pool, "influence.batch_tokens": 64}

    flags = [f"--config={ROOT}/configs/quickstart.py", "--stages=prepare,difficulty"]
    flags += [f"--config.{name}={value}" for name, value in fields(made, **changes).items()]

    finished = tmp_path / "killed" / model_scores.PARTIAL / "given"
    process = scripts.start("run_diq", *flags, f"--workdir={tmp_path / 'killed'}")
    while process.poll() is None and len(list(finished.glob("*.arrow"))) < 4:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 0 < len(parts.Parts(finished).done) < 400
    for name in ("killed", "whole"):
        scripts.script("run_diq", *flags, f"--workdir={tmp_path / name}").check_returncode()
    name = "difficulty/model_scores.parquet"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
