"""After a power cut at any moment every artifact is whole, old or new, or made again the same."""

import json

import jax
import numpy as np
import power
import pytest
import stores
import tiny

from diq_jax import config
from diq_jax.influence import store
from diq_jax.models import checkpoint, export, lora
from diq_jax.run import artifacts, parts, records, stages

CONTENTS = ("old", "new")


def without_temporary(files):
    """The files, but for those that a cut left half written: a stage at work deletes its own."""
    return {n: b for n, b in files.items() if not artifacts.temporary_of(n.rpartition("/")[2])}


def text(path, which):
    artifacts.write_text(path, f"{which} text\n" * 50)


def value(path, which):
    artifacts.write_json(path, {"which": which, "values": list(range(50))})


def rows(path, which):
    artifacts.write_jsonl(path, [{"which": which, "row": i} for i in range(50)])


def table(path, which):
    artifacts.write_table(path, {"which": [which] * 50, "x": np.arange(50)})


@pytest.mark.parametrize("write", [text, value, rows, table])
def test_a_file_is_absent_or_old_or_new(write, tmp_path):
    name, whole = "a/new/folder/file", []
    with power.Disk(tmp_path) as disk:
        for which in CONTENTS:
            before = len(disk.cuts)
            write(tmp_path / name, which)
            whole.append((tmp_path / name).read_bytes())
            assert disk.lasting() == {name: whole[-1]}
            allowed = [None, *whole]
            if which == "new":  # the old one is never lost
                allowed = whole
            assert all(files.get(name) in allowed for files in disk.cuts[before:])
    assert power.live(tmp_path) == {name: whole[-1]}


def test_what_is_removed_stays_away(tmp_path):
    with power.Disk(tmp_path) as disk:
        for name in ("a/one", "a/two", "b/three"):
            artifacts.write_text(tmp_path / name, "x")
        artifacts.remove(tmp_path / "a")
        artifacts.remove(tmp_path / "b/three")
        assert disk.lasting() == {}


def test_every_part_that_was_taken_stays(tmp_path):
    taken = []  # (moment, rows)
    with power.Disk(tmp_path) as disk:
        mine = parts.Parts(tmp_path / "run/parts")
        for i in range(4):
            mine.add([2 * i, 2 * i + 1], {"x": np.array([0.1 * i, i + 0.5])})
            taken.append((len(disk.cuts), len(mine.done)))
    expected = mine.columns()["x"]
    for k, files in enumerate(disk.cuts):
        folder = power.restore(files, tmp_path / f"cut-{k}")
        again = parts.Parts(folder / "run/parts")
        least = max((count for moment, count in taken if moment <= k), default=0)
        assert again.done == set(range(len(again.done))) and len(again.done) >= least
        got = again.columns().get("x", np.zeros(0))
        np.testing.assert_array_equal(got, expected[: len(got)])


def test_a_store_is_whole_or_continued(tmp_path):
    ids = [f"e{i}" for i in range(7)]
    numbers = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)

    def run(folder):
        writer = stores.open_writer(folder, 7, "float16", shard_rows=2)
        for part in ([0, 3], [1, 2, 6], [4, 5]):
            stores.add(writer, part, numbers[part], numbers[part, 0])
        stores.finish(writer, ids, numbers[:1], ["mean"], {"weights": "w"})

    folder = tmp_path / "disk/influence/store"
    folder.parent.mkdir(parents=True)
    with power.Disk(tmp_path / "disk") as disk:
        run(folder)
        assert disk.lasting() == power.live(tmp_path / "disk")
    whole = power.live(folder)
    assert len(disk.cuts) > 20
    for k, files in enumerate(disk.cuts):
        again = power.restore(files, tmp_path / f"cut-{k}") / "influence/store"
        if (again / "manifest.json").exists():
            opened = store.open_store(again)
            opened.verify()
            assert opened.example_ids == ids
        run(again)
        assert without_temporary(power.live(again)) == whole


def adapter(scale):
    found = lora.init(jax.random.key(0), tiny.decoder_config(), "q_proj", 2, 4.0, False, "test")
    return jax.tree.map(lambda x: x * scale, found)


def test_an_adapter_that_has_its_config_is_whole(tmp_path):
    folder, cfg = tmp_path / "finetune/adapter", tiny.decoder_config()
    with power.Disk(tmp_path) as disk:
        lora.save_peft(folder, adapter(1.0), cfg, 4.0, 0.0, "base")
        assert disk.lasting() == power.live(tmp_path)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for k, files in enumerate(disk.cuts):
        again = power.restore(files, tmp_path / f"cut-{k}") / "finetune/adapter"
        if (again / "adapter_config.json").exists():
            assert (again / "adapter_model.safetensors").read_bytes() == weights
            lora.load_peft(again, cfg, "test")


