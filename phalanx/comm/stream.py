"""A peer on another host: the same words and areas as a peer's segment, in local memory, filled from a stream.

In shared memory a reader takes what it wants from what its peer wrote once. Between hosts the peer sends it: to each
reader a frame with what that one will take (`comm.frames`), and the reader's side of the stream puts it where the
peer's segment would have had it. So whoever waits, takes and checks does not know which kind of peer it has.

Everything happens in the thread that waits: `pump` sends what is left to send and receives what has come, without ever
blocking. A frame is accepted when it belongs to the current epoch and to this collective or the next; an older one is
skipped, and one that comes too early stays in the socket until it is wanted, which also holds back its sender.
"""

from __future__ import annotations

import logging
import mmap
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from phalanx.comm import tags
from phalanx.comm.frames import HEADER_BYTES, STAGING_BYTES, BadFrame, FrameReader, header
from phalanx.comm.links import Line, Links
from phalanx.comm.segment import GATHER_WORDS, RINGING, ROLL_CALL, Layout, Segment, Words

log = logging.getLogger("phalanx.comm")

_MAP_NORESERVE = 0x4000  # Linux; Python has no name for it
_MAX_QUEUED = 64
"""Frames that may wait for a peer that does not read: two collectives and some words are ever sent ahead."""

Part = npt.NDArray[Any]


def link_of(address: str) -> str:
    """The part of a communicator's address that other hosts use; empty when it has none. LOCAL."""
    return address.partition(" ")[2]


