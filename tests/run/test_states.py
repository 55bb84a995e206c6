"""A damaged or unfinished train state costs the steps since the one before it, and is said."""

import json
import logging
import pathlib
import shutil

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from diq_jax import errors
from diq_jax.models import loop
from diq_jax.run import artifacts, states


@flax.struct.dataclass
class State:
    step: jnp.ndarray
    factors: dict


def state(value):
    return State(jnp.int32(value), {"a": jnp.full((3, 2), value, jnp.float32), "b": None})


def saved(folder, *values):
    """Saves a state after each of these steps."""
    with states.States(folder, "test") as kept:
        kept.restore(state(0))
        for value in values:
            kept.save(state(value), [{"loss": 0.1 * i} for i in range(value)])


def restored(folder):
    """(the step and the factors' value, records) as the next call of the command finds them."""
    with states.States(folder, "test") as kept:
        found, records = kept.restore(state(0))
    assert found.factors["b"] is None and len(records) == found.step
    return int(found.step), float(found.factors["a"][2, 1]), records


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def test_two_states_are_kept_and_the_last_one_is_taken(tmp_path):
    assert restored(tmp_path)[:2] == (0, 0.0)
    saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    assert restored(tmp_path) == (3, 3.0, [{"loss": 0.0}, {"loss": 0.1}, {"loss": 0.2}])


def flip(file):
    data = file.read_bytes()
    place = len(data) // 2
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "emptied": lambda file: file.write_bytes(b""),
    "lost": pathlib.Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_the_last_state_costs_the_steps_since_the_older(
    damage, tmp_path, caplog
):
    saved(tmp_path / "whole", 1, 2)
    names = files(tmp_path / "whole/2")
    assert len(names) > 5
    for number, name in enumerate(names):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "whole", folder)
        DAMAGES[damage](folder / "2" / name)
        with caplog.at_level(logging.WARNING, "absl"):
            caplog.clear()
            assert restored(folder)[:2] == (1, 1.0), name
        [said] = [record.getMessage() for record in caplog.records]
        assert f"{folder / '2'}: " in said and said.endswith("the older one, after step 1.")


def test_training_goes_on_from_the_older_state_and_keeps_the_step_again(tmp_path):
    saved(tmp_path, 1, 2)
    flip(tmp_path / "2/state/_METADATA")
    saved(tmp_path, 2, 3)
    assert restored(tmp_path)[:2] == (3, 3.0)


def test_states_that_are_all_damaged_are_one_sentence(tmp_path):
    saved(tmp_path, 1, 2)
    for step in "12":
        flip(tmp_path / step / "state/_METADATA")
    with pytest.raises(errors.UserError) as raised:
        restored(tmp_path)
    said = str(raised.value)
    assert f"{tmp_path / '2'}: state/_METADATA is not as it was written" in said
    assert said.startswith("test: every checkpoint is damaged") and "\n" not in said
    assert f"Remove {tmp_path}, and the same command trains from the start." in said


def test_a_kill_in_the_first_save_starts_again(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "1/checksums.json").unlink()
    assert restored(tmp_path)[:2] == (0, 0.0) and not (tmp_path / "1").exists()


def train(folder, **changes):
    upkeep = loop.Upkeep(folder, checkpoint_every=5, **changes)
    return loop.train("test", [()] * 3, [], state(1), None, train_step, upkeep)


def train_step(state, _):
    """The last update, not its loss, is ruined."""
    value = jnp.where(state.step == 2, jnp.inf, 1.0)
    metrics = {"loss": jnp.float32(1.0), "gradient_norm": jnp.float32(1.0)}
    return State(state.step + 1, {"a": state.factors["a"] * value, "b": None}), metrics


def test_a_last_update_that_ruins_the_parameters_is_named_and_kept_nowhere(tmp_path):
    for _ in range(2):
        with pytest.raises(errors.UserError, match=r"not finite after step 2 \(a\).*learning_rate"):
            train(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_target_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(errors.UserError, match="target loss nan after step 0"):
        train(tmp_path, eval_every=1, evaluate=lambda state, frozen, before: np.nan)


def test_without_a_folder_nothing_is_kept_and_the_last_update_is_checked():
    with pytest.raises(errors.UserError, match=r"not finite after step 2 \(a\)"):
        train(None)


def test_a_state_holds_the_records_of_its_steps_though_more_come_while_it_is_written(tmp_path):
    for attempt in range(20):
        folder, records = tmp_path / str(attempt), [{"loss": 1.0}]
        with states.States(folder, "test") as kept:
            kept.save({"x": jnp.zeros(3)}, records)
            records[0]["loss"] = 5.0
            records.append({"loss": 2.0})
        with states.States(folder, "test") as kept:
            assert kept.restore({"x": jnp.zeros(3)})[1] == [{"loss": 1.0}]


def test_a_state_with_the_records_of_other_steps_is_left_out(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    (tmp_path / "2/records/metadata").write_text('[{"loss": 0.0}]')
    sums = json.loads((tmp_path / "2/checksums.json").read_text())
    sums["records/metadata"] = artifacts.sha256(tmp_path / "2/records/metadata")
    (tmp_path / "2/checksums.json").write_text(json.dumps(sums))
    with caplog.at_level(logging.WARNING, "absl"):
        assert restored(tmp_path)[:2] == (1, 1.0)
    assert "2: it has 1 records" in caplog.text
