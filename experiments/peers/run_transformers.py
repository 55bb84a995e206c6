"""Greedy generation by transformers: reads counts of tokens from lines, answers with seconds."""

import json
import pathlib
import sys
import time

import torch
import transformers


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Without the library's own settings, by which an end token would stop a row.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    prompts = json.loads(pathlib.Path(folder, "prompts.json").read_text())
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=int(line))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": out[:, longest:].tolist()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
