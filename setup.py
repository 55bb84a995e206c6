"""Says where the packages stand; all else is in pyproject.toml. configs/ ships as diq_jax/configs."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["diq_jax", "diq_jax.*"]), "diq_jax.configs"],
    package_dir={"diq_jax.configs": "configs"},
)
