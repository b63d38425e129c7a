"""Which mesh axis each logical axis of an array lies over: the one place that says so.

                              data   pipe           expert
    batch                      x                      x
    dense weights                    layers
    expert weights                   layers         experts
    what training keeps of them:
    masters, moments (dense)   x       x              x       ZeRO-1: a shard on every device that
    masters, moments (expert)  x       x            experts   repeats the weight

The layers of a pipeline rank are a matter of its schedule and do not divide evenly (placement.py), so what is kept, which is canonical,
lies over `pipe` by another dimension. `expert` may be split into `node` x `local`; it is then both of them wherever it stands here.
Functions take the sizes of the mesh axes (`mesh.shape`), and leave out axes that a mesh does not have. tests/data/sharding_671b.json has
it for every parameter of the 671B model.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = {"experts": "expert"}  # of weights; embed, heads, q_latent, kv_latent, mlp, vocab are whole everywhere
BATCH = ("data", "expert")
REPLICAS = (("data", "expert"), ("pipe",))  # the axes over which a weight's masters are split, unless it lies over them anyway


class Split(NamedTuple):
    """A weight's master is split over mesh axes along a dimension; None where none divides: it is then repeated over them."""

    dimension: int | None
    axes: tuple[str, ...]


def expert_axes(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that stand for `expert`."""
    return ("node", "local") if "node" in sizes else ("expert",)


def mesh_axes(names: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the table as axes of a mesh with those sizes."""
    axes = [axis for name in names for axis in (expert_axes(sizes) if name == "expert" else (name,))]
    return tuple(axis for axis in axes if axis in sizes)


def weight_spec(logical: tuple[str | None, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a weight lies in the forward and backward pass, from the logical names of its axes."""
    return PartitionSpec(*[_entry(mesh_axes((RULES[name],), sizes)) if name in RULES else None for name in logical])


def state_spec(logical: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a weight's master and moments lie: split further over the axes that repeat it (`splits`)."""
    over = [mesh_axes((RULES[name],), sizes) if name in RULES else () for name in logical]
    for split in splits(logical, shape, sizes):
        if split.dimension is not None:
            over[split.dimension] += split.axes
    return PartitionSpec(*map(_entry, over))


def splits(logical: tuple[str | None, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Split, Split]:
    """How ZeRO-1 splits a weight: over data and expert, then over pipe, each along the largest dimension that it divides.

    Axes without any effect, of size 1 altogether, are left out.
    """
    taken, left, found = {RULES[name] for name in logical if name in RULES}, list(shape), []
    for group in REPLICAS:
        axes = mesh_axes(tuple(name for name in group if name not in taken), sizes)
        parts = math.prod(sizes[axis] for axis in axes)
        free = [i for i, name in enumerate(logical) if name not in RULES and name != "layers" and left[i] % parts == 0]
        if parts == 1:
            found.append(Split(None, ()))
            continue
        dimension = max(free, key=lambda i: left[i]) if free else None
        if dimension is not None:
            left[dimension] //= parts
        found.append(Split(dimension, axes))
    return tuple(found)


def batch_spec(sizes: Mapping[str, int]) -> PartitionSpec:
    """Rows of a batch, over data x expert."""
    return PartitionSpec(mesh_axes(BATCH, sizes))


def param_shardings(axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each weight as the model computes with it, from its logical axis names (`Decoder.logical_axes`, or
    `precision.fp8_axes` of them)."""
    return jax.tree.map(lambda names: NamedSharding(mesh, weight_spec(names, mesh.shape)), axes, is_leaf=is_names)


def state_shardings(axes: Any, params: Any, mesh: Mesh) -> Any:
    """A NamedSharding for the master (and the moments) of each parameter; `params`: arrays or shapes."""
    return jax.tree.map(lambda names, p: NamedSharding(mesh, state_spec(names, p.shape, mesh.shape)), axes, params, is_leaf=is_names)


def is_names(leaf: Any) -> bool:
    """Whether this is a leaf of a tree of logical axis names."""
    return isinstance(leaf, tuple)


def table(axes: Any, params: Any, sizes: Mapping[str, int]) -> dict[str, dict]:
    """Every parameter by its path: shape, logical names, and the mesh axes of each dimension as weight and as state."""
    rows = {}
    for (path, names), leaf in zip(jax.tree.leaves_with_path(axes, is_leaf=is_names), jax.tree.leaves(params), strict=True):
        rows["/".join(key.key for key in path)] = {
            "shape": list(leaf.shape),
            "logical": list(names),
            "weight": list(weight_spec(names, sizes)),
            "state": list(state_spec(names, leaf.shape, sizes)),
        }
    return rows


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes[0] if len(axes) == 1 else axes or None
