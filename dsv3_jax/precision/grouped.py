"""Unquantised grouped products: JAX's Pallas kernels for bfloat16 on Hopper, plain JAX elsewhere, chosen here and nowhere else.

`lax.ragged_dot` computes every row against every group on CPU (12 times the time of the useful work at 8 groups, measured) and
reaches a quarter of the card on Hopper. In plain JAX rows are laid out in blocks that belong to one group each, at most one partial block
a group, and a batched product runs over blocks.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.precision import grouped_hopper
from dsv3_jax.precision.recipe import Recipe
from pallas_kernels.platform import dispatch

_BLOCK_ROWS = 128


def grouped_matmul(
    x_RK: jax.Array, w: jax.Array, group_sizes_E: jax.Array, recipe: Recipe, *, transposed: bool = True, filled: bool = False
) -> jax.Array:
    """Rows sorted by group times their group's weight: x wᵀ with w [E, N, K], or x w with w [E, K, N] if not transposed -> [R, N].

    Rows past the last group give zeros. filled: there are none.
    """
    return _run("grouped_matmul", x_RK, w, group_sizes_E, recipe, transposed=transposed, filled=filled)


def grouped_matmul_weight_gradient(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array, recipe: Recipe) -> jax.Array:
    """Per group dyᵀ x, float32 [E, N, K]. On Hopper rounded to bfloat16 once, at its end. Rows past the last group must be finite."""
    return _run("grouped_matmul_weight_gradient", x_RK, dy_RN, group_sizes_E, recipe)


def _run(op, a, b, group_sizes_E, recipe, **options):
    if recipe.compute_dtype == jnp.float32:
        return _PLAIN[op](a, b, group_sizes_E, precision=recipe.product_precision, **options)
    options |= {"hopper": getattr(grouped_hopper, op), "reference": _PLAIN[op], "num_sms": recipe.num_sms}
    return dispatch(op, None, a, b, group_sizes_E, **options)


def _blocks(group_sizes_E, num_rows):
    """Where each row goes in the blocked layout, and which group each block belongs to."""
    num_groups = group_sizes_E.shape[0]
    block_rows = min(_BLOCK_ROWS, max(8, num_rows // num_groups))
    num_blocks = -(-num_rows // block_rows) + num_groups
    blocks_E = -(-group_sizes_E // block_rows)
    group_R = jnp.repeat(jnp.arange(num_groups), group_sizes_E, total_repeat_length=num_rows)
    first_row_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    slot_R = jnp.arange(num_rows) - first_row_E[group_R] + first_block_E[group_R] * block_rows
    # Rows past the last group have no slot: they read and write nothing, and come out as zeros.
    slot_R = jnp.where(jnp.arange(num_rows) < jnp.sum(group_sizes_E), slot_R, num_blocks * block_rows)
    group_of_block = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(num_blocks), side="right")
    return slot_R, jnp.minimum(group_of_block, num_groups - 1), num_blocks, block_rows


def _to_blocks(x_RK, slot_R, num_blocks, block_rows):
    padded = jnp.zeros((num_blocks * block_rows, x_RK.shape[1]), x_RK.dtype).at[slot_R].set(x_RK, mode="drop")
    return padded.reshape(num_blocks, block_rows, -1)


def _matmul(x_RK, w, group_sizes_E, *, transposed, filled=False, precision=None, num_sms=None):
    slot_R, group_of_block, num_blocks, block_rows = _blocks(group_sizes_E, x_RK.shape[0])
    x_blocks = _to_blocks(x_RK, slot_R, num_blocks, block_rows)
    y_blocks = jnp.einsum("bmk,bnk->bmn" if transposed else "bmk,bkn->bmn", x_blocks, w[group_of_block], precision=precision)
    unwritten = jnp.nan if filled else 0  # what the kernel leaves may be anything: whoever looks at it is to notice
    return y_blocks.reshape(num_blocks * block_rows, -1).at[slot_R].get(mode="fill", fill_value=unwritten)


def _weight_gradient(x_RK, dy_RN, group_sizes_E, *, precision=None, num_sms=None):
    slot_R, group_of_block, num_blocks, block_rows = _blocks(group_sizes_E, x_RK.shape[0])
    x_blocks = _to_blocks(x_RK, slot_R, num_blocks, block_rows)
    dy_blocks = _to_blocks(dy_RN, slot_R, num_blocks, block_rows)
    dw_blocks = jnp.einsum("bmn,bmk->bnk", dy_blocks, x_blocks, precision=precision, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(dw_blocks, group_of_block, group_sizes_E.shape[0], indices_are_sorted=True)


_PLAIN = {"grouped_matmul": _matmul, "grouped_matmul_weight_gradient": _weight_gradient}
