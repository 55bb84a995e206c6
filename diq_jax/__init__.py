"""DIQ (Difficulty-Influence Quadrant, arXiv 2508.01450) in JAX."""

__version__ = "0.1.0"
