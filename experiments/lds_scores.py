"""Scores by each way that measure_lds.py compares: ours in this process, other tools in theirs."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import datamodel
from diq_jax import errors, influence_config
from diq_jax.data import batches, example
from diq_jax.influence import curvature, direction, exact, kinds, projection
from diq_jax.models import config as model_config
from diq_jax.models import hf
from diq_jax.run import artifacts, progress

CHUNK = 8  # directions that one scoring program takes
ROOT = pathlib.Path(__file__).parents[1]
PYTHON = ROOT / ".venv-peers/bin/python"
Found = dict[str, tuple[np.ndarray, float]]  # {way: (scores (rows, targets), seconds)}


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """The tiny model at its base, its rows, and batches of one shape."""

    cfg: model_config.DecoderConfig
    params: dict
    rows: list[example.Encoded]
    goals: list[example.Encoded]
    batch: batches.Batch
    targets: batches.Batch


def score_all(
    setting: Setting,
    settings: influence_config.GaussNewton,
    dims: Sequence[int],
    fit: Callable[[], direction.Point],
    seed: int,
) -> Found:
    """Scores by each way of ours, larger is better; all at the base. Seconds have compilation in.

    Args:
        dims: of the projections, ascending.
        fit: trains on all rows, for Adam's moments.
    """
    cfg, pool = setting.cfg, setting.batch
    rest = {"params": jax.tree.map(lambda x: None, setting.params), "adapter": None}
    space = ({"params": setting.params, "adapter": None}, rest)
    rows, count = len(setting.rows), len(setting.goals)
    parts = in_parts(pool, np.arange(rows))
    found: Found = {}

    def timed(name, fn, before=0.0):
        started = time.perf_counter()
        made = fn()
        found[name] = made, before + time.perf_counter() - started

    started = time.perf_counter()
    goals = target_gradients(setting, space)
    spent = time.perf_counter() - started
    timed("exact, mean", lambda: along(space, goals, parts, cfg), spent)

    def by_adam():
        point = fit()
        moments = dataclasses.replace(point, second={"params": point.second, "adapter": None})
        return along(space, [kinds.adam(g, moments) for g in goals], parts, cfg)

    def by_gauss_newton():
        sample = np.random.Generator(np.random.PCG64(settings.seed)).permutation(rows)
        of = in_parts(pool, sample[: settings.examples])
        return along(space, gauss_newton(space, goals, of, settings, cfg), parts, cfg)

    timed("exact, adam", by_adam, spent)
    timed("exact, gauss_newton", by_gauss_newton, spent)
    found |= projected(space, goals, parts, cfg, dims, spent)
    losses = np.asarray(datamodel.losses(setting.params, pool, cfg))
    columns = {
        "highest loss": losses,
        "shortest answers": -np.array([row.answer_tokens for row in setting.rows], np.float64),
        "random": np.random.Generator(np.random.PCG64(seed)).normal(size=rows),
    }
    return found | {k: (np.repeat(v[:, None], count, axis=1), 0.0) for k, v in columns.items()}


def target_gradients(setting: Setting, space) -> list:
    """Returns the gradient of each target's loss."""
    one = jax.jit(
        jax.grad(
            lambda chosen, batch: direction.losses(chosen, space[1], batch, setting.cfg, "mean")[0]
        )
    )
    return [
        one(space[0], jax.tree.map(lambda x, i=i: x[i : i + 1], setting.targets))
        for i in range(len(setting.goals))
    ]


