"""Model cards and the upload, against a stand-in for the hub."""

import json

import huggingface_hub
import pytest

from diq_jax import errors
from diq_jax.commands import card
from diq_jax.models import checkpoint


def test_a_card_has_the_selection_and_the_numbers(tmp_path):
    adapter = tmp_path / "finetune/adapter"
    adapter.mkdir(parents=True)
    alone = card.of_model("org/base", "v2", adapter)
    assert alone.startswith("---\nbase_model: org/base\n") and "revision v2" in alone
    assert "license and terms of use apply" in alone and "Results" not in alone
    assert "base_model:" not in card.of_model("package:llm/model.gguf", "", adapter)
    (tmp_path / "selection").mkdir()
    chosen = {
        "selection": {"method": "diq", "retention_ratio": 0.1},
        "data": {"pool": "p.jsonl", "targets": "t.jsonl", "template": "think"},
    }
    record = {
        "stage": "selection", "status": "done", "config": chosen, "inputs": {}, "outputs": {},
        "rows": 40, "seconds": 1.0, "selected": 4, "versions": {"diq_jax": "1"},
    }  # fmt: skip
    (tmp_path / "selection/stage.json").write_text(json.dumps(record))
    (tmp_path / "evaluate").mkdir()
    measured = {"test_loss": {"mean": 1.25, "low": 1.0, "high": 1.5}, "tasks": {}}
    results = {"tests": 9, "models": {"selected": measured}}
    (tmp_path / "evaluate/results.json").write_text(json.dumps(results))
    text = card.of_model("org/base", "", adapter)
    assert "method diq, retention_ratio 0.1: 4 of 40 rows" in text
    assert "| selected | 1.25 (1 to 1.5) |" in text and "9 test questions" in text
    data = card.of_data(tmp_path, "rows.jsonl")
    assert "- config_name: default\n  data_files: rows.jsonl\n---" in data
    assert "method diq, retention_ratio 0.1: 4 of 40 rows" in data and "template think" in data
    assert "| selected | 1.25 (1 to 1.5) |" in data
    assert "license and terms of use apply" in data


def test_a_push_is_private_and_a_refusal_one_sentence(tmp_path, monkeypatch):
    asked = []

    class Hub:
        def create_repo(self, name, private, exist_ok, repo_type):
            asked.append((name, private, repo_type))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, repo_type):
            asked.append((repo_id, folder_path, repo_type))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert card.push(tmp_path, "me/model") == "https://hub/me/model"
    assert asked == [("me/model", True, "model"), ("me/model", tmp_path, "model")]
    card.push(tmp_path, "me/rows", "dataset")
    assert asked[2:] == [("me/rows", True, "dataset"), ("me/rows", tmp_path, "dataset")]

    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(errors.UserError, match=r"--push: me/model cannot be written: offline"):
        card.push(tmp_path, "me/model")


def test_a_revision_is_split_from_a_hub_id_alone(tmp_path):
    assert checkpoint.split_revision("org/base@main") == ("org/base", "main")
    assert checkpoint.split_revision("org/base") == ("org/base", "")
    assert checkpoint.split_revision("package:a/b@c") == ("package:a/b@c", "")
    assert checkpoint.split_revision(tmp_path) == (str(tmp_path), "")
