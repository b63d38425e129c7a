"""Rows of a matrix by index, as fast as memory allows: tokens on their way to their experts.

XLA's gather takes one element a thread, 0.6 TB/s for e4m3 on an H100. The transpose, a sum over rows, it compiles well.
"""

import jax

from pallas_kernels import checks
from pallas_kernels.gather_rows import hopper, reference
from pallas_kernels.platform import dispatch


def gather_rows(x, index, *, implementation=None) -> jax.Array:
    """x [T, D] of 8, 16 or 32 bits, index int32 [R] of 0 to T -> x[index] [R, D], zeros where the index is T.

    Raises ValueError for other shapes or dtypes.
    """
    checks.expect(getattr(x, "ndim", None) == 2 and x.dtype.itemsize in (1, 2, 4) and all(x.shape), "x", x, "[T, D] of 8, 16 or 32 bits")
    ok = getattr(index, "ndim", None) == 1 and index.dtype == "int32" and index.size
    checks.expect(ok, "index", index, "int32 [R]")
    return dispatch("gather_rows", implementation, x, index, hopper=hopper.gather_rows, reference=reference.gather_rows)
