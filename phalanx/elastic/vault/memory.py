"""The vault: the model's weights in host memory, so that no recovery reads from disk. A host alone holds all of them;
of several each holds the dense weights and its share of the experts (`elastic.vault.shares`).

It is one memory file. The launcher makes it and holds it, without ever mapping its contents; a process of its own (the
keeper, `vault.keeper`) fills it; workers map it read-only. So it outlives every worker, and the keeper too: one that
is killed loses nothing but the expert it was writing.

    header      magic, token, sizes, counters              one page
    index       for each (layer, expert): state, digest    uint64 [L, E, 2]
    table       where each dense tensor lies, MessagePack
    dense       dense weights, each on a cache line
    experts     those of the share, by layer and number, in slot layout and run dtype, each on pages of its own

An entry's state is written after its bytes and its digest: what the index calls filled is whole. A reader checks the
digest nevertheless, each time. Pages that nothing was written to take no memory. No torch here, but in `dense_weights`.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from phalanx.comm.segment import memory_fence
from phalanx.elastic.vault.shares import EVERYTHING, Share
from phalanx.errors import PhalanxError
from phalanx.pages import bring_within_reach

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

log = logging.getLogger("phalanx.elastic")

NAME = "phalanx-vault"
"""The memory file's name, as /proc shows it."""

EMPTY, FILLED = 0, 1

_MAGIC = int.from_bytes(b"PHXVAULT", "little")
_PAGE = mmap.PAGESIZE
_LINE = 64
_MAP_NORESERVE = 0x4000  # Linux; Python 3.11 has no name for it
_TOKEN_WORDS = 2
_FIELDS = 4
_FILLED_WORD, _DENSE_WORD, _FULL_WORD, _TABLE_WORD = (1 + _TOKEN_WORDS + _FIELDS + i for i in range(4))
_MORE_FIELDS = 4
_WORDS = _TABLE_WORD + 1 + _MORE_FIELDS
_TABLE_BYTES_A_TENSOR = 160


class VaultGone(PhalanxError):
    """An address leads to no vault, or to another one: its launcher is gone."""


@dataclass(frozen=True)
class VaultShape:
    """L, E, bytes of an expert, bytes of all dense tensors together with how many they are at most, and which of the
    L x E experts have a place."""

    num_layers: int
    num_experts: int
    expert_bytes: int
    dense_bytes: int
    dense_tensors: int
    share: Share = EVERYTHING

    @cached_property
    def share_LE(self) -> npt.NDArray[np.bool_]:
        """bool [L, E]: the experts that have a place."""
        mask = self.share.mask_LE(self.num_layers, self.num_experts)
        mask.flags.writeable = False
        return mask

    @cached_property
    def share_count(self) -> int:
        """How many experts have a place, in all layers."""
        return int(self.share_LE.sum())

    @cached_property
    def _place_LE(self) -> npt.NDArray[np.int64]:
        return np.cumsum(self.share_LE).reshape(self.share_LE.shape) - 1

    @property
    def stride(self) -> int:
        """From one expert to the next."""
        return _up(self.expert_bytes, _PAGE)

    @property
    def index_start(self) -> int:
        return _PAGE

    @property
    def index_bytes(self) -> int:
        return self.num_layers * self.num_experts * 16

    @property
    def table_start(self) -> int:
        return self.index_start + _up(self.index_bytes, _PAGE)

    @property
    def dense_start(self) -> int:
        return self.table_start + _up(self.dense_tensors * _TABLE_BYTES_A_TENSOR, _PAGE)

    @property
    def experts_start(self) -> int:
        return self.dense_start + _up(self.dense_bytes + self.dense_tensors * _LINE, _PAGE)

    @property
    def total_bytes(self) -> int:
        """The file's length: what the vault takes when it is full."""
        return self.experts_start + self.share_count * self.stride

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights when it is full."""
        return self.dense_bytes + self.share_count * self.expert_bytes

    def expert_start(self, layer: int, expert: int) -> int:
        """Where an expert's bytes begin, which must be one of the share. LOCAL."""
        assert 0 <= layer < self.num_layers, layer
        assert 0 <= expert < self.num_experts, expert
        assert self.share_LE[layer, expert], f"layer {layer} expert {expert} has no place in {self.share}"
        return self.experts_start + int(self._place_LE[layer, expert]) * self.stride


