"""The DeepSeek-V3 stack in JAX. `dsv3_jax.load(path)` gives a Model; parts are imported when they are first used."""

import importlib

_EXPORTS = {"load": "dsv3_jax.api", "Model": "dsv3_jax.api"}
_MODULES = frozenset(["api", "checkpoint", "config", "data", "errors", "hub", "model", "parallel", "precision", "serving", "training"])

__all__ = ["Model", "load"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dsv3_jax.{name}")
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS, *_MODULES])
