"""Compiles for a Hopper GPU on a machine that has none, down to machine code, and reads what ptxas says about the kernels.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt, of the version of jax and without their dependencies (the dependency group `aot`).

    with kernels_compiled() as kernels:
        jax.jit(f).lower(*on_h200(specs)).compile()
    assert all(kernel.spilled_bytes == 0 for kernel in kernels)
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGET = pathlib.Path(__file__).parent / "data" / "nvidia_h200.target_config.textproto"  # what XLA must know of the GPU, from a real one


def available() -> bool:
    """Whether the compiler for CUDA is installed."""
    return importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


@functools.cache
def hopper(num_devices: int = 1) -> tuple:
    """So many H200s that need not exist, in hosts of up to eight."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check looks for a driver
    local = math.gcd(num_devices, 8)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=TARGET.read_text(), topology=f"1x{num_devices // local}x{local}"
    )
    return tuple(topology.devices)


def h200(num_devices: int = 1) -> Mesh:
    """A mesh of such GPUs with one axis "x"."""
    return Mesh(np.array(hopper(num_devices)), ("x",))


def on_h200(tree):
    """The shapes and dtypes of `tree`, as arguments on one such GPU."""
    sharding = NamedSharding(h200(), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas said about one kernel. serialized: it could not keep several WGMMAs in flight, which costs half of the speed."""

    registers: int
    spilled_bytes: int
    serialized: bool


@contextlib.contextmanager
def kernels_compiled():
    """Collects the Mosaic kernels that are compiled inside of the context: a list of `Kernel`s that is filled at its end."""
    kernels = []
    with tempfile.TemporaryDirectory() as directory:
        saved = {name: os.environ.get(name) for name in ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_TO")}
        os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_TO=directory)
        try:
            yield kernels
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        kernels += [_parse(file.read_text()) for file in sorted(pathlib.Path(directory).glob("*.ptxas"))]


def _parse(log):
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)] + [int(n) for n in re.findall(r"(\d+) bytes spill loads", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    return Kernel(max(registers), sum(spills), "serializ" in log)
