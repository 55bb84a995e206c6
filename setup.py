"""Packaging. Versions that were tested together stand in constraints.txt."""

import pathlib

import setuptools

setuptools.setup(
    name="diq_jax",
    version="0.1.0",
    description="Find the 1 % of a medical-reasoning pool worth fine-tuning on: DIQ in JAX.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["diq_jax", "diq_jax.*"]),
    package_data={
        "diq_jax.data": ["sample/*.jsonl", "sample/README.md"],
        "diq_jax.report": ["*.html"],
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "datasets>=3.0",
        "datasketch>=2.0",
        "flax>=0.12",
        "gguf>=0.17",
        "huggingface_hub>=0.34",
        "jax>=0.10,<0.12",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "plotly>=6.0",
        "pyarrow>=18",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "threadpoolctl>=3.5",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6",
            "openai>=3.0",
            "peft>=0.17",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "tensorboardX>=2.6",
            "torch==2.13.0",
        ],
        "judge": ["openai>=3.0"],
        # Brings python-dateutil below 3; its tests are skipped without it.
        "harness": ["lm-eval>=0.4.10"],
        "tensorboard": ["tensorboardX>=2.6"],
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
    },
)
