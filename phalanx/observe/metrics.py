"""Every metric of the service, in one registry that belongs to one object.

Names follow vLLM's stems with the prefix `phalanx_`, so that dashboards made for vLLM need one replacement. What each
means stands in docs/metrics.md; a test holds that page and this file equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phalanx.messages import Load, VaultState
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
        self._loads: dict[tuple[int, int], Load] = {}
        self._vault_starts: dict[int, int] = {}
        self._described: list[tuple[str, str, tuple[str, ...]]] = []
        self._requests()
        self._ranks()
        self._elasticity()

    def _requests(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that got a first token")
        self.computed_tokens = self._counter("prefill_tokens_computed", "Prompt tokens computed, recomputed ones too")
        self.generation_tokens = self._counter("generation_tokens", "Tokens given to clients")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", _LATENCY_S)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request", _SHORT_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", _LATENCY_S)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to hand-over to a rank", _LATENCY_S)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_output = self._histogram("request_generation_tokens", "Output tokens of a request", _TOKENS)
        self.request_n = self._histogram("request_params_n", "n of a call", _COUNT)
        self.request_max = self._histogram("request_params_max_tokens", "max_tokens of a request", _TOKENS)
        self._success = self._counters("request_success", "Requests that ended", "model_name", "finished_reason")
        self._refused = self._counters("requests_refused", "Requests not taken", "model_name", "reason")

    def _ranks(self) -> None:
        self._running = self._gauge("num_requests_running", "Requests running on a rank", "model_name", "rank")
        self._waiting = self._gauge("num_requests_waiting", "Requests waiting on a rank", "model_name", "rank")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Used share of KV blocks, 1 = all", "model_name", "rank")
        self._held = self._gauge("num_requests_held", "Requests that no rank has", "model_name").labels(self._model)
        self._preempted = self._counter("num_preemptions", "Requests preempted for want of KV blocks")
        self._prefix_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache")

    def _elasticity(self) -> None:
        self.hosts_alive = self._gauge("hosts_alive", "Hosts whose launcher is there")
        self.ranks_alive = self._gauge("ranks_alive", "Members of the view that live")
        self.view_epoch = self._gauge("view_epoch", "Epoch of the newest view")
        self.rank_failures = self._counters("rank_failures", "Ranks lost", "cause")
        self.recoveries = self._counters("recoveries", "Changes of membership", "trigger", "outcome")
        self.recovery_seconds = self._histograms("recovery_seconds", "Duration of a recovery", _PHASE_S, "phase")
        self.stall = self._histograms(
            "stream_stall_seconds", "Gap in a stream made by a change of membership", _PHASE_S
        )
        self.steps_replayed = self._counters("steps_replayed", "Steps that ran again")
        self.requests_moved = self._counters("requests_moved", "Requests moved to another rank")
        self.bytes_restored = self._counters("expert_bytes_restored", "Expert bytes restored", "source")
        self.expert_moves = self._counters("expert_moves", "Experts staged in the background")
        self.expert_replicas = self._gauge("expert_replicas", "Filled expert slots, all layers and ranks")
        self.expert_balancedness = self._gauge("expert_balancedness", "Mean over max of the ranks' expected load")
        self.expert_balancedness.set(math.nan)
        self.seconds_restored = self._counters("expert_restore_seconds", "Time that ranks took for them", "source")
        self._vault_filled = self._gauge("vault_filled_bytes", "Weights in the vault")
        self._vault_total = self._gauge("vault_total_bytes", "Weights in the vault when it is full")
        self._vault_restarts = self._counters("vault_restarts", "Times the vault's process was started again")

    def _counters(self, stem: str, text: str, *labels: str) -> Counter:
        return Counter(self._name(stem, "counter", labels), text, labels, registry=self.registry)

    def _gauge(self, stem: str, text: str, *labels: str) -> Gauge:
        return Gauge(self._name(stem, "gauge", labels), text, labels, registry=self.registry)

    def _histograms(self, stem: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        name = self._name(stem, "histogram", labels)
        return Histogram(name, text, labels, registry=self.registry, buckets=tuple(buckets))

    def _counter(self, stem: str, text: str) -> Counter:
        return self._counters(stem, text, "model_name").labels(self._model)

    def _histogram(self, stem: str, text: str, buckets: Iterable[float]) -> Histogram:
        return self._histograms(stem, text, buckets, "model_name").labels(self._model)

    def _name(self, stem: str, kind: str, labels: tuple[str, ...]) -> str:
        name = f"phalanx_{stem}"
        self._described.append((name, kind, labels))
        return name

    def finished(self, reason: str) -> None:
        """A request (one choice of one prompt) ended: stop, length, abort or error."""
        self._success.labels(self._model, reason).inc()

    def refused(self, reason: str) -> None:
        """A call was not taken: queue_full or unavailable."""
        self._refused.labels(self._model, reason).inc()

    def load(self, rank: int, incarnation: int, load: Load) -> None:
        """A rank's occupation after a step."""
        self._running.labels(self._model, rank).set(load.running)
        self._waiting.labels(self._model, rank).set(load.waiting)
        self._kv_usage.labels(self._model, rank).set(load.kv_blocks_used / max(1, load.kv_blocks_total))
        seen = self._loads.get((rank, incarnation), Load())
        self._loads[rank, incarnation] = load
        self._preempted.inc(max(0, load.preemptions - seen.preemptions))
        self._prefix_queries.inc(max(0, load.prefix_queries - seen.prefix_queries))
        self._prefix_hits.inc(max(0, load.prefix_hits - seen.prefix_hits))

    def gone(self, rank: int, incarnation: int) -> None:
        """A rank is lost: it runs nothing any more."""
        self._loads.pop((rank, incarnation), None)
        for gauge in (self._running, self._waiting, self._kv_usage):
            gauge.labels(self._model, rank).set(0)

    def balance(self, moves: int, replicas: int, balancedness: float | None) -> None:
        """Ranks staged `moves` more experts; how many slots are filled now, and how even that makes their loads."""
        self.expert_moves.inc(moves)
        self.expert_replicas.set(replicas)
        if balancedness is not None:
            self.expert_balancedness.set(balancedness)

    def held(self, count: int) -> None:
        self._held.set(count)

    def recovered(self, recovery: Recovery) -> None:
        """A recovery is over."""
        self.recoveries.labels(recovery.trigger, recovery.outcome).inc()
        self.steps_replayed.inc(recovery.steps_replayed)
        for source, count in recovery.bytes_restored.items():
            self.bytes_restored.labels(source).inc(count)
        for source, seconds in recovery.seconds_restored.items():
            self.seconds_restored.labels(source).inc(seconds)
        for phase, seconds in recovery.seconds.items():
            self.recovery_seconds.labels(phase).observe(seconds)

    def vaults(self, states: Mapping[int, VaultState]) -> None:
        """How the vaults are, by host: bytes of all hosts together."""
        self._vault_filled.set(sum(state.filled_bytes for state in states.values()))
        self._vault_total.set(sum(state.total_bytes for state in states.values()))
        for node, state in states.items():
            seen = self._vault_starts.get(node, 0)
            self._vault_restarts.inc(max(0, state.restarts - seen))
            self._vault_starts[node] = state.restarts

    def described(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Name as scraped (histograms without their suffixes), type and labels of every metric. LOCAL."""
        return sorted(
            (name + ("_total" if kind == "counter" else ""), kind, labels) for name, kind, labels in self._described
        )

    def scrape(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
