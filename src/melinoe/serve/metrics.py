"""Counters of a running server, in Prometheus' form and for its page."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from melinoe.serve.batching import Batches, Cost, Running

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SHARES = (0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
_WINDOW_S = 10.0
_COSTS = {  # fields of `Cost`
    "uses": ("expert_uses", "Experts asked for, a layer's pass each."),
    "hits": ("expert_hits", "Of them, those that were resident."),
    "loads": ("expert_loads", "Experts loaded into slots because a step needed them."),
    "prefetched": ("expert_prefetches", "Experts loaded ahead of need."),
    "transferred_bytes": ("transferred_bytes", "Bytes copied into slots."),
    "stall_s": ("stall_seconds", "Seconds that passes waited."),
}


class Metrics:
    """
    Count the server's work since it began.

    Attributes:
        registry: What `/metrics` shows.
        recent: The last requests that ended, the newest first: what the page lists.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._speed: deque[tuple[float, int]] = deque()
        counter = partial(Counter, registry=self.registry)
        seconds = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        self.requests = counter("melinoe_requests", "Requests that ended.", ["route", "status"])
        self.tokens = counter("melinoe_tokens", "Tokens computed.", ["kind"])
        self._costs = {
            field: counter(f"melinoe_{name}", help) for field, (name, help) in _COSTS.items()
        }
        self.step = seconds("melinoe_step_seconds", "Seconds of one step.")
        self.first = seconds("melinoe_time_to_first_token_seconds", "From admission.")
        self.each = seconds(
            "melinoe_time_per_token_seconds", "Of a request, after its first token."
        )
        self.share = Histogram(
            "melinoe_request_hit_rate", "Hit rate of a request.", registry=self.registry,
            buckets=_SHARES,
        )  # fmt: skip

    def watch(self, batches: Batches) -> None:
        """Show the queue, and how many experts each layer holds, as they are when asked."""
        gauge = partial(Gauge, registry=self.registry)
        running = gauge("melinoe_running_requests", "Requests computed now.")
        running.set_function(lambda: batches.counts()[0])
        waiting = gauge("melinoe_waiting_requests", "Requests in the queue.")
        waiting.set_function(lambda: batches.counts()[1])
        resident = gauge("melinoe_resident_experts", "Experts in slots.", ["layer"])
        slots = gauge("melinoe_slots", "Slots.", ["layer"])
        for layer, count in enumerate(batches.handle.slots_by_layer):
            slots.labels(layer).set(count)
            resident.labels(layer).set_function(partial(batches.handle.resident_count, layer))

    def step_done(self, cost: Cost, seconds: float, tokens: int, written: int) -> None:
        """Count one step."""
        for name, counter in self._costs.items():
            counter.inc(getattr(cost, name))
        self.step.observe(seconds)
        self.tokens.labels("prompt").inc(max(0, tokens - written))
        self.tokens.labels("completion").inc(written)
        now = time.monotonic()
        self._speed.append((now, written))
        while self._speed[0][0] < now - _WINDOW_S:
            self._speed.popleft()

    def tokens_per_s(self) -> float:
        """Tokens written a second, over the last ten seconds."""
        since = time.monotonic() - _WINDOW_S
        return sum(count for at, count in list(self._speed) if at >= since) / _WINDOW_S

    def request_done(self, route: str, status: str, choices: list[Running]) -> None:
        """Count one request that ended, however it did."""
        self.requests.labels(route, status).inc()
        for one in choices:
            ended = one.ended or time.perf_counter()
            if one.first_at is not None:
                self.first.observe(one.first_at - one.began)
                if len(one.tokens) > 1:
                    self.each.observe((ended - one.first_at) / (len(one.tokens) - 1))
            if one.cost.uses:
                self.share.observe(one.cost.hits / one.cost.uses)
            self.recent.appendleft(
                {
                    "route": route, "status": status, "prompt_tokens": len(one.prompt),
                    "completion_tokens": len(one.tokens), "seconds": round(ended - one.began, 3),
                    **one.cost.usage(),
                }
            )  # fmt: skip
