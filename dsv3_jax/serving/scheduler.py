"""Continuous batching: which requests run next, and on which pages.

Requests wait until the pool has pages for all their tokens, are prefilled in chunks, then decode together, one step at a time;
prefill and decode steps alternate while there is work of both kinds. A prefill step holds up all who decode, full or not: when a row of
the decode steps is free, as many are prefilled as one holds, and those for whom no row is left take the next ones (`_has_place`). Where the
pool has no pages for so many, it waits for company (`_waits`). When a decoding request needs a page and none is free, the
youngest running request gives its pages back and starts again later from its prompt and what it has generated: what of it is still in
the pool, or in the host tier, is found there, and the rest is computed again. The oldest one is thus never held up, and no request is
larger than the pool: every request ends.

A step is scheduled while the one before it still runs: the tokens that one adds are known by number, not by value (`Work.ahead`).

On a mesh every rank has its own rows and its own part of the pool. A request stays on the rank that admits it, and all ranks take a step
of the same kind at the same time.
"""

import time
from array import array
from collections import deque
from typing import NamedTuple

from dsv3_jax.serving.cache import PAGE_SIZE, PagePool, page_keys, pages_for
from dsv3_jax.serving.request import InvalidParameter, Request

# Requests that a rank may have more than the idlest one before a prefix that it holds is computed again on another.
_SLACK = 4


