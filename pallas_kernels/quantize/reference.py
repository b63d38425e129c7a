"""Plain JAX of the quantise ops: the definition of every code and every scale.

scale = max(amax, floor) / 448 for tiles (floor 1e-4 if not given), amax / 448 for weight blocks (1 for a block of zeros), code = e4m3(x /
scale), all in float32. With pow2, the scale is rounded up to a power of two. A NaN in a tile makes its scale NaN; an Inf makes the scale
Inf and its own code NaN: neither touches another tile.
Exact on CPUs; XLA's division on GPUs may be two units off.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized import BLOCK, E4M3, E4M3_MAX, Quantized, num_blocks, pad_to

AMAX_FLOOR = 1e-4  # of tiles, as in the released inference code; weights have none


def quantize_tiles(x, *, pow2=False, floor=AMAX_FLOOR) -> Quantized:
    *lead, rows, k = x.shape
    padded = pad_to(x.astype(jnp.float32), (*lead, rows, num_blocks(k) * BLOCK))
    groups = padded.reshape(*lead, rows, num_blocks(k), BLOCK)
    scales = tile_scales(_largest(groups), pow2=pow2, floor=floor)
    codes = _codes(exact_divide(groups, jnp.broadcast_to(scales[..., None], groups.shape)))
    return Quantized.tiles(codes.reshape(padded.shape)[..., :k], scales)


def quantize_blocks(w, *, pow2=False) -> Quantized:
    *lead, n, k = w.shape
    nb, kb = num_blocks(n), num_blocks(k)
    padded = pad_to(w.astype(jnp.float32), (*lead, nb * BLOCK, kb * BLOCK))
    blocks = padded.reshape(*lead, nb, BLOCK, kb, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=(-3, -1))
    scales = block_scales(amax, pow2=pow2)
    codes = _codes(exact_divide(blocks, jnp.broadcast_to(scales[..., :, None, :, None], blocks.shape)))
    return Quantized.blocks(codes.reshape(padded.shape)[..., :n, :k], scales)


def swiglu_quantize(gate_up, *, pow2=False) -> Quantized:
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return quantize_tiles(jax.nn.silu(gate) * up, pow2=pow2)


def swiglu_quantize_both(gate_up, *, pow2=False) -> tuple[Quantized, Quantized]:
    return swiglu_quantize(gate_up, pow2=pow2), quantize_tiles(gate_up)


def swiglu_backward(gate_up, d_hidden, row_weights=None, group_sizes=None):
    gate, up = jnp.split(gate_up.dequantize(), 2, axis=-1)
    weights = None if row_weights is None else row_weights.astype(jnp.float32)[:, None]
    hidden, d_gate, d_up, d_weights = swiglu_gradients(gate, up, d_hidden.astype(jnp.float32), weights)
    d_gate_up = jnp.concatenate([d_gate, d_up], axis=-1).astype(d_hidden.dtype)
    hidden = quantize_tiles(_grouped_transpose(hidden.astype(d_hidden.dtype), group_sizes))
    return d_gate_up, hidden, None if weights is None else jnp.sum(d_weights, axis=-1)


def swiglu_gradients(gate, up, d_hidden, weights=None):
    """hidden = silu(gate) * up * weights, the gradients of gate and up, and the terms whose sum over a row is the gradient of its
    weight."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    hidden, d_weights = silu * up, None
    if weights is not None:
        d_weights = d_hidden * hidden
        hidden, d_hidden = hidden * weights, d_hidden * weights
    return hidden, d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid)), d_hidden * silu, d_weights


def rmsnorm_quantize(x, weight, *, eps=1e-6, pow2=False) -> Quantized:
    x = x.astype(jnp.float32)
    normed = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return quantize_tiles(normed * weight.astype(jnp.float32), pow2=pow2)


def quantize_both(x, group_sizes=None, *, pow2=False, floor=AMAX_FLOOR) -> tuple[Quantized, Quantized]:
    return quantize_tiles(x, pow2=pow2, floor=floor), quantize_tiles(_grouped_transpose(x, group_sizes), pow2=pow2, floor=floor)


def requantize_transposed(q, group_sizes=None, *, pow2=False) -> Quantized:
    return quantize_tiles(_grouped_transpose(q.dequantize(), group_sizes), pow2=pow2)


def padded_tokens(tokens: int, num_groups: int) -> int:
    """T': room for `tokens` in `num_groups` groups, each padded to a multiple of 128, however they are spread."""
    return (tokens + (BLOCK - 1) * num_groups) // BLOCK * BLOCK


def padded_starts(group_sizes):
    """Where each group starts [G + 1] int32 in an axis of tokens in which groups are padded to multiples of 128; the last is the end."""
    ends = jnp.cumsum((group_sizes.astype(jnp.int32) + BLOCK - 1) // BLOCK * BLOCK)
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends])


def _grouped_transpose(x, group_sizes):
    """x [T, K] -> [K, T'], each group (one if None) followed by zeros up to a multiple of 128 tokens."""
    tokens, k = x.shape
    if group_sizes is None:
        return pad_to(x.T, (k, num_blocks(tokens) * BLOCK))
    sizes = group_sizes.astype(jnp.int32)
    starts = padded_starts(sizes)
    position = jnp.arange(padded_tokens(tokens, len(sizes)), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(starts, position, side="right", method="compare_all").astype(jnp.int32) - 1, len(sizes) - 1)
    offset = position - starts[group]
    source = (jnp.cumsum(sizes) - sizes)[group] + offset
    rows = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
    return jnp.where((offset < sizes[group])[:, None], rows, 0).T


def _codes(x):
    """float32 to e4m3, held apart: where the same program reads the codes, XLA for GPUs drops this conversion with the one back, and
    nothing would be quantised."""
    return lax.optimization_barrier(x.astype(E4M3))


def _largest(x):
    """The largest magnitude along the last axis, float32, by the order of bits, in which a NaN is above all: on a CPU XLA's maximum of
    floating-point numbers loses it."""
    return lax.bitcast_convert_type(jnp.max(lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=-1), jnp.float32)


def tile_scales(amax, *, pow2, floor, divide=None):
    """Scales of tiles from their largest magnitudes, float32. `divide` must round once, as the one below does."""
    scales = (divide or exact_divide)(jnp.maximum(amax, floor), jnp.full_like(amax, E4M3_MAX))
    return round_up_to_power_of_two(scales) if pow2 else scales


def block_scales(amax, *, pow2, divide=None):
    """Scales of weight blocks from their largest magnitudes, likewise."""
    scales = (divide or exact_divide)(amax, jnp.full_like(amax, E4M3_MAX))
    return jnp.where(scales == 0, 1.0, round_up_to_power_of_two(scales) if pow2 else scales)


def exact_divide(x, y):
    """x / y for float32 of one shape, rounded once.

    XLA turns a division by a constant, or by a value that is broadcast, into a multiplication by its rounded reciprocal, which is one unit
    off for a quarter of the values and changes the code where the quotient is half way between two. So every divisor is made to depend on
    its element of x: |x| has no sign bit, but XLA does not know that.
    """
    nothing = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) >> 31
    return x / lax.bitcast_convert_type(lax.bitcast_convert_type(y, jnp.uint32) + nothing, jnp.float32)


def round_up_to_power_of_two(x):
    """The smallest power of two >= x, for x >= 0 in float32, by exponent bits (exp2 and log2 are not exact). NaN and Inf stay."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    rounded = lax.bitcast_convert_type((bits + jnp.uint32(0x007FFFFF)) & jnp.uint32(0xFF800000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded)
