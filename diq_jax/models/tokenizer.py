"""Tokenizers of checkpoint folders and GGUF files, without torch.

What a file says is what counts: a tokenizer.json is used as it stands. transformers' classes for
single model families would put a pre-tokenizer and a normalizer of their own in its place.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from diq_jax import errors
from diq_jax.models import checkpoint
from diq_jax.run import artifacts, reading

FILE = "tokenizer.json"
FILES = (FILE, "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG = "tokenizer_config.json"
# What decides token ids beside CONFIG, and where chat templates stand beside it.
DECISIVE = (*FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")

# tokenizer.ggml.token_type
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """Says how a byte-level vocabulary cuts text before it merges."""

    splits: tuple[str, ...]  # each cuts the pieces that the one before it left
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file does not say


# tokenizer.ggml.pre, as llama.cpp (src/llama-vocab.cpp) reads it; NFC as in Qwen's tokenizer.json.
_GPT2 = PreTokenizer((GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", GPT2))
_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((LLAMA3.replace("{1,3}", ""),), nfc=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("smaug-bpe", "dbrx"), PreTokenizer((LLAMA3,))),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((O200K,))),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "exaone4", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
}


def load_tokenizer(path: str | os.PathLike, field: str) -> transformers.PreTrainedTokenizerFast:
    """Loads the tokenizer of a model path (see checkpoint.resolve).

    `save_pretrained` keeps it as it is. `chat_template` is None where the checkpoint has none.

    Raises:
        UserError: no tokenizer there, a damaged one, or one of a kind that would give other ids.
    """
    path = checkpoint.resolve(path, field)
    if path.is_file():
        with _loading(path, field):
            from diq_jax.models import gguf_header

            return _from_gguf(path, gguf_header.read_header(path).metadata, field)
    if not any((path / name).exists() for name in FILES):
        # transformers would hand out a tokenizer with an empty vocabulary.
        raise errors.UserError(
            f"{field}: the folder {path} has no tokenizer; expected one of {', '.join(FILES)}."
        )
    _read_config(path)
    with _loading(path, field):
        if (path / FILE).exists():
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
            _restore_added_tokens(tokenizer, path / FILE)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    _check_templates(tokenizer.chat_template, f"{field}: {path}: chat_template")
    if not tokenizer.is_fast:
        raise errors.UserError(
            f"{field}: {path} has a slow tokenizer only; expected tokenizer.json."
        )
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        raise errors.UserError(
            f"{field}: {path}/{FILE} has model.dropout, which gives a text other tokens each time; "
            "set it to null."
        )
    return tokenizer


def fingerprints(path: str | os.PathLike, field: str) -> dict[str, str]:
    """Hashes what decides token ids beside a text: the tokenizer, and its chat templates.

    A GGUF file holds both, and checkpoint.Checkpoint.fingerprint covers it: it has none here.
    """
    path = checkpoint.resolve(path, field)
    if path.is_file():
        return {}
    config = _read_config(path)
    templates = [json.dumps(config.pop("chat_template", None))]
    templates += [
        artifacts.sha256(file) for pattern in TEMPLATES for file in sorted(path.glob(pattern))
    ]
    rest = [json.dumps(config, sort_keys=True)]
    rest += [artifacts.sha256(path / name) for name in DECISIVE if (path / name).is_file()]
    return {
        f"{field} tokenizer": hashlib.sha256("\n".join(rest).encode()).hexdigest(),
        f"{field} chat template": hashlib.sha256("\n".join(templates).encode()).hexdigest(),
    }


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Reads tokenizer_config.json, {} where there is none; the files beside it are checked too."""
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (path / name).exists():
            reading.read_record(path / name, {})
    return reading.read_record(path / CONFIG, {}) if (path / CONFIG).exists() else {}


@contextlib.contextmanager
def _loading(path: pathlib.Path, field: str) -> Iterator[None]:
    """Turns what the two libraries raise for a damaged file into a UserError.

    They raise anything: tokenizers knows Exception itself, and for a panic of its Rust code a
    BaseException.
    """
    try:
        yield
    except (errors.UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        said = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise errors.UserError(
            f"{field}: {path} has no tokenizer that can be loaded; expected a whole tokenizer.json,"
            f" or a GGUF file with one ({said})."
        ) from None


def _check_templates(found: Any, where: str) -> None:
    named = found if isinstance(found, dict) else {"default": found or ""}
    ok = all(isinstance(text, str) for text in (*named, *named.values()))
    errors.check(where, ok, "a text, or a list of names with texts", found)


def _restore_added_tokens(tokenizer, file: pathlib.Path) -> None:
    """Gives the added tokens of `file` back the properties that tokenizer_config.json changed."""
    added = tokenizers.Tokenizer.from_file(str(file)).get_added_tokens_decoder().values()
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])


