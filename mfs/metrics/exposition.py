"""Families as text: Prometheus 0.0.4, or OpenMetrics 1.0 for who asks for it. Nothing else knows prometheus_client.

Imported when the first scrape comes, in its thread: a mount that nobody scrapes does not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest as prometheus_text
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus
from prometheus_client.registry import Collector

from mfs.metrics.families import Distribution, Family, Text
from mfs.shown import clean, mask

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def exposed(families: Iterable[Family], accept: str = "") -> Text:
    """The text of a scrape. accept: the request's header of that name. Takes milliseconds: for a thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(families))
    if accepts_openmetrics(accept):
        return Text(OPENMETRICS, openmetrics_text(registry))  # type: ignore[no-untyped-call]
    return Text(PROMETHEUS, prometheus_text(registry))


def accepts_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is wanted, and at least as much as plain text. Source: RFC 9110 §12.5.1."""
    wanted = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        if kind in wanted:
            wanted[kind] = max(wanted[kind], _quality(parameters))
    openmetrics, plain = wanted.values()
    return openmetrics > 0 and openmetrics >= plain


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


class _Given(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return map(_metric, self._families)


def _metric(family: Family) -> Metric:
    name, help, labels, unit = family.name, family.help, family.labels, family.unit
    if family.kind == "info":
        found = InfoMetricFamily(name, help, labels=())
        for values in family.samples:
            found.add_metric((), dict(zip(labels, map(_shown, values), strict=True)))
        return found
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, help, labels=labels, unit=unit)
        for values, sample in family.samples.items():
            assert isinstance(sample, Distribution)
            bounds = [*map(str, sample.bounds_s), "+Inf"]
            histogram.add_metric(values, list(zip(bounds, accumulate(sample.counts), strict=True)), sample.sum_s)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, help, labels=labels, unit=unit)
    for values, sample in family.samples.items():
        assert not isinstance(sample, Distribution)
        metric.add_metric([_shown(value) for value in values], sample)
    return metric


def _shown(value: str) -> str:
    """A label's value: names of models and addresses come from strangers."""
    return clean(mask(value))


def parsed(text: str, *, openmetrics: bool = False) -> list[dict[str, object]]:
    """The families in a text, as JSON values: [{name, kind, help, unit, samples: [{name, labels, value}]}].

    Raises: ValueError.
    """
    parse = parse_openmetrics if openmetrics else parse_prometheus
    return [
        {
            "name": family.name, "kind": family.type, "help": family.documentation, "unit": family.unit,
            "samples": [{"name": s.name, "labels": s.labels, "value": s.value} for s in family.samples],
        }
        for family in parse(text)
    ]  # fmt: skip
