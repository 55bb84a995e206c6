"""The ranges of the config's numbers, both ends included: beyond them an int32 or a float32 would
overflow, or one array would ask for more memory than machines have.
"""

SEED = (0, 2**31 - 1)  # int32, and jax keeps 32 bits of a key; seeds are also counted up from
COUNT = (0, 2**31 - 1)  # of rows or steps; 0 = no limit
TOKENS = (1, 2**24)  # of a batch, on all devices
EPOCHS = (1, 10_000)
BATCH = (1, 2**16)  # rows of one step
RANK = (1, 2**14)
DEVICES = (1, 2**20)
BYTES = (1, 2**40)
POSITIVE = (1e-12, 3e38)  # a learning rate, a scale: neither 0 nor infinite as float32


def or_none(limits: tuple[int, int]) -> tuple[int, int]:
    """The same range with 0, which turns the field off or leaves the choice to us."""
    return 0, limits[1]
