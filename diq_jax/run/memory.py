"""The most memory that a piece of work took, of the host and of the devices."""

import contextlib
import pathlib
import re
import resource
import sys

import jax

STATUS, CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Starts the host's peak anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak_mib() -> dict[str, int]:
    """Returns peaks in MiB: `host` since `forget_peak`, the fullest `device` where they count."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]
    return {"host": _host()} | ({"device": round(max(peaks) / 2**20)} if peaks else {})


def _host() -> int:
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()):
            return round(int(found[1]) / 2**10)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (2**20 if sys.platform == "darwin" else 2**10))
