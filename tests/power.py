"""A disk that loses what was not synced when the power goes.

    with power.Disk(folder) as disk:
        write(..)
    for k, files in enumerate(disk.cuts): ...     # {path: bytes} after a cut at each moment

Two things may be left of a moment. The poorest: a file has the bytes of its last fsync, a folder
the names of its own last fsync, nothing else. The oddest: all names, also those that were not
synced, but of the files only what was. (ext4, XFS and NFS leave something between.)
"""

import os
import pathlib
import stat
from typing import Any

Files = dict[str, bytes]


class Disk:
    """Watches os.fsync and os.replace in this process.

    Attributes:
        cuts: what each cut could leave below the folder, in order, equal neighbours once.
    """

    def __init__(self, folder: pathlib.Path):
        self.root = folder
        self.cuts: list[Files] = []
        self._bytes: dict[int, bytes] = {}  # of a file, by inode
        self._names: dict[int, dict[str, os.stat_result]] = {}  # of a folder
        self._held: list[int] = []  # open handles: an inode in use is given to no other file

    def __enter__(self) -> "Disk":
        self._fsync, self._replace = os.fsync, os.replace
        for place, _, names in os.walk(self.root):  # what is there is on the disk
            for path in (place, *(os.path.join(place, name) for name in names)):
                handle = os.open(path, os.O_RDONLY)
                self._synced(handle)
                os.close(handle)
        os.fsync, os.replace = self._watch(os.fsync, True), self._watch(os.replace, False)
        self._cut()
        return self

    def __exit__(self, *_: Any) -> None:
        os.fsync, os.replace = self._fsync, self._replace
        self._cut()
        for handle in self._held:
            os.close(handle)

    def lasting(self) -> Files:
        """What the poorest cut right now leaves."""
        return self._poorest()

    def _watch(self, call, syncs):
        def watched(*args, **kwargs):
            call(*args, **kwargs)
            if syncs:
                self._synced(args[0])
            self._cut()

        return watched

    def _synced(self, handle):
        status = os.fstat(handle)
        self._held.append(os.dup(handle))
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}"))
        if os.path.isdir(path):
            self._names[status.st_ino] = {p.name: p.lstat() for p in path.iterdir()}
        else:
            self._bytes[status.st_ino] = path.read_bytes()

    def _cut(self):
        for files in (self._poorest(), self._oddest()):
            if files not in self.cuts[-2:]:
                self.cuts.append(files)

    def _poorest(self) -> Files:
        found: Files = {}

        def visit(folder: int, path: str):
            for name, child in self._names.get(folder, {}).items():
                if stat.S_ISDIR(child.st_mode):
                    visit(child.st_ino, f"{path}{name}/")
                else:
                    found[path + name] = self._bytes.get(child.st_ino, b"")

        visit(self.root.stat().st_ino, "")
        return found

    def _oddest(self) -> Files:
        files = (p for p in self.root.rglob("*") if p.is_file())
        return {str(p.relative_to(self.root)): self._bytes.get(p.stat().st_ino, b"") for p in files}


def restore(files: Files, folder: pathlib.Path) -> pathlib.Path:
    """A folder as a cut left it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def live(folder: pathlib.Path) -> Files:
    """The files as a process sees them."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
