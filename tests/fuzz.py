"""Feeds damaged files to the pipeline, as a command: `python tests/fuzz.py --seconds=600`.

Every case takes a whole set of inputs, or a whole run, damages one file of it, and calls the stages
that read it. Allowed: the damage changes nothing that is read, or one UserError. Not allowed: any
other exception, over ten seconds of a processor or sixty of waiting, a file of the user's that is
gone or changed. Whatever is not allowed is kept in --out with its seed and traceback, and the exit
code is 1.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
import traceback
import zipfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMIT_S = 10.0  # of a processor
WAIT_S = 60.0  # by the clock, which other processes share
TICKS = os.sysconf("SC_CLK_TCK")
DEEP = json.loads("[" * 400 + "]" * 400)
ODD = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 2**70, 1e308, -0.5, 1e-300, float("nan"),
    float("inf"), "", " ", "\ud800", "\x00", "a" * 100_000, "../../x", "/etc/passwd", [], {},
    [None], [[]], {"": 0}, [1, "a", None], DEEP, "A", "NaN", "1", "[]", "\u202e", "{{", "é" * 50,
]  # fmt: skip
SNIPPETS = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "{{ messages[99].content }}",
    "{{ raise_exception('no') }}", "{{ 1/0 }}", "{% include 'x' %}", "{{ x.y.z }}", "{{", "%}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ cycler.__init__.__globals__ }}",
    "{{ strftime_now('%Y') }}", "{{ messages | tojson }}", "{% generation %}", "{{ 10**10**8 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "{{ ''.__class__.__mro__ }}", "{% break %}", "\x00", "<think>\n", "{{ eos_token }}",
    "{% for m in messages %}{% for m in messages %}{{ m }}{% endfor %}{% endfor %}",
]  # fmt: skip
REPLIES = {c * 64: f"the reply {c}" for c in "0123"}
SIZES = ["name", "question", "options", "answer_idx", "input_ids", "labels", "messages", "content"]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Changes one to four places; half of the places lie in the first half kilobyte, the header."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = len(out) if rng.random() < 0.5 else min(len(out), 512)
        i = rng.randrange(reach + 1)
        n = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(7)
        if kind == 0 and i < len(out):
            out[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[i : i + n] = rng.randbytes(len(out[i : i + n]))
        elif kind == 2:
            del out[i : i + n]
        elif kind == 3:
            out[i:i] = rng.choice((rng.randbytes(n), bytes(n), b"\xff" * n))
        elif kind == 4:
            del out[i:]
        elif kind == 5:
            out[i : i + n] = b"\xff" * len(out[i : i + n])
        else:
            j = rng.randrange(len(out) + 1)
            out[i:i] = out[j : j + n]
    return bytes(out)


def damage_value(value, rng: random.Random):
    """A JSON value with one node replaced, removed, renamed or put elsewhere."""
    places = []

    def visit(node):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            places.append((node, key))
            if isinstance(child, dict | list):
                visit(child)

    value = json.loads(json.dumps(value))
    if not isinstance(value, dict | list) or rng.random() < 0.03:
        return rng.choice(ODD)
    visit(value)
    if not places:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind <= 2:
        node[key] = rng.choice(ODD)
    elif kind == 3:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(SIZES)] = node.pop(key)
    else:
        other, at = rng.choice(places)
        other[at] = node[key] if not isinstance(node[key], dict | list) else None
    return value


def damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    return json.dumps(damage_value(json.loads(data), rng)).encode()


def damage_jsonl(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 3))):
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(damage_value(json.loads(lines[i]), rng)).encode() + b"\n"
    return b"".join(lines)


def damage_template(data: bytes, rng: random.Random) -> bytes:
    """A chat template with something odd in it, in the place of a few characters."""
    text = data.decode()
    i = rng.randrange(len(text) + 1)
    j = min(len(text), i + rng.choice((0, 0, 1, 5, 20)))
    return (text[:i] + rng.choice(SNIPPETS) + text[j:]).encode()


def damage_parquet(data: bytes, rng: random.Random) -> bytes:
    """Bytes of the file, or one value or the type of one column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    if table.num_rows == 0 or rng.random() < 0.5:
        return damage_bytes(data, rng)
    name = rng.choice(table.column_names)
    values = table[name].to_pylist()
    if rng.random() < 0.2:
        table = table.drop_columns([name])
    else:
        values[rng.randrange(len(values))] = rng.choice(ODD[:18])
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):
            kind = table.schema.field(name).type if rng.random() < 0.5 else None
            table = table.set_column(table.column_names.index(name), name, [pa.array(values, kind)])
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file, with its length."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = damage_json(data[8:end], rng)
    return len(header).to_bytes(8, "little") + header + data[end:]


