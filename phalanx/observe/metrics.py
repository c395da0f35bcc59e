"""Every metric of the service, in one registry that belongs to one object.

Names follow vLLM's stems with the prefix `phalanx_`, so that dashboards made for vLLM need one replacement. What each
means stands in docs/metrics.md; a test holds that page and this file equal.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phalanx.messages import Load
from phalanx.observe.events import Recovery

_LATENCY_S = (
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
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_PHASE_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_COUNT = (1, 2, 5, 10, 20)


class Metrics:
    """The registry and everything that may be counted. Methods are LOCAL and take no lock for long."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._preemptions: dict[tuple[int, int], int] = {}
        self._requests()
        self._ranks()
        self._elasticity()

    def _requests(self) -> None:
        model = self._model

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=tuple(buckets)).labels(model)

        self.prompt_tokens = counter("phalanx_prompt_tokens", "Prompt tokens of requests that got a first token")
        self.computed_tokens = counter("phalanx_prefill_tokens_computed", "Prompt tokens computed, recomputed ones too")
        self.generation_tokens = counter("phalanx_generation_tokens", "Tokens given to clients")
        self.ttft = histogram("phalanx_time_to_first_token_seconds", "Arrival to first token", _LATENCY_S)
        self.itl = histogram("phalanx_inter_token_latency_seconds", "Between two tokens of a request", _SHORT_S)
        self.e2e = histogram("phalanx_e2e_request_latency_seconds", "Arrival to last token", _LATENCY_S)
        self.queue_time = histogram("phalanx_request_queue_time_seconds", "Arrival to hand-over to a rank", _LATENCY_S)
        self.request_prompt = histogram("phalanx_request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_output = histogram("phalanx_request_generation_tokens", "Output tokens of a request", _TOKENS)
        self.request_n = histogram("phalanx_request_params_n", "`n` of a request", _COUNT)
        self.request_max = histogram("phalanx_request_params_max_tokens", "`max_tokens` of a request", _TOKENS)
        self._success = Counter(
            "phalanx_request_success", "Requests that ended, by reason", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self._refused = Counter(
            "phalanx_requests_refused", "Requests not taken, by reason", ["model_name", "reason"],
            registry=self.registry,
        )  # fmt: skip

    def _ranks(self) -> None:
        def by_rank(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name", "rank"], registry=self.registry)

        self._running = by_rank("phalanx_num_requests_running", "Requests running on a rank")
        self._waiting = by_rank("phalanx_num_requests_waiting", "Requests waiting on a rank")
        self._kv_usage = by_rank("phalanx_kv_cache_usage_perc", "Used share of a rank's KV blocks, 1 = all")
        self._held = Gauge(
            "phalanx_num_requests_held", "Requests in the router that no rank has", ["model_name"],
            registry=self.registry,
        ).labels(self._model)  # fmt: skip
        self._preempted = Counter(
            "phalanx_num_preemptions", "Requests preempted for want of KV blocks", ["model_name"],
            registry=self.registry,
        ).labels(self._model)  # fmt: skip

    def _elasticity(self) -> None:
        registry = self.registry
        self.ranks_alive = Gauge("phalanx_ranks_alive", "Ranks that serve or recover", registry=registry)
        self.view_epoch = Gauge("phalanx_view_epoch", "Epoch of the newest view", registry=registry)
        self.rank_failures = Counter("phalanx_rank_failures", "Ranks lost, by cause", ["cause"], registry=registry)
        self.recoveries = Counter(
            "phalanx_recoveries", "Changes of membership after start-up", ["trigger", "outcome"], registry=registry
        )
        self.recovery_seconds = Histogram(
            "phalanx_recovery_seconds", "Duration of a recovery, by phase", ["phase"], registry=registry,
            buckets=_PHASE_S,
        )  # fmt: skip
        self.stall = Histogram(
            "phalanx_stream_stall_seconds", "Gap in a stream caused by a change of membership", registry=registry,
            buckets=_PHASE_S,
        )  # fmt: skip
        self.steps_replayed = Counter("phalanx_steps_replayed", "Steps that ran again", registry=registry)
        self.requests_moved = Counter("phalanx_requests_moved", "Requests moved to another rank", registry=registry)
        self.bytes_restored = Counter(
            "phalanx_expert_bytes_restored", "Expert bytes restored, by source", ["source"], registry=registry
        )

    def finished(self, reason: str) -> None:
        """A request (one choice of one prompt) ended: stop, length, abort or error."""
        self._success.labels(self._model, reason).inc()

    def refused(self, reason: str) -> None:
        """A request was not taken: queue_full, unavailable or invalid."""
        self._refused.labels(self._model, reason).inc()

    def load(self, rank: int, incarnation: int, load: Load) -> None:
        """A rank's occupation after a step."""
        self._running.labels(self._model, rank).set(load.running)
        self._waiting.labels(self._model, rank).set(load.waiting)
        self._kv_usage.labels(self._model, rank).set(load.kv_blocks_used / max(1, load.kv_blocks_total))
        seen = self._preemptions.get((rank, incarnation), 0)
        if load.preemptions > seen:
            self._preempted.inc(load.preemptions - seen)
            self._preemptions[rank, incarnation] = load.preemptions

    def gone(self, rank: int, incarnation: int) -> None:
        """A rank is lost: it runs nothing any more."""
        self._preemptions.pop((rank, incarnation), None)
        for gauge in (self._running, self._waiting, self._kv_usage):
            gauge.labels(self._model, rank).set(0)

    def held(self, count: int) -> None:
        self._held.set(count)

    def recovered(self, recovery: Recovery) -> None:
        """A recovery is over."""
        self.recoveries.labels(recovery.trigger, recovery.outcome).inc()
        self.steps_replayed.inc(recovery.steps_replayed)
        for source, count in recovery.bytes_restored.items():
            self.bytes_restored.labels(source).inc(count)
        for phase, seconds in recovery.seconds.items():
            self.recovery_seconds.labels(phase).observe(seconds)

    def names(self) -> list[str]:
        """The names of all metrics as they are scraped, without histograms' suffixes."""
        return sorted(m.name + ("_total" if m.type == "counter" else "") for m in self.registry.collect())

    def scrape(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
