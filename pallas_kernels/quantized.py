"""`Quantized`: an array of float8_e4m3fn codes with one float32 scale for every 128 values (tiles) or 128x128 values (blocks).

The value of an element is its code times the scale of its tile or block (DeepSeek-V3 report, section 3.3.2).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # values that share a scale: along the last axis in tiles, along the last two axes in blocks
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A pytree of two arrays. Make one with `Quantized.tiles`, `Quantized.blocks` or a quantise function, not with the constructor.

    Attributes:
      values: float8_e4m3fn [..., M, K].
      stored_scales: float32, as the kernels want them: tiles have the token axis last, [..., ceil(K/128), M], so that the scales of
        consecutive rows are contiguous; blocks are [..., ceil(M/128), ceil(K/128)]. Read them through `scales()`.
      kind: "tiles" or "blocks"; static.
    """

    values: jax.Array
    stored_scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def tiles(cls, values, scales) -> "Quantized":
        """values e4m3 [..., M, K] and scales float32 [..., M, ceil(K/128)]: one scale for every 128 values of a row."""
        *_, rows, k = _checked_values(values)
        _check_scales(scales, (*values.shape[:-2], rows, num_blocks(k)), values)
        return cls(values, jnp.swapaxes(scales, -1, -2), "tiles")

    @classmethod
    def blocks(cls, values, scales) -> "Quantized":
        """values e4m3 [..., N, K] and scales float32 [..., ceil(N/128), ceil(K/128)]: one scale for every 128x128 block."""
        *_, n, k = _checked_values(values)
        _check_scales(scales, (*values.shape[:-2], num_blocks(n), num_blocks(k)), values)
        return cls(values, jnp.asarray(scales), "blocks")

    def scales(self) -> jax.Array:
        """The scales in the logical layout: float32 [..., M, ceil(K/128)] for tiles, [..., ceil(M/128), ceil(K/128)] for blocks."""
        return jnp.swapaxes(self.stored_scales, -1, -2) if self.kind == "tiles" else self.stored_scales

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """codes * scales [..., M, K]; the product is taken in float32."""
        rows, k = self.shape[-2:]
        scales = jnp.repeat(self.scales(), BLOCK, axis=-1)[..., :k]
        if self.kind == "blocks":
            scales = jnp.repeat(scales, BLOCK, axis=-2)[..., :rows, :]
        return (self.values.astype(jnp.float32) * scales).astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


def num_blocks(size: int) -> int:
    """How many blocks of 128 cover `size` values."""
    return -(-size // BLOCK)


def pad_to(x, shape, value=0):
    """`x` with zeros (or `value`) appended at the end of its axes up to `shape`."""
    padding = [(0, want - have, 0) for have, want in zip(x.shape, shape, strict=True)]
    return lax.pad(x, jnp.asarray(value, x.dtype), padding) if any(p[1] for p in padding) else x


def _checked_values(values):
    if values.dtype != E4M3 or values.ndim < 2:
        raise ValueError(f"values: expected a float8_e4m3fn array with at least two axes, got {values.dtype} {list(values.shape)}")
    return values.shape


def _check_scales(scales, expected, values):
    if scales.dtype != jnp.float32 or tuple(scales.shape) != tuple(expected):
        raise ValueError(
            f"scales: expected float32 {list(expected)} for values {list(values.shape)}, got {scales.dtype} {list(scales.shape)}"
        )


def pad_operand(q: Quantized, *, rows: int) -> Quantized:
    """`q` with zeros appended so that TMA can address it: whole blocks along K, and `rows` rows or a multiple of that. Free if nothing is
    missing; what has up to 8 rows needs only whole 16-byte lines of scales."""
    *lead, n, k = q.shape
    padded_rows = n if n <= 8 and rows == 8 else -(-n // rows) * rows
    values = pad_to(q.values, (*lead, padded_rows, num_blocks(k) * BLOCK))
    scales_shape = q.stored_scales.shape
    if q.kind == "tiles":
        scales_shape = (*scales_shape[:-1], -(-padded_rows // 4) * 4)
    else:
        scales_shape = (*lead, num_blocks(padded_rows), -(-num_blocks(k) // 4) * 4)
    return Quantized(values, pad_to(q.stored_scales, scales_shape), q.kind)
