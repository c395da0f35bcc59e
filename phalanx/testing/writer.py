"""Writes a model directory in the Hugging Face layout, whole or not at all.

Tensors arrive one by one from an iterator and leave in shards, so that memory holds one shard, not the model. The
directory is built under another name beside its place and renamed when it is complete: nobody ever reads half a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from phalanx.errors import BadConfig

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML turn format, as a Jinja template."""


@dataclass(frozen=True)
class Texts:
    """What stands beside the weights.

    config, generation_config: become config.json and generation_config.json.
    tokenizer_config: becomes tokenizer_config.json, with `chat_template` added (and written as chat_template.jinja).
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    tokenizer_config: Mapping[str, Any]
    chat_template: str
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further text files: name -> content."""


def check_target(path: Path, force: bool) -> None:
    """Raise BadConfig when a model may not be written at `path`. LOCAL.

    `force` replaces a directory that is empty or holds a model, never any other: a mistyped path must not cost data."""
    if not path.parent.is_dir():
        raise BadConfig(f"{path.parent} is not a directory: create it first")
    if not path.exists():
        return
    if not path.is_dir():
        raise BadConfig(f"{path} exists and is not a directory")
    if not any(path.iterdir()):
        return
    if not (path / "config.json").is_file():
        raise BadConfig(f"{path} holds something that is not a model: choose another path")
    if not force:
        raise BadConfig(f"{path} exists already: pass --force to replace it")


def check_room(path: Path, size: int) -> None:
    """Raise BadConfig when so many bytes cannot be written at `path`, before the disk is full of a part of them. A
    model that they replace goes only when they are complete. LOCAL."""
    total, _, free = shutil.disk_usage(path.parent)
    if total and size > free:  # one that says it has no size at all is no disk, and writing tells why
        raise BadConfig(
            f"{path} would take {size / 1e9:.1f} GB, and {path.parent} has room for {free / 1e9:.1f} GB: choose "
            "another path, fewer --layers, or no weights (--config-only, for `phalanx serve --load-format dummy`)"
        )


def write_model(
    path: Path,
    texts: Texts,
    tensors: Iterable[tuple[str, Tensor]] | None,
    *,
    shard_bytes: int,
    force: bool = False,
    progress: Callable[[int], None] = lambda written_bytes: None,
) -> None:
    """Write a model directory at `path`. LOCAL.

    A shard is closed by the tensor that fills it to `shard_bytes`. One shard is named model.safetensors and has no
    index, more are named model-0000i-of-0000n.safetensors and have one. tensors: None for a directory without weights.
    `progress` is told the bytes of each tensor taken. Raises BadConfig when the place is taken, OSError when the disk
    is full or not writable."""
    check_target(path, force)
    with _replacing(path) as directory:
        if tensors is not None:
            _write_weights(directory, tensors, shard_bytes, progress)
        _write_texts(directory, texts)


def _write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int, progress: Callable[[int], None]
) -> None:
    names: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    filled = total = 0

    def close_shard() -> None:
        file = directory / f"shard-{len(names)}"
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(0o644)  # the library creates its files for the owner alone
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        shard[name] = tensor.contiguous()
        filled += size
        total += size
        progress(size)
        if filled >= shard_bytes:
            close_shard()
            filled = 0
    if shard:
        close_shard()

    if len(names) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, members in enumerate(names):
        file = f"model-{number + 1:05}-of-{len(names):05}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(members, file))
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_texts(directory: Path, texts: Texts) -> None:
    _write_json(directory / "config.json", texts.config)
    _write_json(directory / "generation_config.json", texts.generation_config)
    _write_json(directory / "tokenizer_config.json", {**texts.tokenizer_config, "chat_template": texts.chat_template})
    texts.tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(texts.chat_template, encoding="utf-8")
    for name, content in texts.extra.items():
        (directory / name).write_text(content, encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A fresh directory that takes the place of `path` when the block ends well, and vanishes when it does not."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stale = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
