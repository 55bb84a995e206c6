"""What is asked of a language model and what its replies are worth: requests and checks.

Nothing here knows of a network (`endpoint` sends) or of what the answers are for.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diq_jax.clients import replies
from diq_jax.run import reading

# From one try to the next, so that a server with seeds does not repeat itself. The seeds between
# are the caller's, for several answers to one question.
SEED_STRIDE = 1 << 16
TYPES = {"object": dict, "integer": int, "string": str}


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks one question of a chat model, whose answer is a JSON object.

    Attributes:
        messages: {"role": ..., "content": ...}, in order.
        schema: of the answer: the part of JSON schema that `mistake` knows.
        seed: of the sampling, where the server knows seeds.
        temperature: None = the server's own.
        max_tokens: of the reply; 0 = the server's own limit.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    schema: Mapping[str, Any]
    seed: int
    temperature: float | None
    max_tokens: int

    @functools.cached_property
    def key(self) -> str:
        """Hashes all that the reply may depend on, but not the server or its API key."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def retry(self, number: int) -> "Request":
        """Returns the same question asked again with another seed; 0 is the request itself."""
        return dataclasses.replace(self, seed=self.seed + number * SEED_STRIDE)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Holds the result of a request.

    Attributes:
        status: answered; or, after the last try, refused, malformed or unanswered.
        value: the checked answer; None where there is none.
        detail: what was wrong with the last try; "" where answered.
    """

    status: str
    value: dict[str, Any] | None = None
    detail: str = ""


def choices_schema(choices: Mapping[str, Sequence]) -> dict[str, Any]:
    """Makes the JSON schema of an answer with one choice for each name, whole numbers or texts.

    The reason, `NAME_reason`, stands before its choice, so that the choice follows from it.
    """
    properties = {}
    for name, values in choices.items():
        kind = "integer" if isinstance(values[0], int) else "string"
        properties[f"{name}_reason"] = {"type": "string"}
        properties[name] = {"type": kind, "enum": list(values)}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def body(request: Request, structured: bool) -> dict:
    """Returns a chat-completions request's fields; the schema as response_format or in words."""
    fields = {"model": request.model, "seed": request.seed}
    if request.temperature is not None:
        fields["temperature"] = request.temperature
    if request.max_tokens:
        fields["max_completion_tokens"] = request.max_tokens
    messages = [dict(message) for message in request.messages]
    if structured:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": request.schema},
        }
    else:
        messages[-1]["content"] += (
            "\n\nAnswer with one JSON object and nothing else. Its JSON schema: "
            + json.dumps(request.schema)
        )
    return fields | {"messages": messages}


def settle(request: Request, cache: replies.Cache, tries: int) -> Outcome | Request:
    """Returns what the replies at hand decide, or else the request to send next.

    A refused or malformed reply is asked for again, `tries` times in all; the last one counts.
    """
    number, outcome = 0, None
    while outcome is None or (number < tries and outcome.status != "answered"):
        step = request.retry(number)
        reply = cache.get(step.key)
        if reply is None:
            return step
        outcome = judge(reply, request.schema)
        number += 1
    return outcome


def split(
    requests: Iterable[Request], cache: replies.Cache, tries: int
) -> tuple[dict[str, Outcome], list[Request]]:
    """Splits requests into what the cache decides, by key, and the others, equal ones once."""
    outcomes, missing = {}, []
    for key, request in {request.key: request for request in requests}.items():
        found = settle(request, cache, tries)
        if isinstance(found, Outcome):
            outcomes[key] = found
        else:
            missing.append(request)
    return outcomes, missing


def judge(reply: replies.Reply, schema: Mapping[str, Any]) -> Outcome:
    """Says whether the reply is an answer: one JSON object that fits the schema."""
    if reply.refusal or reply.finish == "content_filter":
        return Outcome("refused", detail=shorten(reply.refusal or "stopped by a content filter"))
    try:
        value = parse_object(reply.content)
    except ValueError as e:
        cut = "cut at the token limit; " if reply.finish == "length" else ""
        return Outcome("malformed", detail=shorten(f"{cut}{e}: {reply.content!r}"))
    if wrong := mistake(value, schema, "the answer"):
        return Outcome("malformed", detail=shorten(wrong))
    return Outcome("answered", value)


def parse_object(text: str) -> Any:
    """Parses the JSON from the first brace to the last, after any reasoning before it.

    Raises:
        ValueError: there is none, or more than one.
    """
    text = text.rpartition("</think>")[2]
    start, end = text.find("{"), text.rfind("}")
    if start < 0:
        raise ValueError("no JSON object")
    return reading.parse_json(text[start : end + 1], "it")


def mistake(value: Any, schema: Mapping[str, Any], where: str) -> str:
    """Says what makes the value differ from the schema; "" where nothing does.

    Known: type object (every property required, no other allowed), integer and string; enum.
    """
    # By the exact type: a bool is an int to isinstance.
    if type(value) is not TYPES[schema["type"]]:
        return f"{where} must be of type {schema['type']}, got {value!r}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} must be one of {', '.join(map(str, schema['enum']))}, got {value!r}"
    if schema["type"] != "object":
        return ""
    properties = schema["properties"]
    if value.keys() != properties.keys():
        return f"{where} must have {', '.join(properties)}, got {', '.join(value) or 'nothing'}"
    found = (mistake(value[name], properties[name], name) for name in properties)
    return next(filter(None, found), "")


def shorten(text: str) -> str:
    """Returns one line of at most 300 characters, which any file can hold."""
    text = " ".join(text.encode(errors="replace").decode().split())
    return text if len(text) <= 300 else text[:297] + "..."
