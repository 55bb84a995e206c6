"""A stand-in for an object store, in a folder: bucket://NAME is the folder NAME of DIQ_BUCKETS.

An object appears as a whole or not at all, and there is neither rename nor append. As a program
(`python tests/buckets.py run FLAGS`) it is `diq` with that store, where a run that shows no sign of
life is taken for dead at once.
"""

import os
import shutil
import uuid

import fsspec
from fsspec.implementations import local


class ObjectStore(local.LocalFileSystem):
    protocol = ("bucket",)

    @classmethod
    def _strip_protocol(cls, path, **kwargs):
        root = os.environ["DIQ_BUCKETS"]
        name = str(path).removeprefix("bucket://")
        return name if name.startswith(root) else f"{root}/{name}".rstrip("/")

    def put_file(self, lpath, rpath, *args, **kwargs):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def get_file(self, rpath, lpath, *args, **kwargs):
        shutil.copyfile(self._strip_protocol(rpath), lpath)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        path = self._strip_protocol(path)
        hidden = os.path.join(os.environ["DIQ_BUCKETS"], f".{uuid.uuid4().hex}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(hidden, "wb") as file:
            file.write(value)
        os.rename(hidden, path)

    def mv(self, *args, **kwargs):
        raise NotImplementedError

    def open(self, path, mode="rb", **kwargs):
        assert mode == "rb", mode
        return super().open(path, mode, **kwargs)


def register() -> None:
    fsspec.register_implementation("bucket", ObjectStore, clobber=True)


if __name__ == "__main__":
    from diq_jax.commands import cli
    from diq_jax.run import mirror

    register()
    mirror.DEAD, mirror.SETTLED = float(os.environ.get("DIQ_DEAD", "0")), 0.05
    mirror.BEAT = 0.2
    cli.main()
