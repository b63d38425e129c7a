"""Tile choices for the GEMM kernel: measured ones from data/<device>.json, and a rule for shapes that nobody has measured.

`python -m pallas_kernels.tune OP` measures every candidate for the shapes of an op on the GPU it runs on and writes the file.
"""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp

from pallas_kernels.gemm import SMEM_BYTES, Config, smem_bytes
from pallas_kernels.platform import device_kind

DATA = pathlib.Path(__file__).parent / "data"
OPS = ("matmul", "grouped_matmul", "masked_matmul", "wgrad", "grouped_wgrad")


def choose(op: str, m: int, n: int, k: int, num_sms: int) -> Config:
    """The configuration for m rows (of the average group where there are groups), n columns and a depth of k.

    A measured choice is taken for the same op, n, k and number of SMs, and the nearest m within a factor of two.
    """
    near = [e for e in _measured(device_kind()) if (e["op"], e["n"], e["k"], e["num_sms"]) == (op, n, k, num_sms)]
    near = [e for e in near if e["m"] <= 2 * m and m <= 2 * e["m"]]
    if near:
        best = min(near, key=lambda e: max(e["m"] / m, m / e["m"]))
        return Config(**best["config"])
    return rule(op, m, n, k, num_sms)


def data_file(kind: str) -> pathlib.Path:
    return DATA / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _measured(kind):
    file = data_file(kind)
    return json.loads(file.read_text())["choices"] if file.exists() else []


def rule(op: str, m: int, n: int, k: int, num_sms: int) -> Config:
    """The candidate with the shortest estimated time: whole waves of tiles, each as long as its slower side, compute or loads."""
    return min(candidates(op, m, n, k, num_sms), key=lambda config: _estimate(config, op, m, n, k, num_sms))


def candidates(op: str, m: int, n: int, k: int, num_sms: int) -> list[Config]:
    """Configurations that are worth trying, all of which fit into shared memory."""
    tiles = [(64, cols, None) for cols in (16, 32, 56, 64, 96, 128)] + [(64, 128, "n"), (64, 256, "n")]
    if m > 64 or op not in ("matmul", "masked_matmul"):
        tiles += [(128, 64, "m"), (128, 128, "m"), (128, 192, "m")]
    if m > 128:
        tiles += [(128, 256, "n"), (256, 128, "m")]
    if op in ("wgrad", "grouped_wgrad"):
        tiles = [(128, 128, "m"), (128, 192, "m"), (128, 256, "n"), (256, 128, "m")]
    found = []
    for tile_m, tile_n, split in tiles:
        for cluster, multicast in ((1, "a"), (2, "a"), (4, "a"), (2, "b")):
            if multicast == "b" and (op != "matmul" or m <= tile_m):
                continue
            for width in (1, 8, 16) if m > 128 else (1,):
                config = Config(tile_m, tile_n, 2, split, cluster, multicast, "n" if width == 1 else "m", width)
                found.append(_deepest(config, op))
    return found


def _deepest(config: Config, op: str) -> Config:
    """`config` with as many stages as fit."""
    b_kind, dtype = ("tiles", jnp.float32) if "wgrad" in op else ("blocks", jnp.bfloat16)
    fits = [
        c
        for stages in range(2, 13)
        if smem_bytes(c := dataclasses.replace(config, stages=stages), b_kind, dtype, ragged=op == "grouped_matmul") <= SMEM_BYTES
    ]
    return fits[-1]


def _estimate(config: Config, op: str, m: int, n: int, k: int, num_sms: int) -> float:
    """Seconds per wave of an H200, times waves."""
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    waves = -(-tiles // num_sms)
    multiply = 2 * config.tile_m * config.tile_n * k / (1979e12 / 132 * _EFFICIENCY.get((config.tile_m, config.tile_n), 0.4))
    shared = config.tile_m / (config.cluster if config.multicast == "a" else 1) + config.tile_n / (
        config.cluster if config.multicast == "b" else 1
    )
    load = shared * k / (6e12 / 132)
    return waves * max(multiply, load)


_EFFICIENCY = {(256, 128): 0.68, (128, 256): 0.67, (128, 192): 0.67, (128, 128): 0.6, (64, 256): 0.5}
