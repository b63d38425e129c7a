"""A chunk of layers as a pipeline rank runs it: forward, gradient of the input, gradients of the weights.

The forward keeps nothing but its input. The gradient of the input computes the forward once more and leaves a stash, the operands (x, dy)
of every weight gradient that is a large product (`precision.Tap`); those gradients are made of the stash, with nothing computed twice.
What is small (norms, the router) gets its gradient at once. A full backward is the one after the other.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.model import Decoder, module
from dsv3_jax.model.attention import Positions
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.precision import FP8_WEIGHTS, Tap, attach, quantize_params, weight_gradient


class Weights(NamedTuple):
    """A layer's parameters (or a stack's, or their gradients). small: norms and router, the float32 masters; large: the weights of
    FP8_WEIGHTS, in the compute dtype or as FP8 forms."""

    small: dict
    large: dict

    @classmethod
    def of(cls, params: Mapping) -> "Weights":
        """Split masters."""
        return cls(_select(params, lambda name: name not in FP8_WEIGHTS), _select(params, lambda name: name in FP8_WEIGHTS))

    def for_products(self, recipe) -> "Weights":
        """Masters as products read them."""
        if recipe.fp8:
            return self._replace(large=quantize_params(self.large, recipe))
        return self._replace(large=jax.tree.map(lambda w: w.astype(recipe.compute_dtype), self.large))


class Stash(NamedTuple):
    """What one layer leaves for its weight gradients. taps: {name_tap: Tap} in the structure of the parameters; group_sizes int32: rows
    of each expert of this device ([0] in a dense layer)."""

    taps: dict
    group_sizes: jax.Array


class Program:
    """A layer of a stack as a function of its parameters. Traced once, however many layers and actions run it."""

    def __init__(self, decoder: Decoder, stack: str, shapes: dict):
        self.decoder, self.stack, self.shapes, self.routed_rows = decoder, stack, shapes, None
        self.run = jax.jit(self._run)

    def _run(self, small, large, taps, x_BSD, where) -> tuple[jax.Array, RouterStats, jax.Array]:
        """(output, statistics, group sizes); the cotangents of the taps are the stash."""
        params = attach(small, large, taps)
        if self.decoder.recipe.fp8:  # the products read the FP8 forms, which carry no shape of their masters: these are never read
            params = attach(params, _rename(self.shapes, "", lambda _, shape: jnp.zeros(shape.shape, self.decoder.recipe.compute_dtype)))
        layer = module.bind(self.decoder.modules[self.stack], params)
        if self.stack == "dense_layers":
            return *layer(x_BSD, where), jnp.zeros((0,), jnp.int32)
        seen, exchange = [], layer.mlp.exchange
        layer.mlp.exchange = lambda x, routing, experts: exchange(x, routing, _Watched(experts, seen))
        y_BSD, stats = layer(x_BSD, where)
        [(self.routed_rows, group_sizes)] = seen
        return y_BSD, stats, group_sizes

    def taps(self, weights: Weights, x_BSD: jax.Array, where: Positions) -> dict:
        """Zeros for every large weight."""
        jax.eval_shape(self.run, *weights, {}, x_BSD, where)  # tells the number of routed rows
        return self.zero_taps(x_BSD.shape[0] * x_BSD.shape[1])

    def zero_taps(self, num_tokens: int) -> dict:
        """The same once `routed_rows`, the rows of the experts on this device, are known."""

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

    def forward(self, x_BSD: jax.Array, where: Positions) -> jax.Array:
        present = lambda weights, x, where: self.program.run(*weights, {}, x, where)[0]  # noqa: E731
        return self._where_present(present, lambda weights, x, where: x, self.weights, x_BSD, where)

    def differentiable(self, small: dict, taps: dict, x_BSD: jax.Array, where: Positions) -> tuple[jax.Array, RouterStats, jax.Array]:
        """`Program.run`; without a layer the input and zeros."""
        args = small, self.weights.large, taps, x_BSD, where
        _, *others = jax.eval_shape(self.program.run, *args)
        return self._where_present(self.program.run, lambda small, large, taps, x, where: (x, *zeros(others)), *args)

    def add_weight_gradients(self, sums: dict, stash: Stash) -> dict:
        """sums (float32, in the structure of the large masters) plus the gradients that the stash holds."""

        def add(sums, stash):
            def of(path, total):
                tap, sizes = _lookup(stash.taps, path, "_tap"), stash.group_sizes if "experts" in path else None
                return total + weight_gradient(tap, total.shape, sizes, self.program.decoder.recipe)

            return _rename(sums, "", of)

        return self._where_present(add, lambda sums, stash: sums, sums, stash)

    def _where_present(self, run, otherwise, *args):
        return run(*args) if self.present is True else lax.cond(self.present, run, otherwise, *args)


class _Watched:
    """Experts that note what an exchange hands them: the weight gradients need the group sizes too."""

    def __init__(self, experts, seen: list):
        self._experts, self._seen = experts, seen

    def __call__(self, x_RD, group_sizes_E, weights_R, *, filled=False):
        self._seen.append((x_RD.shape[0], group_sizes_E))
        return self._experts(x_RD, group_sizes_E, weights_R, filled=filled)

    def __getattr__(self, name):
        return getattr(self._experts, name)


class InputGradient(NamedTuple):
    """dx [B, S, D]; for each layer: gradients of the small weights, stash, router statistics."""

    dx_BSD: jax.Array
    small: tuple[dict, ...]
    stash: tuple[Stash, ...]
    stats: tuple[RouterStats, ...]


class Stage(NamedTuple):
    """A chunk of layers on this rank."""

    layers: tuple[Layer, ...]

    def forward(self, x_BSD: jax.Array, where: Positions) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        for layer in self.layers:
            x_BSD = layer.forward(x_BSD, where)
        return x_BSD

    def backward_input(self, x_BSD: jax.Array, where: Positions, dy_BSD: jax.Array, balance_weight: jax.Array) -> InputGradient:
        """From the stage's input and the cotangent of its output. balance_weight: of each layer's balance loss in the total loss."""

        def run(x, small, taps):
            stats, sizes = [], []
            for layer, small, taps in zip(self.layers, small, taps):  # noqa: B020
                x, layer_stats, layer_sizes = layer.differentiable(small, taps, x, where)
                stats.append(layer_stats)
                sizes.append(layer_sizes)
            return (x, [s.balance_loss for s in stats]), (tuple(stats), sizes)

        small = tuple(layer.weights.small for layer in self.layers)
        taps = tuple(layer.program.taps(layer.weights, x_BSD, where) for layer in self.layers)
        (_, balance), transpose, (stats, sizes) = jax.vjp(run, x_BSD, small, taps, has_aux=True)
        dx_BSD, d_small, operands = transpose((dy_BSD, [balance_weight.astype(b.dtype) for b in balance]))
        return InputGradient(dx_BSD, d_small, tuple(map(Stash, operands, sizes)), stats)

    def add_weight_gradients(self, sums: tuple[dict, ...], stash: tuple[Stash, ...]) -> tuple[dict, ...]:
        """For each layer `Layer.add_weight_gradients`."""
        return tuple(layer.add_weight_gradients(*args) for layer, *args in zip(self.layers, sums, stash, strict=True))


def zeros(tree: Any) -> Any:
    """Zeros of such shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


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
