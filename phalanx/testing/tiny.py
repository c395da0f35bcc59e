"""Small random checkpoints that are real: Qwen3-MoE and Mixtral in the names and files of the Hugging Face hub.

The weights are random but not arbitrary. Their scales are chosen so that greedy decoding wanders instead of falling
into one token, and so that the experts' share of every hidden state is large: a token that goes to a wrong expert, a
wrong slot or a wrong layer changes the text. The tokenizer has one token a byte, so any text round-trips. Rows of the
output layer that stand for bytes beyond ASCII, control characters and special tokens are made small: texts are
readable, and a sequence rarely ends by itself.

The same (arch, shape, seed, dtype) gives the same bytes, whatever the number of shards.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from phalanx.errors import BadConfig
from phalanx.moe.blocks import E4M3, quantize
from phalanx.moe.layout import BLOCK, blocks_in
from phalanx.testing.writer import CHATML_TEMPLATE, Texts, check_room, check_target, write_model

Arch = Literal["qwen3-moe", "mixtral"]
Spelling = Literal["hub", "transformers5"]
DTYPES = {
    "bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "fp8": torch.float8_e4m3fn,
}  # fmt: skip
"""How weights may be stored. fp8: all but embeddings, norms, routers and head, with a bfloat16 scale a block."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 256, 257, 258
BYTE_VOCAB = 256 + len(SPECIAL_TOKENS)

_IN_BLOCKS = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
"""How the names end of what is stored in blocks."""

# Standard deviations, for inputs of unit variance. Attention scores of about 3 look at few tokens, so that the text
# depends on positions; the residual stream gets as much from attention and experts as it held before.
_SCORE_STD = 3.0
_BRANCH_STD = 1.0
_ROUTER_STD = 2.0
_LOGIT_STD = 4.0
_RARE_ROW = 0.2


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model: D = hidden, F = expert_width, E = experts, K = top_k, L = layers.

    dense_layers: layers with an ordinary MLP in place of experts (Qwen3-MoE only: its `mlp_only_layers`).
    renormalise: the top-k weights are scaled to sum to 1 (Mixtral always does).
    """

    arch: Arch
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    expert_width: int = 64
    vocab: int = BYTE_VOCAB
    max_positions: int = 4096
    rope_theta: float = 10000.0
    dense_layers: tuple[int, ...] = ()
    renormalise: bool = True
    tied: bool = False

    def check(self) -> None:
        """Raise BadConfig for sizes that make no model. LOCAL."""
        if self.arch not in ("qwen3-moe", "mixtral"):
            raise BadConfig(f"--arch must be qwen3-moe or mixtral, not {self.arch}")
        for name in ("layers", "experts", "top_k", "hidden", "heads", "kv_heads", "head_dim", "expert_width"):
            if getattr(self, name) < 1:
                raise BadConfig(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.top_k > self.experts:
            raise BadConfig(f"--top-k {self.top_k} is more than --experts {self.experts}")
        if self.heads % self.kv_heads:
            raise BadConfig(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")
        if self.head_dim % 2:
            raise BadConfig(f"--head-dim must be even (rotary pairs), not {self.head_dim}")
        if self.vocab < BYTE_VOCAB:
            raise BadConfig(f"--vocab must be at least {BYTE_VOCAB} (one token a byte and 3 special ones)")
        if self.arch == "mixtral" and (self.dense_layers or not self.renormalise):
            raise BadConfig("Mixtral has experts in every layer and always renormalises")
        if any(not 0 <= layer < self.layers for layer in self.dense_layers):
            raise BadConfig(f"dense layers {list(self.dense_layers)} outside the {self.layers} layers")


def make_tiny(
    path: str | Path,
    arch: Arch,
    *,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    expert_width: int = 64,
    vocab: int = BYTE_VOCAB,
    max_positions: int = 4096,
    dense_layers: tuple[int, ...] = (),
    renormalise: bool = True,
    tied: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int = 2,
    spelling: Spelling = "hub",
    force: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> Path:
    """Write a small random checkpoint at `path` and return it. LOCAL.

    spelling: "hub" writes config.json with the field names of checkpoints on the hub, "transformers5" with those that
    transformers 5 saves. shards: at most so many weight files, of about equal size. Raises BadConfig for sizes that
    make no model or a place that is taken."""
    shape = Shape(
        arch,
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        expert_width=expert_width,
        vocab=vocab,
        max_positions=max_positions,
        dense_layers=tuple(dense_layers),
        renormalise=renormalise,
        tied=tied,
    )
    return write_random(
        path, shape, seed=seed, dtype=dtype, shards=shards, spelling=spelling, force=force, progress=progress
    )


def write_random(
    path: str | Path,
    shape: Shape,
    *,
    weights: bool = True,
    seed: int = 0,
    dtype: str = "bfloat16",
    shards: int = 2,
    spelling: Spelling = "hub",
    force: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> Path:
    """As `make_tiny`, of any shape. weights: False leaves them out, for `phalanx serve --load-format dummy`. LOCAL."""
    shape.check()
    if dtype not in DTYPES:
        raise BadConfig(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if shards < 1:
        raise BadConfig(f"--shards must be at least 1, not {shards}")
    size = model_bytes(shape, dtype)
    check_target(Path(path), force)
    if weights:
        check_room(Path(path), size)
    write_model(
        Path(path),
        _texts(shape, dtype, spelling),
        _stored(_tensors(shape, seed), DTYPES[dtype]) if weights else None,
        shard_bytes=max(1, -(-size // shards)),
        force=force,
        progress=progress,
    )
    return Path(path)


def model_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of all weights. LOCAL."""
    return sum(_stored_bytes(name, size, DTYPES[dtype]) for name, size, _, _ in _layout(shape))