class DenseTensor(msgspec.Struct, frozen=True, array_like=True):
    """One dense tensor in the vault: its name, element type, shape, first byte in the file, and digest."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    digest: int


class VaultMemory:
    """The launcher's hold on the vault: makes the file, and names it to others. Never touches the contents."""

    def __init__(self, shape: VaultShape) -> None:
        self.shape = shape
        self._fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, shape.total_bytes)
        token = os.urandom(8 * _TOKEN_WORDS)
        header = np.array(
            [_MAGIC, *np.frombuffer(token, np.uint64), shape.num_layers, shape.num_experts, shape.expert_bytes,
             shape.dense_bytes, 0, 0, 0, 0, shape.dense_tensors, shape.share.node_rank, shape.share.nnodes,
             shape.share.copies], np.uint64,
        )  # fmt: skip
        os.pwrite(self._fd, header.tobytes(), 0)
        # Nobody can cut it short under a reader, which would then die of SIGBUS.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.address = f"/proc/{os.getpid()}/fd/{self._fd}:{token.hex()}"
        """Where others find it: path, and a token that tells a reused pid apart."""

    @property
    def progress(self) -> tuple[int, int]:
        """(entries filled so far, how often it was found full): it grows while keepers get on. LOCAL."""
        words = np.frombuffer(os.pread(self._fd, 8 * (_TABLE_WORD + 1), 0), np.uint64)
        return int(words[_FILLED_WORD] + words[_DENSE_WORD]), int(words[_FULL_WORD])

    @property
    def filled_bytes(self) -> int:
        """Bytes of weights that are there. LOCAL."""
        shape = self.shape
        words = np.frombuffer(os.pread(self._fd, 8 * (_DENSE_WORD + 1), 0), np.uint64)
        index = np.frombuffer(os.pread(self._fd, shape.index_bytes, shape.index_start), np.uint64)
        return int((index[::2] == FILLED).sum()) * shape.expert_bytes + shape.dense_bytes * int(words[_DENSE_WORD])

    def close(self) -> None:
        """Let go of it: the memory is free when the last reader has unmapped it. LOCAL."""
        os.close(self._fd)


