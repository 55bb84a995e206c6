"""Random projections of per-example gradients, without the matrix: y = P g, E<P x, P y> = <x, y>.

P is cut by parameter and, inside one, into blocks of coordinates; a block depends on (seed,
parameter path, block index) alone, so that neither batch nor device nor memory limit changes it. A
block is made when it is needed, used for the whole batch, and thrown away.

Variance of <P x, P y> around <x, y>, with S = |x|^2 |y|^2 and d the dimension:

    rademacher  signs / sqrt(d):    (S + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / d
    gaussian    normals / sqrt(d):  (S + <x, y>^2) / d
    sparse      a coordinate goes to BUCKETS places, each with a sign and 1 / sqrt(BUCKETS): as
                rademacher, less the pairs of one block, which never meet

(TRAK, arXiv 2303.14186, for the dense kinds; Kane and Nelson, arXiv 1012.1577, for the sparse one.)
"""

import math
import zlib

import jax
import jax.numpy as jnp

from diq_jax import errors, influence_config, trees

ATOM = 32  # coordinates of a dense block: a uint32 holds their signs for one output
BUCKETS = 2  # of the sparse kind: more spreads single large coordinates, and costs as much again


def check(settings: influence_config.Projection, size: int) -> None:
    """Raises UserError where `size` parameters cannot be projected as `settings` say."""
    if settings.dim > size:
        raise errors.UserError(
            f"influence.projection.dim={settings.dim} is larger than the {size:,} parameters that "
            "influence.parameters names; take a smaller dimension or engine=exact."
        )


def project(gradients: trees.Tree, settings: influence_config.Projection) -> jax.Array:
    """Projects a batch of gradients.

    Args:
        gradients: a tree of leaves (B, ...); None leaves are skipped. Cast to float32 here.

    Returns:
        (B, settings.dim) float32.
    """
    total = 0.0
    for name, leaf in trees.named_leaves(gradients).items():
        key = jax.random.fold_in(jax.random.key(settings.seed), zlib.crc32(name.encode()))
        flat = leaf.reshape(leaf.shape[0], -1)
        total = total + sketch(settings.kind, key, flat, settings.dim, settings.block_bytes)
    return total


def sketch(kind: str, key: jax.Array, flat: jax.Array, dim: int, block_bytes: int) -> jax.Array:
    """Projects one parameter's gradients (B, size) with the matrix that `key` stands for."""
    if kind == "sparse":
        return _sparse(key, flat, dim)
    multiply = {"rademacher": _times_signs, "gaussian": _times_normals}[kind]
    return _dense(multiply, key, flat, dim, block_bytes)


def _dense(multiply, key, flat, dim, block_bytes):
    def add(total, block, part):
        return total + multiply(key, block, part, dim)

    # Half of the limit for the matrix: the compiler may hold it twice, made and laid out.
    atoms = max(1, block_bytes // (2 * 4 * dim * ATOM))
    return _over_blocks(flat, dim, ATOM, atoms, add) / math.sqrt(dim)


def _times_signs(key, first, part, dim):
    """Multiplies part (B, atoms * ATOM) by rows first * ATOM ... of the sign matrix: (B, dim).

    Bit i of a word is the sign of coordinate i of its atom. A product for each bit takes the words
    as they are; the signs of all, 32 times their size, are never laid out.
    """
    parts = part.reshape(part.shape[0], -1, ATOM)
    keys = _atom_keys(key, first, parts.shape[1])
    words = jax.vmap(lambda k: jax.random.bits(k, (dim,), jnp.uint32))(keys)

    def add(total, bit):
        place, column = bit
        return total + column @ _unpack(words, place), None

    bits = jnp.arange(ATOM, dtype=jnp.uint32), jnp.moveaxis(parts, 2, 0)
    return jax.lax.scan(add, jnp.zeros((part.shape[0], dim), jnp.float32), bits)[0]


def _atom_keys(key, first, atoms):
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(atoms))


def _unpack(words, places):
    """Turns bit `place` of a word into +-1.0, by setting the float's sign bit."""
    one = jnp.uint32(0x3F800000)
    sign = (words << (31 - places)) & jnp.uint32(0x80000000)
    return jax.lax.bitcast_convert_type(sign | one, jnp.float32)


def _times_normals(key, first, part, dim):
    """As `_times_signs`, with normal numbers."""
    keys = _atom_keys(key, first, part.shape[1] // ATOM)
    return part @ jax.vmap(lambda k: jax.random.normal(k, (ATOM, dim)))(keys).reshape(-1, dim)


def _sparse(key, flat, dim):
    """Makes BUCKETS sketches of dim / BUCKETS places side by side.

    A block of as many coordinates as there are places gets signs, is rolled by a random shift and
    added up: no scatter, and no index is stored.
    """
    places = dim // BUCKETS

    def add(total, block, part):
        words = -(-places // 32)

        def one(sketch, total):
            block_key = jax.random.fold_in(jax.random.fold_in(key, sketch), block)
            bits = jax.random.bits(block_key, (words + 1,), jnp.uint32)
            signs = _unpack(bits[:words, None], jnp.arange(32, dtype=jnp.uint32)[None, :])
            signed = part * signs.reshape(1, -1)[:, :places]
            return total + jnp.roll(signed, (bits[words] % places).astype(jnp.int32), axis=1)

        return jnp.stack([one(i, total[i]) for i in range(BUCKETS)])

    total = _over_blocks(flat, (BUCKETS, places), places, 1, add)
    return jnp.moveaxis(total, 0, 1).reshape(flat.shape[0], dim) / math.sqrt(BUCKETS)


def _over_blocks(flat, out, unit, units, add):
    """Folds add(total, index of the first unit, part (B, units * unit) float32) over a leaf.

    The whole parts run in a loop; the rest, padded with zeros to whole units, comes last, so that
    the leaf is never copied.
    """
    B, size = flat.shape
    width = unit * units
    whole = size // width
    shape = (B, out) if isinstance(out, int) else (out[0], B, out[1])

    def step(i, total):
        part = jax.lax.dynamic_slice_in_dim(flat, i * width, width, axis=1)
        return add(total, i * units, part.astype(jnp.float32))

    total = jnp.zeros(shape, jnp.float32)
    if whole:
        total = jax.lax.fori_loop(0, whole, step, total)
    rest = size - whole * width
    if rest:
        part = flat[:, whole * width :].astype(jnp.float32)
        part = jnp.pad(part, ((0, 0), (0, -rest % unit)))
        total = add(total, whole * units, part)
    return total
