"""Runs `diq score`, under its name of before version 0.2."""

from diq_jax.commands import cli

if __name__ == "__main__":
    cli.main("score")
