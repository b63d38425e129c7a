"""A chunk of layers as a pipeline rank runs it: forward, gradient of the input, gradients of the weights.

The forward keeps what the decoder's `remat` says, of each layer. The gradient of the input computes the rest once more and leaves a stash,
the operands (x, dy) of every weight gradient that is a large product (`precision.Tap`); those gradients are made of the stash, with nothing
computed twice. What is small (norms, the router) gets its gradient at once. A full backward is the one after the other.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.model import Decoder, module
from dsv3_jax.model.attention import Positions
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.precision import FP8_WEIGHTS, Recipe, Tap, attach, forms, overflow_counters, weight_gradient


class Weights(NamedTuple):
    """A layer's parameters (or a stack's, or their gradients). small: norms and router, the float32 masters, and in FP8 recipes
    `overflow_counters`; large: the weights of FP8_WEIGHTS, masters or their `forms`."""

    small: dict
    large: dict

    @classmethod
    def of(cls, params: Mapping) -> "Weights":
        """Split masters."""
        return cls(_select(params, lambda name: name not in FP8_WEIGHTS), _select(params, lambda name: name in FP8_WEIGHTS))

    def for_products(self, recipe: Recipe) -> "Weights":
        """Masters as products read them."""
        return Weights(attach(self.small, overflow_counters(self.large, recipe)), forms(self.large, recipe))

    def for_travel(self, recipe: Recipe) -> "Weights":
        """Masters as they are brought to where `for_products` is called: in no more bytes than it needs. FP8 takes whole blocks of them."""
        cast = lambda w: w if recipe.fp8 else w.astype(recipe.compute_dtype)  # noqa: E731
        return self._replace(large=jax.tree.map(cast, self.large))


class Stash(NamedTuple):
    """What one layer leaves for its weight gradients. taps: {name_tap: Tap} in the structure of the parameters; group_sizes int32: rows
    of each expert of this device ([0] in a dense layer)."""

    taps: dict
    group_sizes: jax.Array


class Kept(NamedTuple):
    """What one layer keeps of its forward for its backward. values: in the order in which the backward takes them; group_sizes int32: rows
    of each expert of this device ([0] in a dense layer)."""

    values: tuple[jax.Array, ...]
    group_sizes: jax.Array


class Place(NamedTuple):
    """A slot of a ring (leaves [slots, ...]), not read yet: a layer that is not there does not read it."""

    ring: Any
    slot: jax.Array

    def read(self) -> Any:
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, self.slot, keepdims=False), self.ring)


class Program:
    """A layer of a stack, forward and backward, as functions of its parameters. Traced once, however many layers and actions run them."""

    def __init__(self, decoder: Decoder, stack: str, shapes: dict):
        self.decoder, self.stack, self.shapes, self.routed_rows = decoder, stack, shapes, None
        self.forward, self.backward = jax.jit(self._forward), jax.jit(self._backward)

    def _forward(self, small, large, x_BSD, where) -> tuple[jax.Array, RouterStats, Kept]:
        """(output, statistics, what is kept)"""
        jax.eval_shape(self._run, small, large, {}, x_BSD, where)  # tells the number of routed rows
        given = small, large, self.zero_taps(x_BSD.shape[0] * x_BSD.shape[1]), where

        def run(x_BSD, small, taps):
            y_BSD, stats, group_sizes = self._run(small, large, taps, x_BSD, where)
            return (y_BSD, stats.balance_loss), (stats, group_sizes)

        (y_BSD, _), transpose, (stats, group_sizes) = jax.vjp(self.decoder.rematerialised(run), x_BSD, small, given[2], has_aux=True)
        # The transpose holds arrays: those that it was given it gets again in `_backward`, all others are kept.
        leaves, self._transpose = jax.tree.flatten(transpose)
        places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(given))}
        self._places = [places.get(id(leaf)) for leaf in leaves]
        return y_BSD, stats, Kept(tuple(leaf for leaf, place in zip(leaves, self._places) if place is None), group_sizes)

    def _backward(self, small, large, kept: Kept, where, dy_BSD, balance_weight) -> tuple[jax.Array, dict, "Stash"]:
        """(dx, gradients of the small weights, stash), of a layer whose `forward` has been traced."""
        given = jax.tree.leaves((small, large, self.zero_taps(dy_BSD.shape[0] * dy_BSD.shape[1]), where))
        values = iter(kept.values)
        transpose = jax.tree.unflatten(self._transpose, [next(values) if place is None else given[place] for place in self._places])
        dx_BSD, d_small, taps = transpose((dy_BSD, balance_weight))  # the cotangents of the taps are the stash
        return dx_BSD, d_small, Stash(taps, kept.group_sizes)

    def _run(self, small, large, taps, x_BSD, where) -> tuple[jax.Array, RouterStats, jax.Array]:
        """(output, statistics, group sizes)"""
        # Products read the forms, and of their masters, which take no gradient here either, no more than the shapes.
        masters = _rename(self.shapes, "", lambda _, shape: jnp.zeros(shape.shape, self.decoder.recipe.compute_dtype))
        layer = module.bind(self.decoder.modules[self.stack], attach(small, large, taps, masters))
        if self.stack == "dense_layers":
            return *layer(x_BSD, where), jnp.zeros((0,), jnp.int32)
        seen, exchange = [], layer.mlp.exchange
        layer.mlp.exchange = lambda x, routing, experts: exchange(x, routing, _Watched(experts, seen))
        y_BSD, stats = layer(x_BSD, where)
        [(self.routed_rows, group_sizes)] = seen
        return y_BSD, stats, group_sizes

    def zero_taps(self, num_tokens: int) -> dict:
        """Zeros for every large weight, once `routed_rows`, the rows of the experts on this device, are known."""

        def tap(path, shape):
            rows = self.routed_rows if "experts" in path else num_tokens
            return Tap.zeros(rows, shape.shape, self.decoder.recipe, grouped="experts" in path)

        return _rename(self.shapes, "_tap", tap)


class Layer(NamedTuple):
    """One layer on this rank, inside `shard_map`.

    weights: for products. present: bool, whether this rank has the layer (True: every rank has). It may differ along `pipe` only, so that
    its collectives are complete.
    """

    program: Program
    weights: Weights
    present: Any

    def forward(self, x_BSD: jax.Array, where: Positions) -> tuple[jax.Array, RouterStats, Kept]:
        """`Program.forward`; without a layer the input, zeros and nothing that is kept."""
        args = *self.weights, x_BSD, where
        _, stats, kept = jax.eval_shape(self.program.forward, *args)
        return self._where_present(self.program.forward, lambda small, large, x, where: (x, zeros(stats), empty(kept)), *args)

    def backward(self, kept: Place, where: Positions, dy_BSD: jax.Array, balance_weight, sums: Weights) -> tuple[jax.Array, Weights]:
        """(dx, sums plus the gradients of all weights); without a layer the cotangent and the sums as they are."""

        def run(weights, kept, where, dy_BSD, balance_weight, sums):
            dx_BSD, small, stash = self.program.backward(*weights, kept.read(), where, dy_BSD, balance_weight)
            return dx_BSD, Weights(_add(sums.small, small), self._add_large(sums.large, stash))

        args = self.weights, kept, where, dy_BSD, balance_weight, sums
        return self._where_present(run, lambda weights, kept, where, dy_BSD, _, sums: (dy_BSD, sums), *args)

    def backward_input(self, kept: Place, where: Positions, dy_BSD: jax.Array, balance_weight, sums: Weights):
        """The half of it without the large weights: (dx, sums, stash); without a layer there is nothing in the stash."""

        def run(weights, kept, where, dy_BSD, balance_weight, sums):
            dx_BSD, small, stash = self.program.backward(*weights, kept.read(), where, dy_BSD, balance_weight)
            return dx_BSD, sums._replace(small=_add(sums.small, small)), stash

        args = self.weights, kept, where, dy_BSD, balance_weight, sums
        *_, stash = jax.eval_shape(run, *args)
        return self._where_present(run, lambda weights, kept, where, dy_BSD, _, sums: (dy_BSD, sums, empty(stash)), *args)

    def backward_weights(self, stash: Place, sums: Weights) -> Weights:
        """The other half: sums plus the gradients that the stash holds."""
        run = lambda stash, sums: sums._replace(large=self._add_large(sums.large, stash.read()))  # noqa: E731
        return self._where_present(run, lambda stash, sums: sums, stash, sums)

    def _add_large(self, sums: dict, stash: Stash) -> dict:
        def add(path, total):
            tap, sizes = _lookup(stash.taps, path, "_tap"), stash.group_sizes if "experts" in path else None
            return total + weight_gradient(tap, total.shape, sizes, self.program.decoder.recipe)

        return _rename(sums, "", add)

    def _where_present(self, run, otherwise, *args):
        return run(*args) if self.present is True else lax.cond(self.present, run, otherwise, *args)


class _Watched:
    """Experts that note what an exchange hands them: the weight gradients need the group sizes too."""

    def __init__(self, experts, seen: list):
        self._experts, self._seen = experts, seen

    def __call__(self, x_RD, group_sizes_E, weights_R):
        self._seen.append((x_RD.shape[0], group_sizes_E))
        return self._experts(x_RD, group_sizes_E, weights_R)

    def __getattr__(self, name):
        return getattr(self._experts, name)


class Stage(NamedTuple):
    """A chunk of layers on this rank."""

    layers: tuple[Layer, ...]

    def forward(self, x_BSD: jax.Array, where: Positions) -> tuple[jax.Array, tuple[RouterStats, ...], tuple[Kept, ...]]:
        """[B, S, D] -> [B, S, D]; for each layer: router statistics, what is kept."""
        stats, kept = [], []
        for layer in self.layers:
            x_BSD, *found = layer.forward(x_BSD, where)
            stats.append(found[0])
            kept.append(found[1])
        return x_BSD, tuple(stats), tuple(kept)

    def backward(
        self, kept: tuple[Place, ...], where: Positions, dy_BSD: jax.Array, balance_weight: jax.Array, sums: tuple[Weights, ...]
    ) -> tuple[jax.Array, tuple[Weights, ...]]:
        """From what the forward kept and the cotangent of its output: (dx, for each layer sums plus the gradients of its weights).
        balance_weight: of each layer's balance loss in the total loss."""
        added = []
        for layer, place, total in zip(reversed(self.layers), reversed(kept), reversed(sums), strict=True):
            dy_BSD, total = layer.backward(place, where, dy_BSD, balance_weight, total)
            added.append(total)
        return dy_BSD, tuple(reversed(added))

    def backward_input(
        self, kept: tuple[Place, ...], where: Positions, dy_BSD: jax.Array, balance_weight: jax.Array, sums: tuple[Weights, ...]
    ) -> tuple[jax.Array, tuple[Weights, ...], tuple[Stash, ...]]:
        """`backward` without the large weights: (dx, sums, for each layer the stash)."""
        found = []
        for layer, place, total in zip(reversed(self.layers), reversed(kept), reversed(sums), strict=True):
            dy_BSD, *of_layer = layer.backward_input(place, where, dy_BSD, balance_weight, total)
            found.append(of_layer)
        added, stash = zip(*reversed(found))
        return dy_BSD, added, stash

    def backward_weights(self, stash: tuple[Place, ...], sums: tuple[Weights, ...]) -> tuple[Weights, ...]:
        """For each layer `Layer.backward_weights`."""
        return tuple(layer.backward_weights(*args) for layer, *args in zip(self.layers, stash, sums, strict=True))


def zeros(tree: Any) -> Any:
    """Zeros of such shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def empty(tree: Any) -> Any:
    """Arrays of such shapes and dtypes that nobody reads: on a GPU nothing is written there."""
    return jax.tree.map(lambda leaf: lax.empty(leaf.shape, leaf.dtype), tree)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def _select(tree: Mapping, wanted) -> dict:
    chosen = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            if inner := _select(leaf, wanted):
                chosen[name] = inner
        elif wanted(name):
            chosen[name] = leaf
    return chosen


def _rename(tree: Mapping, suffix: str, make, path: tuple[str, ...] = ()) -> dict:
    """{name + suffix: make(path, leaf)} in the structure of the tree."""
    return {
        name if isinstance(leaf, Mapping) else name + suffix: (
            _rename(leaf, suffix, make, (*path, name)) if isinstance(leaf, Mapping) else make((*path, name), leaf)
        )
        for name, leaf in tree.items()
    }


def _lookup(tree: Mapping, path: tuple[str, ...], suffix: str) -> Any:
    for name in path[:-1]:
        tree = tree[name]
    return tree[path[-1] + suffix]
