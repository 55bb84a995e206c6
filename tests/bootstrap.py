"""The plain bootstrap, with which the vectorized ones must agree."""

import numpy as np


def bootstrap_interval(values, statistic, samples: int, seed: int) -> tuple[float, float]:
    """Returns the 95 % percentile interval of `statistic` over rows drawn with replacement.

    Args:
        values: (n, ...), resampled along its first axis.
        statistic: maps (samples, n, ...) to (samples,).
    """
    values = np.asarray(values)
    rng = np.random.Generator(np.random.PCG64(seed))
    draws = rng.integers(0, len(values), (samples, len(values)))
    low, high = np.percentile(statistic(values[draws]), [2.5, 97.5])
    return float(low), float(high)
