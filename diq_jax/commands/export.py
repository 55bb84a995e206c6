"""Merges a LoRA adapter into its base model, or writes what a run selected as a data set.

    diq export --adapter=runs/mine/finetune/adapter --output=merged
    diq export --selection=runs/mine --output=chosen

Written: config.json, generation_config.json, safetensors, the tokenizer with its chat template, and
README.md, a model card with the license note and, for an adapter inside of a run, the selection and
the numbers. With --selection: the selected rows as chats, and README.md, a data-set card. --push
uploads the folder to the hub, as a private repository ORG/NAME.

The base is the one that the adapter names (--model for another place of the same weights); of a
.gguf file the weights are dequantised. The adapter's folder itself is what PEFT loads, and needs no
export. The same command goes on with a folder that a killed one left, and with no other.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

from absl import flags

from diq_jax import config, errors
from diq_jax.commands import cli

VERIFY = cli.define_verify()
ADAPTER = flags.DEFINE_string("adapter", "", "A PEFT LoRA folder.")
SELECTION = flags.DEFINE_string("selection", "", "A finished run, whose selected rows are written.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
MODEL = flags.DEFINE_string("model", "", "As model.path; empty = the base that the adapter names.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the merged weights.")
MARK = ".unfinished"  # lies in the folder until it is whole, and names what is exported
PUSH = flags.DEFINE_string("push", "", "A hub repository ORG/NAME to upload to; empty = none.")


def base_of(adapter: pathlib.Path) -> str:
    """Returns the base model that adapter_config.json names.

    Raises:
        UserError: there is no such file, or it names none.
    """
    from diq_jax.run import reading

    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise errors.UserError(f"--adapter: {adapter} has no {file.name}; expected a PEFT folder.")
    names, kinds = ("base_model_name_or_path", "revision"), (str, type(None))
    record = reading.read_record(file, {}, {name: kinds for name in names})
    base, revision = (record.get(name) for name in names)
    if not base:
        raise errors.UserError(f"--adapter: {file} names no base model: give --model.")
    return f"{base}@{revision}" if revision else base


def main() -> None:
    """Writes the folder, new or empty, and uploads it where --push asks for that."""
    from diq_jax.commands import card

    if PUSH.value and not re.fullmatch(r"[\w.-]+/[\w.-]+", PUSH.value):
        raise errors.UserError(f"--push must be a repository ORG/NAME; got {PUSH.value!r}.")
    if bool(ADAPTER.value) == bool(SELECTION.value):
        raise errors.UserError("Give either --adapter, a PEFT folder, or --selection, a run.")
    output = pathlib.Path(OUTPUT.value)
    with unfinished(output):
        if SELECTION.value:
            write_selection(pathlib.Path(cli.run_folder(SELECTION.value, "--selection")), output)
        else:
            write_model(pathlib.Path(ADAPTER.value), output)
    if PUSH.value:
        kind = "dataset" if SELECTION.value else "model"
        print(f"pushed to {card.push(output, PUSH.value, kind)}")


@contextlib.contextmanager
def unfinished(output: pathlib.Path) -> Iterator[None]:
    """Marks a folder while it is written; a mistake before the first file leaves no folder.

    Raises:
        UserError: it is neither new nor empty, nor begun by the same command.
    """
    from diq_jax.run import artifacts

    told, mark = f"{ADAPTER.value or SELECTION.value} {MODEL.value} {DTYPE.value}\n", output / MARK
    begun = mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == told
    if not begun and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise errors.UserError(f"--output: {output} is not an empty folder; name another.")
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    artifacts.write_text(mark, told)
    try:
        yield
    except errors.UserError:
        if not begun and not set(output.iterdir()) - {mark}:
            mark.unlink()
            for folder in made:
                folder.rmdir()
        raise
    mark.unlink()


def write_selection(workdir: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the selected rows of a run as chats, with their card.

    Raises:
        UserError: the selection is not finished or has no chats.
    """
    from diq_jax.commands import card
    from diq_jax.run import artifacts, records

    workdir = workdir.absolute()
    rows = workdir / "selection/selected.messages.jsonl"
    text = card.of_data(workdir, rows.name)
    if not rows.is_file():
        raise errors.UserError(f"--selection: {workdir} selected no rows with texts ({rows.name}).")
    if cli.verify(VERIFY):
        records.verify(rows)
    artifacts.write_text(output / rows.name, rows.read_text(encoding="utf-8"))
    artifacts.write_text(output / card.CARD, text)
    print(f"wrote {output}: {rows.name} and {card.CARD}")


def write_model(adapter: pathlib.Path, output: pathlib.Path) -> None:
    """Merges, and writes the model's folder with its card.

    Raises:
        UserError: the adapter does not fit its base.
    """
    import jax

    from diq_jax.commands import card
    from diq_jax.models import checkpoint, export, load, lora
    from diq_jax.run import artifacts, devices, records

    if cli.verify(VERIFY):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (adapter / name).is_file():
                records.verify(adapter / name)
    path = MODEL.value or base_of(adapter)
    placement = devices.make_placement(config.Parallel(data=1))
    # Merged in float32, so that only the sum is rounded.
    model = load.load(path, "float32", placement, "--model")
    factors = lora.load_peft(adapter, model.cfg, "--adapter")
    merged = export.merge_adapter(model.params, factors)
    merged = jax.tree.map(lambda x: x.astype(DTYPE.value), merged)
    export.save_model(output, merged, model.hf_config, path, "--model")
    text = card.of_model(*checkpoint.split_revision(path), adapter)
    artifacts.write_text(output / card.CARD, text)
    size = sum(x.nbytes for x in jax.tree.leaves(merged)) / 2**20
    print(f"wrote {output}: {path} with {adapter} merged, {size:,.0f} MiB of {DTYPE.value}")
