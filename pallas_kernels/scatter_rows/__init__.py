"""Rows of matrices to where they belong, each read once: tokens to the rows of their experts.

`gather_rows` would read a token once for each of its experts.
"""

import jax

from pallas_kernels import checks
from pallas_kernels.platform import dispatch
from pallas_kernels.scatter_rows import hopper, reference


def scatter_rows(sources, places, filled, *, rows: int, columns: int, implementation=None) -> jax.Array:
    """sources: matrices [Ti, Di] of one dtype of 8, 16 or 32 bits, one below the other; places int32 [T, M], T the sum of Ti: up to M rows of
    the result that each of their rows goes to (`rows`: none); filled int32 []: how many rows of the result get one, the first.
    -> [rows, columns], of each source row the first columns; zeros from `filled` on.

    No row of the result may be in places twice, and none of the first `filled` be missing. Raises ValueError for other shapes or dtypes.
    """
    sources = tuple(sources)
    for x in sources:
        good = getattr(x, "ndim", None) == 2 and x.dtype.itemsize in (1, 2, 4) and x.dtype == sources[0].dtype and x.shape[1] >= columns
        checks.expect(good, "sources", x, f"matrices of at least {columns} columns, of one dtype of 8, 16 or 32 bits")
    total = sum(map(len, sources))
    ok = getattr(places, "ndim", None) == 2 and places.dtype == "int32" and len(places) == total
    checks.expect(ok, "places", places, f"int32 [{total}, M]")
    checks.expect(getattr(filled, "shape", None) == () and filled.dtype == "int32", "filled", filled, "int32 []")
    functions = {"hopper": hopper.scatter_rows, "reference": reference.scatter_rows}
    return dispatch("scatter_rows", implementation, places, filled, *sources, rows=rows, columns=columns, **functions)
