"""Loads a config file, Python that others wrote: a mistake is one sentence with file and line."""

import importlib.machinery
import pathlib
import traceback
import types

import ml_collections
from absl import flags

from diq_jax import config, errors


class Parser(flags.ArgumentParser):
    """Reads a --config flag as `load` does."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """Returns the config of the flag's value."""
        return load(argument)

    def flag_type(self) -> str:
        """Returns what absl's help calls the flag's type."""
        return "config file"


def shipped() -> dict[str, pathlib.Path]:
    """Returns the config files that come with the package, by name."""
    package = pathlib.Path(__file__).parent
    # Installed they are a folder of the package; in a checkout they stand beside it.
    folders = (package / "configs", package.parent / "configs")
    folder = next((folder for folder in folders if folder.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.parent != package}


def load(argument: str) -> ml_collections.ConfigDict:
    """Returns what get_config() of FILE, or get_config(ARGUMENT) of FILE:ARGUMENT, returns, locked.

    Raises:
        UserError: the file is missing, cannot be run or raises anything; or its config has other
            fields or types than `config.default()`. Ranges are checked later, after the flags.
    """
    name, *given = argument.split(":", 1)
    names = shipped()
    file = names.get(name, pathlib.Path(name))
    if not file.is_file():
        known = sorted(path.name for path in file.parent.glob("*.py"))
        near = errors.nearest(file.name, [*known, *names] if file.name == name else known)
        raise errors.UserError(f"--config: there is no config file {file}.{near}")
    try:
        found = _run(file, given)
        if isinstance(found, ml_collections.ConfigDict):
            values = found.to_dict()
    except errors.UserError:
        raise
    except (Exception, SystemExit) as e:  # another's code may raise anything
        raise errors.UserError(_sentence(file, e)) from None
    if not isinstance(found, ml_collections.ConfigDict):
        raise errors.UserError(
            f"{file}: get_config() must return the config that it begins with, config.default(); "
            f"got {type(found).__name__}."
        )
    try:
        config.check_form(values)
    except errors.UserError as e:
        raise errors.UserError(f"{file}: {e}") from None
    return found.lock()


def _run(file: pathlib.Path, given: list[str]):
    loader = importlib.machinery.SourceFileLoader("diq_config_file", str(file))
    module = types.ModuleType(loader.name)
    module.__file__ = str(file)
    exec(loader.source_to_code(file.read_bytes(), str(file)), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
        raise errors.UserError(f"{file}: there is no function get_config() in this file.")
    return module.get_config(*given)


def _sentence(file: pathlib.Path, error: BaseException) -> str:
    """Names the line of the file that raised, or that called what raised."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
        lines.append(error.lineno)
    where = f"{file}:{lines[-1]}" if lines else str(file)
    said = " ".join(str(error).split())[:200]
    return f"{where}: the config file raised {type(error).__name__}{f': {said}' if said else ''}."
