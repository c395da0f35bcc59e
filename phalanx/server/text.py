"""Text to tokens and back: encoding, incremental decoding, stop strings, chat templates.

The tokenizer is the model's own tokenizer.json, run by the `tokenizers` library; nothing here needs transformers.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import DecodeStream

from phalanx.errors import BadCheckpoint
from phalanx.server.template import ChatTemplate

_CONTEXT_TOKENS = 6
"""Prompt tokens that a decoder sees before the first output token: some tokenizers strip a leading space."""

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""Bytes that stand for themselves in byte-level vocabularies; the n-th other byte is written as U+0100 + n."""


class ModelText:
    """What the server takes from a model directory: tokenizer, chat template, special tokens, limits, defaults."""

    def __init__(self, path: str, chat_template: str = "") -> None:
        """Read `path`. BadCheckpoint names the file that is missing or broken. LOCAL."""
        self.config = _read_json(path, "config.json", required=True)
        settings = _read_json(path, "tokenizer_config.json")
        generation = _read_json(path, "generation_config.json")
        self.raw = _read_tokenizer(path)
        self.vocab_size = int(self.config.get("vocab_size") or self.raw.get_vocab_size(with_added_tokens=True))
        tokens = {k: _token(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.special_tokens = tokens
        self.bos_id = self._id(tokens["bos_token"])
        self.eos_ids = self._eos_ids(tokens["eos_token"], generation)
        self.template = ChatTemplate.read(path, settings, {k: v for k, v in tokens.items() if v}, chat_template)
        self.max_positions = int(self.config.get("max_position_embeddings") or 0)
        self.sampling_defaults = {
            name: generation[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if isinstance(generation.get(name), (int, float)) and generation.get("do_sample", True)
        }
        self._anchor = self.raw.encode("a", add_special_tokens=False).ids[-1:]
        self._byte_level = "ByteLevel" in type(self.raw.decoder).__name__ or "ByteLevel" in str(self.raw.decoder)
        self.token_text = functools.lru_cache(maxsize=1 << 16)(self._token_text)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. special: add what the tokenizer puts around a text (BOS, say)."""
        ids: list[int] = self.raw.encode(text, add_special_tokens=special).ids
        return ids

    def encode_long(self, text: str, *, special: bool = True) -> list[int]:
        """The same, for a thread: of the library's calls only the one for batches lets go of the interpreter."""
        ids: list[int] = self.raw.encode_batch([text], add_special_tokens=special)[0].ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, also when they are a part of a character only."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        symbol = self.raw.id_to_token(token_id) or ""
        if match := _BYTE_FALLBACK.fullmatch(symbol):
            return bytes([int(match[1], 16)])
        if self._byte_level and (symbol_bytes := _bytes_of_symbols(symbol)) is not None:
            return symbol_bytes
        return text.encode()

    def _token_text(self, token_id: int) -> str:
        # Decoded after another token, because at the start of a text some decoders strip a space.
        before = self.raw.decode(self._anchor, skip_special_tokens=False)
        both = self.raw.decode([*self._anchor, token_id], skip_special_tokens=False)
        return both[len(before) :] if both.startswith(before) else self.raw.decode([token_id], False)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.raw.token_to_id(token)

    def _eos_ids(self, eos_token: str | None, generation: dict[str, Any]) -> frozenset[int]:
        found: set[int] = set()
        for source in (generation.get("eos_token_id"), self.config.get("eos_token_id"), self._id(eos_token)):
            found |= {source} if isinstance(source, int) else set(source or ())
        return frozenset(found)


class Detokenizer:
    """Output tokens to text, one by one: what it gives is never half a character, and its sum is the whole text."""

    def __init__(self, text: ModelText, prompt_ids: Sequence[int], *, skip_special: bool = True) -> None:
        self._raw, self._skip = text.raw, skip_special
        self._context = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._stream = DecodeStream(ids=list(self._context), skip_special_tokens=skip_special)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._raw, token_id)
        except Exception:
            # The stream cannot go on when the text before it changes in hindsight: give what there is, start anew.
            piece = self.flush()
            self._stream = DecodeStream(skip_special_tokens=self._skip)
            return piece
        if piece is None:
            return ""
        self._context, self._pending = self._pending, []
        return str(piece)

    def flush(self) -> str:
        """The text of tokens that wait for more, at the end; broken characters become U+FFFD."""
        if not self._pending:
            return ""
        before = self._raw.decode(self._context, skip_special_tokens=self._skip)
        both = self._raw.decode(self._context + self._pending, skip_special_tokens=self._skip)
        if both.startswith(before):
            piece = both[len(before) :]
        else:
            piece = self._raw.decode(self._pending, skip_special_tokens=self._skip)
        self._context, self._pending = self._pending, []
        return str(piece)


class StopStrings:
    """Finds stop strings in a text that comes in pieces, and holds back what could still become one.

    include: the stop string found is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain; after a stop string was `found`, the rest of it, and nothing more."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        hits = [(at, i) for i, stop in enumerate(self._stops) if (at := text.find(stop)) >= 0]
        if hits:
            at, which = min(hits)
            self.found, self._held = self._stops[which], ""
            return text[: at + len(self.found)] if self._include else text[:at]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _bytes_of_symbols(symbol: str) -> bytes | None:
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    values = []
    for char in symbol:
        if ord(char) in _PRINTABLE:
            values.append(ord(char))
        elif 0 <= ord(char) - 0x100 < len(others):
            values.append(others[ord(char) - 0x100])
        else:
            return None
    return bytes(values)


def _token(value: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_tokenizer(path: str) -> RawTokenizer:
    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file):
        raise BadCheckpoint(f"{file} is missing: the server needs the model's tokenizer in this form")
    try:
        raw = RawTokenizer.from_file(file)
    except Exception as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None
    raw.no_truncation()
    raw.no_padding()
    return raw


def _read_json(path: str, name: str, *, required: bool = False) -> dict[str, Any]:
    file = os.path.join(path, name)
    try:
        with open(file, "rb") as stream:
            content = msgspec.json.decode(stream.read())
    except FileNotFoundError:
        if required:
            raise BadCheckpoint(f"{file} is missing") from None
        return {}
    except (OSError, msgspec.DecodeError) as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{file} does not hold a JSON object")
    return content
