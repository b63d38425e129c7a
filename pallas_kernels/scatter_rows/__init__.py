"""Rows of a matrix to where they belong, each read once: tokens to the rows of their experts.

`gather_rows` would read a token once for each of its experts.
"""

import jax

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.scatter_rows import hopper, reference


def scatter_rows(x, places, filled, *, rows: int, columns: int | None = None, implementation=None) -> jax.Array:
    """x [T, D] of 8, 16 or 32 bits; places int32 [T, M]: up to M rows of the result that each row goes to (`rows`: none); filled int32 []:
    how many rows of the result get one, the first. -> [rows, D], or only so many columns, the first; zeros from `filled` on.

    No row of the result may be in places twice, and none of the first `filled` be missing. Raises ValueError for other shapes or dtypes.
    """
    good = getattr(x, "ndim", None) == 2 and x.dtype.itemsize in (1, 2, 4) and all(x.shape)
    checks.expect(good, "x", x, "[T, D] of 8, 16 or 32 bits")
    ok = getattr(places, "ndim", None) == 2 and places.dtype == "int32" and len(places) == len(x) and places.size
    checks.expect(ok, "places", places, f"int32 [{len(x)}, M]")
    checks.expect(getattr(filled, "shape", None) == () and filled.dtype == "int32", "filled", filled, "int32 []")
    checks.expect(columns is None or 0 < columns <= x.shape[1], "columns", columns, f"1 to {x.shape[1]}")
    functions = {"hopper": hopper.scatter_rows, "reference": reference.scatter_rows}
    return dispatch("scatter_rows", implementation, x, places, filled, rows=rows, columns=columns or x.shape[1], **functions)
