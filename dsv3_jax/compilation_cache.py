"""Where compiled programs are kept between runs."""

import os
from pathlib import Path

import jax


def use() -> None:
    """Keep compiled programs in JAX_COMPILATION_CACHE_DIR (empty: nowhere), by default in the user's cache folder.

    A run that goes on, or a server that is started again, then starts fast.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "dsv3_jax" / "compiled"))
