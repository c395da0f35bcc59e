"""The shapes of well-known models, for benchmarks with random weights: `phalanx make-model OUT --shape NAME`.

Sizes as in the config.json of each model on the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from phalanx.testing.tiny import Shape

SHAPES: Mapping[str, Shape] = MappingProxyType({
    "qwen3-30b-a3b": Shape(
        "qwen3-moe", layers=48, experts=128, top_k=8, hidden=2048, heads=32, kv_heads=4, head_dim=128,
        expert_width=768, vocab=151936, max_positions=40960, rope_theta=1e6,
    ),
    "qwen3-235b-a22b": Shape(
        "qwen3-moe", layers=94, experts=128, top_k=8, hidden=4096, heads=64, kv_heads=4, head_dim=128,
        expert_width=1536, vocab=151936, max_positions=40960, rope_theta=1e6,
    ),
    "mixtral-8x7b": Shape(
        "mixtral", layers=32, experts=8, top_k=2, hidden=4096, heads=32, kv_heads=8, head_dim=128,
        expert_width=14336, vocab=32000, max_positions=32768, rope_theta=1e6,
    ),
    "mixtral-8x22b": Shape(
        "mixtral", layers=56, experts=8, top_k=2, hidden=6144, heads=48, kv_heads=8, head_dim=128,
        expert_width=16384, vocab=32768, max_positions=65536, rope_theta=1e6,
    ),
})  # fmt: skip
