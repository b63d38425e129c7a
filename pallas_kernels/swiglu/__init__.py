"""The backward pass of SwiGLU without quantisation, in one pass over memory.

XLA takes two: the gradient of gate and up side by side, and the sums over each row that the row weights' gradient is.
"""

import jax

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.swiglu import hopper, reference


def swiglu_gradient(gate_up, d_hidden, row_weights=None, *, implementation=None) -> tuple[jax.Array, jax.Array | None]:
    """Gradients of hidden = silu(gate) * up * row_weights, computed in float32.

    gate_up [T, 2F], the gate in the first half; d_hidden [T, F]; row_weights [T] or None (ones) -> (d_gate_up [T, 2F] in the dtype of
    gate_up, d_row_weights float32 [T] or None). The kernel takes 16 bits and F of a multiple of 64: with implementation=None all else is
    plain JAX on any device. Raises ValueError for wrong dtypes or shapes, and for those that the kernel does not take with
    implementation="hopper".
    """
    sizes = (2, 4, 8)  # whole models are compared in float64
    checks.floating("gate_up", gate_up, ndim=2, sizes=sizes)
    checks.floating("d_hidden", d_hidden, ndim=2, sizes=sizes)
    tokens, width = d_hidden.shape
    checks.expect(gate_up.shape == (tokens, 2 * width), "gate_up", gate_up, f"[{tokens}, {2 * width}], twice as wide as d_hidden")
    if row_weights is not None:
        checks.expect(getattr(row_weights, "shape", None) == (tokens,), "row_weights", row_weights, f"[{tokens}], one for each row")
    if not hopper.supports(gate_up, d_hidden):
        checks.expect(implementation != "hopper", "gate_up", gate_up, "16 bits, as of d_hidden, and F of a multiple of 64")
        implementation = implementation or "reference"
    functions = {"hopper": hopper.swiglu_gradient, "reference": reference.swiglu_gradient}
    return dispatch("swiglu_gradient", implementation, gate_up, d_hidden, row_weights, **functions)
