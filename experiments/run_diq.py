"""Runs the main job, as `diq run` does: diq_jax/commands/run.py."""

from diq_jax.commands import cli

if __name__ == "__main__":
    cli.main("run")