def round_up(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of ascending `sizes` that is at least `size`."""
    return next(s for s in sizes if s >= size)


class Work(NamedTuple):
    """One step: requests, how many tokens each adds to the cache, and where they start.

    chunk: of a prefill, "first" or "later" (see Decoder.decode). ahead: the first token is the last one of the step that runs; what that
    step adds comes on top of the start. lives: those of the requests, when it was scheduled.
    """

    requests: list[Request]
    counts: list[int]
    starts: list[int]
    ahead: list[bool]
    chunk: str | None
    lives: list[int]

    @property
    def prefill(self) -> bool:
        return self.chunk is not None


class Scheduler:
    """Args: the pool; max_batch: requests that decode at once, on all ranks; max_length: tokens of a request, prompt and answer;
    prefill_tokens: of a prefill step, on each rank; prefill_widths: widths of its rows; lookahead: tokens a decode step writes for each
    request (1 and its drafts)."""

    def __init__(self, pool: PagePool, *, max_batch, max_length, prefill_tokens, prefill_widths: tuple[int, ...], lookahead=1):
        self.pool, self.max_batch, self.max_length = pool, max_batch, max_length
        self.prefill_tokens, self.prefill_widths, self.lookahead = prefill_tokens, prefill_widths, lookahead
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = self.prefix_queries = self.prefix_hits = self.host_hits = 0  # prefixes in tokens, the host's among the hits
        self._prefilled_last = False
        self._missed = 0  # rows that decode steps could have had since the last prefill step, of requests that wait for the next one

    @property
    def longest_request(self) -> int:
        """Tokens, prompt and answer, of the longest request that can run."""
        return min(self.max_length, self.capacity)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds of one request."""
        return self.pool.pages_per_rank * PAGE_SIZE

    @property
    def rows_per_rank(self) -> int:
        """Requests that decode at once on one rank."""
        return -(-self.max_batch // self.pool.num_ranks)

    def check(self, request: Request) -> None:
        """Raises UserError for a request that can never run."""
        if not request.prompt:
            raise InvalidParameter("the prompt is empty: give at least one token", "prompt")
        if request.max_tokens > self.max_length:
            raise InvalidParameter(
                f"the prompt has {len(request.prompt)} tokens and the answer may have {request.params.max_new_tokens}: together at most "
                f"{self.max_length} fit this context",
                "prompt",
                "context_length_exceeded",
            )
        if request.max_tokens > self.capacity:
            raise InvalidParameter(
                f"the prompt has {len(request.prompt)} tokens and the answer may have {request.params.max_new_tokens}: the whole cache "
                f"holds {self.capacity}; shorten the request or give the cache more pages",
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
        decoding = [request for request in self.running if not (request.prefilling or (request.in_flight and _must_wait(request)))]
        if prefilling and not (decoding and (self._prefilled_last or self._waits(prefilling, decoding))):
            self._prefilled_last, self._missed = True, 0
            return self._prefill(prefilling)
        self._prefilled_last = False
        self._missed += len(prefilling)
        decoding = self._grow(self._seated(decoding))
        return self._decode(decoding) if decoding else None

    def landed(self, work: Work) -> list[tuple[int, Request, int]]:
        """After a step: (index, request, tokens) of those who still want what it gave: they have neither ended nor lost their pages."""
        wanted = []
        for index, (request, count, lives) in enumerate(zip(work.requests, work.counts, work.lives)):
            if request.lives == lives:
                request.in_flight -= count
                wanted.append((index, request, count))
        return wanted

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
        while self.waiting and any(map(self._has_place, range(self.pool.num_ranks))):
            request = self.waiting[0]
            # At least the last token is computed: its logits are needed.
            request.page_keys = keys = page_keys(request.tokens[:-1], request.page_keys)
            needed = pages_for(min(len(request.tokens) + self.lookahead, request.max_tokens))
            if (place := self._place(keys, needed)) is None:
                return
            self.waiting.popleft()
            request.rank, found = place
            for page in found:
                self.pool.share(page)
            request.pages = array("i", found + [self.pool.allocate(request.rank) for _ in range(needed - len(found))])
            # Looked up only now: what these pages held may have taken slots of the host.
            fetched = self.pool.fetch(request.pages[len(found) :], keys[len(found) :])
            known = len(found) + fetched
            request.page_keys, request.num_cached, request.prefilling = keys[:known], known * PAGE_SIZE, True
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.num_cached
            self.host_hits += fetched * PAGE_SIZE
            request.admitted = request.admitted or time.monotonic()
            self.running.append(request)

    def _has_place(self, rank: int) -> bool:
        """Whether one more request may run on a rank: one of its rows is free, or was until a prefill step that has room for more."""
        here = [request for request in self.running if request.rank == rank]
        prefilling = [request for request in here if request.prefilling]
        if len(here) < self.rows_per_rank:
            return True
        step_has_room = len(prefilling) < self.rows_per_rank and sum(map(self._width, prefilling)) < self.prefill_tokens
        return step_has_room and len(here) - len(prefilling) < self.rows_per_rank

    def _place(self, keys: list[bytes], needed: int) -> tuple[int, list[int]] | None:
        """A rank with room for a request, and the pages of its prefix there: the longest one found, where loads are alike."""
        loads = [sum(request.rank == rank for request in self.running) for rank in range(self.pool.num_ranks)]
        places = []
        for rank in range(self.pool.num_ranks):
            found = self.pool.find(keys, rank)
            room = self.pool.num_free_on(rank) - sum(self.pool.is_free(page) for page in found)
            if self._has_place(rank) and needed - len(found) <= room:
                places.append((rank, found))
        idlest = min((loads[rank] for rank, _ in places), default=0)
        places = [place for place in places if loads[place[0]] < idlest + _SLACK]
        return min(places, key=lambda place: (-len(place[1]), loads[place[0]]), default=None)

    def _waits(self, prefilling: list[Request], decoding: list[Request]) -> bool:
        """Whether a prefill step is better put off: others will come, as the queue is not empty, it is not full, and those it is for have
        missed fewer decode steps than it would take from those that decode, which is about one each."""
        full = self.prefill_tokens * self.pool.num_ranks
        return bool(self.waiting) and self._missed < len(decoding) and sum(map(self._width, prefilling)) < full

    def _width(self, request: Request) -> int:
        """Of its row in its next prefill step."""
        return round_up(min(_remaining(request), self.prefill_widths[-1]), self.prefill_widths)

    def _prefill(self, prefilling: list[Request]) -> Work:
        """The first request decides the rows' width and kind; those that fit beside it join, on every rank."""
        first = prefilling[0]
        chunk, width = _chunk(first), self._width(first)
        room = [min(max(self.prefill_tokens // width, 1), self.rows_per_rank)] * self.pool.num_ranks
        room[first.rank] -= 1
        rows = [first]
        for request in prefilling[1:]:
            if _chunk(request) == chunk and _remaining(request) <= width and room[request.rank]:
                room[request.rank] -= 1
                rows.append(request)
        counts, starts = [min(_remaining(r), width) for r in rows], [_start(r) for r in rows]
        for request, count, start in zip(rows, counts, starts):
            request.in_flight += count
            request.prefilling = start + count < len(request.tokens)
        return Work(rows, counts, starts, [False] * len(rows), chunk, [r.lives for r in rows])

    def _seated(self, decoding: list[Request]) -> list[Request]:
        """The oldest of each rank, as many as it has rows."""
        seated, rows = [], [0] * self.pool.num_ranks
        for request in decoding:
            if rows[request.rank] < self.rows_per_rank:
                rows[request.rank] += 1
                seated.append(request)
        return seated

    def _decode(self, requests: list[Request]) -> Work:
        starts, ahead = [len(r.tokens) - 1 for r in requests], [r.in_flight > 0 for r in requests]
        for request in requests:
            request.in_flight += self.lookahead
        return Work(requests, [self.lookahead] * len(requests), starts, ahead, None, [r.lives for r in requests])

    def _grow(self, decoding: list[Request]) -> list[Request]:
        """Gives each request pages for its next step, oldest first; those who have them."""
        lost, lookahead = set(), self.lookahead
        behind = max(lookahead - 2, 0)  # drafts after the first are made from what is written behind the step's tokens, for the time being
        for request in decoding:
            reach = len(request.tokens) - 1 + (2 * lookahead if request.in_flight else lookahead) + behind
            while len(request.pages) * PAGE_SIZE < reach and request not in lost and len(request.pages) < pages_for(request.max_tokens):
                if self.pool.num_free_on(request.rank):
                    request.pages.append(self.pool.allocate(request.rank))
                else:
                    youngest = [other for other in self.running if other.rank == request.rank][-1]
                    self._preempt(youngest)
                    lost.add(youngest)
        return [request for request in decoding if request not in lost] if lost else decoding

    def _preempt(self, request: Request) -> None:
        self.num_preemptions += 1
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages, request.page_keys, request.num_cached, request.drafts = array("i"), [], 0, []
        request.in_flight, request.lives = 0, request.lives + 1


def _start(request: Request) -> int:
    """Where its next tokens go, those of a step that runs and is not a prefill left out."""
    return request.num_cached + request.in_flight if request.prefilling else len(request.tokens) - 1


def _remaining(request: Request) -> int:
    """Tokens that are not in the cache yet, or on their way."""
    return len(request.tokens) - _start(request)


def _must_wait(request: Request) -> bool:
    """Whether the next token cannot be computed before the last one is known: it is the last one, or it shapes the next."""
    return request.shaper is not None or len(request.tokens) + 1 >= request.max_tokens


def _chunk(request: Request) -> str:
    return "later" if _start(request) else "first"
