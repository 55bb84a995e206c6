r"""Runs tasks of the lm-eval harness on a model of ours, with or without a LoRA adapter.

    pip install -e '.[harness]'
    diq harness --model=PATH --tasks=medmcqa,pubmedqa \
        [--adapter=RUN/finetune/adapter]

Tasks are the harness's names; --include_path adds a folder of your own task files. A task that
generates text says in its generation_kwargs how (until, max_gen_toks, do_sample, temperature,
top_p). Prints the harness's table and, with --out, writes its numbers as JSON.
"""

from typing import TYPE_CHECKING

from absl import flags

from diq_jax import errors
from diq_jax.commands import cli, opened

if TYPE_CHECKING:
    from diq_jax.evaluate import harness

TASKS = flags.DEFINE_list("tasks", None, "The harness's names, comma-separated.", required=True)
INCLUDE_PATH = flags.DEFINE_string("include_path", "", "A folder with task files of your own.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 0, "0 = the model's positions.", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", 0, "The first so many rows of a task; 0 = all.", 0)
FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Unset = the task's own.", lower_bound=0)
CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask as the chat template writes it.")
SEED = flags.DEFINE_integer("seed", 0, "Of texts that a task draws.", lower_bound=0)
OUT = flags.DEFINE_string("out", "", "A .json file to write; empty = print only.")


def open_model() -> "harness.HarnessModel":
    """Returns the harness's model. Raises UserError where the model or adapter cannot be read."""
    from diq_jax.evaluate import harness, harness_generation

    model, layout, placement, adapter = opened.open_model()
    longest, tokens = model.cfg.max_positions, MAX_TOKENS.value
    expected = f"at most {longest}, the model's positions"
    errors.check("--max_tokens", tokens <= longest, expected, tokens)
    tokens = tokens or longest
    shape = placement, tokens, opened.BATCH_TOKENS.value
    generate = harness_generation.make_generate(model, layout, *shape, SEED.value, adapter)
    return harness.HarnessModel(model, layout, *shape, adapter, generate)


def main() -> None:
    """Runs the tasks and prints the harness's table."""
    out = cli.output(OUT, ".json") if OUT.value else None
    from diq_jax.evaluate import harness  # an extra: without it this is a UserError
    from diq_jax.run import artifacts, devices

    manager = harness.find_tasks(TASKS.value, INCLUDE_PATH.value)
    with devices.matmul_precision(opened.DTYPE.value):
        model = open_model()
        found, table = harness.run(
            model, TASKS.value, manager, LIMIT.value, FEWSHOT.value, CHAT.value
        )
    print(table)
    if out:
        kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}
        artifacts.write_json(out, kept)
