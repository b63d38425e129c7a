"""Multi-head latent attention (DeepSeek-V3 report §2.1.1), materialised for training and prefill, absorbed for decode."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import rope
from dsv3_jax.model.fused_attention import causal_attention, merge, partial_attention
from dsv3_jax.model.module import Module, ones, rms_norm, weight
from dsv3_jax.precision import Recipe
from pallas_kernels.mla_decode import mla_append, mla_decode, supports
from pallas_kernels.mla_decode.cache import PAGE_SIZE
from pallas_kernels.mla_decode.cache import decode as decode_rows

# The norms of the latents use this epsilon in every released implementation, whatever `rms_norm_eps` says.
_LATENT_NORM_EPS = 1e-6
# Pages whose keys and values are materialised at once when a prompt's later chunks are prefilled: 1,024 tokens.
_BLOCK_PAGES = 16


class Positions(NamedTuple):
    """What attention must know of where tokens stand: rotary tables cos, sin [B, S, R/2] float32; segment_ids [B, S] int32 or None (one
    document a row)."""

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None

    @classmethod
    def of(cls, config: ModelConfig, positions_BS: jax.Array, segment_ids_BS: jax.Array | None = None) -> "Positions":
        return cls(*rope.tables(config, positions_BS), segment_ids_BS)


class PagedCache(NamedTuple):
    """One layer's latent cache and where this call's sequences live in it.

    pages [P, 64, C + R] (or uint8 [P, 64, 656], FP8); page_table [B, pages] int32; lengths [B] int32, the new tokens included;
    write_positions [B, S] int32, where the new tokens go, -1 for padding that is not to be written.
    """

    pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    write_positions: jax.Array


class MLA(Module):
    """Multi-head latent attention of one layer."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
        self.config, self.recipe = config, recipe
        c, std = config, config.initializer_range
        heads_QK = c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            self.q_proj = weight(rngs, (heads_QK, c.hidden_size), ("heads", "embed"), std)
        else:
            self.q_a_proj = weight(rngs, (c.q_lora_rank, c.hidden_size), ("q_latent", "embed"), std)
            self.q_a_layernorm = ones((c.q_lora_rank,), ("q_latent",))
            self.q_b_proj = weight(rngs, (heads_QK, c.q_lora_rank), ("heads", "q_latent"), std)
        self.kv_a_proj_with_mqa = weight(rngs, (c.latent_dim, c.hidden_size), ("kv_latent", "embed"), std)
        self.kv_a_layernorm = ones((c.kv_lora_rank,), ("kv_latent",))
        heads_KV = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.kv_b_proj = weight(rngs, (heads_KV, c.kv_lora_rank), ("heads", "kv_latent"), std)
        self.o_proj = weight(rngs, (c.hidden_size, c.num_attention_heads * c.v_head_dim), ("embed", "heads"), std)

    def __call__(self, x_BSD: jax.Array, where: Positions) -> jax.Array:
        """Causal attention over the row itself, materialised: [B, S, D] -> [B, S, D]."""
        return self.output(self.attend(*self.project(x_BSD, where), where.segment_ids))

    def project(self, x_BSD: jax.Array, where: Positions) -> tuple[jax.Array, jax.Array]:
        """Queries [B, S, H, N+R] and latents [B, S, C+R]."""
        return self.queries(x_BSD, where), self.latents(x_BSD, where)

    def queries(self, x_BSD: jax.Array, where: Positions) -> jax.Array:
        """[B, S, H, N+R]."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.linear("q_proj", x_BSD)
        else:
            q_BSQ = checkpoint_name(self.linear("q_a_proj", x_BSD), "q_latent")
            q = self.linear("q_b_proj", rms_norm(q_BSQ, self.q_a_layernorm[...], _LATENT_NORM_EPS))
        q_BSHd = q.reshape(*x_BSD.shape[:2], c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q_BSHd, [c.qk_nope_head_dim], axis=-1)
        q_rope = rope.rotate(q_rope, where.cos[:, :, None], where.sin[:, :, None])
        return jnp.concatenate([q_nope, q_rope], axis=-1)

    def latents(self, x_BSD: jax.Array, where: Positions) -> jax.Array:
        """[B, S, C+R]: post-norm latent ‖ post-RoPE key, what a cache holds."""
        kv = checkpoint_name(self.linear("kv_a_proj_with_mqa", x_BSD), "kv_latent")
        latent, k_rope = jnp.split(kv, [self.config.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, self.kv_a_layernorm[...], _LATENT_NORM_EPS)
        return jnp.concatenate([latent, rope.rotate(k_rope, where.cos, where.sin)], axis=-1)

    def attend(self, q_BSHd: jax.Array, latent_BSC: jax.Array, segment_ids_BS: jax.Array | None) -> jax.Array:
        """Materialise keys and values of the latents and attend causally: -> [B, S, H, V]."""
        q, k, v = checkpoint_name((q_BSHd, *self.materialise(latent_BSC)), "qkv")
        return causal_attention(q, k, v, rope.softmax_scale(self.config), segment_ids_BS)

    def materialise(self, latent_BSC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, H, N+R] and values [B, S, H, V] of latents [B, S, C+R]."""
        c = self.config
        latent, k_rope = jnp.split(latent_BSC, [c.kv_lora_rank], axis=-1)
        kv = self.linear("kv_b_proj", latent).reshape(*latent.shape[:2], c.num_attention_heads, -1)
        k_nope, v = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
        # Wide, so that its gradient is summed over the heads in float32: a Hopper GPU adds bfloat16 as it stands.
        wide = jnp.promote_types(k_rope.dtype, jnp.float32)
        k_rope = jnp.broadcast_to(k_rope[:, :, None].astype(wide), (*k_nope.shape[:3], c.qk_rope_head_dim)).astype(k_rope.dtype)
        return jnp.concatenate([k_nope, k_rope], axis=-1), v

    def output(self, attended_BSHV: jax.Array) -> jax.Array:
        """The output projection: [B, S, H, V] -> [B, S, D]."""
        return self.linear("o_proj", attended_BSHV.reshape(*attended_BSHV.shape[:2], -1))

    def prefill(self, x_BSD: jax.Array, where: Positions, cache: PagedCache, *, first: bool) -> tuple[jax.Array, jax.Array]:
        """`decode` of many tokens a row, materialised. first: the rows start their sequences, with padding at their ends, if any."""
        q_BSHd, latent_BSC = self.project(x_BSD, where)
        pages = mla_append(cache.pages, latent_BSC, cache.page_table, cache.write_positions)
        attended = self.attend(q_BSHd, latent_BSC, None) if first else self.attend_pages(q_BSHd, cache._replace(pages=pages))
        return self.output(attended), pages

    def attend_pages(self, q_BSHd: jax.Array, cache: PagedCache) -> jax.Array:
        """Attend to all that the cache holds up to each query's position: -> [B, S, H, V].

        Keys and values are materialised for a few pages at a time, and what they give is merged (Milakov and Gimelshein 2018), so that
        memory does not grow with the length, and only as many blocks are computed as the longest row has.
        """
        scale, dtype = rope.softmax_scale(self.config), self.recipe.compute_dtype
        pages_per_block = min(_BLOCK_PAGES, cache.page_table.shape[1])
        block = pages_per_block * PAGE_SIZE
        table = jnp.pad(cache.page_table, ((0, 0), (0, -cache.page_table.shape[1] % pages_per_block)))

        def add_block(index, so_far):
            rows = cache.pages[jax.lax.dynamic_slice_in_dim(table, index * pages_per_block, pages_per_block, axis=1)]
            rows = rows.reshape(rows.shape[0], block, rows.shape[-1])
            latent = decode_rows(rows, dtype) if rows.dtype == jnp.uint8 else rows.astype(dtype)
            keys_K = index * block + jnp.arange(block)
            # Slots that were never written may hold anything, and NaN times 0 is NaN.
            k, v = self.materialise(jnp.where((keys_K < cache.lengths[:, None])[..., None], latent, 0))
            return merge(so_far, partial_attention(q_BSHd, k, v, keys_K <= cache.write_positions[..., None], scale))

        batch, width, heads = q_BSHd.shape[:3]
        nothing = jnp.zeros((batch, width, heads, self.config.v_head_dim)), jnp.full((batch, heads, width), -jnp.inf)
        num_blocks = (jnp.max(cache.lengths) + block - 1) // block
        return jax.lax.fori_loop(0, num_blocks, add_block, nothing)[0].astype(dtype)

    def decode(self, x_BSD: jax.Array, where: Positions, cache: PagedCache) -> tuple[jax.Array, jax.Array]:
        """Write the new tokens' latents into the cache and attend to all of it: ([B, S, D], the new pages)."""
        pages = self.write(x_BSD, where, cache)
        return self.read(x_BSD, where, cache._replace(pages=pages)), pages

    def write(self, x_BSD: jax.Array, where: Positions, cache: PagedCache) -> jax.Array:
        """The pages with the tokens' latents."""
        return mla_append(cache.pages, self.latents(x_BSD, where), cache.page_table, cache.write_positions)

    def read(self, x_BSD: jax.Array, where: Positions, cache: PagedCache) -> jax.Array:
        """Attend to all of the cache, which has the tokens' own latents, absorbed (report §2.1.1; DeepSeek-V2 appendix): [B, S, D].

        The up-projections of keys and values act on queries and outputs instead, so that attention runs on the latents alone.
        They are `k_up_proj` and `v_up_proj` (see decode_params).
        """
        c = self.config
        q_nope, q_rope = jnp.split(self.queries(x_BSD, where), [c.qk_nope_head_dim], axis=-1)
        precision = self.recipe.product_precision
        q_latent = jnp.einsum("bshn,hnc->bshc", q_nope, self.k_up_proj[...], precision=precision)
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        attended_BSHC, _ = mla_decode(
            q,
            cache.pages,
            cache.page_table,
            cache.lengths,
            softmax_scale=rope.softmax_scale(c),
            value_width=c.kv_lora_rank,
            out_dtype=self.recipe.compute_dtype,
            # The kernel is for V3's latents: other widths, as of `tiny`, and float32 run in plain JAX on a GPU too.
            implementation=None if supports(cache.pages, c.kv_lora_rank) else "reference",
        )
        attended_BSHV = jnp.einsum("bshc,hvc->bshv", attended_BSHC, self.v_up_proj[...], precision=precision)
        return self.output(attended_BSHV)
