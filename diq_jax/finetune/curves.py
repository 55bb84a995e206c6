"""Training curves as TensorBoard event files, where the extra `tensorboard` is installed."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from diq_jax import errors
from diq_jax.run import processes


@contextlib.contextmanager
def open_log(folder: pathlib.Path, wanted: bool) -> Iterator[Callable | None]:
    """Yields `loop.Upkeep.log`, which writes into `folder`; None if unwanted, or not ours to write.

    A resumed run adds a file that replaces the steps which the killed one had not kept.

    Raises:
        UserError: wanted, and the package is not there.
    """
    if not (wanted and processes.is_first()):
        yield None
        return
    try:
        import tensorboardX
    except ImportError:
        raise errors.UserError(
            "finetune.tensorboard=True needs pip install -e '.[tensorboard]'; or set it to False."
        ) from None
    with contextlib.ExitStack() as stack:
        writers: list[tensorboardX.SummaryWriter] = []

        def log(first: int, records: Sequence[dict[str, float]]) -> None:
            if not writers:
                made = tensorboardX.SummaryWriter(str(folder), purge_step=first)
                writers.append(stack.enter_context(made))
            for step, record in enumerate(records, start=first):
                for name, value in record.items():
                    writers[0].add_scalar(name, value, step)
            writers[0].flush()

        yield log
