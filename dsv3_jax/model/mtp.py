"""The multi-token-prediction module (report §2.2): one more layer that predicts the token after next."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import PagedCache, Positions
from dsv3_jax.model.block import DecoderLayer
from dsv3_jax.model.module import Module, ones, rms_norm, weight
from dsv3_jax.model.moe import Exchange, RouterStats
from dsv3_jax.precision import Recipe


class MTP(Module):
    """eh_proj([enorm(embedding of the next token), hnorm(hidden)]) -> layer -> norm. Embedding and head are the main model's.

    The released checkpoints concatenate the embedding first, opposite to the report's Eq. 21.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs, *, exchange: Exchange):
        self.config, self.recipe = config, recipe.unquantised
        d = config.hidden_size
        self.enorm = ones((d,), ("embed",))
        self.hnorm = ones((d,), ("embed",))
        self.eh_proj = weight(rngs, (d, 2 * d), ("embed", None), config.initializer_range)
        self.layer = DecoderLayer(config, recipe, rngs, dense=False, exchange=exchange)
        self.norm = ones((d,), ("embed",))

    def __call__(self, hidden_BSD: jax.Array, next_embedding_BSD: jax.Array, where: Positions) -> tuple[jax.Array, RouterStats]:
        """hidden of token i and embedding of token i+1, [B, S, D] each -> (normed hidden that predicts token i+2, stats)."""
        x_BSD, stats = self.layer(self._merge(hidden_BSD, next_embedding_BSD), where)
        return self._norm("norm", x_BSD), stats

    def decode(
        self, hidden_BSD: jax.Array, next_embedding_BSD: jax.Array, column_B, positions_B, where: Positions, cache: PagedCache
    ) -> tuple[jax.Array, jax.Array]:
        """The same for one column of new tokens over a paged cache, to which all are written: (normed hidden [B, 1, D], the new pages)."""
        x_B1D, pages = self.layer.decode_column(self._merge(hidden_BSD, next_embedding_BSD), column_B, positions_B, where, cache)
        return self._norm("norm", x_B1D), pages

    def _merge(self, hidden_BSD, next_embedding_BSD):
        joined = jnp.concatenate([self._norm("enorm", next_embedding_BSD), self._norm("hnorm", hidden_BSD)], axis=-1)
        return self.linear("eh_proj", joined)

    def _norm(self, name, x):
        return rms_norm(x, getattr(self, name)[...], self.config.rms_norm_eps)
