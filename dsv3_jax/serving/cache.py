"""The paged latent cache: which page of the pool holds what, and how large the pool is.

A page holds 64 tokens of one sequence in every layer. Full pages are found again by their content: the key of a page is a hash of
its tokens and of the key before it, so that equal keys mean equal prefixes. A page that nobody uses keeps its content until it is
needed for something else, the longest unused first; with a host tier it then goes to host memory, where it is found as well.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from pallas_kernels.mla_decode.cache import FP8_BYTES, LATENT, PAGE_SIZE, ROPE


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class Transfer(NamedTuple):
    """A page's content goes to a slot of host memory, or comes back from it."""

    page: int
    slot: int
    to_host: bool


class HostTier:
    """The bookkeeping of host memory for `num_slots` pages: which keys are there; the longest unused one is overwritten."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()

    def put(self, key: bytes) -> int | None:
        """The slot that takes the page of `key`; None where it is there already."""
        if key in self._slot_of:
            self._slot_of.move_to_end(key)
            return None
        slot = len(self._slot_of) if len(self._slot_of) < self.num_slots else self._slot_of.popitem(last=False)[1]
        self._slot_of[key] = slot
        return slot

    def find(self, keys: list[bytes]) -> list[int]:
        """The slots of the longest prefix of `keys` that is there."""
        found = []
        for key in keys:
            if (slot := self._slot_of.get(key)) is None:
                break
            self._slot_of.move_to_end(key)
            found.append(slot)
        return found


class PagePool:
    """The bookkeeping of `num_pages` pages: reference counts, free pages in order of last use, keys of full pages.

    On a mesh every rank (the devices of one row block) has its own equal part of them, `num_pages / num_ranks` in a row, and finds
    only what lies there. host: where pages go whose memory is needed. transfers: what is to be copied, in this order, before the next step.
    """

    def __init__(self, num_pages: int, num_ranks: int = 1, host: HostTier | None = None):
        self.host = host
        self.transfers: list[Transfer] = []
        self.num_pages, self.num_ranks, self.pages_per_rank = num_pages, num_ranks, num_pages // num_ranks
        self._users = [0] * num_pages
        self._free = [OrderedDict.fromkeys(range(r * self.pages_per_rank, (r + 1) * self.pages_per_rank)) for r in range(num_ranks)]
        self._key_of: dict[int, bytes] = {}
        self._page_of: list[dict[bytes, int]] = [{} for _ in range(num_ranks)]

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    def num_free_on(self, rank: int) -> int:
        return len(self._free[rank])

    def rank_of(self, page: int) -> int:
        return page // self.pages_per_rank

    def allocate(self, rank: int = 0) -> int:
        """A page for one user; what it held is forgotten, or goes to the host. Call only while `num_free_on(rank)` > 0."""
        page, _ = self._free[rank].popitem(last=False)
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[rank][key]
            if self.host and (slot := self.host.put(key)) is not None:
                self.transfers.append(Transfer(page, slot, to_host=True))
        self._users[page] = 1
        return page

    def fetch(self, pages: Sequence[int], keys: list[bytes]) -> int:
        """Fills new pages with the longest prefix of `keys` that the host has; how many those are."""
        slots = self.host.find(keys) if self.host else []
        for page, key, slot in zip(pages, keys, slots):
            self.transfers.append(Transfer(page, slot, to_host=False))
            self.register(page, key)
        return len(slots)

    def share(self, page: int) -> None:
        """One more user of a page that `find` returned."""
        if self._users[page] == 0:
            del self._free[self.rank_of(page)][page]
        self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each. The end of a prefix becomes free, and is overwritten, before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[self.rank_of(page)][page] = None

    def is_free(self, page: int) -> bool:
        return self._users[page] == 0

    def register(self, page: int, key: bytes) -> None:
        """The page now holds the full 64 tokens of `key`. The first page of a rank with a key stays the one that is found."""
        page_of = self._page_of[self.rank_of(page)]
        if key not in page_of and page not in self._key_of:
            page_of[key], self._key_of[page] = page, key

    def find(self, keys: list[bytes], rank: int = 0) -> list[int]:
        """The pages of the longest prefix of `keys` that the rank has. They are not yet the caller's: `share` them."""
        found = []
        for key in keys:
            if (page := self._page_of[rank].get(key)) is None:
                break
            found.append(page)
        return found


def page_keys(tokens: list[int], keys: list[bytes]) -> list[bytes]:
    """The keys of all full pages of `tokens`; `keys`: those of its first pages, if known."""
    keys = list(keys)
    count = len(tokens) // PAGE_SIZE
    for page in np.asarray(tokens[len(keys) * PAGE_SIZE : count * PAGE_SIZE], np.int32).reshape(-1, PAGE_SIZE):
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + page.tobytes(), digest_size=16).digest())
    return keys


def cache_shapes(config: ModelConfig, num_pages: int, dtype: jnp.dtype, *, mtp: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a pool, {"dense_layers": [L, P, 64, C+R], ...}; dtype uint8 is FlashMLA's FP8 layout, 656 bytes a token.

    Raises UserError for an FP8 cache of a model whose latents are not 512 + 64 wide.
    """
    width = config.latent_dim
    if dtype == jnp.uint8:
        if (config.kv_lora_rank, config.qk_rope_head_dim) != (LATENT, ROPE):
            raise UserError(
                f"an FP8 cache needs kv_lora_rank={LATENT} and qk_rope_head_dim={ROPE}, this model has {config.kv_lora_rank} and "
                f"{config.qk_rope_head_dim}: leave the cache in the compute dtype"
            )
        width = FP8_BYTES
    layers = {"dense_layers": config.first_k_dense_replace, "moe_layers": config.num_moe_layers, "mtp": int(mtp)}
    return {name: jax.ShapeDtypeStruct((count, num_pages, PAGE_SIZE, width), dtype) for name, count in layers.items() if count}


def pages_within(num_bytes: int, config: ModelConfig, dtype: jnp.dtype, *, mtp: bool) -> int:
    """How many pages fit into so many bytes."""
    page = cache_shapes(config, 1, dtype, mtp=mtp)
    return num_bytes // sum(math.prod(array.shape) * array.dtype.itemsize for array in page.values())


def memory_for_cache(devices: list, scratch: int) -> int | None:
    """Bytes the cache may take on each of these devices: nine tenths of what the fullest has free, and `scratch` bytes less. None of a CPU,
    which does not say."""
    stats = [device.memory_stats() for device in devices]
    if not all(s and "bytes_limit" in s for s in stats):
        return None
    free = min(s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return max(free - free // 10 - scratch, 0)
