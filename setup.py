"""Says where the packages are: configs/ ships as diq_jax/configs. All else is in pyproject.toml."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["diq_jax", "diq_jax.*"]), "diq_jax.configs"],
    package_dir={"diq_jax.configs": "configs"},
)
