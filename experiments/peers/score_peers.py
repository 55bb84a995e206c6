r"""Scores training rows for query rows by the influence functions of other tools (measure_lds.py).

    .venv-peers/bin/python experiments/peers/score_peers.py --model=FOLDER --rows=ROWS.jsonl \
        --queries=ROWS.jsonl --scratch=DIR --method=kronfluence

Writes DIR/METHOD.npy, (rows, queries) float32: what training on the row does to the query's loss,
its sign turned, so that larger is better; and prints {"seconds": .., "version": ..}. FOLDER is a
transformers folder; a line of ROWS.jsonl holds input_ids and labels (-100 = not scored). The loss
of a row is the mean over its scored tokens, float32 on the CPU, over the linear layers of the
blocks, which is what these tools give curvature for (with "+ head" the vocabulary head too).
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers


def read(path: str) -> list[dict]:
    """Reads rows, padded to the longest of them."""
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    longest = max(len(row["input_ids"]) for row in rows)
    found = []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        fill = longest - len(ids)
        found.append(
            {
                "input_ids": torch.tensor(ids + [0] * fill),
                "attention_mask": torch.tensor([1] * len(ids) + [0] * fill),
                "labels": torch.tensor(labels + [-100] * fill),
            }
        )
    return found


def row_losses(logits, labels):
    """Mean negative log-likelihood (B,) of each row's scored tokens; position t predicts t + 1."""
    targets = labels[:, 1:]
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets).sum(1) / (targets != -100).sum(1).clamp(min=1)


def kronfluence(args, head: bool) -> np.ndarray:
    """EK-FAC by kronfluence with its defaults: the true Fisher, labels sampled from the model."""
    from kronfluence import analyzer, arguments
    from kronfluence import task as kronfluence_task

    model = load(args)
    output = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (head or module is not output)
    ]

    class Losses(kronfluence_task.Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch["input_ids"], batch["attention_mask"]).logits
            labels = batch["labels"]
            if sample:
                drawn = torch.distributions.Categorical(logits=logits[:, :-1].detach()).sample()
                scored = labels[:, 1:] != -100
                labels = torch.cat([labels[:, :1], torch.where(scored, drawn, -100)], dim=1)
            return row_losses(logits, labels).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return names

        def get_attention_mask(self, batch):
            return batch["attention_mask"]

    task = Losses()
    analysed = analyzer.Analyzer(
        "lds", analyzer.prepare_model(model, task), task, cpu=True, output_dir=args.scratch,
        disable_tqdm=True,
    )  # fmt: skip
    rows, queries = read(args.rows), read(args.queries)
    analysed.fit_all_factors(
        "factors", rows, per_device_batch_size=16, overwrite_output_dir=True,
        factor_args=arguments.FactorArguments(strategy="ekfac"),
    )  # fmt: skip
    analysed.compute_pairwise_scores(
        "scores", "factors", queries, rows, per_device_query_batch_size=16,
        per_device_train_batch_size=16, overwrite_output_dir=True,
        score_args=arguments.ScoreArguments(damping_factor=args.damping),
    )  # fmt: skip
    return analysed.load_pairwise_scores("scores")["all_modules"].numpy().T


def bergson(args, steps: int) -> np.ndarray:
    """Scores by bergson's EK-FAC; with `steps`, refined by conjugate gradients on 64 rows."""
    import tokenizers
    from bergson.config import config
    from bergson.data import load_scores
    from bergson.hessians import pipeline

    # It asks for a tokenizer, though the rows are token ids.
    words = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>", model_max_length=100_000
    )
    tokenizer.save_pretrained(args.model)
    folder = pathlib.Path(args.scratch).resolve() / "run"
    folder.mkdir(parents=True, exist_ok=True)
    most = transformers.AutoConfig.from_pretrained(args.model).max_position_embeddings
    query = config.QuerySetConfig(dataset=str(pathlib.Path(args.queries).resolve()))
    pipeline.hessian_pipeline(
        config.IndexConfig(
            run_path=str(folder), model=str(pathlib.Path(args.model).resolve()), overwrite=True,
            data=config.DataConfig(dataset=str(pathlib.Path(args.rows).resolve())),
            loss_reduction="mean", token_batch_size=min(2048, most),
        ),
        config.HessianConfig(method="kfac", ev_correction=True),
        config.ScoreConfig(),
        config.PreprocessConfig(),
        config.HessianPipelineConfig(
            query=query, astra=config.AstraConfig(num_steps=steps, solver="cg", batch_size=64)
        ),
    )  # fmt: skip
    return load_scores(folder / "scores")[:]


def load(args) -> torch.nn.Module:
    """Loads the model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


METHODS = {
    "kronfluence": ("kronfluence", lambda args: kronfluence(args, head=False)),
    "kronfluence + head": ("kronfluence", lambda args: kronfluence(args, head=True)),
    "bergson": ("bergson", lambda args: bergson(args, steps=0)),
    "bergson + CG": ("bergson", lambda args: bergson(args, steps=10)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "rows", "queries", "scratch"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--method", choices=list(METHODS), required=True)
    parser.add_argument("--damping", type=float, help="kronfluence; 0.1 x the mean eigenvalue.")
    args = parser.parse_args()
    os.makedirs(args.scratch, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    started = time.perf_counter()
    library, score = METHODS[args.method]
    scores = score(args)
    np.save(pathlib.Path(args.scratch) / f"{args.method}.npy", scores.astype(np.float32))
    version = f"{library} {importlib.metadata.version(library)}"
    print(json.dumps({"seconds": time.perf_counter() - started, "version": version}))


if __name__ == "__main__":
    main()
