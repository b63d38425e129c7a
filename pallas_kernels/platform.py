"""Which implementation runs: the one rule for every op.

implementation=None         the kernel on a Hopper GPU (sm_90), the plain-JAX reference on a CPU, a ValueError anywhere else
implementation="hopper"     the kernel, or a ValueError
implementation="reference"  plain JAX, anywhere

The platform is known only when a computation is lowered (a CPU host may compile for a GPU), so the choice is made there and the error is
raised there: both before anything runs. Nothing falls back silently.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

IMPLEMENTATIONS = (None, "hopper", "reference")
HOPPER = "9.0"


def dispatch(op: str, implementation, *operands, hopper, reference, **options):
    """Calls `hopper(*operands, **options)` or `reference(*operands, **options)`: two module-level functions of one signature.

    `op` is named in errors; the options are static. Compiled once for each shape, as under `jax.jit`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected None, 'hopper' or 'reference', got {implementation!r}")
    return _dispatch(op, implementation, hopper, reference, tuple(sorted(options.items())), *operands)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _dispatch(op, implementation, hopper, reference, options, *operands):
    kernel = functools.partial(hopper, **dict(options))
    plain = functools.partial(reference, **dict(options))
    if implementation == "reference":
        return plain(*operands)
    if implementation == "hopper":
        return lax.platform_dependent(*operands, cuda=_on_hopper(op, kernel), default=_on_hopper(op, plain))
    return lax.platform_dependent(*operands, cpu=plain, cuda=_on_hopper(op, kernel), default=_on_hopper(op, plain))


def device_kind() -> str:
    """The GPU that kernels are tuned for: this process's, or an H200 where there is none and kernels can only be compiled for later."""
    return jax.local_devices(backend="gpu")[0].device_kind if jax.default_backend() == "gpu" else "NVIDIA H200"


def device_sms() -> int:
    """How many SMs that GPU has."""
    return jax.local_devices(backend="gpu")[0].core_count if jax.default_backend() == "gpu" else 132


def _on_hopper(op, function):
    """`function`, with results that refuse to be lowered for anything but a Hopper GPU.

    A kernel does not say over which axes of a `shard_map` its results vary, and both branches must say the same: over those of any operand.
    """

    def run(*operands):
        axes = frozenset().union(*(_varies_over(leaf) for leaf in jax.tree.leaves(operands)))

        def mark(leaf):
            missing = tuple(axes - _varies_over(leaf))
            return _hopper_only.bind(lax.pcast(leaf, missing, to="varying") if missing else leaf, op=op)

        return jax.tree.map(mark, lax.optimization_barrier(function(*_held_apart(operands))))

    return run


def _held_apart(operands):
    """XLA would fuse a kernel with the slice of a stacked array that it reads or writes, and (jax 0.11.2) compiles it there while it holds
    a lock that the kernel's compiler waits for: for ever. Rows of integers (lengths, group sizes) are not slices of a stack: what is made
    of them before the kernel, XLA may make once for all layers."""
    leaves, structure = jax.tree.flatten(operands)
    held = [i for i, leaf in enumerate(leaves) if leaf.ndim != 1 or not jnp.issubdtype(leaf.dtype, jnp.integer)]
    for i, leaf in zip(held, lax.optimization_barrier([leaves[i] for i in held])):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def _varies_over(x) -> frozenset:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _lower_hopper_only(ctx, x, *, op):
    platforms = ctx.module_context.platforms
    if tuple(platforms) != ("cuda",):
        raise ValueError(
            f"{op}: implementation='hopper' needs an NVIDIA Hopper GPU (sm_90), and this is being compiled for {'/'.join(platforms)}"
        )
    for capability in _local_capabilities():
        if capability != HOPPER:
            raise ValueError(f"{op}: needs an NVIDIA Hopper GPU (sm_90), and this machine's has compute capability {capability}")
    return [x]


def _local_capabilities() -> set[str]:
    """Compute capabilities of the GPUs of this process; empty where there are none (compiling ahead of time, for another machine)."""
    if jax.default_backend() != "gpu":
        return set()
    return {device.compute_capability for device in jax.local_devices(backend="gpu")}


_hopper_only = Primitive("hopper_only")  # the identity, wherever it may run
_hopper_only.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_hopper_only, _lower_hopper_only)
batching.primitive_batchers[_hopper_only] = lambda xs, dims, **params: (_hopper_only.bind(*xs, **params), dims[0])
