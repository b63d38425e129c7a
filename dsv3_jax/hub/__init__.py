"""Hugging Face checkpoints in and out: `load`, `save`, `tensors`; `python -m dsv3_jax.hub` converts from and to Orbax runs."""

from dsv3_jax.hub.loading import load
from dsv3_jax.hub.names import tensors
from dsv3_jax.hub.saving import save

__all__ = ["load", "save", "tensors"]
