"""Serving: a small engine that generates tokens over a paged latent cache, and its faces (batch files, HTTP, a chat)."""

from dsv3_jax.serving.engine import Engine, generate
from dsv3_jax.serving.request import Completion, Output, Request, SamplingParams

__all__ = ["Completion", "Engine", "Output", "Request", "SamplingParams", "generate"]