def damage_pickle(data: bytes, rng: random.Random) -> bytes:
    """The pickle inside of torch's zip file, whose checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            inner = old.read(info)
            damaged = damage_bytes(inner, rng) if info.filename.endswith("data.pkl") else inner
            new.writestr(info.filename, damaged)
    return out.getvalue()


# Kind -> (the file to damage below the base folder, how, stages). A file in run/ belongs to a whole
# run, a copy of which is damaged; others are inputs of a new one.
KINDS = {
    "pool.jsonl": ("pool.jsonl", damage_jsonl, "prepare"),
    "pool.json": ("pool.json", damage_json, "prepare"),
    "pool.csv": ("pool.csv", damage_bytes, "prepare"),
    "pool.parquet": ("pool.parquet", damage_parquet, "prepare"),
    "tokens.jsonl": ("tokens.jsonl", damage_jsonl, "prepare"),
    "targets": ("targets.jsonl", damage_jsonl, "prepare"),
    "tests": ("tests.jsonl", damage_jsonl, "prepare"),
    "preferences": ("preferences.jsonl", damage_jsonl, "prepare"),
    "template": ("decoder/chat_template.jinja", damage_template, "prepare"),
    "tokenizer_config": ("decoder/tokenizer_config.json", damage_json, "prepare"),
    "tokenizer.json": ("decoder/tokenizer.json", damage_json, "prepare"),
    "config.json": ("decoder/config.json", damage_json, "weights"),
    "safetensors": ("decoder/model.safetensors", damage_bytes, "weights"),
    "header": ("decoder/model.safetensors", damage_header, "weights"),
    "index": ("sharded/model.safetensors.index.json", damage_json, "weights"),
    "gguf": ("model.gguf", damage_bytes, "weights"),
    "torch": ("encoder/pytorch_model.bin", damage_bytes, "weights"),
    "torch_pickle": ("encoder/pytorch_model.bin", damage_pickle, "weights"),
    "labels": ("labels.jsonl", damage_jsonl, "labels"),
    "replies": ("replies.jsonl", damage_bytes, "replies"),
    "stage.json": ("run/*/stage.json", damage_json, "selection,report"),
    "artifact": ("run/*/*.parquet", damage_parquet, "selection,report"),
    "record": ("run/*/*.json*", damage_json, "selection,report"),
    "store": ("run/influence/store/*", damage_bytes, "selection,report"),
    "adapter": ("run/finetune/adapter/*.safetensors", damage_bytes, "weights"),
    "adapter_config": ("run/finetune/adapter/*.json", damage_json, "weights"),
}


def make(base: pathlib.Path) -> None:
    """The inputs and a whole run."""
    import folders
    import gguf
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq
    import torch
    import transformers

    from diq_jax.clients import replies

    folders.decoder(base / "decoder")
    decoder = transformers.LlamaForCausalLM.from_pretrained(base / "decoder")
    decoder.save_pretrained(base / "sharded", max_shard_size="8KB")
    folders.encoder(base / "encoder")
    model = transformers.BertModel.from_pretrained(base / "encoder")
    torch.save(model.state_dict(), base / "encoder/pytorch_model.bin")
    (base / "encoder/model.safetensors").unlink()
    rows = folders.pool_rows(12)
    folders.write(base / "pool.jsonl", rows)
    (base / "pool.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), base / "pool.parquet")
    pc.write_csv(pa.Table.from_pylist(rows), base / "pool.csv")
    tokens = [
        {"id": str(i), "input_ids": [1, 2, 3 + i, 4], "labels": [-100, -100, 3 + i, 4]}
        | {"attention_mask": [1, 1, 1, 1]}
        for i in range(6)
    ]
    folders.write(base / "tokens.jsonl", tokens)
    folders.write(base / "targets.jsonl", folders.choice_rows(4, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(4, "test"))
    folders.write(base / "preferences.jsonl", folders.preference_rows(4))
    folders.write(base / "labels.jsonl", rows)
    with replies.Cache(base / "replies.jsonl") as cache:
        for key, content in REPLIES.items():
            cache.put(key, replies.Reply(content, "", "stop", 7, 3))
    _gguf(base, gguf)
    act(base, base / "run", "pool.jsonl", "")


def _gguf(base, gguf) -> None:
    """The decoder's tensors under GGUF's names, and its tokenizer."""
    import safetensors.numpy

    config = json.loads((base / "decoder/config.json").read_text())
    tensors = safetensors.numpy.load_file(base / "decoder/model.safetensors")
    tokenizer = json.loads((base / "decoder/tokenizer.json").read_text())
    writer = gguf.GGUFWriter(base / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    ordered = sorted(vocab, key=vocab.get)
    writer.add_token_list(ordered)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in ordered])
    writer.add_token_merges([])
    writer.add_eos_token_id(vocab["<|end|>"])
    from diq_jax.models import gguf_file

    names = {v: k for k, v in gguf_file.NAMES.items()}
    layers = {v: k for k, v in gguf_file.LAYER_NAMES.items()}
    for name, array in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem in names:
            writer.add_tensor(f"{names[stem]}.{kind}", array)
        elif stem.startswith("model.layers."):
            _, _, i, module = stem.split(".", 3)
            writer.add_tensor(f"blk.{i}.{layers[module]}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def act(base: pathlib.Path, workdir: pathlib.Path, kind: str, stages: str) -> None:
    """What a user's command would do with the inputs in `base`."""
    from diq_jax import config, pipeline
    from diq_jax.clients import replies
    from diq_jax.difficulty import labels
    from diq_jax.run import devices

    if stages == "labels":
        labels.labelled_rows(str(base / "labels.jsonl"))
        return
    if stages == "replies":
        with replies.Cache(base / "replies.jsonl") as cache:
            found = {key: cache.get(key) for key in REPLIES}
        wrong = [key for key, reply in found.items() if reply and reply.content != REPLIES[key]]
        assert not wrong, f"another reply to {wrong}"
        return
    if stages == "weights":
        _load(base, kind, devices.make_placement(config.Parallel()))
        return
    pool = kind if kind.startswith(("pool", "tokens")) else "pool.jsonl"
    c = config.default()
    c.model.path = str(base / "decoder")
    c.model.max_tokens = 128
    c.data.pool = str(base / pool)
    c.data.targets, c.data.tests = str(base / "targets.jsonl"), str(base / "tests.jsonl")
    c.difficulty.source = "columns"
    c.influence.engine, c.influence.projection.dim = "factored", 64
    c.finetune.epochs = c.finetune.dpo.epochs = 1
    c.evaluate.bootstrap_samples = 100
    c.finetune.dpo.data = str(base / "preferences.jsonl")
    pipeline.run(config.resolve(c), workdir, pipeline.parse_stages(stages), False)


