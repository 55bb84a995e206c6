"""Answers OpenAI API requests by a model of ours: completions and chats, no streaming.

A request is refused, never bent: an unknown field, one that asks for what is not built, or a prompt
that does not fit is a UserError.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diq_jax import errors, trees
from diq_jax.data import batches, chat, example, token_ids
from diq_jax.evaluate import generation, harness_generation
from diq_jax.models import generate, load, loss, sampling
from diq_jax.run import devices, reading

TOP = 5  # the most alternatives of a token, as in the API
SHORTEST = 64  # rows are padded to a power of two, at least this: each length is a compilation
MOST_SETTINGS = 8  # compiled generators that are kept, one for each way to draw
FIELDS = {
    "model": str, "max_tokens": int, "temperature": float, "top_p": float, "stop": (str, list),
    "seed": int, "n": int, "user": str, "stream": bool, "presence_penalty": float,
    "frequency_penalty": float, "logit_bias": dict,
}  # fmt: skip
COMPLETION_FIELDS = FIELDS | {
    "prompt": (str, list), "echo": bool, "logprobs": int, "best_of": int, "suffix": str,
}  # fmt: skip
CHAT_FIELDS = FIELDS | {"messages": list, "max_completion_tokens": int, "logprobs": bool}
# What is not built, with the values that ask for nothing.
PLAIN = {
    "stream": False, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
    "best_of": 1, "suffix": "",
}  # fmt: skip
REASONS = {generate.END: "stop", generate.STOP: "stop", generate.LENGTH: "length"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """Says how a request wants its answers."""

    longest: int | None  # new tokens; None = what fits
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int
    count: int  # answers to each prompt


class Served:
    """Answers requests, one at a time.

    Args:
        name: what requests call the model.
        max_tokens: of a prompt and its answer, together.
        batch_tokens: tokens of one batch on each device.
        seed: of requests that name none.
        adapter: a LoRA adapter that `placement` has replicated.
    """

    def __init__(
        self,
        model: load.Model,
        layout: chat.Layout,
        placement: devices.Placement,
        name: str,
        max_tokens: int,
        batch_tokens: int,
        seed: int,
        adapter: trees.Tree | None = None,
    ) -> None:
        self.model, self.layout, self.placement, self.name = model, layout, placement, name
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.seed, self.adapter = seed, adapter
        self._ends = generation.end_tokens(model, layout)
        self._text = functools.partial(token_ids.text, layout.tokenizer)
        self._numbers, self._started = itertools.count(1), int(time.time())
        self._generator = functools.lru_cache(MOST_SETTINGS)(self._make_generator)
        top = min(TOP, model.cfg.vocab_size)

        def score(params, adapter, batch):
            return loss.top_scores(params, model.cfg, batch, top, adapter)

        self._score = placement.compile(score, rows=True)

    def models(self) -> dict[str, Any]:
        """Lists the one model."""
        made = {"id": self.name, "object": "model", "created": self._started, "owned_by": "diq_jax"}
        return {"object": "list", "data": [made]}

    def completions(self, body: Any) -> dict[str, Any]:
        """Continues one prompt or several, each a text or token ids.

        With `echo` a choice begins with its prompt; with `logprobs` it has the log-likelihood of
        each of its tokens in nats, and so many likeliest tokens of each place.

        Raises:
            UserError: see the module.
        """
        body, asked = self._read(body, COMPLETION_FIELDS, ("prompt",), default=16)
        top, echo = body.get("logprobs"), body.get("echo", False)
        errors.check("logprobs", top is None or 0 <= top <= TOP, f"from 0 to {TOP}", top)
        prompts = [self._encode(prompt) for prompt in _listed(body["prompt"])]
        answers = self._answers(prompts, asked, least=0 if echo else 1)
        choices = []
        for index, (ids, answer) in enumerate(answers):
            whole = [*ids, *answer.ids]
            told = None if top is None else self._told(whole, 0 if echo else len(ids), top)
            text = answer.text
            if echo:
                given = _listed(body["prompt"])[index // asked.count]
                text = (given if isinstance(given, str) else self._text(ids)) + text
            reason = REASONS[answer.finish]
            choices.append(
                {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
            )
        return self._reply("cmpl", "text_completion", choices, prompts, answers)

    def chat_completions(self, body: Any) -> dict[str, Any]:
        """Answers a conversation, written as the model's chat template has it.

        Raises:
            UserError: see the module.
        """
        body, asked = self._read(body, CHAT_FIELDS, ("messages",), default=None)
        if body.get("logprobs"):
            raise errors.UserError("logprobs are given by /v1/completions alone.")
        messages = body["messages"]
        errors.check("messages", bool(messages), "a list of at least one message", messages)
        for i, message in enumerate(messages):
            reading.check_record(message, f"messages[{i}]", {"role": str, "content": str})
        text = chat.write_conversation(messages, self.layout, add_generation_prompt=True)
        prompts = [self._encode(text)]
        answers = self._answers(prompts, asked, least=1)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "logprobs": None,
                "finish_reason": REASONS[answer.finish],
            }
            for index, (_, answer) in enumerate(answers)
        ]
        return self._reply("chatcmpl", "chat.completion", choices, prompts, answers)

    def _read(self, body, fields, required, default):
        """Checks a request's fields; null is as good as none."""
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if value is not None}
            for name in body:
                errors.check_choice("a field of the request", name, fields)
        needed = {name: fields[name] for name in required}
        body = reading.check_record(body, "the request", needed, fields)
        for name, plain in PLAIN.items():
            if body.get(name, plain) != plain:
                raise errors.UserError(f"{name} is not built here: leave it out.")
        if body.get("model", self.name) != self.name:
            errors.check_choice("model", body["model"], [self.name])
        return body, self._asked(body, default)

    def _asked(self, body: Mapping[str, Any], default: int | None) -> Asked:
        longest = body.get("max_completion_tokens", body.get("max_tokens", default))
        stop = body.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        temperature, top_p = body.get("temperature", 1.0), body.get("top_p", 1.0)
        count = body.get("n", 1)
        seed = body.get("seed", self.seed)
        for name, ok, expected, value in (
            ("max_tokens", longest is None or longest >= 0, "a whole number from 0", longest),
            ("temperature", 0 <= temperature <= 2, "from 0 to 2", temperature),
            ("top_p", 0 < top_p <= 1, "in (0, 1]", top_p),
            ("n", 1 <= count <= 128, "from 1 to 128", count),
            ("seed", 0 <= seed < 2**32, "from 0 to 4294967295", seed),
            ("stop", all(isinstance(s, str) and s for s in stop), "texts", list(stop)),
        ):
            errors.check(name, ok, expected, value)
        return Asked(longest, float(temperature), float(top_p), stop, seed, count)

    def _encode(self, prompt: str | list) -> list[int]:
        """Returns the token ids of a prompt, which may be token ids already."""
        tokenizer, first = self.layout.tokenizer, list(self.layout.first)
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids if ids[: len(first)] == first else [*first, *ids]
        else:
            ids = prompt
        known = all(type(i) is int and 0 <= i < self.model.cfg.vocab_size for i in ids)
        expected = f"a text or token ids from 0 to {self.model.cfg.vocab_size - 1}"
        errors.check("prompt", known and bool(ids), expected, prompt)
        return ids

    def _answers(
        self, prompts: Sequence[list[int]], asked: Asked, least: int
    ) -> list[tuple[list[int], generate.Answer]]:
        """Returns (prompt, answer) in order, `asked.count` of each prompt.

        Args:
            least: new tokens that the request must leave room for.
        """
        longest = max(len(ids) for ids in prompts)
        new = self.max_tokens - longest if asked.longest is None else asked.longest
        if new < least or longest + new > self.max_tokens:
            raise errors.UserError(
                f"a prompt of {longest} tokens and {max(new, least)} new ones do not fit the "
                f"{self.max_tokens} tokens of this server."
            )
        wanted = [ids for ids in prompts for _ in range(asked.count)]
        if new == 0:
            return [(ids, generate.Answer("", 0, generate.LENGTH)) for ids in wanted]
        edge = min(_padded(longest), self.max_tokens - new)
        settings = sampling.Sampling(new, asked.temperature, asked.top_p, asked.seed)
        generator = dataclasses.replace(self._generator(settings), stop=asked.stop)
        rows = harness_generation.make_prompts(wanted, self._text)
        multiple = self.placement.rows_multiple
        [stream] = generate.plan(rows, [edge], new, self.batch_tokens, multiple)
        found = dict(generate.run(generator, self.model.params, self.adapter, rows, stream))
        return [(ids, found[i]) for i, ids in enumerate(wanted)]

    def _make_generator(self, settings: sampling.Sampling) -> generate.Generator:
        return generate.make_generator(
            self.model.cfg, settings, self._ends, (), self._text, self.placement
        )

    def _told(self, ids: Sequence[int], start: int, top: int) -> dict[str, list]:
        """Returns tokens from `start` as the API writes them; a row's first has no likelihood."""
        spell = [self._spell(i) for i in ids]
        values, best, likeliest = self._scored(ids)
        own: list[float | None] = [None, *values]
        alternatives: list[dict[str, float] | None] = [None]
        for token, value, others, their in zip(spell[1:], values, best, likeliest, strict=True):
            named = zip(others[:top], their[:top], strict=True)
            found = {self._spell(i): float(x) for i, x in reversed([*named])}
            alternatives.append(found if token in found else found | {token: value})
        offsets = [0, *itertools.accumulate(map(len, spell[start:]))]
        return {
            "tokens": spell[start:],
            "token_logprobs": own[start:],
            "top_logprobs": alternatives[start:],
            "text_offset": offsets[:-1],
        }

    def _spell(self, token: int) -> str:
        return str(self.layout.tokenizer.decode([token]))

    def _scored(self, ids: Sequence[int]):
        """Returns of each token but the first its log-likelihood, and the likeliest tokens."""
        count = len(ids) - 1
        if not count:
            return [], [], []
        tokens = min(_padded(len(ids)), self.max_tokens)
        row = np.array(ids, np.int32)
        labels = np.where(np.arange(len(ids)) == 0, example.IGNORED, row).astype(np.int32)
        encoded = [example.Encoded("request", row, labels)]
        batch = batches.make_batch(encoded, self.placement.rows_multiple, tokens, tokens)
        placed = self.placement.batch(batch)
        out = self._score(self.model.params, self.adapter, placed)
        losses, best, values = (np.asarray(x)[0, :count] for x in out)
        if not np.isfinite(losses).all():
            raise errors.UserError("the model gives a likelihood that is not finite.")
        return (-losses).tolist(), best.tolist(), values.tolist()

    def _reply(self, prefix, kind, choices, prompts, answers) -> dict[str, Any]:
        read, written = sum(map(len, prompts)), sum(answer.tokens for _, answer in answers)
        return {
            "id": f"{prefix}-{next(self._numbers)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
            "choices": choices,
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
            },
        }


def _listed(prompt: str | list) -> list:
    """Returns the prompts of a request: one text, several, one list of token ids, or several."""
    if isinstance(prompt, str) or (prompt and all(type(i) is int for i in prompt)):
        return [prompt]
    errors.check("prompt", bool(prompt), "a text, token ids, or a list of them", prompt)
    return prompt


def _padded(count: int) -> int:
    return max(SHORTEST, 1 << (count - 1).bit_length())
