"""Continuous batching: which requests run next, and on which pages.

Requests wait until the pool has pages for all their tokens, are prefilled in chunks, then decode together, one step at a time;
prefill and decode steps alternate while there is work of both kinds. When a decoding request needs a page and none is free, the
youngest running request gives its pages back and starts again later from its prompt and what it has generated (recompute). The
oldest one is thus never held up, and no request is larger than the pool: every request ends.
"""

import time
from collections import deque
from typing import NamedTuple

from dsv3_jax.serving.cache import PAGE_SIZE, PagePool, page_keys, pages_for
from dsv3_jax.serving.request import InvalidParameter, Request


def round_up(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of ascending `sizes` that is at least `size`."""
    return next(s for s in sizes if s >= size)


class Work(NamedTuple):
    """One step: requests and how many tokens each adds to the cache. chunk: of a prefill, "first" or "later" (see Decoder.decode)."""

    requests: list[Request]
    counts: list[int]
    chunk: str | None

    @property
    def prefill(self) -> bool:
        return self.chunk is not None


class Scheduler:
    """Args: the pool; max_batch: requests that run at once; max_length: tokens of a request, prompt and answer;
    prefill_tokens: of a prefill step; prefill_widths: widths of its rows; lookahead: tokens a decode step writes for each request
    (2 with speculation)."""

    def __init__(self, pool: PagePool, *, max_batch, max_length, prefill_tokens, prefill_widths: tuple[int, ...], lookahead=1):
        self.pool, self.max_batch, self.max_length = pool, max_batch, max_length
        self.prefill_tokens, self.prefill_widths, self.lookahead = prefill_tokens, prefill_widths, lookahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0  # prefixes are counted in tokens
        self._prefilled_last = False

    @property
    def longest_request(self) -> int:
        """Tokens, prompt and answer, of the longest request that can run."""
        return min(self.max_length, self.pool.num_pages * PAGE_SIZE)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never run."""
        capacity = self.pool.num_pages * PAGE_SIZE
        if not request.prompt:
            raise InvalidParameter("the prompt is empty: give at least one token", "prompt")
        if request.max_tokens > self.max_length:
            raise InvalidParameter(
                f"the prompt has {len(request.prompt)} tokens and max_new_tokens is {request.params.max_new_tokens}: together at most "
                f"{self.max_length} fit this context",
                "prompt",
                "context_length_exceeded",
            )
        if request.max_tokens > capacity:
            raise InvalidParameter(
                f"the prompt has {len(request.prompt)} tokens and max_new_tokens is {request.params.max_new_tokens}: the whole cache "
                f"holds {capacity}; shorten the request or give the cache more pages",
                "prompt",
                "context_length_exceeded",
            )

    def add(self, request: Request) -> None:
        """Puts a request that `check` has let pass at the end of the queue."""
        self.waiting.append(request)

    def schedule(self) -> Work | None:
        """The next step, None when there is nothing to do. The pages it needs are the requests' already."""
        self._admit()
        prefilling = [request for request in self.running if request.prefilling]
        decoding = [request for request in self.running if not request.prefilling]
        if prefilling and not (decoding and self._prefilled_last):
            self._prefilled_last = True
            return self._prefill(prefilling)
        self._prefilled_last = False
        decoding = self._grow(decoding)
        return Work(decoding, [self.lookahead] * len(decoding), None) if decoding else None

    def finish(self, request: Request, reason: str) -> None:
        """Takes a request out, wherever it is, and frees its pages."""
        request.finish_reason = reason
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def cached(self, request: Request, num_cached: int) -> None:
        """The latents of the first `num_cached` tokens are in the cache: full pages can be found by others from now on."""
        request.num_cached = num_cached
        first = len(request.page_keys)
        if num_cached // PAGE_SIZE > first:
            request.page_keys = page_keys(request.tokens[:num_cached], request.page_keys)
            for page, key in zip(request.pages[first:], request.page_keys[first:]):
                self.pool.register(page, key)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            # At least the last token is computed: its logits are needed.
            request.page_keys = keys = page_keys(request.tokens[:-1], request.page_keys)
            found = self.pool.find(keys)
            needed = pages_for(min(len(request.tokens) + self.lookahead, request.max_tokens))
            if needed - len(found) > self.pool.num_free - sum(self.pool.is_free(page) for page in found):
                return
            self.waiting.popleft()
            for page in found:
                self.pool.share(page)
            request.pages = found + [self.pool.allocate() for _ in range(needed - len(found))]
            request.page_keys, request.num_cached, request.prefilling = keys[: len(found)], len(found) * PAGE_SIZE, True
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.num_cached
            request.admitted = request.admitted or time.monotonic()
            self.running.append(request)

    def _prefill(self, prefilling: list[Request]) -> Work:
        """The first request decides the rows' width and kind; those that fit beside it join."""
        remaining = lambda request: len(request.tokens) - request.num_cached  # noqa: E731
        first, most = prefilling[0], self.prefill_widths[-1]
        chunk, width = _chunk(first), round_up(min(remaining(first), most), self.prefill_widths)
        fitting = [r for r in prefilling[1:] if _chunk(r) == chunk and remaining(r) <= width]
        rows = [first, *fitting[: max(self.prefill_tokens // width, 1) - 1]]
        return Work(rows, [min(remaining(r), width) for r in rows], chunk)

    def _grow(self, decoding: list[Request]) -> list[Request]:
        """Gives each request pages for its next step; those who can, oldest first."""
        grown = []
        for request in decoding:
            needed = pages_for(min(request.num_cached + self.lookahead, request.max_tokens))
            while request in self.running and needed > len(request.pages):
                if self.pool.num_free:
                    request.pages.append(self.pool.allocate())
                else:
                    self._preempt(self.running[-1])
            if request in self.running:
                grown.append(request)
        return grown

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.page_keys, request.num_cached, request.draft = [], [], 0, None


def _chunk(request: Request) -> str:
    return "later" if request.num_cached else "first"
