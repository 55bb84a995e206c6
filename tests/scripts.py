"""The jobs and the scripts of experiments/ as a user calls them, on a tiny model and data."""

import os
import pathlib
import subprocess

import forks

ROOT = pathlib.Path(__file__).parents[1]


def make(base: pathlib.Path) -> pathlib.Path:
    """A decoder, a pool, targets and tests in the folder."""
    import folders  # takes seconds, which crashing.py need not spend

    folders.decoder(base / "decoder")
    folders.write(base / "pool.jsonl", folders.pool_rows(24))
    folders.write(base / "targets.jsonl", folders.choice_rows(6, "target"))
    folders.write(base / "tests.jsonl", folders.choice_rows(4, "test"))
    return base


def command(name: str, *flags) -> list[str]:
    """A script of experiments/, or a job of `diq NAME`, as python takes it."""
    file = ROOT / f"experiments/{name}.py"
    return [*([str(file)] if file.exists() else ["-m", "diq_jax", name]), *map(str, flags)]


def script(name, *flags, env=None, cwd=None) -> subprocess.CompletedProcess:
    """Runs it to its end."""
    environment = (os.environ if env is None else env) | {"JAX_PLATFORMS": "cpu"}
    return forks.run(command(name, *flags), environment, cwd)


def start(name, *flags, env=None, cwd=None) -> forks.Running:
    """Starts it."""
    environment = (os.environ if env is None else env) | {"JAX_PLATFORMS": "cpu"}
    return forks.Running(command(name, *flags), environment, cwd)


def on_data(name, made, workdir, *flags):
    """A script that takes a config, on what `make` made."""
    return script(name, *data_flags(made, workdir), *flags)


def data_flags(made, workdir):
    return (
        f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}",
        f"--config.model.path={made / 'decoder'}", f"--config.data.pool={made / 'pool.jsonl'}",
        f"--config.data.targets={made / 'targets.jsonl'}",
        f"--config.data.tests={made / 'tests.jsonl'}",
    )  # fmt: skip
