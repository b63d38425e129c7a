"""Stores from registers to global memory, alike in jax 0.11 and 0.12."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def store(gmem, x):
    """Registers to GMEM. An accumulator may write half sectors; jax 0.12 must be told that this is meant, 0.11 has no way to."""
    if hasattr(plgpu, "store"):
        plgpu.store(gmem, x, optimized=False)
    else:
        gmem[...] = x
