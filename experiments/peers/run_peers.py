r"""What a user would otherwise use to score training rows: speed and memory, same weights and rows.

    make peers
    .venv-peers/bin/python experiments/peers/run_peers.py --model=FOLDER --rows=ROWS.jsonl \
        --scratch=DIR [--only=NAME]

Prints one JSON object, {"rows": [..], "versions": {..}, ..}, and a line for each method on stderr.
FOLDER is a transformers folder; a line of ROWS.jsonl holds id, input_ids and labels (-100 = not
scored). --scores=FILE gets each row's inner product with the mean gradient of all rows, in the
method's own space and up to that space's scale.

Everything is float32, on CUDA if torch sees it, else on the CPU. Each method runs in a process of
its own, whose output is DIR/NAME.log; one that is missing or fails becomes {"name": .., "skipped":
reason}. A turn is one pass over all rows; the time is the median turn, after an untimed warm-up.
`peak_bytes` is the highest resident memory (CUDA: allocated memory) of the turns over that before
the model was loaded: it counts the parameters and excludes the libraries. `floats_per_example` is
what a method keeps to answer a later query, 0 if it only scores. LoRA sits on q, k and v, with a
random B; `linear` is every linear layer but the vocabulary head.

LESS is not on PyPI; its loop is written out here. It regenerates its projection for each 16 rows,
and so does dattri here; bergson does for each batch. Give a multiple of 16 rows, or the first two
look slower than they are. dattri-llm scores against one target row, whose gradient is in its time.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import peft
import torch
import torch.nn.functional as F
import tqdm
import transformers

GROUP = 16  # rows that share one regeneration of a dense projection
SIDE = 16  # bergson's default and LogIX's projection of a linear layer's gradient: SIDE x SIDE
VMAP_BATCH = 4  # vmap(grad) holds 1.6 GB a row of 256 tokens with SmolLM2-135M
PACKAGES = ["torch", "transformers", "peft"]
PACKAGES += ["traker", "bergson", "logix-ai", "dattri", "dattri-llm"]


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process, from Linux's /proc."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}.")


class Bench:
    """Rows, model and clock of one method. A method imports its library, loads, then measures."""

    def __init__(self, args, rows: list[dict]) -> None:
        self.args, self.rows = args, rows
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(self, lora: bool = False, **settings) -> torch.nn.Module:
        """The model, with LoRA on q, k and v if asked; memory is counted from here."""
        self.before = 0 if self.device.type == "cuda" else resident_bytes("VmRSS")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.args.model, dtype=torch.float32, **settings
        )
        if lora:
            torch.manual_seed(0)
            adapter = peft.LoraConfig(
                r=self.args.rank,
                lora_alpha=2 * self.args.rank,
                target_modules=["q_proj", "k_proj", "v_proj"],
                init_lora_weights=False,  # B = 0 would make the gradient of A zero
                task_type="CAUSAL_LM",
            )
            model = peft.get_peft_model(model, adapter)
        return model.to(self.device).eval()

    def batches(self, rows: list[dict], size: int):
        """Dicts of input_ids, attention_mask and labels (B, T), padded to the longest row."""
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            longest = max(len(row["input_ids"]) for row in part)
            columns = {"input_ids": 0, "labels": -100}
            batch = {
                name: torch.tensor(
                    [row[name] + [fill] * (longest - len(row[name])) for row in part]
                )
                for name, fill in columns.items()
            }
            lengths = torch.tensor([[len(row["input_ids"])] for row in part])
            batch["attention_mask"] = (torch.arange(longest) < lengths).long()
            yield {name: x.to(self.device) for name, x in batch.items()}

    def measure(self, turn, floats=None, warm_up=None, feature_scale=1.0) -> dict:
        """Times turn(rows) -> gradients (N, floats), scores (N,) or None.

        Args:
            warm_up: Called in place of the turn before the clock starts, where a turn is slow.
            feature_scale: Of the gradients, so that their inner product is unbiased.

        Returns:
            The method's row of the table, with its `scores` (a list or None).
        """
        (warm_up or turn)(self.rows[: self.args.batch])
        self._reset_peak()
        seconds = []
        for _ in tqdm.trange(self.args.repeats, desc=self.args.only, file=sys.stderr):
            found = None  # frees the last turn's gradients
            start = time.perf_counter()
            found = turn(self.rows)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        row = {
            "examples_per_s": len(self.rows) / median,
            "tokens_per_s": sum(len(row["input_ids"]) for row in self.rows) / median,
            "peak_bytes": self._peak() - self.before,
            "floats_per_example": floats,
            "scores": None,
        }
        if found is not None:
            found = found.float().cpu()
            if found.ndim == 2:
                found = (found @ found.mean(0)) * feature_scale**2
            row["scores"] = found.tolist()
        return row

    def _reset_peak(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    def _peak(self) -> int:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")


def row_losses(logits, labels):
    """Mean negative log-likelihood (B,) of each row's scored tokens; position t predicts t + 1."""
    targets = labels[:, 1:]
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    scored = (targets != -100).sum(1).clamp(min=1)
    return nats.view_as(targets).sum(1) / scored


