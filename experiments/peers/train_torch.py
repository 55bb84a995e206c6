r"""One training step at a time in torch: the other half of experiments/benchmark_training.py.

    python experiments/peers/train_torch.py --model=FOLDER --rows=ROWS.jsonl --rank=8

Reads `lora` or `full`, a line each, takes that step (transformers, PEFT, clipping, AdamW, as a user
would write it) and prints {"seconds": .., "loss": ..}. Needs the extra `dev`.
"""

import argparse
import json
import pathlib
import sys
import time

import peft
import torch
import transformers


def make_step(args, name, batch):
    """A function () -> loss that trains on the batch once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if name == "lora":
        torch.manual_seed(0)
        adapter = peft.LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=["q_proj", "k_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    batch = {key: x.to(device) for key, x in batch.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step():
        adamw.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        return loss.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in pathlib.Path(args.rows).read_text().splitlines()]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    steps = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in steps:
            steps[name] = make_step(args, name, batch)
        start = time.perf_counter()
        loss = steps[name]()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
