"""How large the buffers of the expert exchange are: sizes as data, and the choice among them while a run goes.

A size is a multiple of what balanced routing needs. Every step reports how full its fullest buffer was (`RouterStats.fill`). Beyond 1 the
step is void and is run again with the next size that holds what came; where a smaller size has been enough for a while, it is taken.
Each size is compiled once.
"""

import math
from collections.abc import Sequence

from dsv3_jax.config import ModelConfig

# Half-tone steps of a factor of two; the last has room for whatever comes.
SIZES = (*(2 ** (i / 12) for i in range(37)), math.inf)
HEADROOM = 1.03  # over the fullest buffer seen
PATIENCE = 100  # steps before a smaller size is taken,
SAVING = 0.9  # and only one at most so large, as a part of the one in use


def start(config: ModelConfig, devices: int) -> float:
    """The first size. A fresh router is far from balance, and further after some steps (`small`: one expert gets five times the mean, 12 of
    24 up to 1.6 times): the device that gets most gets the less beyond the mean the more experts it holds."""
    return next(size for size in SIZES if size >= min(2, 1 + 8 * devices / config.n_routed_experts))


class Buffers:
    """The size for the next step: `size`, an entry of SIZES."""

    def __init__(self, size: float):
        self.size = size
        self._fullest, self._steps = 0.0, 0

    def enough(self, fill: float) -> bool:
        """Hear of a step with this size, `fill` of the fullest buffer on any device. False: the step is void; run it again."""
        if fill > 1:
            self._take(self.size * fill * HEADROOM)
            return False
        self._fullest, self._steps = max(self._fullest, self.size * fill), self._steps + 1
        if self._steps == PATIENCE:
            needed = self._fullest * HEADROOM
            self._take(needed if needed <= SAVING * self.size else self.size)
        return True

    def _take(self, needed: float) -> None:
        larger = [size for size in SIZES if size >= needed]
        self.size = larger[0] if larger else math.inf
        self._fullest, self._steps = 0.0, 0


def rooms(config: ModelConfig, devices: Sequence[int], num_tokens: int, size: float) -> tuple[list[int], int]:
    """(rows from each device to each in every hop, rows sorted by expert on a device), for `num_tokens` tokens on a device.

    devices: of each hop, e.g. [64] or, of 8 nodes, [8, 8].
    """
    total = math.prod(devices)
    arriving, reached, hops = num_tokens, 1, []
    for count in devices:
        reached *= count
        # On average num_tokens · share(reached) · reached rows reach such a part of the mesh, from `count` devices each.
        expected = num_tokens * share(config, reached) * reached / count
        hops.append(_room(expected * size, arriving, 8))
        arriving = hops[-1] * count
    largest = arriving * min(config.num_experts_per_tok, config.n_routed_experts // total)
    return hops, _room(num_tokens * config.num_experts_per_tok * size, largest, 128)


def _room(rows: float, largest: int, multiple: int) -> int:
    return largest if rows >= largest else min(largest, math.ceil(rows / multiple) * multiple)


def share(config: ModelConfig, parts: int) -> float:
    """The probability that a token has an expert in one of so many equal parts of them, if the routing is balanced."""
    held, group = config.n_routed_experts // parts, config.n_routed_experts // config.n_group
    limited = config.topk_method != "greedy"
    chosen_groups = config.topk_group if limited else config.n_group
    eligible = chosen_groups * group

    def touched(experts):  # the probability that any of `experts` of the eligible ones is among the K
        return 1 - math.comb(eligible - experts, config.num_experts_per_tok) / math.comb(eligible, config.num_experts_per_tok)

    if held <= group:
        return chosen_groups / config.n_group * touched(held)
    groups = held // group
    ways = [math.comb(groups, n) * math.comb(config.n_group - groups, chosen_groups - n) for n in range(min(groups, chosen_groups) + 1)]
    return sum(w * touched(n * group) for n, w in enumerate(ways)) / math.comb(config.n_group, chosen_groups)
