"""Every number of the config has a range; every regex compiles; every config file is ours."""

import dataclasses
import functools
import re

import ml_collections
import pytest
import scripts

from diq_jax import config, config_files, errors, fields, pipeline
from diq_jax.commands import train_classifier
from diq_jax.influence import kinds
from diq_jax.run import stages

# Fields that another must go along with.
BESIDE = {
    "evaluate.samples": {"evaluate.temperature": 1.0},
    "finetune.accumulation_steps": {"finetune.batch_size": 2**16},
    "finetune.dpo.accumulation_steps": {"finetune.dpo.batch_size": 2**16},
}


def fields_of(kind, cls=config.Config, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from fields_of(kind, field.type, f"{prefix}{field.name}.")
        elif field.type is kind:
            yield f"{prefix}{field.name}"


def resolved(values):
    found = config.default().to_dict()
    for field, value in ({"model.path": "x"} | values).items():
        *sections, name = field.split(".")
        functools.reduce(dict.__getitem__, sections, found)[name] = value
    return config.resolve(ml_collections.ConfigDict(found))


def end_of(field, beyond):
    """The end of a field's range that the refusal of a value beyond it names."""
    with pytest.raises(
        errors.UserError, match=rf"^{re.escape(field)} must be at (least|most) "
    ) as e:
        resolved({field: beyond})
    return int(re.search(r"at (?:least|most) (\d+);", str(e.value))[1])


@pytest.mark.parametrize("field", list(fields_of(int)))
def test_every_whole_number_has_two_ends_that_build(field):
    for beyond in (-1, 2**31, 2**63 - 1, 2**63, 2**70, -(2**70), 10**5000):
        try:
            resolved({field: beyond})
        except errors.UserError as e:
            assert field in str(e) and len(str(e)) < 200
    ends = end_of(field, -1), end_of(field, 2**62)
    assert 0 <= ends[0] < ends[1] < 2**41
    for end in ends:
        resolved(BESIDE.get(field, {}) | {field: end})


@pytest.mark.parametrize("field", [name for name in fields_of(int) if name.endswith("seed")])
def test_a_seed_fits_an_int32(field):
    assert (end_of(field, -1), end_of(field, 2**62)) == (0, 2**31 - 1)


@pytest.mark.parametrize("field", list(fields_of(float)))
def test_a_real_number_is_refused_or_builds(field):
    for value in (-1.0, 0.0, 5e-324, 1e-300, 1e300, 10**5000, 10**400, float("inf"), float("nan")):
        try:
            resolved({field: value})
        except errors.UserError as e:
            assert field in str(e) and len(str(e)) < 200
    with pytest.raises(errors.UserError, match=field):
        resolved({field: float("nan")})


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a{99999999999999}", "*", "(?P<x>a)(?P<x>b)"])
@pytest.mark.parametrize(
    "field",
    ["influence.parameters", "influence.lora.targets", "finetune.parameters", "finetune.targets"],
)
def test_a_regex_that_is_none_is_named(field, pattern):
    with pytest.raises(errors.UserError, match=f"^{field}: .* is not a valid regex"):
        resolved({field: pattern})


FILES = {  # what a file does: (its text, what is said, beside the file's name)
    "divides": ("x = 1\n1 / 0", ":2: the config file raised ZeroDivisionError: division by zero."),
    "imports": ("import nowhere_at_all", ":1: the config file raised ModuleNotFoundError: No"),
    "is no Python": ("\ndef get_config(:", ":2: the config file raised SyntaxError: "),
    "is no text": (b"\xff\xfe\x00", ": the config file raised "),
    "exits": ("import sys\nsys.exit(3)", ":2: the config file raised SystemExit: 3."),
    "exits quietly": ("def get_config():\n    raise SystemExit", ":2: the config file raised Sys"),
    "takes an argument": ("def get_config(a):\n    pass", "missing 1 required positional argument"),
    "has a wrong value": (
        "def get_config():\n    int('x')",
        ":2: the config file raised ValueError",
    ),
    "misspells": (
        "from diq_jax import config\ndef get_config():\n    config.default().modl = 1",
        ":3: the config file raised AttributeError",
    ),
    "has no function": ("get_config = 3", ": there is no function get_config()"),
    "returns nothing": ("def get_config():\n    pass", ": get_config() must return the config"),
    "returns a dict": ("def get_config():\n    return {}", "config.default(); got dict."),
}
CHANGED = {  # what stands between default() and return: what is said
    "c = ml_collections.ConfigDict({'a': 1})": "config field a does not exist",
    "c = ml_collections.ConfigDict()": "config field model must be a section with fields",
    "c.unlock(); c.lr = 1": "config field lr does not exist",
    "c.unlock(); del c.data.seed": "config field data.seed is missing: begin with",
    "c = c.to_dict(); c['model'] = 3; c = ml_collections.ConfigDict(c)": (
        "config field model must be a section with fields"
    ),
    "c = c.to_dict(); c['data']['seed'] = (1, 2); c = ml_collections.ConfigDict(c)": (
        "data.seed must be of type int; got (1, 2)"
    ),
    "c = c.to_dict(); c['data']['seed'] = None; c = ml_collections.ConfigDict(c)": (
        "data.seed must be of type int; got None"
    ),
    "c.data.seed = 10**5000": "data.seed must be a number below 2**63",
}
FRAME = """import ml_collections
from diq_jax import config
def get_config():
    c = config.default()
    {}
    return c
"""
CASES = [*FILES.values(), *((FRAME.format(line), said) for line, said in CHANGED.items())]


@pytest.mark.parametrize(("text", "said"), CASES, ids=[*FILES, *CHANGED])
def test_a_config_file_that_goes_wrong_is_one_sentence(text, said, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(errors.UserError) as e:
        config_files.load(str(path))
    assert str(e.value).startswith(str(path)) and said in str(e.value)
    assert "\n" not in str(e.value)


def test_a_config_file_gets_what_stands_behind_its_name(tmp_path):
    path = tmp_path / "mine.py"
    text = FRAME.replace("get_config()", "get_config(a='1')").format("c.data.seed = int(a)")
    path.write_text(text)
    assert config_files.load(str(path)).data.seed == 1
    found = config_files.load(f"{path}:22")
    assert found.data.seed == 22 and found.is_locked
    with pytest.raises(errors.UserError, match=r"no config file .*main\.py\. Did you mean 'mine"):
        config_files.load(str(tmp_path / "main.py"))


def test_the_command_line_ends_a_wrong_config_file_with_code_2(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("1 / 0")
    ended = scripts.script("run_diq", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    said = f"error: {path}:1: the config file raised ZeroDivisionError: division by zero.\n"
    assert (ended.returncode, ended.stderr) == (2, said)


# What another field must be for a value to be let in, and values where the usual change is none.
CHANGED_TO = {
    "model.path": "another", "data.pool": "mine.jsonl", "data.date": "2025-01-01",
    "influence.direction": "gauss_newton", "influence.projection.dim": 4098,
    "selection.quadrant_order": "2,1,3,4", "selection.retention_ratio": 0.2,
    "selection.source_cap": 0.5, "evaluate.groups": "G=medqa", "evaluate.top_p": 0.5,
    "evaluate.temperature": 0.5, "finetune.accumulation_steps": 2,
    "finetune.dpo.accumulation_steps": 2, "finetune.baselines": "influence",
}  # fmt: skip
ALONG = {
    "evaluate.samples": {"evaluate.temperature": 1.0},
    "influence.normalize": {"influence.engine": "projected"},
    "selection.paraphrase_similarity": {"difficulty.encoder": "e"},
}


def changed(field):
    """A config and the same with another value of one field."""
    default = functools.reduce(getattr, field.split("."), config.default())
    declared = {name: found.metadata["declared"] for name, _, found in fields.walk(config.Config)}
    if field in CHANGED_TO:
        value = CHANGED_TO[field]
    elif choices := declared[field].choices:
        value = next(choice for choice in choices if choice != default)
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, str):
        value = default + "x"
    else:
        value = default + 1 if isinstance(default, int) else default * 0.8 + 0.003
    beside = {"data.targets": "sample", "data.tests": "sample", "difficulty.source": "sample"}
    beside |= ALONG.get(field, {})
    return resolved(beside), resolved(beside | {field: value})


@pytest.mark.parametrize("field", config.field_names())
def test_a_changed_field_makes_its_stages_run_again_and_no_other(field):
    """Unless its declaration says that it is harmless, some stage refuses to go on."""
    before, after = ({"config": dataclasses.asdict(c), "inputs": {}} for c in changed(field))
    every = [*pipeline.STAGES.values(), train_classifier.classifier()]
    again = {s.name for s in every if stages._differences(s, before, after)}
    _, owner, found = next(row for row in fields.walk(config.Config) if row[0] == field)
    decides = found.metadata["declared"].decides
    assert again == set(owner.decides if decides is None else decides)
    harmless = decides == () or owner is config.Parallel
    assert bool(again) != harmless


def test_every_field_has_a_sentence_in_the_help():
    text = config.describe()
    for name, _, found in fields.walk(config.Config):
        assert f"--config.{name}=" in text
        assert re.search(r"[.]$", found.metadata["declared"].says), name
    only = config.describe("influence.lora")
    assert "--config.influence.lora.rank=8" in only and "finetune" not in only
    with pytest.raises(errors.UserError, match="Did you mean 'influence'"):
        config.describe("influense")


def test_a_row_of_a_table_is_a_choice_with_its_sentence_and_its_conflicts(monkeypatch):
    def conflicts(settings):
        yield settings.per_token, "influence.direction=new has no tokens."

    row = kinds.DirectionKind("a new one", lambda problem, space, point, g: (g, {}), conflicts)
    monkeypatch.setitem(kinds.DIRECTIONS, "new", row)
    assert "new: a new one" in " ".join(config.describe("influence").split())
    assert resolved({"influence.direction": "new"}).influence.direction == "new"
    assert resolved({"influence.direction": "peft:mine"}).influence.direction == "peft:mine"
    with pytest.raises(errors.UserError, match="new has no tokens"):
        resolved({"influence.direction": "new", "influence.per_token": True})
    with pytest.raises(errors.UserError, match=r"one of mean, .*peft:FOLDER, new; got 'nw'"):
        resolved({"influence.direction": "nw"})