def _stored_bytes(name: str, size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of one tensor, with its scales, as `_stored` makes it."""
    if dtype is not E4M3:
        return math.prod(size) * dtype.itemsize
    if not name.endswith(_IN_BLOCKS):
        return math.prod(size) * torch.bfloat16.itemsize
    return math.prod(size) + blocks_in(size[0]) * blocks_in(size[1]) * torch.bfloat16.itemsize


def byte_tokenizer(size: int = BYTE_VOCAB) -> Tokenizer:
    """One token a byte (ids 0 to 255 in byte order), then the special tokens; any text round-trips. LOCAL.

    size: further ids up to here stand for a space and their number; no text is encoded to them, but a model may choose
    them."""
    vocab = {symbol: byte for byte, symbol in enumerate((*_byte_symbols(), *SPECIAL_TOKENS))}
    space = _byte_symbols()[ord(" ")]
    vocab |= {f"{space}{number}": number for number in range(BYTE_VOCAB, size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies: printable Latin-1 bytes stand for
    themselves, the others for the characters from U+0100 on, in byte order. (Source: the GPT-2 tokenizer.)"""
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in themselves]
    return [chr(byte) if byte in themselves else chr(0x100 + others.index(byte)) for byte in range(256)]


# --- weights: (name, size, standard deviation, mean)

_Entry = tuple[str, tuple[int, ...], float, float]


def _layout(shape: Shape) -> Iterator[_Entry]:
    width = shape.hidden
    yield "model.embed_tokens.weight", (shape.vocab, width), 1.0, 0.0
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (width,), 0.1, 1.0
        yield from _attention(shape, prefix + "self_attn.")
        yield prefix + "post_attention_layernorm.weight", (width,), 0.1, 1.0
        if layer in shape.dense_layers:
            yield from _mlp(prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"), width, 2 * shape.expert_width)
        elif shape.arch == "mixtral":
            yield from _experts(shape, prefix + "block_sparse_moe.", ("w1", "w3", "w2"))
        else:
            yield from _experts(shape, prefix + "mlp.", ("gate_proj", "up_proj", "down_proj"))
    yield "model.norm.weight", (width,), 0.1, 1.0
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, width), _LOGIT_STD * width**-0.5, 0.0


def _attention(shape: Shape, prefix: str) -> Iterator[_Entry]:
    width, head_dim = shape.hidden, shape.head_dim
    # Qwen3 normalises q and k, so there the scale of the scores lies in the norms; elsewhere in the projections.
    normed = shape.arch == "qwen3-moe"
    gain = 1.0 if normed else _SCORE_STD**0.5
    yield prefix + "q_proj.weight", (shape.heads * head_dim, width), gain * width**-0.5, 0.0
    yield prefix + "k_proj.weight", (shape.kv_heads * head_dim, width), gain * width**-0.5, 0.0
    yield prefix + "v_proj.weight", (shape.kv_heads * head_dim, width), width**-0.5, 0.0
    yield prefix + "o_proj.weight", (width, shape.heads * head_dim), _BRANCH_STD * (shape.heads * head_dim) ** -0.5, 0.0
    if normed:
        yield prefix + "q_norm.weight", (head_dim,), 0.1, _SCORE_STD**0.5
        yield prefix + "k_norm.weight", (head_dim,), 0.1, _SCORE_STD**0.5


