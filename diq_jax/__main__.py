"""Runs `python -m diq_jax NAME`, the same as `diq NAME`."""

from diq_jax.commands import cli

if __name__ == "__main__":
    cli.main()
