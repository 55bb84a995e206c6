"""The one exception for a user's mistake. Scripts print it as one sentence and exit with code 2."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

# A URL, perhaps after a prefix as in peft:gs://bucket/adapter.
URL = re.compile(r"(?:\w+:)?[A-Za-z][A-Za-z0-9+.-]+://\S*")


class UserError(ValueError):
    """Reports bad input from outside: what is wrong, where, and what was expected."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known name nearest to `name`, or "" if none is."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def find_choice(value: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that a value names, or None: "peft:FOLDER" stands for all of peft:..."""
    for choice in choices:
        head, colon, _ = choice.partition(":")
        if value == choice or (colon and value.startswith(f"{head}:")):
            return choice
    return None


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`, as `find_choice` reads them."""
    choices = list(choices)
    if find_choice(value, choices) is None:
        raise UserError(
            f"{field} must be one of {', '.join(choices)}; got {value!r}.{nearest(value, choices)}"
        )


def check(field: str, ok: Any, expected: str, value: Any) -> None:
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(f"{field} must be {expected}; got {shorten(value)}.")


def check_regex(field: str, pattern: str) -> re.Pattern[str]:
    """Compiles a regex. Raises UserError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(f"{field}: {pattern!r} is not a valid regex ({e}).") from None


def is_url(text: str) -> bool:
    """Tells whether a text looks like a place elsewhere: gs://bucket/file, s3://.., https://.."""
    return URL.fullmatch(text.strip()) is not None


def check_local(name: str, value: str) -> None:
    """Raises UserError where a text, or what stands between its commas, is a URL."""
    if any(map(is_url, value.split(","))):
        raise UserError(
            f"{name} must be on this machine, where a bucket may be mounted (gcsfuse, "
            f"mountpoint-s3); URLs are not supported there; got {shorten(value)}."
        )


def shorten(value: Any, most: int = 60) -> str:
    """Shows a value in a message, in one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
