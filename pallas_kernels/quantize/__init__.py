"""Quantisation to float8_e4m3fn with online scales (DeepSeek-V3 report, section 3.3.2), alone and fused with what comes before it.

Every function takes bfloat16, float16 or float32 and computes in float32. `pow2` rounds the scales up to powers of two, as the report does
for the inputs that are quantised a second time for the backward pass. Codes and scales are exact: see `reference.py` for the formulas.
Raises ValueError for wrong dtypes or shapes.
"""

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.quantize import hopper, reference
from pallas_kernels.quantized import Quantized


def quantize_tiles(x, *, pow2=False, implementation=None) -> Quantized:
    """x [..., M, K] -> tiles: a scale max(amax, 1e-4) / 448 for every 128 values of a row."""
    checks.floating("x", x)
    return _run("quantize_tiles", implementation, x, pow2=pow2)


def quantize_blocks(w, *, pow2=False, implementation=None) -> Quantized:
    """w [..., N, K] -> blocks: a scale amax / 448 for every 128x128 block, and 1 for a block of zeros."""
    checks.floating("w", w)
    return _run("quantize_blocks", implementation, w, pow2=pow2)


def swiglu_quantize(gate_up, *, pow2=False, implementation=None) -> Quantized:
    """gate_up [..., M, 2F], the gate in the first half -> tiles [..., M, F] of silu(gate) * up."""
    checks.floating("gate_up", gate_up)
    checks.expect(gate_up.shape[-1] % 2 == 0, "gate_up", gate_up, "an even last axis: gate and up")
    return _run("swiglu_quantize", implementation, gate_up, pow2=pow2)


def rmsnorm_quantize(x, weight, *, eps=1e-6, pow2=False, implementation=None) -> Quantized:
    """x [..., M, K], weight [K] -> tiles of x / sqrt(mean(x^2) + eps) * weight."""
    checks.floating("x", x)
    checks.floating("weight", weight, ndim=1)
    checks.expect(weight.shape == x.shape[-1:], "weight", weight, f"[{x.shape[-1]}], as the last axis of x")
    return _run("rmsnorm_quantize", implementation, x, weight, eps=eps, pow2=pow2)


def quantize_both(x, group_sizes=None, *, pow2=False, implementation=None) -> tuple[Quantized, Quantized]:
    """x [T, K] -> (quantize_tiles(x), the tiles [K, T'] of its transpose), in one pass: an output gradient for Dgrad and for Wgrad.

    The transpose is laid out as `requantize_transposed` does it, and rounded once, from x.
    """
    checks.floating("x", x, ndim=2)
    _check_groups(group_sizes, x.shape[0])
    return _run("quantize_both", implementation, x, group_sizes, pow2=pow2)


def requantize_transposed(q, group_sizes=None, *, pow2=False, implementation=None) -> Quantized:
    """tiles [T, K] along K -> tiles [K, T'] along the tokens: dequantise, transpose, quantise again, in one pass; the operands of Wgrad.

    group_sizes [G] int32: rows are sorted by group, and each group is followed by zeros up to a multiple of 128 tokens, so that no
    tile lies in two groups. T' = floor((T + 127 G) / 128) * 128 whatever the sizes, with zeros at the end; without groups T' is T rounded
    up to 128.
    """
    checks.quantized("q", q, "tiles", ndim=2)
    _check_groups(group_sizes, q.shape[0])
    return _run("requantize_transposed", implementation, q, group_sizes, pow2=pow2)


def _check_groups(group_sizes, tokens):
    if group_sizes is not None:
        checks.expect(getattr(group_sizes, "ndim", None) == 1, "group_sizes", group_sizes, "integers [G]")
        checks.group_sizes("group_sizes", group_sizes, group_sizes.shape[0], tokens)


def _run(op, implementation, *operands, **options):
    plain = getattr(reference, op)
    return dispatch(op, implementation, *operands, hopper=getattr(hopper, op, plain), reference=plain, **options)
