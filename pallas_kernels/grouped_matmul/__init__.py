"""FP8 products of many experts: rows sorted by expert (training, prefill), or a fixed room of rows for each (decode)."""

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.grouped_matmul import hopper, reference
from pallas_kernels.platform import dispatch


def grouped_fp8_matmul(a, b, group_sizes, *, out_dtype=jnp.bfloat16, num_sms=None, implementation=None) -> jax.Array:
    """Row i of `a` times the weights of the group that row i belongs to.

    Args:
      a: Quantized tiles [M, K], rows sorted by group: the first group_sizes[0] rows belong to group 0, and so on.
      b: Quantized blocks [G, N, K].
      group_sizes: int32 [G] on the device; any sizes, no padding needed. Outside of jit they must sum to M; under jit, where the sum is
        not known, rows past the sum give zeros.
      out_dtype, num_sms, implementation: as in `fp8_matmul`.

    Returns [M, N]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.quantized("a", a, "tiles", ndim=2)
    checks.quantized("b", b, "blocks", ndim=3)
    checks.expect(a.shape[1] == b.shape[2], "b", b, f"[G, N, {a.shape[1]}], the K of a")
    checks.group_sizes("group_sizes", group_sizes, b.shape[0], a.shape[0])
    checks.out_dtype(out_dtype)
    checks.num_sms(num_sms)
    return dispatch(
        "grouped_fp8_matmul",
        implementation,
        a,
        b,
        group_sizes,
        hopper=hopper.grouped_fp8_matmul,
        reference=reference.grouped_fp8_matmul,
        out_dtype=jnp.dtype(out_dtype),
        num_sms=num_sms,
    )


def masked_fp8_matmul(a, b, counts, *, expected_count=None, out_dtype=jnp.bfloat16, num_sms=None, implementation=None) -> jax.Array:
    """The first counts[g] rows of a[g] times b[g], for decode, where shapes must not depend on the routing.

    Args:
      a: Quantized tiles [G, rows, K].
      b: Quantized blocks [G, N, K].
      counts: int32 [G], each from 0 to rows, on the device.
      expected_count: what counts are like, which the host does not know and the choice of tiles depends on; 128 by default.
      out_dtype, num_sms, implementation: as in `fp8_matmul`.

    Returns [G, rows, N]. Rows past the counts are not defined: the kernel spends no time on them. Raises ValueError for wrong dtypes,
    shapes, or a device that cannot run it.
    """
    checks.quantized("a", a, "tiles", ndim=3)
    checks.quantized("b", b, "blocks", ndim=3)
    expected = f"[{a.shape[0]}, N, {a.shape[2]}], the G and K of a"
    checks.expect((a.shape[0], a.shape[2]) == (b.shape[0], b.shape[2]), "b", b, expected)
    checks.counts("counts", counts, a.shape[0], a.shape[1])
    if expected_count is not None and expected_count < 1:
        raise ValueError(f"expected_count: expected 1 at least, got {expected_count}")
    checks.out_dtype(out_dtype)
    checks.num_sms(num_sms)
    return dispatch(
        "masked_fp8_matmul",
        implementation,
        a,
        b,
        counts,
        hopper=hopper.masked_fp8_matmul,
        reference=reference.masked_fp8_matmul,
        expected_count=expected_count,
        out_dtype=jnp.dtype(out_dtype),
        num_sms=num_sms,
    )
