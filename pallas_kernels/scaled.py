"""FP8 operands of the GEMM kernel: e4m3 tiles with their scales, promoted to float32 every 128 of K.

Each step of 128 of K is one WGMMA into a fresh accumulator, which is then scaled and added to float32 registers: the promotion of the
DeepSeek-V3 report (section 3.3.2, figure 7b). While one math warpgroup promotes, the other's WGMMA keeps the tensor cores busy.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import REGISTERS, ROWS, TMA_ALIGNMENT, WAVE, swizzled, use_zero
from pallas_kernels.quantized import BLOCK, E4M3

LINE = TMA_ALIGNMENT // 4  # float32 values


@dataclasses.dataclass(frozen=True)
class Scaled:
    """a: tiles [.., rows, K]; b: tiles or blocks [.., cols, K], which b_kind says. A unit begins at its `block` of 128 along K."""

    b_kind: str

    @property
    def registers(self):
        return REGISTERS | {2: (240, 24)} if self.b_kind == "tiles" else REGISTERS

    @staticmethod
    def arrays(a, b):
        """Of two `Quantized`, what `gemm` takes."""
        return a.values, a.stored_scales, b.values, b.stored_scales

    def ring(self, config):
        stages = config.stages
        return {
            "a": plgpu.SMEM((stages, config.tile_m, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            "b": plgpu.SMEM((stages, config.tile_n, BLOCK), E4M3, transforms=swizzled(BLOCK, E4M3)),
            "sa": plgpu.SMEM((stages, config.tile_m), jnp.float32),
            "sb": plgpu.SMEM((stages, config.tile_n) if self.b_kind == "tiles" else (stages, config.blocks_n, LINE), jnp.float32),
        }

    def copies(self, config, problem, unit, n, i, a, sa, b, sb):
        """What step i of a tile loads: for each part of a stage its source in global memory."""
        block = unit.block + i
        k, a_at, b_at = pl.ds(block * BLOCK, BLOCK), problem.at("a", unit), problem.at("b", unit)
        # Where `a` has fewer rows than a tile, only those are loaded: TMA takes longer for rows that are not there. The product of what the
        # other rows of the stage hold is not stored.
        share = ROWS * (config.cluster if config.multicast == "a" else 1)
        a_rows = pl.ds(unit.row8 * ROWS, min(config.tile_m, -(-a.shape[-2] // share) * share))
        b_rows = pl.ds(n * config.tile_n, config.tile_n)
        if self.b_kind == "tiles":
            b_scales = sb.at[block, b_rows]
        else:
            b_scales = sb.at[*b_at, pl.ds(lax.div(n * config.tile_n, BLOCK), config.blocks_n), pl.ds(block - lax.rem(block, 4), LINE)]
        return {"a": a.at[*a_at, a_rows, k], "b": b.at[*b_at, b_rows, k], "sa": sa.at[*a_at, block, a_rows], "sb": b_scales}

    def accumulate(self, config, unit, n, slot, smem, warpgroup, row0, col0, interpreted):
        """One warpgroup's part of a tile: (the next slot, float32 pieces [64, piece] side by side for each 64 rows)."""
        waves, cols, piece = config.wave_rows // WAVE, config.wave_cols, config.piece
        by_column = self.b_kind == "tiles" or (piece == cols and BLOCK % piece != 0)  # one scale for each column, else one for each piece
        col = n * config.tile_n + col0

        def read_scales(slot, block):
            """Scalar scales of `b`: of each piece, or of the two blocks that a narrow tile can touch."""
            if self.b_kind == "tiles":
                return ()
            first = lax.div(n * config.tile_n, BLOCK)
            starts = (0, cols - 1) if by_column else range(0, cols, piece)
            return tuple(smem["sb"][slot, lax.div(col + start, BLOCK) - first, lax.rem(block, 4)] for start in starts)

        def column_scales(scales, slot):
            if self.b_kind == "tiles":
                return plgpu.load(smem["sb"].at[slot, pl.ds(col0, cols)], layout=plgpu.Layout.WGMMA.reduce(0))
            index = plgpu.broadcasted_iota(jnp.int32, (cols,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
            return jnp.where(index < BLOCK - lax.rem(col, BLOCK), *scales)

        def step(i, carry):
            slot, sums = carry
            plgpu.barrier_wait(smem["full"].at[slot])
            scales = read_scales(slot, unit.block + i)
            factors = (None,) * (cols // piece) if by_column else scales
            promoted = []
            # One thread gives a cluster's stage back for its warpgroup. Only a product keeps the four warps together, so whatever they read
            # from the stage is read before the last product begins, or a barrier follows.
            # Two waves have the same columns: their scales are loaded once. For one there are no registers until its product is done.
            early = column_scales(scales, slot) if self.b_kind == "tiles" and waves > 1 else None
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
                use_zero(interpreted)
                if by_column:
                    partial *= lax.broadcast_in_dim(column_scales(scales, slot) if early is None else early, (WAVE, cols), [1])
                if wave == waves - 1:
                    if self.b_kind == "tiles" and early is None and config.cluster > 1:
                        plgpu.commit_smem()  # the barrier
                    plgpu.barrier_arrive(smem["empty"].at[slot])
                for p, factor in enumerate(factors):
                    scale = row_scales if by_column else row_scales * factor
                    scale = lax.broadcast_in_dim(scale, (WAVE, piece), [0])
                    promoted.append(sums[len(promoted)] + partial[:, p * piece : (p + 1) * piece] * scale)
            return jnp.where(slot == config.stages - 1, 0, slot + 1), tuple(promoted)

        zero = plgpu.layout_cast(jnp.zeros((WAVE, piece), jnp.float32), plgpu.Layout.WGMMA)
        in_wave = cols // piece
        slot, sums = lax.fori_loop(0, unit.steps, step, (slot, (zero,) * (waves * in_wave)))
        return slot, [sums[wave * in_wave : (wave + 1) * in_wave] for wave in range(waves)]
