"""Frames: how messages stand on a stream between two hosts, and how they are taken in while they come.

    magic (4 bytes) | bytes in the body (4) | tag (8) | body

The tag is that of shared memory (`comm.tags`), so a frame says for itself to which epoch and collective it belongs.
Bodies, by kind: dispatch, the T tokens that want one of the reader's slots [T, D], their slots int32 [T, K] and their
numbers at the source int32 [T]; combine, the rows of the reader's pairs [n, D]; all_gather, int64 [n]; the others none.

A reader takes bytes in any portions. Small frames pass through one buffer, several with one system call; the body of a
large one goes straight to its place. No torch here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

MAGIC = 0x5048_4C46
_HEADER = struct.Struct("<IIQ")
HEADER_BYTES = _HEADER.size
STAGING_BYTES = 64 * 1024
MAX_BODY_BYTES = (1 << 32) - 1


class BadFrame(Exception):
    """What came is no frame, or one that nobody may send: the stream cannot be trusted any more."""


class Receiver(Protocol):
    """Who decides where a frame's body goes."""

    def begin(self, tag: int, length: int) -> Sequence[memoryview] | None:
        """The places, `length` bytes in all, for the body of the frame that comes next; None: not yet, ask again with
        `FrameReader.resume`. Raises BadFrame."""

    def end(self, tag: int, length: int) -> None:
        """The body is whole."""


def header(tag: int, length: int) -> bytes:
    """What stands before a body of `length` bytes. LOCAL."""
    return _HEADER.pack(MAGIC, length, tag)


class FrameReader:
    """Takes frames from a stream, byte by byte if need be. Receive into `room()`, then say how much by `received`.
    LOCAL throughout."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._from = self._to = 0  # what lies in the staging buffer and is not taken yet
        self._body: list[memoryview] | None = None  # what is still missing of the body that comes
        self._frame = (0, 0)  # its tag and length
        self.held = False
        """The receiver does not want the next frame yet: nothing more is read until `resume`."""

    def room(self) -> memoryview:
        """Where the next bytes go; empty while a frame is held back."""
        if self.held:
            return self._staging[:0]
        if self._body and len(self._body[0]) >= STAGING_BYTES:  # what was staged of it is in its place already
            return self._body[0]
        if self._from:
            left = self._to - self._from
            self._staging[:left] = bytes(self._staging[self._from : self._to])
            self._from, self._to = 0, left
        return self._staging[self._to :]

    def received(self, n: int) -> None:
        """`n` bytes were written to the start of `room()`. Raises BadFrame."""
        if self._body and len(self._body[0]) >= STAGING_BYTES:
            self._body[0] = self._body[0][n:]
        else:
            self._to += n
        self._parse()

    def resume(self) -> None:
        """Ask the receiver again for the frame that it did not want. Raises BadFrame."""
        if self.held:
            self.held = False
            self._parse()

    def close(self) -> None:
        """Forget everything, so that the places of a body may be unmapped."""
        self._body, self.held, self._from, self._to = None, False, 0, 0

    def _parse(self) -> None:
        while True:
            if self._body is None:
                if self._to - self._from < HEADER_BYTES:
                    return
                magic, length, tag = _HEADER.unpack_from(self._staging, self._from)
                if magic != MAGIC:
                    raise BadFrame(f"{magic:#x} begins no frame")
                places = self._receiver.begin(tag, length)
                if places is None:
                    self.held = True
                    return
                self._from += HEADER_BYTES
                self._body, self._frame = list(places), (tag, length)
            while self._body:
                place = self._body[0]
                n = min(len(place), self._to - self._from)
                place[:n] = self._staging[self._from : self._from + n]
                self._from += n
                if n < len(place):
                    self._body[0] = place[n:]
                    return
                del self._body[0]
            self._body = None
            self._receiver.end(*self._frame)