class Vault:
    """A mapping of the vault: `open` for readers, `open_for_writing` for the keeper, of whom there is one at a time."""

    def __init__(self, memory: mmap.mmap, shape: VaultShape, fd: int) -> None:
        """Use `open` or `open_for_writing`."""
        self.shape = shape
        self._map, self._fd = memory, fd
        self._bytes = np.frombuffer(memory, np.uint8)
        self._header = np.frombuffer(memory, np.uint64, _PAGE // 8)
        count = shape.num_layers * shape.num_experts * 2
        index = np.frombuffer(memory, np.uint64, count, shape.index_start)
        self._index_LE2 = index.reshape(shape.num_layers, shape.num_experts, 2)
        self._fence = memory_fence()

    @classmethod
    def open(cls, address: str) -> Vault:
        """Map it for reading. Private pages, so that torch takes them for writable; nobody writes. Raises VaultGone."""
        return cls._open(address, os.O_RDONLY, mmap.MAP_PRIVATE | _MAP_NORESERVE)

    @classmethod
    def open_for_device(cls, address: str) -> Vault:
        """Map it for reading by a device, too. Shared pages: when a device's memory is to be filled from private ones,
        the system may first make a copy of each, for who knows who will write to it. Raises VaultGone."""
        return cls._open(address, os.O_RDONLY, mmap.MAP_SHARED | _MAP_NORESERVE, mmap.PROT_READ)

    @classmethod
    def open_for_writing(cls, address: str) -> Vault:
        """Map it to fill it. Raises VaultGone."""
        return cls._open(address, os.O_RDWR, mmap.MAP_SHARED)

    @classmethod
    def _open(cls, address: str, mode: int, flags: int, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> Vault:
        path, token = address.rsplit(":", 1)
        try:
            fd = os.open(path, mode | os.O_CLOEXEC)
        except OSError as error:
            raise VaultGone(f"{path}: {error.strerror}") from error
        try:
            words = np.frombuffer(os.pread(fd, 8 * _WORDS, 0), np.uint64).tolist()
            expected = [_MAGIC, *np.frombuffer(bytes.fromhex(token), np.uint64).tolist()]
            if words[: 1 + _TOKEN_WORDS] != expected:
                raise VaultGone(f"{path} leads to something else")
            first = 1 + _TOKEN_WORDS
            layers, experts, expert_bytes, dense_bytes = words[first : first + _FIELDS]
            dense_tensors, *share = words[_TABLE_WORD + 1 : _WORDS]
            shape = VaultShape(layers, experts, expert_bytes, dense_bytes, dense_tensors, Share(*share))
            memory = mmap.mmap(fd, shape.total_bytes, flags=flags, prot=access)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise VaultGone(f"{path} leads to something that cannot be mapped: {error}") from error
        except VaultGone:
            os.close(fd)
            raise
        return cls(memory, shape, fd)

    # --- reading

    def expert(self, layer: int, expert: int) -> tuple[Bytes, int] | None:
        """An expert's bytes, uint8 [expert_bytes], where they lie, and the digest they should have; None when it is
        not there (yet). The mapping stays for as long as the bytes are used. LOCAL."""
        if self._index_LE2[layer, expert, 0] != FILLED:
            return None
        self._fence()
        return self.expert_bytes(layer, expert), int(self._index_LE2[layer, expert, 1])

    def expert_bytes(self, layer: int, expert: int) -> Bytes:
        """uint8 [expert_bytes] where an expert's bytes belong, whether they are there or not. LOCAL."""
        start = self.shape.expert_start(layer, expert)
        return self._bytes[start : start + self.shape.expert_bytes]

    @property
    def filled_LE(self) -> npt.NDArray[np.bool_]:
        """bool [L, E]: which experts are there. A copy. LOCAL."""
        return np.asarray(self._index_LE2[:, :, 0] == FILLED)

    @property
    def missing_LE(self) -> npt.NDArray[np.bool_]:
        """bool [L, E]: which experts of the share are not there. A copy. LOCAL."""
        return np.asarray(self.shape.share_LE & (self._index_LE2[:, :, 0] != FILLED))

    @property
    def has_dense(self) -> bool:
        """Whether the dense weights are there. LOCAL."""
        return bool(self._header[_DENSE_WORD])

    @property
    def is_full(self) -> bool:
        """Whether everything is there. LOCAL."""
        return self.has_dense and not self.missing_LE.any()

    @property
    def filled_bytes(self) -> int:
        """Bytes of weights that are there. LOCAL."""
        dense = sum(tensor.size for tensor in self.dense_table()) if self.has_dense else 0
        return dense + int((self._index_LE2[:, :, 0] == FILLED).sum()) * self.shape.expert_bytes

    def dense_table(self) -> list[DenseTensor]:
        """The dense tensors that are there; none as long as they are not complete. LOCAL."""
        if not self.has_dense:
            return []
        self._fence()
        size, start = int(self._header[_TABLE_WORD]), self.shape.table_start
        return msgspec.msgpack.decode(self._bytes[start : start + size].tobytes(), type=list[DenseTensor])

    def dense_bytes(self, tensor: DenseTensor) -> Bytes:
        """uint8 [size]: a dense tensor's bytes, where they lie. LOCAL."""
        return self._bytes[tensor.start : tensor.start + tensor.size]

    def dense_parts(self) -> dict[str, torch.Tensor] | None:
        """Every dense tensor by name, on the vault's own pages; None when they are not there, or one is damaged.
        LOCAL, reads all their bytes once."""
        import torch

        from phalanx.moe.experts import digest

        parts: dict[str, Any] = {}
        for tensor in self.dense_table():
            data = self.dense_bytes(tensor)
            if digest(data.data) != tensor.digest:
                return None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anybody write
                flat = torch.from_numpy(data)
            parts[tensor.name] = flat.view(getattr(torch, tensor.dtype)).view(tensor.shape)
        return parts or None

    def prefault(self, layer: int, expert: int) -> None:
        """Have this process's page table point to an expert that is there, so that the first access costs no fault.
        LOCAL; releases the interpreter."""
        bring_within_reach(self.expert_bytes(layer, expert))

    # --- serving it to other hosts

    @property
    def everything(self) -> Bytes:
        """uint8 [total_bytes]: the whole file, as it is mapped. LOCAL."""
        return self._bytes

    # --- writing, by the keeper alone

    def write(self, start: int, data: Bytes) -> None:
        """Put bytes into the file. By a system call, not through the mapping, which would fault page by page. LOCAL."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:].data, start + done)

    def publish(self, layer: int, expert: int, digest: int) -> None:
        """The expert's bytes are complete: readers may take them. LOCAL."""
        entry = self._index_LE2[layer, expert]
        entry[1] = digest
        self._fence()
        entry[0] = FILLED
        self._header[_FILLED_WORD] += np.uint64(1)

    def withdraw(self, layer: int, expert: int) -> None:
        """The expert is not (any more) to be read. LOCAL."""
        self._index_LE2[layer, expert, 0] = EMPTY
        self._fence()

    def dense_writer(self) -> DenseWriter:
        """Writes the dense tensors, one after the other. LOCAL."""
        return DenseWriter(self)

    def publish_dense(self, table: list[DenseTensor]) -> None:
        """All dense tensors are complete: readers may take them. LOCAL."""
        encoded = np.frombuffer(msgspec.msgpack.encode(table), np.uint8)
        start, room = self.shape.table_start, self.shape.dense_start - self.shape.table_start
        assert len(encoded) <= room, f"the table of {len(table)} dense tensors needs {len(encoded)} of {room} bytes"
        self._bytes[start : start + len(encoded)] = encoded
        self._header[_TABLE_WORD] = len(encoded)
        self._fence()
        self._header[_DENSE_WORD] = 1

    def withdraw_dense(self) -> None:
        """The dense tensors are not (any more) to be read. LOCAL."""
        self._header[_DENSE_WORD] = 0
        self._fence()

    def found_full(self) -> None:
        """Count that everything was seen to be there. LOCAL."""
        self._header[_FULL_WORD] += np.uint64(1)

    def close(self) -> None:
        """Unmap, once the last view of it is gone. LOCAL."""
        del self._bytes, self._header, self._index_LE2
        with suppress(BufferError):  # a tensor still lies in it: its end unmaps it
            self._map.close()
        os.close(self._fd)


class DenseWriter:
    """Puts dense tensors into a vault, in order, and makes the table of them."""

    def __init__(self, vault: Vault) -> None:
        self._vault, self._at = vault, vault.shape.dense_start
        self.table: list[DenseTensor] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Copy one tensor in; the bytes that took. LOCAL."""
        import torch

        from phalanx.moe.experts import digest

        shape = self._vault.shape
        source = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        assert self._at + len(source) <= shape.experts_start, f"{name} is beyond the {shape.dense_bytes} dense bytes"
        entry = DenseTensor(
            name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), self._at, len(source),
            digest(source.data),
        )  # fmt: skip
        self._vault.write(self._at, source)
        self.table.append(entry)
        self._at += _up(len(source), _LINE)
        return len(source)


def address_at(path: str) -> str:
    """The address of the vault whose memory file is at `path`, a place in /proc. LOCAL."""
    with open(path, "rb") as file:
        return f"{path}:{os.pread(file.fileno(), 8 * _TOKEN_WORDS, 8).hex()}"


class Follower(threading.Thread):
    """Has a worker's page table point to what is in the vault, as it fills, at low priority: a restore then finds every
    byte within reach, and page faults, the dearest part of it, are paid outside the failure path."""

    def __init__(
        self, vault: Vault, interval_s: float = 0.2, *, reached: Callable[[Bytes], object] | None = None
    ) -> None:
        """reached: told of the pages of each expert that has come within reach, in this thread; whether a device can
        now read them by itself."""
        super().__init__(name="vault-follower", daemon=True)
        self._vault, self._interval_s, self._reached = vault, interval_s, reached

    def run(self) -> None:
        """Ends when everything is there and within reach."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        shape = self._vault.shape
        seen_LE = ~shape.share_LE
        pinned = 0
        while True:
            new_LE = self._vault.filled_LE & ~seen_LE
            for layer, expert in np.argwhere(new_LE).tolist():
                self._vault.prefault(layer, expert)
                if self._reached is not None:
                    pinned += bool(self._reached(self._vault.expert_bytes(layer, expert)))
            seen_LE = seen_LE | new_LE
            if seen_LE.all():
                if pinned:
                    log.info("%d of %d experts in the vault are pinned for the device", pinned, shape.share_count)
                return
            time.sleep(self._interval_s)


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
