"""A plan as the model reads it: one flat batch of tokens, and the rows whose logits somebody wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from phalanx.engine.request import Request
from phalanx.engine.scheduler import Chunk, Plan
from phalanx.model.attention import ForwardBatch, SequenceSlice


@dataclass(frozen=True)
class PromptRows:
    """Rows first_row..first_row+count of the batch, whose logits say how likely the prompt tokens at positions
    first_token..first_token+count were."""

    request: Request
    first_row: int
    first_token: int
    count: int


@dataclass(frozen=True)
class StepBatch:
    """samples: each request that gets a token, with the row whose logits choose it. later: by how many tokens each of
    them will have grown by then; 1 in a batch behind another one that is under way, whose tokens may be `chosen`.
    step_tokens: of all ranks in this step, as far as that is known; 0: as if each had as many as this batch."""

    forward: ForwardBatch
    samples: tuple[tuple[Request, int], ...]
    prompts: tuple[PromptRows, ...]
    later: int = 0
    step_tokens: int = 0


def build(plan: Plan) -> StepBatch:
    """Lay out a plan's chunks one after the other. LOCAL, pure. A plan without tokens makes a batch of T = 0."""
    tokens: list[int] = []
    positions: list[int] = []
    slices: list[SequenceSlice] = []
    samples: list[tuple[Request, int]] = []
    prompts: list[PromptRows] = []
    for chunk in plan.chunks:
        row, end = len(tokens), chunk.start + chunk.length
        slices.append(SequenceSlice(row, chunk.length, chunk.start, np.array(chunk.blocks, np.int32)))
        tokens.extend(chunk.request.tokens[chunk.start : end])
        positions.extend(range(chunk.start, end))
        if chunk.samples:
            samples.append((chunk.request, row + chunk.length - 1))
        if chunk.request.owes_prompt_logprobs:
            prompts.extend(_prompt_rows(chunk, row))
    forward = ForwardBatch(
        torch.tensor(tokens, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64), tuple(slices)
    )
    return StepBatch(forward, tuple(samples), tuple(prompts))


def build_behind(plan: Plan, before: Plan) -> StepBatch:
    """The batch of a plan that `Scheduler.follow` made of `before`, whose step is under way. LOCAL, pure."""
    place = {chunk.request: i for i, chunk in enumerate(chunk for chunk in before.chunks if chunk.samples)}
    chunks = plan.chunks
    slices = tuple(
        SequenceSlice(row, 1, chunk.start, np.array(chunk.blocks, np.int32)) for row, chunk in enumerate(chunks)
    )
    tokens_T = torch.tensor([chosen(place[chunk.request]) for chunk in chunks], dtype=torch.int64)
    positions_T = torch.tensor([chunk.start for chunk in chunks], dtype=torch.int64)
    samples = tuple((chunk.request, row) for row, chunk in enumerate(chunks))
    return StepBatch(ForwardBatch(tokens_T, positions_T, slices), samples, (), later=1)


def chosen(place: int) -> int:
    """What stands for a token that is not known yet: the one that the batch before chose for its sample `place`."""
    return -1 - place


def _prompt_rows(chunk: Chunk, row: int) -> list[PromptRows]:
    """The rows of a chunk that tell of prompt tokens not told yet: position p tells of the token at p + 1."""
    known = len(chunk.request.prompt_logprobs)
    first = max(chunk.start, known)
    count = min(chunk.start + chunk.length, chunk.request.prompt_length - 1) - first
    return [PromptRows(chunk.request, row + first - chunk.start, first + 1, count)] if count > 0 else []
