"""How fast a checkpoint loads, beside `dd` on the same files; both from the disk, not from the page cache."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.hub.loading import load
from dsv3_jax.hub.saving import save
from dsv3_jax.model import Decoder
from dsv3_jax.precision import to_fp8

# Two layers as wide as DeepSeek-V3's, with 24 of its experts: 2.0 GB in FP8.
TWO_LAYERS = ModelConfig(
    vocab_size=8192, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=24, n_group=8, num_nextn_predict_layers=0
)


def make(directory: Path, config: ModelConfig = TWO_LAYERS) -> None:
    """An FP8 checkpoint of random numbers."""
    rng = np.random.default_rng(0)

    def values(leaf):
        if leaf.dtype == jnp.float8_e4m3fn:
            codes = np.frombuffer(rng.bytes(leaf.size), np.uint8) & 0x77  # neither NaN nor negative
            return codes.view(leaf.dtype).reshape(leaf.shape)
        return rng.random(leaf.shape, np.float32).astype(leaf.dtype)

    shapes = jax.eval_shape(to_fp8, Decoder(config).abstract_params())
    save(SimpleNamespace(config=config, params=jax.tree.map(values, shapes), tokenizer=None), directory, precision="fp8")


def forget(files: list[Path]) -> None:
    """Take the files out of the page cache; what is not on the disk yet is written first."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def dd(files: list[Path]) -> float:
    """Seconds that dd takes to read the files past the page cache, one after another."""
    began = time.perf_counter()
    for file in files:
        done = subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=16M", "iflag=direct"], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"dd cannot read {file} directly ({done.stderr.splitlines()[0]}): give a directory on a disk")
    return time.perf_counter() - began


def run(directory: Path | None, rounds: int) -> None:
    """Prints both rates, round by round. directory: a checkpoint; None: one of 2 GB in FP8 is made here, and removed."""
    made = None if directory is not None else Path(tempfile.mkdtemp(prefix="bench-", dir="."))
    try:
        if made is not None:
            directory = made / "model"
            make(directory)
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} has no safetensors files: give a Hugging Face directory")
        size = sum(file.stat().st_size for file in files) / 1e9
        print(f"{size:.2f} GB in {len(files)} files, onto {jax.devices()[0].device_kind}; GB/s")
        for number in range(1, rounds + 1):
            forget(files)
            read = dd(files)
            forget(files)
            began = time.perf_counter()
            _, params = load(directory)
            jax.block_until_ready(params)
            loaded = time.perf_counter() - began
            del params
            note = " (compiles)" if number == 1 else ""
            print(f"dd {size / read:6.2f}   load {size / loaded:6.2f}   {read / loaded:5.2f} of dd{note}", flush=True)
    finally:
        if made is not None:
            shutil.rmtree(made)
