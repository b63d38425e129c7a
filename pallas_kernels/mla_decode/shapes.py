"""The shapes MLA decode is compiled, tested and benchmarked at, with the times FlashMLA took for them on an H200."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """`length` is the mean where `ragged` (then normal with half of it as deviation, as in FlashMLA's own test).

    flashmla_us: split-KV kernel plus combine, cold L2, on an H200 (FlashMLA 9241ae3, dense bfloat16 decode); None: not measured.
    """

    batch: int
    queries: int
    heads: int
    length: int
    ragged: bool = False
    fp8: bool = False
    flashmla_us: float | None = None

    @property
    def flops(self) -> float:
        """FlashMLA's count: keys of 576, values of 512, the causal corner among new tokens not taken off."""
        return 2.0 * self.batch * self.queries * self.heads * self.length * (576 + 512)

    @property
    def bytes(self) -> float:
        """Queries, cache and output, each once."""
        rows = self.batch * self.queries * self.heads
        return rows * (576 + 512) * 2.0 + self.batch * self.length * (656.0 if self.fp8 else 1152.0)


FLASHMLA = (
    Shape(128, 1, 128, 1024, flashmla_us=73),
    Shape(128, 1, 128, 4096, flashmla_us=229),
    Shape(128, 1, 128, 8192, flashmla_us=450),
    Shape(128, 1, 128, 16384, flashmla_us=862),
    Shape(128, 2, 128, 1024, flashmla_us=133),
    Shape(128, 2, 128, 4096, flashmla_us=432),
    Shape(128, 2, 128, 8192, flashmla_us=815),
    Shape(128, 2, 128, 16384, flashmla_us=1631),
    Shape(128, 1, 128, 8234, ragged=True, flashmla_us=459),
)
FEW_LONG = tuple(Shape(8, 1, 128, n) for n in (16384, 32768, 65536, 131072)) + (Shape(1, 1, 128, 131072),)
FEW_HEADS = tuple(Shape(128, 1, 16, n, fp8=fp8) for n in (4096, 16384) for fp8 in (False, True))
BENCHMARK = FLASHMLA + FEW_LONG + FEW_HEADS

# What the kernel must compile for: every head count of a sharded model, one to four new tokens, both layouts.
COMPILED = tuple(
    Shape(128, queries, heads, 4096, fp8=fp8) for heads in (128, 64, 32, 16, 8) for queries in (1, 2, 3, 4) for fp8 in (False, True)
) + tuple(Shape(batch, 1, 128, 163840) for batch in (1, 256))
