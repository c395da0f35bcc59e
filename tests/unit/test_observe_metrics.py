"""Metrics: the page that lists them says what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from phalanx.messages import Load
from phalanx.observe.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_the_page_and_the_code_name_the_same_metrics_with_the_same_types_and_labels() -> None:
    rows = re.findall(r"^\| `(phalanx_\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert documented == set(Metrics("m").described())


def test_a_load_becomes_gauges_and_preemptions_are_counted_across_restarts() -> None:
    metrics = Metrics("m")
    metrics.load(1, 0, Load(running=3, waiting=2, kv_blocks_used=5, kv_blocks_total=10, preemptions=4))
    metrics.load(1, 0, Load(running=3, preemptions=4, kv_blocks_total=10))
    metrics.load(1, 1, Load(running=1, preemptions=1, kv_blocks_total=10))
    assert sample(metrics, "phalanx_num_preemptions_total", model_name="m") == 5
    assert sample(metrics, "phalanx_num_requests_running", model_name="m", rank="1") == 1
    metrics.gone(1, 1)
    assert sample(metrics, "phalanx_num_requests_running", model_name="m", rank="1") == 0


def test_the_prefix_cache_is_counted_in_tokens_over_all_ranks() -> None:
    metrics = Metrics("m")
    metrics.load(0, 0, Load(prefix_queries=100, prefix_hits=32))
    metrics.load(0, 0, Load(prefix_queries=150, prefix_hits=80))
    metrics.load(1, 0, Load(prefix_queries=50, prefix_hits=16))
    assert sample(metrics, "phalanx_prefix_cache_queries_total", model_name="m") == 200
    assert sample(metrics, "phalanx_prefix_cache_hits_total", model_name="m") == 96


def test_kv_usage_is_a_share_of_one() -> None:
    metrics = Metrics("m")
    metrics.load(0, 0, Load(kv_blocks_used=5, kv_blocks_total=20))
    assert sample(metrics, "phalanx_kv_cache_usage_perc", model_name="m", rank="0") == 0.25


def test_two_services_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.finished("stop")
    assert b'finished_reason="stop"' in first.scrape()
    assert b'finished_reason="stop"' not in second.scrape()
