"""bfloat16 products of many experts whose rows are sorted by expert, and their weight gradients."""

import jax

from pallas_kernels import checks
from pallas_kernels.grouped_bf16 import hopper, reference
from pallas_kernels.platform import dispatch


def grouped_bf16_matmul(x, w, group_sizes, *, transposed=True, num_sms=None, implementation=None) -> jax.Array:
    """Row i of `x` times the weight of the group that row i belongs to, accumulated in float32.

    Args:
      x: bfloat16 [M, K], rows sorted by group: the first group_sizes[0] rows belong to group 0, and so on.
      w: bfloat16 [G, N, K], or with transposed=False [G, K, N]; neither is copied.
      group_sizes: int32 [G] on the device; any sizes, no padding needed. Rows past their sum give zeros.
      num_sms, implementation: as in `fp8_matmul`.

    Returns bfloat16 [M, N]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.bfloat16("x", x, ndim=2)
    checks.bfloat16("w", w, ndim=3)
    layout = f"[G, N, {x.shape[1]}]" if transposed else f"[G, {x.shape[1]}, N]"
    checks.expect(x.shape[1] == w.shape[2 if transposed else 1], "w", w, f"{layout}, the K of x")
    checks.group_sizes("group_sizes", group_sizes, w.shape[0], most=x.shape[0])
    checks.num_sms(num_sms)
    options = {"transposed": transposed, "num_sms": num_sms}
    kernel, plain = hopper.grouped_bf16_matmul, reference.grouped_bf16_matmul
    return dispatch("grouped_bf16_matmul", implementation, x, w, group_sizes, hopper=kernel, reference=plain, **options)


def grouped_bf16_wgrad(dy, x, group_sizes, *, num_sms=None, implementation=None) -> jax.Array:
    """For every group, dy.T @ x over the rows of that group, accumulated in float32.

    Args:
      dy: bfloat16 [T, N], rows sorted by group.
      x: bfloat16 [T, K], likewise.
      group_sizes: int32 [G] on the device, any sizes; empty groups give zeros. All rows must be finite, those past the
        sum as well: the kernel takes 64 at a time, and a NaN may reach the gradients of the groups before and after its own.
      num_sms, implementation: as in `fp8_matmul`.

    Returns float32 [G, N, K]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.bfloat16("dy", dy, ndim=2)
    checks.bfloat16("x", x, ndim=2)
    checks.expect(x.shape[0] == dy.shape[0], "x", x, f"[{dy.shape[0]}, K], the rows of dy")
    checks.expect(getattr(group_sizes, "ndim", None) == 1, "group_sizes", group_sizes, "integers [G]")
    checks.group_sizes("group_sizes", group_sizes, group_sizes.shape[0], most=x.shape[0])
    checks.num_sms(num_sms)
    kernel, plain = hopper.grouped_bf16_wgrad, reference.grouped_bf16_wgrad
    return dispatch("grouped_bf16_wgrad", implementation, dy, x, group_sizes, hopper=kernel, reference=plain, num_sms=num_sms)
