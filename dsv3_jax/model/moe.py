"""DeepSeekMoE (report §2.1.2): router, dispatch, experts, combine, shared experts.

The four stages are separate functions, so that a mesh can put its own exchange between them: `MoE` is handed the function that takes
tokens to experts and back (`exchange_locally` on one device).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.module import Module, RouterBias, weight
from dsv3_jax.precision import FP8_WEIGHTS, Activation, Recipe, keep, quantise
from pallas_kernels import Quantized, gather_rows


class Routing(NamedTuple):
    """Where each token goes. experts [T, K] int32 (the number of experts: nowhere); weights [T, K] float32; stats of the batch."""

    experts_TK: jax.Array
    weights_TK: jax.Array
    stats: "RouterStats"

    def only(self, used_T: jax.Array) -> "Routing":
        """Tokens that are not used go nowhere, and are not counted."""
        none = self.stats.load_E.size
        experts_TK = jnp.where(used_T[:, None], self.experts_TK, none)
        return self._replace(experts_TK=experts_TK, stats=self.stats._replace(load_E=_count(experts_TK, none)))


class RouterStats(NamedTuple):
    """load [E] float32: tokens that chose each expert; balance_loss: sequence-wise, mean over sequences, before its weight.

    fill: how full the fullest buffer of the exchange was, 1 being full; beyond 1 it had no room for some tokens and the result is void.
    0 where there are no buffers.
    """

    load_E: jax.Array
    balance_loss: jax.Array
    fill: jax.Array


class Router(Module):
    """Scores in float32, group-limited top-k (report Eq. 12-16; V2's softmax and greedy selection by config)."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
        self.config, self.recipe = config, recipe
        # Not an "experts" axis: every device scores all experts, wherever their weights lie.
        self.weight = weight(rngs, (config.n_routed_experts, config.hidden_size), (None, "embed"), config.initializer_range)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = RouterBias(jnp.zeros((config.n_routed_experts,), jnp.float32), axes=(None,))

    def __call__(self, x_BSD: jax.Array) -> Routing:
        c = self.config
        x_TD = x_BSD.reshape(-1, c.hidden_size)
        logits_TE = checkpoint_name(self.linear("weight", x_TD), "router")
        scores_TE = jax.nn.sigmoid(logits_TE) if c.scoring_func == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
        biased_TE = jax.lax.stop_gradient(scores_TE)
        if c.topk_method == "noaux_tc":
            biased_TE = biased_TE + jax.lax.stop_gradient(self.e_score_correction_bias[...])
        experts_TK = checkpoint_name(_top_k(_limit_groups(biased_TE, c), c.num_experts_per_tok)[1], "router")
        weights_TK = jnp.take_along_axis(scores_TE, experts_TK, axis=-1)
        if c.norm_topk_prob:
            weights_TK = weights_TK / (jnp.sum(weights_TK, axis=-1, keepdims=True) + 1e-20)
        load_E = _count(experts_TK, c.n_routed_experts)
        balance_loss = _balance_loss(scores_TE.reshape(*x_BSD.shape[:2], -1), c.num_experts_per_tok)
        stats = RouterStats(load_E, balance_loss, jnp.zeros((), jnp.float32))
        return Routing(experts_TK, weights_TK * c.routed_scaling_factor, stats)


def _limit_groups(scores_TE: jax.Array, c: ModelConfig) -> jax.Array:
    """Scores with −inf outside the best `topk_group` groups."""
    if c.topk_method == "greedy" or c.topk_group == c.n_group:
        return scores_TE
    grouped_TGE = scores_TE.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
    best = 2 if c.topk_method == "noaux_tc" else 1
    group_scores_TG = jnp.sum(_top_k(grouped_TGE, best)[0], axis=-1)
    _, kept_groups = _top_k(group_scores_TG, c.topk_group)
    kept_TG = jnp.any(kept_groups[..., None] == jnp.arange(c.n_group), axis=-2)
    return jnp.where(kept_TG[..., None], grouped_TGE, -jnp.inf).reshape(scores_TE.shape)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`, ties and all, for the few that a router takes: k times the maximum, where XLA would sort, or by counting."""
    position, found = jnp.arange(x.shape[-1], dtype=jnp.int32), []
    if x.size * x.shape[-1] <= _COUNTED:
        places = _places(jnp.where(jnp.isnan(x), -jnp.inf, -x))  # a NaN, which no comparison places, is the greatest
        return _at(places, x, k), _at(places, position, k)
    for _ in range(k):
        index = jnp.argmax(x, axis=-1).astype(jnp.int32)
        found.append((jnp.max(x, axis=-1), index))
        x = jnp.where(position == index[..., None], -jnp.inf, x)
    values, indices = (jnp.stack(part, axis=-1) for part in zip(*found))
    return values, indices


# As many comparisons cost less than what they save: sorts, loops and scatters are several kernels, which a decode step of a few rows waits
# for one after the other.
_COUNTED = 2**24


def _places(keys: jax.Array) -> jax.Array:
    """int32 [..., n]: where each of keys [..., n] stands in ascending order, equal ones in theirs."""
    index = jnp.arange(keys.shape[-1], dtype=jnp.int32)
    mine, other = keys[..., :, None], keys[..., None, :]
    return jnp.sum((other < mine) | ((other == mine) & (index < index[:, None])), axis=-1, dtype=jnp.int32)


def _at(places: jax.Array, values: jax.Array, count: int) -> jax.Array:
    """The values [..., n] that stand at the first `count` places."""
    place = jnp.arange(count, dtype=jnp.int32)
    return jnp.sum(jnp.where(places[..., None, :] == place[:, None], values[..., None, :], 0), axis=-1, dtype=values.dtype)


def _count(experts: jax.Array, num_experts: int) -> jax.Array:
    return jnp.sum(experts.reshape(-1, 1) == jnp.arange(num_experts), axis=0, dtype=jnp.float32)


def _balance_loss(scores_BSE: jax.Array, experts_per_token: int) -> jax.Array:
    """Σ_i f_i P_i of each sequence (report Eq. 17-20), mean over sequences; f counts the unbiased top-k and carries no gradient."""
    num_experts = scores_BSE.shape[-1]
    _, chosen = _top_k(jax.lax.stop_gradient(scores_BSE), experts_per_token)
    frequency_BE = jax.vmap(lambda experts: _count(experts, num_experts))(chosen)
    frequency_BE = frequency_BE * (num_experts / (experts_per_token * scores_BSE.shape[1]))
    probability_BE = jnp.mean(scores_BSE / jnp.sum(scores_BSE, axis=-1, keepdims=True), axis=1)
    return jnp.mean(jnp.sum(frequency_BE * probability_BE, axis=-1))


class Experts(Module):
    """The routed experts: E SwiGLU networks over rows sorted by expert."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs):
        self.recipe = recipe
        e, f, d, std = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size, config.initializer_range
        self.gate_up_proj = weight(rngs, (e, 2, f, d), ("experts", None, "mlp", "embed"), std)
        self.down_proj = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), std)

    def enter(self, x_TD: jax.Array) -> jax.Array | Activation:
        """Tokens as they are dispatched: in FP8 recipes quantised, so that half of the bytes travel (report §3.3.3)."""
        return quantise(x_TD, self.recipe, FP8_WEIGHTS["gate_up_proj"].input) if self.recipe.fp8 else x_TD

    def __call__(self, x_RD: jax.Array | Activation, group_sizes_E: jax.Array, weights_R: jax.Array) -> jax.Array:
        """[R, D] rows sorted by expert, as `enter` gives them, and their routing weights -> weighted outputs [R, D].

        The weights act before the down-projection, which is the same and lets the backward pass do without the outputs.
        """
        gate_up = self.grouped_linear("gate_up_proj", x_RD, group_sizes_E)
        return self.swiglu_linear("down_proj", gate_up, group_sizes_E, weights_R)


class Dispatched(NamedTuple):
    """Tokens sorted by expert. x [R, D] with R = T·K, weights [R]; group_sizes [E]; order [R]: the flat (token, k) of each row; inverse."""

    x_RD: jax.Array | Activation
    weights_R: jax.Array
    group_sizes_E: jax.Array
    order_R: jax.Array
    inverse_R: jax.Array


def dispatch(x_TD: jax.Array | Activation, routing: Routing) -> Dispatched:
    """Every token once for each of its experts, sorted by expert: dropless, no padding."""
    flat = routing.experts_TK.reshape(-1)
    index_R = jnp.arange(flat.size, dtype=jnp.int32)
    if flat.size**2 <= _COUNTED:
        inverse_R = _places(flat)
        order_R = _at(inverse_R, index_R, flat.size)
    else:
        order_R = jnp.argsort(flat, stable=True).astype(jnp.int32)
        inverse_R = jnp.zeros_like(order_R).at[order_R].set(index_R, unique_indices=True)
    order_R, inverse_R = checkpoint_name((order_R, inverse_R), "router")
    group_sizes_E = jnp.sum(flat[:, None] == jnp.arange(routing.stats.load_E.size), axis=0, dtype=jnp.int32)
    x_RD = keep(_spread(x_TD, order_R, inverse_R), "dispatched")
    weights_R = _permute(routing.weights_TK.reshape(-1), order_R, inverse_R)
    return Dispatched(x_RD, weights_R, group_sizes_E, order_R, inverse_R)


def combine(y_RD: jax.Array, dispatched: Dispatched, num_tokens: int) -> jax.Array:
    """The sum of each token's experts: [R, D] -> [T, D]."""
    return _collect(y_RD, dispatched.order_R, dispatched.inverse_R, num_tokens)


# Spreading tokens and collecting them are each other's transpose, and both are gathers: the inverse permutation is at hand, and a
# scatter-add would be several times slower.
def _spread_rows(x_TD, order_R):
    token_R = order_R // (order_R.size // x_TD.shape[0])
    return x_TD[token_R] if x_TD.dtype == jnp.float32 else gather_rows(x_TD, token_R)


def _collect_rows(y_RD, inverse_R, num_tokens):
    return jnp.sum(y_RD[inverse_R].reshape(num_tokens, -1, y_RD.shape[-1]), axis=1, dtype=jnp.float32).astype(y_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(y_RD, order_R, inverse_R, num_tokens):
    return _collect_rows(y_RD, inverse_R, num_tokens)


_collect.defvjp(
    lambda y_RD, order_R, inverse_R, num_tokens: (_collect_rows(y_RD, inverse_R, num_tokens), order_R),
    lambda num_tokens, order_R, dy_TD: (_spread_rows(dy_TD, order_R), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread_array(x_TD, order_R, inverse_R, empty):
    """[T, D] -> [R, D]. empty: the rows of zeros of an `Activation.gradient`, which nobody reads."""
    return jnp.broadcast_to(x_TD[:1], (order_R.size, x_TD.shape[1])) if empty else _spread_rows(x_TD, order_R)


_spread_array.defvjp(
    lambda x_TD, order_R, inverse_R, empty: (_spread_array(x_TD, order_R, inverse_R, empty), (inverse_R, x_TD.shape[0])),
    # Held apart: in one fusion with the reductions over whole rows that follow, the gather runs at a third of the memory's rate.
    lambda empty, saved, dy_RD: (jax.lax.optimization_barrier(_collect_rows(dy_RD, *saved)), None, None),
)


def _spread(x_TD, order_R, inverse_R):
    if not isinstance(x_TD, Activation):
        return _spread_array(x_TD, order_R, inverse_R, False)
    values, scales = jax.lax.stop_gradient((x_TD.quantised.values, x_TD.quantised.scales()))
    token_R = order_R // (order_R.size // x_TD.shape[0])
    quantised = Quantized.tiles(_spread_rows(values, order_R), scales[token_R])
    return Activation(quantised, _spread_array(x_TD.gradient, order_R, inverse_R, True))


@jax.custom_vjp
def _permute(x, index, inverse):
    return x[index]


_permute.defvjp(lambda x, index, inverse: (x[index], inverse), lambda inverse, dy: (dy[inverse], None, None))


# Takes tokens to the experts and back: (x [T, D], routing, experts) -> ([T, D], fill of RouterStats).
Exchange = Callable[[jax.Array, Routing, Experts], tuple[jax.Array, jax.Array]]


def exchange_locally(x_TD: jax.Array, routing: Routing, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """The exchange of one device that holds all experts."""
    dispatched = dispatch(experts.enter(x_TD), routing)
    y_RD = experts(dispatched.x_RD, dispatched.group_sizes_E, dispatched.weights_R)
    return combine(y_RD, dispatched, x_TD.shape[0]), routing.stats.fill


class MoE(Module):
    """Routed plus shared experts."""

    def __init__(self, config: ModelConfig, recipe: Recipe, rngs: nnx.Rngs, exchange: Exchange = exchange_locally):
        self.recipe, self.exchange = recipe, exchange
        self.gate = Router(config, recipe.router, rngs)
        self.experts = Experts(config, recipe, rngs)
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, config, recipe, rngs)

    def __call__(self, x_BSD: jax.Array, used_BS: jax.Array | None = None) -> tuple[jax.Array, RouterStats]:
        """[B, S, D] -> ([B, S, D], stats). used [B, S]: False for padding, which costs no expert anything."""
        routing = self.gate(x_BSD)
        if used_BS is not None:
            routing = routing.only(used_BS.reshape(-1))
        y_TD, fill = self.exchange(x_BSD.reshape(-1, x_BSD.shape[-1]), routing, self.experts)
        y_BSD = y_TD.reshape(x_BSD.shape)
        if used_BS is not None:  # rows of no expert may hold anything, and the values of a NaN key make NaN of all who look past it
            y_BSD = jnp.where(used_BS[..., None], y_BSD, 0)
        if hasattr(self, "shared_experts"):
            y_BSD = y_BSD + self.shared_experts(x_BSD)
        return y_BSD, routing.stats._replace(fill=fill)
