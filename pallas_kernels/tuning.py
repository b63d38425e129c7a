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
from pallas_kernels.platform import device_kind

DATA = pathlib.Path(__file__).parent / "data"
OPS = ("matmul", "grouped_matmul", "masked_matmul", "wgrad", "grouped_wgrad")


class Case(NamedTuple):
    """`groups` products of m rows on average, n columns and a depth of k."""

    op: str
    m: int
    n: int
    k: int
    groups: int = 1


def choose(op: str, m: int, n: int, k: int, num_sms: int, groups: int = 1) -> Config:
    """The configuration for `groups` products of m rows on average, n columns and a depth of k.

    A measured choice is taken for the same op, n and k: the nearest m within a factor of two, then the nearest number of groups and of SMs.
    """
    near = [e for e in _measured(device_kind()) if (e["op"], e["n"], e["k"]) == (op, n, k) and e["m"] <= 2 * m and m <= 2 * e["m"]]
    if near:
        best = min(near, key=lambda e: (_apart(e["m"], m), _apart(e["groups"], groups), _apart(e["num_sms"], num_sms)))
        return Config(**best["config"])
    return shortlist(Case(op, m, n, k, groups), num_sms)[0]


def _apart(x, y) -> float:
    return max(x / y, y / x)


def data_file(kind: str) -> pathlib.Path:
    return DATA / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def _measured(kind):
    files = [data_file(kind), *sorted(DATA.glob("nvidia_*.json"))]
    return next((json.loads(file.read_text())["choices"] for file in files if file.exists()), [])


def shortlist(case: Case, num_sms: int) -> list[Config]:
    """All candidates, the most promising first, and no tile shape a second time before each had its turn.

    A candidate's estimated time is that of whole waves of tiles, each as long as its slower side, multiplying or loading.
    """
    ranked = sorted(candidates(case.op, case.m), key=lambda config: _estimate(config, *case, num_sms))
    kinds = [(config.tile_m, config.tile_n, config.split) for config in ranked]
    return [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: (kinds[:i].count(kinds[i]), i))]


def candidates(op: str, m: int) -> list[Config]:
    """Configurations that are worth trying for products of m rows, as deep as shared memory allows."""
    tiles = [(64, cols, None) for cols in (16, 32, 56, 64, 96, 128)] + [(64, 128, "n"), (64, 256, "n")]
    if m > 64:
        tiles += [(128, 64, "m"), (128, 128, "m"), (128, 192, "m")]
    if m > 128:
        tiles += [(128, 256, "n"), (256, 128, "m")]
    if op in ("wgrad", "grouped_wgrad"):
        tiles = [(128, 128, "m"), (128, 192, "m"), (128, 256, "n"), (256, 128, "m")]
    found = []
    for tile_m, tile_n, split in tiles:
        for cluster, multicast in ((1, "a"), (2, "a"), (4, "a"), (2, "b")):
            if multicast == "b" and (op != "matmul" or m <= tile_m or tile_n % 16):
                continue  # row tiles share b only in a plain grid, and each loads half of its 8-row pieces
            for minor, width in (("n", 1), ("m", 8), ("m", 16)) if m > 128 else (("n", 1),):
                found.append(_deepest(Config(tile_m, tile_n, 2, split, cluster, multicast, minor, width), op))
        if op == "matmul" and m <= 128:
            found += [_deepest(Config(tile_m, tile_n, 2, split, split_k=parts), op) for parts in (2, 4, 7)]
    return found


def _deepest(config: Config, op: str) -> Config:
    """`config` with as many stages as fit, which is at least two."""
    b_kind, dtype, ragged = ("tiles" if "wgrad" in op else "blocks"), jnp.float32, op == "grouped_matmul"
    fits = [
        c
        for stages in range(2, 17)
        if smem_bytes(c := dataclasses.replace(config, stages=stages), b_kind, dtype, ragged=ragged) <= SMEM_BYTES
    ]
    return fits[-1]


def _estimate(config: Config, op: str, m: int, n: int, k: int, groups: int, num_sms: int) -> float:
    """Seconds, from an H200's peak rate and a guess of what its L2 delivers."""
    row_tiles = groups * (m / config.tile_m + 0.5) if op in ("grouped_matmul", "masked_matmul") else groups * -(-m // config.tile_m)
    tiles = row_tiles * -(-n // config.tile_n) * config.split_k
    waves = -(-tiles // num_sms)
    depth = k / config.split_k
    multiply = 2 * config.tile_m * config.tile_n * depth / (PEAK_FLOPS / num_sms * _EFFICIENCY.get((config.tile_m, config.tile_n), 0.4))
    shared_a, shared_b = (config.cluster if config.multicast == operand else 1 for operand in ("a", "b"))
    load = (min(m, config.tile_m) / shared_a + config.tile_n / shared_b) * depth / (L2_BYTES_PER_SECOND / num_sms)
    sum_parts = 3e-6 + 8 * m * n * config.split_k / L2_BYTES_PER_SECOND if config.split_k > 1 else 0
    return waves * max(multiply, load) + sum_parts


PEAK_FLOPS, L2_BYTES_PER_SECOND = 1979e12, 6e12
_EFFICIENCY = {(256, 128): 0.68, (128, 256): 0.67, (128, 192): 0.67, (128, 128): 0.6, (64, 256): 0.5}  # by tile, of a prototype on an H200
