"""A chat template, rendered within limits of time and memory."""

import json
import pathlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from diq_jax import errors
from diq_jax.run import reading

WORKER = pathlib.Path(__file__).with_name("template_worker.py")
MOST_SECONDS = 3.0  # of a processor, for one conversation
MOST_BYTES = 2**30  # of address space
MOST_CONVERSATIONS = 64  # of one exchange


class ChatTemplate:
    """Applies the chat template of a tokenizer to messages.

    It runs in a process of its own (template_worker.py), which starts with the first call and ends
    with this object.

    Args:
        template: the source.
        variables: what it can read beside the messages: special tokens by name.
        date: the day, YYYY-MM-DD, that it takes for today.
        field: the config field or flag that names the model, for messages.
    """

    def __init__(self, template: str, variables: dict[str, Any], date: str, field: str) -> None:
        self._first = {
            "template": template,
            "variables": variables,
            "date": date,
            "most_seconds": MOST_SECONDS,
            "most_bytes": MOST_BYTES,
        }
        self._field = field
        self._running: tuple[subprocess.Popen[str], Callable[[], Any]] | None = None

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        """Renders one conversation. Raises UserError as `render_all`."""
        return self.render_all([messages], add_generation_prompt)[0]

    def render_all(
        self, conversations: Sequence[Sequence[dict[str, Any]]], add_generation_prompt: bool
    ) -> list[str]:
        """Renders conversations, many of them in one exchange with the process.

        Raises:
            UserError: the template raises an exception, runs too long or takes too much memory.
        """
        made: list[str] = []
        for start in range(0, len(conversations), MOST_CONVERSATIONS):
            some = conversations[start : start + MOST_CONVERSATIONS]
            made += self._render(some, add_generation_prompt)
        return made

    def _render(self, conversations, add_generation_prompt) -> list[str]:
        process, end = self._running = self._running or self._start()
        # As in transformers, which passes both always.
        shared = {
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        line = _reply(process, {"shared": shared, "conversations": conversations})
        problem = ""
        if line:
            reply = reading.parse_json(line, f"What the chat template of {self._field} writes")
            if "texts" in reply:
                return reply["texts"]
            problem = reply["error"]
        code = process.wait()
        end()
        self._running = None
        if code == -signal.SIGPROF:
            problem = f"it runs for more than {MOST_SECONDS:.0f} s on one conversation"
        elif not problem or problem.startswith("MemoryError"):
            problem = f"it needs more than {MOST_BYTES // 2**20:,} MiB, or ends the interpreter"
        raise errors.UserError(f"{self._field} has a chat template that fails: {problem}.")

    def _start(self) -> tuple[subprocess.Popen[str], Callable[[], Any]]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        end = weakref.finalize(self, _end, process)
        _write(process, self._first)
        return process, end


def _write(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    assert process.stdin is not None  # it was started with pipes
    process.stdin.write(json.dumps(request) + "\n")


def _reply(process: subprocess.Popen[str], request: dict[str, Any]) -> str:
    """Returns the reply's line, "" from a process that ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        _write(process, request)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # its last reply says why
    return process.stdout.readline()


def of_tokenizer(
    tokenizer: transformers.PreTrainedTokenizerBase, date: str, field: str
) -> ChatTemplate | None:
    """Returns the template that a tokenizer brings, None where it brings none.

    Raises:
        UserError: it brings several, and none of the name "default".
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        if "default" not in source:
            raise errors.UserError(
                f"{field} has chat templates of the names {', '.join(sorted(source))}; expected "
                "one named default: name it so in tokenizer_config.json."
            )
        source = source["default"]
    if not source:
        return None
    return ChatTemplate(source, dict(tokenizer.special_tokens_map), date, field)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
