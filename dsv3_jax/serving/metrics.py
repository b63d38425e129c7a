"""Prometheus metrics under vLLM's names with our prefix, and the throughput line of the log."""

import time

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.request import Output

_PREFIX = "dsv3_jax:"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Timing:
    """When things happened to a request (time.monotonic)."""

    def __init__(self):
        self.arrived = time.monotonic()
        self.first: float | None = None
        self.last: float | None = None


class Metrics:
    """Counts what the engine counts when asked, and measures times as outputs pass."""

    line_seconds = 10

    def __init__(self, engine: Engine, model_name: str):
        self.engine, self._labels = engine, [model_name]
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(self)
        self._finished = prometheus_client.Counter(
            _PREFIX + "request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._times = {}
        for name, words in {
            "time_to_first_token_seconds": "From arrival to the first token.",
            "inter_token_latency_seconds": "Between tokens.",
            "e2e_request_latency_seconds": "From arrival to the end.",
            "request_queue_time_seconds": "In the queue.",
            "request_prefill_time_seconds": "From the queue to the first token.",
            "request_decode_time_seconds": "From the first token to the end.",
        }.items():
            histogram = prometheus_client.Histogram(_PREFIX + name, words, ["model_name"], buckets=_SECONDS, registry=self.registry)
            self._times[name] = histogram.labels(model_name)
        self._line_at, self._line_stats = time.monotonic(), (0, 0)

    def observe(self, output: Output, timing: Timing) -> None:
        """An output left the engine."""
        now, times = time.monotonic(), self._times
        if timing.first is None:
            timing.first = now
            admitted = output.request.admitted or now
            times["time_to_first_token_seconds"].observe(now - timing.arrived)
            times["request_queue_time_seconds"].observe(max(admitted - timing.arrived, 0))
            times["request_prefill_time_seconds"].observe(now - admitted)
        else:
            for _ in output.tokens:
                times["inter_token_latency_seconds"].observe((now - timing.last) / len(output.tokens))
        timing.last = now
        if output.finish_reason is not None:
            self.ended(output.finish_reason)
            times["e2e_request_latency_seconds"].observe(now - timing.arrived)
            times["request_decode_time_seconds"].observe(now - timing.first)

    def ended(self, reason: str) -> None:
        """A request ended: stop, length or abort."""
        self._finished.labels(*self._labels, reason).inc()

    def collect(self):
        """What the engine itself counts (called by the registry)."""
        scheduler, pool, stats = self.engine.scheduler, self.engine.pool, self.engine.stats
        gauges = {
            "num_requests_running": ("Requests that are being computed.", len(scheduler.running)),
            "num_requests_waiting": ("Requests in the queue.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Part of the cache's pages in use, 0..1.", 1 - pool.num_free / pool.num_pages),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens computed.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "num_preemptions": ("Requests that were put back into the queue.", scheduler.num_preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", scheduler.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in it.", scheduler.prefix_hits),
            "spec_decode_num_draft_tokens": ("Tokens drafted.", stats.drafted),
            "spec_decode_num_accepted_tokens": ("Drafts that were right.", stats.accepted),
        }
        if self.engine.host:
            counters["external_prefix_cache_hits"] = ("Prompt tokens found in host memory.", scheduler.host_hits)
        if balancer := self.engine.balancer:
            gauges["expert_load_imbalance"] = ("Fullest device over the mean, in the last interval.", balancer.stats.imbalance)
            counters["expert_bytes_moved"] = ("Bytes of experts sent between devices.", balancer.stats.moved_bytes)
        for kinds, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, (words, value) in kinds.items():
                metric = family(_PREFIX + name, words, labels=["model_name"])
                metric.add_metric(self._labels, value)
                yield metric

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def line(self) -> str | None:
        """The throughput since the last line, `line_seconds` or more ago, if there was any."""
        now, stats, scheduler = time.monotonic(), self.engine.stats, self.engine.scheduler
        if (passed := now - self._line_at) < self.line_seconds:
            return None
        before, self._line_stats = self._line_stats, (stats.prompt_tokens, stats.generated_tokens)
        self._line_at = now
        prompt, generated = [new - old for new, old in zip(self._line_stats, before)]
        if not prompt and not generated:
            return None
        usage = 1 - self.engine.pool.num_free / self.engine.pool.num_pages
        line = (
            f"Avg prompt throughput: {prompt / passed:.1f} tokens/s, Avg generation throughput: {generated / passed:.1f} tokens/s, "
            f"Running: {len(scheduler.running)} reqs, Waiting: {len(scheduler.waiting)} reqs, GPU KV cache usage: {usage:.1%}, "
            f"Prefix cache hit rate: {scheduler.prefix_hits / max(scheduler.prefix_queries, 1):.1%}"
        )
        return line + (f", Draft acceptance rate: {stats.accepted / stats.drafted:.1%}" if stats.drafted else "")
