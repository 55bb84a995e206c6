"""Trackers are told what is measured, and their mistakes are one sentence."""

import importlib.machinery
import sys
import types

import pytest
import scripts

from diq_jax import config, errors, pipeline
from diq_jax.run import progress, tracking


class Recorder(types.ModuleType):
    """Stands in for trackio or wandb."""

    class Error(Exception):
        pass

    def __init__(self, fails=False):
        super().__init__("trackio")
        self.__spec__ = importlib.machinery.ModuleSpec("trackio", None)  # other packages look
        self.calls, self.fails = [], fails

    def init(self, **settings):
        if self.fails:
            raise self.Error("no\nkey")
        self.calls.append(("init", settings))

    def log(self, numbers):
        self.calls.append(("log", numbers))

    def finish(self):
        self.calls.append(("finish", {}))


@pytest.fixture(name="recorder")
def _recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "trackio", recorder)
    return recorder


def test_a_tracker_hears_of_steps_until_the_run_ends(recorder, tmp_path):
    progress.measured("sft", 0, [{"loss": 9.0}])  # nobody listens yet
    with tracking.opened(["trackio"], tmp_path / "mine", {"a": {"b": 1}}):
        progress.measured("sft", 3, [{"loss": 2.0, "rate": 0.1}, {"loss": 1.5, "rate": 0.2}])
    progress.measured("sft", 5, [{"loss": 9.0}])
    assert recorder.calls == [
        ("init", {"project": "diq_jax", "name": "mine", "config": {"a": {"b": 1}}}),
        ("log", {"sft/loss": 2.0, "sft/rate": 0.1, "sft/step": 3}),
        ("log", {"sft/loss": 1.5, "sft/rate": 0.2, "sft/step": 4}),
        ("finish", {}),
    ]


def test_a_run_tells_what_its_stages_took(recorder, tmp_path):
    made, values = scripts.make(tmp_path), config.default()
    values.model.path, values.model.max_tokens = str(made / "decoder"), 256
    for name in ("pool", "targets", "tests"):
        values.data[name] = str(made / f"{name}.jsonl")
    cfg = config.resolve(values)
    for _ in range(2):  # the second time nothing runs, and nothing is told
        pipeline.run(cfg, tmp_path / "run", ["prepare"], False, track=["trackio"])
    [told] = [numbers for kind, numbers in recorder.calls if kind == "log"]
    assert told["stage prepare/rows"] == 34 and told["stage prepare/host"] > 0
    assert told["stage prepare/seconds"] > 0 and recorder.calls[-1] == ("finish", {})


def test_event_files_hold_the_numbers(tmp_path):
    with tracking.opened(["tensorboard"], tmp_path, {}):
        progress.measured("sft", 0, [{"loss": 2.0}])
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"sft/loss" in file.read_bytes()


@pytest.mark.parametrize(
    "name, module, message",
    [
        ("comet", None, r"--track must be one of tensorboard, wandb, trackio; got 'comet'"),
        ("wandb", None, r"--track=wandb needs pip install 'diq_jax\[wandb\]'"),
        ("wandb", Recorder(fails=True), r"--track=wandb: no key$"),
    ],
)
def test_a_tracker_that_cannot_be_had_is_one_sentence(monkeypatch, tmp_path, name, module, message):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with (
        pytest.raises(errors.UserError, match=message),
        tracking.opened([name], tmp_path, {}),
    ):
        pass
