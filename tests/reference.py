"""torch and peft, which the tests compare with: what needs one that is not installed is skipped."""

import importlib

import pytest


class _Absent:
    """Skips the test, or the file, that takes anything from a package that is not installed."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, name: str):
        pytest.skip(f"{self._package} is not installed", allow_module_level=True)


def __getattr__(name: str):
    if name not in ("torch", "peft"):
        raise AttributeError(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return _Absent(name)
