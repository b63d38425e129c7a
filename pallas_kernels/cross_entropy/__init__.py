"""The gradient of a softmax cross entropy by its logits, in one pass over them."""

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.cross_entropy import hopper, reference
from pallas_kernels.cross_entropy.reference import log_sum_exp  # noqa: F401
from pallas_kernels.platform import dispatch


def cross_entropy_gradient(logits, targets, weights, *, dtype=jnp.bfloat16, implementation=None) -> tuple[jax.Array, jax.Array]:
    """Of sum(weights * -log softmax(logits)[targets]), computed in float32.

    logits float32 [T, W]; targets int32 [T]; weights float32 [T] -> (gradient by logits [T, W] in `dtype`, the logits' log-sum-exp float32
    [T]). In bfloat16 the kernel rounds twice: exponentials, and the gradient. It takes W of a multiple of 4,096 up to 36,864 and makes
    bfloat16: with implementation=None all else is plain JAX on any device. Raises ValueError for wrong dtypes or shapes, and for those that
    the kernel does not take with implementation="hopper".
    """
    ok = getattr(logits, "ndim", None) == 2 and logits.dtype == jnp.float32
    checks.expect(ok, "logits", logits, "float32 [T, W]")
    for name, x, kind in (("targets", targets, jnp.int32), ("weights", weights, jnp.float32)):
        ok = getattr(x, "shape", None) == logits.shape[:1] and x.dtype == kind
        checks.expect(ok, name, x, f"{jnp.dtype(kind).name} [{len(logits)}], one for each row")
    if not hopper.supports(logits, jnp.dtype(dtype)):
        checks.expect(implementation != "hopper", "logits", logits, "for a bfloat16 gradient, W of a multiple of 4096 up to 36864")
        implementation = implementation or "reference"
    functions = {"hopper": hopper.cross_entropy_gradient, "reference": reference.cross_entropy_gradient}
    return dispatch("cross_entropy_gradient", implementation, logits, targets, weights, dtype=jnp.dtype(dtype), **functions)
