"""Cuts rows that are sorted by group into tiles that lie in one group each; used by the reference and by the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
    """int32 [num_tiles] each, in order of rows; the first `count` are used.

    A tile covers the rows from `start` on, of which [first, last) belong to its group. Group G, one past the last, has the rows that belong
    to no group.
    """

    start: jax.Array
    first: jax.Array
    last: jax.Array
    group: jax.Array
    count: jax.Array


def num_tiles(rows: int, groups: int, tile: int, align: int = 1, share: int = 1) -> int:
    """The most tiles that `rows` rows in `groups` groups and a rest can need."""
    return (rows + (groups + 1) * (tile * share + align - 2)) // (tile * share) * share


def group_tiles(group_sizes, tile: int, rows: int, align: int = 1, share: int = 1) -> Tiles:
    """Tiles of `tile` rows, each beginning at a multiple of `align`. Sizes that add up to more than `rows` are cut.

    share: the tiles of a group come in so many; the last of them may be empty.
    """
    groups = group_sizes.shape[0]
    last = jnp.minimum(running_sum(group_sizes.astype(jnp.int32)), rows)
    last = jnp.concatenate([last, jnp.full_like(last[:1], rows)])
    first = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    start = first - lax.rem(first, align)
    tiles = jnp.where(last > first, lax.div(last - start + tile * share - 1, tile * share) * share, 0)
    tiles_before = running_sum(tiles) - tiles

    index = jnp.arange(num_tiles(rows, groups, tile, align, share), dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= (tiles_before + tiles)[None, :], axis=1, dtype=jnp.int32)
    used = group <= groups
    group = jnp.minimum(group, groups)
    begin = jnp.where(used, start[group] + (index - tiles_before[group]) * tile, 0)
    first = jnp.maximum(begin, first[group]) * used
    last = jnp.maximum(jnp.minimum(begin + tile, last[group]) * used, first)
    return Tiles(begin, first, last, group, jnp.sum(tiles))


def running_sum(x):
    """`jnp.cumsum` of a few hundred int32: one kernel, where XLA makes several of a scan."""
    index = jnp.arange(x.size, dtype=jnp.int32)
    return jnp.sum(jnp.where(index <= index[:, None], x, 0), axis=1, dtype=jnp.int32)
