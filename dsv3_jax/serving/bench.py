"""How fast an engine is: made-up requests, all at once or at a rate, and what they waited for.

With `--static` the same engine runs them as one did before continuous batching (Yu et al. 2022): a batch is filled, and the next one
starts when all of it has ended.
"""

import argparse
import sys
import time

import numpy as np
import rich.table

from dsv3_jax.errors import UserError
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.request import Request, SamplingParams


def lengths(kind: str, mean: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """fixed: mean; random: even within 1..mean; mixed: 16..mean, every octave as often as any other; sharegpt: log-normal with that mean
    and the spread of chats (sigma 1.1)."""
    if kind == "fixed":
        return np.full(count, mean)
    if kind == "random":
        return rng.integers(1, mean + 1, count)
    if kind == "mixed":
        return np.exp(rng.uniform(np.log(16), np.log(max(mean, 16)), count)).astype(int)
    return np.maximum(rng.lognormal(np.log(mean) - 1.1**2 / 2, 1.1, count), 1).astype(int)


def make_requests(engine: Engine, options: argparse.Namespace) -> list[Request]:
    """Greedy requests, of random tokens or of pieces of a text. Those too long for the context are cut, and how many is printed."""
    rng, longest = np.random.default_rng(options.seed), engine.scheduler.longest_request
    if longest < 2:
        raise UserError(f"a request has room for {longest} token: there must be two at least, one of them the prompt")
    drawn = [lengths(options.lengths, most, options.requests, rng) for most in (options.prompt_tokens, options.answer_tokens)]
    prompts = np.minimum(drawn[0], longest - 1)
    answers = np.minimum(drawn[1], longest - prompts)
    text = rng.integers(0, engine.config.vocab_size, 1 << 20)
    if options.text:
        if engine.tokenizer is None:
            raise UserError("--text needs a tokenizer, and this model has none: leave it out, prompts are then random tokens")
        text = np.asarray(engine.encode(options.text.read_text(encoding="utf-8", errors="replace")))
        if len(text) <= max(prompts):
            raise UserError(f"{options.text} has {len(text)} tokens, and the longest prompt {max(prompts)}: give a longer text")
    if cut := np.count_nonzero(sum(drawn) > longest):
        print(f"{cut} of {options.requests} requests are cut to the {longest} tokens that there is room for", file=sys.stderr)
    starts = rng.integers(0, len(text) - prompts, len(prompts))
    return [
        Request(text[start : start + prompt].tolist(), SamplingParams(max_new_tokens=int(answer), temperature=0, ignore_eos=True))
        for start, prompt, answer in zip(starts, prompts, answers)
    ]


def run(engine: Engine, requests: list[Request], options: argparse.Namespace) -> int:
    """Prints tokens a second, times to the first and between tokens, cache use. Returns 1 if pages are missing at the end."""
    rng = np.random.default_rng(options.seed + 1)
    gaps = rng.exponential(1 / options.rate, len(requests)) if options.rate else np.zeros(len(requests))
    arrivals = np.cumsum(gaps)
    first: dict[Request, float] = {}
    last: dict[Request, float] = {}
    between: list[float] = []
    usage, due, start = [], 0, time.monotonic()
    while due < len(requests) or engine.has_work:
        now = time.monotonic() - start
        full = options.static and engine.has_work
        while due < len(requests) and arrivals[due] <= now and not full:
            engine.add(requests[due])
            due += 1
            full = options.static and len(engine.scheduler.waiting) == engine.scheduler.max_batch
        if not engine.has_work:
            time.sleep(max(arrivals[due] - now, 0))
            continue
        outputs, now = engine.step(), time.monotonic() - start
        usage.append(1 - engine.pool.num_free / engine.pool.num_pages)
        for output in outputs:
            if output.request in last:
                between += [(now - last[output.request]) / len(output.tokens)] * len(output.tokens)
            first.setdefault(output.request, now)
            last[output.request] = now
    seconds = time.monotonic() - start
    to_first = [first[request] - arrival for request, arrival in zip(requests, arrivals)]

    table = rich.table.Table("measure", "value")
    prompt_tokens = sum(len(request.prompt) for request in requests)
    rows = {
        "requests": f"{len(requests)} in {seconds:.1f} s",
        "prompt tokens": f"{prompt_tokens} ({prompt_tokens / seconds:.1f}/s)",
        "generated tokens": f"{engine.stats.generated_tokens} ({engine.stats.generated_tokens / seconds:.1f}/s)",
        "time to first token p50 / p99": f"{_ms(to_first, 50)} / {_ms(to_first, 99)} ms",
        "between tokens p50 / p99": f"{_ms(between, 50)} / {_ms(between, 99)} ms",
        "cache use mean / most": f"{np.mean(usage):.1%} / {np.max(usage):.1%}",
        "preemptions": str(engine.scheduler.num_preemptions),
    }
    if engine.stats.drafted:
        rows["drafts accepted"] = ", ".join(f"{part:.1%}" for part in engine.stats.acceptance)
    if engine.host:
        rows["prompt tokens from host memory"] = str(engine.scheduler.host_hits)
    if engine.balancer:
        done = engine.balancer.stats
        rows["expert load: fullest device over the mean"] = f"{done.imbalance:.3f}, with the plan made of it {done.planned_imbalance:.3f}"
        rows["experts moved"] = f"{done.moved_replicas}, {done.moved_bytes / 2**20:.0f} MiB in {done.plans} plans"
    rows["pages free at the end"] = f"{engine.pool.num_free} of {engine.pool.num_pages}"
    for row in rows.items():
        table.add_row(*row)
    rich.print(table)
    return int(engine.pool.num_free != engine.pool.num_pages)


def _ms(seconds: list[float], percentile: int) -> str:
    return f"{1000 * np.percentile(seconds, percentile):.1f}" if seconds else "-"
