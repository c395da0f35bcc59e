"""What a checkpoint's config.json says, in one frozen value. Needs no torch: the launcher and the server read it too.

Two architectures, Qwen3-MoE and Mixtral, in the spellings found on the hub and in those that transformers 5 writes
(`num_local_experts` for `num_experts`, `rope_parameters` for `rope_theta`). A key that is absent means what it means to
transformers. What Phalanx cannot compute exactly as written is refused by name, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from phalanx.errors import BadCheckpoint
from phalanx.moe.layout import BLOCK, ExpertFormat, ExpertLayout

Architecture = Literal["qwen3_moe", "mixtral"]
Json = dict[str, Any]

_ARCHITECTURES: dict[str, Architecture] = {
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model. Widths in elements, positions in tokens."""

    architecture: Architecture
    vocab_size: int
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    max_position: int
    """The most tokens a sequence may have."""
    num_experts: int
    top_k: int
    expert_width: int
    dense_width: int
    """Width of the layers that have one dense MLP in place of experts."""
    moe_layers: tuple[int, ...]
    """The decoder layers that have experts, ascending. MoE layer l is decoder layer moe_layers[l]."""
    norm_topk: bool
    """Scale the chosen experts' weights so that they sum to 1."""
    qk_norm: bool
    attention_bias: bool
    tied_embeddings: bool
    sliding_window: int | None
    eos_ids: tuple[int, ...]
    """Tokens that end a text."""
    dtype: str
    """What the checkpoint says that it is stored in; the tensors themselves decide."""
    expert_format: ExpertFormat = "plain"
    """How experts are held: as the checkpoint stores them, unless `--quantization` says otherwise."""

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    def kv_bytes(self, tokens: int, element_bytes: int) -> int:
        """What the keys and values of some tokens take in all layers together. LOCAL."""
        return self.num_layers * tokens * 2 * self.num_kv_heads * self.head_dim * element_bytes

    def expert_layout(self, element_bytes: int) -> ExpertLayout:
        """An expert's bytes, in a run whose type has so many an element. LOCAL."""
        return ExpertLayout(self.hidden, self.expert_width, element_bytes, self.expert_format)

    @classmethod
    def read(cls, path: str | Path) -> ModelConfig:
        """Parse `path`/config.json (and generation_config.json for eos ids). Raises BadCheckpoint. LOCAL."""
        directory = Path(path)
        if not directory.is_dir():
            raise BadCheckpoint(f"{directory} is not a directory: give the path of a Hugging Face checkpoint")
        raw = _read_json(directory / "config.json")
        generation_file = directory / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return _parse(_Fields(raw, directory / "config.json"), generation)


