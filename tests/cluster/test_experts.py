"""What experts are made of, in a real service: whatever it is, a restored one is the same to the last bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from asking import eventually, restored
from streams import PROMPTS, Streams

from phalanx.testing.service import Service
from phalanx.testing.tiny import Shape, write_random

pytestmark = pytest.mark.cluster

Serve = Callable[..., Service]

KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "random, made fp8": ("", {"load_format": "dummy", "quantization": "fp8", "expert_backup": "disk"}),
    "fp8": ("fp8", {"expert_backup": "dram"}),
}
"""How the checkpoint is stored, if there is one, and flags."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_in_mid_stream_changes_no_stream_whatever_its_experts_are_made_of(
    serve: Serve, tmp_path: Path, kind: str
) -> None:
    stored, flags = KINDS[kind]
    shape = Shape("qwen3-moe", layers=2, experts=8)
    model = write_random(tmp_path / "tiny", shape, weights=bool(stored), dtype=stored or "bfloat16")
    service = serve(model=model, ep_size=2, **flags)
    options = {"temperature": [0.0, 0.8] * (len(PROMPTS) // 2), "seed": list(range(len(PROMPTS))), "max_tokens": 60}
    unfailed = Streams(service.url, PROMPTS, **options).start().join()
    assert len({text for text, *_ in unfailed}) == len(PROMPTS), unfailed
    before = restored(service)
    running = Streams(service.url, PROMPTS, **options).start()
    running.wait_for_chunks(5)
    service.signal(1, signal.SIGKILL)
    assert running.join() == unfailed
    source = str(flags["expert_backup"]).replace("dram", "vault")
    eventually(lambda: restored(service)[source] > before.get(source, 0))
