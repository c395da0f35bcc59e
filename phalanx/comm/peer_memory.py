"""Device memory that peers write: one exported buffer a (rank, incarnation), mapped by CUDA IPC.

The handle travels as text through our own control plane (a rank's host segment, see `comm.cuda`), never through a torch
process group: such a group dies with a member. A mapping stays valid when its owner is killed (measured on H200: stores
are harmless, loads return stale data), so a dead peer is masked at once and unmapped later, when no kernel that might
use it is running.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.errors import PhalanxError

GATHER_WORDS = 64
"""The longest row of an all_gather, in int64."""

_LINE = 128

ROW_UNIT = 8
"""Values of a row that are moved at a time, 16 bytes of them in bf16."""

ROW_BITS = 22
"""What of a word (`comm.pull_kernels`) says in which row of y a result stands."""


class PeerMemoryError(PhalanxError):
    """Device memory could not be exported or mapped; the message says which call failed and why."""


@dataclass(frozen=True)
class BufferLayout:
    """Where everything lies in an exported buffer, in bytes from its start; the same for all ranks of a service.

    T = max_tokens a rank, D = hidden, K = top_k, R = ep_size, b = bytes a value of x takes on the wire. Two buffers of
    everything that is received, because a peer may be one collective of a kind ahead:

        x           2 * R * T * D * b          (+ 2 * R * T * D / 128 * 4 for the scales of fp8)
        results     2 * K * T * D * 2          (a row per (token, k))
        y           R * T * K * D * 2          (if `in_place`: our experts' results, for peers to read)
        words       2 * R * T * K * 8          (if `in_place`: where the peers' stand in their y)
        sums        2 * R * T * D / 60 * 128   (under `fast` only: a row per (rank, token), in lines)
        slot lists  2 * R * T * K * 8          (int32 slot, float32 weight)
        flags       8 * R words a program, and a few lines of counters

    2 ranks, T = 128, D = 7168, K = 8, fp8: 62.6 MB, under `fast` 41.1. It grows with T, in a service
    `--max-num-batched-tokens`.
    """

    ep_size: int
    max_tokens: int
    hidden: int
    top_k: int
    x_itemsize: int
    result_itemsize: int
    dispatch_programs: int
    combine_programs: int
    fast: bool

    def __post_init__(self) -> None:
        assert min(self.ep_size, self.max_tokens, self.hidden, self.top_k) >= 1, self
        assert self.hidden % ROW_UNIT == 0, f"hidden {self.hidden} is no multiple of {ROW_UNIT}"
        assert self.x_itemsize != 1 or self.hidden % 128 == 0, f"fp8 needs groups of 128 channels, hidden {self.hidden}"

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Start of each part, and `end`."""
        R, T, D, K = self.ep_size, self.max_tokens, self.hidden, self.top_k
        sizes = {
            "cut": 8 * R,
            "opened": 8 * R,
            "begun": 8 * R,
            "meta_flag": 8 * R,
            "row_flag": 8 * R,
            "ready": 8 * R,
            "data_flag": 8 * R * self.dispatch_programs,
            "result_flag": 8 * R * self.combine_programs,
            "count": 2 * 8 * R,
            "row": 2 * 8 * R * GATHER_WORDS,
            "meta": 2 * 4 * R * T * K,
            "weights": 2 * 4 * R * T * K,
            "words": 2 * 8 * R * T * K if self.in_place else 0,
            "scales": 2 * 4 * R * T * (D // 128) if self.x_itemsize == 1 else 0,
            "x": 2 * R * T * D * self.x_itemsize,
            "results": 2 * K * T * D * self.result_itemsize,
            "y": self.pairs * D * self.result_itemsize if self.in_place else 0,
            "sums": 2 * R * T * lines(D, self.result_itemsize) * _LINE if self.fast else 0,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // _LINE) * _LINE
        offsets["end"] = at
        return offsets

    @property
    def pairs(self) -> int:
        """The most (token, k) that a rank's slots may be asked for: all of all ranks."""
        return self.ep_size * self.max_tokens * self.top_k

    @property
    def in_place(self) -> bool:
        """Whether peers read results where they stand (`comm.pull_kernels`): under `exact`, unless there can be more of
        them than a word can name."""
        return not self.fast and self.pairs <= 1 << ROW_BITS

    @property
    def nbytes(self) -> int:
        return self.offsets["end"]


def lines(hidden: int, itemsize: int) -> int:
    """How many lines a row of sums fills: 120 bytes of it each, and a word that numbers the collective. LOCAL."""
    return -(-hidden * itemsize // (_LINE - 8))


class PeerMemory(ABC):
    """One exported buffer and the mappings of the peers' buffers. LOCAL throughout."""

    buffer: Tensor
    """uint8 [nbytes], zeroed, at a fixed address: ours, written by the peers."""

    @abstractmethod
    def handle(self) -> str:
        """How a peer maps our buffer: text, at most 1 KB."""

    @abstractmethod
    def open(self, handle: str) -> int:
        """Map a peer's buffer. Returns its address on our device. Raises PeerMemoryError. From any thread."""

    @abstractmethod
    def unmap(self, pointer: int) -> None:
        """Unmap a peer's buffer. No kernel that was given its address may still run."""

    @abstractmethod
    def host_words(self, count: int) -> Tensor:
        """int64 [count] of host memory, zeroed, that a running kernel can read at the tensor's own address."""

    @abstractmethod
    def map_readonly(self, words: npt.NDArray[np.int64]) -> int | None:
        """The device's address for host words that another process writes. None when this machine cannot map them."""

    @abstractmethod
    def mark(self) -> Any:
        """A mark in our stream of kernels, for `passed`."""

    @abstractmethod
    def passed(self, mark: Any) -> bool:
        """Whether every kernel launched before `mark` has ended. Does not wait."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[Any]:
        """Kernels launched within run beside those of the stream, which may be spinning."""

    @abstractmethod
    def wait(self) -> None:
        """Until every kernel of ours has ended (each does within its time-out)."""

    @abstractmethod
    def close(self) -> None:
        """Free our buffer and forget host mappings. Peers' mappings must be unmapped before."""


class CudaIpcMemory(PeerMemory):
    """CUDA IPC (cudaIpcGetMemHandle): peers are processes of this host that see this device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime
        self._device = device
        torch.cuda.set_device(device)
        torch.cuda.current_stream()  # torch's context first: cuda-bindings then uses the same one
        self._pointer = int(self._checked("cudaMalloc", runtime.cudaMalloc(nbytes)))
        self._checked("cudaMemset", runtime.cudaMemset(self._pointer, 0, nbytes))
        torch.cuda.synchronize(device)
        self.buffer = _as_tensor(self._pointer, nbytes, device)
        self._registered: list[int] = []
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def handle(self) -> str:
        handle = self._checked("cudaIpcGetMemHandle", self._cuda.cudaIpcGetMemHandle(self._pointer))
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        return json.dumps({"kind": "cuda-ipc", "device": uuid, "handle": bytes(handle.reserved).hex()})

    def open(self, handle: str) -> int:
        said = json.loads(handle)
        if said.get("kind") != "cuda-ipc":
            raise PeerMemoryError(f"a peer exports its memory as {said.get('kind')!r}, this rank reads cuda-ipc only")
        ipc = self._cuda.cudaIpcMemHandle_t()
        ipc.reserved = bytes.fromhex(said["handle"])
        self._checked("cudaSetDevice", self._cuda.cudaSetDevice(self._device.index))  # each thread has its own
        flags = self._cuda.cudaIpcMemLazyEnablePeerAccess
        return int(self._checked("cudaIpcOpenMemHandle", self._cuda.cudaIpcOpenMemHandle(ipc, flags)))

    def unmap(self, pointer: int) -> None:
        self._checked("cudaIpcCloseMemHandle", self._cuda.cudaIpcCloseMemHandle(pointer))

    def host_words(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, pin_memory=True)

    def map_readonly(self, words: npt.NDArray[np.int64]) -> int | None:
        at = words.ctypes.data
        page = at & ~4095
        size = -(-(at + words.strides[0] * words.size - page) // 4096) * 4096
        mapped = self._cuda.cudaHostRegisterMapped
        for flags in (mapped | self._cuda.cudaHostRegisterReadOnly, mapped):
            (error,) = self._cuda.cudaHostRegister(page, size, flags)
            if error == self._cuda.cudaError_t.cudaSuccess:
                self._registered.append(page)
                base = self._checked("cudaHostGetDevicePointer", self._cuda.cudaHostGetDevicePointer(page, 0))
                return int(base) + at - page
            self._cuda.cudaGetLastError()  # a refused registration must not surface in somebody else's check
        return None

    def mark(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return bool(mark.query())

    def aside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        for page in self._registered:
            self._checked("cudaHostUnregister", self._cuda.cudaHostUnregister(page))
        self._registered.clear()
        self.buffer = torch.empty(0, dtype=torch.uint8)
        if self._pointer:
            self._checked("cudaFree", self._cuda.cudaFree(self._pointer))
        self._pointer = 0

    def _checked(self, call: str, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise PeerMemoryError(f"{call} failed on {self._device}: {error.name}")
        return values[0] if values else None


class _Exposed:
    """What torch needs to see raw device memory as a tensor."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 3, "strides": None,
        }  # fmt: skip


def _as_tensor(pointer: int, nbytes: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Exposed(pointer, nbytes), device=device)
