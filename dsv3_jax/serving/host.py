"""Pages in host memory: the copies that the pool asks for (`PagePool.transfers`), run between two steps.

A copy to the host starts on the device in its turn and is waited for with the next transfers: no step waits for it.
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from dsv3_jax.errors import UserError
from dsv3_jax.serving.cache import PAGE_SIZE, Transfer
from dsv3_jax.serving.ranks import Ranks

_PAGES = 16  # of a rank in one copy


class HostPages:
    """Host memory for `num_slots` pages of these caches: [slots, L, 64, width] for each; the system gives it as it is written."""

    def __init__(self, caches: dict, num_slots: int, ranks: Ranks):
        self._ranks = ranks
        cache = next(iter(caches.values()))
        self._pages_per_rank = cache.shape[1] // ranks.count
        try:
            self._memory = {name: np.empty((num_slots, x.shape[0], *x.shape[2:]), x.dtype) for name, x in caches.items()}
        except MemoryError as error:
            raise UserError(f"no host memory for {num_slots * PAGE_SIZE} more tokens of the cache: lower --host-cache-tokens") from error
        self._leaving: list[tuple[np.ndarray, np.ndarray, dict]] = []  # (slots, their rows, content on the devices)

    def run(self, caches: dict, transfers: list[Transfer]) -> dict:
        """The caches after these copies, which happen in their order."""
        for to_host, group in itertools.groupby(transfers, key=lambda transfer: transfer.to_host):
            for slots, rows, pages in self._batches(list(group)):
                if to_host:
                    content = _read(self._ranks, caches, pages)
                    for leaf in content.values():
                        leaf.copy_to_host_async()
                    self._settle()
                    self._leaving.append((slots, rows, content))
                else:
                    self._settle()
                    content = {name: np.zeros((len(pages), *x.shape[1:]), x.dtype) for name, x in self._memory.items()}
                    for name, memory in self._memory.items():
                        content[name][rows] = memory[slots]
                    caches = _write(self._ranks, caches, pages, content)
        return caches

    def compile(self, caches: dict) -> dict:
        """Compiles both directions; the caches stay what they are."""
        nowhere = np.full(_PAGES * self._ranks.count, self._pages_per_rank, np.int32)
        return _write(self._ranks, caches, nowhere, jax.tree.map(np.asarray, _read(self._ranks, caches, nowhere)))

    def _batches(self, transfers: list[Transfer]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(slots, the row of each, the page of every row on its rank, one past the end for none). A slot's copies stay in their order."""
        count, size = self._ranks.count, self._pages_per_rank
        while transfers:
            pages, slots, rows, used = np.full(_PAGES * count, size, np.int32), [], [], [0] * count
            left: list[Transfer] = []
            later: set[int] = set()  # slots of those
            for transfer in transfers:
                rank = transfer.page // size
                if used[rank] == _PAGES or transfer.slot in later:
                    left.append(transfer)
                    later.add(transfer.slot)
                    continue
                rows.append(rank * _PAGES + used[rank])
                pages[rows[-1]] = transfer.page % size
                slots.append(transfer.slot)
                used[rank] += 1
            yield np.array(slots), np.array(rows), pages
            transfers = left

    def _settle(self) -> None:
        """Waits for what is leaving the devices."""
        for slots, rows, content in self._leaving:
            for name, memory in self._memory.items():
                memory[slots] = np.asarray(content[name])[rows]
        self._leaving.clear()


@functools.partial(jax.jit, static_argnames="ranks")
def _read(ranks, caches, pages):
    """Pages of every rank: [rows, L, 64, width] of each cache."""

    def on_rank(caches, pages):
        return {name: x.at[:, pages].get(mode="clip").swapaxes(0, 1) for name, x in caches.items()}

    return ranks.run(on_rank, (ranks.pages, ranks.rows), ranks.rows)(caches, pages)


@functools.partial(jax.jit, static_argnames="ranks", donate_argnames="caches")
def _write(ranks, caches, pages, content):
    def on_rank(caches, pages, content):
        return {name: x.at[:, pages].set(content[name].swapaxes(0, 1), mode="drop") for name, x in caches.items()}

    return ranks.run(on_rank, (ranks.pages, ranks.rows, ranks.rows), ranks.pages)(caches, pages, content)
