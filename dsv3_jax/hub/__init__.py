"""Hugging Face checkpoints in and out: `load`, `save`, `tensors`, `is_checkpoint`; `python -m dsv3_jax.hub` converts runs."""

from dsv3_jax.hub.loading import is_checkpoint, load
from dsv3_jax.hub.names import tensors
from dsv3_jax.hub.saving import save

__all__ = ["is_checkpoint", "load", "save", "tensors"]
