"""Compiles a run's programs for TPU slices, without one."""
