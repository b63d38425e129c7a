"""The paged latent cache of MLA: its two layouts, and `mla_append`, which writes new tokens into it.

A token is one row of 576 values: the 512 post-norm latents, then the 64 post-RoPE key values that all heads share. Rows live
in pages of 64 tokens, in any order; a page table names the pages of each sequence.

* float pool `[P, 64, W]`, bfloat16 (float32 for exact tests), any width W;
* FP8 pool `[P, 64, 656]` uint8, byte for byte FlashMLA's (`V32_FP8Sparse` in its `tests/quant.py`): 512 e4m3 codes, 4 float32
  scales, one per 128 codes, and 64 bfloat16 RoPE values. Scales are powers of two, so that codes * scale is exact in bfloat16.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks

PAGE_SIZE = 64
LATENT, ROPE = 512, 64  # of DeepSeek-V3, the only widths of the FP8 layout
TILE = 128  # codes that share a scale
FP8_BYTES = LATENT + 4 * (LATENT // TILE) + 2 * ROPE  # 656
E4M3_MAX = 448.0
SMALLEST_SCALE = 1e-4  # before rounding up to a power of two


def latent_width(kv_pages) -> int:
    """Values per token of a pool of either layout."""
    return LATENT + ROPE if kv_pages.dtype == jnp.uint8 else kv_pages.shape[-1]


def check_pool(kv_pages) -> None:
    """Raises ValueError unless `kv_pages` is a pool of one of the two layouts."""
    if kv_pages.ndim != 3 or kv_pages.shape[1] != PAGE_SIZE:
        raise ValueError(f"kv_pages must be [pages, {PAGE_SIZE}, width], got {kv_pages.shape}")
    if kv_pages.dtype == jnp.uint8:
        if kv_pages.shape[-1] != FP8_BYTES:
            raise ValueError(f"an FP8 pool (uint8) has {FP8_BYTES} bytes a token, got {kv_pages.shape[-1]}")
    elif not jnp.issubdtype(kv_pages.dtype, jnp.floating):
        raise ValueError(f"kv_pages must be bfloat16, float32 or uint8 (FP8 layout), got {kv_pages.dtype}")


def encode(latent):
    """Latents [..., 576] of any float dtype -> FP8 rows [..., 656] uint8.

    The scale of a tile is max(amax / 448, 1e-4) rounded up to a power of two, as in FlashMLA; its codes are round(x / scale).
    NaN and Inf become NaN codes.
    """
    tiles = latent[..., :LATENT].astype(jnp.float32).reshape(*latent.shape[:-1], LATENT // TILE, TILE)
    amax = jnp.max(jnp.abs(tiles), axis=-1)
    scales = _round_up_to_pow2(jnp.maximum(jnp.where(jnp.isfinite(amax), amax, 0) / E4M3_MAX, SMALLEST_SCALE))
    codes = (tiles / scales[..., None]).astype(jnp.float8_e4m3fn)
    parts = (codes, scales, latent[..., LATENT:].astype(jnp.bfloat16))
    return jnp.concatenate([lax.bitcast_convert_type(p, jnp.uint8).reshape(*latent.shape[:-1], -1) for p in parts], axis=-1)


def decode(rows, dtype=jnp.float32):
    """FP8 rows [..., 656] uint8 -> latents [..., 576] in `dtype`, the exact inverse of the layout."""
    codes = lax.bitcast_convert_type(rows[..., :LATENT], jnp.float8_e4m3fn)
    scales = lax.bitcast_convert_type(rows[..., LATENT : -2 * ROPE].reshape(*rows.shape[:-1], LATENT // TILE, 4), jnp.float32)
    rope = lax.bitcast_convert_type(rows[..., -2 * ROPE :].reshape(*rows.shape[:-1], ROPE, 2), jnp.bfloat16)
    values = codes.astype(jnp.float32).reshape(*scales.shape, TILE) * scales[..., None]
    return jnp.concatenate([values.reshape(*rows.shape[:-1], LATENT).astype(dtype), rope.astype(dtype)], axis=-1)


def _round_up_to_pow2(x):
    """Smallest power of two >= x, for normal float32 x > 0, by exponent bits (`exp2` is not exact)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0xFF800000), jnp.float32)


def mla_append(kv_pages, latent, page_table, positions):
    """Writes tokens into their pages, quantising them where the pool is FP8; one new token a sequence or whole prefill chunks.

    Token s of sequence b goes to slot `positions[b, s] % 64` of page `page_table[b, positions[b, s] // 64]`. Nothing is written
    for a negative position, a position beyond the page table, or a page outside the pool. Under `jax.jit`, donate `kv_pages` to
    update the pool in place. Two tokens of one call must not share a slot.

    Args:
      kv_pages: pool [P, 64, W] float, or [P, 64, 656] uint8.
      latent: [B, S, W] new tokens, any float dtype (W = 576 for an FP8 pool); converted to the pool's dtype.
      page_table: [B, pages] int32.
      positions: [B, S] int32, position of each token in its sequence; -1 writes nothing (padding).

    Returns:
      the updated pool.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
    """
    kv_pages, latent, page_table, positions = map(jnp.asarray, (kv_pages, latent, page_table, positions))
    check_pool(kv_pages)
    if latent.ndim != 3 or latent.shape[-1] != latent_width(kv_pages):
        raise ValueError(f"latent must be [B, S, {latent_width(kv_pages)}] for this pool, got {latent.shape}")
    if positions.shape != latent.shape[:2]:
        raise ValueError(f"positions must be [B, S] = {latent.shape[:2]}, got {positions.shape}")
    if page_table.ndim != 2 or page_table.shape[0] != latent.shape[0]:
        raise ValueError(f"page_table must be [B, pages] with B = {latent.shape[0]}, got {page_table.shape}")

    for name, x in (("page_table", page_table), ("positions", positions)):
        checks.expect(jnp.issubdtype(x.dtype, jnp.integer), name, x, "integers")

    num_pages, width = kv_pages.shape[0], page_table.shape[1]
    index = positions // PAGE_SIZE
    pages = jnp.take_along_axis(page_table, jnp.clip(index, 0, max(width - 1, 0)), axis=1)
    written = (positions >= 0) & (index < width) & (pages >= 0) & (pages < num_pages)
    rows = encode(latent) if kv_pages.dtype == jnp.uint8 else latent.astype(kv_pages.dtype)
    # Negative indices would wrap around: everything that must not be written points behind the pool, where it is dropped.
    return kv_pages.at[jnp.where(written, pages, num_pages), positions % PAGE_SIZE].set(rows, mode="drop")
