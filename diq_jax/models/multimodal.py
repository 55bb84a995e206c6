"""The language model of a checkpoint that also holds an image encoder."""

from typing import Any

from absl import logging

from diq_jax import errors
from diq_jax.models import stored
from diq_jax.run import reading

# model_type of the whole -> that of its text_config, where that is one of families.DECODERS.
TEXT_TYPES = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}
# Before and since transformers 4.52; the head stands beside the language model in both.
PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
OTHER_PARTS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.",
    "model.multi_modal_projector.", "model.visual.",
)  # fmt: skip
# What the whole says about the text, too.
KEPT = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")


def language_part(
    config: dict[str, Any], tensors: dict[str, stored.Tensor], path: Any
) -> tuple[dict[str, Any], dict[str, stored.Tensor]]:
    """Returns config and tensors as a checkpoint of the language model alone has them.

    What is exported from it is that model: no image encoder goes with it.

    Raises:
        UserError: the config has no text_config.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_TYPES:
        return config, tensors
    text = reading.check_record(config, f"{path}: config.json", {"text_config": dict})[
        "text_config"
    ]
    if text.get("model_type", TEXT_TYPES[kind]) != TEXT_TYPES[kind]:
        shown = reading.shorten(text["model_type"])
        raise errors.UserError(
            f"{path}: the text_config of config.json is of the family {shown}; expected"
            f" {TEXT_TYPES[kind]}."
        )
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(OTHER_PARTS):
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            found[PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = tensor
    logging.info(
        "%s: the language model of %s is read; its %d tensors for images are not.",
        path, kind, len(tensors) - len(found),
    )  # fmt: skip
    kept = {key: config[key] for key in KEPT if key in config and key not in text}
    return {**kept, **text, "model_type": TEXT_TYPES[kind]}, found
