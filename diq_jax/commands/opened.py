"""A model that a command asks, opened by its flags; importing it defines them."""

from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from diq_jax import config

if TYPE_CHECKING:
    from diq_jax.data import chat
    from diq_jax.models import load
    from diq_jax.run import devices


MODEL = flags.DEFINE_string("model", None, "As model.path.", required=True)
ADAPTER = flags.DEFINE_string("adapter", "", "A PEFT folder; empty = the base model.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "As model.dtype.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens of one batch.", lower_bound=1)
DATE = flags.DEFINE_string("date", config.Data().date, "As data.date.")


class Opened(NamedTuple):
    """A model on the devices, its adapter (None = the base model), and how texts become tokens."""

    model: "load.Model"
    layout: "chat.Layout"
    placement: "devices.Placement"
    adapter: Any


def open_model() -> Opened:
    """Opens what the flags name.

    Raises:
        UserError: the model or the adapter cannot be read.
    """
    from diq_jax.data import chat
    from diq_jax.models import load, lora, tokenizer
    from diq_jax.run import devices

    placement = devices.make_placement(config.Parallel())
    model = load.load(MODEL.value, DTYPE.value, placement, "--model")
    beside = None
    if ADAPTER.value:
        beside = placement.replicate(lora.load_peft(ADAPTER.value, model.cfg, "--adapter"))
    tok = tokenizer.load_tokenizer(MODEL.value, "--model")
    layout = chat.make_layout(tok, model.cfg.vocab_size, DATE.value, "--model")
    return Opened(model, layout, placement, beside)
