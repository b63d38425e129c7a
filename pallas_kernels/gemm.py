"""The one GEMM kernel for Hopper; dense, grouped, masked and weight-gradient products are uses of it, in FP8 and in bfloat16.

    out[group, rows, cols] = sum over k of a[rows, k] @ b[group, cols, k].T

A persistent CTA has one warpgroup that loads tiles by TMA into a ring of `stages` buffers and one to three that multiply. What a stage
holds and how it is summed up is the operands' business: `scaled.Scaled` (FP8 with fine-grained scales) or `plain.Plain` (bfloat16).

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
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.quantized import BLOCK

ROWS = 8  # TMA fills SMEM in the 8-row tiles that WGMMA reads, so a row tile begins at a multiple of 8
WAVE = 64  # rows of one WGMMA
SMEM_BYTES = 232448  # of one SM
REDUCTION_SCRATCH = 512
REGISTERS = {2: (224, 56), 3: (152, 56)}  # of a thread that multiplies, and that loads, by warpgroups that multiply: none are spilled
TMA_ALIGNMENT = 128  # bytes, of a copy's beginning in SMEM; in global memory it is 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile choices for one shape; see tuning.py.

    tile_m, tile_n: the CTA's output tile. stages: depth of the load ring. split: the axis, "m" or "n", along which two or three math
    warpgroups share the tile; None for one warpgroup. cluster: how many CTAs work on neighbouring tiles; multicast: the operand, "a" or
    "b", that they share and load once. minor, width: the order of tiles (`plgpu.planar_snake`), for reuse in L2. split_k: parts of K
    that are computed apart and summed afterwards, to fill the device when there are few tiles.
    ordered: the math warpgroups, which are two, take turns at issuing their WGMMAs. slots: up to how many pieces of its output a
    warpgroup keeps in SMEM; with four most tiles fit in whole, so that nothing waits, and with fewer there is room for another stage.
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
    slots: int = 4

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
    def blocks_n(self) -> int:
        """How many 128-wide blocks of `b` a tile can touch."""
        return -(-(BLOCK - math.gcd(self.tile_n, BLOCK) + self.tile_n) // BLOCK)

    def staged(self, dtype) -> int:
        """Columns of the output that are stored by one copy: 128 bytes where the tile allows it."""
        line = 128 // jnp.dtype(dtype).itemsize
        return line if self.piece % line == 0 else self.piece

    def pieces(self, dtype) -> int:
        """How many such pieces [64, staged] a warpgroup keeps in SMEM: whole rows of them, or a part that divides a row."""
        in_wave = self.wave_cols // self.staged(dtype)
        pieces = self.wave_rows // WAVE * in_wave
        return max(s for s in range(1, self.slots + 1) if in_wave % s == 0 or (s % in_wave == 0 and s <= pieces))


class Unit(NamedTuple):
    """A row tile, in int32 scalars: it begins at row 8 * row8; `steps` blocks of K from `block` on.

    valid: of a ragged or partial problem, which of its rows are wanted, from first to last: first << 16 | last.
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
        # Not `== 0`: zeros of this shape are wanted elsewhere, too, and XLA would make one kernel of all tables that read the same ones.
        first = index < 1
        of = lambda i: index == i if i else first  # noqa: E731
        rows = sum(jnp.where(of(i), jnp.pad(column, (1, 0))[:, None], 0) for i, column in enumerate(columns))
        head = (jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None] == 0) & first
        rows = jnp.where(head, count.astype(jnp.int32), rows)
        return cls(rows, Unit(*(field if isinstance(field, int) else None for field in units)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is multiplied.

    units, unit: how many row tiles there are, and the function from an index to a `Unit`; None where a table on the device has them.
    cols: of the output. grouped: which of "a", "b" and "out" have a leading axis that is indexed by the unit's group. ragged: units end
    anywhere, and other rows must be left alone. partial: they end anywhere, and what becomes of their other rows does not matter.
    accumulate: add to the output instead of overwriting it.
    """

    cols: int
    out_type: jax.ShapeDtypeStruct
    units: int | None = None
    unit: Callable[[Any], Unit] | None = None
    grouped: tuple[str, ...] = ()
    ragged: bool = False
    partial: bool = False
    accumulate: bool = False

    def at(self, name, unit):
        return (unit.group,) if name in self.grouped else ()


def smem_bytes(config: Config, operands, out_dtype, *, ragged: bool) -> int:
    """Shared memory that a configuration takes, in bytes. At most SMEM_BYTES can be had."""
    arrays = [x for x in _scratch(config, operands, out_dtype, ragged).values() if hasattr(x, "dtype") and hasattr(x, "shape")]
    aligned = sum(-(-math.prod(x.shape) * jnp.dtype(x.dtype).itemsize // 1024) * 1024 for x in arrays)
    return aligned + 1024 + REDUCTION_SCRATCH  # the barriers take less than 1 KiB


def gemm(config: Config, problem: Problem, operands, arrays, *, table=None, out=None, num_sms: int, interpret=None):
    """Runs the kernel; returns the output array, or nothing where it accumulates.

    operands, arrays: a `Scaled` or `Plain` and the arrays that its `copies` take.
    table: the units, if `problem` has no function for them.
    out: with `problem.accumulate`, the `jax.Ref` to add to.
    """
    if problem.ragged and config.staged(problem.out_type.dtype) * problem.out_type.dtype.itemsize % TMA_ALIGNMENT:
        raise ValueError(f"config: tiles of a ragged problem need rows of {TMA_ALIGNMENT} bytes to be stored one by one, got {config}")
    if problem.accumulate and problem.units and config.multicast == "b" and problem.units % config.cluster:
        raise ValueError(f"problem: {problem.units} row tiles for clusters of {config.cluster} would add the last one twice")
    arguments = [*arrays, *([] if table is None else [table.rows]), *([out] if problem.accumulate else [])]
    kernel = plgpu.kernel(
        functools.partial(_body, config, problem, operands, len(arrays), table and table.known, interpret is not None),
        out_type=() if problem.accumulate else problem.out_type,
        scratch_types=[_scratch(config, operands, problem.out_type.dtype, problem.ragged)],
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
    return kernel(*arguments)


def _clusters(num_sms, cluster):
    """How many clusters can run at once. SMs come in pairs, but not everywhere in fours: a few are left over."""
    return max((num_sms if cluster <= 2 else num_sms - cluster) // cluster, 1)


def _scratch(config, operands, out_dtype, ragged):
    """The ring of operand tiles with its barriers, and staging for the output."""
    stages, warpgroups, staged, slots = config.stages, config.warpgroups, config.staged(out_dtype), config.pieces(out_dtype)
    ring = operands.ring(config)
    scratch = ring | {"full": plgpu.Barrier(num_arrivals=len(ring), num_barriers=stages)}
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


def _body(config, problem, operands, num_arrays, known, interpreted, *refs):
    arrays, (*table, out, smem) = refs[:num_arrays], refs[num_arrays:]
    warpgroup = lax.axis_index("wg")
    tiles = _Tiles(config, problem, Table(table[0], known) if table else None)

    @pl.when(warpgroup == config.warpgroups)
    def _():
        if config.warpgroups > 1:
            plgpu.set_max_registers(operands.registers[config.warpgroups][1], action="decrease")
        _load(config, problem, operands, tiles, arrays, smem)

    @pl.when(warpgroup < config.warpgroups)
    def _():
        if config.warpgroups > 1:
            plgpu.set_max_registers(operands.registers[config.warpgroups][0], action="increase")
        _multiply(config, problem, operands, tiles, out, smem, warpgroup, interpreted)


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


def _load(config, problem, operands, tiles, arrays, smem):
    """Fills the ring: the warpgroup that issues TMA copies."""
    stages, full, empty = config.stages, smem["full"], smem["empty"]
    shared = {config.multicast: {"collective_axes": "cluster"}} if config.cluster > 1 else {}

    def load_tile(tile, following, step):
        unit, n = tile

        def load_block(i, step):
            slot = lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            for name, source in operands.copies(config, problem, unit, n, i, *arrays).items():
                to = smem[name].at[slot]
                if source.shape[0] < to.shape[0]:
                    to = to.at[pl.ds(0, source.shape[0])]
                plgpu.copy_gmem_to_smem(source, to, full.at[slot], **shared.get(name, {}))
            return step + 1

        return lax.fori_loop(0, unit.steps, load_block, step)

    steps = tiles.loop(load_tile, lambda tile: jnp.int32(0))
    for i in range(stages):  # let the last reads finish: the other CTA of a cluster may still be about to signal this one
        step = steps + i
        pl.when(step >= stages)(lambda step=step: plgpu.barrier_wait(empty.at[lax.rem(step, stages)]))


def _warpgroup_barrier(interpreted):
    """Of the four warps of this warpgroup; Pallas has none without a fence, which costs registers. The interpreter has no warps."""
    if not interpreted:
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def use_zero(interpreted):
    """To be called after a product whose accumulator begins at zero. Without a later use LLVM makes the register with that zero one of the
    accumulator's own; then ptxas no longer sees that all of them begin at zero and writes 64 registers before each product."""
    if interpreted:
        return

    @plgpu.inline_mgpu()
    def use(_):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [utils.c(0.0, ir.F32Type.get())], "", "f", has_side_effects=True)

    use()


def _multiply(config, problem, operands, tiles, out, smem, warpgroup, interpreted):
    """Empties the ring: a warpgroup that multiplies and stores."""
    row0 = warpgroup * config.wave_rows if config.split == "m" else 0
    col0 = warpgroup * config.wave_cols if config.split == "n" else 0

    def multiply_tile(tile, following, slot):
        unit, n = tile

        def multiply(slot):
            slot, sums = operands.accumulate(config, unit, n, slot, smem, warpgroup, row0, col0, interpreted)
            for wave, of_wave in enumerate(sums):
                _store(config, problem, unit, row0, wave, n * config.tile_n + col0, of_wave, out, smem, warpgroup)
            return slot

        if not (problem.ragged or problem.partial):
            return multiply(slot)
        needed = (unit.valid & 0xFFFF > row0) & (unit.valid >> 16 < row0 + config.wave_rows)
        return lax.cond(needed, multiply, lambda slot: lax.fori_loop(0, unit.steps, pass_on, slot), slot)

    def pass_on(i, slot):
        """Leaves a step to the others: none of its rows are stored by this warpgroup."""
        plgpu.barrier_wait(smem["full"].at[slot])
        if config.cluster > 1 and (config.split == "m" or config.multicast == "b"):  # else no tile is without rows
            # One thread gives a cluster's stage back, and here no WGMMA keeps the warps together: one that came two rounds of the ring
            # later would find the barrier in a phase that looks like the one before its own, and wait for ever.
            _warpgroup_barrier(interpreted)
        for _ in range(config.wave_rows // WAVE if config.ordered else 0):
            plgpu.barrier_wait(smem["turn"].at[warpgroup])
            plgpu.barrier_arrive(smem["turn"].at[1 - warpgroup])
        plgpu.barrier_arrive(smem["empty"].at[slot])
        return jnp.where(slot == config.stages - 1, 0, slot + 1)

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
    staged, slots = config.staged(out.dtype), config.pieces(out.dtype)
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