class StreamPeer(Segment):
    """A peer that is reached over TCP. LOCAL throughout."""

    __slots__ = (
        "_line",
        "_links",
        "_out",
        "_own_words",
        "_reader",
        "_scratch",
        "_socket",
        "_told",
        "address",
        "died",
        "epoch",
        "heard_ns",
        "incarnation",
        "number",
        "numbers",
        "rank",
    )

    pid = None
    """Of a process on another host nothing can be read here (`Silence`)."""

    number: int
    """The collective that runs, or ran last: frames of it and of the next are wanted now."""

    numbers: list[npt.NDArray[np.int32]]
    """Beside x and slots, by parity: which of its tokens the peer sent, for it sends those alone that are wanted."""

    def __init__(
        self, links: Links, own_words: Words, layout: Layout, rank: int, incarnation: int, address: str
    ) -> None:
        """own_words: this rank's, whose ring and roll call `wake` tells the peer. address: the peer's."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        super().__init__(mmap.mmap(-1, layout.total_bytes, flags=flags), layout)
        self.address, self.rank, self.incarnation = address, rank, incarnation
        self.numbers = [np.empty(layout.max_tokens, np.int32) for _ in (0, 1)]
        self.epoch = self.number = 0
        self.heard_ns = 0
        self.died = False
        self._links, self._own_words = links, own_words
        self._line: Line | None = None
        self._socket: socket.socket | None = None
        self._reader = FrameReader(self)
        self._scratch = memoryview(bytearray(STAGING_BYTES))
        self._out: deque[tuple[int, memoryview, bool]] = deque()  # tag, what is left of the frame, whether it is begun
        self._told = [0, 0]  # the ring and the roll call that the peer was told of last
        self._line = links.open(rank, incarnation, link_of(address))

    @property
    def unsent(self) -> bool:
        """Whether something is still on its way into the socket."""
        return bool(self._out)

    @property
    def broken(self) -> bool:
        """Whether the stream has ended, on this side or, as its new call says, on the other."""
        return self.died or self._links.parked(self.rank, self.incarnation)

    def adopt(self, epoch: int) -> None:
        """Serve under `epoch`: what is not yet on its way belongs to an earlier one, and is not sent any more."""
        self.epoch, self.number = epoch, 0
        self._out = deque(frame for frame in self._out if frame[2])

    # --- sending

    def send(self, tag: int, parts: Sequence[Part] = (), cut: Callable[[], None] | None = None) -> None:
        """Send a frame; what the socket does not take goes on its way in `pump`. The parts are C-contiguous, and may
        change afterwards. cut: called when half of the frame is sent (a fault point)."""
        if self.died:
            return
        length = sum(part.nbytes for part in parts)
        views = [memoryview(header(tag, length)), *_bytes(*parts)]
        sent, total = 0, HEADER_BYTES + length
        if cut is not None:
            views = [memoryview(b"".join(views))]
            sent = 0 if self._out else self._give([views[0][: total // 2]])
            cut()
        if not self._out and sent in (0, total // 2):
            sent += self._give([views[0][sent:], *views[1:]])
        if sent < total:
            self._queue(tag, memoryview(b"".join(views))[sent:], sent > 0)

    def wake(self) -> None:
        """Tell the peer of this rank's last ring and roll call, unless it knows of them."""
        ring, roll_call = self._own_words[RINGING], self._own_words[ROLL_CALL]
        if roll_call > self._told[1]:
            self._told[1] = roll_call
            self.send(tags.tag_of(roll_call, 0, tags.ROLL_CALL))
        if ring > self._told[0]:
            self._told[0] = ring
            self.send(ring | tags.RING)

    def _give(self, views: Sequence[memoryview]) -> int:
        """Bytes that the socket took at once."""
        if self._socket is None:
            return 0
        try:
            sent = self._socket.sendmsg(views)
        except BlockingIOError:
            return 0
        except OSError:  # the stream is broken; what came before that is still to be read, so reading finds it out
            return sum(map(len, views))
        self.heard_ns = time.monotonic_ns()
        return sent

    def _queue(self, tag: int, rest: memoryview, begun: bool) -> None:
        self._out.append((tag, rest, begun))
        if len(self._out) > _MAX_QUEUED:
            self._end(f"it has not read {_MAX_QUEUED} messages")

    def _flush(self) -> None:
        while self._out:
            tag, rest, begun = self._out[0]
            sent = self._give([rest])
            if sent < len(rest):
                self._out[0] = tag, rest[sent:], begun or sent > 0
                return
            self._out.popleft()

    # --- receiving

    def pump(self) -> None:
        """Send what is left to send and take what has come, without waiting."""
        if self._socket is None and not self._connected():
            return
        if self._out:
            self._flush()
        try:
            self._receive()
        except BadFrame as error:
            self._end(str(error))

    def _connected(self) -> bool:
        if self.died or self._line is None:
            return False
        done, self._socket = self._line.take()
        if done and self._socket is None:
            self._end()
        return self._socket is not None

    def _receive(self) -> None:
        assert self._socket is not None
        reader = self._reader
        reader.resume()
        while room := reader.room():
            try:
                n = self._socket.recv_into(room)
            except BlockingIOError:
                return
            except OSError:
                n = 0
            if n == 0:
                self._end()
                return
            self.heard_ns = time.monotonic_ns()
            whole = n == len(room)
            reader.received(n)
            if not whole:
                return

    def begin(self, tag: int, length: int) -> Sequence[memoryview] | None:
        """For the reader: where a frame's body goes."""
        kind, epoch, number = tag & tags.KIND_MASK, tag >> tags.EPOCH_SHIFT, tags.number_of(tag)
        if not 0 < kind <= tags.ROLL_CALL or length > self._most(kind) or length % self._unit(kind):
            raise BadFrame(f"rank {self.rank} sent a frame of kind {kind} with {length} bytes")
        if kind in (tags.RING, tags.ROLL_CALL):
            return ()
        if epoch > self.epoch:
            self.words[ROLL_CALL] = max(self.words[ROLL_CALL], epoch)
            return None
        if epoch < self.epoch or number < self.number:
            return [self._scratch[: min(STAGING_BYTES, length - at)] for at in range(0, length, STAGING_BYTES)]
        if number > self.number + 1:  # it goes on without us: whoever waits for it reads so in its word
            self.words[self._area(number) + Layout.SENT + self._links.rank] = tag
            return None
        parity = number & 1
        if kind == tags.DISPATCH:
            T = length // self._unit(kind)
            x, slots = self.x[parity][:T], self.slots[parity][: T * self.layout.top_k]
            return _bytes(x, slots, self.numbers[parity][:T])
        if kind == tags.COMBINE:
            return _bytes(self.y[parity][: length // self._unit(kind)])
        return _bytes(self.gather[parity][: length // 8])

    def end(self, tag: int, length: int) -> None:
        """For the reader: a frame is whole. Its words are written as the peer would have in its own segment."""
        kind, epoch, number = tag & tags.KIND_MASK, tag >> tags.EPOCH_SHIFT, tags.number_of(tag)
        words, layout, me = self.words, self.layout, self._links.rank
        if kind == tags.RING:
            words[RINGING] = tag & ~tags.KIND_MASK
        elif kind == tags.ROLL_CALL:
            words[ROLL_CALL] = max(words[ROLL_CALL], epoch)
        elif epoch == self.epoch and number >= self.number:
            area = self._area(number)
            words[area + Layout.TOKENS] = length // self._unit(kind)
            words[area + layout.START + me] = 0
            words[area + layout.COUNT + me] = length // self._unit(kind)
            words[area + Layout.BEGUN] = tag
            words[area + Layout.SENT + me] = tag

    def _area(self, number: int) -> int:
        return self.layout.areas[number & 1]

    def _unit(self, kind: int) -> int:
        """Bytes of one token, row or word of a frame's body."""
        row = self.layout.hidden * self.layout.itemsize
        return {tags.DISPATCH: row + (self.layout.top_k + 1) * 4, tags.COMBINE: row, tags.ALL_GATHER: 8}.get(kind, 1)

    def _most(self, kind: int) -> int:
        """The longest body that this rank can be sent: its peer holds at most all of its pairs."""
        most = {
            tags.DISPATCH: self.layout.max_tokens,
            tags.COMBINE: self.layout.max_tokens * self.layout.top_k,
            tags.ALL_GATHER: GATHER_WORDS,
        }.get(kind, 0)
        return most * self._unit(kind)

    # --- its end

    def register(self, poller: select.poll) -> None:
        """Have `poller` say when `pump` has something to do."""
        if self._socket is not None and not self._reader.held:
            poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._out else 0))

    def linger(self, seconds: float) -> None:
        """Wait, for at most so long, until everything is on its way."""
        deadline = time.monotonic() + seconds
        self.pump()
        while self._out and self._socket is not None and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            self.register(poller)
            poller.poll(left * 1000)
            self.pump()

    def close(self) -> None:
        """Hang up and forget what came."""
        self._end()
        self._reader.close()
        super().close()

    def _end(self, reason: str = "") -> None:
        if reason and not self.died:
            log.warning("the link to rank %d.%d is cut: %s", self.rank, self.incarnation, reason)
        self.died = True
        self._out.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._line is not None:
            self._links.drop(self.rank, self.incarnation, self._line)
            self._line = None


def _bytes(*arrays: Part) -> list[memoryview]:
    return [array.data.cast("B") for array in arrays if array.nbytes]
