"""Who works on what: cuts the cached tokens of all sequences into equal shares, one for each group of thread blocks, on the device.

The sequences are laid end to end, each as `SETUP` (what starting a sequence costs) plus one unit for every block of 128 tokens, and
the line is cut into `num_parts` equal shares. A share may begin and end inside a sequence; such a sequence is split, its pieces are
written as float32 partials and merged afterwards. Where slightly larger shares cut between sequences only, they are taken. All of
it is a function of `lengths`, so new lengths compile nothing.
(FlashMLA's tile scheduler does the same greedily, csrc/smxx/decode/get_decoding_sched_meta.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens per step of the kernel, two pages
SETUP = 2  # cost of starting a sequence, in blocks
MIN_SHARE = 4  # blocks, setup included: below this, merging costs more than it saves
MERGING = 4  # blocks a share may grow where then no sequence is split and nothing has to be merged


class Schedule(NamedTuple):
    """bounds [num_parts + 1, 2]: part p works from (sequence, block) bounds[p] up to bounds[p + 1]. Pieces of split sequences
    go to `slots`: 2p for the first piece of part p, 2p + 1 for its last if that is another.
    pieces [B, 2]: how many pieces a sequence has, and the slot of its first; piece i > 0 is in slot 2 (first // 2 + i)."""

    bounds: jax.Array
    pieces: jax.Array


def make_schedule(lengths, *, num_parts: int) -> Schedule:
    """lengths [B] int32 -> Schedule, int32 arrays."""
    cost = num_blocks(lengths) + SETUP
    end = jnp.cumsum(cost)
    start = end - cost

    def cut(share):
        cuts = jnp.arange(num_parts + 1, dtype=jnp.int32) * share
        sequence = jnp.sum(end <= cuts[:, None], axis=1, dtype=jnp.int32)  # B behind the last one
        inside = cuts - start.at[sequence].get(mode="clip") - SETUP
        return sequence, jnp.where(sequence < lengths.shape[0], jnp.maximum(inside, 0), 0)

    share = jnp.maximum(-(-end[-1] // num_parts), MIN_SHARE)
    sequences, blocks = jax.vmap(cut)(share + jnp.arange(MERGING + 1, dtype=jnp.int32))
    chosen = jnp.argmax(jnp.all(blocks == 0, axis=1))  # the first that splits nothing, or the smallest
    sequence, block = sequences[chosen], blocks[chosen]

    b = jnp.arange(lengths.shape[0], dtype=jnp.int32)[:, None]
    begun = (sequence < b) | ((sequence == b) & (block == 0))  # [B, num_parts + 1]: cuts at or before the first block of b
    first_part = jnp.sum(begun, axis=1, dtype=jnp.int32) - 1
    first_slot = 2 * first_part + (sequence[first_part] != b[:, 0])
    count = 1 + jnp.sum((sequence == b) & (block > 0), axis=1, dtype=jnp.int32)
    return Schedule(jnp.stack([sequence, block], axis=1).astype(jnp.int32), jnp.stack([count, first_slot], axis=1).astype(jnp.int32))


def num_blocks(lengths):
    """Blocks of 128 tokens a sequence occupies; one, all of it masked, where it has no tokens."""
    return jnp.maximum((lengths + (BLOCK - 1)) // BLOCK, 1)
