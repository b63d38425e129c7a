"""`fp8_matmul` on Hopper: the GEMM kernel over a plain grid of tiles, split along K where there are too few of them."""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.gemm import ROWS, Problem, Unit, gemm
from pallas_kernels.platform import device_sms
from pallas_kernels.quantized import num_blocks, pad_operand
from pallas_kernels.scaled import Scaled


def fp8_matmul(a, b, *, out_dtype=jnp.bfloat16, num_sms=None, config=None, interpret=None):
    (m, k), n = a.shape, b.shape[0]
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("matmul", m, n, k, num_sms)
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)
    m_tiles, blocks = -(-m // config.tile_m), num_blocks(k)
    split = min(config.split_k, blocks)
    share = -(-blocks // split)

    def unit(index):
        part, tile = index // m_tiles, index % m_tiles
        return Unit(tile * (config.tile_m // ROWS), 0, part, part * share, jnp.minimum(share, blocks - part * share))

    shape = (a.shape[0], b.shape[0])
    problem = Problem(
        cols=n,
        out_type=jax.ShapeDtypeStruct(shape if split == 1 else (split, *shape), out_dtype if split == 1 else jnp.float32),
        units=m_tiles * split,
        unit=unit,
        grouped=() if split == 1 else ("out",),
    )
    out = gemm(config, problem, Scaled(b.kind), Scaled.arrays(a, b), num_sms=num_sms, interpret=interpret)
    if split > 1:
        out = jnp.sum(out, axis=0).astype(out_dtype)
    return out[:m, :n]
