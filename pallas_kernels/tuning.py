"""Tile choices for the GEMM kernel: measured ones from data/<device>.json, and a rule for shapes that nobody has measured.

`python -m pallas_kernels.tune OP` measures the most promising candidates for the shapes of an op on the GPU it runs on and writes the file.
A Hopper GPU without a file uses another one's: their SMs are alike, only their memories differ.
"""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.gemm import SMEM_BYTES, Config, smem_bytes
from pallas_kernels.plain import Plain
from pallas_kernels.platform import device_kind
from pallas_kernels.scaled import Scaled

DATA = pathlib.Path(__file__).parent / "data"
OPS = ("matmul", "grouped_matmul", "masked_matmul", "wgrad", "grouped_wgrad", "grouped_bf16", "grouped_bf16_wgrad")


class Case(NamedTuple):
    """`groups` products of m rows on average, n columns and a depth of k."""

    op: str
    m: int
    n: int
    k: int
    groups: int = 1


def choose(op: str, m: int, n: int, k: int, num_sms: int, groups: int = 1) -> Config:
    """The configuration for `groups` products of m rows on average, n columns and a depth of k.

    A measured choice is taken for the same op, n and k and the nearest m, number of groups and of SMs, as long as the row tiles are of the
    same kind: up to 64 rows there is one, within a factor of two the same number, and from 2048 rows on always enough.
    """
    alike = [e for e in _measured(device_kind()) if (e["op"], e["n"], e["k"]) == (op, n, k) and _apart(*_kind(e["m"], m)) <= 2]
    if alike:
        best = min(alike, key=lambda e: (_apart(e["m"], m), _apart(e["groups"], groups), _apart(e["num_sms"], num_sms)))
        return Config(**best["config"])
    found = candidates(op, m)
    if op == "wgrad":  # there may be few tiles, and many tokens to share out
        found += [dataclasses.replace(c, split_k=parts) for c in found if c.multicast == "a" for parts in (2, 4, 8, 16)]
    return min(found, key=lambda config: _estimate(config, op, m, n, k, groups, num_sms))


def _kind(*rows):
    return [min(max(m, 64), 2048) for m in rows]


def _apart(x, y) -> float:
    return max(x / y, y / x)


def data_file(kind: str) -> pathlib.Path:
    return DATA / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _measured(kind):
    files = [data_file(kind), *sorted(DATA.glob("nvidia_*.json"))]
    return next((json.loads(file.read_text())["choices"] for file in files if file.exists()), [])


def candidates(op: str, m: int) -> list[Config]:
    """Configurations that are worth measuring for products of m rows, as deep as shared memory allows."""
    wide = [(128, 192, "m"), (128, 256, "n"), (192, 128, "m")]
    if "bf16" in op:
        if m <= 128:
            found = [Config(64, cols, 2, None, cluster) for cols, cluster in ((64, 1), (128, 1), (128, 2), (256, 1))]
        else:
            found = [Config(*tile, 2, "m", 2, "b", "m", 8, slots=slots) for *tile, slots in ((128, 256, 2), (128, 256, 4), (192, 128, 4))]
            found += [Config(*tile, 2, "m", 2, "a", "m", 8, slots=slots) for *tile, slots in ((192, 128, 4), (256, 128, 2), (128, 256, 2))]
    elif op == "masked_matmul":
        found = [Config(*tile, 2, split, 2, "a", "m", 8) for *tile, split in [(64, 256, "n"), (128, 128, "m"), (256, 128, "m"), *wide]]
    elif op == "grouped_matmul" and m <= 128:  # ends of groups are stored by rows, and those must fill lines: at least 64 columns
        found = [Config(64, cols, 2, None, cluster) for cols in (64, 128) for cluster in (1, 2)]
        found += [Config(128, 64, 2, "m"), Config(128, 192, 2, "m", 2)] if m > 64 else []
    elif m <= 64:
        found = [Config(64, cols, 2, None, cluster) for cols, cluster in ((16, 2), (32, 2), (64, 1), (64, 2), (128, 2))]
    elif m <= 128:
        found = [Config(64, 32, 2), Config(64, 64, 2, None, 2), Config(128, 64, 2, "m")]
        found += [Config(128, cols, 2, "m", 2) for cols in (128, 192)]
        found += [Config(64, 128, 2, None, 2, "b")] if op == "matmul" else []
    else:
        shared = [Config(*tile, 2, split, 2, share, "m", 8) for *tile, split in [*wide, (256, 128, "m")] for share in "ab"]
        found = shared + [dataclasses.replace(c, ordered=True) for c in shared if c.warpgroups == 2]
    return [_deepest(config, op) for config in found]


