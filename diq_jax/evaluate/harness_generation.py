"""Text for the harness's `generate_until`: its arguments, read as ours, and our generator."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors, trees
from diq_jax.data import batches, chat, token_ids
from diq_jax.evaluate import generation
from diq_jax.models import generate, load, sampling
from diq_jax.run import devices, progress

MAX_SHAPES = 4  # prompt lengths to pad to, of one call: each is two compilations
LONGEST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN = ("until", *LONGEST, "do_sample", "temperature", "top_p")
DEFAULT_LONGEST = 256  # as the harness's own models have it

# (contexts as token ids, the harness's generation arguments) -> the texts that follow
Generate = Callable[[Sequence[Sequence[int]], Mapping[str, Any]], list[str]]


def make_generate(
    model: load.Model,
    layout: chat.Layout,
    placement: devices.Placement,
    max_tokens: int,
    batch_tokens: int,
    seed: int,
    adapter: trees.Tree | None,
) -> Generate:
    """Makes what HarnessModel generates with; it cuts a context that is too long at its beginning.

    A drawn text depends on (seed, context, how often that context came before in the call).

    Args:
        max_tokens: of a context and its text, together.
        batch_tokens: tokens of one batch on each device.
        seed: of texts that a task draws.
        adapter: a LoRA adapter that `placement` has replicated.
    """
    ends, tokenizer = generation.end_tokens(model, layout), layout.tokenizer
    text = functools.partial(token_ids.text, tokenizer)

    def texts(contexts, arguments):
        settings, stop = read_arguments(arguments, seed)
        longest = settings.max_new_tokens
        room = max_tokens - longest
        if room < 1:
            raise errors.UserError(
                f"a task's texts of up to {longest} tokens do not fit max_tokens = {max_tokens} "
                "with a token before them."
            )
        # Texts have no special tokens: one that a task stops at is found by its id.
        special = [s for s in stop if s in tokenizer.all_special_tokens]
        stopping = tokenizer.convert_tokens_to_ids(special)
        ending = sorted({*ends, *(stopping if isinstance(stopping, list) else [stopping])})
        stop = [s for s in stop if s not in special]
        generator = generate.make_generator(model.cfg, settings, ending, stop, text, placement)
        prompts = make_prompts([context[-room:] for context in contexts], text)
        edges = batches.bucket_edges([len(prompt.ids) for prompt in prompts], MAX_SHAPES)
        edges = [min(edge, room) for edge in edges]
        streams = generate.plan(prompts, edges, longest, batch_tokens, placement.rows_multiple)
        out = [""] * len(prompts)
        with progress.Progress("harness", len(prompts)) as bar:
            for stream in streams:
                for i, answer in generate.run(generator, model.params, adapter, prompts, stream):
                    out[i] = answer.text
                    bar.update(1, len(prompts[i].ids) + answer.tokens)
        return out

    return texts


def make_prompts(
    contexts: Sequence[Sequence[int]], text: Callable[[Sequence[int]], str]
) -> list[generate.Prompt]:
    """Makes the prompts; a context that comes again is another sample of the same prompt."""
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    prompts = []
    for context in contexts:
        ids = np.array(context, np.int32)
        prompts.append(generate.Prompt(text(context), seen[tuple(context)], ids))
        seen[tuple(context)] += 1
    return prompts


def read_arguments(
    arguments: Mapping[str, Any], seed: int
) -> tuple[sampling.Sampling, tuple[str, ...]]:
    """Reads how texts are drawn, and the texts that stop them.

    As in the harness, the likeliest token is taken unless do_sample or, without it, a temperature
    asks for a draw.

    Raises:
        UserError: an argument that is not known here, or a value out of its range.
    """
    for name in arguments:
        if name not in KNOWN:
            raise errors.UserError(
                f"generation_kwargs of a task: {name!r} is not known here; known are "
                f"{', '.join(KNOWN)}.{errors.nearest(name, KNOWN)}"
            )
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else until
    texts = isinstance(until, list | tuple) and all(isinstance(text, str) for text in until)
    given = (arguments[name] for name in LONGEST if arguments.get(name) is not None)
    longest, top_p = next(given, DEFAULT_LONGEST), arguments.get("top_p", 1.0)
    draws = arguments.get("do_sample")
    temperature = arguments.get("temperature", 1.0 if draws else 0.0)
    whole = isinstance(longest, int) and longest >= 1
    for name, ok, expected, value in (
        ("until", texts, "a text or a list of texts", until),
        ("max_gen_toks", whole, "a whole number above 0", longest),
        ("temperature", _number(temperature) and temperature >= 0, "at least 0", temperature),
        ("top_p", _number(top_p) and 0 < top_p <= 1, "in (0, 1]", top_p),
    ):
        errors.check(f"generation_kwargs of a task: {name}", ok, expected, value)
    temperature = 0.0 if draws is False else float(temperature)
    return sampling.Sampling(longest, temperature, float(top_p), seed), tuple(filter(None, until))


def _number(value) -> bool:
    return isinstance(value, int | float)
