"""`/metrics`: what the server counts of itself, in the text form of Prometheus.

Everything is made from the store when it is asked for: no number is kept in this process, so none
is lost with it, and those of all processes are there. `METRICS` is the table of them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from weft.service.jobs.tally import Count

from .state import Gateway, Visit

MEDIA = "text/plain; version=0.0.4; charset=utf-8"
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class Told(Struct, frozen=True):
    """One metric: its kind, its labels, what it says."""

    kind: str
    labels: tuple[str, ...]
    text: str


METRICS: dict[str, Told] = {
    "weft_jobs": Told("gauge", ("model", "state"), "jobs that are not over"),
    "weft_jobs_finished": Told("counter", ("model", "state"), "jobs that are over"),
    "weft_jobs_merged": Told("counter", ("model",), "jobs that shared a forward with others"),
    "weft_batch_jobs": Told("histogram", ("model",), "jobs in the forward of a job that was begun"),
    "weft_stage_seconds": Told(
        "histogram", ("model", "stage"), "seconds of jobs by stage: price, queue, run, total"
    ),
    "weft_model_ready": Told("gauge", ("model", "state"), "1 for the state that a model is in"),
    "weft_worker_bytes": Told("gauge", ("model", "where"), "memory of a worker: host, device"),
    "weft_process_silent_seconds": Told("gauge", ("process",), "since it was heard of last"),
    "weft_http_requests": Told("counter", ("route", "method", "status"), "requests answered"),
    "weft_refusals": Told("counter", ("limit",), "refused for a limit, by its setting"),
    "weft_connections": Told("gauge", (), "connections that are open"),
    "weft_health_checks": Told("counter", (), "looks at whether the store can be written"),
    "weft_up_seconds": Told("gauge", (), "since the gateway was started"),
    "weft_draining": Told("gauge", (), "1: it takes no new jobs"),
}


def metrics(gateway: Gateway, visit: Visit) -> Response:
    gateway.tallies.flush()
    registry = CollectorRegistry()
    registry.register(_All(gateway))
    return Response(generate_latest(registry), media_type=MEDIA)


def is_open(gateway: Gateway, request: Request) -> bool:
    """Whether no key is needed: the setting says so, and the request is from this machine itself,
    not handed on by a proxy on it."""
    if gateway.settings.metrics != "loopback" or request.client is None:
        return False
    try:
        near = ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
    return near and not any(name in request.headers for name in FORWARDED)


class _All(Collector):
    """All of `METRICS`, as they are now."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        rows = self._gateway.ledger.tallies()
        now = dict(_now(self._gateway))
        for name, told in METRICS.items():
            if told.kind == "gauge":
                yield _gauge(name, told, now.get(name, {}))
            elif told.kind == "counter":
                yield _counter(name, told, [one for one in rows if one.name == f"{name}_total"])
            else:
                yield _histogram(name, told, rows)


Values = dict[tuple[str, ...], float]


def _now(gateway: Gateway) -> Iterator[tuple[str, Values]]:
    """The gauges."""
    ledger, now = gateway.ledger, gateway.clock()
    yield "weft_jobs", {key: float(count) for key, count in ledger.counts().items()}
    states = {card.model: card.state for card in ledger.cards()}
    yield "weft_model_ready", {(id, states.get(id, "loading")): 1.0 for id in gateway.models}
    bytes_: Values = {}
    for memory in ledger.memories():
        bytes_[memory.model, "host"] = float(memory.host)
        bytes_[memory.model, "device"] = float(memory.device)
    yield "weft_worker_bytes", bytes_
    beats = {(name,): max(0.0, now - moment) for name, moment in ledger.beats().items()}
    yield "weft_process_silent_seconds", beats
    yield "weft_connections", {(): float(gateway.connected())}
    yield "weft_up_seconds", {(): max(0.0, now - gateway.born)}
    yield "weft_draining", {(): float(gateway.draining)}


def _gauge(name: str, told: Told, values: Values) -> Metric:
    family = GaugeMetricFamily(name, told.text, labels=told.labels)
    for labels, value in sorted(values.items()):
        family.add_metric(labels, value)
    return family


def _counter(name: str, told: Told, rows: list[Count]) -> Metric:
    family = CounterMetricFamily(name, told.text, labels=told.labels)
    for one in rows:
        family.add_metric([value for _, value in one.labels], one.value)
    return family


def _histogram(name: str, told: Told, rows: list[Count]) -> Metric:
    """Buckets stand in the store each for itself, and are told with all smaller ones."""
    family = HistogramMetricFamily(name, told.text, labels=told.labels)
    sums = {one.labels: one.value for one in rows if one.name == f"{name}_sum"}
    for labels, total in sums.items():
        found = [o for o in rows if o.name == f"{name}_bucket" and o.labels[:-1] == labels]
        ends = sorted([(float(one.labels[-1][1]), one) for one in found], key=lambda pair: pair[0])
        buckets: list[Any] = []
        count = 0.0
        for _, one in ends:
            count += one.value
            buckets.append((one.labels[-1][1], count))
        if not buckets or buckets[-1][0] != "+Inf":
            buckets.append(("+Inf", count))
        family.add_metric([value for _, value in labels], buckets, total)
    return family
