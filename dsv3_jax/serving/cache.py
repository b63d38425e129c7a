"""The paged latent cache: which page of the pool holds what, and how large the pool is.

A page holds 64 tokens of one sequence in every layer. Full pages are found again by their content: the key of a page is a hash of
its tokens and of the key before it, so that equal keys mean equal prefixes. A page that nobody uses keeps its content until it is
needed for something else, the longest unused first.
"""

import hashlib
import math
import os
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from pallas_kernels.mla_decode.cache import FP8_BYTES, LATENT, PAGE_SIZE, ROPE


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


class PagePool:
    """The bookkeeping of `num_pages` pages: reference counts, free pages in order of last use, keys of full pages."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A page for one user; what it held is forgotten. Call only while `num_free` > 0."""
        page, _ = self._free.popitem(last=False)
        if (key := self._key_of.pop(page, None)) is not None:
            del self._page_of[key]
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more user of a page that `find` returned."""
        if self._users[page] == 0:
            del self._free[page]
        self._users[page] += 1

    def release(self, pages: list[int]) -> None:
        """One user less of each. The end of a prefix becomes free, and is overwritten, before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None

    def is_free(self, page: int) -> bool:
        return self._users[page] == 0

    def register(self, page: int, key: bytes) -> None:
        """The page now holds the full 64 tokens of `key`. The first page with a key stays the one that is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: list[bytes]) -> list[int]:
        """The pages of the longest prefix of `keys` that is in the pool. They are not yet the caller's: `share` them."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            found.append(page)
        return found


def page_keys(tokens: list[int], keys: list[bytes]) -> list[bytes]:
    """The keys of all full pages of `tokens`; `keys`: those of its first pages, if known."""
    keys = list(keys)
    for start in range(len(keys) * PAGE_SIZE, len(tokens) - PAGE_SIZE + 1, PAGE_SIZE):
        content = np.asarray(tokens[start : start + PAGE_SIZE], np.int32).tobytes()
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + content, digest_size=16).digest())
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


def free_memory() -> int:
    """Bytes the cache may take: nine tenths of what the device has free; on a CPU a quarter of the free memory, 1 GiB at most."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.9 * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return min(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, 2**30)
