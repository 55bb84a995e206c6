"""Merges a LoRA adapter into its base model: a folder that any trainer or server loads.

    diq export --adapter=runs/mine/finetune/adapter --output=merged

Written: config.json, safetensors and the tokenizer. The base is the one that the adapter names
(--model for another place of the same weights); of a .gguf file the weights are dequantised. The
adapter's folder itself is what PEFT loads, and needs no export.
"""

import pathlib

from absl import flags

from diq_jax import config, errors
from diq_jax.commands import cli

VERIFY = cli.define_verify()
ADAPTER = flags.DEFINE_string("adapter", None, "A PEFT LoRA folder.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.")
MODEL = flags.DEFINE_string("model", "", "As model.path; empty = the base that the adapter names.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the merged weights.")
flags.mark_flags_as_required(["adapter", "output"])


def base_of(adapter: pathlib.Path) -> str:
    """Returns the base model that adapter_config.json names.

    Raises:
        UserError: there is no such file, or it names none.
    """
    from diq_jax.run import reading

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise errors.UserError(f"--adapter: {adapter} has no {file.name}; expected a PEFT folder.")
    record = reading.read_record(file, {}, {"base_model_name_or_path": (str, type(None))})
    base = record.get("base_model_name_or_path")
    if not base:
        raise errors.UserError(f"--adapter: {file} names no base model: give --model.")
    return base


def main() -> None:
    """Merges, and writes the folder."""
    import jax

    from diq_jax.models import export, load, lora
    from diq_jax.run import devices, records

    adapter, output = pathlib.Path(ADAPTER.value), pathlib.Path(OUTPUT.value)
    if cli.verify(VERIFY):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (adapter / name).is_file():
                records.verify(adapter / name)
    path = MODEL.value or base_of(adapter)
    if (output / "config.json").exists():
        raise errors.UserError(f"--output: {output} holds a model already; name another folder.")
    placement = devices.make_placement(config.Parallel(data=1))
    # Merged in float32, so that only the sum is rounded.
    model = load.load(path, "float32", placement, "--model")
    factors = lora.load_peft(adapter, model.cfg, "--adapter")
    merged = export.merge_adapter(model.params, factors)
    merged = jax.tree.map(lambda x: x.astype(DTYPE.value), merged)
    export.save_model(output, merged, model.hf_config, path, "--model")
    size = sum(x.nbytes for x in jax.tree.leaves(merged)) / 2**20
    print(f"wrote {output}: {path} with {adapter} merged, {size:,.0f} MiB of {DTYPE.value}")
