"""The expert slots of one rank: plain bytes in shared memory, that peers can read when they must restore an expert.

A slot holds one expert of one layer, contiguous: w13 [2F, D] (the gate's rows, then the up projection's), then
w2 [D, F], then with fp8 their scales (`moe.layout`). Which expert stands in which slot is data (`held_LS`), so a
re-placement only copies bytes.

Shape suffixes: L MoE layers, S slots a rank, F expert width, D model width, M rows, N tokens.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor
from typing_extensions import Buffer

from phalanx.errors import PhalanxError
from phalanx.moe.blocks import BlockSwiGlu, BlockWeights
from phalanx.moe.layout import ExpertFormat, ExpertLayout
from phalanx.moe.linear import Products, SwiGlu
from phalanx.pages import FilePart, MemoryFile

Bytes = npt.NDArray[np.uint8]
ExpertWeights = tuple[Tensor, ...]
"""(w13 [2F, D], w2 [D, F]), in e4m3 followed by the scales of both, as in `BlockWeights`."""

Expert = SwiGlu | BlockSwiGlu

_MAGIC = b"PHXSLOTS"
_HEADER = struct.Struct("=8s16s")
_PAGE = mmap.PAGESIZE
_EMPTY = -1
_PATH = re.compile(r"/proc/[0-9]+/fd/[0-9]+")


class StaleAddress(PhalanxError):
    """An address no longer leads to the slots it was made for: their owner is gone."""


class BorrowedSlot(PhalanxError):
    """A slot's owner computes from bytes that lie elsewhere: there is nothing to read in the slot."""


def digest(data: Buffer) -> int:
    """What an expert's bytes are known by: xxh3_64, below 2**64. LOCAL."""
    return xxhash.xxh3_64_intdigest(data)


