"""What all replicas count, added up, beside what this process counts itself.

Answers are counted here, as clients get them. What a replica had counted when it was last asked stays in the sum after
it has ended, so that counters do not fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from .pool import Replica, Status

_OWN = "fastgen_http_responses"
_RATIO = "fastgen_cache_usage_ratio"
Sample = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class Family:
    """A metric and its samples, by name and labels."""

    kind: str
    text: str
    samples: dict[Sample, float] = field(default_factory=dict)

    @property
    def grows(self) -> bool:
        """A count, which does not fall."""
        return self.kind in {"counter", "histogram"}


Families = dict[str, Family]


def read(exposition: str) -> Families:
    """The metrics of one replica."""
    found: Families = {}
    for metric in text_string_to_metric_families(exposition):
        if metric.name == _OWN or metric.name == _RATIO or metric.name.endswith("_created"):
            continue
        family = found.setdefault(metric.name, Family(metric.type, metric.documentation))
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                family.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def added(parts: Iterable[Families]) -> Families:
    """The sums."""
    total: Families = {}
    for part in parts:
        for name, family in part.items():
            into = total.setdefault(name, Family(family.kind, family.text)).samples
            for sample, value in family.samples.items():
                into[sample] = into.get(sample, 0.0) + value
    return total


class Totals(Collector):
    """The numbers of a server with replicas.

    Args:
        replicas: all of them.
    """

    def __init__(self, replicas: Callable[[], Sequence[Replica]]) -> None:
        self._replicas = replicas
        self._now: dict[int, Families] = {}
        self._ended: Families = {}
        self._registry = CollectorRegistry()
        self._answers = Counter(
            _OWN, "Answers, by route and status", ["route", "status"], registry=self._registry
        )
        self._registry.register(self)

    def answered(self, route: str, status: int) -> None:
        """An answer was sent."""
        self._answers.labels(route, str(status)).inc()

    def ended(self, number: int) -> None:
        """A replica has ended."""
        counted = {name: family for name, family in self._now.pop(number, {}).items() if family.grows}
        self._ended = added([self._ended, counted])

    def exposition(self, now: Mapping[int, str]) -> bytes:
        """All of it as Prometheus reads it; `now` is what each replica says."""
        self._now |= {number: read(text) for number, text in now.items()}
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        total = added([self._ended, *self._now.values()])
        for name, family in total.items():
            metric = Metric(name, family.text, family.kind)
            for (sample, labels), value in family.samples.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric
        used, blocks = (_value(total, f"fastgen_blocks_{each}") for each in ("used", "total"))
        yield GaugeMetricFamily(
            _RATIO, "Part of the KV caches that is held", value=used / blocks if blocks else 0.0
        )
        yield from self._of_replicas()

    def _of_replicas(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "fastgen_replica_requests", "Requests that a replica answers", labels=["replica"]
        )
        up = GaugeMetricFamily("fastgen_replica_up", "Whether a replica takes requests", labels=["replica"])
        restarts = GaugeMetricFamily(
            "fastgen_replica_restarts", "Times that a replica was started again", labels=["replica"]
        )
        for replica in self._replicas():
            labels = [str(replica.number)]
            running.add_metric(labels, replica.load.running)
            up.add_metric(labels, float(replica.status is Status.READY))
            restarts.add_metric(labels, replica.restarts)
        yield from (running, up, restarts)


def _value(families: Families, name: str) -> float:
    return families[name].samples.get((name, ()), 0.0) if name in families else 0.0
