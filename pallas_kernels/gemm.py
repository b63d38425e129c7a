"""The one block-scaled FP8 GEMM kernel for Hopper; the dense, grouped, masked and weight-gradient products are four uses of it.

    out[group, rows, cols] = sum over k of (a[rows, k] @ b[group, cols, k].T) * a_scale[k, rows] * b_scale[k, cols]

A persistent CTA has one warpgroup that loads tiles by TMA into a ring of `stages` buffers and one or two that multiply. Each step of 128 of
K is one WGMMA into a fresh accumulator, which is then scaled and added to float32 registers: the promotion of the DeepSeek-V3 report
(section 3.3.2, figure 7b). While one math warpgroup promotes, the other's WGMMA keeps the tensor cores busy.

What to compute is a list of `Unit`s: row tiles, each with its group and its part of K. A dense product counts them out; the others read
them from a small int32 table on the device, so that group sizes never reach the host.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized import BLOCK, E4M3

ROWS = 8  # TMA fills SMEM in the 8-row tiles that WGMMA reads, so a row tile begins at a multiple of 8
WAVE = 64  # rows of one WGMMA
SMEM_BYTES = 232448  # of one SM
REDUCTION_SCRATCH = 512
TMA_ALIGNMENT = 128  # bytes, of a copy's beginning in SMEM; in global memory it is 16
LINE = TMA_ALIGNMENT // 4  # float32 values


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile choices for one shape; see tuning.py.

    tile_m, tile_n: the CTA's output tile. stages: depth of the load ring. split: the axis, "m" or "n", along which two or three math
    warpgroups share the tile; None for one warpgroup. cluster: how many CTAs work on neighbouring tiles; multicast: the operand, "a" or
    "b", that they share and load once. minor, width: the order of tiles (`plgpu.planar_snake`), for reuse in L2. split_k: parts of K
    that are computed apart and summed afterwards, to fill the device when there are few tiles.
    ordered: the math warpgroups, which are two, take turns at issuing their WGMMAs.
    """

    tile_m: int
    tile_n: int
    stages: int
    split: str | None = None
    cluster: int = 1
    multicast: str = "a"
    minor: str = "n"
    width: int = 1
    split_k: int = 1
    ordered: bool = False

    def __post_init__(self):
        if self.cluster > 1 and self.multicast == "b" and self.split_k > 1:
            raise ValueError("split_k: expected 1 where row tiles share b, because its parts have different blocks of K")
        if self.ordered and self.warpgroups != 2:
            raise ValueError(f"ordered: expected two math warpgroups, got {self.warpgroups}")

    @property
    def warpgroups(self) -> int:
        """How many multiply: three where a tile has 192 rows or columns along the split."""
        if self.split is None:
            return 1
        return 3 if (self.tile_m if self.split == "m" else self.tile_n) == 192 else 2

    @property
    def wave_rows(self) -> int:
        """Rows of the tile that one warpgroup computes."""
        return self.tile_m // self.warpgroups if self.split == "m" else self.tile_m

    @property
    def wave_cols(self) -> int:
        """Columns of the tile that one warpgroup computes."""
        return self.tile_n // self.warpgroups if self.split == "n" else self.tile_n

    @property
    def piece(self) -> int:
        """Columns that certainly share one scale of `b`, if its blocks are 128 wide; the whole width where that would be too narrow."""
        common = math.gcd(self.wave_cols, BLOCK)
        return common if common >= 32 or common == self.wave_cols else self.wave_cols

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that multiplies and of one that loads, where two warpgroups multiply: what ptxas does not spill with."""
        return (152, 56) if self.warpgroups == 3 else (224, 56)

    @property
    def blocks_n(self) -> int:
        """How many 128-wide blocks of `b` a tile can touch."""
        return -(-(BLOCK - math.gcd(self.tile_n, BLOCK) + self.tile_n) // BLOCK)

    def staged(self, dtype) -> int:
        """Columns of the output that are stored by one copy: 128 bytes where the tile allows it."""
        line = 128 // jnp.dtype(dtype).itemsize
        return line if self.piece % line == 0 else self.piece

    def slots(self, dtype) -> int:
        """How many such pieces [64, staged] a warpgroup keeps in SMEM: all of its tile if it has up to four, so that nothing waits."""
        in_wave = self.wave_cols // self.staged(dtype)
        pieces = self.wave_rows // WAVE * in_wave
        return max(s for s in range(1, 5) if in_wave % s == 0 or (s % in_wave == 0 and s <= pieces))


class Unit(NamedTuple):
    """A row tile, in int32 scalars: it begins at row 8 * row8; `steps` blocks of K from `block` on.

    valid: of a ragged problem, which of its rows are stored, from first to last: first << 16 | last.
    """

    row8: Any
    valid: Any
    group: Any
    block: Any
    steps: Any


class Table(NamedTuple):
    """Units on the device. rows: int32 [1 + units, columns]: how many units there are in the first entry of row 0, then a row for each;
    known: the fields that all units share, as ints, and None for those that have a column."""

    rows: Any
    known: Unit

    @classmethod
    def of(cls, units: Unit, count):
        """`units` has arrays [most] or ints as fields; the first `count` units are to be done."""
        count = lax.optimization_barrier(count)  # or XLA counts all units within the kernel that makes the table, in one thread
        columns = [field.astype(jnp.int32) for field in units if not isinstance(field, int)]
        # Selected, not stacked: XLA's kernel for many narrow pieces takes ten times as long.
        index = jnp.arange(len(columns), dtype=jnp.int32)
        rows = sum(jnp.where(index == i, jnp.pad(column, (1, 0))[:, None], 0) for i, column in enumerate(columns))
        head = (jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] == 0) & (index == 0)
        rows = jnp.where(head, count.astype(jnp.int32), rows)
        return cls(rows, Unit(*(field if isinstance(field, int) else None for field in units)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is multiplied.

    units, unit: how many row tiles there are, and the function from an index to a `Unit`; None where a table on the device has them.
    cols: of the output. grouped: which of "a", "b" and "out" have a leading axis that is indexed by the unit's group. ragged: units end
    anywhere, and other rows must be left alone. accumulate: add to the output instead of overwriting it.
    """

    cols: int
    out_type: jax.ShapeDtypeStruct
    units: int | None = None
    unit: Callable[[Any], Unit] | None = None
    grouped: tuple[str, ...] = ()
    ragged: bool = False
    accumulate: bool = False

    def at(self, name, unit):
        return (unit.group,) if name in self.grouped else ()