def tensors(which, count):
    return [(f"t{i}", np.full((4, 4), i + 100 * which, np.float32)) for i in range(count)]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_that_has_its_config_is_whole_old_or_new(shards, tmp_path):
    """Files of the old and of the new never stand together."""
    folder = tmp_path / "finetune/model"
    most = 64 if shards > 1 else 10**6
    with power.Disk(tmp_path) as disk:
        for which in range(2):
            checkpoint.save_checkpoint(folder, {"which": which}, tensors(which, 3), most)
            assert disk.lasting() == power.live(tmp_path)
    seen = set()
    for k, files in enumerate(disk.cuts):
        again = power.restore(files, tmp_path / f"cut-{k}") / "finetune/model"
        if (again / "config.json").exists():
            opened = checkpoint.open_checkpoint(again, "test")
            which = opened.config["which"]
            for name, expected in tensors(which, 3):
                np.testing.assert_array_equal(opened.read(name), expected)
            seen.add(which)
    assert seen == {0, 1}


class Tokenizer:
    def save_pretrained(self, folder):
        """Writes as other libraries do, without a word to the disk."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text("{}" * 100)
        (folder / "tokenizer_config.json").write_text("{}")


def test_a_model_that_has_its_config_has_its_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(export.tokenizer, "load_tokenizer", lambda *_: Tokenizer())
    monkeypatch.setattr(export.checkpoint, "resolve", lambda *_: tmp_path)
    monkeypatch.setattr(export, "_generation_config", lambda *_: {})
    monkeypatch.setattr(
        export.hf, "save_decoder", lambda folder, *_: value(folder / "config.json", 1)
    )
    with power.Disk(tmp_path) as disk:
        export.save_model(tmp_path / "model", {"x": np.ones(2)}, {}, "base", "test")
    found = [files for files in disk.cuts if "model/config.json" in files]
    assert found and all(files["model/tokenizer.json"] == b"{}" * 100 for files in found)


def make_stage(number):
    def run(context):
        """Counts on what it finds, as the stages of the pipeline do."""
        folder = context.path("toy")
        if not (folder / "model/config.json").exists():
            mine = parts.Parts(folder / "partial")
            for i in mine.remaining(3):
                mine.add([i], {"of": np.array([number])})
            found = mine.columns()["of"].tolist()
            Tokenizer().save_pretrained(folder / "model")
            artifacts.sync_tree(folder / "model")
            artifacts.write_json(folder / "model/config.json", found)
        artifacts.write_table(folder / "table.parquet", {"of": [number]})
        (folder / "events.log").write_text(f"of another library {number}")
        artifacts.remove(folder / "partial")
        return {"rows": 1}

    writes = ("model/*", "table.parquet", "events.log", "partial/*")
    return stages.Stage("toy", lambda _: (), writes, lambda _: {"number": str(number)}, run)


def execute(workdir, number, overwrite=False):
    values = config.default()
    values.model.path, values.data.pool = "x", "sample"
    context = stages.Context(config.resolve(values), workdir, tiny.placement())
    return stages.execute(make_stage(number), context, overwrite)


def outputs(workdir):
    files = without_temporary(power.live(workdir / "toy"))
    record = json.loads(files.pop(records.NAME))
    return files, record["status"], record["inputs"]


def test_a_stage_is_old_or_new_after_a_cut_at_any_moment(tmp_path):
    """Made from 1, then redone from 2: whatever is left, the same command ends with all of 2."""
    workdir = tmp_path / "disk"
    workdir.mkdir()
    expected = {}
    with power.Disk(workdir) as disk:
        for number in (1, 2):
            assert execute(workdir, number, overwrite=number == 2)
            assert disk.lasting() == power.live(workdir)
            expected[str(number)] = outputs(workdir)
            if number == 1:
                redone = len(disk.cuts)
    assert len(disk.cuts) > 40
    for k, files in enumerate(disk.cuts):
        again = power.restore(files, tmp_path / f"cut-{k}")
        path = again / "toy/stage.json"
        started = json.loads(path.read_text()) if path.exists() else None
        if started and started["status"] == "done":
            number = started["inputs"]["number"]
            assert not execute(again, int(number))  # every output is as its record says
            assert outputs(again) == expected[number]
        number = "1" if k < redone else "2"
        old = started and started["inputs"] != {"number": number}
        execute(again, int(number), overwrite=bool(old))
        assert outputs(again) == expected[number]
