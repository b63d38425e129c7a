"""The weight gradients on Hopper: the GEMM kernel along the tokens, with scales per row of both operands."""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.gemm import ROWS, Problem, Table, Unit, gemm
from pallas_kernels.platform import device_sms
from pallas_kernels.quantize.reference import padded_starts
from pallas_kernels.quantized import BLOCK, num_blocks, pad_operand, pad_to
from pallas_kernels.scaled import Scaled


def fp8_wgrad(a, b, accumulate=None, *, num_sms=None, config=None, interpret=None):
    n, tokens = a.shape
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("wgrad", n, b.shape[0], tokens, num_sms)
    m_tiles, blocks = _row_tiles(n, config), num_blocks(tokens)
    share = -(-blocks // config.split_k)
    parts = -(-blocks // share)  # small gradients of many tokens: the tokens are shared out, and the parts are summed

    def unit(index):
        part, tile = index // m_tiles, index % m_tiles
        return Unit(tile * (config.tile_m // ROWS), 0, part, part * share, jnp.minimum(share, blocks - part * share))

    problem = {"units": m_tiles * parts, "unit": unit}
    if parts == 1:
        return _run(config, a, b, accumulate, (), num_sms, interpret, **problem)
    dw = jnp.sum(_run(config, a, b, None, (parts,), num_sms, interpret, grouped=("out",), **problem), axis=0)
    return dw if accumulate is None else accumulate + dw


def grouped_fp8_wgrad(a, b, group_sizes, accumulate=None, *, num_sms=None, config=None, interpret=None):
    n, groups = a.shape[0], group_sizes.shape[0]
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("grouped_wgrad", n, b.shape[0], a.shape[1] // groups, num_sms, groups)
    m_tiles = _row_tiles(n, config)
    group, tile = jnp.divmod(jnp.arange(groups * m_tiles, dtype=jnp.int32), m_tiles)
    starts = padded_starts(group_sizes) // BLOCK
    units = Unit(tile * (config.tile_m // ROWS), 0, group, starts[group], (starts[1:] - starts[:-1])[group])
    table = Table.of(units, jnp.int32(groups * m_tiles))
    return _run(config, a, b, accumulate, (groups,), num_sms, interpret, table=table, grouped=("out",))


def _row_tiles(n, config):
    """How many for n rows. Neighbours that share `b` must be of one group, and the odd one out must not add its neighbour's tile again."""
    share = config.cluster if config.multicast == "b" else 1
    return -(-n // (config.tile_m * share)) * share


def _run(config, a, b, accumulate, lead, num_sms, interpret, *, table=None, **problem):
    n, k = a.shape[0], b.shape[0]
    a, b = pad_operand(a, rows=ROWS), pad_operand(b, rows=64)
    shape = (*lead, a.shape[0], b.shape[0])
    in_place = accumulate is not None and interpret is None  # the interpreter has no adding copies
    problem = Problem(cols=k, out_type=jax.ShapeDtypeStruct(shape, jnp.float32), accumulate=in_place, **problem)
    if not in_place:
        out = gemm(config, problem, Scaled(b.kind), Scaled.arrays(a, b), table=table, num_sms=num_sms, interpret=interpret)[..., :n, :k]
        return out if accumulate is None else accumulate + out
    total = jax.new_ref(pad_to(accumulate, shape))
    gemm(config, problem, Scaled(b.kind), Scaled.arrays(a, b), table=table, out=total, num_sms=num_sms)
    return jax.freeze(total)[..., :n, :k]
