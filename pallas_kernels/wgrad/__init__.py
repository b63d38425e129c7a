"""Weight gradients in FP8: products over the tokens, both operands tiled along them (DeepSeek-V3 report, section 3.3.2)."""

import jax

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.quantized import BLOCK
from pallas_kernels.wgrad import hopper, reference


def fp8_wgrad(a, b, *, accumulate=None, num_sms=None, implementation=None) -> jax.Array:
    """a @ b.T over the tokens.

    Args:
      a: Quantized tiles [N, T], tokens last: the output gradient as `requantize_transposed` or `quantize_both` gives it.
      b: Quantized tiles [K, T]: the input of the layer, likewise.
      accumulate: float32 [N, K] to which the product is added, in place where the caller donates it.
      num_sms, implementation: as in `fp8_matmul`.

    Returns float32 [N, K]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.quantized("a", a, "tiles", ndim=2)
    checks.quantized("b", b, "tiles", ndim=2)
    checks.expect(a.shape[1] == b.shape[1], "b", b, f"[K, {a.shape[1]}], the tokens of a")
    checks.accumulate("accumulate", accumulate, (a.shape[0], b.shape[0]))
    checks.num_sms(num_sms)

    return dispatch("fp8_wgrad", implementation, a, b, accumulate, hopper=hopper.fp8_wgrad, reference=reference.fp8_wgrad, num_sms=num_sms)


def grouped_fp8_wgrad(a, b, group_sizes, *, accumulate=None, num_sms=None, implementation=None) -> jax.Array:
    """For every group, a @ b.T over the tokens of that group.

    Args:
      a: Quantized tiles [N, T'] as `requantize_transposed(..., group_sizes)` lays them out: groups begin at multiples of 128 tokens
        and are filled up with zeros.
      b: Quantized tiles [K, T'], likewise.
      group_sizes: int32 [G] on the device: the sizes before padding; empty groups are allowed and give zeros.
      accumulate: float32 [G, N, K] to which the products are added, in place where the caller donates it.
      num_sms, implementation: as in `fp8_matmul`.

    Returns float32 [G, N, K]. Raises ValueError for wrong dtypes, shapes, or a device that cannot run it.
    """
    checks.quantized("a", a, "tiles", ndim=2)
    checks.quantized("b", b, "tiles", ndim=2)
    checks.expect(a.shape[1] == b.shape[1], "b", b, f"[K, {a.shape[1]}], the tokens of a")
    checks.expect(a.shape[1] % BLOCK == 0, "a", a, "tokens in multiples of 128, every group padded")
    checks.expect(getattr(group_sizes, "ndim", None) == 1, "group_sizes", group_sizes, "integers [G]")
    groups = group_sizes.shape[0]
    checks.padded_groups("group_sizes", group_sizes, groups, a.shape[1])
    checks.accumulate("accumulate", accumulate, (groups, a.shape[0], b.shape[0]))
    checks.num_sms(num_sms)

    return dispatch(
        "grouped_fp8_wgrad",
        implementation,
        a,
        b,
        group_sizes,
        accumulate,
        hopper=hopper.grouped_fp8_wgrad,
        reference=reference.grouped_fp8_wgrad,
        num_sms=num_sms,
    )
