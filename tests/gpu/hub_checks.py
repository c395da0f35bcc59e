"""Logits beside those of transformers, the models' own library: for scripts/gpu_check.

A random Qwen3-MoE is made by transformers, saved, and read by our loader. Both compute prefills and decodes of the same
tokens in bfloat16, and transformers once more in float32: by the distance from that both are judged.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from engine_checks import error_of, on_device

from phalanx.comm.notices import NoticeBoard
from phalanx.config import ServeConfig
from phalanx.engine.batch import StepBatch
from phalanx.model.attention import ForwardBatch, SequenceSlice
from phalanx.testing.solo import SoloEngine

WORSE = 1.5
"""Our distance from float32 may be so many times that of transformers."""
FEWER_TOPS = 0.03
"""And so much less of our likeliest tokens may be float32's."""


@dataclass(frozen=True)
class Case:
    """sequences: tokens of each; the last `decodes` of them are decoded one by one, all sequences at once, the others
    prefilled in chunks of `chunk`."""

    sequences: tuple[int, ...]
    decodes: int
    chunk: int
    dtype: torch.dtype
    model: dict[str, int]


LARGE = Case(
    (300, 64, 150, 211), 24, 128, torch.bfloat16,
    {
        "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 256, "intermediate_size": 1024, "max_position_embeddings": 1024,
    },
)  # fmt: skip
SMALL = Case(
    (12, 5), 2, 8, torch.float16,
    {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "intermediate_size": 64, "max_position_embeddings": 64,
    },
)  # fmt: skip
"""The interpreter cuts bfloat16 where a device rounds; float16 it rounds as well."""

Logits = tuple[torch.Tensor, torch.Tensor]
"""float32 on the CPU: of all prefilled and of all decoded tokens, [tokens, V]."""


def check_hub_logits(device: torch.device, large: bool) -> None:
    """Ours, also `--deterministic`, are about as far from float32 as transformers' own in the same type."""
    if importlib.util.find_spec("transformers") is None:
        print("    skipped: transformers is not installed here")
        return
    import transformers

    case = LARGE if large else SMALL
    board = NoticeBoard.create(1)
    with tempfile.TemporaryDirectory() as path, _quiet(transformers):
        tokens = _save(path, case)
        exact = _theirs(path, case, tokens, torch.float32, device)
        found = {"transformers": _theirs(path, case, tokens, case.dtype, device)}
        for name, deterministic in (("phalanx", False), ("phalanx --deterministic", True)):
            found[name] = _ours(path, case, tokens, device, board, deterministic)
    board.close()
    print(
        f"    {str(case.dtype).removeprefix('torch.')} against transformers {transformers.__version__} in float32; "
        f"{len(exact[0])} tokens prefilled, {len(exact[1])} decoded"
    )
    worst = ""
    for name, logits in found.items():
        errors = [error_of(got, want) for got, want in zip(logits, exact, strict=True)]
        tops = [_same_tops(got, want) for got, want in zip(logits, exact, strict=True)]
        beside = [error_of(got, want) for got, want in zip(logits, found["transformers"], strict=True)]
        same = _same_tops(torch.cat(logits), torch.cat(exact))
        print(
            f"    {name:24s} relative error, prefill {errors[0]:.2e}, decode {errors[1]:.2e}; likeliest token the same "
            f"{tops[0]:.1%}, {tops[1]:.1%}; from transformers in this type {beside[0]:.2e}, {beside[1]:.2e}"
        )
        if name == "transformers":
            allowed, needed = [WORSE * e for e in errors], same - FEWER_TOPS
        elif any(e > a for e, a in zip(errors, allowed, strict=True)):
            worst = f"{name}: relative errors {errors}, at most {allowed} wanted"
        elif same < needed:
            worst = f"{name}: likeliest tokens the same {same:.1%}, at least {needed:.1%} wanted"
    assert not worst, worst


def _save(path: str, case: Case) -> list[torch.Tensor]:
    """Make the model and the tokens."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    width = case.model["hidden_size"]
    config = Qwen3MoeConfig(
        **case.model, norm_topk_prob=True, tie_word_embeddings=False, initializer_range=width**-0.5,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(case.dtype).save_pretrained(path)
    return [torch.randint(0, case.model["vocab_size"], (length,)) for length in case.sequences]


def _theirs(path: str, case: Case, tokens: list[torch.Tensor], dtype: torch.dtype, device: torch.device) -> Logits:
    """Sequence by sequence: a prefill, then tokens one by one on its cache."""
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").to(device).eval()
    prefilled, decoded = [], []
    with torch.inference_mode():
        for sequence in tokens:
            ids = sequence[None].to(device)
            first = ids.shape[1] - case.decodes
            out = model(ids[:, :first], use_cache=True)
            prefilled.append(out.logits[0].float().cpu())
            for at in range(first, ids.shape[1]):
                out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                decoded.append(out.logits[0].float().cpu())
    # Ours come step by step, all sequences at once.
    steps = torch.cat(decoded).view(len(tokens), case.decodes, -1).transpose(0, 1)
    return torch.cat(prefilled), steps.reshape(len(tokens) * case.decodes, -1)


def _ours(
    path: str, case: Case, tokens: list[torch.Tensor], device: torch.device, board: NoticeBoard, deterministic: bool
) -> Logits:  # fmt: skip
    """Prefills in chunks, then decodes of all sequences together, through captured graphs where a device has them."""
    graphs = device.type == "cuda"
    config = ServeConfig(
        model=path, dtype=str(case.dtype).removeprefix("torch."), deterministic=deterministic, num_kv_blocks=128,
        max_model_len=max(case.sequences), max_num_batched_tokens=case.chunk, max_num_seqs=8,
        cuda_graph_max_bs=8 if graphs else 0,
    )  # fmt: skip
    engine = SoloEngine(config, parts=on_device(device, board), warm_up=graphs)

    def run(pieces: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Logits of (sequence, from, to)."""
        slices, positions, ids = [], list[int](), []
        for which, start, end in pieces:
            first = sum(-(-n // config.block_size) for n in case.sequences[:which])
            blocks = np.arange(first, first - (-end // config.block_size), dtype=np.int32)
            slices.append(SequenceSlice(len(positions), end - start, start, blocks))
            positions.extend(range(start, end))
            ids.append(tokens[which][start:end])
        forward = ForwardBatch(torch.cat(ids), torch.tensor(positions), tuple(slices))
        logits = engine.runner.run(StepBatch(forward, (), ())).logits(range(len(positions)))
        return torch.from_numpy(np.array(logits))

    prefilled = []
    for which, length in enumerate(case.sequences):
        last = length - case.decodes
        prefilled += [run([(which, at, min(at + case.chunk, last))]) for at in range(0, last, case.chunk)]
    decoded = [
        run([(which, length - left, length - left + 1) for which, length in enumerate(case.sequences)])
        for left in range(case.decodes, 0, -1)
    ]
    engine.close()
    return torch.cat(prefilled), torch.cat(decoded)


def _same_tops(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.argmax(1) == want.argmax(1)).float().mean())


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars between the figures."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
