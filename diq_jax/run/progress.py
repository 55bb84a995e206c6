"""One progress bar for long work: examples/s, tokens/s, time left; in the first process."""

import sys
import time

import tqdm

from diq_jax.run import processes


class Progress:
    """Counts examples and real tokens. `resumed` examples are done already and do not count in the
    rate.
    """

    def __init__(self, name: str, total: int | None, resumed: int = 0) -> None:
        self.tokens, self.examples, self._start = 0, 0, time.perf_counter()
        self._bar = tqdm.tqdm(
            total=total,
            initial=resumed,
            desc=name,
            unit="ex",
            disable=not processes.is_first(),
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, examples: int, tokens: int, **shown: str) -> None:
        self.examples += examples
        self.tokens += tokens
        rate = self.tokens / max(time.perf_counter() - self._start, 1e-9)
        self._bar.set_postfix({"tok/s": f"{rate:,.0f}", **shown}, refresh=False)
        self._bar.update(examples)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def byte_bar(title: str, total: int) -> tqdm.tqdm:
    """Opens a bar over bytes, shown once it has taken a few seconds; in the first process."""
    return tqdm.tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        delay=3,
        leave=False,
        disable=not processes.is_first(),
        dynamic_ncols=True,
    )


def say(line: str) -> None:
    """Writes a line to standard error, beside the bars; in the first process."""
    if processes.is_first():
        tqdm.tqdm.write(line, file=sys.stderr)