def smem_bytes(config: Config, b_kind: str, out_dtype, *, ragged: bool) -> int:
    """Shared memory that a configuration takes, in bytes. At most SMEM_BYTES can be had."""
    arrays = [x for x in _scratch(config, b_kind, out_dtype, ragged).values() if hasattr(x, "dtype") and hasattr(x, "shape")]
    aligned = sum(-(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024 for x in arrays)
    return aligned + 1024 + REDUCTION_SCRATCH  # the barriers take less than 1 KiB


def block_scaled_gemm(config: Config, problem: Problem, a, b, *, table=None, out=None, num_sms: int, interpret=None):
    """Runs the kernel on Quantized `a` (tiles) and `b` (tiles or blocks); returns the output array, or nothing where it accumulates.

    table: the units, if `problem` has no function for them.
    out: with `problem.accumulate`, the `jax.Ref` to add to.
    """
    if problem.ragged and config.staged(problem.out_type.dtype) * problem.out_type.dtype.itemsize % TMA_ALIGNMENT:
        raise ValueError(f"config: tiles of a ragged problem need rows of {TMA_ALIGNMENT} bytes to be stored one by one, got {config}")
    operands = [a.values, a.stored_scales, b.values, b.stored_scales]
    operands += [] if table is None else [table.rows]
    operands += [out] if problem.accumulate else []
    kernel = plgpu.kernel(
        functools.partial(_body, config, problem, b.kind, table and table.known),
        out_type=() if problem.accumulate else problem.out_type,
        scratch_types=[_scratch(config, b.kind, problem.out_type.dtype, problem.ragged)],
        grid=(_clusters(num_sms, config.cluster),),
        grid_names=("sm",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=REDUCTION_SCRATCH,
            unsafe_no_auto_barriers=True,
        ),
    )
    return kernel(*operands)


def _clusters(num_sms, cluster):
    """How many clusters can run at once. SMs come in pairs, but not everywhere in fours: a few are left over."""
    return max((num_sms if cluster <= 2 else num_sms - cluster) // cluster, 1)


def _scratch(config, b_kind, out_dtype, ragged):
    """The ring of operand tiles with its barriers, and staging for the output."""
    stages, warpgroups, staged, slots = config.stages, config.warpgroups, config.staged(out_dtype), config.slots(out_dtype)
    scratch = {
        "a": plgpu.SMEM((stages, config.tile_m, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "b": plgpu.SMEM((stages, config.tile_n, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
        "sa": plgpu.SMEM((stages, config.tile_m), jnp.float32),
        "sb": plgpu.SMEM((stages, config.tile_n) if b_kind == "tiles" else (stages, config.blocks_n, LINE), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
    }
    staging = plgpu.SMEM((warpgroups, slots, WAVE, staged), out_dtype, transforms=swizzled(staged, out_dtype))
    # single rows can only be copied out of a plain layout
    scratch["out"] = plgpu.RefUnion(staging, plgpu.SMEM(staging.shape, out_dtype)) if ragged else staging
    if config.ordered:
        scratch["turn"] = plgpu.Barrier(num_arrivals=1, num_barriers=2)
    if config.cluster == 1:
        scratch["empty"] = plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages)
    else:
        scratch["empty"] = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=warpgroups, num_barriers=stages)
    return scratch


def swizzled(columns, dtype):
    """The SMEM layout on which WGMMA, TMA and register stores agree without bank conflicts, for rows of `columns` elements."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(columns * itemsize, 128)
    if swizzle < 32:
        return ()
    return (plgpu.TilingTransform((ROWS, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def _body(config, problem, b_kind, known, a, sa, b, sb, *refs):
    *table, out, smem = refs
    warpgroup = lax.axis_index("wg")
    tiles = _Tiles(config, problem, Table(table[0], known) if table else None)

    @pl.when(warpgroup == config.warpgroups)
    def _():
        if config.warpgroups > 1:
            plgpu.set_max_registers(config.registers[1], action="decrease")
        _load(config, problem, b_kind, tiles, a, sa, b, sb, smem)

    @pl.when(warpgroup < config.warpgroups)
    def _():
        if config.warpgroups > 1:
            plgpu.set_max_registers(config.registers[0], action="increase")
        _multiply(config, problem, b_kind, tiles, out, smem, warpgroup)


class _Tiles:
    """The output tiles of this CTA, in order: every num_sms-th of all."""

    def __init__(self, config, problem, table):
        self.config, self.problem, self.table = config, problem, table
        self.units = problem.units if table is None else table.rows[0, 0]
        share_m, share_n = (config.cluster, 1) if config.multicast == "b" else (1, config.cluster)
        self.grid = pl.cdiv(self.units, share_m), pl.cdiv(pl.cdiv(problem.cols, config.tile_n), share_n)

    def locate(self, index):
        """(unit, column tile) of output tile `index`."""
        m, n = plgpu.planar_snake(index, self.grid, 0 if self.config.minor == "m" else 1, self.config.width)
        in_cluster = lax.axis_index("cluster")
        if self.config.multicast == "b":
            m = jnp.minimum(m * self.config.cluster + in_cluster, self.units - 1)  # the odd one out repeats its neighbour's tile
        else:
            n = n * self.config.cluster + in_cluster
        if self.table is None:
            return self.problem.unit(m), n
        columns = itertools.count()
        return Unit(*(self.table.rows[m + 1, next(columns)] if field is None else field for field in self.table.known)), n

    def loop(self, body, init):
        """Folds carry = body(tile, next tile, carry). The next tile is located early, because that may read the table."""
        start, stride = lax.axis_index("sm"), lax.axis_size("sm")
        total = jnp.int32(self.grid[0] * self.grid[1])

        def locate(i):
            return self.locate(jnp.clip(start + i * stride, 0, jnp.maximum(total - 1, 0)))

        def step(i, carry):
            tile, carry = carry
            following = locate(i + 1)
            return following, body(tile, following, carry)

        count = lax.div(jnp.maximum(total - start, 0) + stride - 1, stride)
        return lax.fori_loop(0, count, step, (locate(0), init(locate(0))))[1]


def _load(config, problem, b_kind, tiles, a, sa, b, sb, smem):
    """Fills the ring: the warpgroup that issues TMA copies."""
    stages, full, empty = config.stages, smem["full"], smem["empty"]
    multicast = {"a": {}, "b": {}} | ({config.multicast: {"collective_axes": "cluster"}} if config.cluster > 1 else {})

    def load_tile(tile, following, step):
        unit, n = tile
        a_rows, b_rows = pl.ds(unit.row8 * ROWS, config.tile_m), pl.ds(n * config.tile_n, config.tile_n)
        a_at, b_at = problem.at("a", unit), problem.at("b", unit)

        def load_block(i, step):
            slot, block = lax.rem(step, stages), unit.block + i
            k = pl.ds(block * BLOCK, BLOCK)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            plgpu.copy_gmem_to_smem(a.at[*a_at, a_rows, k], smem["a"].at[slot], full.at[slot], **multicast["a"])
            plgpu.copy_gmem_to_smem(b.at[*b_at, b_rows, k], smem["b"].at[slot], full.at[slot], **multicast["b"])
            plgpu.copy_gmem_to_smem(sa.at[*a_at, block, a_rows], smem["sa"].at[slot], full.at[slot])
            if b_kind == "tiles":
                scales = sb.at[block, b_rows]
            else:
                scales = sb.at[*b_at, pl.ds(lax.div(n * config.tile_n, BLOCK), config.blocks_n), pl.ds(block - lax.rem(block, 4), LINE)]
            plgpu.copy_gmem_to_smem(scales, smem["sb"].at[slot], full.at[slot])
            return step + 1

        return lax.fori_loop(0, unit.steps, load_block, step)

    steps = tiles.loop(load_tile, lambda tile: jnp.int32(0))
    for i in range(stages):  # let the last reads finish: the other CTA of a cluster may still be about to signal this one
        step = steps + i
        pl.when(step >= stages)(lambda step=step: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]))


def _multiply(config, problem, b_kind, tiles, out, smem, warpgroup):
    """Empties the ring: a warpgroup that multiplies, promotes and stores."""
    row0 = warpgroup * config.wave_rows if config.split == "m" else 0
    col0 = warpgroup * config.wave_cols if config.split == "n" else 0
    waves, cols, piece = config.wave_rows // WAVE, config.wave_cols, config.piece
    full, empty = smem["full"], smem["empty"]
    by_column = b_kind == "tiles" or (piece == cols and BLOCK % piece != 0)  # one scale for each column, else one for each piece

    def read_scales(slot, n, block):
        """Scalar scales of `b`: of each piece, or of the two blocks that a narrow tile can touch."""
        if b_kind == "tiles":
            return ()
        col = n * config.tile_n
        starts = (0, cols - 1) if by_column else range(0, cols, piece)
        return tuple(smem["sb"][slot, lax.div(col + col0 + start, BLOCK) - lax.div(col, BLOCK), lax.rem(block, 4)] for start in starts)

    def column_scales(scales, slot, col):
        if b_kind == "tiles":
            return plgpu.load(smem["sb"].at[slot, pl.ds(col0, cols)], layout=plgpu.Layout.WGMMA.reduce(0))
        index = plgpu.broadcasted_iota(jnp.int32, (cols,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
        return jnp.where(index < BLOCK - lax.rem(col, BLOCK), *scales)

    def multiply_tile(tile, following, slot):
        unit, n = tile
        col = n * config.tile_n + col0

        def multiply_block(i, carry):
            slot, sums = carry
            plgpu.barrier_wait(full.at[slot])
            scales = read_scales(slot, n, unit.block + i)
            factors = (None,) * (cols // piece) if by_column else scales
            promoted = []
            for wave in range(waves):
                rows = pl.ds(row0 + wave * WAVE, WAVE)
                row_scales = plgpu.load(smem["sa"].at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1))

                if config.ordered:
                    plgpu.barrier_wait(smem["turn"].at[warpgroup])

                def product(acc, rows=rows):
                    plgpu.wgmma(acc, smem["a"].at[slot, rows], smem["b"].at[slot, pl.ds(col0, cols)].transpose((1, 0)))
                    if config.ordered:
                        plgpu.barrier_arrive(smem["turn"].at[1 - warpgroup])
                    return acc[...]

                partial = pl.run_scoped(product, plgpu.ACC((WAVE, cols), jnp.float32))
                if by_column:
                    partial *= lax.broadcast_in_dim(column_scales(scales, slot, col), (WAVE, cols), [1])
                if wave == waves - 1:
                    plgpu.barrier_arrive(empty.at[slot])
                for p, factor in enumerate(factors):
                    scale = row_scales if by_column else row_scales * factor
                    scale = lax.broadcast_in_dim(scale, (WAVE, piece), [0])
                    promoted.append(sums[len(promoted)] + partial[:, p * piece : (p + 1) * piece] * scale)
            return jnp.where(slot == config.stages - 1, 0, slot + 1), tuple(promoted)

        zero = plgpu.layout_cast(jnp.zeros((WAVE, piece), jnp.float32), plgpu.Layout.WGMMA)
        slot, sums = lax.fori_loop(0, unit.steps, multiply_block, (slot, (zero,) * (waves * (cols // piece))))
        for wave in range(waves):
            of_wave = sums[wave * (cols // piece) : (wave + 1) * (cols // piece)]
            _store(config, problem, unit, row0, wave, col, of_wave, out, smem, warpgroup)
        return slot

    if config.ordered:
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(smem["turn"].at[0]))
    tiles.loop(multiply_tile, lambda tile: jnp.int32(0))
    if config.ordered:
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(smem["turn"].at[0]))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(config, problem, unit, row_in_tile, wave, col, values, out, smem, warpgroup):
    """Writes 64 rows of the tile, float32 values [64, piece] side by side, to rows row_in_tile + 64 * wave.. of the unit.

    The copies of a tile run while the next one is computed: only the first use of a slot in a tile waits.
    """
    staged, slots = config.staged(out.dtype), config.slots(out.dtype)
    whole_staging, part_staging = smem["out"] if problem.ragged else (smem["out"], None)
    row = unit.row8 * ROWS + row_in_tile + wave * WAVE
    at = problem.at("out", unit)
    how = {"reduction_op": "add"} if problem.accumulate else {}
    pieces = [value[:, i : i + staged].astype(out.dtype) for value in values for i in range(0, config.piece, staged)]

    def whole():
        for first in range(0, len(pieces), slots):
            some = [((wave * len(pieces) + p) % slots, p) for p in range(first, min(first + slots, len(pieces)))]
            if some[0][0] == 0:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for slot, p in some:
                whole_staging.at[warpgroup, slot][...] = pieces[p]
            plgpu.commit_smem()
            for slot, p in some:
                to = out.at[*at, pl.ds(row, WAVE), pl.ds(col + p * staged, staged)]
                plgpu.copy_smem_to_gmem(whole_staging.at[warpgroup, slot], to, **how)

    def part(low, high):
        staging = part_staging.at[warpgroup, 0]
        for p, piece in enumerate(pieces):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[...] = piece
            plgpu.commit_smem()
            for length in (32, 16, 8, 4, 2, 1):  # a copy has a fixed size, so the rows go by the binary digits of their number

                @pl.when((high - low) & length != 0)
                def _(length=length, done=low + ((high - low) & -(2 * length)), p=p):
                    to = out.at[*at, pl.ds(row + done, length), pl.ds(col + p * staged, staged)]
                    plgpu.copy_smem_to_gmem(staging.at[pl.ds(done, length)], to, **how)

    if problem.ragged:
        low, high = (jnp.clip(end - row_in_tile - wave * WAVE, 0, WAVE) for end in (unit.valid >> 16, unit.valid & 0xFFFF))
        pl.when(high - low == WAVE)(whole)
        pl.when((high > low) & (high - low < WAVE))(functools.partial(part, low, high))
    else:
        whole()
