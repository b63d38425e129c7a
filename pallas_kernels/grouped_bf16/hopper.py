"""The bfloat16 grouped products on Hopper: the GEMM kernel over units made on the device from the group sizes."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.gemm import ROWS, Problem, Table, Unit, gemm
from pallas_kernels.grouped_matmul.hopper import ragged_rows
from pallas_kernels.grouped_matmul.tiles import running_sum
from pallas_kernels.plain import DEPTH, Plain
from pallas_kernels.platform import device_sms
from pallas_kernels.quantized import pad_to

LINE = 64  # widths are padded to whole lines of 128 bytes


def grouped_bf16_matmul(x, w, group_sizes, *, transposed=True, num_sms=None, config=None, interpret=None):
    (m, k), groups, n = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("grouped_bf16", -(-m // groups), n, k, num_sms, groups)
    x, w = _padded(x, ROWS, LINE), _padded(w, LINE, LINE)
    table = ragged_rows(group_sizes, config, m, -(-k // DEPTH))
    out_type = jax.ShapeDtypeStruct((x.shape[0], w.shape[1 if transposed else 2]), jnp.bfloat16)
    problem = Problem(cols=n, out_type=out_type, grouped=("b",), ragged=True)
    operands = Plain() if transposed else Plain(k_first=("b",))
    return gemm(config, problem, operands, (x, w), table=table, num_sms=num_sms, interpret=interpret)[:m, :n]


def grouped_bf16_wgrad(dy, x, group_sizes, *, num_sms=None, config=None, interpret=None):
    (rows, n), k, groups = dy.shape, x.shape[1], group_sizes.shape[0]
    num_sms = num_sms or device_sms()
    config = config or tuning.choose("grouped_bf16_wgrad", n, k, -(-rows // groups), num_sms, groups)
    dy, x = _padded(dy, ROWS, LINE), _padded(x, ROWS, LINE)

    ends = jnp.minimum(running_sum(group_sizes.astype(jnp.int32)), rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    begin = starts - lax.rem(starts, ROWS)  # of the first step
    steps = jnp.where(ends > starts, lax.div(ends - begin + DEPTH - 1, DEPTH), 0)
    valid = (starts - begin) << 16 | (ends - begin - (steps - 1) * DEPTH)

    share = config.cluster if config.multicast == "b" else 1
    tiles = -(-n // (config.tile_m * share)) * share
    group, tile = jnp.divmod(jnp.arange(groups * tiles, dtype=jnp.int32), tiles)
    units = Unit(tile * (config.tile_m // ROWS), valid[group], group, lax.div(begin, ROWS)[group], steps[group])
    out_type = jax.ShapeDtypeStruct((groups, dy.shape[1], x.shape[1]), jnp.float32)
    problem = Problem(cols=k, out_type=out_type, grouped=("out",))
    operands, table = Plain(k_first=("a", "b"), masked=True), Table.of(units, jnp.int32(groups * tiles))
    return gemm(config, problem, operands, (dy, x), table=table, num_sms=num_sms, interpret=interpret)[:, :n, :k]


def _padded(x, rows, columns):
    *lead, m, n = x.shape
    return pad_to(x, (*lead, -(-m // rows) * rows, -(-n // columns) * columns))
