"""Parameters and operands drawn by NumPy: XLA compiles thirty normal distributions for seconds, and each operation outside of `jax.jit`."""

from typing import Any

import jax
import numpy as np

from dsv3_jax.model import Decoder


def parameters(decoder: Decoder, seed: int = 0) -> dict:
    """Like those of `Decoder.init`."""
    return values(decoder.abstract_params(), decoder.config.initializer_range, seed)


def values(shapes: Any, std: float, seed: int = 0) -> Any:
    """Float32 NumPy arrays for a tree of parameters' shapes: normal with that standard deviation, norms one, selection biases zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if "norm" in name:
            return np.ones(leaf.shape, np.float32)
        return normal(rng, *leaf.shape) * np.float32(0 if "bias" in name else std)

    return jax.tree.map_with_path(draw, shapes)


def normal(rng: np.random.Generator | int, *shape: int) -> np.ndarray:
    """Float32; `rng`: a generator or a seed."""
    return np.random.default_rng(rng).standard_normal(shape, np.float32)
