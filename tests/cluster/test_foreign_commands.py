"""A command that was written for another server starts a real service here."""

from __future__ import annotations

from pathlib import Path

import pytest
from streams import PROMPTS, SAMPLING, Streams

from phalanx.testing.service import Service

pytestmark = pytest.mark.cluster

FLAGS = """--trust-remote-code --tp 2 --dp 2 --enable-dp-attention --enable-dp-lm-head --moe-dense-tp-size 1
    --elastic-ep-backend mooncake --mooncake-ib-device mlx5_0 --moe-a2a-backend mooncake --deepep-mode low_latency
    --enable-two-batch-overlap --disable-custom-all-reduce --enable-eplb --ep-num-redundant-experts 4
    --enable-elastic-expert-backup --chunked-prefill-size 128 --cuda-graph-max-bs 16 --max-running-requests 16
    --mem-fraction-static 0.5 --device cpu --host 127.0.0.1"""


def test_sglangs_command_for_elastic_ep_serves(tiny: Path, unfailed: dict[str, list[object]]) -> None:
    with Service("", "--model-path", str(tiny), *FLAGS.split()) as service:
        service.wait_for_line("--tp 2 is --ep-size 2 here")
        service.wait_for_line("--enable-dp-attention: each rank always has its own requests")
        assert len(service.status()["ranks"]) == 2
        assert Streams(service.url, PROMPTS, **SAMPLING["greedy"]).start().join() == unfailed["greedy"]
