"""Frames come whole, in order and in their places, however the bytes are cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.comm.frames import HEADER_BYTES, STAGING_BYTES, BadFrame, FrameReader, header


class Sink:
    """Takes every frame, its body in two places; holds back tags that are not yet welcome."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.frames: list[tuple[int, bytes]] = []
        self.unwelcome: set[int] = set()
        self._limit = limit
        self._body = bytearray()

    def begin(self, tag: int, length: int) -> Sequence[memoryview] | None:
        if length > self._limit:
            raise BadFrame(f"{length} bytes")
        if tag in self.unwelcome:
            return None
        self._body = bytearray(length)
        places = memoryview(self._body)
        return [part for part in (places[: length // 3], places[length // 3 :]) if len(part)]

    def end(self, tag: int, length: int) -> None:
        assert len(self._body) == length
        self.frames.append((tag, bytes(self._body)))


def feed(reader: FrameReader, stream: bytes, cuts: list[int]) -> bytes:
    """Hand over the stream in pieces of those sizes, over and over; returns what the reader did not want."""
    turn = 0
    while stream and len(room := reader.room()):
        n = min(cuts[turn % len(cuts)], len(room), len(stream))
        room[:n] = stream[:n]
        reader.received(n)
        stream = stream[n:]
        turn += 1
    return stream


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 7, 100, 5000, STAGING_BYTES, 3 * STAGING_BYTES + 5]), max_size=8),
    cuts=st.lists(st.sampled_from([1, 3, HEADER_BYTES, 999, 40_000, 1 << 20]), min_size=1, max_size=6),
)
def test_frames_come_whole_and_in_order_however_the_stream_is_cut(sizes: list[int], cuts: list[int]) -> None:
    if max(cuts) < 999:
        sizes = [min(size, 5000) for size in sizes]
    frames = [(tag, bytes((tag + i) % 251 for i in range(size))) for tag, size in enumerate(sizes, 1)]
    sink = Sink()
    rest = feed(FrameReader(sink), b"".join(header(tag, len(body)) + body for tag, body in frames), cuts)
    assert not rest
    assert sink.frames == frames


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=5), held=st.integers(1, 5))
def test_a_frame_that_is_held_back_stops_the_stream_until_it_is_wanted(cuts: list[int], held: int) -> None:
    frames = [(tag, bytes([tag]) * (10 * tag)) for tag in range(1, 6)]
    sink = Sink()
    sink.unwelcome = {held}
    reader = FrameReader(sink)
    rest = feed(reader, b"".join(header(tag, len(body)) + body for tag, body in frames), cuts)
    assert reader.held
    assert sink.frames == frames[: held - 1]
    reader.resume()
    assert sink.frames == frames[: held - 1], "it was still unwelcome"
    sink.unwelcome = set()
    reader.resume()
    assert not feed(reader, rest, cuts)
    assert sink.frames == frames


@given(said=st.binary(min_size=HEADER_BYTES, max_size=200))
def test_what_is_no_frame_is_refused_and_never_waited_for(said: bytes) -> None:
    if said.startswith(header(0, 0)[:4]):
        return
    with pytest.raises(BadFrame):
        feed(FrameReader(Sink()), said, [len(said)])


def test_a_length_that_nobody_may_send_is_refused_before_anything_of_it_is_taken() -> None:
    sink = Sink(limit=100)
    reader = FrameReader(sink)
    with pytest.raises(BadFrame, match="101 bytes"):
        feed(reader, header(1, 100) + b"x" * 100 + header(2, 101), [1000])
    assert [tag for tag, _ in sink.frames] == [1]