class _Fields:
    """Typed access to config.json: every complaint names the file and the key."""

    def __init__(self, raw: Json, file: Path) -> None:
        self.raw, self.file = raw, file

    def fail(self, message: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.file}: {message}")

    def any_of(self, keys: tuple[str, ...], default: Any = None) -> Any:
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        return default

    def integer(self, *keys: str, default: int | None = None) -> int:
        value = self.any_of(keys, default)
        if value is None:
            raise self.fail(f"{keys[0]} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(f"{keys[0]} must be a whole number of at least 1, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.any_of((key,), default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.fail(f"{key} must be a number above 0, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.any_of((key,), default)
        if not isinstance(value, bool):
            raise self.fail(f"{key} must be true or false, not {value!r}")
        return value


def _read_json(file: Path) -> Json:
    try:
        data = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise BadCheckpoint(f"{file}: {error.strerror}: is {file.parent} a Hugging Face checkpoint?") from error
    except msgspec.DecodeError as error:
        raise BadCheckpoint(f"{file} is not valid JSON ({error}): copy it again") from error
    if not isinstance(data, dict):
        raise BadCheckpoint(f"{file} must hold a JSON object, not {type(data).__name__}")
    return data


def _parse(fields: _Fields, generation: Json) -> ModelConfig:
    architecture = _architecture(fields)
    qwen = architecture == "qwen3_moe"
    activation = fields.any_of(("hidden_act",), "silu")
    if activation != "silu":
        raise fields.fail(f"hidden_act {activation!r} is not supported, only 'silu'")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.integer("num_hidden_layers")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=4 if qwen else 8),
        head_dim=fields.integer("head_dim", default=max(1, hidden // heads)),
        norm_eps=fields.number("rms_norm_eps", 1e-6 if qwen else 1e-5),
        rope_theta=_rope_theta(fields, 10000.0 if qwen else 1e6),
        max_position=fields.integer("max_position_embeddings", default=32768 if qwen else 131072),
        num_experts=fields.integer("num_experts", "num_local_experts", default=128 if qwen else 8),
        top_k=fields.integer("num_experts_per_tok", default=8 if qwen else 2),
        expert_width=fields.integer("moe_intermediate_size" if qwen else "intermediate_size"),
        dense_width=fields.integer("intermediate_size"),
        moe_layers=_moe_layers(fields, layers) if qwen else tuple(range(layers)),
        norm_topk=fields.flag("norm_topk_prob", False) if qwen else True,
        qk_norm=qwen,
        attention_bias=fields.flag("attention_bias", False) if qwen else False,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(fields, qwen),
        eos_ids=_eos_ids(fields, generation),
        dtype=str(fields.any_of(("dtype", "torch_dtype"), "")),
        expert_format=_expert_format(fields),
    )
    if config.num_heads % config.num_kv_heads:
        raise fields.fail(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {config.num_kv_heads}")
    if config.top_k > config.num_experts:
        raise fields.fail(f"num_experts_per_tok {config.top_k} is more than num_experts {config.num_experts}")
    if config.head_dim % 2:
        raise fields.fail(f"head_dim {config.head_dim} is odd: rotary embeddings need pairs")
    if not config.moe_layers:
        raise fields.fail("no layer has experts (decoder_sparse_step, mlp_only_layers): this is not an MoE model")
    return config


def _architecture(fields: _Fields) -> Architecture:
    named = fields.any_of(("architectures",), [])
    named = named if isinstance(named, list) else [named]
    for name in named:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    model_type = fields.any_of(("model_type",))
    if not named and model_type in _ARCHITECTURES.values():
        known: Architecture = model_type
        return known
    shown = ", ".join(map(str, named)) or model_type or "none named"
    raise fields.fail(f"architecture {shown} is not supported: Phalanx serves {', '.join(_ARCHITECTURES)}")


def _expert_format(fields: _Fields) -> ExpertFormat:
    """fp8 for weights in e4m3 with a scale a block; any other quantization is refused."""
    said = fields.any_of(("quantization_config",))
    if said is None:
        return "plain"
    if not isinstance(said, dict):
        raise fields.fail(f"quantization_config must be an object, not {said!r}")
    supported = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    usual = {"fmt": "e4m3", "activation_scheme": "dynamic"}
    for key, only in supported.items():
        if (value := said.get(key, usual.get(key))) != only:
            raise fields.fail(
                f"quantization_config.{key} {value!r} is not supported, only {only!r}: use a checkpoint in fp8 with a "
                "scale a block, or one in bfloat16 (--quantization fp8 makes its experts fp8)"
            )
    return "fp8"


def _rope_theta(fields: _Fields, default: float) -> float:
    """The base of the rotary embeddings, whichever key holds it; scaled ones are refused."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = fields.any_of((key,))
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise fields.fail(f"{key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise fields.fail(
                f"{key}.rope_type {kind!r} is not supported, only 'default': remove it for short contexts"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise fields.fail(f"{key}.partial_rotary_factor is not supported")
        if rope.get("rope_theta") is not None:
            return _Fields(rope, fields.file).number("rope_theta", default)
    return fields.number("rope_theta", default)


def _moe_layers(fields: _Fields, layers: int) -> tuple[int, ...]:
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.any_of(("mlp_only_layers",), [])
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise fields.fail(f"mlp_only_layers must be a list of layer numbers, not {dense!r}")
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def _sliding_window(fields: _Fields, qwen: bool) -> int | None:
    if fields.any_of(("sliding_window",)) is None or (qwen and not fields.flag("use_sliding_window", False)):
        return None
    return fields.integer("sliding_window")


def _eos_ids(fields: _Fields, generation: Json) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = fields.any_of(("eos_token_id",), [])
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise fields.fail(f"eos_token_id must be a token id or a list of them, not {eos!r}")
    return tuple(dict.fromkeys(ids))
