"""The reference models: loaded once, through the public interface."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import dsv3_jax

MODELS = Path(__file__).parents[1] / "data" / "models"


class Reference(NamedTuple):
    """A model and what other software computes with its weights."""

    model: dsv3_jax.Model
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def reference():
    """reference("tiny_s_plain") -> Reference."""
    loaded = {}

    def get(name: str, **options) -> Reference:
        key = (name, *options.items())
        if key not in loaded:
            expected = {}
            for path in sorted((MODELS / name).glob("expected*.npz")):
                expected |= dict(np.load(path))
            loaded[key] = Reference(dsv3_jax.load(MODELS / name, **options), expected)
        return loaded[key]

    return get
