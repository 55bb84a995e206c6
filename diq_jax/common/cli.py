"""Runs a script's main: a user's mistake is one sentence on standard error and exit code 2."""

import errno
import sys
from collections.abc import Callable

from absl import flags, logging

from diq_jax.common import errors

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls main() and exits: 0 done, 2 a mistake of the user, 130 Ctrl-C.

    Whatever was finished before stays; the same command continues from there.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        left = flags.FLAGS(sys.argv)[1:]
        if left:
            raise errors.UserError(f"{left[0]!r} is not a flag; flags look like --name=value.")
        main()
    except flags.Error as e:
        _fail(" ".join(str(e).split()))
    except errors.UserError as e:
        _fail(str(e))
    except NotADirectoryError as e:
        _fail(f"{e.filename} is not a folder.")
    except FileExistsError as e:
        _fail(f"{e.filename} exists and is not a folder.")
    except OSError as e:
        if e.errno not in FULL_OR_FORBIDDEN:
            raise
        _fail(f"Cannot write {e.filename or ''}: {e.strerror}. What was finished is kept.")
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues from here.", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