def _from_gguf(
    path: pathlib.Path, metadata: dict[str, Any], field: str
) -> transformers.PreTrainedTokenizerFast:
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = ggml.get("model")
    if kind not in BUILDERS or not ggml.get("tokens"):
        raise errors.UserError(
            f"{field}: {path} holds a tokenizer of kind {kind!r} with {len(ggml.get('tokens', ()))}"
            f" tokens; expected one of {', '.join(BUILDERS)}."
        )
    ggml.setdefault("token_type", [NORMAL] * len(ggml["tokens"]))
    backend, add_bos = BUILDERS[kind](path, ggml, field)
    added = [
        tokenizers.AddedToken(token, normalized=False, special=token_type == CONTROL)
        for token, token_type in zip(ggml["tokens"], ggml["token_type"], strict=True)
        if token_type in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)  # at once: each call builds the search for all of them anew
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special_tokens = {
        f"{name}_token": ggml["tokens"][ggml[f"{key}_token_id"]]
        for name, key in names.items()
        if f"{key}_token_id" in ggml
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=ggml.get("add_bos_token", add_bos) and "bos_token" in special_tokens,
        add_eos_token=ggml.get("add_eos_token", False) and "eos_token" in special_tokens,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special_tokens,
    )


def _byte_level(
    path: pathlib.Path, ggml: dict[str, Any], field: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Builds a byte-level BPE with the merges of the file."""
    name = ggml.get("pre", "")
    if name not in PRE_TOKENIZERS:
        raise errors.UserError(
            f"{field}: {path} has tokenizer.ggml.pre {name!r}, a way to split text that is not"
            f" built here; expected {', '.join(PRE_TOKENIZERS)}, or the model's safetensors folder."
            f"{errors.nearest(name, PRE_TOKENIZERS)}"
        )
    pre = PRE_TOKENIZERS[name]
    vocabulary = {token: i for i, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in ggml.get("merges", ())]
    # Some files list merges to what is no token. llama.cpp takes such a merge apart again.
    merges = [merge for merge in merges if "".join(merge) in vocabulary]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges)
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated") for split in pre.splits
    ]
    prefix = ggml.get("add_space_prefix", False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    path: pathlib.Path, ggml: dict[str, Any], field: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Builds a SentencePiece BPE.

    The prefix space stands at the start of the text and after each added token, as in llama.cpp.
    transformers' own reading of GGUF puts it at the start only, and loses one leading space.
    """
    vocabulary = {token: i for i, token in enumerate(ggml["tokens"])}
    if "merges" in ggml:
        merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    elif "scores" in ggml:
        merges = merges_from_scores(ggml["tokens"], ggml["scores"], ggml["token_type"])
    else:
        raise errors.UserError(f"{field}: {path} has neither scores nor merges for its tokens.")
    unknown = ggml.get("unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=None if unknown is None else ggml["tokens"][unknown],
            fuse_unk=True,
            byte_fallback=BYTE in ggml["token_type"],
        )
    )
    prefix = ggml.get("add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend, True


def merges_from_scores(
    tokens: list[str], scores: list[float], token_types: list[int]
) -> list[tuple[str, str]]:
    """Finds merges that rebuild a SentencePiece BPE vocabulary, best score first.

    SentencePiece joins the two neighbours whose union has the best score, so every cut of a token
    into two tokens is a merge with that token's score. Control and byte tokens are never merged.
    Equal scores are ordered as in transformers' generate_merges.
    """
    usable = {
        token: i for i, token in enumerate(tokens) if token_types[i] in (NORMAL, USER_DEFINED)
    }
    cuts = [
        (-scores[i], -cut, cut - len(token), i, token[:cut], token[cut:])
        for token, i in usable.items()
        for cut in range(1, len(token))
        if token[:cut] in usable and token[cut:] in usable
    ]
    return [(left, right) for *_, left, right in sorted(cuts)]


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
