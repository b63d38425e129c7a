"""Plain-JAX MLA decode: gathers the pages a table names and attends to them in float32. Runs anywhere, checks the kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.cache import LATENT, PAGE_SIZE, decode


def mla_decode(q, kv_pages, page_table, lengths, *, softmax_scale, out_dtype=jnp.bfloat16, value_width=LATENT, num_sms=None):
    """See `pallas_kernels.mla_decode.mla_decode`. All arithmetic is float32; `num_sms` means nothing here."""
    del num_sms
    num_queries = q.shape[1]
    kv = kv_pages.at[page_table].get(mode="clip")  # a page outside the pool reads some other page, never other memory
    kv = decode(kv) if kv.dtype == jnp.uint8 else kv.astype(jnp.float32)
    kv = kv.reshape(kv.shape[0], -1, kv.shape[-1])  # [B, keys, W]

    keys = jnp.arange(page_table.shape[1] * PAGE_SIZE)
    # Unused slots may hold anything: NaN * 0 is NaN, so they are cleared, not only masked.
    kv = jnp.where((keys < lengths[:, None])[..., None], kv, 0)
    limits = lengths[:, None] - num_queries + jnp.arange(num_queries) + 1  # [B, S_q]: query i sees keys below limits[i]
    seen = (keys < limits[..., None])[:, :, None]  # [B, S_q, 1, keys]

    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bshw,bkw->bshk", q.astype(jnp.float32), kv) * softmax_scale
        scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True, initial=-1e30)  # finite where a query sees no key
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("bshk,bkv->bshv", weights, kv[..., :value_width])
    out = out / jnp.where(total > 0, total, 1)[..., None]
    lse = jnp.where(total > 0, top[..., 0] + jnp.log(total), jnp.inf)
    return out.astype(out_dtype), lse
