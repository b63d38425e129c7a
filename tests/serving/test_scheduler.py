"""The scheduler without a model: any mix of requests ends, and the pages are always accounted for."""

from collections import Counter

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.serving.cache import PAGE_SIZE, HostTier, PagePool, page_keys, pages_for
from dsv3_jax.serving.request import Request, SamplingParams
from dsv3_jax.serving.scheduler import Scheduler


def contents(request):
    """For each token a number that stands for it and all before it."""
    known = request.__dict__.setdefault("contents", [])
    for token in request.tokens[len(known) :]:
        known.append(hash((known[-1] if known else 0, token)))
    return known


def write(held, pages, contents, start, end):
    held.update({(pages[i // PAGE_SIZE], i % PAGE_SIZE): contents[i] for i in range(start, end)})


def run(scheduler, requests, rng, accept=0.0):
    """Runs all requests with made-up tokens; returns the number of steps. Checks the pages before every step: who uses them, and that
    they hold, for each token of each request that counts as cached, what was written for it or copied from where it was."""
    held, host = {}, {}  # what is in (page, place) and in a slot of the host: a token and all before it
    for request in requests:
        scheduler.add(request)
    steps, previous_prefill, running = 0, False, None
    while True:
        could_decode = any(not r.prefilling and not r.in_flight for r in scheduler.running)
        work = scheduler.schedule()
        if work:
            users = Counter(page for request in scheduler.running for page in request.pages)
            assert dict(users) == {page: n for page, n in enumerate(scheduler.pool._users) if n}
            ahead = scheduler.prefill_tokens // scheduler.prefill_widths[0] - 1  # of whom a prefill step has more than there are rows
            assert max(Counter(request.rank for request in scheduler.running).values()) <= scheduler.rows_per_rank + ahead
            assert max(Counter(request.rank for request in work.requests).values()) <= scheduler.rows_per_rank
            assert not (work.prefill and previous_prefill and could_decode), "decodes are starved"
            copy(scheduler.pool, held, host)
            written = Counter()
            for request, count, start, ahead in zip(work.requests, work.counts, work.starts, work.ahead):
                behind = 0 if work.prefill else max(scheduler.lookahead - 2, 0)  # drafts of drafts
                end = min(start + count + ahead * scheduler.lookahead + behind, request.max_tokens)
                assert pages_for(end) <= len(request.pages)
                assert all(scheduler.pool.rank_of(page) == request.rank for page in request.pages)
                written.update(request.pages[i] for i in range(start // PAGE_SIZE, pages_for(end)))
                assert (work.chunk != "first" or start == 0) and not (ahead and work.prefill)
                places = [(page, place) for page in request.pages for place in range(PAGE_SIZE)]
                assert [held[place] for place in places[: request.num_cached]] == contents(request)[: request.num_cached]
                for place in places[start : min(start + count, request.max_tokens)]:
                    held[place] = "written by the step that runs"
            assert all(n == 1 and users[page] == 1 for page, n in written.items()), "a page that is written to is shared"
            previous_prefill, steps = work.prefill, steps + 1
            assert steps < 100_000
        elif running is None:
            return steps
        if running is not None:
            land(scheduler, running, rng, accept, held)
        running = work


def land(scheduler, work, rng, accept, held):
    """The step has ended, while the next one is scheduled already."""
    for _, request, count in scheduler.landed(work):
        before, pages = request.num_cached, list(request.pages)
        if work.prefill and before + count < len(request.tokens):
            scheduler.cached(request, before + count)
            write(held, pages, contents(request), before, request.num_cached)
            continue
        new = 1 if work.prefill else int(np.cumprod(rng.random(scheduler.lookahead - 1) < accept).sum()) + 1
        new = min(new, request.max_tokens - len(request.tokens))
        request.tokens += rng.integers(0, 3, new).tolist()
        scheduler.cached(request, len(request.tokens) - 1)
        write(held, pages, contents(request), before, request.num_cached)
        if len(request.tokens) == request.max_tokens:
            scheduler.finish(request, "length")


def copy(pool, held, host):
    """What the pool asks for, in its order."""
    for page, slot, to_host in pool.transfers:
        if to_host:
            host[slot] = [held[page, place] for place in range(PAGE_SIZE)]
        else:
            held.update({(page, place): content for place, content in enumerate(host[slot])})
    pool.transfers = []


@pytest.mark.parametrize("ranks, host", [(1, 0), (1, 3), (2, 0), (3, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends(seed, ranks, host):
    rng = np.random.default_rng(seed)
    num_pages = int(rng.integers(4, 12))
    scheduler = Scheduler(
        PagePool(num_pages * ranks, ranks, HostTier(host) if host else None),
        max_batch=int(rng.integers(1, 9)) * ranks,
        max_length=num_pages * PAGE_SIZE,
        prefill_tokens=128,
        prefill_widths=(16, 64, 128),
        lookahead=(1, 2, 4)[seed],
    )
    requests = []
    for _ in range(30):
        total = int(rng.integers(2, num_pages * PAGE_SIZE + 1))
        length = int(rng.integers(1, total))
        # Few different tokens and a common beginning: many prefixes are found again.
        prompt = ([1] * 150 + rng.integers(0, 2, 1000).tolist())[:length]
        requests.append(Request(prompt, SamplingParams(max_new_tokens=total - length)))
    run(scheduler, requests, rng, accept=0.5)
    assert all(request.finish_reason == "length" and len(request.tokens) == request.max_tokens for request in requests)
    assert scheduler.pool.num_free == num_pages * ranks and not scheduler.running and not scheduler.waiting
    assert scheduler.prefix_hits > 0 and (scheduler.host_hits > 0) == (host > 0)


def decoding(count, *, answer, pages=64, **options):
    """A scheduler in which so many requests decode; (kind, rows, whether others queue) of its steps, in a list that grows."""
    scheduler = Scheduler(PagePool(pages), max_length=640, prefill_tokens=64, prefill_widths=(16, 64), **options)
    steps, schedule = [], scheduler.schedule

    def record():
        if work := schedule():
            steps.append(("prefill" if work.prefill else "decode", len(work.requests), bool(scheduler.waiting)))
        return work

    scheduler.schedule = record
    for _ in range(count):
        scheduler.add(Request([1] * 16, SamplingParams(max_new_tokens=answer)))
    while any(request.prefilling for request in scheduler.running) or scheduler.waiting:
        scheduler.landed(scheduler.schedule())
    steps.clear()
    return scheduler, steps


def test_all_rows_are_taken_while_others_queue():
    """With speculation requests end one by one: their successors are prefilled by four, as many as a step holds, and wait for rows."""
    scheduler, steps = decoding(0, answer=0, max_batch=16, lookahead=2)
    requests = [Request([i, *[1] * 15], SamplingParams(max_new_tokens=64)) for i in range(160)]
    run(scheduler, requests, np.random.default_rng(0), accept=0.7)
    assert all(len(request.tokens) == 80 for request in requests)
    assert [rows for kind, rows, _ in steps if kind == "prefill"] == [4] * 40
    rows = [rows for kind, rows, queue in steps if kind == "decode" and queue]
    assert np.mean(rows[4:]) > 15.8 and max(rows) == 16, rows


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_prefill_step_has_no_more_rows_than_decode_steps(rows):
    scheduler, steps = decoding(0, answer=0, max_batch=rows)
    requests = [Request([i, 1, 2], SamplingParams(max_new_tokens=5)) for i in range(20)]
    run(scheduler, requests, np.random.default_rng(0))
    assert max(rows for kind, rows, _ in steps if kind == "prefill") == rows


@pytest.mark.parametrize("queue, least", [(0, 1), (3, 7)])
def test_a_prefill_step_does_not_wait_for_long(queue, least):
    """Not at all without a queue; where the pool has pages for one more alone, until it has missed as many steps as seven lose by one."""
    scheduler, steps = decoding(7, answer=200, pages=8, max_batch=16)
    for _ in range(1 + queue):
        scheduler.add(Request([2] * 16, SamplingParams(max_new_tokens=200)))
    while not steps or steps[-1][0] == "decode":
        land(scheduler, scheduler.schedule(), np.random.default_rng(0), 0.0, {})
    assert [kind for kind, *_ in steps] == ["decode"] * least + ["prefill"]


def test_a_prefix_draws_requests_to_its_rank_up_to_four_more():
    scheduler = Scheduler(PagePool(64, 2), max_batch=32, max_length=256, prefill_tokens=128, prefill_widths=(128,))
    first, *others = requests = [Request([1] * 64 + [i], SamplingParams(max_new_tokens=50)) for i in range(9)]
    scheduler.add(first)
    land(scheduler, scheduler.schedule(), np.random.default_rng(0), 0.0, {})
    for request in others:
        scheduler.add(request)
    scheduler.schedule()
    assert [request.rank for request in requests] == [0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert [request.num_cached for request in others] == [64 * (request.rank == 0) for request in others]


def test_the_youngest_gives_its_pages_back():
    """Four pages, and three requests that come to need two each."""
    scheduler = Scheduler(PagePool(4), max_batch=4, max_length=128, prefill_tokens=256, prefill_widths=(64,))
    oldest, *_, youngest = requests = [Request([1] * 60, SamplingParams(max_new_tokens=60)) for _ in range(3)]
    run(scheduler, requests, np.random.default_rng(0))
    assert scheduler.num_preemptions == youngest.lives - 1 > 0 and oldest.lives == 1  # a life ends with the request, too


def test_the_largest_request_that_fits_runs_alone_and_the_next_larger_is_refused():
    scheduler = Scheduler(PagePool(3), max_batch=4, max_length=1000, prefill_tokens=64, prefill_widths=(64,), lookahead=2)
    exact = [Request([1] * 100, SamplingParams(max_new_tokens=92)) for _ in range(3)]
    run(scheduler, exact, np.random.default_rng(0))
    assert all(request.finish_reason == "length" for request in exact)
    with pytest.raises(UserError, match="the whole cache holds 192"):
        scheduler.check(Request([1] * 100, SamplingParams(max_new_tokens=93)))


def test_equal_keys_mean_equal_prefixes():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (2, 200)).tolist()
    keys = page_keys(a, [])
    assert len(keys) == 3 and page_keys(a[:191], []) == keys[:2] and page_keys(a, keys[:1]) == keys
    # The same page after another page has another key.
    assert page_keys(b[:64] + a[64:128], [])[1] != keys[1]


def test_the_page_longest_unused_is_taken_first():
    pool = PagePool(3)
    pages = [pool.allocate() for _ in range(3)]
    keys = [b"a", b"b", b"c"]
    for page, key in zip(pages, keys):
        pool.register(page, key)
    pool.release(pages[1:2]), pool.release(pages[:1])
    assert pool.find([b"b"]) == [pages[1]] and pool.find([b"a", b"b", b"x"]) == pages[:2]
    assert pool.allocate() == pages[1]
    assert pool.find([b"b"]) == [] and pool.find([b"a"]) == [pages[0]]
    pool.share(pages[0])
    assert pool.num_free == 0


def test_the_end_of_a_prefix_is_taken_before_its_beginning():
    pool = PagePool(3)
    pages, keys = [pool.allocate() for _ in range(3)], [b"a", b"b", b"c"]
    for page, key in zip(pages, keys):
        pool.register(page, key)
    pool.release(pages)
    assert pool.allocate() == pages[2] and pool.find(keys) == pages[:2]
    assert pool.allocate() == pages[1] and pool.find(keys) == pages[:1]


def test_the_host_slot_longest_unused_is_overwritten():
    host = HostTier(2)
    assert [host.put(key) for key in (b"a", b"b", b"a")] == [0, 1, None]  # a is used again
    assert host.put(b"c") == 1 and host.find([b"b"]) == [] and host.find([b"c"]) == [1]
    assert host.find([b"a", b"x", b"c"]) == [0]  # so c is the one longest unused
    assert host.put(b"d") == 1 and host.find([b"a"]) == [0]