def more_candidates(op: str, m: int) -> list[Config]:
    """What `tune` measures besides: kinds of choices that won somewhere, and of which `_estimate` knows too little."""
    found = []
    if op == "matmul" and m <= 64:
        found = [Config(64, 32, 2), Config(64, 256, 2, "n"), *(Config(64, 64, 2, split_k=parts) for parts in (2, 4))]
    elif op == "matmul" and m <= 128:
        found = [Config(64, 64, 2), Config(128, 128, 2, "m"), *(Config(128, 64, 2, "m", split_k=parts) for parts in (2, 3, 4))]
    elif op == "matmul":
        found = [Config(128, 192, 2, "m", 2, "b"), Config(128, 160, 2, "m", 2, "a", "m", 8, slots=5)]
    elif op == "masked_matmul":
        found = [Config(256, 128, 2, "m", 2, "a", "m", 8, ordered=True)]
    elif op == "grouped_bf16_wgrad":
        found = [Config(128, 256, 2, "m", 2, "b", "m", 8, slots=1)]
    return [_deepest(config, op) for config in found]


def shared_memory(config: Config, op: str, dtype) -> int:
    """Bytes of shared memory that `config` takes for an op with output of that dtype."""
    operands = Plain() if "bf16" in op else Scaled("tiles" if "wgrad" in op else "blocks")
    return smem_bytes(config, operands, dtype, ragged=op in ("grouped_matmul", "grouped_bf16"))


def _deepest(config: Config, op: str) -> Config:
    """`config` with as many stages as fit, which is at least two."""
    dtype = jnp.bfloat16 if op == "grouped_bf16" else jnp.float32
    deeper = (dataclasses.replace(config, stages=stages) for stages in range(2, 17))
    return [c for c in deeper if shared_memory(c, op, dtype) <= SMEM_BYTES][-1]


def _estimate(config: Config, op: str, m: int, n: int, k: int, groups: int, num_sms: int) -> float:
    """Seconds, from the peak rate and what L2 was seen to deliver."""
    ragged = op in ("grouped_matmul", "masked_matmul", "grouped_bf16")
    row_tiles = groups * (m / config.tile_m + 0.5) if ragged else groups * -(-m // config.tile_m)
    tiles = row_tiles * -(-n // config.tile_n) * config.split_k
    waves = -(-tiles // num_sms)
    depth = k / config.split_k
    table = _BF16_EFFICIENCY if "bf16" in op else _WGRAD_EFFICIENCY if "wgrad" in op else _EFFICIENCY
    efficiency, itemsize = table.get((config.tile_m, config.tile_n), 0.4), 2 if "bf16" in op else 1
    multiply = 2 * config.tile_m * config.tile_n * depth / (PEAK_FLOPS / itemsize / num_sms * efficiency)
    shared_a, shared_b = (config.cluster if config.multicast == operand else 1 for operand in ("a", "b"))
    load = (min(m, config.tile_m) / shared_a + config.tile_n / shared_b) * depth * itemsize / (L2_BYTES_PER_SECOND / num_sms)
    sum_parts = 3e-6 + 8 * m * n * config.split_k / MEMORY_BYTES_PER_SECOND if config.split_k > 1 else 0
    return waves * max(multiply, load) + sum_parts


PEAK_FLOPS, L2_BYTES_PER_SECOND, MEMORY_BYTES_PER_SECOND = 1979e12, 7.5e12, 3e12
# of the peak, by tile, measured on an H100, weight gradients on an H200
_EFFICIENCY = {(256, 128): 0.67, (128, 256): 0.68, (128, 192): 0.62, (192, 128): 0.6, (128, 128): 0.55, (64, 256): 0.5}
_BF16_EFFICIENCY = {(128, 256): 0.75, (256, 128): 0.74, (192, 128): 0.74}
_WGRAD_EFFICIENCY = {(256, 128): 0.52, (128, 256): 0.53, (128, 192): 0.45, (192, 128): 0.49}
