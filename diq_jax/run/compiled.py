"""Keeps compiled programs on disk, so that a later run need not compile them again."""

import os
import pathlib
import time

import jax

KEPT_DAYS = 30


def keep() -> pathlib.Path | None:
    """Lets JAX keep what it compiles in diq_jax/compiled in the user's cache (XDG_CACHE_HOME).

    JAX's own settings come first: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. A program is taken up only where its code, the
    versions, the compiler's flags and the kind of devices are the same; no result changes.
    Programs older than a month are removed.

    Returns:
        The folder; None where JAX's settings decide, or the cache cannot be written.
    """
    folder, enabled = (
        jax.config.values[f"jax_{name}"]
        for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if folder or not enabled:
        return None
    folder = cache() / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what stands in it is run
        _remove_old(folder)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def cache() -> pathlib.Path:
    """Returns the folder of what may be made again: diq_jax in XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # such a value does not count (XDG Base Directory Specification)
        home = os.path.expanduser("~/.cache")
    return pathlib.Path(home, "diq_jax")


def _remove_old(folder: pathlib.Path) -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for entry in os.scandir(folder):
        if entry.stat().st_mtime < oldest:
            pathlib.Path(entry.path).unlink(missing_ok=True)
