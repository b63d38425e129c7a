"""MLA decode over a paged latent cache, in the absorbed form: 576 values a token for all heads (DeepSeek-V2 report, section 2.1)."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks
from pallas_kernels.mla_decode import hopper, reference
from pallas_kernels.mla_decode.cache import LATENT, PAGE_SIZE, ROPE, check_pool, latent_width, mla_append
from pallas_kernels.mla_decode.hopper import supports
from pallas_kernels.platform import dispatch

__all__ = ["mla_append", "mla_decode", "supports"]


def mla_decode(
    q,
    kv_pages,
    page_table,
    lengths,
    *,
    softmax_scale,
    out_dtype=jnp.bfloat16,
    value_width=LATENT,
    num_sms=None,
    implementation=None,
    debug=False,
):
    """Attention of a few new tokens a sequence over its cached latents: softmax(q . kv * softmax_scale) . kv[:value_width].

    Query i of S_q sees the keys below `length - S_q + i + 1`: the cache already holds the new tokens (`mla_append` first), and
    they are causal among themselves. A query that sees no key (length 0) gives out 0 and lse +inf. What lies in unused slots and
    pages does not matter, NaN included; nor do entries of `page_table` beyond the length.

    Args:
      q: [B, S_q, H, W] absorbed queries, bfloat16 (or float32, which the kernel rounds); W = 576 for DeepSeek-V3.
      kv_pages: [P, 64, W] bfloat16 (float32 in the reference only), or [P, 64, 656] uint8 in FlashMLA's FP8 layout.
      page_table: [B, pages] int32, the pages of each sequence, in its order.
      lengths: [B] int32 tokens in the cache, the S_q new ones included; at most 64 * pages.
      softmax_scale: a Python float that multiplies q . kv; of the un-absorbed head width (192), with YaRN's factor where it is used.
      out_dtype: bfloat16 or float32.
      value_width: leading columns of a cached row that are the value, 512 for DeepSeek-V3.
      num_sms: thread blocks the kernel may occupy; default all of the device.
      implementation: see `pallas_kernels.platform`. The kernel takes bfloat16 and FP8 pools of width 576 with values of 512; other
        widths and float32 pools are for tests and small models, in the reference: on a GPU ask for it by name.
      debug: check `lengths` and `page_table` on the device; a bad one raises an error that names the sequence. Without it an
        out-of-range page reads some page of the pool and a length beyond the table is cut: wrong values, never other memory.

    Returns:
      out [B, S_q, H, value_width] in `out_dtype`, and lse [B, S_q, H] float32, the natural log of the sum of exp(scores).

    Raises:
      ValueError: shapes, widths or dtypes that do not fit together.
    """
    q, kv_pages, page_table, lengths = map(jnp.asarray, (q, kv_pages, page_table, lengths))
    check_pool(kv_pages)
    width = latent_width(kv_pages)
    if q.ndim != 4 or q.shape[-1] != width:
        raise ValueError(f"q must be [B, S_q, H, {width}] for this pool, got {q.shape}")
    if page_table.ndim != 2 or page_table.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(f"page_table must be [B, pages] and lengths [B] with B = {q.shape[0]}, got {page_table.shape}, {lengths.shape}")
    for name, x in (("page_table", page_table), ("lengths", lengths)):
        checks.expect(jnp.issubdtype(x.dtype, jnp.integer), name, x, "integers")
    for name, x in (("q", q), ("kv_pages", kv_pages), ("page_table", page_table)):
        checks.expect(x.size, name, x, "no empty axis")
    checks.expect(jnp.issubdtype(q.dtype, jnp.floating), "q", q, "bfloat16 or float32")
    if not 0 < value_width <= width or (kv_pages.dtype == jnp.uint8 and value_width != LATENT):
        raise ValueError(f"value_width {value_width} does not fit a pool of width {width}")
    checks.out_dtype(out_dtype)
    checks.num_sms(num_sms)
    if not hopper.supports(kv_pages, value_width):
        if implementation == "hopper" or (implementation is None and jax.default_backend() == "gpu"):
            raise ValueError(
                f"mla_decode: the kernel takes bfloat16 or FP8 pools of width {LATENT + ROPE} with values of {LATENT}, got "
                f"{kv_pages.dtype}, {width} and {value_width}; use implementation='reference'"
            )
        implementation = "reference"
    if debug:
        jax.debug.callback(_raise_bad_input, *find_bad_input(kv_pages, page_table, lengths))
    return dispatch(
        "mla_decode",
        implementation,
        q,
        kv_pages,
        page_table,
        lengths,
        hopper=hopper.mla_decode,
        reference=reference.mla_decode,
        softmax_scale=float(softmax_scale),
        out_dtype=jnp.dtype(out_dtype),
        value_width=value_width,
        num_sms=num_sms,
    )


def find_bad_input(kv_pages, page_table, lengths):
    """(bad_page [B], bad_length [B]) bool: sequences whose used page table entries leave the pool, or whose length leaves the table."""
    used = jnp.arange(page_table.shape[1]) * PAGE_SIZE < lengths[:, None]
    outside = (page_table < 0) | (page_table >= kv_pages.shape[0])
    bad_length = (lengths < 0) | (lengths > page_table.shape[1] * PAGE_SIZE)
    return jnp.any(used & outside, axis=1), bad_length


def _raise_bad_input(bad_page, bad_length):
    problems = []
    if np.any(bad_page):
        problems.append(f"page_table names pages outside the pool for sequences {np.flatnonzero(bad_page).tolist()}")
    if np.any(bad_length):
        problems.append(f"lengths are negative or beyond the page table for sequences {np.flatnonzero(bad_length).tolist()}")
    if problems:
        raise ValueError("mla_decode: " + "; ".join(problems))
