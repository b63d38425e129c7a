"""bfloat16 operands of the GEMM kernel: WGMMA sums all of K up in its float32 accumulator. Either operand may have K first."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import REGISTERS, ROWS, WAVE, swizzled

DEPTH = 64  # of K in a stage: rows of 128 bytes


@dataclasses.dataclass(frozen=True)
class Plain:
    """a: [.., rows, K], b: [.., cols, K]; those that `k_first` names have K before their rows or columns. A unit begins at 8 * `block`.

    masked: units begin and end anywhere along K, which is first in both operands. `valid` says where: first << 16 | last, of the first
    step from which and of the last step up to which row of K is the unit's. Of the rows beyond only those of `a` (split along "n": of `b`)
    are masked: in the other operand they must be finite.
    """

    k_first: tuple[str, ...] = ()
    masked: bool = False
    registers = REGISTERS

    def ring(self, config):
        def tiles(name, rows):
            shape = (DEPTH, rows) if name in self.k_first else (rows, DEPTH)
            return plgpu.SMEM((config.stages, *shape), jnp.bfloat16, transforms=swizzled(shape[1], jnp.bfloat16))

        return {"a": tiles("a", config.tile_m), "b": tiles("b", config.tile_n)}

    def copies(self, config, problem, unit, n, i, a, b):
        """What step i of a tile loads: for each part of a stage its source in global memory."""
        k = pl.ds(unit.block * ROWS + i * DEPTH, DEPTH)

        def source(name, ref, rows):
            return ref.at[*problem.at(name, unit), *((k, rows) if name in self.k_first else (rows, k))]

        row = unit.row8 * ROWS
        if "a" in self.k_first:  # then its rows are an axis that is tiled, and not by 8
            row = pl.multiple_of(row, config.tile_m)
        return {"a": source("a", a, pl.ds(row, config.tile_m)), "b": source("b", b, pl.ds(n * config.tile_n, config.tile_n))}

    def accumulate(self, config, unit, n, slot, smem, warpgroup, row0, col0, interpreted):
        """One warpgroup's part of a tile: (the next slot, float32 pieces [64, piece] side by side for each 64 rows)."""
        full, empty = smem["full"], smem["empty"]
        parts = {"a": pl.ds(row0, config.wave_rows), "b": pl.ds(col0, config.wave_cols)}

        def tile(name, slot, *, k_last):
            ref = smem[name].at[slot, :, parts[name]] if name in self.k_first else smem[name].at[slot, parts[name]]
            return ref if (name in self.k_first) != k_last else ref.transpose((1, 0))

        def step(acc, i, slot):
            plgpu.barrier_wait(full.at[slot])
            if self.masked:
                low = jnp.where(i == 0, unit.valid >> 16, 0)
                high = jnp.where(i == unit.steps - 1, unit.valid & 0xFFFF, DEPTH)
                pl.when((low > 0) | (high < DEPTH))(lambda: mask(slot, low, high))
            plgpu.wgmma(acc, tile("a", slot, k_last=True), tile("b", slot, k_last=False))
            plgpu.wgmma_wait(1)  # the step before has been read
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(empty.at[before(slot)]))
            return jnp.where(slot == config.stages - 1, 0, slot + 1)

        def before(slot):
            return jnp.where(slot == 0, config.stages - 1, slot - 1)

        def mask(slot, low, high):
            """Zeroes this warpgroup's rows of K outside of [low, high): nobody else reads that part of the stage."""
            name = "b" if config.split == "n" else "a"
            start, count = (col0, config.wave_cols) if name == "b" else (row0, config.wave_rows)
            row = plgpu.broadcasted_iota(jnp.int32, (DEPTH, WAVE), 0, layout=plgpu.Layout.WGMMA)
            for first in range(0, count, WAVE):
                ref = smem[name].at[slot, :, pl.ds(start + first, WAVE)]
                values = ref[...]
                ref[...] = jnp.where((row >= low) & (row < high), values, jnp.zeros_like(values))
            plgpu.commit_smem()

        def all_steps(acc):
            end = lax.fori_loop(0, unit.steps, lambda i, slot: step(acc, i, slot), slot)
            return end, acc[...]

        end, sums = pl.run_scoped(all_steps, plgpu.ACC((config.wave_rows, config.wave_cols), jnp.float32))
        pl.when(unit.steps > 0)(lambda: plgpu.barrier_arrive(empty.at[before(end)]))
        columns = range(0, config.wave_cols, config.piece)
        return end, [
            [sums[row : row + WAVE, column : column + config.piece] for column in columns] for row in range(0, config.wave_rows, WAVE)
        ]
