"""What decode times are compared with computes the same model: the decode step that is made of torch's parts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from library_decode import Alone, Chains, LibraryModel, grouped_experts

from phalanx.config import ServeConfig
from phalanx.engine.batch import StepBatch
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.model.loader import Checkpoint
from phalanx.testing import tiny
from phalanx.testing.solo import SoloEngine


@pytest.mark.parametrize("chains", [Chains.plain(), Chains.of(lambda f: torch.compile(f, backend="aot_eager"))])
def test_the_librarys_decode_step_gives_the_logits_of_the_cpu_engine(chains: Chains, tmp_path: Path) -> None:
    tiny.make_tiny(tmp_path, "qwen3-moe", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=3,
                   expert_width=32)  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path)
    config, dtype = checkpoint.config, torch.float32
    count, width = config.num_experts, config.expert_width * config.hidden
    experts = torch.empty(config.num_moe_layers, count, 3 * width, dtype=dtype)
    for layer in range(config.num_moe_layers):
        for expert in range(count):
            checkpoint.read_expert(layer, expert, experts[layer, expert].view(torch.uint8).numpy(), dtype)
    model = LibraryModel(
        config, checkpoint.dense_weights(dtype), experts[:, :, : 2 * width].view(2, count, -1, config.hidden),
        experts[:, :, 2 * width :].view(2, count, config.hidden, -1), rank=0, rows=3, places=16, exchange=Alone(),
        chains=chains,
    )  # fmt: skip
    checkpoint.close()
    tokens_BT = torch.randint(0, 200, (3, 12), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        got = torch.stack([model.logits(tokens_BT[:, t], torch.full((3,), t)) for t in range(12)], 1)

    engine = SoloEngine(ServeConfig(model=str(tmp_path), dtype="float32", num_kv_blocks=8, max_model_len=64))
    for row, sequence in enumerate(tokens_BT):
        forward = ForwardBatch(sequence, torch.arange(12), (SequenceSlice(0, 12, 0, np.arange(1, dtype=np.int32)),))
        want = torch.from_numpy(np.array(engine.runner.run(StepBatch(forward, (), ())).logits(range(12))))
        torch.testing.assert_close(got[row], want, rtol=1e-3, atol=1e-3)
    engine.close()


def test_what_ranks_add_to_a_token_is_what_one_rank_with_all_experts_says() -> None:
    g = torch.Generator().manual_seed(1)
    x, router = torch.randn(9, 32, generator=g), torch.randn(6, 32, generator=g)
    w13, w2 = torch.randn(6, 32, 32, generator=g), torch.randn(6, 32, 16, generator=g)
    chains = Chains.plain()

    def said(first: int, last: int) -> torch.Tensor:
        return grouped_experts(
            x, x @ router.t(), w13[first:last], w2[first:last], chains, top_k=3, first=first, scaled=True
        )

    torch.testing.assert_close(said(0, 2) + said(2, 6), said(0, 6), rtol=1e-4, atol=1e-4)
