"""Checks of arguments. Every error is a ValueError that names the argument, what it is, and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized import BLOCK, Quantized


def describe(x) -> str:
    if isinstance(x, Quantized):
        return f"Quantized {x.kind} {list(x.shape)}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype} {list(x.shape)}"
    return type(x).__name__


def expect(condition, name, value, expected):
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def quantized(name, q, kind, ndim):
    expect(isinstance(q, Quantized) and q.kind == kind and q.ndim == ndim, name, q, f"Quantized {kind} with {ndim} axes")
    expect(all(q.shape), name, q, "no empty axis")
    build = Quantized.tiles if kind == "tiles" else Quantized.blocks
    try:  # a Quantized put together by hand, or sliced leaf by leaf
        build(q.values, q.scales())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def floating(name, x, ndim=None, sizes=(2, 4)):
    ok = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and (x.ndim >= 2 if ndim is None else x.ndim == ndim)
    expect(ok, name, x, "a floating-point array with " + ("at least two axes" if ndim is None else f"{ndim} axes"))
    expect(x.dtype.itemsize in sizes, name, x, "bfloat16, float16 or float32")
    expect(all(x.shape), name, x, "no empty axis")


def bfloat16(name, x, ndim):
    ok = hasattr(x, "dtype") and x.dtype == jnp.bfloat16 and x.ndim == ndim
    expect(ok, name, x, f"a bfloat16 array with {ndim} axes")
    expect(all(x.shape), name, x, "no empty axis")


def group_sizes(name, sizes, groups, total=None, most=None):
    """int32 [groups] whose sum is `total`, or at most `most`; the values are checked where they are known, that is outside of jit."""
    ok = hasattr(sizes, "dtype") and jnp.issubdtype(sizes.dtype, jnp.integer) and sizes.shape == (groups,)
    expect(ok, name, sizes, f"integers [{groups}], one for each group")
    if total is not None and not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes)
        if known.min() < 0 or known.sum() != total:
            raise ValueError(f"{name}: expected sizes >= 0 that sum to the {total} rows, got {describe(sizes)} with sum {known.sum()}")
    if most is not None and not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes)
        if known.min() < 0 or known.sum() > most:
            raise ValueError(f"{name}: expected sizes >= 0 of at most {most} rows in all, got {describe(sizes)} with sum {known.sum()}")


def counts(name, values, groups, limit):
    """int32 [groups], each from 0 to `limit`; the values are checked where they are known."""
    group_sizes(name, values, groups)
    if not isinstance(values, jax.core.Tracer):
        known = np.asarray(values)
        if known.min() < 0 or known.max() > limit:
            raise ValueError(f"{name}: expected counts from 0 to {limit}, got {describe(values)} from {known.min()} to {known.max()}")


def accumulate(name, x, shape):
    if x is not None:
        ok = hasattr(x, "dtype") and x.dtype == jnp.float32 and tuple(x.shape) == tuple(shape)
        expect(ok, name, x, f"float32 {list(shape)}")


def out_dtype(dtype):
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"out_dtype: expected bfloat16 or float32, got {jnp.dtype(dtype)}")


def num_sms(n):
    if n is not None and not (isinstance(n, int) and n >= 1):
        raise ValueError(f"num_sms: expected a positive number of SMs or None for all of the device's, got {n!r}")


def padded_groups(name, sizes, groups, tokens):
    """int32 [groups] whose sizes, each rounded up to 128, fit into `tokens`; the values are checked where they are known."""
    group_sizes(name, sizes, groups)
    if not isinstance(sizes, jax.core.Tracer):
        known = np.asarray(sizes)
        needed = int(((known + BLOCK - 1) // BLOCK * BLOCK).sum())
        if known.min() < 0 or needed > tokens:
            raise ValueError(f"{name}: expected sizes >= 0 that fill at most {tokens} tokens when each is padded to 128, got {needed}")
