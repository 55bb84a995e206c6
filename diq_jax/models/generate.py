"""Text from prompts: batches that stay full, because a finished row is given the next prompt.

Prompts are put into a few streams by length. A stream is one shape: a program that reads prompts,
and one that continues them (cache.py), compiled once for each.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diq_jax import errors
from diq_jax.models import cache, config, sampling
from diq_jax.run import devices

END, STOP, LENGTH = "end", "stop", "length"  # why an answer ended


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Holds a prompt to answer once; `sample` tells several answers to it apart."""

    prompt_id: str
    sample: int
    ids: np.ndarray  # (T,) int32, at least one


@dataclasses.dataclass(frozen=True)
class Answer:
    """Holds a generated text, without what ended it, and all tokens of it."""

    text: str
    tokens: int  # generated, the end included
    finish: str  # end: a token that ends a turn; stop: a stop string; length: max_new_tokens
    ids: tuple[int, ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Prompts of like length, as indices into the list that was planned, and their shape."""

    indices: tuple[int, ...]
    rows: int  # B
    columns: int  # P, what prompts are padded to


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Holds compiled programs for any prompts and adapters of one model."""

    cfg: config.DecoderConfig
    settings: sampling.Sampling
    ends: tuple[int, ...]
    stop: tuple[str, ...]
    text: Callable[[Sequence[int]], str]
    placement: devices.Placement
    begin: Callable
    decode: Callable


def make_generator(
    cfg: config.DecoderConfig,
    settings: sampling.Sampling,
    ends: Sequence[int],
    stop: Sequence[str],
    text: Callable[[Sequence[int]], str],
    placement: devices.Placement,
) -> Generator:
    """Compiles when a shape first comes.

    Args:
        ends: the tokens that end an answer.
        stop: texts that end it; the answer is what stands before the first of them.
        text: the text of token ids, without special tokens.
    """
    specs = cache.specs(cfg, placement.mesh.shape["model"])
    fixed = {"cfg": cfg, "settings": settings, "ends": tuple(ends)}
    begin = functools.partial(cache.begin, **fixed)

    def decode(params, adapter, state, _):
        return cache.decode(params, adapter, state, **fixed)

    programs = (placement.compile_state(program, specs) for program in (begin, decode))
    return Generator(cfg, settings, tuple(ends), tuple(stop), text, placement, *programs)


def plan(
    prompts: Sequence[Prompt], edges: Sequence[int], max_new_tokens: int, tokens: int, multiple: int
) -> list[Stream]:
    """Plans one stream for each edge that has prompts; shortest first, ties by id and sample.

    Args:
        edges: lengths to pad to, ascending; the last takes the longest prompt.
        tokens: of a batch on one of the devices that share it, prompt and answer together: a stream
            has as many rows as that allows.
        multiple: of the rows (the devices that share a batch).
    """
    order = sorted(
        range(len(prompts)),
        key=lambda i: (len(prompts[i].ids), prompts[i].prompt_id, prompts[i].sample),
    )
    by_edge = collections.defaultdict(list)
    for i in order:
        by_edge[next(edge for edge in edges if len(prompts[i].ids) <= edge)].append(i)
    streams = []
    for edge, indices in by_edge.items():
        most = max(tokens // (edge + max_new_tokens), 1)
        rows = min(most, -(-len(indices) // multiple)) * multiple
        streams.append(Stream(tuple(indices), rows, edge))
    return streams


def run(
    generator: Generator,
    params: dict[str, Any],
    adapter: dict[str, Any] | None,
    prompts: Sequence[Prompt],
    stream: Stream,
) -> Iterator[tuple[int, Answer]]:
    """Answers the prompts of a stream; yields (index, answer) as they end.

    Raises:
        UserError: logits that are not finite, naming the prompt.
    """
    if not stream.indices:
        return
    state = empty_state(generator, params, stream)
    waiting = collections.deque(stream.indices)
    at: list[int | None] = [None] * stream.rows  # the prompt in each row
    tokens: list[list[int]] = [[] for _ in at]
    while waiting or any(i is not None for i in at):
        begun = []
        while waiting and None in at:
            places = _places(at, waiting, generator.placement.rows_multiple)
            which = [None if row is None else at[row] for row in places]
            found = [None if i is None else prompts[i] for i in which]
            batch = make_batch(generator, found, places, stream)
            state, first = generator.begin(params, adapter, state, batch)
            begun.append((places, first))
        state, chunk = generator.decode(params, adapter, state, None)
        for places, first in begun:
            for row, token in zip(places, np.asarray(first), strict=True):
                if row is not None:
                    tokens[row] = [int(token)]
        for row, new in enumerate(np.asarray(chunk)):
            if (i := at[row]) is None:
                continue
            tokens[row] += new[new != cache.NOTHING].tolist()
            answer = _finished(tokens[row], generator, prompts[i])
            if answer is not None:
                yield i, answer
                at[row] = None


def empty_state(generator: Generator, params: dict[str, Any], stream: Stream) -> cache.State:
    """Makes a placed state in which no row is under way."""
    placement, cfg = generator.placement, generator.cfg
    columns = cache.columns(stream.columns, generator.settings)
    dtype = params["embed"]["embedding"].dtype
    return placement.state(
        cache.shapes(cfg, stream.rows, columns, dtype),
        cache.specs(cfg, placement.mesh.shape["model"]),
    )


def make_batch(
    generator: Generator,
    prompts: Sequence[Prompt | None],
    places: Sequence[int | None],
    stream: Stream,
) -> cache.Prompts:
    """Makes a placed batch of prompts for the rows `places`; None where there is none."""
    count = len(prompts)
    tokens = np.zeros((count, stream.columns), np.int32)
    length, sample = np.ones(count, np.int32), np.zeros(count, np.int32)
    number = np.zeros(count, np.uint32)
    for i, prompt in enumerate(prompts):
        if prompt is not None:
            length[i], sample[i] = len(prompt.ids), prompt.sample
            tokens[i, stream.columns - len(prompt.ids) :] = prompt.ids
            number[i] = sampling.prompt_number(prompt.prompt_id)
    slot = generator.placement.slots(places, stream.rows)
    return generator.placement.batch(cache.Prompts(tokens, length, slot, number, sample))


def _places(at, waiting, multiple) -> list[int | None]:
    """Takes prompts for free rows: the row that each row of the batch to read goes to, or None.

    A batch has places for all rows, or for an eighth where few are free. Each device's share of it
    goes to that device's rows.
    """
    rows = len(at) // multiple
    few = max(1, rows // 8)
    free = [
        [row for row in range(d * rows, (d + 1) * rows) if at[row] is None] for d in range(multiple)
    ]
    share = rows if min(max(map(len, free)), len(waiting)) > 2 * few else few
    places: list[int | None] = []
    for mine in free:
        taken = mine[: min(share, len(waiting))]
        for row in taken:
            at[row] = waiting.popleft()
        places += taken + [None] * (share - len(taken))
    return places


def _finished(tokens: list[int], generator: Generator, prompt: Prompt) -> Answer | None:
    """Returns the answer, or None while it goes on."""
    last = tokens[-1]
    if last == sampling.BROKEN:
        raise errors.UserError(
            f"the model gives {prompt.prompt_id!r} logits that are not finite; check the weights, "
            "the fine-tuning (finetune/losses.jsonl) and model.dtype."
        )
    ended, full = last in generator.ends, len(tokens) == generator.settings.max_new_tokens
    if not (generator.stop or ended or full):
        return None
    text = generator.text(tokens[:-1] if ended else tokens)
    found = [text.find(stop) for stop in generator.stop if stop in text]
    if found:
        return Answer(text[: min(found)], len(tokens), STOP, tuple(tokens))
    if ended or full:
        return Answer(text, len(tokens), END if ended else LENGTH, tuple(tokens))
    return None
