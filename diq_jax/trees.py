"""Nested dicts of arrays: slash paths, selection by regex, and arithmetic."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diq_jax import errors

Array = np.ndarray | jax.Array  # on the host or on devices
Tree = dict[str, Any]  # nested dicts of arrays, None where a leaf is elsewhere


def path_name(path: Iterable[Any]) -> str:
    """Writes a jax key path as `layers/attn/q_proj/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns {slash path: leaf} in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def map_named(
    fn: Callable[[str, Any], Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Maps fn(slash path, leaf) over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_name(path), leaf), tree, is_leaf=is_leaf
    )


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a tree in two of the same nesting, (chosen leaves, the rest), None elsewhere."""
    return (
        map_named(lambda name, leaf: leaf if chosen(name) else None, tree),
        map_named(lambda name, leaf: None if chosen(name) else leaf, tree),
    )


def partition_like(tree: Tree, other: Tree) -> tuple[Tree, Tree]:
    """Splits a tree in two, (leaves where `other` has one, the rest), None elsewhere."""
    return partition(tree, named_leaves(other).__contains__)


def not_finite(tree: Any) -> list[str]:
    """Returns the paths of the leaves that hold NaN or an infinity."""
    finite = jax.device_get(_finite(tree))
    return [name for name, good in named_leaves(finite).items() if not good]


@jax.jit
def _finite(tree):
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def combine(left: Tree, right: Tree) -> Tree:
    """Undoes `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, left, right, is_leaf=lambda x: x is None
    )


def insert(tree: dict, extra: dict[str, Any]) -> dict:
    """Returns a copy of a nested dict with values added at slash paths, beside what is there."""
    tree = dict(tree)
    for name, value in extra.items():
        first, _, rest = name.partition("/")
        tree[first] = insert(tree.get(first) or {}, {rest: value}) if rest else value
    return tree


def matching(names: Iterable[str], pattern: str, field: str) -> set[str]:
    """Returns the names in which the regex `pattern` is found.

    Raises:
        UserError: the pattern is no regex, or nothing matches.
    """
    regex = errors.check_regex(field, pattern)
    names = list(names)
    found = {name for name in names if regex.search(name)}
    if not found:
        raise errors.UserError(
            f"{field}: {pattern!r} matches none of the {len(names)} parameters, such as "
            f"{', '.join(names[:3])}.{errors.nearest(pattern, names)}"
        )
    return found


def vdot(left: Any, right: Any) -> jax.Array:
    """Computes the inner product over all leaves, accumulated in float32."""
    products = jax.tree.map(
        lambda a, b: jnp.vdot(a.astype(jnp.float32), b.astype(jnp.float32)), left, right
    )
    return jnp.asarray(sum(jax.tree.leaves(products)))


def size(tree: Any) -> int:
    """Counts the numbers that a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
