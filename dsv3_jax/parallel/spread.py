"""A training step over the axes data and expert (and pipe=1): one `shard_map`, manual over all axes.

What a step keeps (float32 masters, moments) lies in shards, ZeRO-1 (sharding.py). A step gathers the weights once, every device computes
gradients of its own rows with them, tokens going to experts on other devices and back (exchange.py), and the gradients are reduced once, to
the shards they belong to. Everything after that, norm, clipping and the optimizer, is plain JAX over sharded arrays.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.model import Decoder
from dsv3_jax.parallel import exchange, sharding

_WHOLE = PartitionSpec()


class Spread:
    """A decoder on a mesh.

    shardings: of every parameter's master, in the structure of the parameters. batch_sharding: of a batch's rows.
    """

    def __init__(self, decoder: Decoder, mesh: Mesh):
        self.mesh, self._decoder = mesh, decoder
        self._axes, self._shapes = decoder.logical_axes(), decoder.abstract_params()
        self.shardings = sharding.state_shardings(self._axes, self._shapes, mesh)
        self.batch_sharding = NamedSharding(mesh, sharding.batch_spec(mesh.shape))
        self._rows = sharding.mesh_axes(sharding.BATCH, mesh.shape)
        self._devices = mesh.size

    @property
    def has_buffers(self) -> bool:
        """Whether tokens travel through buffers that may turn out too small."""
        return any(self.mesh.shape[axis] > 1 for axis in sharding.expert_axes(self.mesh.shape))

    def decoder(self, size: float) -> Decoder:
        """The decoder with the exchange of this mesh in it, its buffers of that size (`buffers.SIZES`)."""
        d = self._decoder
        return Decoder(d.config, d.recipe, remat=d.remat, exchange=exchange.over_mesh(d.config, self.mesh.shape, size))

    def gradients(self, local: Callable) -> Callable:
        """The whole batch's (gradients, loss, terms) as a function (weights, others, batch, *scalars) of sharded arrays.

        local(weights, others, batch, *scalars): the same of one device's rows, with whole weights; `weights` are what is differentiated.
        Losses are means over devices, whose batches have one size (see `mean`); of the terms "load" and "overflow" are summed, of "fill"
        the largest is taken.
        """

        def spread(weights, others, batch, *scalars):
            def here(weights, others, batch, *scalars):
                gradients, loss, terms = local(self._gathered(weights), self._gathered(others), batch, *scalars)
                terms = dict(terms)
                load, overflow = lax.psum((terms.pop("load"), terms.pop("overflow")), self._rows)
                fill = lax.pmax(terms.pop("fill"), self._rows)
                loss, terms = self.mean((loss, terms))
                return self._reduced(gradients), loss, {**terms, "load": load, "overflow": overflow, "fill": fill}

            specs = self._specs(weights), self._specs(others), sharding.batch_spec(self.mesh.shape), *[_WHOLE] * len(scalars)
            return self._map(here, specs, (specs[0], _WHOLE, _WHOLE))(weights, others, batch, *scalars)

        return spread

    def sums(self, local: Callable) -> Callable:
        """The sum over devices of what local(params, batch) gives first, and the largest of what it gives second (the fill)."""

        def spread(params, batch):
            def here(params, batch):
                totals, fill = local(self._gathered(params), batch)
                return lax.psum(totals, self._rows), lax.pmax(fill, self._rows)

            return self._map(here, (self._specs(params), sharding.batch_spec(self.mesh.shape)), (_WHOLE, _WHOLE))(params, batch)

        return spread

    def mean(self, tree: Any) -> Any:
        """The mean over devices, inside of a `local`."""
        return lax.pmean(tree, self._rows)

    def _map(self, function, in_specs, out_specs):
        # check_vma would make autodiff put reductions into the middle of the backward pass; here they come once, at its end.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _specs(self, params):
        return jax.tree.map(lambda s: s.spec, _part(self.shardings, params))

    def _gathered(self, params):
        """Whole weights (experts: those of this device) from the shards of their masters."""
        return self._each(gather, params)

    def _reduced(self, gradients):
        """The mean over devices, each shard where its master is. An expert's gradient holds the tokens of all expert devices already."""
        return self._each(lambda gradient, splits: reduce(gradient, splits) / self._devices, gradients)

    def _each(self, function, params):
        def one(names, whole, leaf):
            return function(leaf, sharding.splits(names, whole.shape, self.mesh.shape))

        return jax.tree.map(one, _part(self._axes, params), _part(self._shapes, params), params, is_leaf=sharding.is_names)


def gather(shard: jax.Array, splits: Iterable[sharding.Split]) -> jax.Array:
    """The whole from the shards that `splits` made."""
    for split in reversed(list(splits)):
        if split.dimension is not None:
            shard = lax.all_gather(shard, split.axes, axis=split.dimension, tiled=True)
    return shard


def reduce(gradient: jax.Array, splits: Iterable[sharding.Split]) -> jax.Array:
    """The transpose: the sum over the devices of those axes, of which each keeps its shard."""
    for split in splits:
        if split.dimension is not None:
            gradient = lax.psum_scatter(gradient, split.axes, scatter_dimension=split.dimension, tiled=True)
        elif split.axes:
            gradient = lax.psum(gradient, split.axes)
    return gradient


def _part(tree: dict, like: dict) -> dict:
    """The entries of `tree` that `like` has."""
    return {name: _part(tree[name], value) if isinstance(value, dict) else tree[name] for name, value in like.items()}
