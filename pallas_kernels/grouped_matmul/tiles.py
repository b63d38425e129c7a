"""Cuts rows that are sorted by group into tiles that lie in one group each; used by the reference and by the kernel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """int32 [num_tiles] each. Tiles of group G (one past the last) hold rows that belong to no group; unused tiles are empty."""

    start: jax.Array  # first row
    size: jax.Array  # rows, at most the tile size; 0 in unused tiles
    group: jax.Array


def num_tiles(rows: int, groups: int, tile: int) -> int:
    """The most tiles that `rows` rows in `groups` groups and one rest can need."""
    return (rows + (groups + 1) * (tile - 1)) // tile


def group_tiles(group_sizes, tile: int, rows: int) -> Tiles:
    """Tiles of `tile` rows for `rows` rows; group g begins after the rows of the groups before it.

    Rows past the last group are tiles of group G, so that the caller can fill them with zeros. Sizes that add up to more are cut.
    """
    groups = group_sizes.shape[0]
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    end = jnp.concatenate([end, jnp.full_like(end[:1], rows)])
    begin = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    tiles_end = jnp.cumsum((end - begin + tile - 1) // tile)
    index = jnp.arange(num_tiles(rows, groups, tile), dtype=jnp.int32)
    group = jnp.sum(index[:, None] >= tiles_end[None, :], axis=1, dtype=jnp.int32)
    safe = jnp.minimum(group, groups)
    first = tiles_end[safe] - (end[safe] - begin[safe] + tile - 1) // tile
    start = begin[safe] + (index - first) * tile
    size = jnp.where(group <= groups, jnp.minimum(end[safe] - start, tile), 0)
    return Tiles(jnp.where(size > 0, start, 0), size, safe)
