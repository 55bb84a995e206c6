"""Replies of a language model: how one is read, and the file that keeps all that were paid for."""

import dataclasses
import fcntl
import io
import json
import operator
import os
import pathlib
import re
import zlib
from typing import Any

from diq_jax import errors
from diq_jax.run import artifacts, reading

MOST_TOKENS = 2**40  # of one reply: a larger count is none
# A line of the file as `Cache.put` writes it, up to the reply's content.
_TEMPLATE = b'{"key": "' + b"0" * 64 + b'", "content": "'
_FIRST_LINE = re.compile(rb'\{"key": "[0-9a-f]{64}", "content": "')


@dataclasses.dataclass(frozen=True)
class Reply:
    """Holds what a server sent, and the tokens that it counted.

    Attributes:
        content, refusal: as they came; half of a surrogate pair, which no file can hold, is U+FFFD.
        finish: why the reply ended: stop, length, content_filter.
        prompt_tokens, completion_tokens: 0 where the server gave no usable count.
    """

    content: str
    refusal: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


def read_completion(body: str) -> Reply:
    """Reads the reply out of a chat completion.

    Raises:
        UserError: the body is no chat completion.
    """
    text = (str, type(None))
    found = reading.parse_json(body, "the reply", mend=True)
    choices = reading.check_record(found, "the reply", {"choices": list})["choices"]
    if not choices:
        raise errors.UserError("the reply has no choice.")
    choice = reading.check_record(
        choices[0], "the reply's choice", {"message": dict}, {"finish_reason": text}
    )
    message = reading.check_record(
        choice["message"], "the reply's message", {}, {"content": text, "refusal": text}
    )
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        content=message.get("content") or "",
        refusal=message.get("refusal") or "",
        finish=choice.get("finish_reason") or "",
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


class Cache:
    """Keeps every reply that was paid for, in an append-only file that one process at a time holds.

    Nothing is ever removed from the file: a damaged line stays and is skipped.

    Attributes:
        usage: (replies, prompt tokens, completion tokens, replies without these counts) so far.
        damaged: how many lines are damaged.

    Raises:
        UserError: another process holds the file, it cannot be written, or it is not one of ours;
            then it stays as it is.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = pathlib.Path(path)
        self.usage, self.damaged = (0, 0, 0, 0), 0
        self._replies: dict[str, Reply] = {}
        try:
            artifacts.make_folder(self.path.parent)
            self._file = open(self.path, "a+b", buffering=0)  # a failed write leaves nothing
        except OSError as e:
            raise errors.UserError(f"{self.path} cannot be written: {e.strerror}.") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.UserError(
                f"{self.path} is in use by another run, which pays for the same replies: start "
                "again when it has ended, or name another --out."
            ) from None

    def _read(self) -> None:
        self._file.seek(0)
        lines = io.BytesIO(self._file.read()).readlines()
        found = [_entry(line) for line in lines]
        good = [entry for entry in found if entry is not None]
        # Of a run that was killed at its very first reply there is the beginning of a line.
        if lines and not good and not _FIRST_LINE.match(lines[0] + _TEMPLATE[len(lines[0]) :]):
            raise errors.UserError(
                f"{self.path} holds no reply that was kept here, so it stays as it is: move it "
                "away, or name another --out."
            )
        for key, reply in good:
            self._add(key, reply)
        self.damaged = len(found) - len(good)
        self._torn = bool(lines) and not lines[-1].endswith(b"\n")
        if not lines:
            artifacts.sync(self.path.parent)

    def get(self, key: str) -> Reply | None:
        """Returns the reply to the request of this key."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Returns once the reply is on the disk.

        Raises:
            UserError: the disk does not take it.
        """
        entry = {"key": key} | dataclasses.asdict(reply)
        line = json.dumps(entry | {"checksum": _checksum(entry)}, allow_nan=False).encode()
        if _entry(line) != (key, reply):
            raise ValueError(f"a reply that could not be read back: {reading.shorten(reply)}")
        line, self._torn = b"\n" * self._torn + line + b"\n", True
        try:
            written = self._file.write(line)
            os.fsync(self._file.fileno())
        except OSError as e:
            raise errors.UserError(f"{self.path} cannot be written: {e.strerror}.") from None
        if written < len(line):
            raise errors.UserError(f"{self.path} cannot be written: the disk is full.")
        self._torn = False
        self._add(key, reply)

    def _add(self, key: str, reply: Reply) -> None:
        self._replies[key] = reply
        tokens = reply.prompt_tokens, reply.completion_tokens
        more = (1, *tokens, int(reply.prompt_tokens == 0))  # no prompt is empty
        self.usage = tuple(map(operator.add, self.usage, more))

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entry(line: bytes) -> tuple[str, Reply] | None:
    """Reads a line of the file, (key, reply); None where it is damaged."""
    texts: dict[str, type] = dict.fromkeys(("key", "content", "refusal", "finish"), str)
    try:
        found = reading.parse_json(line.decode(), "a line", mend=True)
        reading.check_record(found, "a line", texts)
        expected = found.pop("checksum", None)
        if expected is not None and expected != _checksum(found):
            return None
    except ValueError:  # UserError and UnicodeDecodeError are
        return None
    counts = {name: _count(found.get(name)) for name in ("prompt_tokens", "completion_tokens")}
    key, *rest = (found[name] for name in texts)
    return key, Reply(*rest, **counts)


def _checksum(entry: dict[str, Any]) -> str:
    """Returns a checksum, which lines of earlier versions lack."""
    return f"{zlib.crc32(json.dumps(entry).encode()):08x}"


def _count(value: Any) -> int:
    """Returns a server's count of tokens; 0 for what is no count."""
    return value if type(value) is int and 0 <= value < MOST_TOKENS else 0
