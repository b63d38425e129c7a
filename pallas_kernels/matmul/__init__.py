"""`fp8_matmul`: the dense FP8 product (DeepSeek-V3 report, section 3.3.2: partial sums promoted to float32 every 128 of K)."""

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.matmul import hopper, reference
from pallas_kernels.platform import dispatch


def fp8_matmul(a, b, *, out_dtype=jnp.bfloat16, num_sms=None, implementation=None) -> jax.Array:
    """a @ b.T in float32, rounded to `out_dtype` once.

    Args:
      a: Quantized tiles [M, K], any M >= 1.
      b: Quantized blocks [N, K]. N and K of any size; multiples of 64 and 128 need no copy.
      out_dtype: bfloat16 or float32.
      num_sms: on how many SMs the kernel runs, all of the device's if None; fewer leaves room for communication.
      implementation: see `pallas_kernels.platform`.

    Returns [M, N]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.quantized("a", a, "tiles", ndim=2)
    checks.quantized("b", b, "blocks", ndim=2)
    checks.expect(a.shape[1] == b.shape[1], "b", b, f"[N, {a.shape[1]}], the K of a")
    checks.out_dtype(out_dtype)
    checks.num_sms(num_sms)
    return dispatch(
        "fp8_matmul",
        implementation,
        a,
        b,
        hopper=hopper.fp8_matmul,
        reference=reference.fp8_matmul,
        out_dtype=jnp.dtype(out_dtype),
        num_sms=num_sms,
    )
