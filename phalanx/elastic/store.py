"""What an agreement needs from the world: a store that all ranks reach, and a clock.

`TcpStore` is the store of a single launcher (torch's TCPStore; only the client side is here), `MemoryStore` the one of
a simulation. Keys are text, values are bytes and never empty: an empty value reads as no value.
Everything is LOCAL: no call waits for a peer, except `wait`, up to its time-out.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from phalanx.errors import StoreLost

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_NOTHING = "\0nothing"
"""What is written nowhere: a compare-and-set that expects it changes nothing, and makes no key."""

_FIRST_POLL_S = 0.0002
_LAST_POLL_S = 0.004


class Clock(Protocol):
    """Time, as seconds from an arbitrary start; it never goes back."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class MonotonicClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class FakeClock:
    """A clock that only its sleepers move: a test's hours pass at once. Not for several threads."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += max(0.0, seconds)


class Store(Protocol):
    """Shared keys. `compare_set` is the only operation that decides anything; all the rest is hints and payload."""

    def get(self, key: str) -> bytes | None:
        """The value, or None when there is none. Does not wait."""

    def set(self, key: str, value: bytes) -> None: ...

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """Write `desired` if the value is `expected` ("": no value). Returns the value afterwards. Linearizable."""

    def delete(self, key: str) -> None:
        """Forget a value, if there is one."""

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        """The value, as soon as there is one; None when the time is over."""


class MemoryStore:
    """A dictionary as a store, for ranks that are threads of one process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def set(self, key: str, value: bytes) -> None:
        assert value, f"{key}: values are never empty"
        with self._lock:
            self._values[key] = bytes(value)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        with self._lock:
            now = self._values.get(key, b"").decode()
            if now != expected:
                return now
            self._values[key] = desired.encode()
            if not desired:
                del self._values[key]
            return desired

    def delete(self, key: str) -> None:
        with self._lock:
            self._values.pop(key, None)

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        return _poll(self, key, timeout_s, self._clock)


class TcpStore:
    """A client of the launcher's `torch.distributed.TCPStore`. One a thread. Raises StoreLost when that is gone.

    Reads are compare_sets that expect what is never there: one round trip that never blocks, while the store's own
    `get` blocks until there is a value and its `wait` is slow to give up (a wait of 4 ms took 0.1 s and more). They
    must not expect no value, "", for that makes the key, and then it looks to the launcher as if it had been written.
    """

    def __init__(self, host: str, port: int, *, timeout_s: float = 30.0, clock: Clock | None = None) -> None:
        """timeout_s: how long a launcher that is there but does not answer is borne."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # late: a simulation needs no torch

        self._clock = clock or MonotonicClock()
        self._where = f"{host}:{port}"
        self._timeout = timedelta(seconds=timeout_s)
        try:
            self._store: TCPStore = TCPStore(host, port, None, False, self._timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise self._lost(error) from error

    def get(self, key: str) -> bytes | None:
        value = self._compare_set(key, _NOTHING, _NOTHING)
        return value if value not in (b"", _NOTHING.encode()) else None

    def set(self, key: str, value: bytes) -> None:
        assert value, f"{key}: values are never empty"
        try:
            self._store.set(key, value)  # type: ignore[arg-type]  # it takes bytes as well as text
        except RuntimeError as error:
            raise self._lost(error) from error

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        return self._compare_set(key, expected, desired).decode()

    def delete(self, key: str) -> None:
        try:
            self._store.delete_key(key)
        except RuntimeError as error:
            raise self._lost(error) from error

    def wait(self, key: str, timeout_s: float) -> bytes | None:
        return _poll(self, key, timeout_s, self._clock)

    def _compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """On a key without a value it differs from the protocol, when `expected` is not "": it returns `expected`."""
        try:
            return bytes(self._store.compare_set(key, expected, desired))
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> StoreLost:
        return StoreLost(f"the launcher's store at {self._where} does not answer: {str(error).splitlines()[0]}")


def _poll(store: Store, key: str, timeout_s: float, clock: Clock) -> bytes | None:
    """Look again and again, at growing intervals: a waiting rank must not take the processor from a working one."""
    end = clock.now() + timeout_s
    pause = _FIRST_POLL_S
    while (value := store.get(key)) is None:
        left = end - clock.now()
        if left <= 0:
            return None
        clock.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_POLL_S)
    return value