def _experts(shape: Shape, prefix: str, names: tuple[str, str, str]) -> Iterator[_Entry]:
    yield prefix + "gate.weight", (shape.experts, shape.hidden), _ROUTER_STD * shape.hidden**-0.5, 0.0
    for expert in range(shape.experts):
        yield from _mlp(f"{prefix}experts.{expert}.", names, shape.hidden, shape.expert_width)


def _mlp(prefix: str, names: tuple[str, str, str], width: int, inner: int) -> Iterator[_Entry]:
    gate, up, down = names
    yield f"{prefix}{gate}.weight", (inner, width), 1.5 * width**-0.5, 0.0
    yield f"{prefix}{up}.weight", (inner, width), 1.5 * width**-0.5, 0.0
    yield f"{prefix}{down}.weight", (width, inner), _BRANCH_STD * inner**-0.5, 0.0


def _stored(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same tensors in the type of the files, with their scales."""
    for name, tensor in tensors:
        if dtype is not E4M3:
            yield name, tensor.to(dtype)
        elif not name.endswith(_IN_BLOCKS):
            yield name, tensor.to(torch.bfloat16)
        else:
            weight = torch.empty(tensor.shape, dtype=dtype)
            scales = torch.empty(blocks_in(tensor.shape[0]), blocks_in(tensor.shape[1]))
            quantize(tensor, weight, scales)
            yield name, weight
            yield f"{name}_scale_inv", scales.to(torch.bfloat16)  # powers of two: nothing is lost


def _tensors(shape: Shape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """All weights, in float32."""
    for name, size, std, mean in _layout(shape):
        # A generator for each name: a tensor does not depend on the order or on what else the model has.
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(size, np.float32)
        values = values * np.float32(std) + np.float32(mean)
        if name == "lm_head.weight" or (shape.tied and name == "model.embed_tokens.weight"):
            common = np.zeros(shape.vocab, bool)
            common[[ord("\n"), *range(0x20, 0x7F)]] = True
            values[~common] *= np.float32(_RARE_ROW)
        yield name, torch.from_numpy(values)


# --- the files beside them


def _texts(shape: Shape, dtype: str, spelling: Spelling) -> Texts:
    ids = {"bos_token_id": IM_START_ID, "eos_token_id": IM_END_ID, "pad_token_id": END_OF_TEXT_ID}
    return Texts(
        config=_config(shape, dtype, spelling) | ids,
        generation_config={**ids, "eos_token_id": [IM_END_ID, END_OF_TEXT_ID], "do_sample": False},
        tokenizer=byte_tokenizer(shape.vocab),
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.max_positions,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        },
        chat_template=CHATML_TEMPLATE,
    )


def _config(shape: Shape, dtype: str, spelling: Spelling) -> dict[str, Any]:
    """config.json. The two spellings of the same facts: see `make_tiny`."""
    common: dict[str, Any] = {
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": shape.max_positions,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if shape.arch == "mixtral":
        common |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "intermediate_size": shape.expert_width,
            "num_local_experts": shape.experts,
            "rms_norm_eps": 1e-5,
        }
    else:
        common |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "intermediate_size": 2 * shape.expert_width,
            "mlp_only_layers": list(shape.dense_layers),
            "moe_intermediate_size": shape.expert_width,
            "norm_topk_prob": shape.renormalise,
            "num_experts" if spelling == "hub" else "num_local_experts": shape.experts,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        }
    if dtype == "fp8":
        dtype = "bfloat16"
        common["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    if spelling == "hub":
        return common | {"rope_theta": shape.rope_theta, "torch_dtype": dtype, "transformers_version": "4.51.0"}
    rope = {"rope_theta": shape.rope_theta, "rope_type": "default"}
    return common | {"rope_parameters": rope, "dtype": dtype, "transformers_version": "5.0.0"}
