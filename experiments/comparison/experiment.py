"""The comparison from start to end: scores once, trainings cell by cell, one table, one picture."""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pictures

from comparison import cost, grid, picture, runner, statistics, table
from diq_jax import config, pipeline
from diq_jax.run import artifacts, devices, processes, records, stages
from diq_jax.selection import methods, select

STAGES = ("prepare", "difficulty", "influence", "selection")


def run(
    cfg: config.Config, workdir: pathlib.Path, request: grid.Request, verify: bool = True
) -> dict[str, Any]:
    """Runs the stages up to selection and every cell that is not done; writes compare/.

    With parallel.distributed every process calls this after processes.join(), as pipeline.run.

    Raises:
        UserError: bad input, or another run holds the workdir.
    """
    grid.check(cfg, request)
    pipeline.run(cfg, workdir, STAGES, overwrite=False, verify=verify)
    request = with_directions(cfg, workdir, request, verify)
    with pipeline.at_work(cfg, workdir, verify) as context:
        if cfg.parallel.distributed:
            everywhere = devices.make_placement(cfg.parallel, everywhere=True)
            context = dataclasses.replace(context, placement=everywhere)
        data = runner.read_data(context)
        ranks, removed = grid.orders(context, request)
        tokens = np.array([len(row.input_ids) for row in data.pool])
        cells = grid.cells(request, ranks, removed, tokens)
        keys, found = runner.run(context, data, cells)
        results = summarise(context, request, data, cells, keys, found)
        results["settings"]["removed"] = int(removed.sum())
        artifacts.write_json(context.path("compare/results.json"), results)
        artifacts.write_text(context.path("compare/table.md"), table.markdown(results))
        shown = picture.lines(results)
        pictures.write(context.path("compare"), "figure", shown, picture.draw, results)
    if processes.is_first():
        print(table.plain(results))
        print(f"Wrote {workdir / 'compare'}: results.json, table.md, figure.png, .svg, .csv.")
    return results


def with_directions(
    cfg: config.Config, workdir: pathlib.Path, request: grid.Request, verify: bool = True
) -> grid.Request:
    """Scores and selects along request.directions, each in a folder; finished ones are skipped.

    Returns:
        The request with the orders of its methods along them as rankings, METHOD@DIRECTION.
    """
    rankings = dict(request.rankings)
    for name in request.directions:
        folder = workdir / "compare" / "directions" / name
        for stage in STAGES[:2]:
            if processes.is_first() and not (folder / stage / records.NAME).exists():
                shutil.rmtree(folder / stage, ignore_errors=True)
                shutil.copytree(workdir / stage, folder / stage)
        influence = dataclasses.replace(cfg.influence, direction=name, **_needs(cfg, name))
        along = dataclasses.replace(cfg, influence=influence)
        processes.wait(f"the stages before {name} are copied")
        if processes.is_first():
            print(f"influence.direction={name}: {folder}", flush=True)
        pipeline.run(along, folder, STAGES, overwrite=False, verify=verify)
        moved = {"influence", "by_target"}
        for method in request.methods:
            if moved & set(methods.METHODS[method].reads) and methods.METHODS[method].nests:
                rankings[f"{method}@{name}"] = (folder, method)
    return dataclasses.replace(request, rankings=rankings)


def _needs(cfg, direction) -> dict[str, Any]:
    """The settings without which influence.direction is refused."""
    warm = cfg.influence.warmup
    least = {"adam": 1, "less": 4}.get(direction, 0)
    found: dict[str, Any] = {}
    if not warm.epochs and least:
        found["warmup"] = dataclasses.replace(warm, epochs=least)
    if direction == "less":
        found |= {"engine": "projected", "normalize": "cosine", "parameters": "lora"}
        found |= {"direction_rank": 0, "per_token": False, "packing": False}
    return found


def dry_run(
    cfg: config.Config, workdir: pathlib.Path, request: grid.Request, verify: bool = True
) -> None:
    """Prints the grid, then prepares the data and prints the predicted FLOPs; trains nothing."""
    grid.check(cfg, request)
    pool = "full" if 1 in request.budgets else "no full"
    shares = [budget for budget in request.budgets if budget < 1]
    arms = len(shares) * len(request.names) * len(request.units)
    count = (arms + (1 in request.budgets)) * request.seeds
    print(f"{count} cells: {len(request.names)} methods ({', '.join(request.names)}) x "
          f"{', '.join(f'{100 * b:g} %' for b in shares) or 'no budget'} and {pool} x "
          f"{request.seeds} seeds", flush=True)  # fmt: skip
    pipeline.run(cfg, workdir, ["prepare"], overwrite=False, verify=verify)
    with pipeline.at_work(cfg, workdir, verify) as context:
        print(table.prediction(predict(context, request)))