def _load(base, kind, placement) -> None:
    import numpy as np

    from diq_jax.models import checkpoint, config, encoder, hf, load, lora, tokenizer

    if kind.startswith("adapter"):
        source = checkpoint.open_checkpoint(str(base / "decoder"), "model.path")
        cfg = config.decoder_config(source.config, "model.path")
        lora.load_peft(base / "run/finetune/adapter", cfg, "influence.lora.path")
        return
    if kind.startswith("torch"):
        source = checkpoint.open_checkpoint(str(base / "encoder"), "difficulty.encoder")
        cfg = encoder.encoder_config(source.config, "difficulty.encoder")
        hf.load_encoder(source, cfg, np.float32, "difficulty.encoder")
        return
    path = str(base / {"gguf": "model.gguf", "index": "sharded"}.get(kind, "decoder"))
    load.load(path, "float32", placement)
    if kind != "index":
        tokenizer.load_tokenizer(path, "model.path")


def one(base: pathlib.Path, kind: str, seed: int) -> tuple[str, str]:
    """Runs a case on a copy of `base`: (ok, refused, TRACEBACK or LOST; what was said)."""
    from diq_jax import errors

    pattern, damage, stages = KINDS[kind]
    rng = random.Random(f"{kind}/{seed}")
    here, kept = base / "inputs", base / "kept"  # at one path, for a run knows its inputs by theirs
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(kept, here)
    shutil.rmtree(base / "new", ignore_errors=True)
    workdir = here / "run" if pattern.startswith("run/") else base / "new"
    file = rng.choice(sorted(p for p in here.glob(pattern) if p.is_file()))
    with contextlib.suppress(json.JSONDecodeError):  # a JSONL file is no JSON
        file.write_bytes(damage(file.read_bytes(), rng))
    if workdir.exists() and rng.random() < 0.3:  # is done again, from what is damaged
        shutil.rmtree(workdir / "selection")
        shutil.rmtree(workdir / "report")
    before = _digests(here, workdir)
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            act(here, workdir, kind, stages)
        outcome, said = "ok", ""
    except errors.UserError as e:
        said = str(e)
        outcome = "LONG" if len(said) > 1500 or "\n" in said.strip() else "refused"
    except BaseException:
        return "TRACEBACK", traceback.format_exc()
    if _digests(here, workdir) != before:
        return "LOST", "an input changed or is gone"
    return outcome, said


