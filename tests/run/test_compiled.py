"""What a run has compiled the next one takes up, and no result changes by it."""

import os
import time

import forks
import scripts

KEPT = "cache/diq_jax/compiled"
COUNTING = """
import atexit, collections, jax.monitoring
from diq_jax.commands import cli
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.split("/")[-1]]))
atexit.register(lambda: print("hits", seen["cache_hits"], "misses", seen["cache_misses"]))
cli.main()
"""


def scored(base, name, **changes):
    """(standard output, the bytes of the scores) of a run with its cache in base/cache."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "XDG_CACHE_HOME": str(base / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    flags = *scripts.data_flags(base, base / name), "--stages=prepare,influence"
    ended = forks.run(["-c", COUNTING, "run", *flags], env | changes)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout, (base / name / "influence/influence.parquet").read_bytes()


def test_programs_are_kept_for_the_next_run_and_change_nothing(tmp_path):
    base, kept = scripts.make(tmp_path), tmp_path / KEPT
    said, anew = scored(base, "off", JAX_ENABLE_COMPILATION_CACHE="false")
    assert "hits 0 misses 0" in said and "kept" not in said and not kept.exists()

    said, cold = scored(base, "cold")
    assert said.count(f"compiled programs are kept in {kept} (") == 1 and "hits 0 misses" in said
    programs = {file.name for file in kept.iterdir()}
    assert len(programs) > 5 and kept.stat().st_mode & 0o777 == 0o700

    (kept / "of-another-year").touch()
    os.utime(kept / "of-another-year", (0, time.time() - 31 * 24 * 3600))
    said, warm = scored(base, "warm")
    assert f"hits {len(programs)} misses 0" in said
    assert {file.name for file in kept.iterdir()} == programs

    for file in kept.iterdir():  # a run was killed, or the disk full, while it wrote
        os.truncate(file, file.stat().st_size // 2)
    said, damaged = scored(base, "damaged")
    assert anew == cold == warm == damaged


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    base = scripts.make(tmp_path)
    (tmp_path / "cache").write_text("a file")
    assert "compiled programs" not in scored(base, "run")[0]
