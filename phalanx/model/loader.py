"""A checkpoint on disk: checked before anything listens, then read tensor by tensor, so that a rank touches only the
bytes of its own experts.

`Checkpoint.open` reads headers alone and needs no torch; the reading methods do. All LOCAL.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from phalanx.errors import BadCheckpoint
from phalanx.model.config import ModelConfig
from phalanx.moe.layout import blocks_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from phalanx.model.layers import DenseWeights, LayerWeights
    from phalanx.moe.blocks import BlockWeights

Shape = tuple[int, ...]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_STORED_DTYPES = frozenset({"BF16", "F16", "F32"})
_BLOCKS = "F8_E4M3"
"""Stored so, a tensor `X` has its scales, one a block, in `X_scale_inv`: what its values are to be multiplied by."""


class Tensors(Protocol):
    """A model's tensors by the names of its checkpoint: `Stored` in files, or `dummy.Drawn`."""

    def read(self, name: str) -> Tensor:
        """A tensor, in any type. LOCAL."""

    def fill(self, name: str, out: Tensor, index: int | None = None) -> None:
        """Write a tensor, or the one at `index` of a stack of them, over `out`, in the type of `out`. LOCAL."""

    def fill_blocks(self, name: str, weight: Tensor, scales: Tensor) -> None:
        """Write a matrix over e4m3 `weight` [O, I] and float32 `scales` [OB, IB] (`moe.blocks`). LOCAL."""

    def close(self) -> None:
        """Let go of what is open. LOCAL."""


