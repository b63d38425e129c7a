"""One transformer layer: pre-norm attention, then a dense or a mixture-of-experts feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MLA, PagedCache, Positions
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.module import Module, ones, rms_norm
from dsv3_jax.model.moe import Exchange, MoE, RouterStats
from dsv3_jax.precision import Recipe


class DecoderLayer(Module):
    """x += attention(norm(x)); x += ffn(norm(x)). A dense layer's RouterStats are empty: [0] loads, zeros."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs, *, dense: bool, exchange: Exchange):
        self.config, self.recipe, self.dense = config, recipe, dense
        self.input_layernorm = ones((config.hidden_size,), ("embed",))
        self.self_attn = MLA(config, recipe, rngs)
        self.post_attention_layernorm = ones((config.hidden_size,), ("embed",))
        if dense:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config, recipe, rngs)
        else:
            self.mlp = MoE(config, recipe, rngs, exchange)

    def __call__(self, x_BSD: jax.Array, where: Positions) -> tuple[jax.Array, RouterStats]:
        """[B, S, D] -> ([B, S, D], router statistics), attending within the rows."""
        with jax.named_scope("attention"):
            x_BSD = x_BSD + self.self_attn(self._norm("input_layernorm", x_BSD), where)
        return self.feed_forward(checkpoint_name(x_BSD, "residual"))

    def decode(
        self, x_BSD: jax.Array, where: Positions, cache: PagedCache, *, chunk: str | None = None
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """The same for new tokens over a paged cache: also returns the new pages. chunk: as of `Decoder.decode`."""
        with jax.named_scope("attention"):
            normed = self._norm("input_layernorm", x_BSD)
            if chunk is None:
                attended, pages = self.self_attn.decode(normed, where, cache)
            else:
                attended, pages = self.self_attn.prefill(normed, where, cache, first=chunk == "first")
        x_BSD, stats = self.feed_forward(x_BSD + attended, cache.write_positions >= 0)
        return x_BSD, pages, stats

    def decode_column(
        self, x_BSD: jax.Array, column_B: jax.Array, positions_B: jax.Array, where: Positions, cache: PagedCache
    ) -> tuple[jax.Array, jax.Array]:
        """`decode` of which one column of each row is wanted, at these positions (-1: of none): ([B, 1, D], the new pages). The others only
        leave their latents."""

        def at(a):
            return a if a is None or a.shape[1] == 1 else a[jnp.arange(len(a)), column_B][:, None]

        with jax.named_scope("attention"):
            normed = self._norm("input_layernorm", x_BSD)
            pages = self.self_attn.write(normed, where, cache)
            cache = PagedCache(pages, cache.page_table, positions_B + 1, positions_B[:, None])
            x_B1D = at(x_BSD) + self.self_attn.read(at(normed), Positions(*map(at, where)), cache)
        return self.feed_forward(x_B1D, cache.write_positions >= 0)[0], pages

    def feed_forward(self, x_BSD: jax.Array, used_BS: jax.Array | None = None) -> tuple[jax.Array, RouterStats]:
        """The second half of the layer. used: as of `MoE`."""
        normed = self._norm("post_attention_layernorm", x_BSD)
        if self.dense:
            with jax.named_scope("mlp"):
                zero = jnp.zeros((), jnp.float32)
                return x_BSD + self.mlp(normed), RouterStats(jnp.zeros((0,), jnp.float32), zero, zero)
        with jax.named_scope("moe"):
            y_BSD, stats = self.mlp(normed, used_BS)
            return x_BSD + y_BSD, stats

    def _norm(self, name, x):
        return rms_norm(x, getattr(self, name)[...], self.config.rms_norm_eps)
