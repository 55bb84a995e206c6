"""Files behind URLs (gs://, s3://, https://, memory://): fetched once, again where changed."""

import contextlib
import fnmatch
import glob
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from diq_jax import errors
from diq_jax.run import artifacts, compiled, progress

KNOWN = (ImportError, OSError, ValueError)


def fetch(url: str, field: str) -> list[pathlib.Path]:
    """Returns local copies of the files that a URL names, those of a glob sorted by name.

    Raises:
        UserError: there is none, or they cannot be read; `field` is what names the URL.
    """
    with _opened(url, field) as (system, place):
        found = sorted(system.glob(place)) if glob.has_magic(place) else [place]
        found = [file for file in found if system.isfile(file)]
        if not found:
            raise errors.UserError(f"{field}: there is no file {url}.")
        return [_copied(system, [file], url, field) / file.rpartition("/")[2] for file in found]


def fetch_folder(url: str, names: Sequence[str], field: str) -> pathlib.Path:
    """Returns a local copy of a folder's files that match `names`, or of the file itself.

    Raises:
        UserError: there is no such file, or they cannot be read.
    """
    with _opened(url, field) as (system, place):
        if system.isfile(place):
            return _copied(system, [place], url, field) / place.rpartition("/")[2]
        inside = system.ls(place, detail=False) if system.isdir(place) else []
        found = [f for f in inside if any(fnmatch.fnmatch(f.rpartition("/")[2], n) for n in names)]
        if not found:
            raise errors.UserError(f"{field}: {url} is no file, and no folder of {names[0]}.")
        return _copied(system, sorted(found), url, field)


@contextlib.contextmanager
def _opened(url: str, field: str) -> Iterator[tuple[Any, str]]:
    with reached(url, field):
        system, place = fsspec.core.url_to_fs(url.strip())
        yield system, place.rstrip("/")


@contextlib.contextmanager
def reached(url: str, field: str, how: str = "read") -> Iterator[None]:
    """Raises UserError where what stands behind a URL fails inside."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as e:
        # ImportError: of gcsfs, s3fs. And each file system has errors of its own kind.
        if type(e).__module__ == "builtins" and not isinstance(e, KNOWN):
            raise
        raise errors.UserError(
            f"{field}: {url} cannot be {how}: {errors.shorten(e, 200)}."
        ) from None


def _copied(system, files: Sequence[str], url: str, field: str) -> pathlib.Path:
    """Downloads the files that are not in the cache as they are now; returns their folder."""
    states = [f"{system.unstrip_protocol(file)} {system.ukey(file)}" for file in files]
    name = hashlib.sha256("\n".join(states).encode()).hexdigest()[:32]
    folder = compiled.cache() / "remote" / name
    missing = [file for file in files if not (folder / file.rpartition("/")[2]).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        progress.say(f"{field}: {url} is downloaded into {folder}")
    for file in missing:
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        try:
            system.get_file(file, temporary)
            artifacts.sync(temporary)
            os.replace(temporary, folder / file.rpartition("/")[2])
        finally:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return folder