class RunningDigest:
    """The digest of bytes that come in parts: each is taken in while it is still in the processor's cache."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, part: Bytes) -> None:
        """The next bytes. LOCAL."""
        self._state.update(part.data)

    @property
    def value(self) -> int:
        """`digest` of all bytes so far."""
        return self._state.intdigest()


class SlotBank:
    """L x S expert slots in one sparse memory file, of which only filled slots take memory.

    Only this process writes. Peers map the file read-only by `address` (`PeerBank`); they check what they copied by its
    digest, so a slot may be overwritten under a reader.

    A slot may also borrow: its expert is computed from bytes that lie in other memory (the vault's), and the slot takes
    none. Peers are told so (a byte a slot, after the header) and read that expert where the owner does.
    """

    def __init__(
        self, num_layers: int, slots_per_rank: int, hidden: int, expert_width: int, dtype: torch.dtype,
        expert_format: ExpertFormat = "plain",
    ) -> None:  # fmt: skip
        """dtype: what experts compute in, and what the weights of plain ones are."""
        self.num_layers, self.slots_per_rank = num_layers, slots_per_rank
        self.hidden, self.expert_width, self.dtype = hidden, expert_width, dtype
        self.layout = ExpertLayout(hidden, expert_width, dtype.itemsize, expert_format)
        self.expert_bytes = self.layout.total_bytes
        self._stride = -(-self.expert_bytes // _PAGE) * _PAGE  # whole pages, so that clearing gives memory back
        token = os.urandom(16)
        self._start = _slots_start(num_layers, slots_per_rank)
        size = self._start + num_layers * slots_per_rank * self._stride
        self._file = MemoryFile("phalanx-slots", size)
        self._map = mmap.mmap(self._file.fd, size)
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, token)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._borrowed_LS = _borrowed(self._bytes, num_layers, slots_per_rank)
        self._held_LS = np.full((num_layers, slots_per_rank), _EMPTY, np.int32)
        self._digest_LS = np.zeros((num_layers, slots_per_rank), np.uint64)
        self._weights: dict[tuple[int, int], ExpertWeights] = {}
        self._experts: dict[tuple[int, int], Expert] = {}
        self._packed: set[tuple[int, int]] = set()
        self.products = Products.usual(dtype)
        """How the experts are computed; the model sets it after its check, before the first step."""
        self.address = ":".join(
            str(part)
            for part in (
                f"/proc/{os.getpid()}/fd/{self._file.fd}", num_layers, slots_per_rank, self.expert_bytes, token.hex(),
            )
        )  # fmt: skip
        """Where peers find the slots: path, L, S, bytes an expert, and a token that tells a reused pid apart."""

    @property
    def held_LS(self) -> npt.NDArray[np.int32]:
        """int32 [L, S]: the expert each slot holds, -1 for none. A copy. LOCAL."""
        return self._held_LS.copy()

    @property
    def digest_LS(self) -> npt.NDArray[np.uint64]:
        """uint64 [L, S]: the digest of what each slot holds, 0 for none. A copy. LOCAL."""
        return self._digest_LS.copy()

    def slot_bytes(self, layer: int, slot: int) -> Bytes:
        """uint8 [expert_bytes], writable: fill it, then `mark` it. LOCAL."""
        data = self._slot(layer, slot)
        self._unpack(layer, slot)
        self._give_back(layer, slot)
        return data

    def slot_file(self, layer: int, slot: int) -> FilePart | None:
        """The same bytes as a part of a memory file, to be filled with fewer page faults; None: it is none. LOCAL."""
        return FilePart(self._file, _start(self, layer, slot, self._stride))

    def _slot(self, layer: int, slot: int) -> Bytes:
        start = _start(self, layer, slot, self._stride)
        return self._bytes[start : start + self.expert_bytes]

    def weights(self, layer: int, slot: int) -> ExpertWeights:
        """What a slot computes with, as tensors at a fixed address as long as it does not borrow. LOCAL."""
        found = self._weights.get((layer, slot))
        if found is None:
            found = self._weights[layer, slot] = self._views(self._slot(layer, slot))
        return found

    def _views(self, data: Bytes) -> ExpertWeights:
        if self.layout.format == "fp8":
            blocks = BlockWeights.of(torch.from_numpy(data), self.layout)
            return blocks.w13, blocks.w2, blocks.scales13, blocks.scales2
        flat = torch.from_numpy(data).view(self.dtype)
        middle = 2 * self.expert_width * self.hidden
        w13 = flat[:middle].view(2 * self.expert_width, self.hidden)
        return w13, flat[middle:].view(self.hidden, self.expert_width)

    def expert(self, layer: int, slot: int) -> Expert:
        """The slot's expert, to be called: [N, D] -> [N, D]. LOCAL."""
        key = layer, slot
        if key not in self._experts:
            self._experts[key] = self._made(self.weights(layer, slot), packed=False)
        return self._experts[key]

    def _made(self, weights: ExpertWeights, *, packed: bool) -> Expert:
        if self.layout.format == "fp8":
            return BlockSwiGlu(BlockWeights(*weights), self.products, self.dtype)
        w13, w2 = weights
        return SwiGlu(w13, w2, self.products, packed=packed)

    def pack(self, limit: int | None = None) -> int:
        """Give up to `limit` experts (None: all) that lack it a packed copy of their weights: twice the memory, half
        the time for few rows, the same bits. How many it did; 0 also where packing is of no use. LOCAL.

        A restored expert computes from its plain bytes until its turn comes, so that a recovery need not wait."""
        if not self.products.packed or self.layout.format == "fp8":
            return 0
        held = zip(*(index.tolist() for index in np.nonzero(self._held_LS != _EMPTY)), strict=True)
        due = [key for key in held if key not in self._packed][:limit]
        for key in due:
            self._experts[key] = self._made(self.weights(*key), packed=True)
            self._packed.add(key)
        return len(due)

    def _unpack(self, layer: int, slot: int) -> None:
        if (layer, slot) in self._packed:
            self._packed.discard((layer, slot))
            del self._experts[layer, slot]

    def mark(self, layer: int, slot: int, expert: int, digest: int) -> None:
        """Say that the slot's bytes are those of `expert`. LOCAL."""
        self._unpack(layer, slot)
        self._held_LS[layer, slot] = expert
        self._digest_LS[layer, slot] = digest

    def borrow(self, layer: int, slot: int, expert: int, digest: int, data: Bytes) -> None:
        """The slot, which is clear, holds `expert`, whose bytes are `data`, uint8 [expert_bytes], where they lie; they
        must stay as they are for as long as the slot is not cleared. Copies nothing. LOCAL."""
        assert data.nbytes == self.expert_bytes, (data.nbytes, self.expert_bytes)
        self._unpack(layer, slot)
        self._weights[layer, slot] = self._views(data)
        self._experts.pop((layer, slot), None)
        self._borrowed_LS[layer, slot] = 1
        self.mark(layer, slot, expert, digest)

    def settle(self) -> None:
        """Wait until what was marked or borrowed stands where it is computed from: it does at once. LOCAL."""

    def _give_back(self, layer: int, slot: int) -> None:
        if self._borrowed_LS[layer, slot]:
            self._borrowed_LS[layer, slot] = 0
            self._weights.pop((layer, slot), None)
            self._experts.pop((layer, slot), None)

    def clear(self, layer: int, slot: int) -> None:
        """The slot holds nothing from now on, and its memory goes back to the system. LOCAL."""
        self._unpack(layer, slot)
        self._give_back(layer, slot)
        self._held_LS[layer, slot] = _EMPTY
        self._digest_LS[layer, slot] = 0
        self._map.madvise(mmap.MADV_REMOVE, _start(self, layer, slot, self._stride), self._stride)

    def close(self) -> None:
        """Give the memory back once nobody maps it any more. LOCAL."""
        self._weights.clear()
        self._experts.clear()
        del self._bytes, self._borrowed_LS, self._file
        _unmap(self._map)


@dataclass(frozen=True)
class SlotLayout:
    """How a rank's memory file of slots is laid out, for whoever reads it from afar. Bytes."""

    num_layers: int
    slots_per_rank: int
    expert_bytes: int

    @classmethod
    def at(cls, address: str) -> SlotLayout:
        """The layout of what is behind `SlotBank.address`. Raises StaleAddress for anything else. LOCAL."""
        try:
            _, layers, slots, expert_bytes, _ = address.rsplit(":", 4)
            return cls(int(layers), int(slots), int(expert_bytes))
        except ValueError:
            raise StaleAddress(f"{address!r} is no address of expert slots") from None

    @property
    def borrowed_start(self) -> int:
        """Where a byte a slot says, by layer and slot, whether it borrows what it holds."""
        return _PAGE

    @property
    def borrowed_bytes(self) -> int:
        return self.num_layers * self.slots_per_rank

    def slot_start(self, layer: int, slot: int) -> int:
        """Where a slot's bytes begin. LOCAL."""
        assert 0 <= layer < self.num_layers, layer
        assert 0 <= slot < self.slots_per_rank, slot
        stride = -(-self.expert_bytes // _PAGE) * _PAGE
        return _slots_start(self.num_layers, self.slots_per_rank) + (layer * self.slots_per_rank + slot) * stride


class PeerBank:
    """Another rank's slots, read-only. It stays readable after its owner died, as long as it is mapped."""

    def __init__(self, memory: mmap.mmap, num_layers: int, slots_per_rank: int, expert_bytes: int) -> None:
        self.num_layers, self.slots_per_rank, self.expert_bytes = num_layers, slots_per_rank, expert_bytes
        self._stride = -(-expert_bytes // _PAGE) * _PAGE
        self._map = memory
        self._start = _slots_start(num_layers, slots_per_rank)
        self._bytes = np.frombuffer(memory, np.uint8)
        self._borrowed_LS = _borrowed(self._bytes, num_layers, slots_per_rank)

    @classmethod
    def open(cls, address: str) -> PeerBank:
        """Map the slots behind `SlotBank.address`. Raises StaleAddress when their owner is gone. LOCAL."""
        layout = SlotLayout.at(address)
        fd = cls.file(address)
        try:
            memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StaleAddress(f"{address} leads to something that cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        return cls(memory, layout.num_layers, layout.slots_per_rank, layout.expert_bytes)

    @classmethod
    def file(cls, address: str) -> int:
        """A descriptor, read-only, of the memory file behind `SlotBank.address`, for the caller to close. Raises
        StaleAddress. LOCAL."""
        path, token = _path_and_token(address)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise StaleAddress(f"{path}: {error.strerror}") from error
        try:
            if os.pread(fd, _HEADER.size, 0) == _HEADER.pack(_MAGIC, token):
                return fd
            reason = "another process's memory"
        except OSError as error:
            reason = f"something that cannot be mapped: {error}"
        os.close(fd)
        raise StaleAddress(f"{path} leads to {reason}")

    def slot_bytes(self, layer: int, slot: int) -> Bytes:
        """uint8 [expert_bytes], read-only. Raises BorrowedSlot when the owner's bytes lie elsewhere. LOCAL."""
        start = _start(self, layer, slot, self._stride)
        if self._borrowed_LS[layer, slot]:
            raise BorrowedSlot(f"slot {slot} of layer {layer} borrows its bytes")
        return self._bytes[start : start + self.expert_bytes]

    def close(self) -> None:
        """Unmap. LOCAL."""
        del self._bytes, self._borrowed_LS
        _unmap(self._map)


def _path_and_token(address: str) -> tuple[str, bytes]:
    """Where the memory file of an address is, in /proc and nowhere else, and how it begins."""
    path, *_, token = address.rsplit(":", 4)
    if not _PATH.fullmatch(path):
        raise StaleAddress(f"{address!r} is no address of expert slots")
    try:
        return path, bytes.fromhex(token)
    except ValueError:
        raise StaleAddress(f"{address!r} is no address of expert slots") from None


def _start(bank: SlotBank | PeerBank, layer: int, slot: int, stride: int) -> int:
    assert 0 <= layer < bank.num_layers, layer
    assert 0 <= slot < bank.slots_per_rank, slot
    return bank._start + (layer * bank.slots_per_rank + slot) * stride


def _slots_start(num_layers: int, slots_per_rank: int) -> int:
    return _PAGE + -(-num_layers * slots_per_rank // _PAGE) * _PAGE


def _borrowed(data: Bytes, num_layers: int, slots_per_rank: int) -> Bytes:
    """uint8 [L, S], 1 where a slot borrows, as both sides see it."""
    return data[_PAGE : _PAGE + num_layers * slots_per_rank].reshape(num_layers, slots_per_rank)


def _unmap(memory: mmap.mmap) -> None:
    with suppress(BufferError):  # someone still holds a view of it: the last view's end unmaps it
        memory.close()
