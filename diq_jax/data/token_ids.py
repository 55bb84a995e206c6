"""What is asked of a tokenizer beside token ids, with the types that transformers leaves open."""

from collections.abc import Sequence

import transformers

Tokenizer = transformers.PreTrainedTokenizerBase


def bos_id(tokenizer: Tokenizer) -> int | None:
    """Returns the token that begins a sequence, None without one."""
    found = tokenizer.bos_token_id
    return found if isinstance(found, int) else None


def eos_id(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends a sequence, None without one."""
    found = tokenizer.eos_token_id
    return found if isinstance(found, int) else None


def first(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the token that the tokenizer begins a text with, where it does."""
    bos = bos_id(tokenizer)
    return (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()


def text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Writes the text of token ids, without special tokens."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
