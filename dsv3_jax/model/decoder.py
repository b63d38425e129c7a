"""The whole model: pure functions of a parameter dict.

Parameters: {"embed" [W, D], "dense_layers": {...} [L, ...], "moe_layers": {...} [L, ...], "final_norm" [D], "lm_head" [W, D],
"mtp": {...}}. The names inside a layer are those of the released checkpoints. A stack that is empty is left out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model import module
from dsv3_jax.model.attention import PagedCache, Positions
from dsv3_jax.model.block import DecoderLayer
from dsv3_jax.model.decode_params import decode_params
from dsv3_jax.model.moe import Exchange, RouterStats, exchange_locally
from dsv3_jax.model.mtp import MTP
from dsv3_jax.precision import FLOAT32, Recipe, linear

_KEPT = ("q_latent", "kv_latent", "attention", "residual", "router", "dispatched", "gate_up")
_REMAT_POLICIES = {
    # Recompute everything inside a layer; keep its input.
    "layer": jax.checkpoint_policies.nothing_saveable,
    # The report's choice (§3.2.3): keep what is expensive, recompute RMSNorm, the MLA up-projections and SwiGLU.
    "norms_and_up": jax.checkpoint_policies.save_only_these_names(*_KEPT),
    # Where there is room: queries, keys, values and SwiGLU's outputs (in bf16) are kept as well.
    "norms": jax.checkpoint_policies.save_only_these_names(*_KEPT, "qkv", "hidden"),
}
_UNROLLED = 8  # stacks of at most so many layers are trained layer by layer


class Output(NamedTuple):
    """hidden [B, S, D]: after the last layer, before the final norm; stats: of the MoE layers, load [L, E], balance_loss [L]."""

    hidden_BSD: jax.Array
    stats: RouterStats


class Decoder:
    """A DeepSeek-V3 type model. `remat`: what the backward pass recomputes ("none", "layer", "norms_and_up", "norms")."""

    def __init__(self, config: ModelConfig, recipe: Recipe = FLOAT32, *, remat: str = "none", exchange: Exchange = exchange_locally):
        if config.num_nextn_predict_layers > 1:
            raise UserError(
                f"num_nextn_predict_layers={config.num_nextn_predict_layers}: one MTP module at most is supported (report D = 1)"
            )
        self.config, self.recipe, self.remat, self._exchange = config, recipe, remat, exchange
        layer = functools.partial(DecoderLayer, config, recipe, exchange=exchange)
        self._makers = {}  # stack name -> (how one of its modules is made, how many there are; None: not stacked)
        if config.first_k_dense_replace:
            self._makers["dense_layers"] = (lambda rngs: layer(rngs, dense=True), config.first_k_dense_replace)
        if config.num_moe_layers:
            self._makers["moe_layers"] = (lambda rngs: layer(rngs, dense=False), config.num_moe_layers)
        if config.num_nextn_predict_layers:
            self._makers["mtp"] = (lambda rngs: MTP(config, recipe, rngs, exchange=exchange), None)
        self.modules = {name: module.abstract(make) for name, (make, _) in self._makers.items()}

    # As a static argument of `jax.jit`: decoders of the same kind share compiled programs.

    @property
    def _kind(self):
        return self.config, self.recipe, self.remat, self._exchange

    def __eq__(self, other):
        return isinstance(other, Decoder) and self._kind == other._kind

    def __hash__(self):
        return hash(self._kind)

    # Parameters.

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters: normal with std `initializer_range`, norms one, router bias zero (report §4.2)."""
        config, keys = self.config, iter(jax.random.split(key, 2 + len(self._makers)))
        params = {}
        for name in ("embed", "lm_head"):
            params[name] = config.initializer_range * jax.random.normal(next(keys), (config.vocab_size, config.hidden_size), jnp.float32)
        params["final_norm"] = jnp.ones((config.hidden_size,), jnp.float32)
        for name, (make, count) in self._makers.items():
            one = functools.partial(module.init, make)
            params[name] = one(next(keys)) if count is None else jax.vmap(one)(jax.random.split(next(keys), count))
        return params

    def abstract_params(self) -> dict:
        """Shapes and dtypes of `init`, nothing allocated. They are those of the modules: tracing the draws takes longer."""
        float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        embedding = self.config.vocab_size, self.config.hidden_size
        params = {"embed": float32(*embedding), "lm_head": float32(*embedding), "final_norm": float32(self.config.hidden_size)}
        for name, (_, count) in self._makers.items():
            one = module.shapes(self.modules[name])
            params[name] = one if count is None else jax.tree.map(lambda leaf, n=count: leaf.update(shape=(n, *leaf.shape)), one)
        return params

    def logical_axes(self) -> dict:
        """The logical axis names of every parameter, in the structure of `init`."""
        axes = {"embed": ("vocab", "embed"), "lm_head": ("vocab", "embed"), "final_norm": ("embed",)}
        for name, (_, count) in self._makers.items():
            one = module.logical_axes(self.modules[name])
            is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
            axes[name] = one if count is None else jax.tree.map(lambda names: ("layers", *names), one, is_leaf=is_axes)
        return axes

    # Forward passes over whole rows: training, evaluation.

    def __call__(self, params: dict, tokens_BS: jax.Array, positions_BS=None, segment_ids_BS=None) -> Output:
        """Run all layers over rows of tokens int32 [B, S]; positions count from 0 by default; attention stays within a segment."""
        where = self.positions(tokens_BS, positions_BS, segment_ids_BS)
        x_BSD, stats = self.embed(params, tokens_BS), None
        for name in ("dense_layers", "moe_layers"):
            if name in self._makers:
                x_BSD, stats = self._run_stack(name, params[name], x_BSD, where)
        return Output(x_BSD, stats)

    def positions(self, tokens_BS, positions_BS=None, segment_ids_BS=None) -> Positions:
        """Rotary tables of the rows' positions."""
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        return Positions.of(self.config, positions_BS, segment_ids_BS)

    def embed(self, params: dict, tokens_BS: jax.Array) -> jax.Array:
        """Token embeddings [B, S, D] in the compute dtype."""
        return params["embed"][tokens_BS].astype(self.recipe.compute_dtype)

    def layer(self, name: str, params: dict, x_BSD: jax.Array, where: Positions, *, looped=False) -> tuple[jax.Array, RouterStats]:
        """One layer of the stack `name`, rematerialised. looped: in the body of a loop, where the compiler cannot undo that."""
        run = self.rematerialised(lambda x_BSD, params: module.bind(self.modules[name], params)(x_BSD, where), prevent_cse=not looped)
        return run(x_BSD, params)

    def layers(self, params: dict) -> dict:
        """The parameters as training takes them: in place of a stack of few layers a list of them, which run one after the other.

        A loop's weights are copied out of their stacks, and what it keeps for the backward pass is copied into stacks and out of them. The
        time of compiling few layers one by one is well spent (not in float32, on a CPU).
        """
        if self.recipe.compute_dtype != jnp.bfloat16:
            return params
        few = {name: count for name, (_, count) in self._makers.items() if count is not None and count <= _UNROLLED}
        return {name: _unstacked(leaf, few[name]) if name in few else leaf for name, leaf in params.items()}

    def _run_stack(self, name, stack, x_BSD, where):
        if not isinstance(stack, list):
            return jax.lax.scan(lambda x_BSD, params: self.layer(name, params, x_BSD, where, looped=True), x_BSD, stack)
        layer, stats = jax.jit(functools.partial(self.layer, name)), []  # traced once for all layers
        for params in stack:
            x_BSD, of_layer = layer(params, x_BSD, where)
            stats.append(of_layer)
        return x_BSD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)

    def rematerialised(self, function, *, prevent_cse=False):
        """The function as its backward pass sees it: what `remat` does not keep is computed again."""
        if self.remat == "none":
            return function
        return jax.checkpoint(function, policy=_REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)

    def final_norm(self, params: dict, hidden_BSD: jax.Array) -> jax.Array:
        """The norm before the head."""
        return module.rms_norm(hidden_BSD, params["final_norm"], self.config.rms_norm_eps)

    def head(self, params: dict, normed_BSD: jax.Array) -> jax.Array:
        """Logits float32 [B, S, W] of normed hidden states."""
        return linear(normed_BSD, params["lm_head"], None, self.recipe.unquantised, jnp.float32)

    def logits(self, params: dict, tokens_BS: jax.Array, positions_BS=None, segment_ids_BS=None) -> jax.Array:
        """Next-token logits float32 [B, S, W]."""
        return self.head(params, self.final_norm(params, self(params, tokens_BS, positions_BS, segment_ids_BS).hidden_BSD))

    def mtp(self, params: dict, hidden_BSD, next_tokens_BS, positions_BS=None, segment_ids_BS=None) -> tuple[jax.Array, RouterStats]:
        """Normed hidden states [B, S, D] that predict the token after next.

        hidden_BSD: the main model's, before its final norm; next_tokens_BS: the token that follows each position.
        """
        where = self.positions(next_tokens_BS, positions_BS, segment_ids_BS)

        def run(mtp_params, hidden_BSD, embedding_BSD):
            return module.bind(self.modules["mtp"], mtp_params)(hidden_BSD, embedding_BSD, where)

        run = self.rematerialised(run, prevent_cse=True)
        return run(params["mtp"], self.mtp_input(params, hidden_BSD), self.embed(params, next_tokens_BS))

    def mtp_input(self, params: dict, hidden_BSD: jax.Array) -> jax.Array:
        """The hidden state as the MTP module takes it (config.mtp_hidden)."""
        return self.final_norm(params, hidden_BSD) if self.config.mtp_hidden == "post_norm" else hidden_BSD

    # Passes over a paged cache: serving.

    def decode_params(self, params: dict, *, consume: bool = False) -> dict:
        """The parameters as `decode` and `decode_mtp` take them, the rest of the model too (see model.decode_params)."""
        return decode_params(params, self.config, self.recipe, consume=consume)

    def decode(
        self, params: dict, tokens_BS, positions_BS, caches: dict, page_table, lengths_B, *, chunk: str | None = None
    ) -> tuple[jax.Array, dict, RouterStats]:
        """New tokens of each sequence over the paged cache: one or a few, absorbed, or with `chunk` many, materialised.

        params: as `decode_params` gives them. The layers are not a loop, so that the kernels read their weights where they are.
        tokens, positions int32 [B, S] (position -1: padding, not written); caches: {"dense_layers": pages [L, P, 64, C+R],
        "moe_layers": ...}; page_table [B, pages]; lengths [B], new tokens included. Without `chunk` a row's last token is at its end.
        chunk: "first" where the rows start their sequences, padding at their ends; "later" where they follow what the cache holds.
        Returns (hidden before the final norm [B, S, D], the new caches, stats).
        """
        where = self.positions(tokens_BS, jnp.maximum(positions_BS, 0))
        x_BSD, stats, new_caches = self.embed(params, tokens_BS), None, dict(caches)
        for name in ("dense_layers", "moe_layers"):
            if name not in self._makers:
                continue

            @jax.jit  # traced once for all layers
            def layer(layer_params, x_BSD, cache, name=name):
                return module.bind(self.modules[name], layer_params).decode(x_BSD, where, cache, chunk=chunk)

            pool, stats = caches[name].reshape(-1, *caches[name].shape[2:]), []  # one pool, updated in place
            for index, layer_params in enumerate(params[name]):
                table = page_table + index * caches[name].shape[1]
                x_BSD, pool, of_layer = layer(layer_params, x_BSD, PagedCache(pool, table, lengths_B, positions_BS))
                stats.append(of_layer)
            new_caches[name] = pool.reshape(caches[name].shape)
            stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
        return x_BSD, new_caches, stats

    def decode_mtp(
        self, params: dict, hidden_BSD, next_tokens_BS, positions_BS, caches: dict, page_table, column_B, *, again=False
    ) -> tuple[jax.Array, dict]:
        """The MTP module over its own pages, caches["mtp"] [1, P, 64, C+R], after `decode` of the same positions.

        hidden_BSD as `decode` returns it; next_tokens_BS: the token that follows each position; column_B: which of them are asked about.
        Returns (normed hidden [B, 1, D] of that column, which predicts the token after next, the new caches): it has one layer, so that
        the others matter by their latents alone. again: for the positions after those of such a call, hidden_BSD is what it returned.
        """
        where = self.positions(next_tokens_BS, jnp.maximum(positions_BS, 0))
        cache = PagedCache(caches["mtp"][0], page_table, None, positions_BS)  # lengths: of the one column that reads
        mtp = module.bind(self.modules["mtp"], params["mtp"])
        hidden_BSD, embedding_BSD = hidden_BSD if again else self.mtp_input(params, hidden_BSD), self.embed(params, next_tokens_BS)
        positions_B = positions_BS[jnp.arange(len(column_B)), column_B]
        normed_B1D, pages = mtp.decode(hidden_BSD, embedding_BSD, column_B, positions_B, where, cache)
        return normed_B1D, {**caches, "mtp": pages[None]}


def _unstacked(stack: dict, count: int) -> list[dict]:
    """The layers of a stack. Their gradients are put together again in one pass."""
    leaves, structure = jax.tree.flatten(stack)
    parts = [[part[0] for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts)]
