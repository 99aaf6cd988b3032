"""What Prometheus reads: vLLM's names and meanings where they exist, `incipit:` for what vLLM does not have.

No label tells a prompt's name unless that is asked for: names may be secret, and there may be thousands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from incipit.serve.asks import AnyEngine, Ask, Choose, End, Sampling, State

if TYPE_CHECKING:
    from incipit.serve.http.rounds import Called

FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
BETWEEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
WHOLE = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
REASONS = {"cancelled": "abort"}  # vLLM's word


class Meters:
    """All figures of one server. by_prompt: also count answers by the prompt's name."""

    def __init__(self, engine: AnyEngine, model: str, by_prompt: bool = False) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.model = model
        ProcessCollector(registry=self.registry)
        ProcessCollector(  # nothing where the engine has no process of its own
            namespace="incipit_engine", pid=lambda: engine.state().process, registry=self.registry
        )
        self.registry.register(_Engine(engine, model))
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Seconds to the first token", FIRST)
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Seconds between two tokens", BETWEEN
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Seconds from submit to the end", WHOLE
        )
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Seconds waited for a slot", WHOLE)
        self._read = self._histogram(
            "vllm:request_prompt_tokens", "Tokens read by a request, prompt included", COUNTS
        )
        self._written = self._histogram(
            "vllm:request_generation_tokens", "Tokens written for a request", COUNTS
        )
        self._asked = self._histogram("vllm:request_params_max_tokens", "max_tokens of a request", COUNTS)
        self._calls = Counter(
            "incipit:http_requests",
            "HTTP requests by address and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.active = Gauge("incipit:http_requests_active", "HTTP requests under way", registry=self.registry)
        self._tasks = Gauge("incipit:http_tasks", "Tasks of the event loop", registry=self.registry)
        self._prompts = None
        if by_prompt:
            self._prompts = Counter(
                "incipit:answers_by_prompt",
                "Rows answered, by prompt",
                ["prompt", "reason"],
                registry=self.registry,
            )

    def _histogram(self, name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
        whole = Histogram(name, says, ["model_name"], registry=self.registry, buckets=buckets)
        return whole.labels(self.model)

    def between(self, seconds: float, tokens: int) -> None:
        """Some tokens came `seconds` after those before them."""
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def ended(self, ask: Ask, end: End, called: Called) -> None:
        """A row has ended."""
        if end.reason in ("stop", "length"):
            self._whole.observe(end.seconds)
            self._queue.observe(end.waited)
            self._read.observe(end.prompt_tokens + end.input_tokens)
            if not isinstance(ask.do, Choose):
                self._written.observe(end.new_tokens)
                if end.first_token:
                    self._ttft.observe(end.first_token)
        if isinstance(ask.do, Sampling):
            self._asked.observe(ask.do.max_new_tokens)
        if self._prompts is not None:
            self._prompts.labels(called.model, end.reason).inc()

    def called(self, route: str, status: int) -> None:
        """An HTTP request was answered."""
        self._calls.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """The page that Prometheus reads; from within the event loop."""
        self._tasks.set(len(asyncio.all_tasks()))
        return generate_latest(self.registry)


class _Engine(Collector):
    """The engine's own counters, read when they are asked for."""

    def __init__(self, engine: AnyEngine, model: str) -> None:
        self.engine, self.model = engine, model

    def collect(self) -> Iterable[Metric]:
        """All families."""
        state = self.engine.state()
        for name, says, value in _gauges(state):
            gauge = GaugeMetricFamily(name, says, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, says, count in _counters(state):
            counter = CounterMetricFamily(name, says, labels=["model_name"])
            counter.add_metric([self.model], count)
            yield counter
        yield self._by(
            "vllm:request_success", "Rows that ended, by reason", "finished_reason", state.finished
        )
        yield self._by(
            "incipit:requests_refused", "Rows that were not taken, by error", "reason", state.refused
        )
        yield self._steps("incipit:batch_rows", "Rows of a decode step", state.rows_per_step)
        yield self._steps("incipit:batch_tasks", "Distinct prompts of a decode step", state.tasks_per_step)

    def _by(self, name: str, says: str, label: str, counts: Mapping[str, int]) -> Metric:
        found = CounterMetricFamily(name, says, labels=["model_name", label])
        for reason, count in sorted(counts.items()):
            found.add_metric([self.model, REASONS.get(reason, reason)], count)
        return found

    def _steps(self, name: str, says: str, counts: Mapping[int, int]) -> Metric:
        """A histogram from how many steps had each value."""
        found = HistogramMetricFamily(name, says, labels=["model_name"])
        buckets = [(str(float(b)), float(sum(n for value, n in counts.items() if value <= b))) for b in ROWS]
        whole = float(sum(counts.values()))
        found.add_metric([self.model], [*buckets, ("+Inf", whole)], sum(v * n for v, n in counts.items()))
        return found


def _gauges(state: State) -> list[tuple[str, str, float]]:
    used = state.tokens_reserved / state.tokens if state.tokens else 0.0
    return [
        ("vllm:num_requests_running", "Rows in the batch now", state.running),
        ("vllm:num_requests_waiting", "Rows that wait for a slot", state.waiting),
        ("vllm:kv_cache_usage_perc", "Share of the key/value cache that is reserved; 1 is all", used),
        ("incipit:ready", "1 where a request would be taken", float(state.ready)),
        ("incipit:slots", "Rows that fit into the batch", state.slots),
        ("incipit:prompt_cache_prompts", "Prompts kept as the model reads them", state.cache_prompts),
        ("incipit:prompt_cache_bytes", "Bytes of the kept prompts", state.cache_bytes),
        ("incipit:prompt_cache_max_bytes", "Bytes that kept prompts may take", state.cache_max_bytes),
    ]


def _counters(state: State) -> list[tuple[str, str, float]]:
    return [
        ("vllm:prompt_tokens", "Tokens read", state.input_tokens),
        ("vllm:generation_tokens", "Tokens written", state.new_tokens),
        ("incipit:engine_steps", "Steps of the engine", state.steps),
        ("incipit:engine_restarts", "Times that the engine came back from a failure", state.restarts),
        ("incipit:prompt_cache_hits", "Times that a prompt was there already", state.cache_hits),
        ("incipit:prompt_cache_misses", "Times that a prompt was computed", state.cache_misses),
    ]