def score_peers(setting: Setting, names: Sequence[str], folder: pathlib.Path) -> Found:
    """Scores by other tools, each in its own process; reads what is there of model and rows.

    Raises:
        UserError: `make peers` was not run, or a tool failed: its output is in the folder.
    """
    if not names:
        return {}
    if not PYTHON.exists():
        raise errors.UserError(f"--peers needs {PYTHON}: run `make peers`.")
    cfg, model = setting.cfg, folder / "model"
    hf.save_decoder(model, setting.params, hf_config(cfg), 2**30)
    for name, rows in (("rows", setting.rows), ("queries", setting.goals)):
        artifacts.write_jsonl(folder / f"{name}.jsonl", [
            {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows
        ])  # fmt: skip
    key = "".join(
        artifacts.sha256(path)[:16]
        for path in (model / "model.safetensors", folder / "rows.jsonl", folder / "queries.jsonl")
    )
    found = {}
    for name in names:
        scratch = folder / f"{name}-{key}".replace(" ", "")
        if not (scratch / "done.json").exists():
            _run_peer(name, folder, scratch)
        about = json.loads((scratch / "done.json").read_text())
        found[f"{about['version']}, {name}"] = np.load(scratch / f"{name}.npy"), about["seconds"]
    return found


def _run_peer(name: str, folder: pathlib.Path, scratch: pathlib.Path) -> None:
    command = [
        str(PYTHON), str(ROOT / "experiments/peers/score_peers.py"), f"--model={folder / 'model'}",
        f"--rows={folder / 'rows.jsonl'}", f"--queries={folder / 'queries.jsonl'}",
        f"--scratch={scratch}", f"--method={name}",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        artifacts.write_text(folder / f"{name}.log", ended.stdout + ended.stderr)
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise errors.UserError(f"--peers={name} failed ({last}); see {folder / name}.log.")
    artifacts.write_text(scratch / "done.json", ended.stdout.strip().splitlines()[-1])


def hf_config(cfg: model_config.DecoderConfig) -> dict:
    """Returns the config.json of measure_lds.py's model."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": cfg.model_dim, "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size, "rms_norm_eps": cfg.norm_eps, "rope_theta": 1e4,
        "max_position_embeddings": cfg.max_positions, "hidden_act": "silu",
        "tie_word_embeddings": cfg.tied_head,
    }  # fmt: skip


def in_parts(pool: batches.Batch, rows: np.ndarray) -> list[batches.Batch]:
    """Some rows of the pool, a few at a time."""
    return [jax.tree.map(lambda x, i=i: x[rows[i : i + 32]], pool) for i in range(0, len(rows), 32)]


def gauss_newton(space, goals, parts, settings: influence_config.GaussNewton, cfg) -> list:
    """The direction of each target, with G over the rows of `parts`."""
    one = functools.partial(curvature.product, cfg=cfg, reduction="mean")
    # Only v differs between targets, so that the rows are linearised once.
    step = jax.jit(jax.vmap(one, in_axes=(None, None, 0, None)))
    rows = sum(part.tokens.shape[0] for part in parts)

    def multiply(v):
        images = (step(*space, v, part) for part in parts)
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), images)
        return jax.tree.map(lambda x: x / rows, total)

    limits = settings.damping, settings.iterations, settings.tolerance
    solved = []
    with progress.Progress("gauss_newton", len(goals)) as bar:
        for i in range(0, len(goals), CHUNK):
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *goals[i : i + CHUNK])
            v, abouts = curvature.solve(multiply, stacked, *limits)
            solved += [jax.tree.map(lambda x, k=k: x[k], v) for k in range(len(abouts))]
            bar.update(len(abouts), tokens=0)
    return solved


def along(space, directions, parts, cfg) -> np.ndarray:
    """Exact scores along each direction, (rows, Q)."""
    step = jax.jit(lambda v, batch: exact.scores(space[0], v, space[1], batch, cfg, "mean"))
    columns = []
    for i in range(0, len(directions), CHUNK):
        v = direction.stack(directions[i : i + CHUNK], [1.0] * len(directions[i : i + CHUNK]))
        columns.append(np.concatenate([step(v, part).influence for part in parts]))
    return np.concatenate(columns, axis=1)


def projected(space, goals, parts, cfg, dims: Sequence[int], before: float) -> Found:
    """Products of projected gradients, and their cosine at the largest dimension."""
    found: Found = {}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *goals)
    for dim in dims:
        started, settings = time.perf_counter(), influence_config.Projection(dim=dim)

        @jax.jit
        def sketch(tree, settings=settings):
            return projection.project(tree, settings)

        @jax.jit
        def rows_of(batch, settings=settings):
            def one(row):
                row = jax.tree.map(lambda x: x[None], row)
                return jax.grad(lambda c: direction.losses(c, space[1], row, cfg, "mean")[0])(
                    space[0]
                )

            return projection.project(jax.vmap(one)(batch), settings)

        left = np.concatenate([rows_of(part) for part in parts])
        right = np.asarray(sketch(stacked))
        spent = before + time.perf_counter() - started
        found[f"projected {dim:,}"] = left @ right.T, spent
    left = left / np.linalg.norm(left, axis=1, keepdims=True)
    return found | {f"projected {dims[-1]:,}, cosine": (left @ right.T, spent)}
