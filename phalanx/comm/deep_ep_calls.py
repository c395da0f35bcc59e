"""What passes between a DeepEP-like buffer and its caller, beside tensors: events, hooks, handles, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from phalanx.comm.base import Communicator
from phalanx.comm.deep_ep_layout import GROUP
from phalanx.errors import BadConfig, BadRequest

Hook = Callable[[], None]


class EventOverlap:
    """When a call's work is done, for streams: DeepEP's object of this name. Without a device it is done already."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self.event = event

    @classmethod
    def of(cls, device: torch.device, wanted: bool) -> EventOverlap:
        """Everything that the current stream was given so far, or nothing when it is not wanted."""
        if device.type != "cuda" or not wanted:
            return cls()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(event)

    def current_stream_wait(self) -> None:
        """Have torch's current stream wait. The host does not."""
        if self.event is not None:
            self.event.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.current_stream_wait()


@dataclass(eq=False)
class Sent:
    """What a combine needs of its dispatch, complete once that has come to an end."""

    communicator: Communicator
    tokens: int
    top_k: int
    came: object | None = None


class Handle(tuple[Any, ...]):
    """What a dispatch gives to its combine: DeepEP's five values, (src_info int32 [S, C]: each row's token at its
    source; layout_range int64 [S, R]; num_max_dispatch_tokens_per_rank; D; num_experts), and beside them `sent`."""

    sent: Sent

    @classmethod
    def of(
        cls, src_info: Tensor, layout_range: Tensor, num_max: int, hidden: int, num_experts: int, sent: Sent
    ) -> Handle:
        handle = cls((src_info, layout_range, num_max, hidden, num_experts))
        handle.sent = sent
        return handle


def check_ways(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise BadConfig("async_finish, return_recv_hook: a call ends by an event or by a hook; ask for one of them")


def check(
    name: str, tensor: object, shape: tuple[int, ...], *kinds: torch.dtype, device: torch.device | None = None
) -> None:
    """Raises BadRequest when an argument is no tensor of this shape, of one of these types and on such a device (None:
    on any)."""
    if not isinstance(tensor, Tensor):
        raise BadRequest(f"{name}: a tensor is wanted, not {type(tensor).__name__}", name)
    if tuple(tensor.shape) != shape or tensor.dtype not in kinds:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise BadRequest(f"{name}: {wanted} {list(shape)} is wanted, not {got}", name)
    if device is not None and tensor.device.type != device.type:
        raise BadRequest(f"{name}: it is on {tensor.device}, where {device} is wanted", name)


def check_count(name: str, value: object) -> None:
    """Raises BadRequest for what is no whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise BadRequest(f"{name}: a whole number from 1 on is wanted, not {value!r}", name)


def check_handle(handle: object) -> None:
    """Raises BadRequest for what no dispatch gave: the five values alone do not say what the peers sent."""
    if not isinstance(handle, Handle):
        raise BadRequest(f"handle: what a dispatch returned is wanted, not a {type(handle).__name__}", "handle")


def check_tokens(
    x: object, topk_idx: object, num_max: object, num_experts: object, ranks: int, device: torch.device | None
) -> None:
    """What a dispatch is given. Which experts are named is looked at on the host only: a device would be waited for.

    device: where the buffer's tensors are; None when only its communicator knows."""
    check_count("num_max_dispatch_tokens_per_rank", num_max)
    check_count("num_experts", num_experts)
    assert isinstance(num_max, int)
    assert isinstance(num_experts, int)
    if num_experts % ranks:
        raise BadRequest(f"num_experts: {num_experts} do not divide among {ranks} ranks", "num_experts")
    for name, tensor, shape in (("x", x, "[T, D]"), ("topk_idx", topk_idx, "[T, K]")):
        if not isinstance(tensor, Tensor):
            raise BadRequest(f"{name}: a tensor is wanted, not {type(tensor).__name__}", name)
        if tensor.dim() != 2 or not tensor.shape[1]:
            raise BadRequest(f"{name}: {shape} is wanted, not {list(tensor.shape)}", name)
    assert isinstance(x, Tensor)
    assert isinstance(topk_idx, Tensor)
    check("x", x, tuple(x.shape), torch.bfloat16, device=device)
    check("topk_idx", topk_idx, (x.shape[0], topk_idx.shape[1]), torch.int64, torch.int32, device=x.device)
    if x.shape[1] % GROUP:
        raise BadRequest(f"x: a width of {x.shape[1]} is no multiple of {GROUP}", "x")
    if x.shape[0] > num_max:
        raise BadRequest(f"x: {x.shape[0]} tokens are more than num_max_dispatch_tokens_per_rank={num_max}", "x")
    if topk_idx.device.type == "cpu" and topk_idx.numel() and int(topk_idx.max()) >= num_experts:
        raise BadRequest(f"topk_idx: expert {int(topk_idx.max())} of {num_experts}", "topk_idx")