def predict(context: stages.Context, request: grid.Request) -> list[tuple[str, float]]:
    """(what, FLOPs): a budget's trainings at the pool's mean length, before anything is scored."""
    cfg, data = context.config, runner.read_data(context)
    shape = cost.decoder_config(cfg)
    epoch = cost.total_flops(shape, data.pool, "thin_gradient", cfg.finetune.remat)
    rows = [
        ("influence", cost.influence_flops(shape, cfg.influence, data.pool, data.targets)),
    ]
    if cfg.difficulty.model_scores:
        rows.append(("model scores", cost.model_score_flops(shape, data.pool, data.targets)))
    cells = 1
    for budget in request.budgets:
        arms = 1 if budget == 1 else len(request.names) * len(request.units)
        share = select.budget(budget, len(data.pool)) / len(data.pool)
        flops = arms * request.seeds * cfg.finetune.epochs * share * epoch
        rows.append((f"{arms * request.seeds} trainings on {100 * budget:g} %", flops))
        cells += arms * request.seeds
    tested = [*data.targets, *(question.row for question in data.questions)]
    rows.append((f"{cells} evaluations", cells * cost.total_flops(shape, tested, "forward")))
    return rows


def summarise(
    context: stages.Context,
    request: grid.Request,
    data: runner.CellData,
    cells: Sequence[grid.GridCell],
    keys: Sequence[str],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """What results.json holds: a row for the base model, and for each method and budget."""
    settings = context.config.evaluate
    tests = [question.task for question in data.questions]
    names = (*runner.metrics(context.config), "target_loss")
    tasks = {m: data.target_tasks if m == "target_loss" else tests for m in names}
    groups: dict[tuple[str, float, str], list[str]] = {}
    for cell, key in zip(cells, keys, strict=True):
        groups.setdefault((cell.method, cell.budget, cell.unit), []).append(key)

    def values(keys):
        return {m: np.array([found[k][m] for k in keys], np.float64) for m in names}

    drawn = settings.bootstrap_samples, settings.seed
    zero_shot = values([runner.BASE])
    base = statistics.compare(zero_shot, None, tasks, *drawn)
    rows = [{"method": runner.BASE, "budget": 0.0, "unit": "rows", "metrics": base}]
    costs = _method_costs(context, request)
    for (method, budget, unit), mine in groups.items():
        reference = None
        if method not in (grid.RANDOM, grid.FULL):
            reference = values(groups[grid.RANDOM, budget, unit])
        measured = statistics.compare(values(mine), reference, tasks, *drawn, zero_shot)
        trained = [found[key] for key in mine]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "unit": unit,
                "rows": round(_mean(trained, "rows")),
                **{name: _mean(trained, name) for name in AVERAGED},
                "metrics": measured,
                "cost": _total(costs[method], trained),
            }
        )
    statistics.correct(rows)
    return {
        "settings": {
            "model": context.config.model.path,
            "pool": len(data.pool),
            "targets": len(data.targets),
            "tests": len(data.questions),
            "tasks": len(set(tests)),
            "seeds": request.seeds,
            "bootstrap_samples": settings.bootstrap_samples,
            "versions": stages.versions(),
        },
        "rows": rows,
    }


AVERAGED = ("steps", "tokens", "answer_tokens", "first_loss", "last_loss")


def _mean(results, name) -> float:
    return float(np.mean([result[name] for result in results]))


def _method_costs(context, request) -> dict[str, dict[str, float]]:
    """FLOPs and seconds of selecting by each method, before any training."""
    own = cost.selection_costs(context.workdir, context.verify)
    sources = {name: (own, name) for name in request.methods}
    for name, (workdir, method) in request.rankings.items():
        sources[name] = (
            cost.selection_costs(workdir, context.verify),
            grid.ranking_method(workdir, method),
        )
    zero = {"flops": 0.0, "seconds": 0.0}
    return {
        name: {unit: sum(parts[part][unit] for part in cost.needs(method)) for unit in zero}
        for name, (parts, method) in sources.items()
    } | {grid.FULL: zero}


def _total(selection, trained) -> dict[str, float]:
    """The cost of a row: its selection once, and one training of it."""
    flops, seconds = (_mean(trained, name) for name in ("flops", "train_seconds"))
    return {
        "selection_flops": selection["flops"],
        "training_flops": flops,
        "flops": selection["flops"] + flops,
        "selection_seconds": round(selection["seconds"], 1),
        "training_seconds": round(seconds, 1),
        "seconds": round(selection["seconds"] + seconds, 1),
        "evaluate_seconds": round(_mean(trained, "evaluate_seconds"), 1),
    }