def linears(model) -> list[str]:
    """Names of the linear layers except the vocabulary head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def torch_forward(bench: Bench) -> dict:
    model = bench.load()

    @torch.no_grad()
    def turn(rows):
        for batch in bench.batches(rows, bench.args.batch):
            model(**batch)

    return bench.measure(turn)


def torch_training(bench: Bench, lora: bool) -> dict:
    """Forward and backward; no optimiser."""
    model = bench.load(lora).train()

    def turn(rows):
        for batch in bench.batches(rows, bench.args.batch):
            model.zero_grad()
            model(**batch).loss.backward()

    return bench.measure(turn)


def less(bench: Bench) -> dict:
    """LESS's collection: batch 1, backward, concatenate, project every GROUP rows with traker."""
    from trak import projectors

    model = bench.load(lora=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    size, dim = sum(p.numel() for p in trained), bench.args.dim
    kind = projectors.BasicProjector
    if bench.device.type == "cuda":
        with contextlib.suppress(ImportError):  # an optional extension, as in LESS
            importlib.import_module("fast_jl")
            kind = projectors.CudaProjector
    projector = kind(
        grad_dim=size,
        proj_dim=dim,
        seed=0,
        proj_type=projectors.ProjectionType.rademacher,
        device=bench.device,
        block_size=max(1, min(128, 2**31 // (4 * size))),  # a block of at most 2 GiB
        dtype=torch.float32,
        max_batch_size=GROUP,
    )

    def gradients(rows):
        for batch in bench.batches(rows, 1):
            model.zero_grad()
            model(**batch).loss.backward()
            yield torch.cat([p.grad.flatten() for p in trained])

    def turn(rows):
        groups = [rows[i : i + GROUP] for i in range(0, len(rows), GROUP)]
        return torch.cat(
            [projector.project(torch.stack([*gradients(g)]), model_id=0).cpu() for g in groups]
        )

    return bench.measure(turn, dim, lambda rows: list(gradients(rows)), dim**-0.5)


def logix(bench: Bench) -> dict:
    """LoGra: gradients of a zero SIDE x SIDE core between two random factors at each linear."""
    import logix as library
    from logix.config import LoRAConfig

    model = bench.load()
    config = pathlib.Path("logix.yaml")
    config.write_text(json.dumps({"root_dir": "logix"}))  # JSON is YAML
    run = library.LogIX("peers", config=str(config))
    names = linears(model)
    run.watch(model, name_filter=names)
    torch.manual_seed(0)
    run.add_lora(lora_config=LoRAConfig(rank=SIDE))
    run.setup({"grad": ["log"]})

    def turn(rows):
        found = []
        for batch in bench.batches(rows, bench.args.batch):
            labels, mask = batch.pop("labels"), batch["attention_mask"]
            with run(data_id=[str(i) for i in range(len(mask))], mask=mask):
                model.zero_grad()
                row_losses(model(**batch).logits, labels).sum().backward()
            _, log = run.get_log()
            found.append(torch.cat([module["grad"].flatten(1) for module in log.values()], 1).cpu())
        return torch.cat(found)

    return bench.measure(turn, len(names) * SIDE**2)


def bergson(bench: Bench, lora: bool, score: bool = False, **projection) -> dict:
    """Uses bergson's hooks, gradients kept in memory, or scored against their mean as they appear.

    Args:
        projection: Of its GradientProcessor; none keeps or scores the gradients themselves.
    """
    import bergson as library
    from bergson.score import score_writer
    from bergson.utils import peft as bergson_peft
    from datasets import Dataset

    model = bench.load(lora)
    targets = bergson_peft.detect_peft_modules(model) if lora else None
    model.requires_grad_(False)  # as bergson's own loader: a backward pass down to the embedding
    model.get_input_embeddings().requires_grad_(True)
    config = library.IndexConfig(run_path=str(pathlib.Path("bergson").resolve()))
    config.loss_reduction = "mean"
    config.partial_run_path.mkdir(exist_ok=True)
    processor = library.GradientProcessor(**projection)

    def collect(rows, scorer=None, aggregation="none"):
        data = Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        collector = library.InMemoryCollector(
            model=model.base_model,
            cfg=config,
            processor=processor,
            target_modules=targets,
            data=data,
            scorer=scorer,
            preprocess_cfg=library.PreprocessConfig(aggregation=aggregation),
        )
        order, size = list(range(len(rows))), bench.args.batch
        batches = [order[i : i + size] for i in range(0, len(rows), size)]
        library.CollectorComputer(
            model, data, collector=collector, batches=batches, cfg=config
        ).run_with_collector_hooks()
        return collector, data

    if score:
        query = collect(bench.rows, aggregation="mean")[0].gradients

    def turn(rows):
        if not score:
            return torch.from_numpy(collect(rows)[0].builder.grad_buffer)
        writer = score_writer.InMemorySequenceScoreWriter(len(rows), 1)
        scorer = library.Scorer(query, list(query), writer, bench.device, torch.float32)
        collect(rows, scorer)
        return writer.scores[:, 0]

    floats = 0 if score else collect(bench.rows[:1])[0].builder.grad_buffer.shape[1]
    return bench.measure(turn, floats)


def dattri(bench: Bench, projected: bool) -> dict:
    """Uses dattri's vmap(grad) over the LoRA factors, then its random projection."""
    from dattri import task as dattri_task
    from dattri.func import projection

    model = bench.load(lora=True, attn_implementation="eager")

    def loss(parameters, data):
        ids, labels = data
        inputs = {"input_ids": ids[None], "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), inputs).logits
        return row_losses(logits, labels[None])[0]

    task = dattri_task.AttributionTask(loss, model, checkpoints=model.state_dict())
    parameters, _ = task.get_param()
    gradient = task.get_grad_loss_func(in_dims=(None, 0))

    @torch.no_grad()  # else an outer graph is kept of every gradient
    def gradients(rows):
        return torch.cat(
            [
                gradient(parameters, (batch["input_ids"], batch["labels"]))
                for batch in bench.batches(rows, min(VMAP_BATCH, bench.args.batch))
            ]
        )

    def turn(rows):
        if not projected:
            return gradients(rows)
        found = []
        for i in range(0, len(rows), GROUP):
            group = gradients(rows[i : i + GROUP])
            project = projection.random_project(
                group, len(group), bench.args.dim, GROUP, 0, "rademacher", device=bench.device
            )
            found.append(project(group).cpu())
        return torch.cat(found)

    return bench.measure(turn, bench.args.dim if projected else parameters.numel(), gradients)


def dattri_llm(bench: Bench) -> dict:
    """dattri-LLM's hooks and factorised inner products with the gradient of the first row."""
    import dattri_llm as library

    model = bench.load()
    names = linears(model)
    for name, p in model.named_parameters():
        p.requires_grad_(name.removesuffix(".weight") in names)

    def loss(model, data):
        ids, labels = data
        return row_losses(model(input_ids=ids).logits, labels).sum()

    arguments = library.AttributionArguments(
        output_dir="dattri-llm",
        per_device_train_batch_size=bench.args.batch,
        max_grad_norm=None,
        use_cpu=bench.device.type == "cpu",
    )
    tracin = library.TracInAttributor(arguments, task=library.AttributionTask(loss, model))
    hooks = library.HookManagerConfig(invasive_linear_io=[f"^{re.escape(n)}$" for n in names])

    def turn(rows):
        (whole,) = bench.batches(rows, len(rows))  # its loader stacks rows of one length
        data = list(zip(whole["input_ids"].cpu(), whole["labels"].cpu(), strict=True))
        tracin.attribute(data, data[:1], hook_config=hooks)

    return bench.measure(turn, 0)


def methods(args) -> dict:
    """{name: function of a Bench}, in the order of the table."""
    lora, dense = f"lora r{args.rank}", {"projection_dim": args.dim, "projection_target": "global"}
    return {
        "torch forward": torch_forward,
        "torch lora training step": functools.partial(torch_training, lora=True),
        "torch full training step": functools.partial(torch_training, lora=False),
        f"less/{lora}/{args.dim}": less,
        f"bergson/{lora}": functools.partial(bergson, lora=True),
        f"bergson/{lora}/{args.dim}": functools.partial(bergson, lora=True, **dense),
        f"bergson/linear {SIDE}x{SIDE}": functools.partial(
            bergson, lora=False, projection_dim=SIDE
        ),
        "bergson/linear score": functools.partial(bergson, lora=False, score=True),
        f"logix/linear {SIDE}x{SIDE}": logix,
        f"dattri/{lora}": functools.partial(dattri, projected=False),
        f"dattri/{lora}/{args.dim}": functools.partial(dattri, projected=True),
        "dattri-llm/linear score": dattri_llm,
    }


def run_one(args, method) -> dict:
    """One method's row in this process, or the reason why it cannot run here."""
    rows = [json.loads(line) for line in args.rows.read_text().splitlines() if line.strip()]
    os.chdir(args.scratch)  # some peers write where they are
    try:
        return {"name": args.only, **method(Bench(args, rows))}
    except (ImportError, RuntimeError) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        return {"name": args.only, "skipped": f"{type(error).__name__}: {reason}"}


def run_child(args, name: str) -> dict:
    """This script with --only=name; a crash is explained by the last line of its log."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--only={name}"]
    log = args.scratch / f"{re.sub('[^a-z0-9]+', '-', name)}.log"
    with log.open("w") as stderr:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if child.returncode == 0:
        row = json.loads(child.stdout)
    else:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        row = {"name": name, "skipped": " ".join([f"exit code {child.returncode}:", *last])}
    if "skipped" in row:
        print(f"{name:<28}skipped, {row['skipped']} (see {log})", file=sys.stderr)
    else:
        gibibytes = row["peak_bytes"] / 2**30
        speed = f"{row['examples_per_s']:7.3f} examples/s"
        print(f"{name:<28}{speed} {gibibytes:7.2f} GiB", file=sys.stderr)
    return row


def versions() -> dict:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=pathlib.Path, required=True, help="transformers folder")
    add("--rows", type=pathlib.Path, required=True, help="pre-tokenised JSON lines")
    add("--scratch", type=pathlib.Path, required=True, help="folder the peers write in")
    add("--scores", type=pathlib.Path, help="file for {name: score of each row}")
    add("--repeats", type=int, default=3, help="timed turns")
    add("--dim", type=int, default=4096, help="of the dense projections")
    add("--rank", type=int, default=8, help="of LoRA")
    add("--batch", type=int, default=8, help="rows of a batch")
    add("--only", help="one method by its name, in this process")
    args = parser.parse_args(argv)
    for flag in ("model", "rows"):
        if not getattr(args, flag).exists():
            parser.error(f"--{flag}={getattr(args, flag)} does not exist.")
    if args.only is not None and args.only not in methods(args):
        parser.error(f"--only must be one of {', '.join(methods(args))}; got {args.only!r}.")
    args.model, args.rows, args.scratch = (
        path.resolve() for path in (args.model, args.rows, args.scratch)
    )
    args.scratch.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.only is not None:
        with open(os.dup(1), "w") as stdout:
            os.dup2(2, 1)  # peers print on stdout, which belongs to the JSON
            json.dump(run_one(args, methods(args)[args.only]), stdout)
        return
    rows = [run_child(args, name) for name in methods(args)]
    scores = {row["name"]: row.pop("scores", None) for row in rows}
    if args.scores:
        args.scores.write_text(json.dumps({name: x for name, x in scores.items() if x}))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    summary = {"rows": rows, "versions": versions(), "device": device}
    print(json.dumps({**summary, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
