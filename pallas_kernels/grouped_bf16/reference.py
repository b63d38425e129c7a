"""Plain JAX of the bfloat16 grouped products, for float32 operands as well.

`lax.ragged_dot` computes every row against every group on a CPU (12 times the time of the useful work at 8 groups, measured). Here rows
are laid out in blocks that belong to one group each, at most one partial block a group, and a batched product runs over blocks.
"""

import jax
import jax.numpy as jnp

_BLOCK_ROWS = 128


def grouped_bf16_matmul(x, w, group_sizes, *, transposed=True, precision=None, num_sms=None):
    slot, group_of_block, num_blocks, block_rows = _blocks(group_sizes, x.shape[0])
    x_blocks = _to_blocks(x, slot, num_blocks, block_rows)
    y_blocks = jnp.einsum("bmk,bnk->bmn" if transposed else "bmk,bkn->bmn", x_blocks, w[group_of_block], precision=precision)
    return y_blocks.reshape(num_blocks * block_rows, -1).at[slot].get(mode="fill", fill_value=0)


def grouped_bf16_wgrad(dy, x, group_sizes, *, precision=None, num_sms=None):
    slot, group_of_block, num_blocks, block_rows = _blocks(group_sizes, x.shape[0])
    x_blocks = _to_blocks(x, slot, num_blocks, block_rows)
    dy_blocks = _to_blocks(dy, slot, num_blocks, block_rows)
    dw_blocks = jnp.einsum("bmn,bmk->bnk", dy_blocks, x_blocks, precision=precision, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(dw_blocks, group_of_block, group_sizes.shape[0], indices_are_sorted=True)


def _blocks(group_sizes, num_rows):
    """Where each row goes in the blocked layout, and which group each block belongs to."""
    num_groups = group_sizes.shape[0]
    block_rows = min(_BLOCK_ROWS, max(8, num_rows // num_groups))
    num_blocks = -(-num_rows // block_rows) + num_groups
    blocks = -(-group_sizes // block_rows)
    group = jnp.repeat(jnp.arange(num_groups), group_sizes, total_repeat_length=num_rows)
    first_row = jnp.cumsum(group_sizes) - group_sizes
    first_block = jnp.cumsum(blocks) - blocks
    slot = jnp.arange(num_rows) - first_row[group] + first_block[group] * block_rows
    # Rows past the last group have no slot: they read and write nothing, and come out as zeros.
    slot = jnp.where(jnp.arange(num_rows) < jnp.sum(group_sizes), slot, num_blocks * block_rows)
    group_of_block = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(num_blocks), side="right")
    return slot, jnp.minimum(group_of_block, num_groups - 1), num_blocks, block_rows


def _to_blocks(x, slot, num_blocks, block_rows):
    padded = jnp.zeros((num_blocks * block_rows, x.shape[1]), x.dtype).at[slot].set(x, mode="drop")
    return padded.reshape(num_blocks, block_rows, -1)
