"""What a server counts and times, for Prometheus.

Fed by `loop` (requests, steps) and `guard` (answers); read at /metrics. Each server has a registry of its own. What
the engine counts itself is read from its `Stats` when it is asked for; times are measured here: of the first token
from a request's arrival, of each further one from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from ..output import Output, Stats
from ..request import FinishReason

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
GAP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0)
TOKENS = tuple(float(2**power) for power in range(15))
GAUGES = {
    "waiting": "Sequences in the queue",
    "running": "Sequences that take part in forwards",
    "swapped": "Sequences whose cache blocks are in host memory",
    "blocks_used": "KV cache blocks that sequences hold",
    "blocks_total": "KV cache blocks that there are",
    "batch_tokens": "Tokens of the last forward",
}
COUNTERS = {
    "preempted_total": "Times that a sequence lost its cache blocks",
    "prefix_hit_tokens_total": "Prompt tokens that the prefix cache had",
    "prompt_tokens_total": "Tokens of prompts",
    "generated_tokens_total": "Tokens generated",
    "drafted_tokens_total": "Tokens guessed ahead",
    "accepted_tokens_total": "Tokens guessed ahead that were right",
}


@dataclass
class _Times:
    """When things happened to one request."""

    begun_s: float
    last_s: dict[int, float] = field(default_factory=dict)


class Metrics:
    """One server's numbers.

    Args:
        stats: gives the engine's.
    """

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineNumbers(stats))
        self._times: dict[str, _Times] = {}
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token", SECONDS
        )
        self._gap = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence", GAP_SECONDS
        )
        self._whole = self._histogram("request_seconds", "From arrival to a sequence's last token", SECONDS)
        self._batch = self._histogram("step_tokens", "Tokens of a forward", TOKENS)
        self._finished = Counter(
            "fastgen_sequences", "Sequences that ended, by reason", ["reason"], registry=self.registry
        )
        self._answers = Counter(
            "fastgen_http_responses",
            "Answers, by route and status",
            ["route", "status"],
            registry=self.registry,
        )

    def begun(self, request_id: str, at_s: float) -> None:
        """A request has arrived."""
        self._times[request_id] = _Times(at_s)

    def stepped(self, outputs: Sequence[Output], stats: Stats, at_s: float) -> None:
        """A step has ended at `at_s` with these outputs."""
        self._batch.observe(stats.batch_tokens)
        for output in outputs:
            times = self._times.get(output.request_id)
            if times is not None:
                self._time(times, output, at_s)

    def ended(self, request_id: str, num_unfinished: int, at_s: float) -> None:
        """Nobody asks for a request any more; so many of its sequences are aborted."""
        times = self._times.pop(request_id, None)
        if times is not None and num_unfinished:
            self._finished.labels(FinishReason.ABORT.value).inc(num_unfinished)
            for _ in range(num_unfinished):
                self._whole.observe(at_s - times.begun_s)

    def answered(self, route: str, status: int) -> None:
        """An answer was sent."""
        self._answers.labels(route, str(status)).inc()

    def exposition(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)

    def _time(self, times: _Times, output: Output, at_s: float) -> None:
        num_tokens = len(output.new_token_ids)
        if not times.last_s:
            self._first_token.observe(at_s - times.begun_s)
        elif num_tokens and output.index in times.last_s:
            # Tokens that one step added (right guesses) share its time.
            for _ in range(num_tokens):
                self._gap.observe((at_s - times.last_s[output.index]) / num_tokens)
        times.last_s[output.index] = at_s
        if output.finish_reason is not None:
            self._whole.observe(at_s - times.begun_s)
            self._finished.labels(output.finish_reason.value).inc()

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"fastgen_{name}", text, buckets=buckets, registry=self.registry)


class _EngineNumbers(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"fastgen_{name}", text, value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"fastgen_{name}", text, value=getattr(stats, name))
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield GaugeMetricFamily("fastgen_cache_usage_ratio", "Part of the KV cache that is held", value=used)
