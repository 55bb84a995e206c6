"""Renders chat templates in a process of its own. chat_template.py starts it.

A chat template is a program that somebody else wrote. Here it can neither run for long, nor take
much memory, nor reach anything but the messages. Requests and replies are lines of JSON. Whatever
the template raises ends the process, and is its last reply.
"""

import datetime
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2 import parser as parser_lib

MOST_CHARACTERS = 2**24  # of one rendered conversation


class Generation(jinja2.ext.Extension):
    """Reads the tag {% generation %}, with which transformers marks an assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: parser_lib.Parser) -> nodes.Node:
        """Parses the tag as a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def environment(date: datetime.datetime) -> jinja2.Environment:
    """Makes what transformers renders in, but with a clock that stands still at `date`."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = date.strftime
    return made


def raise_exception(message: str) -> None:
    """Gives templates a way to refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON without the escapes for HTML that jinja2's own filter makes."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def reply(**fields: Any) -> None:
    """Writes a line of JSON."""
    print(json.dumps(fields), flush=True)


def report(kind: type[BaseException], value: BaseException, _: Any) -> None:
    """Replies with an exception that ends the process."""
    reply(error=" ".join(f"{kind.__name__}: {value}".split())[:300])


def limit_memory(most_bytes: int) -> None:
    """Limits the address space of this process."""
    if sys.platform == "darwin":
        return  # macOS knows the limit and does not hold it
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most_bytes if hard == resource.RLIM_INFINITY else min(most_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main() -> None:
    """Replies to requests until one fails."""
    sys.excepthook = report
    first = json.loads(sys.stdin.readline())
    limit_memory(first["most_bytes"])
    # Unhandled, the signal ends the process even inside one long operation of the interpreter.
    signal.setitimer(signal.ITIMER_PROF, first["most_seconds"])
    date = datetime.datetime.fromisoformat(first["date"])
    template = environment(date).from_string(first["template"])
    for line in sys.stdin:
        request, texts = json.loads(line), []
        for messages in request["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, first["most_seconds"])
            text = template.render(**first["variables"], **request["shared"], messages=messages)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it writes {len(text):,} characters for one conversation")
            texts.append(text)
        reply(texts=texts)


if __name__ == "__main__":
    main()
