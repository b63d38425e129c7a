"""Serving on a mesh: attention is data-parallel, each device (a rank, data x expert) computes its own rows over its own pages; experts
lie over `expert`, and tokens travel to them (parallel/replicas.py). Without a mesh there is one rank, and nothing of this."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.errors import UserError
from dsv3_jax.model import Decoder
from dsv3_jax.parallel.replicas import Dropless
from dsv3_jax.parallel.sharding import BATCH, mesh_axes

WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh (None: one device). Compared by value, as a static argument of `jax.jit`."""

    mesh: Mesh | None = None

    @classmethod
    def of(cls, mesh: Mesh | None) -> "Ranks":
        """Raises UserError for a mesh that serving has no use for."""
        if mesh is None or mesh.size == 1:
            return cls()
        if mesh.shape.get("pipe", 1) > 1:
            raise UserError(f"pipe={mesh.shape['pipe']} is not for serving: choose data and expert, for example expert={mesh.size}")
        if "node" in mesh.shape:
            raise UserError(f"serving takes expert in one piece: expert={mesh.shape['node'] * mesh.shape['local']}")
        if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
            raise UserError("serving runs in one process: choose a mesh over the devices of this host")
        return cls(mesh)

    @property
    def axes(self) -> tuple[str, ...]:
        return mesh_axes(BATCH, self.mesh.shape) if self.mesh else ()

    @property
    def count(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1

    @property
    def expert_parts(self) -> int:
        return self.mesh.shape["expert"] if self.mesh else 1

    @property
    def devices(self) -> list:
        return list(self.mesh.devices.flat) if self.mesh else jax.local_devices()[:1]

    # How arrays lie: rows [B, ...] and pages [L, P, ...] in parts of equal size, one to a rank.

    @property
    def rows(self) -> PartitionSpec:
        return PartitionSpec(self.axes)

    @property
    def pages(self) -> PartitionSpec:
        return PartitionSpec(None, self.axes)

    def param_specs(self, params: Any) -> Any:
        """Of parameters as `Decoder.decode_params` gives them: what is under `experts` leads with the experts' axis, the rest is whole."""

        def spec(path, _):
            names = [getattr(key, "key", None) for key in path]
            return PartitionSpec("expert") if "experts" in names and names[-1] != "slots" else WHOLE

        return jax.tree.map_with_path(spec, params)

    def decode_params(self, decoder: Decoder, params: dict, *, consume: bool) -> dict:
        """`Decoder.decode_params`, quantised in plain JAX on a mesh: XLA can spread that over devices, and no kernel."""
        if self.mesh is not None and decoder.recipe.fp8:
            recipe = dataclasses.replace(decoder.recipe, fp8="reference")
            decoder = Decoder(decoder.config, recipe)
        return decoder.decode_params(params, consume=consume)

    def sharding(self, spec: PartitionSpec) -> Sharding:
        return NamedSharding(self.mesh, spec) if self.mesh else SingleDeviceSharding(self.devices[0])

    def place(self, params: Any) -> Any:
        """Those parameters where they are used; what lies there stays."""
        if self.mesh is None:
            return params
        return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(self.mesh, spec)), params, self.param_specs(params))

    def put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array | np.ndarray:
        """A host array where a step uses it; one device gets it with the program's call, which is quicker."""
        return jax.device_put(array, NamedSharding(self.mesh, spec)) if self.mesh else array

    def full(self, array: jax.ShapeDtypeStruct, spec: PartitionSpec, value: float = 0) -> jax.Array:
        """Committed to its place, as what comes of loaded weights is: programs would be compiled again for the step after the first."""
        return jnp.full(array.shape, value, array.dtype, device=self.sharding(spec))

    def hold(self, tree: Any, spec: PartitionSpec) -> Any:
        """Inside of `jax.jit`: the arrays, which come out lying so. Programs that follow are then compiled once."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)), tree)

    def decoder(self, decoder: Decoder) -> Decoder:
        """The decoder whose tokens reach the experts of all ranks."""
        if self.expert_parts == 1:
            return decoder
        return Decoder(decoder.config, decoder.recipe, exchange=Dropless.over(decoder.config, self.mesh))

    def run(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on every rank at once, with its parts of what it is called with."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over ranks, inside of `run`."""
        return lax.psum(x, self.axes) if self.mesh else x


ONE_DEVICE = Ranks()