def _digests(folder, workdir):
    """Of all files that are the user's: those outside the workdir."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.is_relative_to(workdir)
    }


def worker(base, pipe) -> None:
    """Answers cases, sent as (kind, seed), until the pipe closes."""
    sys.stderr = open(os.devnull, "w")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(one(base, *pipe.recv()))


class Runner:
    """A worker process that is replaced when it hangs or dies."""

    def __init__(self, base):
        self.base, self.context = base, multiprocessing.get_context("spawn")
        self.process = None

    def run(self, kind, seed):
        if self.process is None:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(
                target=worker, args=(self.base, theirs), daemon=True
            )
            self.process.start()
            theirs.close()
            self._ask("pool.jsonl", -1, 120, 600)  # imports
        return self._ask(kind, seed, LIMIT_S, WAIT_S)

    def _ask(self, kind, seed, limit, wait):
        self.pipe.send((kind, seed))
        used, end = self._seconds(), time.time() + wait
        try:
            while time.time() < end and self._seconds() < used + limit:
                if self.pipe.poll(0.2):
                    return self.pipe.recv()
            outcome = "HANG", f"no answer within {limit} s of a processor, or {wait} s"
        except EOFError:
            outcome = "DIED", f"the process ended with {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.process = None
        return outcome

    def _seconds(self):
        """What the worker used of a processor."""
        with open(f"/proc/{self.process.pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--kinds", default="", help=f"some of {', '.join(KINDS)}; empty = all")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for what went wrong")
    args = parser.parse_args()
    kinds = args.kinds.split(",") if args.kinds else list(KINDS)
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="fuzz-base-") as folder:
        base = pathlib.Path(folder)
        (base / "inputs").mkdir()
        make(base / "inputs")
        shutil.copytree(base / "inputs", base / "kept")
        runner, end, seed = Runner(base), time.time() + args.seconds, args.seed
        while time.time() < end:
            for kind in kinds:
                outcome, said = runner.run(kind, seed)
                counts[kind][outcome] += 1
                if outcome.isupper():
                    print(f"{outcome} {kind} seed {seed}: {said.strip().splitlines()[-1][:200]}")
                    if args.out is not None:
                        args.out.mkdir(parents=True, exist_ok=True)
                        (args.out / f"{kind}-{seed}.txt").write_text(f"{outcome}\n{said}")
            seed += 1
        if runner.process is not None:
            runner.process.kill()
    total = sum(counts.values(), collections.Counter())
    for kind, count in counts.items():
        print(f"{kind:<18} " + "  ".join(f"{name} {n}" for name, n in sorted(count.items())))
    print(f"{sum(total.values())} cases, seeds {args.seed} to {seed - 1}: {dict(total)}")
    return int(any(name.isupper() for name in total))


if __name__ == "__main__":
    sys.exit(main())
