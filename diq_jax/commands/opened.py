"""A model that a command asks, opened by its flags."""

from typing import TYPE_CHECKING, Any, NamedTuple

from diq_jax import config

if TYPE_CHECKING:
    from diq_jax.data import chat
    from diq_jax.models import load
    from diq_jax.run import devices


class Opened(NamedTuple):
    """A model on the devices, its adapter (None = the base model), and how texts become tokens."""

    model: "load.Model"
    layout: "chat.Layout"
    placement: "devices.Placement"
    adapter: Any


def open_model(path: str, dtype: str, adapter: str, date: str) -> Opened:
    """Opens what --model, --dtype, --adapter ("" = none) and --date name.

    Raises:
        UserError: the model or the adapter cannot be read.
    """
    from diq_jax.data import chat
    from diq_jax.models import load, lora, tokenizer
    from diq_jax.run import devices

    placement = devices.make_placement(config.Parallel())
    model = load.load(path, dtype, placement, "--model")
    beside = None
    if adapter:
        beside = placement.replicate(lora.load_peft(adapter, model.cfg, "--adapter"))
    tok = tokenizer.load_tokenizer(path, "--model")
    return Opened(
        model, chat.make_layout(tok, model.cfg.vocab_size, date, "--model"), placement, beside
    )
