"""``/metrics`` for Prometheus: what this gateway's requests met, and how the fleet stands.

The first is counted here, in all processes of a gateway together (prometheus-client's files in
``PROMETHEUS_MULTIPROC_DIR``); the second is read from Redis when it is asked for. Labels are served models, routes and
error codes: nothing of a request, nothing of a tenant.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import GaugeMetricFamily

from tokenfleet.producer.overview import Overview
from tokenfleet.wire.events import AnyEvent, Delta, Finished, Started, Usage

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Metrics:
    """One per application."""

    def __init__(self) -> None:
        self._registry = r = CollectorRegistry()
        model = ("model",)
        self.requests = Counter("tokenfleet_requests", "Requests answered", ("route", "status"), registry=r)
        self.refusals = Counter(
            "tokenfleet_refusals", "Requests refused; model is empty where it was not known yet", ("model", "code"),
            registry=r,
        )  # fmt: skip
        self.queue_wait = Histogram(
            "tokenfleet_queue_wait_seconds", "Submit to a worker's start", model, registry=r, buckets=_SECONDS
        )
        self.ttft = Histogram(
            "tokenfleet_time_to_first_token_seconds", "Submit to the first token at the gateway", model, registry=r,
            buckets=_SECONDS,
        )  # fmt: skip
        self.gaps = Histogram(
            "tokenfleet_inter_token_seconds", "Between tokens that came one after the other to the gateway", model,
            registry=r, buckets=_GAPS,
        )  # fmt: skip
        self.prompt_tokens = Counter("tokenfleet_prompt_tokens", "Prompt tokens of finished jobs", model, registry=r)
        self.tokens = Counter("tokenfleet_completion_tokens", "Tokens delivered by finished jobs", model, registry=r)
        self.open = Gauge(
            "tokenfleet_open_requests", "Jobs that this gateway follows now", model, registry=r,
            multiprocess_mode="livesum",
        )  # fmt: skip

    def job(self, model: str) -> Observed:
        """For a job that was just submitted to a served model (an unknown one never gets here)."""
        return Observed(self, model)

    def render(self, fleet: Overview) -> bytes:
        """Prometheus' text format."""
        registry = self._registry
        if folder := os.environ.get(FOLDER):
            _forget_the_dead(Path(folder))
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        here = CollectorRegistry()
        here.register(_Fleet(fleet))
        return generate_latest(registry) + generate_latest(here)


class Observed:
    """One job's events as they come to a reader who saw it submitted. `nothing` is for readers that came later."""

    def __init__(self, metrics: Metrics | None, model: str) -> None:
        self._submitted = self._last = time.perf_counter()
        self._has_started = self._has_tokens = False
        self._metrics = metrics
        self._model = model
        self._gap = metrics.gaps.labels(model) if metrics else None
        if metrics:
            metrics.open.labels(model).inc()

    @classmethod
    def nothing(cls) -> Observed:
        return cls(None, "")

    def batch(self, batch: Iterable[tuple[int, AnyEvent]]) -> None:
        """Events that came together: their tokens were not waited for one by one, so they are one gap."""
        if self._metrics is None:
            return
        now = time.perf_counter()
        has_delta = False
        for _, event in batch:
            if isinstance(event, Delta):
                has_delta = True
            elif isinstance(event, Started) and not self._has_started:
                self._has_started = True
                self._metrics.queue_wait.labels(self._model).observe(now - self._submitted)
            elif isinstance(event, Finished):
                self._count(event.usage)
        if not has_delta:
            return
        if self._has_tokens:
            assert self._gap is not None
            self._gap.observe(now - self._last)
        else:
            self._has_tokens = True
            self._metrics.ttft.labels(self._model).observe(now - self._submitted)
        self._last = now

    def close(self) -> None:
        """The reader has left, or all is read."""
        if self._metrics is not None:
            self._metrics.open.labels(self._model).dec()
            self._metrics = None

    def _count(self, usage: Usage) -> None:
        assert self._metrics is not None
        self._metrics.prompt_tokens.labels(self._model).inc(usage.prompt_tokens)
        self._metrics.tokens.labels(self._model).inc(usage.completion_tokens)


class _Fleet:
    """The fleet's own figures, as Redis tells them."""

    def __init__(self, fleet: Overview) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[GaugeMetricFamily]:
        running = GaugeMetricFamily("tokenfleet_running_jobs", "Jobs that workers run", labels=["model"])
        waiting = GaugeMetricFamily("tokenfleet_waiting_jobs", "Jobs in the queue", labels=["model"])
        workers = GaugeMetricFamily("tokenfleet_workers", "Workers with a valid lease", labels=["model"])
        for info in self._fleet.models:
            running.add_metric([info.model.name], info.running)
            waiting.add_metric([info.model.name], info.waiting)
            workers.add_metric([info.model.name], info.workers)
        yield from (running, waiting, workers)
        redis = self._fleet.redis
        yield GaugeMetricFamily("tokenfleet_redis_used_bytes", "Memory that Redis uses", value=redis.used_bytes)
        yield GaugeMetricFamily("tokenfleet_redis_limit_bytes", "What it may use; 0: all", value=redis.limit_bytes)
        yield GaugeMetricFamily("tokenfleet_dead_letters", "Jobs given up", value=self._fleet.dead_letters)


def _forget_the_dead(folder: Path) -> None:
    """A killed process follows no jobs any more; what it counted stays."""
    for file in folder.glob("gauge_live*.db"):
        pid = int(re.findall(r"\d+", file.stem)[-1])
        if not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
