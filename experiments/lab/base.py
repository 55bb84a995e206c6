"""The lab's base model: a split of the pool, a tokenizer, a small decoder, trained aside."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers

import datamodel
from diq_jax import config, errors, trees
from diq_jax.data import batches, chat, encoded, example, sources, wording
from diq_jax.models import config as model_config
from diq_jax.models import decoder, export, hf
from diq_jax.run import artifacts, reading

HEAD_DIM = 32
BATCH = 16  # rows of a step of the base's training
END = "<|end|>"
FIELD = "the lab's base"


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """What the base is made by.

    Attributes:
        split: the seed of the split of the pool.
        candidates, held_out: rows of the pool to select from, and rows that nothing trains on;
            the rest trains the base.
        general: further rows that train the base only, as data.pool, or "".
        width, layers, vocab: of the decoder.
        epochs, learning_rate: of its training.
    """

    split: int
    candidates: int
    held_out: int
    general: str
    width: int
    layers: int
    vocab: int
    epochs: int
    learning_rate: float


def make(cfg: config.Config, settings: BaseSettings, workdir: pathlib.Path) -> dict[str, Any]:
    """Makes WORKDIR/base/ (the model), pool.jsonl and held_out.jsonl, unless base.json is there.

    Returns:
        What base.json holds: the settings, rows, parameters, losses and seconds.

    Raises:
        UserError: the folder was made by other settings, or the pool has too few rows.
    """
    record = workdir / "base.json"
    wanted = dataclasses.asdict(settings) | {
        "max_tokens": cfg.model.max_tokens, "pool": sources.fingerprint(cfg.data.pool, "data.pool"),
    }  # fmt: skip
    if record.is_file():
        found = reading.read_record(record, {"settings": dict, "rows": dict})
        for name, value in wanted.items():
            if found["settings"].get(name) != value:
                raise errors.UserError(
                    f"{workdir} was made with {name} = {found['settings'].get(name)!r}, not "
                    f"{value!r}: name another --workdir."
                )
        return found
    base, pool, held_out = split(cfg, settings)
    artifacts.write_jsonl(
        workdir / "pool.jsonl", [row.row | {"id": row.example_id} for row in pool]
    )
    artifacts.write_jsonl(
        workdir / "held_out.jsonl", [row.row | {"id": row.example_id} for row in held_out]
    )
    made = {"settings": wanted, "rows": {"base": len(base), "pool": len(pool)}}
    made |= train(cfg, settings, base, held_out, workdir)
    artifacts.write_json(record, made)
    return made


def split(cfg: config.Config, settings: BaseSettings) -> tuple[list, list, list]:
    """Splits the pool at random: (rows that train the base, candidates, held out)."""
    rows = sources.load_examples(cfg.data.pool, cfg.data.columns, cfg.data.pool_limit)
    rows.sort(key=lambda row: row.example_id)
    order = np.random.Generator(np.random.PCG64([settings.split, 1])).permutation(len(rows))
    first, second = settings.candidates, settings.candidates + settings.held_out
    if second + BATCH > len(rows):
        raise errors.UserError(
            f"--candidates and --held_out leave {len(rows) - second} of the pool's {len(rows)} "
            f"rows for the base; it needs {BATCH}."
        )
    pool, held_out, base = (
        [rows[i] for i in sorted(part)]
        for part in (order[:first], order[first:second], order[second:])
    )
    if settings.general:
        base += sources.load_examples(settings.general, "", 0, "--general")
    return base, pool, held_out


def train(
    cfg: config.Config,
    settings: BaseSettings,
    base: Sequence[example.Example],
    held_out: Sequence[example.Example],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Trains tokenizer and decoder on the base's rows and writes WORKDIR/base/."""
    started = time.perf_counter()
    tokenizer = make_tokenizer([written(row, cfg) for row in base], settings.vocab)
    layout = chat.make_layout(tokenizer, settings.vocab, cfg.data.date, FIELD)
    rows, unseen = (lay_out(part, layout, cfg) for part in (base, held_out))
    hf_config = shape_of(settings)
    shape = model_config.decoder_config(hf_config, FIELD)
    params = decoder.init(jax.random.key(settings.split), shape, jnp.float32)
    everyone = np.ones(len(rows.tokens), bool)
    order = datamodel.order_of(everyone, settings.epochs, BATCH, settings.split)
    print(f"base: {trees.size(params):,} parameters, {len(order):,} steps", flush=True)
    point = datamodel.fit(params, rows, order, settings.learning_rate, shape)
    before, after, on_base = (
        float(datamodel.losses(p, part, shape).mean())
        for p, part in ((params, unseen), (point.chosen, unseen), (point.chosen, rows))
    )
    tokenizer.save_pretrained(workdir / "base")
    hf.save_decoder(workdir / "base", point.chosen, hf_config, export.MAX_SHARD_BYTES)
    found = {
        "parameters": trees.size(params),
        "steps": len(order),
        "loss": {"held_out_before": before, "held_out": after, "base": on_base},
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(f"base: held-out loss {before:.3f} -> {after:.3f} in {found['seconds']} s", flush=True)
    return found


def written(row: example.Example, cfg: config.Config) -> str:
    """Writes all that a row says, to train the tokenizer on."""
    return f"{wording.question_text(row)}\n\n{wording.completion_text(row, cfg.data.template)}"


def lay_out(rows: Sequence[example.Example], layout: chat.Layout, cfg: config.Config):
    """Returns rows as one batch on the device."""
    tokens = cfg.model.max_tokens
    made, _, _ = encoded.encode_all(rows, layout, cfg.data.template, tokens, "end")
    answers = max(row.answer_tokens for row in made)
    return jax.tree.map(jnp.asarray, batches.make_batch(made, len(made), tokens, answers))


def make_tokenizer(texts: Sequence[str], vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of `vocab` tokens, END among them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def shape_of(settings: BaseSettings) -> dict[str, Any]:
    """Returns the decoder's config.json: a Llama with heads of HEAD_DIM."""
    heads = max(1, settings.width // HEAD_DIM)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": settings.width,
        "intermediate_size": 3 * settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "vocab_size": settings.vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