class Checkpoint:
    """A model: its config, and its tensors by name, in a directory that was verified or drawn (`dummy`)."""

    def __init__(self, path: Path, config: ModelConfig, names: Names, tensors: Tensors) -> None:
        self.path, self.config = path, config
        self._names = names
        self._tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Check that `path` holds a model that can be served: config, every tensor's presence, shape and type, every
        file's header and size. Raises BadCheckpoint, which names the file or tensor and says what to do. LOCAL."""
        directory = Path(path)
        config = ModelConfig.read(directory)
        files = _tensor_files(directory)
        headers: dict[str, _Header] = {}
        for file in sorted(set(files.values())):
            headers |= _read_header(file, [name for name, where in files.items() if where == file])
        names = Names.of(config, headers.keys())
        for name, shape in names.expected():
            if name not in headers:
                raise BadCheckpoint(
                    f"{directory}: tensor {name} is missing: the checkpoint is incomplete, fetch it again"
                )
            if headers[name].shape != shape:
                raise BadCheckpoint(
                    f"{files[name]}: tensor {name} has shape {list(headers[name].shape)}, config.json asks for "
                    f"{list(shape)}"
                )
            if headers[name].dtype == _BLOCKS:
                _check_blocks(directory, config, name, headers)
        if config.expert_format != "plain":
            _check_experts(config, names, files, headers)
        return cls(directory, config, names, Stored(files))

    def served_as(self, config: ModelConfig) -> Checkpoint:
        """The same tensors, for a model that holds its experts as this config says. LOCAL."""
        return Checkpoint(self.path, config, self._names, self._tensors)

    def read_expert(self, layer: int, expert: int, out: npt.NDArray[np.uint8], dtype: torch.dtype) -> None:
        """Read one expert into `out`, the bytes of a slot (`moe.layout`), for a run in `dtype`.

        layer: index among the MoE layers. Only this expert's bytes are touched on disk. LOCAL."""
        import torch

        from phalanx.moe.blocks import BlockWeights

        names = self._names
        width, hidden = self.config.expert_width, self.config.hidden
        layout = self.config.expert_layout(dtype.itemsize)
        assert out.nbytes == layout.total_bytes, "out is not a slot of this model"
        if layout.format == "fp8":
            out[layout.weight_bytes :] = 0  # what only aligns is a part of the digest
            self._read_blocks(layer, expert, BlockWeights.of(torch.from_numpy(out), layout))
            return
        flat = torch.from_numpy(out).view(dtype)
        rows = flat[: 2 * width * hidden].view(2, width, hidden)
        w2 = flat[2 * width * hidden :].view(hidden, width)
        if names.fused:
            self._tensors.fill(names.gate_up(layer), rows.view(2 * width, hidden), expert)
            self._tensors.fill(names.down(layer), w2, expert)
            return
        for name, part in zip(names.expert(layer, expert), (rows[0], rows[1], w2), strict=True):
            self._tensors.fill(name, part)

    def _read_blocks(self, layer: int, expert: int, blocks: BlockWeights) -> None:
        import torch

        from phalanx.moe.blocks import NotFinite, quantize

        names, parts = self._names, blocks.parts()
        if not names.fused:
            for name, (weight, scales) in zip(names.expert(layer, expert), parts, strict=True):
                self._tensors.fill_blocks(name, weight, scales)
            return
        for name, members in ((names.gate_up(layer), parts[:2]), (names.down(layer), parts[2:])):
            rows = [weight.shape[0] for weight, _ in members]
            stored = torch.empty(sum(rows), members[0][0].shape[1])
            self._tensors.fill(name, stored, expert)
            for part, (weight, scales) in zip(torch.split(stored, rows), members, strict=True):
                try:
                    quantize(part, weight, scales)
                except NotFinite as error:
                    raise BadCheckpoint(
                        f"{self.path}: expert {expert} in tensor {name} cannot be made fp8: {error}"
                    ) from error

    def dense_weights(self, dtype: torch.dtype) -> DenseWeights:
        """All that every rank holds: embeddings, attention, norms, routers, dense MLPs, head, in `dtype`. LOCAL."""
        from phalanx.model.layers import DenseWeights

        return DenseWeights.of(dict(self.dense_parts(dtype)))

    def dense_parts(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The dense weights one by one, as (name, tensor): embed, layers.{i}.{field of LayerWeights}, norm, head (not
        when it is tied). So whoever copies them need not hold them all. LOCAL."""
        yield "embed", self._tensors.read("model.embed_tokens.weight").to(dtype)
        for i in range(self.config.num_layers):
            layer = self._layer_weights(i, dtype)
            for field in fields(layer):
                if (tensor := getattr(layer, field.name)) is not None:
                    yield f"layers.{i}.{field.name}", tensor
        yield "norm", self._tensors.read("model.norm.weight").to(dtype)
        if not self.config.tied_embeddings:
            yield "head", self._tensors.read("lm_head.weight").to(dtype)

    def dense_elements(self) -> list[int]:
        """How many elements each dense tensor on disk has; `dense_parts` joins some of them. LOCAL."""
        return [math.prod(shape) for _, shape in self._names.dense()]

    def close(self) -> None:
        """Let go of the files. LOCAL."""
        self._tensors.close()

    def _layer_weights(self, layer: int, dtype: torch.dtype) -> LayerWeights:
        import torch

        from phalanx.model.layers import LayerWeights

        config, prefix = self.config, f"model.layers.{layer}."

        def read(name: str) -> Tensor:
            return self._tensors.read(prefix + name).to(dtype)

        def read_qkv(kind: str) -> Tensor:
            return torch.cat([read(f"self_attn.{p}_proj.{kind}") for p in "qkv"])

        has_experts = layer in config.moe_layers
        return LayerWeights(
            input_norm=read("input_layernorm.weight"),
            qkv=read_qkv("weight"),
            qkv_bias=read_qkv("bias") if config.attention_bias else None,
            q_norm=read("self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=read("self_attn.k_norm.weight") if config.qk_norm else None,
            out=read("self_attn.o_proj.weight"),
            out_bias=read("self_attn.o_proj.bias") if config.attention_bias else None,
            post_norm=read("post_attention_layernorm.weight"),
            router=self._tensors.read(self._names.router(layer)).to(dtype) if has_experts else None,
            w13=None if has_experts else torch.cat([read("mlp.gate_proj.weight"), read("mlp.up_proj.weight")]),
            w2=None if has_experts else read("mlp.down_proj.weight"),
        )


class Stored:
    """Tensors in safetensors files, read when they are asked for."""

    def __init__(self, files: dict[str, Path]) -> None:
        """files: where each tensor is."""
        self._files = files
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """See `Tensors`; in the type that it is stored in, blocks in float32."""
        tensor = self._stored(name)
        if tensor.dtype.itemsize > 1:
            return tensor
        import torch

        from phalanx.moe.blocks import dequantized

        return dequantized(self._checked(name, tensor), self._scales(name), torch.float32)

    def fill_blocks(self, name: str, weight: Tensor, scales: Tensor) -> None:
        """See `Tensors`: as they are stored, or made here. Raises BadCheckpoint for what cannot be made into blocks."""
        from phalanx.moe.blocks import NotFinite, quantize

        tensor = self._stored(name)
        if tensor.dtype == weight.dtype:
            weight.copy_(self._checked(name, tensor))
            scales.copy_(self._scales(name))
            return
        try:
            quantize(tensor, weight, scales)
        except NotFinite as error:
            raise BadCheckpoint(f"{self._files[name]}: tensor {name} cannot be made fp8: {error}") from error

    def fill(self, name: str, out: Tensor, index: int | None = None) -> None:
        """See `Tensors`."""
        out.copy_(self.read(name) if index is None else self._handle(name).get_slice(name)[index])

    def close(self) -> None:
        """See `Tensors`."""
        self._open.clear()

    def _checked(self, name: str, weight: Tensor) -> Tensor:
        from phalanx.moe.blocks import NotFinite, check_numbers

        try:
            check_numbers(weight)
        except NotFinite as error:
            raise BadCheckpoint(f"{self._files[name]}: tensor {name} is damaged: {error}") from error
        return weight

    def _scales(self, name: str) -> Tensor:
        scales = self._stored(_scales_of(name))
        if not scales.isfinite().all():
            raise BadCheckpoint(
                f"{self._files[_scales_of(name)]}: tensor {_scales_of(name)} is damaged: it holds scales that are not "
                "finite numbers"
            )
        return scales

    def _stored(self, name: str) -> Tensor:
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def _handle(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = _opened(file, framework="pt")
        return self._open[file]


class Names:
    """Which tensors a model of this config must have, under the names its checkpoint uses.

    On the hub, and as transformers 5 saves by default, each expert has its own tensors; kept fused, a layer's experts
    are two tensors, [E, 2F, D] and [E, D, F]."""

    def __init__(self, config: ModelConfig, fused: bool) -> None:
        self.config, self.fused = config, fused
        own = config.architecture == "mixtral" and not fused
        self._block = "block_sparse_moe" if own else "mlp"
        self._parts = ("w1", "w3", "w2") if own else ("gate_proj", "up_proj", "down_proj")

    @classmethod
    def of(cls, config: ModelConfig, present: Collection[str]) -> Names:
        """The naming that the checkpoint with these tensors uses. LOCAL."""
        return cls(config, f"model.layers.{config.moe_layers[0]}.mlp.experts.gate_up_proj" in present)

    def router(self, decoder_layer: int) -> str:
        return f"model.layers.{decoder_layer}.{self._block}.gate.weight"

    def expert(self, layer: int, expert: int) -> tuple[str, str, str]:
        """(gate, up, down) of an expert in its own tensors."""
        stem = f"model.layers.{self.config.moe_layers[layer]}.{self._block}.experts.{expert}"
        gate, up, down = (f"{stem}.{part}.weight" for part in self._parts)
        return gate, up, down

    def gate_up(self, layer: int) -> str:
        return f"model.layers.{self.config.moe_layers[layer]}.mlp.experts.gate_up_proj"

    def down(self, layer: int) -> str:
        return f"model.layers.{self.config.moe_layers[layer]}.mlp.experts.down_proj"

    def expected(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor that is read, with its shape."""
        yield from self.dense()
        yield from self.experts()

    def experts(self) -> Iterator[tuple[str, Shape]]:
        """The experts' own tensors, with their shapes."""
        for layer in range(self.config.num_moe_layers):
            yield from self._experts(layer)

    def dense(self) -> Iterator[tuple[str, Shape]]:
        """Every tensor but the experts' own, with its shape."""
        config = self.config
        yield "model.embed_tokens.weight", (config.vocab_size, config.hidden)
        yield "model.norm.weight", (config.hidden,)
        if not config.tied_embeddings:
            yield "lm_head.weight", (config.vocab_size, config.hidden)
        for layer in range(config.num_layers):
            yield from self._attention(f"model.layers.{layer}.")
            if layer in config.moe_layers:
                yield self.router(layer), (config.num_experts, config.hidden)
            else:
                stem = f"model.layers.{layer}.mlp."
                yield stem + "gate_proj.weight", (config.dense_width, config.hidden)
                yield stem + "up_proj.weight", (config.dense_width, config.hidden)
                yield stem + "down_proj.weight", (config.hidden, config.dense_width)

    def _attention(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        config = self.config
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for part, rows in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            yield f"{prefix}self_attn.{part}_proj.weight", (rows, config.hidden)
            if config.attention_bias:
                yield f"{prefix}self_attn.{part}_proj.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (config.hidden, q_width)
        if config.attention_bias:
            yield f"{prefix}self_attn.o_proj.bias", (config.hidden,)
        if config.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (config.head_dim,)
            yield f"{prefix}self_attn.k_norm.weight", (config.head_dim,)
        yield f"{prefix}input_layernorm.weight", (config.hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (config.hidden,)

    def _experts(self, layer: int) -> Iterator[tuple[str, Shape]]:
        config = self.config
        if self.fused:
            yield self.gate_up(layer), (config.num_experts, 2 * config.expert_width, config.hidden)
            yield self.down(layer), (config.num_experts, config.hidden, config.expert_width)
            return
        for expert in range(config.num_experts):
            gate, up, down = self.expert(layer, expert)
            yield gate, (config.expert_width, config.hidden)
            yield up, (config.expert_width, config.hidden)
            yield down, (config.hidden, config.expert_width)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file that holds each tensor, from the index or from the single file's own header."""
    index_file, single = directory / _INDEX, directory / _SINGLE
    if index_file.exists():
        try:
            index = msgspec.json.decode(index_file.read_bytes(), type=_Index)
        except (OSError, msgspec.DecodeError) as error:
            raise BadCheckpoint(f"{index_file} is not a readable index of tensors ({error}): fetch it again") from error
        for name, shard in index.weight_map.items():
            if Path(shard).name != shard:
                raise BadCheckpoint(f"{index_file}: tensor {name} is in {shard!r}, which is outside the directory")
        return {name: directory / shard for name, shard in index.weight_map.items()}
    if single.exists():
        return dict.fromkeys(_names_in(single), single)
    raise BadCheckpoint(
        f"{directory} has neither {_SINGLE} nor {_INDEX}: Phalanx reads safetensors checkpoints (--load-format dummy: "
        "random weights, for benchmarks)"
    )


def _names_in(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


@dataclass(frozen=True)
class _Header:
    """What a file's header says of a tensor; dtype as safetensors spells it."""

    shape: Shape
    dtype: str


def _read_header(file: Path, names: list[str]) -> dict[str, _Header]:
    """Shapes and types of the tensors that `file` must hold."""
    headers: dict[str, _Header] = {}
    with _opened(file) as handle:
        present = set(handle.keys())
        for name in names:
            if name not in present:
                raise BadCheckpoint(
                    f"{file}: tensor {name} is missing, though the index says it is here: fetch it again"
                )
            header = handle.get_slice(name)
            found = headers[name] = _Header(tuple(header.get_shape()), header.get_dtype())
            if found.dtype not in _STORED_DTYPES and (found.dtype != _BLOCKS or len(found.shape) != 2):
                supported = sorted(_STORED_DTYPES | ({_BLOCKS} if len(found.shape) == 2 else set()))
                raise BadCheckpoint(f"{file}: tensor {name} is stored as {found.dtype}, supported are {supported}")
    return headers


def _scales_of(name: str) -> str:
    return f"{name}_scale_inv"


def _check_blocks(directory: Path, config: ModelConfig, name: str, headers: Mapping[str, _Header]) -> None:
    """That the scales of a tensor in blocks are there, and as many as it has blocks."""
    if config.expert_format == "plain":
        raise BadCheckpoint(
            f"{directory}: tensor {name} is stored as {_BLOCKS}, but config.json has no quantization_config that says "
            "so: fetch both from one place"
        )
    scales = _scales_of(name)
    if scales not in headers:
        raise BadCheckpoint(
            f"{directory}: tensor {scales} is missing, without which {name}, stored as {_BLOCKS}, means nothing: fetch "
            "the checkpoint again"
        )
    rows, columns = headers[name].shape
    found, wanted = headers[scales], (blocks_in(rows), blocks_in(columns))
    if found.shape != wanted or found.dtype not in _STORED_DTYPES:
        raise BadCheckpoint(
            f"{directory}: tensor {scales} is {found.dtype} of shape {list(found.shape)}, the blocks of {name} ask for "
            f"{list(wanted)} in one of {sorted(_STORED_DTYPES)}"
        )


def _check_experts(
    config: ModelConfig, names: Names, files: Mapping[str, Path], headers: Mapping[str, _Header]
) -> None:
    """That experts are stored as config.json says, each in tensors of its own."""
    for name, _ in names.experts():
        if names.fused:
            raise BadCheckpoint(
                f"{files[name]}: tensor {name} has all experts of a layer, which with {config.expert_format} is not "
                "supported: use a checkpoint with tensors for each expert"
            )
        if headers[name].dtype != _BLOCKS:
            raise BadCheckpoint(
                f"{files[name]}: tensor {name} is stored as {headers[name].dtype}, but config.json "
                f"(quantization_config) says that experts are {config.expert_format}: use a checkpoint in which all "
                "of them are"
            )


def _opened(file: Path, framework: str = "np") -> Any:
    """safetensors checks the header, and that the tensors cover the file to its last byte."""
    try:
        return safe_open(file, framework=framework)
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{file} is missing, though the index names it: fetch it again") from error
    except (SafetensorError, OSError) as error:
        raise BadCheckpoint(f"{file} is truncated or corrupt ({error}): fetch it again") from error
