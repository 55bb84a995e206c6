"""Starts `diq NAME`, and ends every script: a user's mistake is one sentence and exit code 2.

A job is a module of this folder that defines its flags and main(). What takes seconds to import it
imports inside its functions, so that --help and a mistyped flag are answered at once.
"""

import contextlib
import errno
import importlib
import inspect
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
from ml_collections import config_flags

import diq_jax
from diq_jax import config, config_files, errors
from diq_jax.run import processes

JOBS = {
    "run": "score a pool, select, fine-tune, evaluate, report: all stages, or some",
    "plan": "say what a run needs of a TPU slice, by the TPU's own compiler, without a TPU",
    "score": "score a pool against new targets, from the gradient store of a finished run",
    "train-classifier": "train a difficulty classifier once, to score any pool with",
    "annotate": "label the difficulty of a pool by a language model",
    "pass-rate": "label questions by how often the model itself answers them right",
    "view": "serve the report of a run to a browser, or two runs against each other",
    "report": "write a page that holds two runs against each other",
    "check": "find duplicates in a pool, and its overlap with tests",
    "compare-models": "compare two models that answered the same questions",
    "judge": "judge written answers by language models",
    "harness": "run tasks of the lm-eval harness on a model",
    "serve": "answer clients of the OpenAI API by a model",
    "export": "merge an adapter into its base model, or write a selection as a data set",
}
# Flags that are read as data.pool or model.path, or are addresses of a server; of the workdir its
# job says whether it may be a URL.
URL_FLAGS = {
    "pool", "against", "rows", "targets", "model", "general", "data", "base_url", "workdir",
    "compare", "studies", "selection", "answers",
}  # fmt: skip
_OPENED = contextlib.ExitStack()  # copies of runs at URLs, for the life of the process
_COPIES: dict[str, pathlib.Path] = {}
HELP = {"-h", "-help", "--help"}
# What the system says of a place that is full, forbidden, or no file or folder as it must be.
REFUSED = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def main(job: str = "") -> None:
    """Runs a job, or the one that the first argument names.

    Raises:
        SystemExit: with the exit code, as in `run`.
    """
    if not job:
        job, sys.argv[1:] = " ".join(sys.argv[1:2]), sys.argv[2:]
    if not job or job in HELP:
        _show(_overview())
        sys.exit(0 if job else 2)
    if job == "--version":
        print(f"diq_jax {diq_jax.__version__}")
        return
    if job not in JOBS:
        _fail(f"diq {job} is no job; there are {', '.join(JOBS)}.{errors.nearest(job, JOBS)}")
    module = importlib.import_module(f"diq_jax.commands.{job.replace('-', '_')}")
    run(module.main, getattr(module, "ARGUMENTS", ()))


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> None:
    """Parses the flags, calls main() and exits: 0 done, 1 our fault, 2 the user's, 130 or 143.

    --help prints the docstring of main's module, its flags and the config's fields instead, and
    --help=SECTION the fields of a section. What was finished before stays; the same command
    continues from there.

    Args:
        main: called with what stands beside the flags, a text for each name in `arguments`.
        arguments: the names of what must stand beside the flags; what may be left out in brackets.
    """
    logging.set_verbosity(logging.WARNING)
    sys.excepthook = _log_and_leave
    processes.stop_on_sigterm()
    if HELP & set(sys.argv[1:]):
        _show(_usage(inspect.getmodule(main)))
        return
    try:
        if sections := [a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--help=")]:
            _show(config.describe(sections[0]))
            return
        _check_config_flags(sys.argv)
        if "config" in flags.FLAGS:
            flags.FLAGS["config"].parser = config_files.Parser()
        left = flags.FLAGS(sys.argv)[1:]
        if extra := left[len(arguments) :]:
            raise errors.UserError(f"{extra[0]!r} is not a flag; flags look like --name=value.")
        named = zip(left, arguments, strict=False)
        _check_local([text for text, name in named if not name.strip("[]").startswith("RUN")])
        if len(left) < sum(name[0] != "[" for name in arguments):
            raise errors.UserError(f"expected {' '.join(arguments)}; got {' '.join(left) or '-'}.")
        main(*left)
    except flags.Error as e:
        # absl wraps what the parser of a config file says.
        own = isinstance(e.__context__, errors.UserError)
        said = str(e.__context__) if own else " ".join(str(e).split())
        missing = re.findall(r"Flag --(\w+) must have a value other than None", said)
        _fail(_missing(missing) if missing else said)
    except errors.UserError as e:
        _fail(str(e))
    except OSError as e:
        if e.errno not in REFUSED:
            raise
        _fail(
            f"Cannot write {e.filename or 'in --workdir'}: {e.strerror}. What was finished is kept."
        )
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues from here.", file=sys.stderr)
        processes.leave(130)


def define_config() -> flags.FlagHolder:
    """Defines --config, with --config.FIELD=VALUE for every field."""
    return config_flags.DEFINE_config_file(
        "config", None, "A config file, or the name of one in configs/.", lock_config=True
    )


def define_verify() -> flags.FlagHolder:
    """Defines --verify, for what reads a run's artifacts."""
    return flags.DEFINE_enum(
        "verify",
        "on",
        ["on", "off"],
        "Whether a run's files are held against the checksums that their stages recorded.",
    )


def verify(holder: flags.FlagHolder) -> bool:
    """Returns whether to verify, and warns where not."""
    if holder.value == "off":
        logging.warning("--verify=off: files of runs are used whether or not they are as written.")
    return holder.value == "on"


def require(*holders: flags.FlagHolder) -> None:
    """Raises UserError naming the flags that are not given."""
    if missing := [holder.name for holder in holders if holder.value is None]:
        raise errors.UserError(_missing(missing))


def _missing(names: Sequence[str]) -> str:
    return f"{' and '.join(f'--{n}' for n in names)} must be given; --help explains them."


def output(holder: flags.FlagHolder[str], extension: str) -> pathlib.Path:
    """Returns the file that a flag names.

    Raises:
        UserError: the file has another extension.
    """
    if not holder.value.endswith(extension):
        raise errors.UserError(f"--{holder.name} must end in {extension}; got {holder.value!r}.")
    return pathlib.Path(holder.value)


def folder(holder: flags.FlagHolder) -> pathlib.Path:
    """Returns the folder that a flag names. Raises UserError for an empty name, or a URL."""
    errors.check_local(f"--{holder.name}", holder.value)
    if not holder.value.strip():
        raise errors.UserError(f"--{holder.name} must name a folder; got {holder.value!r}.")
    return pathlib.Path(holder.value)


def run_folder(run: str, field: str) -> str:
    """Returns the folder of a run that is read; of one at a URL, a copy of it as it is now.

    Args:
        run: may have :MODEL behind it, which stays.
        field: the flag that names it, for messages.

    Raises:
        UserError: the URL cannot be reached, or holds no run.
    """
    if not run.strip():
        raise errors.UserError(f"{field} must name a run's folder; got {run!r}.")
    if not errors.is_url(run):
        return run
    from diq_jax.run import mirror

    scheme, _, rest = run.partition("://")
    place, colon, model = rest.partition(":")
    url = f"{scheme}://{place}".rstrip("/")
    if url not in _COPIES:
        _COPIES[url] = _OPENED.enter_context(mirror.opened(url, writes=False, field=field))
    if not any(_COPIES[url].iterdir()):
        raise errors.UserError(f"{field}: {url} holds no run.")
    return f"{_COPIES[url]}{colon}{model}"


def read_config(holder: flags.FlagHolder) -> config.Config:
    """Returns the checked config of a --config flag.

    Raises:
        UserError: a field is wrong.
    """
    return config.resolve(holder.value)


def _check_config_flags(arguments: list[str]) -> None:
    """Names a config field that does not exist, before the flag parser answers with a traceback."""
    known = config.field_names()
    for argument in arguments[1:]:
        found = re.match(r"--?config\.([^=]*)", argument)
        if found and found[1] not in known:
            near = errors.nearest(found[1], known)
            raise errors.UserError(f"config field {found[1]} does not exist.{near}")


def _check_local(beside: Sequence[str]) -> None:
    """Raises UserError for a URL that nothing reads: it would be taken for a folder here."""
    given = [(repr(text), text) for text in beside]
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if name not in URL_FLAGS and isinstance(value, str | list):
            given += [(f"--{name}", str(v)) for v in ([value] if isinstance(value, str) else value)]
    for name, value in given:
        errors.check_local(name, value)


def _overview() -> str:
    jobs = "\n".join(f"  {name:<17} {what}" for name, what in JOBS.items())
    return (
        f"diq_jax {diq_jax.__version__}: find the part of a pool worth fine-tuning on.\n\n"
        f"diq NAME [flags]; diq NAME --help explains one of\n{jobs}"
    )


def _usage(module) -> str:
    """Returns the module's docstring, its flags, and the config's fields where it takes one."""
    ours = [name for name in flags.FLAGS.flags_by_module_dict() if name.startswith("diq_jax.")]
    helps = [flags.FLAGS.main_module_help() if module.__name__ == "__main__" else ""]
    helps += [flags.FLAGS.module_help(name) for name in ours]
    lines = [text.partition("\n")[2].strip("\n") for text in helps]  # without the module's name
    parts = [module.__doc__ or "", "Flags:", *lines]
    if "config" in flags.FLAGS:
        parts.append("\nConfig fields; --help=SECTION shows one section:\n")
        parts.append(config.describe())
    return "\n".join(part for part in parts if part)


def _log_and_leave(kind, error, trace) -> None:
    """Ends a script at an unexpected exception with one sentence and a log of the traceback."""
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
    """Writes a log into the workdir where there is one, else into the folder of temporary files."""
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


def _show(text: str) -> None:
    """Prints a long text, of which the reader may take the beginning alone, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    processes.leave(2)
