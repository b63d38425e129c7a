"""Quantisation to float8_e4m3fn with online scales (DeepSeek-V3 report, section 3.3.2), alone and fused with what comes before it.

Every function takes bfloat16, float16 or float32 and computes in float32. `pow2` rounds the scales up to powers of two, as the report does
for the inputs that are quantised a second time for the backward pass. `floor` is the least amax of a tile: gradients may lie below the
default, which was made for activations, and would become zeros. Codes and scales are exact (but for `quantize_blocks` on a GPU):
`reference.py` has the formulas.
Raises ValueError for wrong dtypes or shapes.
"""

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.quantize import hopper, reference
from pallas_kernels.quantize.reference import AMAX_FLOOR
from pallas_kernels.quantized import Quantized


def quantize_tiles(x, *, pow2=False, floor=AMAX_FLOOR, implementation=None) -> Quantized:
    """x [..., M, K] -> tiles: a scale max(amax, floor) / 448 for every 128 values of a row."""
    checks.floating("x", x)
    return _run("quantize_tiles", implementation, x, pow2=pow2, floor=floor)


def quantize_blocks(w, *, pow2=False) -> Quantized:
    """w [..., N, K] -> blocks: a scale amax / 448 for every 128x128 block, and 1 for a block of zeros.

    Plain JAX on every device: weights are quantised once a step or once in all, and each shape would be a kernel to compile. A GPU's
    division may be two units off, so that there a value half way between two codes may get the other.
    """
    checks.floating("w", w)
    return _run("quantize_blocks", "reference", w, pow2=pow2)


def swiglu_quantize(gate_up, *, pow2=False, implementation=None) -> Quantized:
    """gate_up [..., M, 2F], the gate in the first half -> tiles [..., M, F] of silu(gate) * up."""
    checks.floating("gate_up", gate_up)
    checks.expect(gate_up.shape[-1] % 2 == 0, "gate_up", gate_up, "an even last axis: gate and up")
    return _run("swiglu_quantize", implementation, gate_up, pow2=pow2)


def swiglu_quantize_both(gate_up, *, pow2=False, implementation=None) -> tuple[Quantized, Quantized]:
    """(swiglu_quantize(gate_up), quantize_tiles(gate_up)) in one pass: what the down-projection reads, and what its backward pass starts
    from.

    pow2: of the first.
    """
    checks.floating("gate_up", gate_up)
    checks.expect(gate_up.shape[-1] % 2 == 0, "gate_up", gate_up, "an even last axis: gate and up")
    return _run("swiglu_quantize_both", implementation, gate_up, pow2=pow2)


def swiglu_backward(gate_up, d_hidden, row_weights=None, group_sizes=None, *, implementation=None):
    """The backward pass of hidden = silu(gate) * up * row_weights, in one pass.

    gate_up: tiles [T, 2F], d_hidden [T, F], row_weights [T] or None (ones), group_sizes [G] as in `requantize_transposed` -> (d_gate_up
    [T, 2F] in the dtype of d_hidden; hidden, rounded to that dtype and then quantised, as tiles [F, T'] along the tokens; d_row_weights
    float32 [T] or None).
    """
    checks.quantized("gate_up", gate_up, "tiles", ndim=2)
    checks.floating("d_hidden", d_hidden, ndim=2)
    tokens, width = d_hidden.shape
    checks.expect(gate_up.shape == (tokens, 2 * width), "gate_up", gate_up, f"[{tokens}, {2 * width}], twice as wide as d_hidden")
    if row_weights is not None:
        checks.expect(getattr(row_weights, "shape", None) == (tokens,), "row_weights", row_weights, f"[{tokens}], one for each row")
    _check_groups(group_sizes, tokens)
    return _run("swiglu_backward", implementation, gate_up, d_hidden, row_weights, group_sizes)


def rmsnorm_quantize(x, weight, *, eps=1e-6, pow2=False, implementation=None) -> Quantized:
    """x [..., M, K], weight [K] -> tiles of x / sqrt(mean(x^2) + eps) * weight."""
    checks.floating("x", x)
    checks.floating("weight", weight, ndim=1)
    checks.expect(weight.shape == x.shape[-1:], "weight", weight, f"[{x.shape[-1]}], as the last axis of x")
    return _run("rmsnorm_quantize", implementation, x, weight, eps=eps, pow2=pow2)


def quantize_both(x, group_sizes=None, *, pow2=False, floor=AMAX_FLOOR, implementation=None) -> tuple[Quantized, Quantized]:
    """x [T, K] -> (quantize_tiles(x), the tiles [K, T'] of its transpose), in one pass: an output gradient for Dgrad and for Wgrad.

    The transpose is laid out as `requantize_transposed` does it, and rounded once, from x.
    """
    checks.floating("x", x, ndim=2)
    _check_groups(group_sizes, x.shape[0])
    return _run("quantize_both", implementation, x, group_sizes, pow2=pow2, floor=floor)


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
