"""What of a rank depends on where it computes, chosen once: communicator, slots, model, runner.

`CpuBackend` is the reference. `CudaBackend` makes the same parts on a device. Whoever has a backend asks no further
question about the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from phalanx.comm.base import Communicator
from phalanx.comm.cpu import CpuCommunicator
from phalanx.comm.notices import NoticeBoard
from phalanx.comm.peer_memory import ROW_UNIT, PeerMemory
from phalanx.config import ServeConfig
from phalanx.engine.graphs import ladder, token_ladder
from phalanx.engine.runner import Runner, StepRunner, limits_for
from phalanx.engine.scheduler import Limits
from phalanx.errors import BadConfig
from phalanx.model.attention import KVStore
from phalanx.model.config import ModelConfig
from phalanx.model.decode_options import DecodeOptions
from phalanx.model.layers import DenseWeights
from phalanx.model.transformer import Transformer
from phalanx.moe.experts import Bytes, SlotBank
from phalanx.moe.gate import RouteTable
from phalanx.moe.linear import Checked, do
from phalanx.wire import Site

if TYPE_CHECKING:
    from phalanx.comm.cuda import CudaCommunicator
    from phalanx.moe.cuda import DeviceBank

Loads = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where a backend works: the model, the rank in it, and how peers' deaths are told.

    fault_point: where a communicator that can be made to fail asks whether it must. route_width: columns of the
    routing table. site: where this rank stands among several hosts."""

    config: ServeConfig
    model: ModelConfig
    rank: int
    incarnation: int
    notices: NoticeBoard
    route_width: int
    fault_point: Callable[[str], None] | None = None
    site: Site | None = None

    @property
    def slots(self) -> int:
        """S, expert slots a rank and layer."""
        return self.config.expert_slots(self.model.num_experts)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.config.dtype)
        return found


class Backend(Protocol):
    """The parts of one rank."""

    on_device: bool
    """Whether a device reads the vault's pages by itself."""

    @property
    def bank(self) -> SlotBank:
        """This rank's expert slots."""

    @property
    def comm(self) -> Communicator:
        """Where it meets its peers."""

    @property
    def limits(self) -> Limits:
        """What its engine may do at once; settled when `runner` has been called, for the KV cache of a device takes
        what the weights leave."""

    def runner(self, weights: DenseWeights, checked: Checked = do) -> StepRunner:
        """The model with these dense weights. checked: see `moe.linear.choose`. Once. LOCAL."""

    def load(self) -> Loads:
        """This rank's tokens by layer and expert, int64 [L, E]; it only grows. LOCAL."""

    def reached(self, pages: Bytes) -> object:
        """These pages of the vault have an expert that this rank may be lent. LOCAL, called from the vault's thread."""

    def failing(self) -> Callable[[str], object] | None:
        """What makes this rank's device fail (`testing.faults`), ready to be called; None: it has none. LOCAL."""


class CpuBackend:
    """On CPU cores, in shared memory."""

    on_device = False

    def __init__(self, place: Place) -> None:
        config, model, dtype = place.config, place.model, place.dtype
        self._place = place
        self.bank = SlotBank(
            model.num_moe_layers, place.slots, model.hidden, model.expert_width, dtype, model.expert_format
        )
        self.comm: Communicator = CpuCommunicator(
            place.rank,
            config.places,
            incarnation=place.incarnation,
            max_tokens=config.max_num_batched_tokens,
            hidden=model.hidden,
            top_k=model.top_k,
            slots_per_rank=place.slots,
            dtype=dtype,
            peer_timeout_s=config.peer_timeout_s,
            notices=place.notices,
            elastic=config.elastic,
            fault_point=place.fault_point,
            site=place.site,
        )
        self.limits = limits_for(config, model, KVStore.block_bytes(model, config.block_size, dtype))

    def runner(self, weights: DenseWeights, checked: Checked = do) -> StepRunner:
        """See `Backend`."""
        model, dtype, limits = self._place.model, self._place.dtype, self.limits
        routes = RouteTable(model.num_moe_layers, model.num_experts, self._place.route_width)
        transformer = Transformer(model, weights, self.bank, routes, self.comm, dtype, checked)
        self._load_LE = transformer.load_LE
        kv = KVStore(model, limits.num_blocks, limits.block_size, dtype)
        return Runner(transformer, kv, routes, model.vocab_size)

    def load(self) -> Loads:
        """See `Backend`."""
        load_LE: Loads = self._load_LE.numpy()
        return load_LE

    def reached(self, pages: Bytes) -> object:
        """See `Backend`. Nothing more is to be done for a CPU."""

    def failing(self) -> None:
        """See `Backend`."""


