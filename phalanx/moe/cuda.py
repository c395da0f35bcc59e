"""The MoE layers of one rank on a device: slots in device memory, gate, grouped experts, load counts.

`DeviceExperts.forward` waits for nothing, and every buffer that a kernel reads stands at a fixed address: what it
launches may be captured in a CUDA graph, which outlives every change of routes, slots and membership.

Shape suffixes: L MoE layers, S slots a rank, F expert width, D model width, T tokens, K top-k, E experts, M pairs.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phalanx.comm.cuda import CudaCommunicator
from phalanx.comm.launch import power_of_two, programs_at_once
from phalanx.comm.received import RowNorm
from phalanx.errors import PhalanxError
from phalanx.moe.experts import Bytes, SlotBank
from phalanx.moe.gate import RouteTable
from phalanx.moe.layout import ExpertFormat
from phalanx.moe.thin import Product

log = logging.getLogger("phalanx.moe")

_PAGE = mmap.PAGESIZE


class DeviceMemoryShort(PhalanxError):
    """The device has no room for what was asked; the message names the flags to lower."""


class DeviceBank(SlotBank):
    """Expert slots in device memory, [L, S, 3 F D] at a fixed address, filled from the host; with fp8 the bytes of a
    slot, uint8 [L, S, X].

    To peers every slot seems borrowed: they restore from their vault or from disk. A restore of borrowed bytes (the
    vault's) copies from where they lie; bytes that a source writes land in one pinned buffer first. Copies run on a
    stream of their own, so that a rebalance goes on beside the steps; `ready` orders them before what follows."""

    def __init__(
        self, num_layers: int, slots_per_rank: int, hidden: int, expert_width: int, dtype: torch.dtype,
        device: torch.device, expert_format: ExpertFormat = "plain",
    ) -> None:  # fmt: skip
        super().__init__(num_layers, slots_per_rank, hidden, expert_width, dtype, expert_format)
        self._borrowed_LS[:] = 1
        kind = dtype if expert_format == "plain" else torch.uint8
        elements = self.expert_bytes // kind.itemsize
        try:
            self.weights_LSX = torch.empty(num_layers, slots_per_rank, elements, dtype=kind, device=device)
        except torch.OutOfMemoryError as error:
            size = num_layers * slots_per_rank * self.expert_bytes / 1e9
            raise DeviceMemoryShort(
                f"{slots_per_rank} expert slots in {num_layers} layers take {size:.1f} GB, which {device} does not "
                "have: lower --slots-per-rank, or raise --min-ranks, from which it follows"
            ) from error
        on_device = device.type == "cuda"
        self._landing = torch.empty(elements, dtype=kind, pin_memory=on_device)
        self._landed: tuple[int, int] | None = None
        self._pinned: list[int] = []
        self._refused = False
        self._side = torch.cuda.Stream(device) if on_device else None  # type: ignore[no-untyped-call]

    def slot_bytes(self, layer: int, slot: int) -> Bytes:
        """uint8 [expert_bytes] of host memory, writable: fill it, then `mark` the slot before asking again. LOCAL."""
        if self._side is not None:
            self._side.synchronize()  # the last expert's copy reads this memory
        self._landed = layer, slot
        data: Bytes = self._landing.view(torch.uint8).numpy()
        return data

    def slot_file(self, layer: int, slot: int) -> None:
        """The landing buffer is resident, and part of no file."""

    def mark(self, layer: int, slot: int, expert: int, digest: int) -> None:
        """Say that what `slot_bytes` got is `expert`, and send it to the device. LOCAL."""
        assert self._landed == (layer, slot), f"slot {slot} of layer {layer} was not filled"
        self._landed = None
        self._copy(layer, slot, self._landing.view(torch.uint8).numpy())
        self._enter(layer, slot, expert, digest)

    def borrow(self, layer: int, slot: int, expert: int, digest: int, data: Bytes) -> None:
        """The slot holds `expert`, copied from `data`, which must stay as it is until `ready`'s stream has passed."""
        assert data.nbytes == self.expert_bytes, (data.nbytes, self.expert_bytes)
        self._copy(layer, slot, data)
        self._enter(layer, slot, expert, digest)

    def settle(self) -> None:
        """Wait until every copy has reached the device. LOCAL."""
        if self._side is not None:
            self._side.synchronize()

    def pin(self, data: Bytes) -> bool:
        """Have the device read host memory that `borrow` will be given at the full rate, from now on. False where that
        is refused: it is then read at the rate of pageable memory. May be called from any thread. LOCAL.

        Only ever registered for reading, and best from a shared mapping: of a private one's pages the system may make
        copies."""
        device = self.weights_LSX.device
        if device.type != "cuda":
            return False
        from cuda.bindings import runtime

        runtime.cudaSetDevice(device.index)  # what is current is a thread's own
        begin = data.ctypes.data // _PAGE * _PAGE
        size = -(-(data.ctypes.data + data.nbytes - begin) // _PAGE) * _PAGE
        (error,) = runtime.cudaHostRegister(begin, size, runtime.cudaHostRegisterReadOnly)
        if error != runtime.cudaError_t.cudaSuccess:
            runtime.cudaGetLastError()  # it must not surface in somebody else's check
            if not self._refused:
                log.warning("the vault cannot be pinned (%s): restores run at the rate of pageable memory", error.name)
            self._refused = True
            return False
        self._pinned.append(begin)
        return True

    def ready(self) -> None:
        """What is launched from now on sees all slots as they were marked. LOCAL, does not wait."""
        if self._side is not None:
            torch.cuda.current_stream(self.weights_LSX.device).wait_stream(self._side)

    def pack(self, limit: int | None = None) -> int:
        """There is nothing to pack on a device."""
        return 0

    def close(self) -> None:
        if self._side is not None:
            self._side.synchronize()
        self.weights_LSX = self.weights_LSX.new_empty(0)
        if self._pinned:
            from cuda.bindings import runtime

            for begin in self._pinned:
                runtime.cudaHostUnregister(begin)
            self._pinned.clear()
        super().close()

    def _copy(self, layer: int, slot: int, data: Bytes) -> None:
        """Send an expert's bytes to a slot. By address: torch takes no memory that is for reading alone."""
        if self._side is None:
            np.copyto(self.weights_LSX[layer, slot].view(torch.uint8).numpy(), data)
            return
        from cuda.bindings import runtime

        to = self.weights_LSX.data_ptr() + (layer * self.slots_per_rank + slot) * self.expert_bytes
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        (error,) = runtime.cudaMemcpyAsync(to, data.ctypes.data, data.nbytes, kind, self._side.cuda_stream)
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA error: {error.name} in the copy of an expert to the device")

    def _enter(self, layer: int, slot: int, expert: int, digest: int) -> None:
        self._held_LS[layer, slot] = expert
        self._digest_LS[layer, slot] = digest

    def _give_back(self, layer: int, slot: int) -> None:
        """No host memory is lent."""


class DeviceLoad:
    """This rank's tokens by layer and expert: counted by the gates' kernel, and added up on the host, once their step
    was whole. So nobody who asks waits for the device."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.step_LE = torch.zeros(num_layers, num_experts, dtype=torch.int32, device=device)
        """Of the step that runs. Fixed address."""
        self._load_LE = np.zeros((num_layers, num_experts), np.int64)

    def landing(self) -> Tensor:
        """Host memory for one step's counts, int32 [L, E]. LOCAL."""
        return torch.zeros(self.step_LE.shape, dtype=torch.int32, pin_memory=self.step_LE.device.type == "cuda")

    def end(self, landing_LE: Tensor) -> None:
        """A step was launched: its counts go there once it has run, and the next one counts from 0. LOCAL, launches
        only."""
        landing_LE.copy_(self.step_LE, non_blocking=True)
        self.step_LE.zero_()

    def count(self, landing_LE: Tensor) -> None:
        """The step whose counts have landed there was whole. LOCAL."""
        self._load_LE += landing_LE.numpy()

    def read(self) -> npt.NDArray[np.int64]:
        """int64 [L, E]; it only grows. LOCAL."""
        return self._load_LE.copy()


_FEW = 9.0
"""Pairs a slot that nearly always fit into 16 rows; measured with 8.2 (16 rows are the fastest) and 33 (64 are)."""

_MANY = 48.0
"""Pairs a slot from which tiles of 128 rows are faster than of 64; measured with 33 (64 rows are) and 65 (128 are)."""

MIN_ROWS = 16
"""No tile has fewer pairs."""

_VERY_FEW = 32
"""Pairs at a rank for which tiles of 64 outputs are fewer than the device's processors."""


@dataclass(frozen=True)
class Tiling:
    """How the experts' kernel cuts its work. rows: pairs a tile; up, down: outputs a tile; depth: inputs a round.
    programs: a processor."""

    rows: int = 16
    up: int = 64
    down: int = 128
    depth: int = 128
    up_stages: int = 3
    down_stages: int = 3
    warps: int = 4
    programs: int = 2

    @classmethod
    def of(cls, pairs: int, slots: int, *, exact: bool) -> Tiling:
        """The tiling for so many pairs at a rank, over so many slots that are asked for. LOCAL, pure.

        With few pairs a slot the weights' way from memory is all that counts, and with very few more programs must
        share it. A slot whose pairs fill more than one tile has its weights read again for each: so tiles grow with
        the pairs. exact: the tilings that this returns then give a row the same bits. They have one depth, and none
        has 64 rows, which devices multiply with another instruction than 16 and 32."""
        a_slot = pairs / max(1, slots)
        if a_slot <= _FEW:
            return cls(up=32, down=64, up_stages=4, down_stages=4) if pairs <= _VERY_FEW else cls()
        if exact or a_slot <= 2 * _FEW:
            return cls(rows=32)
        if a_slot <= _MANY:
            return cls(rows=64, depth=64, up_stages=4, down_stages=4)
        return cls(rows=128, up=128, down=256, depth=64, warps=8, programs=1)


class DeviceExperts:
    """All MoE layers of one rank: gate, dispatch, experts, combine."""

    def __init__(
        self, bank: DeviceBank, routes: RouteTable, comm: CudaCommunicator, load: DeviceLoad, *,
        top_k: int, num_experts: int, norm_topk: bool, pairs: int, weigh_early: bool,
        y_MD: Tensor | None = None,
    ) -> None:  # fmt: skip
        """pairs: the most (token, slot) pairs that a dispatch may bring. weigh_early: the communicator's mode is
        `fast`, in which weights travel with the tokens. y_MD: where the experts' results stand, [pairs, D]; memory of
        our own unless given."""
        from phalanx.moe import expert_kernels, kernels

        self._code, self._kernel = kernels, expert_kernels.experts_kernel
        self._fixed: dict[str, Any] = {
            "S": bank.slots_per_rank, "SP": power_of_two(bank.slots_per_rank), "F": bank.expert_width, "D": bank.hidden,
            "X": bank.weights_LSX.shape[2], "AT": bank.layout.scales_start if bank.layout.format == "fp8" else 0,
        }  # fmt: skip
        self._bank, self._routes, self._comm, self._load = bank, routes, comm, load
        self._top_k, self._num_experts, self._norm_topk = top_k, num_experts, norm_topk
        self._weigh_early = weigh_early
        weights = bank.weights_LSX
        self._h_MF = torch.empty(pairs, bank.expert_width, dtype=bank.dtype, device=weights.device)
        if y_MD is None:
            y_MD = torch.empty(pairs, bank.hidden, dtype=bank.dtype, device=weights.device)
        self._y_MD = y_MD
        on_device = weights.device.type == "cuda"
        self._device = torch.cuda.get_device_properties(weights.device) if on_device else None
        self._programs: dict[Tiling, int] = {}
        most = -(-pairs // MIN_ROWS) + bank.slots_per_rank
        self._fixed["MOST"] = most
        self._turns = torch.zeros(int(expert_kernels.READY) + most, dtype=torch.int32, device=weights.device)

    @property
    def norms(self) -> int:
        """Up to how many rows `forward` can norm. LOCAL."""
        return self._comm.norms

    def forward(
        self, layer: int, x_TD: Tensor, logits: Tensor | Product, positions_T: Tensor, num_rows: Tensor,
        tiling: Tiling, norm: RowNorm | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, D] -> [T, D]. COLLECTIVE, launches only.

        logits: the router's, [T, E]. num_rows: int32 [1] on the device; rows from there on are nobody's. norm: for up
        to `norms` rows: add the result to a residual, and return the norm of that."""
        weights_TK, slots_TK = self.gate(layer, logits, positions_T, num_rows)
        sent = self._comm.dispatch(x_TD, slots_TK, weights_TK if self._weigh_early else None)
        self.experts(layer, sent.x_ND, sent.row_M, sent.first_S, tiling)
        return self._comm.combine_weighted(self._y_MD, sent, weights_TK, norm)

    def gate(
        self, layer: int, logits: Tensor | Product, positions_T: Tensor, num_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(float32 weights [T, K], int32 global slots [T, K]). LOCAL, launches only."""
        product = Product.of(logits)
        tokens, K, device = positions_T.shape[0], self._top_k, positions_T.device
        weights_TK = torch.empty(tokens, K, dtype=torch.float32, device=device)
        slots_TK = torch.empty(tokens, K, dtype=torch.int32, device=device)
        self._code.gate_kernel[(tokens,)](
            product.data, positions_T, num_rows, self._routes.table_LEW[layer], weights_TK, slots_TK,
            self._load.step_LE[layer],
            E=self._num_experts, EP=power_of_two(self._num_experts), K=K, KP=power_of_two(K), W=self._routes.width,
            SCALED=self._norm_topk, PARTS=product.parts, num_warps=1,
        )  # fmt: skip
        return weights_TK, slots_TK

    def experts(self, layer: int, x_ND: Tensor, row_M: Tensor, first_S: Tensor, tiling: Tiling) -> Tensor:
        """[M, D], valid until the next call: rows `row_M` of x_ND through the slots that `first_S` says. LOCAL."""
        bank, t = self._bank, tiling
        given = (x_ND, row_M, first_S, bank.weights_LSX[layer], self._h_MF, self._y_MD, self._turns)
        cut = {
            **self._fixed, "BM": t.rows, "UP": t.up, "DOWN": t.down, "BK": t.depth, "UP_STAGES": t.up_stages,
            "DOWN_STAGES": t.down_stages, "num_warps": t.warps,
        }  # fmt: skip
        if t not in self._programs:
            self._programs[t] = self._fitting(self._kernel.warmup(*given, grid=(1,), **cut), t)
        self._kernel[(self._programs[t],)](*given, **cut)
        return self._y_MD

    def _fitting(self, compiled: Any, tiling: Tiling) -> int:
        """As many programs as asked for, of those that run at once: they wait for one another."""
        if self._device is None:
            return 1  # Triton's interpreter runs one after the other
        _ = compiled.run  # loads it, and so finds out what a program needs
        held = programs_at_once(compiled, tiling.warps, self._device)
        return max(1, min(held, tiling.programs)) * int(self._device.multi_processor_count)
