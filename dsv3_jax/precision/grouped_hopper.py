"""BF16 grouped products on Hopper: JAX's own Pallas kernels, `ragged_dot` and `transposed_ragged_dot`, for any widths and SM count.

The kernels ship with JAX as examples. They take their SM count from a constant and from the tracing process's device, which a compile
for another machine has not: here both are handed it, by running the same functions with another `plgpu.kernel`.
"""

import functools
import types

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from pallas_kernels.platform import device_sms

# Of the tiles tried on an H200 (M 8192-32768, N and K 2048-7168, 4-64 groups) the best or near it everywhere.
_TILES = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 6, "grid_block_n": 8}


def grouped_matmul(
    x_RK, w, group_sizes_E, *, transposed: bool, filled: bool = False, num_sms: int | None = None, interpret=None
) -> jax.Array:
    """x wᵀ with w [E, N, K], or x w with w [E, K, N] if not transposed -> [R, N]; rows past the last group give zeros.

    filled: there are none, which saves a pass over the result.
    """
    axis_n, axis_k = (1, 2) if transposed else (2, 1)
    rows, n = x_RK.shape[0], w.shape[axis_n]
    x_RK, w = _pad(_pad(x_RK, 0, 8), 1, _TILES["block_k"]), _pad(_pad(w, axis_k, _TILES["block_k"]), axis_n, _TILES["block_n"])
    kernel = _on_sms(ragged_dot_mgpu.ragged_dot, num_sms, interpret)
    y_RN = kernel(x_RK, w, group_sizes=group_sizes_E, transpose_rhs=transposed, **_TILES)
    y_RN = y_RN[:rows, :n]
    return y_RN if filled else jnp.where(jnp.arange(rows)[:, None] < jnp.sum(group_sizes_E), y_RN, 0)  # the kernel leaves them unwritten


def grouped_matmul_weight_gradient(x_RK, dy_RN, group_sizes_E, *, num_sms: int | None = None, interpret=None) -> jax.Array:
    """Per group dyᵀ x, float32 [E, N, K], accumulated in float32 and rounded to bfloat16 once by the kernel."""
    k, n = x_RK.shape[1], dy_RN.shape[1]
    kernel = _on_sms(transposed_ragged_dot_mgpu.transposed_ragged_dot, num_sms, interpret)
    pad = lambda x: _pad(_pad(x, 0, 8), 1, 128)  # noqa: E731
    dw_ENK = kernel(pad(dy_RN), pad(x_RK), group_sizes=group_sizes_E, **_TILES)
    return dw_ENK[:, :n, :k].astype(jnp.float32)


def _pad(x, axis, multiple):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding) if padding[axis][1] else x


def _on_sms(function, num_sms, interpret):
    """The kernel function with a grid of that many SMs (None: all of the device's); interpret: as `plgpu.kernel` has it."""
    num_sms = num_sms or device_sms()

    def kernel(body, *, grid, **options):
        return plgpu.kernel(body, grid=(num_sms,), interpret=interpret, **options)

    # Names the function looks up: the device it would ask for its SMs, and the module whose `kernel` it calls.
    device = types.SimpleNamespace(core_count=num_sms)
    namespace = dict(function.__globals__)
    namespace["jax"] = _Overlay(jax, devices=lambda: [device])
    namespace["plgpu"] = _Overlay(plgpu, kernel=kernel)
    copy = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)


class _Overlay:
    """A module with some names replaced."""

    def __init__(self, module, **names):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)