class CudaBackend:
    """On one CUDA device, rank r on device r of this host, round robin; Triton kernels, and cuBLAS for dense products.

    With `--deterministic` every product and sum is taken in one order for all batches and placements."""

    on_device = True

    def __init__(
        self,
        place: Place,
        *,
        graph_sizes: tuple[int, ...] | None = None,
        device: torch.device | None = None,
        memory: PeerMemory | None = None,
        bank: DeviceBank | None = None,
        make_comm: Callable[..., CudaCommunicator] | None = None,
        options: DecodeOptions | None = None,
    ) -> None:
        """graph_sizes: batches of decodes to capture graphs for, instead of those that the config calls for. device,
        memory: elsewhere than on CUDA, for kernels that an interpreter runs. bank, make_comm: another backend's slots,
        and who is called in place of `CudaCommunicator`: so that a process can compare two engines on one set of
        weights. options: instead of what is best."""
        from phalanx.comm.cuda import CudaCommunicator
        from phalanx.comm.launch import LaunchShape
        from phalanx.moe.cuda import DeviceBank, DeviceLoad

        config, model, dtype = place.config, place.model, place.dtype
        if device is None:
            device = torch.device("cuda", place.rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        self._place, self._device, self._options = place, device, options
        if graph_sizes is None:
            graph_sizes = ladder(min(config.cuda_graph_max_bs, config.max_num_seqs))
        self._graph_sizes = graph_sizes if device.type == "cuda" else ()
        token_sizes = token_ladder(min(config.cuda_graph_max_tokens, config.max_num_batched_tokens))
        self._token_sizes = token_sizes if self._graph_sizes else ()
        shape = None if device.type == "cuda" else LaunchShape.of(model.hidden, programs=2)
        self.bank: DeviceBank = bank or DeviceBank(
            model.num_moe_layers, place.slots, model.hidden, model.expert_width, dtype, device, model.expert_format
        )
        self.comm = self._comm = (make_comm or CudaCommunicator)(
            place.rank,
            config.places,
            incarnation=place.incarnation,
            max_tokens=config.max_num_batched_tokens,
            hidden=model.hidden,
            top_k=model.top_k,
            slots_per_rank=place.slots,
            dtype=dtype,
            peer_timeout_s=config.peer_timeout_s,
            notices=place.notices,
            elastic=config.elastic,
            mode="exact" if config.deterministic else "fast",
            shape=shape,
            memory=memory,
            device=device,
        )
        self._block_bytes = KVStore.block_bytes(model, config.block_size, dtype)
        self.limits = limits_for(config, model, self._block_bytes)
        alone = device.type == "cuda" and config.places <= torch.cuda.device_count()
        self._sizes_kv = config.kv_is_unsaid and alone
        self._load = DeviceLoad(model.num_moe_layers, model.num_experts, device)

    def runner(self, weights: DenseWeights, checked: Checked = do) -> StepRunner:
        """See `Backend`."""
        from phalanx.engine.cuda import CudaRunner
        from phalanx.engine.kv_room import DeviceMemory, blocks_that_fit, check_fit
        from phalanx.model.cuda import DeviceKV, DeviceModel, table_shape, to_device
        from phalanx.moe.cuda_blocks import kind_for

        config, model, device = self._place.config, self._place.model, self._device
        exact = config.deterministic
        routes = RouteTable(model.num_moe_layers, model.num_experts, self._place.route_width, device)
        experts = kind_for(self.bank)(
            self.bank, routes, self._comm, self._load, top_k=model.top_k, num_experts=model.num_experts,
            norm_topk=model.norm_topk, pairs=config.places * config.max_num_batched_tokens * model.top_k,
            weigh_early=not exact, y_MD=self._comm.results,
        )  # fmt: skip
        weights = to_device(weights, device)
        if device.type == "cuda":
            left, size = DeviceMemory.of(device), self._block_bytes
            if self._sizes_kv:
                blocks = blocks_that_fit(left, config.mem_fraction_static, size, config.block_size)
                self.limits = replace(self.limits, num_blocks=blocks)
            check_fit(left, self.limits.num_blocks, size)
        limits = self.limits
        kv = DeviceKV(model, limits.num_blocks, limits.block_size, self._place.dtype, device)
        shape = table_shape(
            model, rows=limits.max_num_batched_tokens, sequences=limits.max_num_seqs,
            max_model_len=limits.max_model_len, block_size=limits.block_size, num_blocks=limits.num_blocks, exact=exact,
            device=device,
        )  # fmt: skip
        decoder = DeviceModel(model, weights, experts, kv, shape, exact=exact, options=self._options)
        return CudaRunner(
            decoder,
            shape,
            self._comm,
            routes,
            self._load,
            self.bank,
            graph_sizes=self._graph_sizes,
            token_sizes=self._token_sizes,
            exact=exact,
            device=device,
        )

    def load(self) -> Loads:
        """See `Backend`."""
        return self._load.read()

    def reached(self, pages: Bytes) -> object:
        """See `Backend`. The device can read them at the full rate from now on, where that is allowed."""
        return self.bank.pin(pages)

    def failing(self) -> Callable[[str], object] | None:
        """See `Backend`. Compiles its kernels."""
        if self._device.type != "cuda":
            return None
        from phalanx.testing.device_faults import DeviceFaults

        return DeviceFaults(self._device)


def backend(place: Place) -> Backend:
    """The backend that `--device` names. LOCAL."""
    return CudaBackend(place) if place.config.device == "cuda" else CpuBackend(place)


def check_device(config: ServeConfig) -> None:
    """Raise BadConfig when this host cannot compute on `--device`. Makes no device context. LOCAL."""
    if config.device != "cuda":
        return
    if torch.cuda.device_count() == 0:
        raise BadConfig(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    for module, package in (("triton", "triton"), ("cuda.bindings", "cuda-bindings")):
        if not _installed(module):
            raise BadConfig(f"--device cuda needs {package}: pip install 'phalanx[gpu]'")


def check_model(model: ModelConfig) -> None:
    """Raise BadConfig when no device can compute this model. LOCAL."""
    if model.hidden % ROW_UNIT:
        raise BadConfig(
            f"--device cuda moves {ROW_UNIT} values of a row at a time, and this model's hidden size {model.hidden} is "
            f"no multiple of {ROW_UNIT}: use --device cpu"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
