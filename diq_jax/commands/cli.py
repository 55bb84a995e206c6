"""Runs a script's main: a user's mistake is one sentence on standard error and exit code 2."""

import errno
import os
import pathlib
import re
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence

from absl import flags, logging

from diq_jax import config, config_files, errors
from diq_jax.run import processes

FULL_OR_FORBIDDEN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Parses the flags, calls main() and exits: 0 done, 1 a fault of ours, 2 a mistake of the user,
    130 Ctrl-C, 143 SIGTERM.

    --help prints the script's docstring, its flags and the config's fields instead.

    main gets what stands beside the flags: one text for each name in `arguments`, all required.
    Whatever was finished before stays; the same command continues from there.
    """
    logging.set_verbosity(logging.WARNING)
    sys.excepthook = _log_and_leave
    processes.stop_on_sigterm()
    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        print(_usage())
        return
    try:
        _check_config_flags(sys.argv)
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].parser = config_files.Parser()
        left = flags.FLAGS(sys.argv)[1:]
        if extra := left[len(arguments) :]:
            raise errors.UserError(f"{extra[0]!r} is not a flag; flags look like --name=value.")
        if len(left) < len(arguments):
            raise errors.UserError(f"expected {' '.join(arguments)}; got {' '.join(left) or '-'}.")
        main(*left)
    except flags.Error as e:
        # absl wraps what the parser of a config file says.
        own = isinstance(e.__context__, errors.UserError)
        said = str(e.__context__) if own else " ".join(str(e).split())
        missing = re.findall(r"Flag --(\w+) must have a value other than None", said)
        needed = " and ".join(f"--{name}" for name in missing)
        _fail(f"{needed} must be given; --help explains them." if missing else said)
    except errors.UserError as e:
        _fail(str(e))
    except OSError as e:
        if e.errno not in FULL_OR_FORBIDDEN:
            raise
        _fail(
            f"Cannot write {e.filename or 'in --workdir'}: {e.strerror}. What was finished is kept."
        )
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues from here.", file=sys.stderr)
        processes.leave(130)


def define_verify() -> flags.FlagHolder:
    """The flag of scripts that read a run's artifacts."""
    return flags.DEFINE_enum(
        "verify",
        "on",
        ["on", "off"],
        "Whether a run's files are held against the checksums that their stages recorded.",
    )


def verify(holder: flags.FlagHolder) -> bool:
    """What that flag says; a word about it where it says no."""
    if holder.value == "off":
        logging.warning("--verify=off: files of runs are used whether or not they are as written.")
    return holder.value == "on"


def folder(holder: flags.FlagHolder) -> pathlib.Path:
    """The folder that a flag names. Raises UserError for an empty name, which is no folder."""
    if not holder.value.strip():
        raise errors.UserError(f"--{holder.name} must name a folder; got {holder.value!r}.")
    return pathlib.Path(holder.value)


def read_config(holder: flags.FlagHolder) -> config.Config:
    """The checked config of a --config flag.

    Raises:
        UserError: a field is wrong.
    """
    return config.resolve(holder.value)


def _check_config_flags(arguments: list[str]) -> None:
    """Names a config field that does not exist, before the flag parser answers with a traceback."""
    known = list(config.field_names())
    for argument in arguments[1:]:
        found = re.match(r"--?config\.([^=]*)", argument)
        if found and found[1] not in known:
            near = errors.nearest(found[1], known)
            raise errors.UserError(f"config field {found[1]} does not exist.{near}")


def _usage() -> str:
    """What the script's docstring says, its flags, and the config's fields where it takes one."""
    ours = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("diq_jax.")]
    parts = [sys.modules["__main__"].__doc__ or "", "Flags:", flags.FLAGS.main_module_help()]
    parts += [flags.FLAGS.module_help(name) for name in ours]
    if "config" in flags.FLAGS:
        names = textwrap.fill(
            ", ".join(config.field_names()), 100, initial_indent="  ", subsequent_indent="  "
        )
        where = "diq_jax/config.py, influence_config.py and finetune_config.py"
        parts.append(f"Config fields, as --config.NAME=VALUE, explained in {where}:\n{names}")
    return "\n".join(parts)


def _log_and_leave(kind, error, trace) -> None:
    """Ends a script at an exception that nothing expected: one sentence, and a log for us."""
    processes.wait_if_stopping()
    text = "".join(traceback.format_exception(error))
    said = textwrap.shorten(str(error), 200, placeholder=" ...")
    print(
        f"error: unexpected {kind.__name__}: {said} (a fault of diq_jax, not a known mistake). The "
        f"traceback is in {_write_log(text)}; what was finished is kept.",
        file=sys.stderr,
    )
    processes.leave(1)


def _write_log(text: str) -> pathlib.Path:
    """Writes into the workdir where there is one, else into the folder of temporary files."""
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    given = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    for place in filter(None, (given, tempfile.gettempdir())):
        try:
            path = pathlib.Path(place, name)
            path.write_text(f"{' '.join(sys.argv)}\n\n{text}", encoding="utf-8", errors="replace")
        except OSError:
            continue  # there is no such folder yet, or it is full or forbidden
        return path.absolute()
    return pathlib.Path("no file, as none can be written")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    processes.leave(2)
