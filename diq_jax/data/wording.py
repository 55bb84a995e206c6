"""What an example says, before any tokenizer: its question, its completion, its conversation."""

import re
from collections.abc import Mapping

from diq_jax import errors
from diq_jax.data import example as example_lib

TEMPLATES = {
    "plain": "{reasoning}\n\n{answer}",
    "huatuo": "## Thinking\n\n{reasoning}\n\n## Final Response\n\n{answer}",
    "think": "<think>\n{reasoning}\n</think>\n\n{answer}",
}
OPEN = "<think>"


def question_text(example: example_lib.Example) -> str:
    """Returns the question, with a line "A. text" for each option of a multiple-choice one."""
    return example_lib.ask(example.question, example.options)


def asked_text(example: example_lib.Example) -> str:
    """Returns what the question follows, and the question, as one text."""
    before = [message["content"] for message in example.context]
    return "\n\n".join([*before, question_text(example)])


def conversation(example: example_lib.Example, template: str) -> list[dict[str, str]]:
    """Returns the messages {role, content} of an example, its answer last.

    An earlier answer brings its reasoning where it is scored itself.
    """
    answer = {"role": "assistant", "content": completion_text(example, template)}
    return [*before_answer(example, template), answer]


def before_answer(example: example_lib.Example, template: str) -> list[dict[str, str]]:
    """Returns the messages that the answer follows: the context, and the question."""
    return [
        {"role": m["role"], "content": _earlier(m, example.every_turn, template)}
        for m in example.context
    ] + [{"role": "user", "content": question_text(example)}]


def _earlier(message: Mapping[str, str], is_scored: bool, template: str) -> str:
    if message["role"] != "assistant" or not is_scored:
        return message["content"]
    turn = example_lib.Example("", "", message["reasoning"], message["content"], {})
    return completion_text(turn, template)


def completion_text(example: example_lib.Example, template: str) -> str:
    """Writes reasoning and answer in `template`, a name of `TEMPLATES` or a text with {answer}.

    An example without reasoning gets its answer alone where the template has {reasoning}.
    Reasoning that brings its own tags is not tagged twice. The answer of a multiple-choice example
    is "B. text", or its own words.
    """
    if template not in TEMPLATES and "{answer}" not in template:
        raise errors.UserError(
            f"data.template must be one of {', '.join(TEMPLATES)} or a text with {{answer}} in it; "
            f"got {template!r}.{errors.nearest(template, TEMPLATES)}"
        )
    template = TEMPLATES.get(template, template)
    answer, reasoning = example.answer, example.reasoning
    if example.options is not None and answer == example.options.get(example.answer_idx):
        answer = f"{example.answer_idx}. {answer}"
    if OPEN in template:  # reasoning that brings its own tags
        reasoning = re.sub(r"^\s*<think>\n*|\n*</think>\s*$", "", reasoning)
    if "{reasoning}" in template and not reasoning.strip():
        return answer
    values = {"{reasoning}": reasoning, "{answer}": answer}
    # Not str.format: templates hold other braces (\boxed{}), and so do texts.
    return re.sub(r"\{reasoning\}|\{answer\}", lambda match: values[match[0]], template)


def plainly(message: Mapping[str, str]) -> str:
    """Writes a message as it stands in a prompt where there is no chat template."""
    opening = {"user": "Question: ", "assistant": "Answer: "}.get(message["role"], "")
    return f"{opening}{message['content']}\n\n"
